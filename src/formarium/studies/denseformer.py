"""DenseFormer: does averaging over depth lower the loss at equal size and steps?

The paper trains 48 to 90 blocks of width 768 on web text. Here 8 thin blocks read bytes of plays: deep for their width, so
that earlier outputs can be of use to later blocks, and small enough for seconds a run.
"""

from ..arena.study import Decides, Study

HOST = "gpt/nano:depth=8,dim=48"

STUDY = Study(
    system="denseformer",
    claim="A weighted average over the outputs of all earlier blocks lowers perplexity at equal depth, for a few scalars.",
    source="DenseFormer (arXiv 2402.02622), abstract",
    arms={"denseformer": f"{HOST},residual=denseformer", "plain": HOST},
    matched="parameters",
    task="shakespeare",
    task_options={"context": 64},
    recipe={"steps": 500, "batch_size": 8},
    lrs=(3e-3, 1e-2),
    seeds=3,
    decides=Decides("bits_per_byte", better="lower", by="ratio", at_least=0.01),
    published="48 blocks reach the perplexity of 90 plain ones on OpenWebText2, and less than 48 plain ones (in a figure)",
    scale="8 blocks of width 48 for 500 steps on 1 MB of plays, against 48 blocks of width 768 on OpenWebText2",
    cannot="Memory and time at equal perplexity, which the paper compares with Transformers of up to 90 blocks.",
)
