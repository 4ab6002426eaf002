"""Text as bytes, uint8 (N,), with fixed, disjoint splits."""

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadData
from .cache import Origin, locate

STDLIB_BYTES = 4_000_000
# not library code: third-party, tests, an application, generated tables, and what differs between builds of one version
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "pydoc_data", "__pycache__")


@dataclass(frozen=True, eq=False)
class Text:
    """splits: train, val and test -> uint8 (N,)."""

    splits: dict[str, Tensor]
    origin: Origin


def _text(train: bytes, val: bytes, test: bytes, origin: Origin) -> Text:
    return Text({s: torch.frombuffer(bytearray(b), dtype=torch.uint8) if b else torch.empty(0, dtype=torch.uint8)
                 for s, b in (("train", train), ("val", val), ("test", test))}, origin)


def _contiguous(data: bytes, origin: Origin) -> Text:
    """The first 90 %, the next 5 %, the last 5 %."""
    a, b = len(data) * 90 // 100, len(data) * 95 // 100
    return _text(data[:a], data[a:b], data[b:], origin)


def stdlib() -> Text:
    """Python source: the running interpreter's own library, about 4 MB of it, 90/5/5 by file.

    Files are taken in a fixed random order and joined in order of name; a file that repeats another is left out. The
    bytes depend on the version of Python, which the origin names.
    """
    version = f"{platform.python_implementation()} {platform.python_version()}"
    root = Path(sysconfig.get_path("stdlib"))
    splits = stdlib_files(root)
    train, val, test = (b"".join(data for _, data in sorted(splits[s].items())) for s in ("train", "val", "test"))
    if len(train + val + test) < STDLIB_BYTES // 2:
        raise BadData(f"the library of {version} at {root} has {len(train + val + test)} bytes of .py files, expected "
                      f"{STDLIB_BYTES // 2} or more; this Python seems to come without its sources")
    return _text(train, val, test, Origin(
        "Python's standard library", f"{version}, .py files", "PSF-2.0",
        f"{', '.join(f'{len(files)} files for {s}' for s, files in splits.items())}; the bytes depend on Python's version"))


def stdlib_files(root: Path, limit: int = STDLIB_BYTES) -> dict[str, dict[str, bytes]]:
    """split -> path below root -> content. `limit`: bytes in all; val and test have at most 5 % of them each."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [d for d in below if d not in _SKIPPED and not d.startswith("config-")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in files
                  if f.endswith(".py") and not f.startswith("_sysconfigdata")]
    names.sort()
    splits: dict[str, dict[str, bytes]] = {"train": {}, "val": {}, "test": {}}
    room = {"test": limit // 20, "val": limit // 20, "train": limit - 2 * (limit // 20)}
    seen = set()
    for i in np.random.RandomState(0).permutation(len(names)):
        data = (root / names[i]).read_bytes()
        split = next((s for s, left in room.items() if len(data) <= left), None)
        if split is not None and data not in seen:
            seen.add(data)
            splits[split][names[i]] = data
            room[split] -= len(data)
    return splits


def shakespeare() -> Text:
    """Tiny Shakespeare, 1.1 MB of plays: the first 90 % to train, then 5 % and 5 %."""
    return _contiguous(locate("shakespeare/input.txt").read_bytes(), Origin(
        "Tiny Shakespeare", "github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt", "public domain"))


def wikitext2() -> Text:
    """WikiText-2 without its training part: 95 % of its validation part to train, 5 % to validate; all its test part.

    So results are not comparable with published ones, which train on ten times as much.
    """
    train, test = locate("wikitext2/valid.txt").read_bytes(), locate("wikitext2/test.txt").read_bytes()
    cut = len(train) * 95 // 100
    return _text(train[:cut], train[cut:], test, Origin(
        "WikiText-2 (validation and test parts)", "github.com/pytorch/examples, word_language_model/data/wikitext-2",
        "CC BY-SA 3.0", "its training part is not used: trained on 95 % of the validation part, validated on the rest, "
                        "tested on the whole test part; results are not comparable with published ones"))


def from_path(path: str | Path) -> Text:
    """Your own text: a file, or a folder whose .txt files are joined in order of name. Contiguous 90/5/5, any encoding."""
    root = Path(path).expanduser()
    try:
        if not root.exists():
            raise BadData(f"{root} does not exist; write text:PATH, where PATH is a text file or a folder of .txt files")
        files = sorted(root.rglob("*.txt")) if root.is_dir() else [root]
        if not files:
            raise BadData(f"the folder {root} has no .txt files")
        data = b"\n".join(f.read_bytes() for f in files)
    except OSError as error:
        raise BadData(f"cannot read {root}: {error}") from error
    if not data.strip():
        raise BadData(f"{root} is empty ({len(files)} {'file' if len(files) == 1 else 'files'}, {len(data)} bytes)")
    return _contiguous(data, Origin(f"Text of {root.resolve().name}", str(path), "yours"))
