"""cosFormer: does the cosine of the distance make linear attention a better language model?

The same decoder of bytes with ReLU features and the cosine, and with ReLU features alone. Parameters are the same.
"""

from ..arena.study import Decides, Study

HOST = "gpt/nano:depth=2"

STUDY = Study(
    system="cosformer",
    claim="Re-weighting linear attention by the cosine of the distance lowers the loss of a language model.",
    source="cosFormer (arXiv 2202.08791), abstract, and language modelling on WikiText-103",
    arms={"cosformer": f"{HOST},mixer=cosformer", "plain linear": f"{HOST},mixer=cosformer(reweight=False)"},
    matched="parameters",
    task="shakespeare",
    task_options={"context": 64},
    recipe={"steps": 800, "batch_size": 16},
    lrs=(2e-3, 5e-3),
    seeds=3,
    decides=Decides("bits_per_byte", better="lower", by="ratio", at_least=0.02),
    published="On WikiText-103 a lower perplexity than linear attention without the cosine (in words: the table could "
              "not be looked up)",
    scale="2 layers of width 64 and 800 steps of 16 x 64 bytes of plays, against a large decoder and 150,000 steps of 512 "
          "words of WikiText-103. The control has ReLU features too, the paper's linear Transformer 1 + ELU.",
    cannot="Long-Range Arena, fine-tuning of bidirectional models, and time and memory at thousands of tokens.",
)
