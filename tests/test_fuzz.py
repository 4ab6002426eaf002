"""Damaged and made-up files: `fm.load` gives a model or raises a FormariumError, in time, and nothing else.

The examples are the same in every run. For a longer hunt: FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py
"""

import io
import json
import os
import pickle
import time
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import formarium as fm
from formarium.core.errors import FormariumError
from formarium.weights.files import Contents, read
from formarium.weights.pickles import KNOWN
from test_files import VIT

LONGER = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzz(examples):
    return settings(derandomize=not LONGER, max_examples=LONGER or examples, deadline=60_000, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@contextmanager
def in_time(seconds=3.0):
    """Of this process, so that others on the machine do not matter."""
    start = time.process_time()
    try:
        yield
    finally:
        assert time.process_time() - start < seconds


def answers(path, **options):
    """The error, if it is refused; a model that can be used, if not."""
    try:
        with in_time():
            model = fm.load(path, **options)
    except FormariumError as error:
        return error
    assert isinstance(model, nn.Module)
    assert all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())
    return None


def reads(path):
    """As `answers`, without the model."""
    try:
        with in_time():
            contents = read(path)
    except FormariumError as error:
        return error
    assert isinstance(contents, Contents)
    for name, tensor in contents.state.items():
        assert isinstance(name, str)
        tensor.sum()  # all of it is there
    return None


def metadata():
    with safe_open(VIT, framework="pt") as f:
        return f.metadata()


def whole_files():
    """A small model in each container."""
    state, old = load_file(VIT), io.BytesIO()
    yield "ours", VIT.read_bytes()
    yield "safetensors", save(state)
    for content in (state, {"model": state, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}):
        new = io.BytesIO()
        torch.save(content, new)
        yield "torch" if content is state else "nested", new.getvalue()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    yield "old", old.getvalue()
    arrays, numpy_file = {k: v.numpy() for k, v in state.items()}, io.BytesIO()
    np.savez_compressed(numpy_file, **arrays)
    yield "npz", numpy_file.getvalue()
    yield "pickle", pickle.dumps(arrays, protocol=4)


WHOLE = dict(whole_files())


@pytest.fixture(scope="module", autouse=True)
def _detection_is_ready(tmp_path_factory):
    """The index of signatures, which is made once, is no part of any example's time."""
    path = tmp_path_factory.mktemp("whole") / "a.pth"
    path.write_bytes(WHOLE["torch"])
    with suppress(FormariumError):
        fm.load(path)


@st.composite
def damaged(draw, kind):
    """The file with bytes flipped, cut, moved or put in, more often where the structure is: at its ends."""
    data = bytearray(WHOLE[kind])
    for _ in range(draw(st.integers(1, 4))):
        size = max(len(data), 1)
        place = st.one_of(st.integers(0, min(4000, size - 1)), st.integers(max(0, size - 4000), size - 1),
                          st.integers(0, size - 1))
        at, other = draw(place), draw(place)
        match draw(st.sampled_from(["flip", "byte", "cut", "drop", "insert", "copy", "number"])):
            case "flip":
                data[at:at + 1] = bytes([(data[at] if data else 0) ^ 1 << draw(st.integers(0, 7))])
            case "byte":
                data[at:at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at:]
            case "drop":
                del data[at:at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=32))
            case "copy":
                data[at:at + 32] = data[other:other + 32]
            case "number":
                n = draw(st.sampled_from([1, 2, 4, 8]))
                data[at:at + n] = draw(st.sampled_from([0, 1, 2 ** (8 * n) - 1, 2 ** (8 * n - 1)])).to_bytes(n, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", WHOLE)
def test_damaged_files(kind, tmp_path):
    """A flipped bit of a weight is a weight: what loads is finite, and what is refused says so."""
    path = tmp_path / "a.pth"
    path.write_bytes(WHOLE[kind])
    assert reads(path) is None
    refused = 0

    @fuzz(60)
    @given(damaged(kind))
    def run(data):
        nonlocal refused
        path.write_bytes(data)
        error = reads(path)
        if error is None or kind == "ours":
            error = answers(path) if kind == "ours" else None
        refused += error is not None

    run()
    assert refused


def test_damaged_files_load_or_not(tmp_path):
    """The whole way, with detection, for the containers of others."""
    path = tmp_path / "a.bin"
    path.write_bytes(WHOLE["torch"])
    assert answers(path, name="vit") is None

    @fuzz(25)
    @given(st.sampled_from([k for k in WHOLE if k != "ours"]).flatmap(damaged))
    def run(data):
        path.write_bytes(data)
        answers(path, name="vit")

    run()


OPCODES = st.sampled_from([bytes([c]) for c in b"()]}lutds.0e1aNRbo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94Q"])
NAMES = st.sampled_from([*sorted(KNOWN), "argparse.Namespace", "numpy.ndarray", "os.system", "builtins.set"])
NUMBERS = st.one_of(st.integers(0, 20), st.sampled_from([-1, 2 ** 31, 2 ** 62, 2 ** 63, 2 ** 200]))


def long(n):
    raw = pickle.encode_long(n)
    return b"\x8a%c" % len(raw) + raw


def text(t):
    return b"X%c\0\0\0" % len(t) + t.encode()


def piece():
    return st.one_of(
        OPCODES, NUMBERS.map(long), st.sampled_from(["storage", "0", "cpu", "a", "f4", "<", "latin1"]).map(text),
        NAMES.map(lambda n: "c{}\n{}\n".format(*n.rsplit(".", 1)).encode()),
        st.integers(0, 5).map(lambda n: b"q%c" % n), st.integers(0, 5).map(lambda n: b"h%c" % n),
        st.binary(max_size=9).map(lambda b: b"C%c" % len(b) + b),
        st.sampled_from([b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0\x30X\3\0\0\0cpuK\4tQ",
                         b"ctorch._utils\n_rebuild_tensor_v2\n", b"K\0K\2\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR",
                         b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\nK\0\x85C\1b\x87R"]))


def test_made_up_pickles(tmp_path):
    """Random opcodes, as a plain pickle and inside of a zip of torch.save."""
    path = tmp_path / "a.pkl"

    @fuzz(400)
    @given(st.lists(piece(), max_size=30).map(b"".join), st.booleans())
    def run(code, zipped):
        data = b"\x80\x02" + code + b"."
        if zipped:
            with zipfile.ZipFile(path, "w") as f:
                f.writestr("a/data.pkl", data)
                f.writestr("a/data/0", bytes(16))
        else:
            path.write_bytes(data)
        reads(path)

    run()


SOME = [torch.ones(2, 3), torch.zeros(()), torch.ones(3).half(), torch.arange(3), torch.zeros(0), torch.eye(2).to_sparse(),
        torch.ones(1).expand(4), nn.Parameter(torch.ones(2)), np.float32(1), torch.ones(2).bfloat16(), torch.float32]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
                   st.sampled_from(SOME))
KEYS = st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()),
                 st.sampled_from(["model", "state_dict", "ema", "module.a", "teacher", "a.b", "head.weight", ""]))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.dictionaries(KEYS, inner, max_size=5), st.lists(inner, max_size=3),
                                                     st.tuples(inner, inner)), max_leaves=20)


