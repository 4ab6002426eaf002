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
from ..skeletons.memory import MemoryDecoder
from .base import SPLITS, DataInfo, Task, evaluating, generator

PROMPT, SAMPLE = 64, 300  # bytes
STREAMS = 10  # rows that a model with a memory reads side by side, as in Transformer-XL's evaluation


class NextByte(Task):
    """Bytes (B, N) -> logits (B, N, 256) of the bytes after them. No tokeniser, so every model has the same alphabet.

    context: bytes in a window. Training takes windows at random. Evaluation cuts a split into windows one after the
    other, so each byte but the first is predicted once, from those before it in its window; the last window is shorter.

    A model with a memory (`MemoryDecoder`) also gets what comes before a window: in training the bytes before it, read
    without gradient and without a loss; in evaluation it reads a split in 10 rows, window after window. mem_len: the bytes
    of it that count, in training and evaluation, 0: none; None: in training as many as a window has, in evaluation as many
    as the model's memory holds.
    """

    metric = "bits_per_byte"
    higher_is_better = False
    model_type = Decoder
    domain = "language"

    def __init__(self, name: str, text: Text, *, context: int = 128, mem_len: int | None = None) -> None:
        if not isinstance(context, int) or context < 1:
            raise DoesNotFit(f"context is a number of bytes, 1 or more, not {context!r}")
        if mem_len is not None and (not isinstance(mem_len, int) or mem_len < 0):
            raise DoesNotFit(f"mem_len is a number of bytes, 0 or more, or None for the model's own, not {mem_len!r}")
        lengths = {s: len(text.splits[s]) for s in SPLITS}
        if min(lengths.values()) <= context:
            raise BadData(f"{name} is too short for a context of {context} bytes: every split needs {context + 1} bytes, "
                          f"there are {', '.join(f'{n} in {s}' for s, n in lengths.items())}; give a longer text or a "
                          "smaller context=")
        self.name, self.text, self.context, self.mem_len = name, text, context, mem_len
        self.info = DataInfo(*text.origin[:3], sizes={s: n - 1 for s, n in lengths.items()}, note=text.origin.note)

    def model_options(self) -> dict[str, Any]:
        return {"vocab": 256, "context": self.context}

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets (B, context), and the bytes before them; the text is a ring there."""
        data = self.text.splits["train"]
        starts = torch.randint(len(data) - self.context, (batch_size, 1), generator=generator(seed, step))
        windows = data[starts + torch.arange(self.context + 1)].long()
        before = torch.arange(-(self.context if self.mem_len is None else self.mem_len), 0)
        return windows[:, :-1], windows[:, 1:], data[(starts + before) % len(data)].long()

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets, *rest = batch
        decoder = with_memory(model)
        if decoder is None:
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        memory = decoder.memory(self.mem_len)
        with torch.no_grad():
            for before in rest:
                for start in range(0, before.shape[1], self.context):
                    decoder.hidden(before[:, start:start + self.context], cache=memory)
        return F.cross_entropy(model(inputs, cache=memory).flatten(0, 1), targets.flatten())

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

    def streams(self, split: str, rows: int = STREAMS) -> Iterator[tuple[Tensor, Tensor]]:
        """A split cut into rows, window after window: inputs and targets (rows, context), targets past the end are -100."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        data = self.text.splits[split].long()
        length = math.ceil((len(data) - 1) / rows / self.context) * self.context
        rows = math.ceil((len(data) - 1) / length)
        missing = rows * length - len(data) + 1
        inputs, targets = F.pad(data[:-1], (0, missing)), F.pad(data[1:], (0, missing), value=-100)
        yield from zip(*(t.view(rows, length).split(self.context, dim=1) for t in (inputs, targets)), strict=True)

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """loss in nats a byte, bits_per_byte, and accuracy: the share of bytes that were the likeliest."""
        total, hits, count = 0.0, 0, 0
        decoder = with_memory(model)
        carried = {} if decoder is None else {"cache": decoder.memory(self.mem_len)}
        with evaluating(model) as device:
            batches = self.streams(split, min(batch_size, STREAMS)) if carried else self.batches(split, batch_size)
            for inputs, targets in batches:
                logits, targets = model(inputs.to(device), **carried).float().flatten(0, 1), targets.to(device).flatten()
                total += F.cross_entropy(logits, targets, reduction="sum").item()
                hits += int((logits.argmax(1) == targets).sum())
                count += int((targets >= 0).sum())
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


def with_memory(model: torch.nn.Module) -> MemoryDecoder | None:
    """The model itself, if it has a memory; training may have wrapped it (DistributedDataParallel, torch.compile)."""
    return next((m for m in model.modules() if isinstance(m, MemoryDecoder)), None)


def stdlib(*, context: int = 128, mem_len: int | None = None) -> NextByte:
    """About 4 MB of Python source."""
    return NextByte("stdlib", texts.stdlib(), context=context, mem_len=mem_len)


def shakespeare(*, context: int = 128, mem_len: int | None = None) -> NextByte:
    """1.1 MB of plays."""
    return NextByte("shakespeare", texts.shakespeare(), context=context, mem_len=mem_len)


def wikitext2(*, context: int = 128, mem_len: int | None = None) -> NextByte:
    """WikiText-2 without its training part, 2.4 MB."""
    return NextByte("wikitext2", texts.wikitext2(), context=context, mem_len=mem_len)


def text(path: str | Path, *, context: int = 128, mem_len: int | None = None) -> NextByte:
    """Your text: a file, or a folder of .txt files."""
    return NextByte(f"text:{path}", texts.from_path(path), context=context, mem_len=mem_len)
