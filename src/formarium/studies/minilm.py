"""MiniLM: is a student that copied the relations of a teacher's last layer a better start than chance?

The task: which kind of token (name, string, comment, ...) is each byte of Python source part of? A teacher learns it. Then
students of half its width and depth learn it in few steps. They start from chance; after copying the teacher's last
attention and value relations on other source, without labels; or after copying its answers there (soft labels) for as many
steps. A last one starts from chance and trains for as many steps as both together. The head is the embedding: kinds are
bytes that the text has not.
"""

import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arena.study import Cell, Decides, Seed, Study
from ..core.model import Model
from ..data.text import Text, stdlib, stdlib_files
from ..skeletons.encoder import Encoder
from ..tasks.base import evaluating, generator
from ..tasks.language import NextByte
from ..weights.load import load

TEACHER, STUDENT = "bert/nano", "minilm/nano"
CONTEXT, DISTILLING, TUNING = 64, 300, 150
LABELLED = {"train": 200_000, "val": 50_000, "test": 200_000}  # bytes
LARGEST = 30_000  # bytes of a file, so that there are many
KINDS = {tokenize.NAME: 1, tokenize.NUMBER: 2, tokenize.STRING: 3, tokenize.COMMENT: 4, tokenize.OP: 5}
SPACE, KEYWORD = 0, 6


class TokenKinds(NextByte):
    """Windows (B, 64) of Python source -> for each byte the kind of token that it is part of."""

    model_type = Encoder  # type: ignore[assignment]
    metric = "accuracy"
    higher_is_better = True

    def __init__(self) -> None:
        files, splits = stdlib_files(Path(sysconfig.get_path("stdlib"))), {}
        self.kinds: dict[str, Tensor] = {}
        for split, size in LABELLED.items():
            sources = [data for _, data in sorted(files[split].items()) if data.isascii() and len(data) < LARGEST]
            sources = sources[:1 + sum(length < size for length in accumulate(map(len, sources)))]
            splits[split] = torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8)[:size]
            self.kinds[split] = torch.cat([kinds_of(data) for data in sources])[:size]
        super().__init__("kinds of tokens", Text(splits, stdlib().origin), context=CONTEXT)

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        data, random = self.text.splits["train"], generator(seed, step)
        at = torch.randint(len(data) - CONTEXT, (batch_size, 1), generator=random) + torch.arange(CONTEXT)
        return data[at].long(), self.kinds["train"][at]

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        end = len(self.kinds[split]) // CONTEXT * CONTEXT
        inputs, kinds = (t[:end].view(-1, CONTEXT).split(batch_size) for t in (self.text.splits[split], self.kinds[split]))
        return ((x.long(), y) for x, y in zip(inputs, kinds, strict=True))

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(answers(model, batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        hits, count, loss = 0, 0, 0.0
        with evaluating(model):
            for inputs, kinds in self.batches(split, batch_size):
                logits, wanted = answers(model, inputs).flatten(0, 1), kinds.flatten()
                loss += F.cross_entropy(logits, wanted, reduction="sum").item()
                hits, count = hits + int((logits.argmax(1) == wanted).sum()), count + len(wanted)
        return {"loss": loss / count, "accuracy": hits / count}


class SoftLabels(TokenKinds):
    """The answers of a teacher for source without labels."""

    def __init__(self, teacher: Model) -> None:
        super().__init__()
        self.teacher, self.other = teacher, stdlib().splits["train"]

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        at = torch.randint(len(self.other) - CONTEXT, (batch_size, 1), generator=generator(seed, step))
        inputs = self.other[at + torch.arange(CONTEXT)].long()
        with torch.no_grad():
            return inputs, answers(self.teacher, inputs).softmax(-1)

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(answers(model, batch[0]).flatten(0, 1), batch[1].flatten(0, 1))


def answers(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """Logits (B, N, 256)."""
    return F.linear(model(inputs), model.token.weight)  # type: ignore[arg-type, union-attr]


def kinds_of(source: bytes) -> Tensor:
    """The kind of token that each byte of a Python file, of ASCII alone, is part of."""
    kinds, starts = torch.full((len(source),), SPACE), [0, 0]
    for line in io.BytesIO(source):
        starts.append(starts[-1] + len(line))
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        string = "STRING" in tokenize.tok_name[token.type]  # parts of f-strings have names of their own
        kind = KINDS[tokenize.STRING] if string else KINDS.get(token.type, SPACE)
        (row, column), (last, end) = token.start, token.end
        if kind != SPACE:
            kinds[starts[row] + column:starts[last] + end] = KEYWORD if keyword.iskeyword(token.string) else kind
    return kinds


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
    task=TokenKinds,
    recipe={"steps": TUNING, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=3,
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
