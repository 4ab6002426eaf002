"""Which byte comes next? Cross-entropy; bits per byte over the whole split decide."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import BadData, DoesNotFit, unknown
from ..core.model import Model
from ..data import text as texts
from ..data.text import Text
from ..skeletons.decoder import Decoder
from .base import SPLITS, DataInfo, Task, evaluating, generator

PROMPT, SAMPLE = 64, 300  # bytes


class NextByte(Task):
    """Bytes (B, N) -> logits (B, N, 256) of the bytes after them. No tokeniser, so every model has the same alphabet.

    context: bytes in a window. Training takes windows at random. Evaluation cuts a split into windows one after the
    other, so each byte but the first is predicted once, from those before it in its window; the last window is shorter.
    """

    metric = "bits_per_byte"
    higher_is_better = False
    model_type = Decoder
    domain = "language"

    def __init__(self, name: str, text: Text, *, context: int = 128) -> None:
        if not isinstance(context, int) or context < 1:
            raise DoesNotFit(f"context is a number of bytes, 1 or more, not {context!r}")
        lengths = {s: len(text.splits[s]) for s in SPLITS}
        if min(lengths.values()) <= context:
            raise BadData(f"{name} is too short for a context of {context} bytes: every split needs {context + 1} bytes, "
                          f"there are {', '.join(f'{n} in {s}' for s, n in lengths.items())}; give a longer text or a "
                          "smaller context=")
        self.name, self.text, self.context = name, text, context
        self.info = DataInfo(*text.origin[:3], sizes={s: n - 1 for s, n in lengths.items()}, note=text.origin.note)

    def model_options(self) -> dict[str, Any]:
        return {"vocab": 256, "context": self.context}

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        data = self.text.splits["train"]
        starts = torch.randint(len(data) - self.context, (batch_size, 1), generator=generator(seed, step))
        windows = data[starts + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order: inputs and targets (B, context), the last (1, what is left)."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        data = self.text.splits[split]
        end = (len(data) - 1) // self.context * self.context
        inputs, targets = (data[i:end + i].view(-1, self.context) for i in (0, 1))
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            yield x.long(), y.long()
        if end < len(data) - 1:
            yield data[None, end:-1].long(), data[None, end + 1:].long()

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """loss in nats a byte, bits_per_byte, and accuracy: the share of bytes that were the likeliest."""
        total, hits, count = 0.0, 0, 0
        with evaluating(model) as device:
            for inputs, targets in self.batches(split, batch_size):
                logits, targets = model(inputs.to(device)).float().flatten(0, 1), targets.to(device).flatten()
                total += F.cross_entropy(logits, targets, reduction="sum").item()
                hits += int((logits.argmax(1) == targets).sum())
                count += len(targets)
        self.check_counted(count, split)
        loss = total / count
        return {"loss": loss, "bits_per_byte": loss / math.log(2), "accuracy": hits / count}

    def show(self, model: Decoder) -> dict[str, Any]:  # type: ignore[override]
        """The first 64 bytes of the test split (fewer where the context is), and 300 bytes as the model goes on."""
        prompt = self.text.splits["test"][:min(PROMPT, self.context)]
        with evaluating(model) as device:
            random = torch.Generator(device).manual_seed(0)
            out = model.generate(prompt[None].long().to(device), SAMPLE, temperature=0.8, top_k=40, generator=random)
        told = bytes(prompt.tolist())
        return {"kind": "text", "prompt": told.decode(errors="replace"),
                "text": bytes(out[0, len(told):].tolist()).decode(errors="replace")}


def stdlib(*, context: int = 128) -> NextByte:
    """About 4 MB of Python source."""
    return NextByte("stdlib", texts.stdlib(), context=context)


def shakespeare(*, context: int = 128) -> NextByte:
    """1.1 MB of plays."""
    return NextByte("shakespeare", texts.shakespeare(), context=context)


def wikitext2(*, context: int = 128) -> NextByte:
    """WikiText-2 without its training part, 2.4 MB."""
    return NextByte("wikitext2", texts.wikitext2(), context=context)


def text(path: str | Path, *, context: int = 128) -> NextByte:
    """Your text: a file, or a folder of .txt files."""
    return NextByte(f"text:{path}", texts.from_path(path), context=context)
