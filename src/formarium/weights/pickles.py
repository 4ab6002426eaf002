"""PyTorch's files and plain pickles, read by a machine that knows only data: nothing that they name is imported or called.

`torch.load(weights_only=True)` refuses most training checkpoints (argparse.Namespace, numpy scalars beside the weights)
unless their classes are allowed to the whole process. What it allows, it calls with the file's arguments
(bytearray(10**11)); it hashes nested tuples as long as the file wants, believes the sizes that a file claims, and has let
code run (CVE-2025-32434).

Here every opcode moves data. Calls of the functions that rebuild tensors are answered by a `Stored`, which says where the
tensor lies; what training scripts are known to leave beside their weights (RECORDS) becomes OTHER, which holds nothing, so
that listing a name there cannot run it. Any other name is refused, so that a whole pickled model or planted code is told
and not passed over. Tensors are views of the mapped file: of an optimizer's state nothing is read.
"""

import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadCheckpoint

OTHER = object()
LONGEST = 600_000  # opcodes, of which a tensor takes 17: a second
BIGGEST = 2 ** 62  # an integer that a size can be
EXPANDED = 2 ** 24  # bytes of a tensor that shows one element many times
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before PyTorch 1.6

STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
    ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8), ("Byte", torch.uint8),
    ("Bool", torch.bool), ("ComplexFloat", torch.complex64), ("ComplexDouble", torch.complex128), ("QInt8", torch.int8),
    ("QUInt8", torch.uint8), ("QInt32", torch.int32))}
STORAGES |= {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
UNREADABLE = {"torch._utils._rebuild_sparse_tensor": "a sparse tensor",
              "torch._utils._rebuild_qtensor": "a quantised tensor",
              "torch._utils._rebuild_nested_tensor": "a nested tensor",
              "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device, without values",
              "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
              "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device"}
REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
UNWRAP = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter",
          "torch.nn.parameter.Buffer", "torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch.Size")
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict", "__builtin__.dict")
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # (function, class, arguments, attributes)
DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
KNOWN = {*STORAGES, *DTYPES, *UNREADABLE, *REBUILD, *UNWRAP, *ARRAYS, *BUFFERS, *DICTS, WITH_ATTRIBUTES, "_codecs.encode",
         "numpy.dtype"}
# DeiT, MAE, DINO: argparse; Swin: yacs; fairseq: omegaconf; mmcv, Lightning, detectron2: their own; numbers: numpy
RECORDS = re.compile(r"(argparse\.Namespace|types\.SimpleNamespace|collections\.deque|uuid\.UUID|torch\.(device|Tensor)"
                     r"|(pathlib|datetime|typing|decimal|enum|omegaconf|yacs|easydict|addict|ml_collections|fvcore|mmcv|mmengine"
                     r"|detectron2\.config|pytorch_lightning|lightning|lightning_fabric|fairseq|torch\.optim)\..+"
                     r"|numpy\.(ndarray|bool_?|u?int\d+|float\d+)|numpy\._?core\.multiarray\.scalar"
                     r"|(copyreg|copy_reg)\._reconstructor|torch\.serialization\._get_layout|torch\.per_(tensor|channel)_\w+"
                     r"|(builtins|__builtin__)\.(set|frozenset|list|tuple|range|xrange|slice|bytes|bytearray|complex|int|float"
                     r"|str|unicode|bool|object|long))")


class Stored(NamedTuple):
    """Where a tensor lies: `size` and `stride` from `offset`, in elements, in the storage `key`, which has `numel`."""

    key: str
    dtype: torch.dtype
    numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Unreadable(NamedTuple):
    """A tensor of a kind that no model here has."""

    what: str


class Name(NamedTuple):
    """What a pickle would import."""

    path: str


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int
    offset: int = 0


class Array:
    """A numpy array, or its type, while it is made: `tensor` and `code` are known when the pickle has told its state."""

    tensor: Tensor | None = None
    code = ""
    order: Literal["<", ">", "|"] = "<"


Resolve = Callable[[Stored], Tensor]


def load(path: Path, name: str | None = None) -> tuple[Any, Resolve]:
    """What a file of torch.save (zip, or the format before PyTorch 1.6) or a plain pickle holds: dicts, lists, numbers,
    Stored and OTHER; and what makes a tensor of a Stored, as a view of the file. name: of the pickle in the zip."""
    with path.open("rb") as f:
        size = path.stat().st_size
        places: dict[str, tuple[int, int]] = {}
        if name is None:
            content = _old_format(f, size, str(path), places)
        else:
            with zipfile.ZipFile(f) as archive:
                content = _zip_format(archive, name, f, size, str(path), places)
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    return content, _resolver(mapped, places, str(path))


