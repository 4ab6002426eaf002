"""BERT: is an encoder that filled in masked bytes of plain text a better start than chance?

The task: which kind of token (name, string, comment, ...) is each byte of Python source part of? Pre-training sees other
source, without labels. The arms are equal in steps of fine-tuning; a last one, from chance, trains for as many steps as
pre-training and fine-tuning together, and is shown. In a first run pre-training at a rate of 3e-3 got stuck at the
frequencies of bytes, and fine-tuning from there failed (34 % against 69 %); with 1e-3 a trial of another seed learned.
"""

from ..arena.study import Cell, Decides, Seed, Study

HOST = "bert/nano"
CONTEXT, PRETRAINING, TUNING = 64, 1000, 200  # bytes, steps


def pretrain(seed: Seed) -> None:
    seed.pretrain("bert", HOST, task=seed.get_task("stdlib", context=CONTEXT), steps=PRETRAINING, lr=1e-3)


def tune(cell: Cell) -> dict[str, float]:
    assert cell.prepared is not None
    start = str(cell.prepared / "pretrained/encoder.safetensors") if cell.arm == "masked words" else None
    return cell.train(init=start, steps=TUNING + PRETRAINING if cell.arm == "scratch, longer" else TUNING)[1]


STUDY = Study(
    system="bert",
    claim="An encoder pre-trained on plain text by filling in what is masked is more accurate after fine-tuning than one "
          "that starts from chance.",
    source="BERT (arXiv 1810.04805), abstract and section 5",
    arms={"masked words": HOST, "scratch": HOST, "scratch, longer": HOST},
    matched="steps",
    task="token_kinds",
    recipe={"steps": TUNING, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=pretrain,
    measure=tune,
    data=("stdlib",),
    published="GLUE 80.5, 7.7 points over the best before it (abstract); the paper trains no model of its size from chance",
    scale="200 thousand parameters, bytes, and 1,000 steps of 1,024 bytes of source, against 110 M to 340 M, word pieces, "
          "and a million steps of 128,000 tokens.",
    cannot="Next-sentence prediction; both directions against one, the paper's ablation; sentences and questions.",
)
