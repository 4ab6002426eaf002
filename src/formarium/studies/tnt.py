"""TNT: does attention inside patches classify better than a plain ViT of the same size?

Images of 32x32 in patches of 8x8, as few and coarse as to hide what is in them; TNT has 16 words of 8 channels in each, the
ViT a wider MLP, so that both have the same parameters within 1 %.
"""

from ..arena.study import Decides, Study

HOST = "tnt/nano:patch=8,stride=2,dim=64,word_dim=8"

STUDY = Study(
    system="tnt",
    claim="Words that attend to each other within patches classify better than a plain ViT of equal parameters.",
    source="Transformer in Transformer (arXiv 2103.00112), table 3, TNT-S and DeiT-S",
    arms={"tnt": HOST, "vit": "vit/nano:patch=8,channel=mlp(ratio=5)"},
    matched="parameters",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1 81.5 % of TNT-S, 79.8 % of DeiT-S, of 23.8 M and 22.1 M parameters and 5.2 G and 4.6 G MACs",
    scale="250 thousand parameters in 4 layers, half a pass over 9,000 images of 32x32 pixels in 16 patches, against 24 M "
          "in 12 layers and 300 passes over ImageNet in 196 patches. TNT has the more MACs, as in the paper.",
    cannot="That the advantage stays at 82.9 % (TNT-B) and in detection; the cost of the words in seconds.",
)