def test_made_up_structures(tmp_path):
    """Whatever nest of dicts, lists and tensors torch.save writes."""
    path = tmp_path / "a.pt"

    @fuzz(150)
    @given(TREES, st.booleans())
    def run(content, old):
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        reads(path)

    run()


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=4),
                   st.sampled_from([10 ** 9, 2 ** 40, 10 ** 30, "attention", "mean", "none", "swiglu"]))
SPECS = st.sampled_from(["formarium.parts.channel:Mlp", "formarium.parts.norm:RMSNorm",
                         "formarium.papers.backbones.vit:ViT", "os:system"])


def nested(inner):
    return st.one_of(st.lists(inner, max_size=3), st.fixed_dictionaries({"tuple": st.lists(inner, max_size=3)}),
                     st.dictionaries(st.sampled_from(["spec", "options", "tuple", "a"]), inner, max_size=3),
                     st.fixed_dictionaries({"spec": SPECS, "options": st.dictionaries(
                         st.sampled_from(["ratio", "eps", "dim"]), inner)}))


JSON = st.recursive(VALUES, nested, max_leaves=6)
OPTIONS = ["depth", "dim", "heads", "img_size", "patch", "num_classes", "mixer", "channel", "norm", "residual", "pool",
           "in_chans", "mlp_ratio", "drop_path", "qkv_bias", "nonsense"]


def test_made_up_recipes(tmp_path):
    """A recipe of ours with any options, transforms and a version."""
    path, state, told = tmp_path / "a.safetensors", load_file(VIT), metadata()
    known = json.loads(told["recipe"])["changes"]
    assert answers(VIT) is None
    transform = st.fixed_dictionaries({
        "name": st.sampled_from(["adaptformer", "llm_int8", "zero_tprune", "vit", "x"]),
        "settings": st.dictionaries(st.sampled_from(["bottleneck", "keep", "mode"]), JSON, max_size=2)})

    @fuzz(120)
    @given(st.sampled_from(["vit/nano", "vit", "gpt/nano", "swin/nano", "vit/huge", "", "/", "vit/nano:depth=3", "x+y"]),
           st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=3), st.lists(transform, max_size=2), st.booleans(),
           st.dictionaries(st.sampled_from(["frozen", "formarium_format", "formarium"]), st.sampled_from(["", "1", "9"])))
    def run(name, changes, transforms, keep, more):
        recipe = {"name": name, "changes": (known if keep else {}) | changes, "transforms": transforms}
        save_file(state, path, told | {"recipe": json.dumps(recipe)} | more)
        answers(path)

    run()


def test_made_up_headers(tmp_path):
    """The JSON of safetensors with any types, shapes and offsets."""
    path = tmp_path / "a.safetensors"
    size = st.one_of(st.integers(-2, 12), st.sampled_from([2 ** 31, 2 ** 62, 2 ** 64, 10 ** 30]))
    tensor = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "X", ""]),
                                    "shape": st.lists(size, max_size=3),
                                    "data_offsets": st.lists(size, min_size=1, max_size=3)})
    entry = st.one_of(tensor, JSON)

    @fuzz(300)
    @given(st.dictionaries(st.one_of(st.text(max_size=4), st.just("__metadata__")), entry, max_size=3), st.integers(0, 24),
           st.integers(-3, 3))
    def run(header, room, off):
        text = json.dumps(header).encode()
        path.write_bytes(max(0, len(text) + off).to_bytes(8, "little") + text + bytes(room))
        reads(path)

    run()


def test_made_up_indices(tmp_path):
    """Indices of shards."""
    path = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    names = ["s.safetensors", "../s.safetensors", ".", "", "x/s.safetensors"]
    file = st.one_of(st.sampled_from(names), JSON, st.text(max_size=5))

    @fuzz(100)
    @given(st.one_of(JSON, st.dictionaries(st.one_of(st.just("a"), st.text(max_size=3)), file, max_size=3)))
    def run(where):
        path.write_text(json.dumps({"weight_map": where}))
        reads(path)
        reads(tmp_path)

    run()
