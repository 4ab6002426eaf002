"""Containers of weights, what is damaged or dangerous, and files that older versions wrote."""

import argparse
import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import formarium as fm
from formarium.core.checkpoint import FORMAT
from formarium.core.errors import BadCheckpoint, DoesNotFit, FormariumError
from formarium.core.registry import find, list_models
from formarium.core.transform import list_transforms
from formarium.weights.files import read
from formarium.weights.pickles import LONGEST, RECORDS

HERE = Path(__file__).parent / "files"
OLD = sorted(p for p in HERE.iterdir() if p.is_dir())
VIT = HERE / fm.__version__ / "vit.safetensors"


def some_state(scale=1.0):
    torch.manual_seed(3)
    return {"a.weight": torch.randn(4, 5) * scale, "a.bias": torch.randn(5), "n": torch.tensor(7), "e": torch.zeros(0, 3)}


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].to(torch.complex128), tensor.detach().to(torch.complex128)), name


def saved(content, path, *, old=False, protocol=2):
    torch.save(content, path, _use_new_zipfile_serialization=not old, pickle_protocol=protocol)
    return path


both_formats = pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])


# containers

@both_formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files(old, protocol, tmp_path):
    """Views, transposed, expanded, tied and parameters; every type: as torch reads them."""
    t = torch.randn(6, 4)
    state = OrderedDict(a=t, b=t.t(), c=t[1:3], d=torch.tensor(2.0), e=t.bfloat16(), f=t.half(), g=torch.ones(3) > 0,
                        h=nn.Parameter(t.clone()), i=torch.ones(1).expand(7), j=torch.arange(3), k=torch.zeros(0, 2),
                        m=torch.ones(2, dtype=torch.complex64), n=torch.ones(3).to(torch.float8_e4m3fn),
                        o=torch.arange(3).to(torch.uint16), p=torch.arange(5).byte())
    file = saved(state, tmp_path / "a.bin", old=old, protocol=protocol)
    got = read(file).state
    assert_same(got, state)
    if protocol == 2 and not old:  # torch's own reader takes no other protocol, and of these types no old file
        assert_same(got, torch.load(file, weights_only=True))
    assert got["a"].data_ptr() == got["b"].data_ptr()  # tied: one storage
    assert not any(v.requires_grad for v in got.values())


def test_recognised_by_content_not_by_suffix(tmp_path):
    state = some_state()
    save_file(state, tmp_path / "a.pth")
    saved(state, tmp_path / "b.safetensors")
    saved(state, tmp_path / "c.npz", old=True)
    np.savez(tmp_path / "d.npz", **{k: v.numpy() for k, v in state.items()})
    (tmp_path / "d.npz").rename(tmp_path / "d.ckpt")
    for name in ("a.pth", "b.safetensors", "c.npz", "d.ckpt"):
        got = read(tmp_path / name).state
        assert_same({k: got[k] for k in state}, state)


def test_npz(tmp_path):
    """Compressed, in columns, big-endian, empty, a scalar."""
    arrays = {"a/kernel": np.arange(6.0, dtype="f4").reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
              "c": np.arange(3, dtype=">f4"), "d": np.zeros((0, 2)), "e": np.float32(3)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    got = read(tmp_path / "a.npz").state
    assert_same(got, {k: torch.tensor(v.tolist(), dtype=got[k].dtype).reshape(v.shape) for k, v in arrays.items()})
    assert [str(t.dtype)[6:] for t in got.values()] == ["float32", "int64", "float32", "float64", "float32"]
    got["b"].add_(1)  # they can be written


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_pickles_of_arrays(protocol, tmp_path):
    """As detectron2's model zoo has them."""
    arrays = {"a": np.random.randn(3, 4).astype("f4"), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.int8(1)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=protocol))
    contents = read(tmp_path / "a.pkl")
    assert_same(contents.state, {k: torch.from_numpy(arrays[k]) for k in "ab"})


