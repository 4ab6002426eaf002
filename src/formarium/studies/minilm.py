"""MiniLM: is a student that copied the relations of a teacher's last layer a better start than chance?

The task: which kind of token (name, string, comment, ...) is each byte of Python source part of? A teacher learns it. Then
students of half its width and depth learn it in few steps. They start from chance; after copying the teacher's last
attention and value relations on other source, without labels; or after copying its answers there (soft labels) for as many
steps. A last one starts from chance and trains for as many steps as both together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arena.study import Cell, Decides, Seed, Study
from ..core.model import Model
from ..data.text import stdlib
from ..tasks.base import generator
from ..tasks.kinds import TokenKinds, answers
from ..weights.load import load

TEACHER, STUDENT = "bert/nano", "minilm/nano"
CONTEXT, DISTILLING, TUNING = 64, 300, 150


class SoftLabels(TokenKinds):
    """The answers of a teacher for source without labels."""

    def __init__(self, teacher: Model) -> None:
        super().__init__()
        self.teacher, self.other = teacher, stdlib().splits["train"]

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(self.other) - self.context, (batch_size, 1), generator=generator(seed, step))
        inputs = self.other[at + torch.arange(self.context)].long()
        with torch.no_grad():
            return inputs, answers(self.teacher, inputs).softmax(-1)

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(answers(model, batch[0]).flatten(0, 1), batch[1].flatten(0, 1))


def distil(seed: Seed) -> None:
    """A teacher, and two students of it."""
    seed.train(TEACHER, into="teacher", steps=600, lr=1e-3)
    file = seed.folder / "teacher/last.safetensors"
    source = seed.get_task("stdlib", context=CONTEXT)
    seed.pretrain(f"minilm(teacher={file})", STUDENT, task=source, into="relations", steps=DISTILLING, lr=3e-3)
    seed.train(STUDENT, task=SoftLabels(load(file)), into="answers", steps=DISTILLING, lr=3e-3)


def tune(cell: Cell) -> dict[str, float]:
    from ..arena.config import read_json

    assert cell.prepared is not None
    start = {"relations": "relations/encoder.safetensors", "answers": "answers/last.safetensors"}.get(cell.arm)
    steps = TUNING + DISTILLING if cell.arm == "scratch, longer" else TUNING
    found = cell.train(init=start and str(cell.prepared / start), steps=steps)[1]
    return {**found, "teacher_accuracy": read_json(cell.prepared / "teacher/result.json")["test"]["accuracy"]}


STUDY = Study(
    system="minilm",
    claim="A small student that first copies the attention and value relations of the last layer of a larger teacher is "
          "more accurate than the same student from chance.",
    source="MiniLM (arXiv 2002.10957), abstract and sections 3 and 4",
    arms={"relations": STUDENT, "scratch": STUDENT, "answers": STUDENT, "scratch, longer": STUDENT},
    matched="steps",
    task="token_kinds",
    recipe={"steps": TUNING, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=distil,
    measure=tune,
    data=("stdlib",),
    published="6 layers of width 768 keep more than 99 % of the accuracy of BERT-base on SQuAD 2.0 and several GLUE tasks, "
              "at half of its computation (abstract)",
    scale="A teacher of 4 layers of width 64 that learned one task in 600 steps, against BERT-base, 12 layers of width 768 "
          "that learned from plain text; 300 steps of distillation, against 400,000.",
    cannot="One distillation for many tasks, as the paper's, since a teacher of this size learns little from plain text in "
           "minutes; questions, entailment and the rest of GLUE; teacher assistants, which need three sizes.",
)
