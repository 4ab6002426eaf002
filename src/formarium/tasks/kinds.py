"""Which kind of token (name, string, comment, ...) is each byte of Python source part of? For text encoders."""

import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import BadData, DoesNotFit, unknown
from ..core.model import Model
from ..data import text as texts
from ..skeletons.encoder import Encoder
from .base import DataInfo, Task, evaluating, generator

MOST = {"train": 200_000, "val": 50_000, "test": 200_000}  # bytes
LARGEST = 30_000  # bytes of a file, so that there are many
NAMES = ("space", "name", "number", "string", "comment", "operator", "keyword")
KINDS = {tokenize.NAME: 1, tokenize.NUMBER: 2, tokenize.STRING: 3, tokenize.COMMENT: 4, tokenize.OP: 5}
SPACE, KEYWORD = 0, 6
SHOWN = 384  # bytes


class TokenKinds(Task):
    """Bytes (B, N) of Python source -> for each the kind of token that it is part of, 0 to 6.

    The head is the embedding: kinds are bytes 0 to 6, which no source has. context: bytes in a window. Training takes
    windows at random; evaluation cuts a split into windows, one after the other.
    """

    metric = "accuracy"
    higher_is_better = True
    model_type = Encoder
    domain = "language"

    def __init__(self, *, context: int = 64) -> None:
        if not isinstance(context, int) or context < 1:
            raise DoesNotFit(f"context is a number of bytes, 1 or more, not {context!r}")
        self.name, self.context = "token_kinds", context
        files = texts.stdlib_files(Path(sysconfig.get_path("stdlib")))
        self.text: dict[str, Tensor] = {}
        self.kinds: dict[str, Tensor] = {}
        for split, size in MOST.items():
            sources = [data for _, data in sorted(files[split].items()) if data.isascii() and len(data) < LARGEST]
            sources = sources[:1 + sum(length < size for length in accumulate(map(len, sources)))]
            self.text[split] = torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8)[:size]
            self.kinds[split] = torch.cat([kinds_of(data) for data in sources])[:size]
            if len(self.text[split]) <= context:
                raise BadData(f"a context of {context} bytes is too long: there are {len(self.text[split])} bytes "
                              f"of source for {split}; give a smaller context=")
        title, source, licence, _ = texts.stdlib().origin
        self.info = DataInfo(f"Kinds of tokens in {title}", source, licence,
                             {s: len(t) // context * context for s, t in self.text.items()},
                             f"files of ASCII below {LARGEST} bytes; the kinds are those of Python's own tokenize")

    def model_options(self) -> dict[str, Any]:
        return {"vocab": 256, "context": self.context}

    def check_fits(self, model: torch.nn.Module, name: str) -> None:
        if not isinstance(model, Encoder):
            raise DoesNotFit(f"the task {self.name} needs a text encoder such as bert/nano; {name} is none; what predicts "
                             "the next byte has tasks of its own, e.g. stdlib")

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        data = self.text["train"]
        at = torch.randint(len(data) - self.context, (batch_size, 1), generator=generator(seed, step))
        at = at + torch.arange(self.context)
        return data[at].long(), self.kinds["train"][at]

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order: bytes and kinds (B, context); what is left at its end is not read."""
        if split not in MOST:
            raise unknown("split", split, MOST)
        end = self.info.sizes[split]
        inputs, kinds = (t[:end].view(-1, self.context).split(batch_size) for t in (self.text[split], self.kinds[split]))
        return ((x.long(), y) for x, y in zip(inputs, kinds, strict=True))

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(answers(model, batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """loss in nats a byte, and accuracy: the share of bytes whose kind was the likeliest."""
        hits, count, loss = 0, 0, 0.0
        with evaluating(model) as device:
            for inputs, kinds in self.batches(split, batch_size):
                logits, wanted = answers(model, inputs.to(device)).float().flatten(0, 1), kinds.to(device).flatten()
                loss += F.cross_entropy(logits, wanted, reduction="sum").item()
                hits += int((logits.argmax(1) == wanted).sum())
                count += len(wanted)
        self.check_counted(count, split)
        return {"loss": loss / count, "accuracy": hits / count}

    def show(self, model: Model) -> dict[str, Any]:
        """The kinds of some bytes from the middle of the test split, the right ones and the model's."""
        windows = max(1, SHOWN // self.context)
        at = self.info.sizes["test"] // 2 // self.context * self.context
        part = slice(at, at + windows * self.context)
        inputs = self.text["test"][part].view(-1, self.context).long()
        with evaluating(model) as device:
            found = answers(model, inputs.to(device)).argmax(-1).clamp_max(len(NAMES) - 1)
        return {"kind": "spans", "text": bytes(self.text["test"][part].tolist()).decode("ascii"), "names": list(NAMES),
                "truth": self.kinds["test"][part].tolist(), "answer": found.flatten().tolist()}


def answers(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """Logits (B, N, 256), from the embedding as the layers see it."""
    encoder = next(m for m in model.modules() if isinstance(m, Encoder))  # training may have wrapped it
    return F.linear(model(inputs), encoder.project(encoder.token.weight))


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