def _zip_format(archive: zipfile.ZipFile, name: str, f: BinaryIO, size: int, what: str,
                places: dict[str, tuple[int, int]]) -> Any:
    root, entries = name.removesuffix("data.pkl"), {i.filename: i for i in archive.infolist()}
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise BadCheckpoint(f"{what} is not as torch.save writes it: its entry {entry.filename[:80]!r} is compressed "
                                "or of a false size; refused")
        if entry.filename.startswith(f"{root}data/"):
            f.seek(entry.header_offset)
            head = f.read(30)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
            if head[:4] != b"PK\3\4" or start + entry.file_size > size:
                raise ValueError(f"entry {entry.filename[:80]!r} lies outside of the file")
            places[entry.filename.removeprefix(f"{root}data/")] = start, entry.file_size
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise BadCheckpoint(f"{what} holds big-endian numbers; save it again on a usual machine")
    data = archive.read(entries[name])
    return Machine(what).run(BytesIO(data), len(data))


def _old_format(f: BinaryIO, size: int, what: str, places: dict[str, tuple[int, int]]) -> Any:
    """Five pickles: magic number, protocol, machine, content, storages' keys; then count and bytes of each storage."""
    machine = Machine(what)
    first = machine.run(f, size)
    if first != MAGIC:
        return first  # a plain pickle
    if machine.run(f, size) != PROTOCOL:
        raise ValueError("its protocol is unknown")
    told = machine.run(f, size)
    if not (isinstance(told, dict) and told.get("little_endian") is True):
        raise BadCheckpoint(f"{what} holds big-endian numbers; save it again on a usual machine")
    content = machine.run(f, size)
    for key in machine.run(f, size):
        (count,), start = struct.unpack("<q", f.read(8)), f.tell()
        end = start + count * machine.storages[key].dtype.itemsize
        if not start <= end <= size:
            raise ValueError("a tensor goes on behind the end of the file")
        places[key] = start, end - start
        f.seek(end)
    return content


def _resolver(mapped: mmap.mmap, places: dict[str, tuple[int, int]], what: str) -> Resolve:
    storages: dict[str, Tensor] = {}  # tied weights share one

    def resolve(t: Stored) -> Tensor:
        if t.key not in places or t.numel * t.dtype.itemsize > places[t.key][1]:
            raise BadCheckpoint(f"{what} is damaged: a tensor {t.size} has no values in it")
        if t.key not in storages:
            start, size = places[t.key]
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0).byte()
            storages[t.key] = raw if start % 16 == 0 else raw.clone()  # the old format aligns nothing
        raw = storages[t.key][:t.numel * t.dtype.itemsize]
        return raw.view(t.dtype).as_strided(t.size, t.stride, t.offset)

    return resolve


class _Bounded:
    """A stream that reads no more than there is."""

    def __init__(self, f: BinaryIO, size: int) -> None:
        self.f, self.size, self.tell = f, size, f.tell

    def read(self, n: int) -> bytes:
        if n > self.size - self.f.tell():
            raise ValueError("it ends too early")
        return self.f.read(n)

    def readline(self) -> bytes:
        return self.f.readline(2 ** 16)


