"""Files of weights, recognised by their content, read without running anything that is in them.

A training checkpoint holds several state dicts: `read` takes the first of PREFERRED that is there (an average before the
weights themselves, a teacher before its student), else the one with most tensors, and its notes say what else there is.
"""

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..core.checkpoint import check_format
from ..core.errors import BadCheckpoint
from .keys import State
from .pickles import Array, Resolve, Stored, Unreadable
from .pickles import load as load_pickle

PREFERRED = ("params_ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema", "teacher", "params",
             "state_dict", "model_state_dict", "model", "network", "net", "net_g", "generator", "student", "module",
             "weights")
HEADS = ("num_attention_heads", "n_head", "num_heads")  # as the transformers library calls them
DEEPEST = 6  # dicts in dicts
SMALL = 2 ** 24  # bytes of an index, and of what may be unpacked beyond 20 times the file
ONE_FILE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz")
FOREIGN = {b"\x89HDF\r\n": "an HDF5 file", b"GGUF": "a GGUF file", b"\x1f\x8b": "compressed by gzip: unpack it first",
           b"BZh": "compressed by bzip2: unpack it first", b"\xfd7zXZ": "compressed by xz: unpack it first",
           b"7z\xbc\xaf": "a 7z archive: unpack it first", b"\x93NUMPY": "a single array (.npy), no state dict",
           b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"%PDF": "a PDF", b"\x7fELF": "a program"}


@dataclass
class Contents:
    """What a file holds: its tensors as they are stored (half stays half), what it `told` of itself (the metadata, if it is
    ours; else empty), `notes` of what was done to get at them, and the `config` of the transformers library beside them."""

    state: State
    told: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int | tuple[int, ...] | None:
        """What the config states of the heads, which tensors do not tell."""
        stated = next((self.config[k] for k in HEADS if k in self.config), None)
        several = isinstance(stated, list) and all(type(n) is int for n in stated)
        return tuple(stated) if several else stated if type(stated) is int else None  # type: ignore[arg-type]


def read(path: str | Path, *, part: str | None = None) -> Contents:
    """The tensors of a .safetensors, .npz, .pth/.pt/.bin/.ckpt (both formats of torch.save) or .pkl file, of an index of
    shards, or of a folder with one of them.

    part: which of several state dicts in a training checkpoint, e.g. "student" or "model.encoder". Whatever is no such file
    raises BadCheckpoint with the reason; tensors are views of the mapped file where its format allows.
    """
    path = Path(path)
    try:
        contents = _read(path, part)
        contents.config = _config(path if path.is_dir() else path.parent)
        return contents
    except BadCheckpoint:
        raise
    except PermissionError:
        raise BadCheckpoint(f"no permission to read {path}") from None
    except Exception as error:  # whatever a damaged file makes a parser raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadCheckpoint(f"{path} is damaged, truncated or not a checkpoint ({reason[:200]})") from None