@both_formats
def test_training_checkpoints(old, tmp_path):
    """What training scripts keep beside the weights does not hinder, and is not read."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"model": nn.DataParallel(model).state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "name": "x",
               "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("out")), "best": np.float64(3.5),
               "loss": torch.ones(()), "history": [np.float32(1), torch.ones(2)], "rng": np.random.get_state(),
               "dtype": torch.float32, "seen": {1, 2}, "size": torch.Size([2]), "device": torch.device("cpu")}
    contents = read(saved(content, tmp_path / "a.pth", old=old))
    assert_same(contents.state, dict(model.state_dict()))
    assert contents.notes == ["took model (2 tensors)", "cut `module.` off all names"]


@pytest.mark.parametrize(("there", "taken"), [
    (("model", "model_ema"), "model_ema"), (("params", "params_ema"), "params_ema"), (("student", "teacher"), "teacher"),
    (("state_dict", "state_dict_ema"), "state_dict_ema"), (("optimizer", "net"), "net"), (("student", "model"), "model"),
    (("something", "params"), "params"),
])
def test_which_state_dict_is_taken(there, taken, tmp_path):
    content = {name: some_state(i + 1.0) for i, name in enumerate(there)}
    contents = read(saved(content, tmp_path / "a.pth"))
    other = next(n for n in there if n != taken)
    assert_same(contents.state, content[taken])
    assert contents.notes == [f"took {taken} (4 tensors); there are also {other} (4 tensors)"]
    assert_same(read(tmp_path / "a.pth", part=other).state, content[other])
    with pytest.raises(BadCheckpoint, match=f"no part 'generator'; there are: .*{taken}"):
        read(tmp_path / "a.pth", part="generator")


def test_deeper_and_ambiguous_nests(tmp_path):
    small, large = {"x": torch.ones(2)}, {"y": torch.ones(2), "z": torch.ones(3)}
    content = {"ema": {"decay": torch.tensor(0.9), "updates": 3}, "module": {"teacher": small, "student": large}, "n": 1}
    assert_same(read(saved(content, tmp_path / "a.pt")).state, small)  # `ema` holds nothing but scalars
    assert_same(read(tmp_path / "a.pt", part="module.student").state, large)
    assert_same(read(saved({"one": small, "two": large}, tmp_path / "b.pt")).state, large)  # neither is known: the larger
    assert_same(read(saved({"vit": large, "rng_state": torch.ones(9)}, tmp_path / "c.pt")).state, large)
    flat = read(saved({**large, "n": 3, 5: torch.ones(1)}, tmp_path / "d.pt"))
    assert (list(flat.state), flat.notes) == (["y", "z"], [])
    save_file(small, tmp_path / "e.safetensors")
    with pytest.raises(BadCheckpoint, match="holds one state dict, so it has no part 'x'"):
        read(tmp_path / "e.safetensors", part="x")


@both_formats
def test_odd_dicts(old, tmp_path):
    """Cycles, depth, names that are no text."""
    cyclic: dict = {"state_dict": some_state()}
    cyclic["self"] = cyclic["state_dict"]["up"] = cyclic
    assert_same(read(saved(cyclic, tmp_path / "a.pt", old=old)).state, some_state())
    deep: dict = {"w": torch.ones(2)}
    for _ in range(200):
        deep = {"x": deep}
    with pytest.raises(BadCheckpoint, match="holds no state dict"):
        read(saved(deep, tmp_path / "b.pt", old=old))
    with pytest.raises(BadCheckpoint, match="holds no state dict: the names of its tensors are no text"):
        read(saved({1: torch.ones(2), 2: torch.ones(2)}, tmp_path / "c.pt", old=old))


@both_formats
@pytest.mark.filterwarnings("ignore:torch.quantize")  # older files hold them
@pytest.mark.parametrize(("make", "why"), [
    (lambda: torch.eye(3).to_sparse(), "w is a sparse tensor; only plain dense"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "w is a quantised tensor"),
    (lambda: torch.ones(3, device="meta"), "w is a tensor of the meta device, without values"),
], ids=["sparse", "quantised", "meta"])
def test_tensors_of_other_kinds(make, why, old, tmp_path):
    tensor = make()
    with pytest.raises(BadCheckpoint, match=why):
        read(saved({"w": tensor, "v": torch.ones(1)}, tmp_path / "a.pt", old=old))
    if tensor.is_sparse:  # where nobody asks for them they do not hinder
        file = saved({"model": some_state(), "x": {"w": tensor}}, tmp_path / "b.pt", old=old)
        assert_same(read(file).state, some_state())


def test_what_is_not_needed_is_not_read(tmp_path):
    """The optimizer's 200 MB stay on the disk."""
    big = tmp_path / "big.pt"
    saved({"model": {"w": torch.ones(1000)}, "optimizer": {"state": torch.zeros(50_000_000)}}, big)
    limited(f"from formarium.weights.files import read; s = read({str(big)!r}).state; assert s['w'].sum() == 1000", big)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_fill_float32_models(dtype, tmp_path):
    """Contents keep what is stored, the model casts; whole numbers stay whole."""
    model = fm.create_model("vit/nano", depth=1)
    saved({k: v.to(dtype) for k, v in model.state_dict().items()}, tmp_path / "a.bin")
    assert {t.dtype for t in read(tmp_path / "a.bin").state.values()} == {dtype}
    from formarium.core.checkpoint import fill

    other = fm.create_model("vit/nano", depth=1)
    fill(other, read(tmp_path / "a.bin").state, "a.bin")
    for k, v in other.state_dict().items():
        assert v.dtype is torch.float32
        assert torch.equal(v, model.state_dict()[k].to(dtype).float())


