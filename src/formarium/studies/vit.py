"""ViT: are learned positions better than none?

The same model with a learned vector added to each patch, and without: then an image is a bag of patches.
"""

from ..arena.study import Decides, Study

HOST = "vit/nano:patch=7"

STUDY = Study(
    system="vit",
    claim="A learned position added to each patch classifies better than none.",
    source="An Image is Worth 16x16 Words (arXiv 2010.11929), table 8",
    arms={"learned": HOST, "none": f"{HOST},position=none"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 500, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.02),
    published="ViT-B/16, ImageNet, five images a class: 64.2 % with one-dimensional positions, 61.4 % without",
    scale="205 thousand parameters and 16 patches of handwritten digits, from scratch, against 86 M, 196 patches of "
          "photographs and pre-training on JFT-300M. A bag of patches of a digit says less than a bag of patches of a "
          "photograph, so a larger effect is to be expected.",
    cannot="The main claim, that with enough images a Transformer overtakes convolutional networks: a budget of minutes "
           "ends before more images help either. That two-dimensional positions are no better than one-dimensional ones.",
)
