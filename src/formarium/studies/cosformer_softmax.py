"""cosFormer: is it as good a language model as softmax attention?

The same decoder of bytes with either mixer. Parameters are the same.
"""

from ..arena.study import Decides, Study

HOST = "gpt/nano:depth=2"

STUDY = Study(
    system="cosformer",
    claim="Linear attention re-weighted by the cosine of the distance has no higher a loss than softmax attention.",
    source="cosFormer (arXiv 2202.08791), abstract, and language modelling on WikiText-103",
    arms={"cosformer": f"{HOST},mixer=cosformer", "softmax": HOST},
    matched="parameters",
    task="shakespeare",
    task_options={"context": 64},
    recipe={"steps": 800, "batch_size": 16},
    lrs=(2e-3, 5e-3),
    seeds=3,
    decides=Decides("bits_per_byte", better="lower", by="ratio", no_worse_by=0.02),
    published="On WikiText-103 a perplexity no higher than that of the Transformer (comparable or better, in words: "
              "the table could not be looked up)",
    scale="2 layers of width 64 and 800 steps of 16 x 64 bytes of plays, against a large decoder and 150,000 steps of 512 "
          "words of WikiText-103. Each arm takes its best rate.",
    cannot="Long-Range Arena, fine-tuning of bidirectional models, and time and memory at thousands of tokens.",
)
