"""ViT-22B: do normed queries and keys keep a model trainable at a learning rate that is far too large for it without them?

Large models diverge as their attention scores grow; small ones do so at large rates. Both arms have the parallel block and
train at one rate, ten times what suits a model of this size. The other arm without the parallel block is shown.
"""

from ..arena.study import Decides, Study

HOST = "vit_22b/nano:patch=7"

STUDY = Study(
    system="vit_22b",
    claim="At a learning rate ten times too large, a ViT whose queries and keys are normed learns, where one without these "
          "norms learns less or not at all.",
    source="Scaling Vision Transformers to 22 Billion Parameters (arXiv 2302.05442), section 2 and figure 1",
    arms={"normed": HOST, "plain": f"{HOST},qk_norm=false", "normed, sequential": f"{HOST},block=sequential"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 200, "batch_size": 32},
    lrs=(3e-2,),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.05, diverged=0.1),
    published="With 8 billion parameters training diverges within some thousand steps without the norms and does not with "
              "them (in a figure); no accuracy is given",
    scale="250 thousand parameters, 200 steps with a warm-up of 20 on handwritten digits and gradients clipped, against 8 "
          "billion and JFT-4B. Here the rate is made too large, there the model; that the two go together is what "
          "Small-scale proxies for large-scale Transformer training instabilities (arXiv 2309.14322) finds.",
    cannot="What 22 billion parameters bring; the 15 % of time that parallel blocks save on their hardware.",
)
