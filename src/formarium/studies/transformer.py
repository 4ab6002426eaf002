"""Attention Is All You Need: are several heads better than one at the same cost?

Letters to phonemes; the same encoder and decoder of width 64 with 4 heads of 16 channels, or with one of 64. Parameters and
computation are the same.
"""

from ..arena.study import Decides, Study

STUDY = Study(
    system="transformer",
    claim="Attention with several heads translates better than with a single head of the same width in all.",
    source="Attention Is All You Need (arXiv 1706.03762), table 3, rows (A)",
    arms={"heads": "transformer/nano", "one head": "transformer/nano:heads=1"},
    matched="parameters",
    task="phonemes",
    recipe={"steps": 300, "batch_size": 64},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("loss", better="lower", by="ratio", at_least=0.02),
    published="perplexity 4.92 with 8 heads, 5.29 with one (a loss of 1.59 and 1.67 nats, 4 % more), BLEU 25.8 and 24.9",
    scale="2 + 2 layers of width 64 and 300 steps on spelling to phonemes, against 6 + 6 of width 512 and 100,000 steps on "
          "English to German. The number that decides is the loss with the right phonemes before it given.",
    cannot="Translation, and that too many heads hurt again (16 and 32 in the table).",
)
