"""Three things: is a ViT whose layers work in pairs as accurate as the one with all layers in a row?

Twelve layers in a row against six pairs: as many parameters and operations, half the depth. Without layer scale, whose
start near zero needs more steps than there are.
"""

from ..arena.study import Decides, Study

HOST = "three_things/nano:stem=patch,patch=7,layer_scale=none"

STUDY = Study(
    system="three_things",
    claim="Layers of a ViT that work in pairs classify about as well as the same layers in a row.",
    source="Three Things Everyone Should Know About Vision Transformers (arXiv 2203.09795), section 3",
    arms={"6x2": f"{HOST},depth=6,branches=2", "12x1": f"{HOST},depth=12,branches=1"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", no_worse_by=0.02),
    published="ImageNet top-1 of ViT-S and ViT-B of 36 layers: in pairs within about 0.3 points of those in a row (quoted "
              "from memory)",
    scale="600 thousand parameters, 12 layers and 150 steps on 3,500 digits of 16 patches, against 65 M and more, 36 "
          "layers and 400 epochs of ImageNet.",
    cannot="That pairs are faster where a batch is small; fine-tuning of the attentions alone, and the stem in masked "
           "pre-training, for which models of this size are trained too briefly before.",
)
