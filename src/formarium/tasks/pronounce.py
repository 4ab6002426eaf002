"""How is the word said? Spelling to phonemes; the share of words said right decides."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import DoesNotFit, unknown
from ..data import pronunciations
from ..data.pronunciations import Pronunciations
from ..skeletons.encdec import EncDec
from .base import SPLITS, DataInfo, Task, evaluating, order

PAD, START, END = 0, 1, 2
SPECIAL = 3  # tokens before the letters, and before the phonemes
SHOWN = 12

_order = lru_cache(maxsize=8)(order)
Pair = tuple[tuple[Tensor, Tensor], Tensor]  # (letters (B, N), start and phonemes (B, M)), phonemes and end (B, M)


class Pronounce(Task):
    """Letters (B, N) -> phonemes (B, M), padded with 0. Any pronunciation that the dictionary has of a word is right.

    Every epoch sees each training word once with each of its pronunciations. beam: of the search in evaluation.
    """

    metric = "word_accuracy"
    higher_is_better = True
    model_type = EncDec
    domain = "seq2seq"

    def __init__(self, name: str, data: Pronunciations, *, beam: int = 1) -> None:
        if not isinstance(beam, int) or beam < 1:
            raise DoesNotFit(f"beam is a number of hypotheses, 1 or more, not {beam!r}")
        self.name, self.data, self.beam = name, data, beam
        self.letters = {c: SPECIAL + i for i, c in enumerate(data.letters)}
        self.phonemes = {p: SPECIAL + i for i, p in enumerate(data.phonemes)}
        train = [(word, way) for word, ways in data.splits["train"].items() for way in ways]
        pairs = {"train": train} | {s: [(word, ways[0]) for word, ways in data.splits[s].items()] for s in ("val", "test")}
        self.info = DataInfo(*data.origin[:3], sizes={s: len(pairs[s]) for s in SPLITS}, note=data.origin.note)
        every = [pair for part in pairs.values() for pair in part]
        self.longest = max(len(word) for word, _ in every), max(len(way) for _, way in every)
        self.encoded = {s: (_table([[self.letters[c] for c in word] for word, _ in pairs[s]], self.longest[0]),
                            _table([[START, *(self.phonemes[p] for p in way), END] for _, way in pairs[s]],
                                   self.longest[1] + 2)) for s in SPLITS}

    def model_options(self) -> dict[str, Any]:
        return {"source_vocab": SPECIAL + len(self.letters), "vocab": SPECIAL + len(self.phonemes), "tie": "target",
                "source_context": self.longest[0], "context": self.longest[1] + 1, "pad": PAD, "start": START, "end": END}

    def _pair(self, split: str, index: Tensor | slice) -> Pair:
        """Samples of a split, cut to the longest among them."""
        sources, targets = (table[index].long() for table in self.encoded[split])
        sources, targets = (t[:, :int((t != PAD).sum(1).max())] for t in (sources, targets))
        inputs = targets[:, :-1]
        return (sources, inputs.masked_fill(inputs == END, PAD)), targets[:, 1:]

    def train_batch(self, seed: int, step: int, batch_size: int) -> Pair:
        n, start = self.info.sizes["train"], step * batch_size
        epochs = range(start // n, (start + batch_size - 1) // n + 1)
        return self._pair("train", torch.cat([_order(n, seed, e) for e in epochs])[start % n:][:batch_size])

    def loss(self, model: torch.nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=PAD)

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[list[str], Pair]]:
        """A split in order, every word once: the words, and their letters and usual pronunciations."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        words = [word for word, ways in self.data.splits[split].items() for _ in (ways if split == "train" else ways[:1])]
        for start in range(0, len(words), batch_size):
            yield words[start:start + batch_size], self._pair(split, slice(start, start + batch_size))

    def say(self, model: EncDec, sources: Tensor) -> list[tuple[str, ...]]:
        """The model's pronunciations of words given as letters (B, N); tokens that are no phoneme are "?"."""
        said = []
        for ids in model.generate(sources, beam=self.beam).tolist():
            ids = ids[:ids.index(END)] if END in ids else [i for i in ids if i != PAD]
            said.append(tuple(self.data.phonemes[i - SPECIAL] if i >= SPECIAL else "?" for i in ids))
        return said

    def evaluate(self, model: EncDec, split: str, batch_size: int = 256) -> dict[str, float]:  # type: ignore[override]
        """loss in nats a phoneme, with the usual pronunciation given; word_accuracy; phoneme_error_rate: edits to the
        nearest pronunciation, over the phonemes of those."""
        total, phonemes, right, edits, spoken, count = 0.0, 0, 0, 0, 0, 0
        with evaluating(model) as device:
            for words, ((sources, inputs), targets) in self.batches(split, batch_size):
                sources, targets = sources.to(device), targets.to(device)
                logits = model((sources, inputs.to(device))).float().flatten(0, 1)
                total += F.cross_entropy(logits, targets.flatten(), ignore_index=PAD, reduction="sum").item()
                phonemes += int((targets != PAD).sum())
                for word, said in zip(words, self.say(model, sources), strict=True):
                    distance, length = min((edit_distance(said, way), len(way)) for way in self.data.splits[split][word])
                    right, edits, spoken = right + (distance == 0), edits + distance, spoken + length
                count += len(words)
        self.check_counted(count, split)
        return {"loss": total / phonemes, "word_accuracy": right / count, "phoneme_error_rate": edits / spoken}

    def show(self, model: EncDec) -> dict[str, Any]:  # type: ignore[override]
        """Twelve test words, evenly spaced in the split: all pronunciations that are right, and the model's."""
        n = self.info.sizes["test"]
        index = torch.linspace(0, n - 1, min(SHOWN, n)).long()
        words = [list(self.data.splits["test"])[i] for i in index.tolist()]
        with evaluating(model) as device:
            said = self.say(model, self._pair("test", index)[0][0].to(device))
        return {"kind": "pairs", "sources": words, "answers": [" ".join(s) for s in said],
                "truths": [[" ".join(way) for way in self.data.splits["test"][word]] for word in words]}


def _table(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Ids of different lengths as uint8 (N, width), padded."""
    return torch.frombuffer(bytearray(b"".join(bytes(row).ljust(width, bytes([PAD])) for row in rows)),
                            dtype=torch.uint8).view(len(rows), width)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


def phonemes(*, beam: int = 1) -> Pronounce:
    """English words of the CMU Pronouncing Dictionary."""
    return Pronounce("phonemes", pronunciations.cmudict(), beam=beam)