def held(content: Mapping[Any, Any], part: str | None = None) -> Contents:
    """As `read`, of what torch.load gave: a state dict, or one with others or beside other things."""
    if part is None and content and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()):
        return Contents(dict(content))
    return _unwrap(dict(content), None, part, "the dict")


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of the transformers library in this folder; empty if there is none."""
    try:
        with (folder / "config.json").open("rb") as f:
            config = json.loads(f.read(SMALL))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and "model_type" in config else {}


def _read(path: Path, part: str | None) -> Contents:
    if "\0" in str(path) or not path.exists():
        raise BadCheckpoint(f"no file {path}")
    if path.is_dir():
        return _folder(path, part)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device, which may have no end
        raise BadCheckpoint(f"{path} is no regular file")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(1024)
    if not head:
        raise BadCheckpoint(f"{path} is empty")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= size - 8:
        return _one(_safetensors(path), part, path)
    if head[:4] == b"PK\3\4":
        return _zipped(path, part)
    if head[:1] == b"\x80" or (head[:1] in b"(}]c" and b"\0" in head):  # pickles from protocol 2, and 0 or 1
        return _unwrap(*load_pickle(path), part, path)
    text = _text(head)
    if text is not None:
        return _from_text(path, text, size, part)
    if head[8:9] == b"{":
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    kind = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar":
        kind = "a tar archive: unpack it first"
    raise ValueError(f"it is {kind}" if kind else "nothing in its first bytes says what it is")


def _one(contents: Contents, part: str | None, path: Path) -> Contents:
    """The contents of a file that has no parts."""
    if part is not None:
        raise BadCheckpoint(f"{path} holds one state dict, so it has no part {part!r}; leave part= out")
    if not contents.state:
        raise BadCheckpoint(f"{path} holds no tensors")
    return contents


def _safetensors(path: Path) -> Contents:
    with safe_open(path, framework="pt") as f:
        told = f.metadata() or {}
        if "recipe" in told:
            check_format(told, str(path))
        return Contents({k: f.get_tensor(k) for k in f.keys()}, told if "recipe" in told else {})  # noqa: SIM118


def _zipped(path: Path, part: str | None) -> Contents:
    """A file of torch.save, or of numpy.savez."""
    with zipfile.ZipFile(path) as archive:
        entries = {i.filename: i for i in archive.infolist()}
    pickled = [n for n in entries if PurePosixPath(n).name == "data.pkl" and n.count("/") <= 1]
    if any(PurePosixPath(n).name == "constants.pkl" for n in entries):
        raise BadCheckpoint(f"{path} is a TorchScript program, which is code; torch.jit.load it if you trust it and save "
                            "its state_dict")
    if len(pickled) == 1:
        return _unwrap(*load_pickle(path, pickled[0]), part, path)
    if not entries or not all(n.endswith(".npy") for n in entries):
        raise ValueError("it is a zip archive, but neither of torch.save nor of numpy.savez")
    if sum(i.file_size for i in entries.values()) > 20 * path.stat().st_size + SMALL:
        raise BadCheckpoint(f"{path} would unpack to more than 20 times its size; refused")
    return _one(Contents(dict(_arrays(path))), part, path)


def _arrays(path: Path) -> Iterator[tuple[str, Tensor]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as f:
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, columns, dtype = header[np.lib.format.read_magic(f)](f)
                count = int(np.prod([float(n) for n in shape]))  # in floats, as it may be beyond any integer
                if dtype.hasobject or count * dtype.itemsize != entry.file_size - f.tell():
                    raise ValueError(f"its array {entry.filename[:80]!r} is of objects, or of another size than it says")
                numbers = np.frombuffer(bytearray(f.read()), dtype) if count else np.empty(0, dtype)
            numbers = numbers.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if columns else "C")
            yield entry.filename.removesuffix(".npy"), torch.from_numpy(numbers)


def _text(head: bytes) -> str | None:
    """The text that a file begins with; None if it is no text."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not a character that was cut
            return None
        text = head[:error.start].decode()
    return text if re.fullmatch(r"[^\x00-\x08\x0e-\x1f]*", text) else None


