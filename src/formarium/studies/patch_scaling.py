"""Patch scaling: does a ViT of smaller patches classify better, all else equal?

Digits of 8 x 8 pixels: patches of 4 pixels are 4 tokens, patches of one pixel are 64. The same layers, steps and batches,
so the smaller patches cost more computation; parameters differ by the patches' projection and the positions alone. The
budget is 1,200 steps since a first run of 250, in which the net of one-pixel patches had not begun to learn (loss 2.05).
"""

from ..arena.study import Decides, Study

HOST = "vit/nano:depth=2,img_size=8"

STUDY = Study(
    system="patch_scaling",
    claim="With everything else fixed, a plain Transformer's loss on test data falls as its patches shrink, down to "
          "a pixel.",
    source="Scaling Laws in Patchification (arXiv 2502.03738), figure 1 and the tables of DeiT and Adventurer",
    arms={"1 pixel": f"{HOST},patch=1", "4 pixels": f"{HOST},patch=4", "2 pixels": f"{HOST},patch=2"},
    matched="steps",
    task="digits",
    recipe={"steps": 1200, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("loss", better="lower", by="ratio", at_least=0.05),
    published="On ImageNet the loss on test data falls with every halving of the patch, from 16 pixels to one; "
              "Adventurer-Base rises to 84.6 % top-1 at patches of one pixel",
    scale="100 thousand parameters and at most 64 tokens of digits, from scratch in 1,200 steps, against up to 100 M and "
          "50,176 tokens of photographs in 300 passes over ImageNet and more. 64 tokens are little for attention.",
    cannot="That the law goes on to tens of thousands of tokens, and that decoders matter less then.",
)
