"""ViT-ResNAS: does the skip past the spatial reduction help?

The same two-stage network with the skip, pooled tokens padded with zero channels, and without: the same parameters, the
same multiply-accumulates.
"""

from ..arena.study import Decides, Study

HOST = "vit_resnas/nano:patch=4"

STUDY = Study(
    system="vit_resnas",
    claim="A skip of pooled tokens past the convolution that halves the grid trains to a better accuracy than the "
          "convolution alone.",
    source="Searching for Efficient Multi-Stage Vision Transformers (arXiv 2109.00642), section 3.1 and the ablation of "
           "the architecture",
    arms={"skip": HOST, "no skip": f"{HOST},skip=false"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="On ImageNet the residual reduction gains some tenths of a percent top-1 over a reduction without it, and "
              "stabilises training (from memory of the ablation; the paper's claim is the direction)",
    scale="200 thousand parameters in 2 + 2 blocks with one reduction and 150 steps on 3,500 handwritten digits, against "
          "40 M in 16 blocks with two reductions and 300 passes over ImageNet.",
    cannot="That the searched networks beat others of their computation, and that training many sub-networks at once ranks "
           "them as training each alone would.",
)
