"""Pre-norm, which GPT-2 took up: does it train without warm-up where post-norm does not?

The claim about GPT's shape that a small model can test. The rate starts at its height and falls in a cosine. A run that
diverged counts as 8 bits a byte, a guess among all 256.
"""

from ..arena.study import Decides, Study

HOST = "gpt/nano:depth=6,dim=48"

STUDY = Study(
    system="gpt",
    claim="Without a warm-up of the learning rate, norms inside the residual branches (pre-norm) train to a lower loss "
          "than norms after the sum (post-norm).",
    source="On Layer Normalization in the Transformer Architecture (Xiong et al. 2020, arXiv 2002.04745), sections 3 and 4",
    arms={"pre-norm": f"{HOST},residual=pre_norm", "post-norm": f"{HOST},residual=post_norm"},
    matched="parameters",
    task="shakespeare",
    task_options={"context": 64},
    recipe={"steps": 500, "batch_size": 8, "warmup": 0.0},
    lrs=(3e-4, 1e-3, 3e-3, 1e-2),
    seeds=3,
    decides=Decides("bits_per_byte", better="lower", by="ratio", at_least=0.05, diverged=8.0),
    published="IWSLT14 De-En with Adam: post-norm without warm-up reaches a BLEU of 8.45, with it about 34; pre-norm "
              "without warm-up is on par with the latter",
    scale="6 layers of width 48 for 500 steps on 1 MB of plays, against 6 + 6 layers of width 512 that translate. "
          "Each arm takes its best rate, which favours post-norm, since the paper compares at one. Gradients are clipped.",
    cannot="That GPT-2 does many tasks without being trained on them.",
)
