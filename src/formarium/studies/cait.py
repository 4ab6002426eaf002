"""CaiT: does LayerScale let a deep Transformer train better?

Twenty-four narrow layers of plain attention, the class token among 16 patches from the start, as in the paper's comparison;
with the factors started at 1e-5, as the paper has it at this depth, and without factors. The factors are one vector a
branch, so the parameters are the same within 1 %.
"""

from ..arena.study import Decides, Study

HOST = "cait/nano:patch=7,dim=32,depth=24,class_depth=0,mixer=attention"

STUDY = Study(
    system="cait",
    claim="In a pre-norm Transformer of 24 layers, LayerScale classifies better than plain residual branches.",
    source="Going Deeper with Image Transformers (arXiv 2103.17239), table 1, depth 24",
    arms={"layer_scale": f"{HOST},layer_scale=1e-5", "plain": f"{HOST},layer_scale=none"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 80, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.02),
    published="DeiT-S at 24 layers: 82.4 % ImageNet top-1 with LayerScale, 78.9 % without (quoted from memory)",
    scale="310 thousand parameters and 80 steps, less than one pass over 3,500 handwritten digits, against 43 M and 400 "
          "passes over ImageNet. So few steps are a handicap for branches that start at nothing.",
    cannot="That accuracy keeps growing to 48 layers; that class-attention is better than a class token from the start.",
)
