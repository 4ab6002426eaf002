"""DeepNet: does a Transformer of 200 layers train with DeepNorm, and not with plain post-norm?

200 layers of width 16 on the 8x8 digits of scikit-learn, 4 patches an image: all that a few minutes allow at this depth.
The loss at the end of training decides: 2.303 is guessing, and what a run that diverged counts as. Pre-norm is shown.
"""

import math

from ..arena.study import Decides, Study

HOST = "vit/nano:depth=200,dim=16,heads=2,pool=mean,residual="

STUDY = Study(
    system="deepnet",
    claim="With DeepNorm a post-norm Transformer of 200 layers trains, where one with plain post-norm does not.",
    source="DeepNet (arXiv 2203.00555), section 5.1, table 1",
    arms={"deepnorm": HOST + "deepnet", "post-norm": HOST + "post_norm", "pre-norm": HOST + "pre_norm"},
    matched="parameters",
    task="digits",
    recipe={"steps": 60, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("train_loss", better="lower", by="difference", at_least=0.1, unit="nats", diverged=math.log(10)),
    published="WMT17 English-German, 100 + 100 layers: DeepNorm 28.9 BLEU, plain post-norm diverges, as it does from 18 + "
              "18 layers on (quoted from memory)",
    scale="An encoder of width 16 and 60 steps with a warm-up of 6 on tiny images, against encoder and decoder of width "
          "512, 100,000 steps with a warm-up of 4,000 on translation. Gradients are clipped here, which helps the control.",
    cannot="Long trainings, in which instability shows late, depths of 1,000 layers, and the quality that depth is for.",
)