# shards and folders

def sharded(folder, *, bin=False, **index):
    state, kind = some_state(), "bin" if bin else "safetensors"
    folder.mkdir(exist_ok=True)
    names = [f"{'pytorch_model' if bin else 'model'}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    where = {k: names[i % 2] for i, k in enumerate(state)}
    for name in names:
        held = {k: state[k] for k, n in where.items() if n == name}
        torch.save(held, folder / name) if bin else save_file(held, folder / name)
    path = folder / f"{'pytorch_model.bin' if bin else 'model.safetensors'}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where | index}))
    return path, state


@pytest.mark.parametrize("bin", [False, True])
def test_shards(bin, tmp_path):
    index, state = sharded(tmp_path / "m", bin=bin)
    for source in (index, tmp_path / "m"):
        got = read(source)
        assert_same({k: got.state[k] for k in state}, state)
    assert got.notes == [f"took {index.name} of the folder", f"2 shards of {index.name}"]
    shard = sorted(p for p in (tmp_path / "m").iterdir() if p != index)[1]
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"1 of the 2 shards of .* are missing: {shard.name}"):
        read(index)
    torch.save({"n": torch.ones(1)}, shard) if bin else save_file({"n": torch.ones(1)}, shard)
    with pytest.raises(BadCheckpoint, match=r"lack 2 of its 4 tensors, e\.g\. a\.bias|lack 1 of its 4 tensors"):
        read(index)


@pytest.mark.parametrize("where", ["../a.safetensors", "/etc/passwd", "x/../../a.safetensors", "..\\a.safetensors", "C:a",
                                   "", "file\0", None, 3])
def test_shards_outside_of_the_folder(where, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    index, _ = sharded(tmp_path / "m", extra=where)
    with pytest.raises(BadCheckpoint, match=r"points outside of its folder|shards of .* are missing"):
        read(index)


def test_an_index_among_the_shards(tmp_path):
    index, _ = sharded(tmp_path / "m", extra="model.safetensors.index.json")
    with pytest.raises(BadCheckpoint, match="names another index"):
        read(index)


def test_folders(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="holds no weights: looked for model"):
        read(tmp_path)
    saved(some_state(), tmp_path / "x.ckpt")
    assert read(tmp_path).notes == ["took x.ckpt of the folder"]
    saved(some_state(), tmp_path / "y.pth")
    with pytest.raises(BadCheckpoint, match=r"holds 2 files of weights; name one: x\.ckpt, y\.pth"):
        read(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read(tmp_path).state) == ["a"]


def test_states_of_our_training_runs(tmp_path):
    state = tmp_path / "state-00000010"
    state.mkdir()
    save_file({"a": torch.ones(1)}, state / "model.safetensors")
    (state / "progress.json").write_text("{}")
    (state / "random_states_0.pkl").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match=r"state of a training run.* best.safetensors in .*, once it is written"):
        fm.load(state)
    save_file({"a": torch.ones(1)}, tmp_path / "last.safetensors")
    with pytest.raises(BadCheckpoint, match=r"their recipe: \S+last.safetensors$"):
        fm.load(state)


# what is dangerous

LIMITED = """
import resource, sys, torch, zipfile, safetensors, numpy
from formarium.core.errors import FormariumError
from formarium.weights.files import read
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
{code}
"""


