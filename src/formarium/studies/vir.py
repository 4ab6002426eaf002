"""ViR: does an image classifier lose accuracy when causal retention, which runs in constant memory, replaces attention?

The same patches, widths and depth. In ViR a patch sees only those before it, row by row, and the class token all of them.
That its parallel, chunkwise and recurrent forms answer alike is exact, so the tests hold it, not this.
"""

from ..arena.study import Decides, Study

STUDY = Study(
    system="vir",
    claim="An image backbone of causal retention classifies about as well as a ViT of the same size.",
    source="ViR (arXiv 2310.19731), abstract: competitive performance",
    arms={"retention": "vir/nano:patch=7", "attention": "vit/nano:patch=7"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 250, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", no_worse_by=0.02),
    published="ImageNet accuracy competitive with DeiT's at the same size (in words: the table could not be looked up)",
    scale="200 thousand parameters and 16 patches of handwritten digits, two passes over 3,500 of them, against 22 M and "
          "more, 196 patches and 300 passes over ImageNet.",
    cannot="Throughput and memory at large images, where the paper's advantage lies: on a CPU attention too runs in memory "
           "linear in the tokens.",
)