def _from_text(path: Path, text: str, size: int, part: str | None) -> Contents:
    if text.startswith("version https://git-lfs"):
        raise BadCheckpoint(f"{path} is a pointer of git-lfs, not the file itself: download it, e.g. by `git lfs pull`")
    start = text.lstrip("\ufeff \t\r\n")
    if re.match(r"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise BadCheckpoint(f"{path} is a web page, not a checkpoint: the download failed; open the address in a browser")
    if start.startswith("{") and size <= SMALL:
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            index = None
        if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            return _sharded(path, index["weight_map"], part)
    raise ValueError(f"it is a text that begins with {start[:40]!r}")


def _sharded(path: Path, where: dict[Any, Any], part: str | None) -> Contents:
    """The tensors of the files that an index names; names -> file, in the index's folder or below."""
    shards = sorted({str(name) for name in where.values()})
    for name in shards:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or re.search(r"[\\:\0]", name):
            raise BadCheckpoint(f"{path} points outside of its folder, to {name[:200]!r}; refused")
        if name.endswith(".json"):
            raise BadCheckpoint(f"{path} names another index as a shard, {name[:200]!r}; refused")
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise BadCheckpoint(f"{len(missing)} of the {len(shards)} shards of {path} are missing: {', '.join(missing[:5])}")
    state: State = {}
    for name in shards:
        state |= read(path.parent / name).state
    absent = [k for k in where if k not in state]
    if absent:
        raise BadCheckpoint(f"the shards of {path} lack {len(absent)} of its {len(where)} tensors, e.g. {absent[0][:200]}")
    return _one(Contents(state, notes=[f"{len(shards)} shards of {path.name}"]), part, path)


def _folder(path: Path, part: str | None) -> Contents:
    """Of a folder of transformers, timm or ours: the index, else the file of the usual name, else the only one."""
    files = sorted(n for n in os.listdir(path) if not n.startswith("."))
    if "progress.json" in files and any(n.startswith("random_states_") for n in files):
        there = [str(p) for n in ("best", "last") if (p := path.parent / f"{n}.safetensors").is_file()]
        where = " or ".join(there) or f"best.safetensors in {path.parent}, once it is written"
        raise BadCheckpoint(f"{path} is the state of a training run, by which the same call of train resumes it. The "
                            f"weights with their recipe: {where}")
    usual = [f"{n}.index.json" for n in ONE_FILE] + list(ONE_FILE)
    found = [n for n in usual if n in files][:1] or [n for n in files if n.endswith(".index.json")]
    found = found or [n for n in files if n.endswith(SUFFIXES)]
    if not found:
        raise BadCheckpoint(f"the folder {path} holds no weights: looked for {', '.join(ONE_FILE)}, an index of shards, "
                            f"and files that end with {', '.join(SUFFIXES)}")
    if len(found) > 1:
        raise BadCheckpoint(f"the folder {path} holds {len(found)} files of weights; name one: {', '.join(found[:8])}")
    contents = read(path / found[0], part=part)
    contents.notes.insert(0, f"took {found[0]} of the folder")
    return contents


def _tensors(held: Mapping[Any, Any]) -> dict[Any, Any]:
    """What of a dict is a tensor."""
    return {k: v.tensor if isinstance(v, Array) else v for k, v in held.items()
            if isinstance(v, Stored | Unreadable | Tensor) or (isinstance(v, Array) and v.tensor is not None)}


def _parts(content: Any) -> dict[str, dict[str, Any]]:
    """Where in nested dicts state dicts are: "model.ema" -> name -> tensor. Scalars alone make none."""
    found: dict[str, dict[str, Any]] = {}
    seen, queue = {id(content)}, [("", content)]
    while queue:
        path, held = queue.pop(0)
        if not isinstance(held, dict):
            continue
        tensors = {k: v for k, v in _tensors(held).items() if isinstance(k, str)}
        if any(isinstance(v, Unreadable) or (v.size if isinstance(v, Stored) else v.shape) for v in tensors.values()):
            found[path] = tensors
        for key, value in held.items():
            if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen and path.count(".") < DEEPEST:
                seen.add(id(value))  # a dict may hold itself
                queue.append((f"{path}.{key}" if path else key, value))
    return found


def _unwrap(content: Any, resolve: Resolve | None, part: str | None, path: Path | str) -> Contents:
    """The state dict in what a pickle holds, with `module.` cut off."""
    found = _parts(content)
    if not found:
        named = isinstance(content, dict) and _tensors(content)
        raise BadCheckpoint(f"{path} holds no state dict" + (": the names of its tensors are no text" if named else ""))
    told = {name: f"{name or 'the file itself'} ({len(held)} tensors)" for name, held in found.items()}
    matching = [n for n in found if part in (None, n, *n.split("."))]
    if not matching:
        raise BadCheckpoint(f"{path} has no part {part!r}; there are: {', '.join(told.values())}"[:600])

    def rank(name: str) -> tuple[list[int], int]:
        return [PREFERRED.index(p) if p in PREFERRED else len(PREFERRED) for p in name.split(".")], -len(found[name])

    chosen = min(matching, key=rank)
    state: State = {}
    for name, tensor in found[chosen].items():
        if isinstance(tensor, Unreadable):
            raise BadCheckpoint(f"{path}: {name[:200]} is {tensor.what}; only plain dense tensors are read")
        state[name] = resolve(tensor) if resolve and isinstance(tensor, Stored) else tensor
    others = [told[n] for n in told if n != chosen]
    also = f"; there are also {', '.join(others[:8])}" if others else ""
    notes = [f"took {told[chosen]}{also}"] if chosen or others else []
    while all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
        notes.append("cut `module.` off all names")
    return Contents(state, notes=notes)
