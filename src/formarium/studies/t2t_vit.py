"""T2T-ViT: do tokens made step by step from windows that overlap classify better than patches cut once?

The control is a ViT of the same depth and width, with patches of 4x4 pixels, learned positions and a slightly wider MLP,
so that both have the same parameters and as many tokens. The third arm has one soft split, of windows of 7x7 pixels: these
overlap too, but nothing relates them before the ViT.
"""

from ..arena.study import Decides, Study

HOST = "t2t_vit/nano:dim=48"

STUDY = Study(
    system="t2t_vit",
    claim="A ViT whose tokens are made by tokens-to-token layers classifies better than one whose patches are cut once.",
    source="Tokens-to-Token ViT (arXiv 2101.11986), tables 1 and 2",
    arms={"tokens to token": HOST, "patches": "vit/nano:dim=48,channel=mlp(ratio=2.125)",
          "one split": f"{HOST},strides=(4,)"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 120, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1: T2T-ViT-14 81.5 % with 21.5 M parameters, ViT-S/16 78.1 % with 48.6 M, DeiT-S 79.9 % with "
              "22.1 M (ViT and DeiT from memory)",
    scale="two soft splits, 16 channels between them, 4 layers of width 48 and about one pass over 3,500 handwritten "
          "digits, against three splits, 64 channels, 14 layers of width 384 and 310 passes over ImageNet.",
    cannot="That deep and narrow is better than shallow and wide; 384 pixels; the cost on a GPU.",
)