class Machine:
    """Runs the opcodes of pickles."""

    def __init__(self, what: str) -> None:
        self.what, self.work, self.room = what, 0, 0
        self.storages: dict[str, Storage] = {}

    def run(self, f: BinaryIO, size: int) -> Any:
        """The object of the next pickle in f, which ends at `size`."""
        self.room = 2 * size  # bytes that may be copied
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def marked() -> list[Any]:
            at = marks.pop()
            items = stack[at:]
            del stack[at:]
            return items

        arg: Any
        for op, arg, _ in pickletools.genops(_Bounded(f, size)):  # type: ignore[arg-type]  # it reads lines and bytes
            self._charge(1)
            match op.name:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case ("BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE"
                      | "LONG" | "LONG1" | "LONG4" | "INT" | "FLOAT" | "BINFLOAT" | "STRING" | "BINSTRING"
                      | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"):
                    stack.append(arg)
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(op.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "TUPLE":
                    stack.append(tuple(marked()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
                case "GLOBAL":
                    stack.append(self._name(arg.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._name(f"{module:s}.{name:s}"))
                case "REDUCE" | "NEWOBJ":
                    args = stack.pop()
                    stack.append(self._call(stack.pop(), args))
                case "NEWOBJ_EX":
                    del stack[-3:]
                    stack.append(OTHER)
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Array):
                        self._build(stack[-1], state)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _put(stack[-1], [key, value])
                case "SETITEMS":
                    items = marked()
                    _put(stack[-1], items)
                case "DICT":
                    items = marked()
                    stack.append({})
                    _put(stack[-1], items)
                case "EMPTY_LIST":
                    stack.append([])
                case "LIST":
                    stack.append(marked())
                case "APPEND":
                    value = stack.pop()
                    if isinstance(stack[-1], list):
                        stack[-1].append(value)
                case "APPENDS":
                    items = marked()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(items)
                case "EMPTY_SET":
                    stack.append(OTHER)
                case "ADDITEMS":
                    marked()
                case "FROZENSET":
                    marked()
                    stack.append(OTHER)
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    marked()
                case "DUP":
                    stack.append(stack[-1])
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case other:
                    raise ValueError(f"its pickle has the opcode {other}")
        raise ValueError("its pickle has no end")

    def _charge(self, work: int, copied: int = 0) -> None:
        self.work += work
        self.room -= copied
        if self.work > LONGEST or self.room < 0:
            raise BadCheckpoint(f"{self.what} is no checkpoint: its pickle is longer than that of any model; refused")

    def _name(self, path: str) -> Name:
        if path not in KNOWN and not RECORDS.fullmatch(path):
            raise BadCheckpoint(f"{self.what} is a pickle that wants to run more than tensors need ({path[:99]}); refused. "
                                "Of a file that you trust, save the state_dict alone")
        return Name(path)

    def _call(self, name: Any, args: Any) -> Any:
        """What the call of a named function gives, as far as it is data."""
        if not isinstance(name, Name) or not isinstance(args, tuple):
            return OTHER
        path = name.path
        if path in REBUILD:
            storage, offset, size, stride = args[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor has no storage")
            dtype, numel = storage.dtype, storage.numel
            if path.endswith("v3"):  # its storage is one of bytes
                dtype = DTYPES[args[6].path]
                numel //= dtype.itemsize
            return _stored(storage.key, dtype, numel, storage.offset, offset, size, stride)
        if path in UNREADABLE:
            return Unreadable(UNREADABLE[path])
        if path in UNWRAP:
            return args[0] if args else ()
        if path == WITH_ATTRIBUTES:
            return self._call(args[0], args[2])
        if path in DICTS:
            made: dict[Any, Any] = {}
            for pair in args[-1] if args and isinstance(args[-1], list) else ():
                self._charge(1)
                _put(made, pair)
            return made
        if path == "_codecs.encode" and args[1:] == ("latin1",) and isinstance(args[0], str):
            self._charge(1, len(args[0]))
            return args[0].encode("latin1")
        if path in ARRAYS:
            return Array()
        if path == "numpy.dtype":
            made_of = Array()
            made_of.code = args[0] if args and isinstance(args[0], str) else ""
            return made_of
        if path in BUFFERS:
            array = Array()
            self._build(array, (1, args[2], args[1], args[3] == "F", args[0]))
            return array
        return OTHER

    def _build(self, array: Array, state: Any) -> None:
        """The state of an array, (version, shape, type, in columns?, bytes), or of its type, (version, byte order, ...)."""
        if not isinstance(state, tuple) or len(state) < 2:
            return
        if array.code:
            array.order = state[1] if state[1] in ("<", ">", "|") else "<"
            return
        _, shape, kind, columns, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(kind, Array) or not isinstance(data, bytes | bytearray) or (
                not re.fullmatch("[fiub][1248]", kind.code)):
            return
        self._charge(1, len(data))
        numbers = np.frombuffer(data, np.dtype(kind.code).newbyteorder(kind.order)).astype(kind.code)
        array.tensor = torch.from_numpy(numbers.reshape(shape, order="F" if columns is True else "C"))

    def _storage(self, told: Any) -> Storage:
        """The storage that ("storage", type, key, place, numel[, (key of a view, its offset, its numel)]) is."""
        kind, name, key, _, numel, *view = told
        if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        _whole(numel)
        self.storages[key] = Storage(key, STORAGES[name.path], numel)
        if view and view[0] is not None:
            _whole(view[0][1])
            return self.storages[key]._replace(offset=view[0][1])
        return self.storages[key]


def _put(target: Any, items: Any) -> None:
    """Key after value; keys that are neither text nor small numbers (whose hash could take forever) are left out."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) or (isinstance(key, int) and abs(key) < BIGGEST):
                target[key] = value


def _whole(*numbers: Any) -> None:
    if not all(type(n) is int and 0 <= n < BIGGEST for n in numbers):
        raise ValueError("a size is not a whole number")


def _stored(key: str, dtype: torch.dtype, numel: int, base: int, offset: Any, size: Any, stride: Any) -> Stored:
    _whole(offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor's size and stride do not belong together")
    count = int(np.prod([float(s) for s in size]))  # in floats, as it may be beyond any integer
    last = base + offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if last >= max(numel, 1) or (count > numel and count * dtype.itemsize > EXPANDED):
        raise ValueError(f"a tensor of size {tuple(size)} does not fit into its storage of {numel} elements")
    return Stored(key, dtype, numel, base + offset, tuple(size), tuple(stride))