def limited(code, *files, room=2 ** 27):
    """Runs code in a process that may take 128 MB more than it has, beside the mapped files."""
    room += sum(f.stat().st_size for f in files)
    done = subprocess.run([sys.executable, "-c", LIMITED.format(code=code, room=room)], capture_output=True, text=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def refused(path, why, seconds=2.0):
    """The message; in time."""
    start = time.process_time()
    with pytest.raises(BadCheckpoint, match=why) as caught:
        read(path)
    assert time.process_time() - start < seconds
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


class Call:
    """A pickle of it calls something when read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def memory_bombs(folder):
    """Small files that ask for more memory than there is."""
    for n in (10 ** 11, 10 ** 14):
        for old in (False, True):
            yield saved({"w": Call(bytearray, n)}, folder / f"bytearray{n}{old}.pt", old=old)
            yield saved({"w": Call(torch.Tensor, n)}, folder / f"tensor{n}{old}.pt", old=old)
            yield saved({"w": Call(torch.UntypedStorage, n)}, folder / f"storage{n}{old}.pt", old=old)
            yield saved({"w": torch.ones(1).expand(n)}, folder / f"expanded{n}{old}.pt", old=old)
        for key, content in {"shape": ((n,), (1,)), "stride": ((2,), (n,)), "both": ((n, n), (1, 1))}.items():
            state = io.BytesIO()
            torch.save({"w": torch.ones(3)}, state)
            with zipfile.ZipFile(state) as good, zipfile.ZipFile(folder / f"{key}{n}.pt", "w") as bad:
                for entry in good.infolist():
                    data = good.read(entry)
                    if entry.filename.endswith("data.pkl"):
                        data = data.replace(b"K\x03\x85", longs(content[0])).replace(b"K\x01\x85", longs(content[1]))
                    bad.writestr(entry.filename, data)
            yield folder / f"{key}{n}.pt"
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("a/data.pkl", b"\x80\x02}.")
        with f.open("a/data/0", "w") as entry:
            for _ in range(150):
                entry.write(bytes(2 ** 20))
    yield folder / "bomb.pt"
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as f, f.open("a.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": (75 * 2 ** 19,)})
        for _ in range(150):
            entry.write(bytes(2 ** 20))
    yield folder / "bomb.npz"
    for shape in ((2 ** 60,), (2 ** 40, 2 ** 40), (2 ** 31,)):
        with zipfile.ZipFile(folder / f"giant{len(shape)}{shape[0]}.npz", "w") as f, f.open("a.npy", "w") as entry:
            np.lib.format.write_array_header_1_0(entry, {"descr": "<f4", "fortran_order": False, "shape": shape})
        yield folder / f"giant{len(shape)}{shape[0]}.npz"
    long_put = b"\x80\x02}r\xff\xff\xff\x7f."  # a memo of 2^31 places
    (folder / "memo.pkl").write_bytes(long_put)
    yield folder / "memo.pkl"
    for opcode in (b"\x8e", b"\x8d", b"\x96"):  # bytes, text and bytearray of 2^40
        (folder / f"long{opcode[0]}.pkl").write_bytes(b"\x80\x05" + opcode + (2 ** 40).to_bytes(8, "little") + b"x.")
        yield folder / f"long{opcode[0]}.pkl"
    doubled = b"\x80\x02c_codecs\nencode\n" + b"q\x01X\x05\x00\x00\x00latin" + b"0" * 3 + b"h\x01".join([b""] * 2) + b"."
    (folder / "codec.pkl").write_bytes(doubled)
    yield folder / "codec.pkl"


def longs(numbers):
    return b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in numbers) + (b"\x85" if len(numbers) == 1 else b"\x86")


def test_no_file_takes_memory_that_it_has_not(tmp_path):
    """In a process with 128 MB to spare, each in under two seconds of its time."""
    files = list(memory_bombs(tmp_path))
    assert len(files) > 30
    code = f"""
import time
for path in {[str(f) for f in files]!r}:
    start = time.process_time()
    try:
        read(path)
        print("READ", path)
    except FormariumError as error:
        took = time.process_time() - start
        assert took < 2, (path, took)
        assert "MemoryError" not in str(error) and "allocate" not in str(error), error
"""
    assert limited(code) == ""


@both_formats
def test_code_does_not_run(old, tmp_path):
    """Nor is anything imported. Each planted call would have left a file, which is seen when pickle itself reads it."""
    marker = tmp_path / "ran"
    write = f"open({str(marker)!r}, 'w')"
    (tmp_path / "planted_module.py").write_text(write)
    calls = [(os.system, f"touch '{marker}'"), (eval, write), (exec, write), (getattr, "x", "upper"),
             (subprocess.call, ["touch", str(marker)]), (torch.hub.load, "a/b", "c"), (open, str(marker), "w"),
             (np.save, str(marker), 1), (torch.save, 1, str(marker))]
    for i, call in enumerate(starmap(Call, calls)):
        file = saved({"a": torch.ones(1), "b": call}, tmp_path / f"{i}.pt", old=old)
        refused(file, r"wants to run more than tensors need \([\w.]+\); refused")
        with pytest.raises(BadCheckpoint, match="refused"):
            fm.load(file)
    (tmp_path / "module.pkl").write_bytes(b"\x80\x02cplanted_module\nx\n.")
    refused(tmp_path / "module.pkl", r"\(planted_module.x\); refused")
    assert not marker.exists()
    assert "planted_module" not in sys.modules
    pickle.loads(pickle.dumps(Call(eval, write)))
    assert marker.exists()


def test_records_are_never_called(tmp_path, monkeypatch):
    """What is listed as harmless is not run either: a file may name it with any arguments."""
    ran = []
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *a, **k: ran.append(a))
    monkeypatch.setattr(pathlib.PosixPath, "__new__", lambda *a, **k: ran.append(a))
    code = b"\x80\x02}(X\x01\x00\x00\x00acargparse\nNamespace\n)\x81X\x01\x00\x00\x00bcpathlib\nPosixPath\n)Ru."
    (tmp_path / "a.pkl").write_bytes(code)
    refused(tmp_path / "a.pkl", "holds no state dict")
    assert not ran
    pickle.loads(code)
    assert ran
    for name in ("os.system", "posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "runpy.run_path",
                 "torch.hub.load", "torch.load", "numpy.load", "numpy.save", "argparse.ArgumentParser"):
        assert not RECORDS.fullmatch(name), name


def test_whole_models_and_programs_are_told(tmp_path):
    refused(saved(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pt"), r"\(torch.nn.modules.container.Sequential\); refused")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "b.pt"))
    refused(tmp_path / "b.pt", "TorchScript program")


def test_time_bombs(tmp_path):
    """A pickle without end, and one whose key takes 2^60 steps to hash."""
    (tmp_path / "long.pkl").write_bytes(b"\x80\x02" + b"N0" * LONGEST + b"N.")
    refused(tmp_path / "long.pkl", "longer than that of any model", seconds=6.0)  # of a loaded machine
    tuples = b"\x80\x02})q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\x01s."
    (tmp_path / "hash.pkl").write_bytes(tuples)
    refused(tmp_path / "hash.pkl", "is damaged|no state dict")


# what is damaged

@pytest.mark.parametrize(("content", "why"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of git-lfs.*download it"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "web page, not a checkpoint: the download failed"),
    (b"\n  <html lang='en'>", "web page"),
    ("Ünïcode text, not a model".encode(), "it is a text that begins with 'Ünïcode"),
    (b'{"weights": 1}', "it is a text"), (b'{"weight_map": ' + b"[" * 100_000, "it is a text"),
    (gzip.compress(b"abc" * 100, mtime=0), "compressed by gzip: unpack"),
    (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    (b"GGUF" + bytes(64), "a GGUF file"), (b"\x93NUMPY\x01\x00" + bytes(99), "a single array"),
    (b"\x89PNG\r\n\x1a\n\0", "an image"),
    (bytes(257) + b"ustar\0" + bytes(512), "a tar archive"), (bytes(1000), "nothing in its first bytes"),
    (b"\x01", "is damaged"), (b"", "is empty"), (b"PK\3\4" + bytes(99), "is damaged"), (b"\x80\x02", "is damaged"),
    ((2 ** 60).to_bytes(8, "little") + b'{"a":1}', f"header claims {2 ** 60} bytes"),
    ((2).to_bytes(8, "little") + b"{}", "holds no tensors"), (b"\x80\x02}.", "holds no state dict"),
    (pickle.dumps([1, 2], protocol=2), "holds no state dict"),
])
def test_no_checkpoints(content, why, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth", why)


def header(**tensors):
    text = json.dumps({k: {"dtype": "F32", "shape": s, "data_offsets": o} for k, (s, o) in tensors.items()}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("tensors", [
    {"a": ([2], [0, 8]), "b": ([2], [4, 12])}, {"a": ([2], [-8, 0])}, {"a": ([2 ** 40], [0, 2 ** 42])},
    {"a": ([2], [8, 0])}, {"a": ([-2], [0, 8])}, {"a": ([3], [0, 8])},
    {"a": ([2 ** 62, 2 ** 62], [0, 8])}, {"a": ([2], [4, 12])},
])
def test_safetensors_with_wrong_offsets(tensors, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header(**tensors) + bytes(12))
    refused(tmp_path / "a.safetensors", "is damaged")


def containers(folder):
    state = some_state()
    save_file(state, folder / "a.safetensors")
    saved(state, folder / "a.pt")
    saved(state, folder / "old.pt", old=True)
    np.savez(folder / "a.npz", **{k: v.numpy() for k, v in state.items()})
    (folder / "a.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}, protocol=4))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("which", range(5))
def test_cut_at_every_place(which, tmp_path):
    (tmp_path / "whole").mkdir()
    file = containers(tmp_path / "whole")[which]
    whole, cut = file.read_bytes(), tmp_path / f"cut{file.suffix}"
    read(file)
    for length in {*range(0, len(whole), max(1, len(whole) // 150)), *range(12), *range(len(whole) - 30, len(whole))}:
        cut.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"cut\.\w+ is"):
            read(cut)


def test_lies_about_sizes(tmp_path):
    """A storage that is smaller than its tensor; an entry that claims more than it has."""
    state = io.BytesIO()
    torch.save({"w": torch.ones(1000)}, state)
    with zipfile.ZipFile(state) as good, zipfile.ZipFile(tmp_path / "a.pt", "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry.filename, data[:400] if entry.filename.endswith("data/0") else data)
    refused(tmp_path / "a.pt", "has no values in it")
    raw = bytearray(state.getvalue())
    at = raw.rindex(b"PK\1\2", 0, raw.rindex(b"data/0"))
    raw[at + 20:at + 28] = (2 ** 31).to_bytes(4, "little") * 2
    (tmp_path / "b.pt").write_bytes(raw)
    refused(tmp_path / "b.pt", "lies outside of the file|is damaged")


def test_things_that_are_no_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no regular file")
    refused("/dev/zero", "is no regular file")
    refused(tmp_path / "none.pth", "no file")
    refused(tmp_path / "a\0b", "no file")
    refused(tmp_path / ("x" * 300), "no file|damaged")
    refused(VIT / "below", "no file")
    file = saved(some_state(), tmp_path / "a.pt")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # who runs the tests may be allowed everything
    refused(file, f"no permission to read {file}")


def test_not_a_number(tmp_path):
    state = load_file(VIT)
    state["head.bias"][0] = float("nan")
    save_file(state, tmp_path / "a.safetensors", metadata(VIT))
    with pytest.raises(BadCheckpoint, match=r"holds NaN or infinity in 1 tensors, e\.g\. head\.bias"):
        fm.load(tmp_path / "a.safetensors")


# recipes that are nonsense

def metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return f.metadata()


def with_recipe(path, recipe, **told):
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    save_file(load_file(VIT), path, metadata(VIT) | {"recipe": text} | told)
    return path


def vit(transforms=(), name="vit/nano", **changes):
    recipe = json.loads(metadata(VIT)["recipe"])
    return {"name": name, "changes": recipe["changes"] | changes, "transforms": list(transforms)}


@pytest.mark.parametrize("recipe", [
    vit(dim=2 ** 20), vit(depth=10 ** 9), vit(dim=10 ** 30), vit(img_size=10 ** 6), vit(num_classes=10 ** 12), vit(dim=-1),
    vit(heads=0), vit(dim="many"), vit(depth=None), vit(channel={"spec": 3}), vit(depth={"tuple": 3}),
    vit(channel={"spec": "formarium.parts.channel:Mlp"}), vit(dim=[1]),
    vit(channel={"spec": "formarium.parts.channel:Mlp", "options": {"ratio": 1e12}}),
    vit([{"name": "adaptformer", "settings": {"bottleneck": 2 ** 40}}]),
    vit([{"name": "adaptformer", "settings": {}}] * 500),
    "[" * 100_000, '{"a":' * 100_000, '{"name": "vit/nano", "changes": {"dim": ' + "9" * 5000 + "}}", "null", "",
    '{"name": "vit/nano", "changes": {"dim": ' + '{"tuple": [' * 900 + "1" + "]}" * 900 + "}}",
    vit(name="gpt/nano", context=10 ** 12), {"name": "gpt/nano", "changes": {"context": 10 ** 12}},
    {"name": "swin/nano", "changes": {"depths": {"tuple": [10 ** 9]}}}, {"name": "restormer/nano", "changes": {}},
], ids=lambda r: str(r)[-60:])
def test_recipes_build_no_more_than_the_file_fills(recipe, tmp_path):
    """Refused before anything of it is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                self.made = max(self.made, out.nbytes)
            return out

    file = with_recipe(tmp_path / "a.safetensors", recipe)
    fm.load(VIT)
    start = time.process_time()
    with Largest() as largest, pytest.raises(FormariumError):
        fm.load(file)
    assert time.process_time() - start < 4
    assert largest.made < 2 ** 22


@pytest.mark.parametrize("spec", [
    "os:system", "builtins:eval", "torch.nn:Linear", "formarium.core.checkpoint:save", "formarium.arena.train:Train",
    "formarium.core.registry:Entry", "formarium.cli:app", "formarium.papers.backbones.vit:np", "formarium.parts.channel:nn",
    "formarium:load", "formarium.parts:channel", "formarium.parts.channel", "formarium.parts.channel:__name__",
    "formarium.parts.channel:Mlp.__init__", "formarium.papers.backbones.vit:PRESETS", "", ":", "formarium.parts.:x",
])
def test_recipes_name_parts_alone(spec, tmp_path):
    file = with_recipe(tmp_path / "a.safetensors", vit(channel={"spec": spec, "options": {}}))
    with pytest.raises((DoesNotFit, BadCheckpoint), match=r"the recipe names .*(not a part|has not)|makes no model"):
        fm.load(file)


def test_the_outline_holds_for_every_model():
    """What bounds a recipe, a build on the meta device, has the tensors of the real one; also after transforms."""
    from formarium.core.checkpoint import _outline

    names = list_models("*/nano")
    names += [f"{h}+{t}" for t in list_transforms() for h in find(t).card.hosts if "/" in h]
    assert len(names) > 20
    for name in names:
        state = (model := fm.create_model(name)).state_dict()
        outline = _outline(model.recipe, state, None, name)
        assert {k: v.shape for k, v in outline.items()} == {k: v.shape for k, v in state.items()}


# files of older versions

def test_newer_formats_are_refused(tmp_path):
    file = with_recipe(tmp_path / "a.safetensors", vit(), formarium="9.1.0", formarium_format=str(FORMAT + 1))
    with pytest.raises(BadCheckpoint, match=rf"written by formarium 9\.1\.0 in format {FORMAT + 1}; this version reads"):
        fm.load(file)
    assert metadata(VIT)["formarium_format"] == str(FORMAT)
    fm.load(with_recipe(file, vit(), formarium="0.1.0"))


def test_there_are_files_of_this_version():
    """python tests/files/write.py makes them."""
    assert HERE / fm.__version__ in OLD
    assert sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()) < 400_000 * len(OLD)


@pytest.mark.parametrize("folder", OLD, ids=lambda p: p.name)
def test_files_of_older_versions(folder):
    answers = load_file(folder / "answers.safetensors")
    names = {p.stem for p in folder.glob("*.safetensors")} - {"answers"}
    assert names == {k.split(".")[0] for k in answers}
    for name in names:
        told = metadata(folder / f"{name}.safetensors")
        assert told["formarium"] == folder.name
        base = folder / "vit.safetensors" if "frozen" in told else None
        model = fm.load(folder / f"{name}.safetensors", base=base)
        with torch.no_grad():
            torch.testing.assert_close(model(answers[f"{name}.input"]), answers[f"{name}.output"], atol=1e-5, rtol=1e-4)
