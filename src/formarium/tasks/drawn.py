"""Which token answers? Sequences drawn by a rule, some of whose tokens ask for another one."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import unknown
from ..core.model import Model
from ..skeletons.decoder import Decoder
from .base import DataInfo, Task, evaluating, generator

HELD_OUT = {"val": (10**9, 256), "test": (10**9 + 1, 512)}  # split -> a step that no training reaches, sequences


class Drawn(Task):
    """Ids (B, N) -> logits (B, N, vocab) of the answers. A subclass says `name`, `rule` and `draw`, and what is asked.

    Training sequences never repeat; 256 to validate and 512 to test are the same for every seed.
    """

    rule: ClassVar[str]  # in words, for the report
    metric = "accuracy"
    higher_is_better = True
    model_type = Decoder
    domain = "language"

    def __init__(self, *, vocab: int, tokens: int, answers: int) -> None:
        self.vocab, self.tokens = vocab, tokens
        sizes = {"train": 0} | {split: rows * answers for split, (_, rows) in HELD_OUT.items()}
        self.info = DataInfo(self.rule, "drawn by a rule", "none", sizes, f"{vocab} tokens, {tokens} to a sequence; sizes "
                             "are answers; training draws new sequences at every step")

    def draw(self, random: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        """Ids and the answers asked for at each of them (B, N), -100 where nothing is asked."""
        raise TypeError(f"{type(self).__name__} must define draw")

    def model_options(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "context": self.tokens}

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        return self.draw(generator(seed, step), batch_size)

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        ids, answers = batch
        return F.cross_entropy(model(ids).flatten(0, 1), answers.flatten())

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if split not in HELD_OUT:
            raise unknown("split", split, HELD_OUT)
        step, rows = HELD_OUT[split]
        yield from zip(*(t.split(batch_size) for t in self.draw(generator(0, step), rows)), strict=True)

    def evaluate(self, model: Model, split: str, batch_size: int = 128) -> dict[str, float]:
        """loss in nats an answer, and accuracy: the share of answers that were the likeliest token."""
        total, hits, count = 0.0, 0, 0
        with evaluating(model) as device:
            for ids, answers in self.batches(split, batch_size):
                asked = answers >= 0
                logits, wanted = model(ids.to(device))[asked.to(device)].float(), answers[asked].to(device)
                total += F.cross_entropy(logits, wanted, reduction="sum").item()
                hits += int((logits.argmax(1) == wanted).sum())
                count += len(wanted)
        self.check_counted(count, split)
        return {"loss": total / count, "accuracy": hits / count}
