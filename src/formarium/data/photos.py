"""Colour photographs of any size, in memory, with fixed, disjoint splits: what restoration degrades and gets back."""

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..core.errors import BadData
from . import cache
from .cache import Origin, Remote, in_folder, locate, need
from .images import SUFFIXES

T = TypeVar("T")

_SUMS = Path(__file__).with_name("cbsd68.sha256").read_text(encoding="utf-8")
CBSD68 = {name: digest for digest, name in map(str.split, _SUMS.splitlines())}
SET5 = {
    "baby.bmp": "199806aa411249a8f179fe5598bed0766d92bf7fe5ff388522e4d8d997bd2fd4",
    "bird.bmp": "498f50e8907f2421969d893aff61ee1a7c4aae23cb76452728a90e97c2889fb3",
    "butterfly.bmp": "43534bd9f59f06ac7b0d6c8b991137baa4c764b8241a5bd1136b9dd810f4dba2",
    "head.bmp": "959f9ac5ceacfd7648e7f0bfa6fbbd626b141d3e61e41dddd3e2593acfd3ac0b",
    "woman.bmp": "2ab3c594c057d80c2f339c9be0bf6fb81487ce650562b60c2ad8cd816d509f56",
}
_GITHUB = "https://raw.githubusercontent.com/"
_CBSD68 = _GITHUB + "clausmichele/CBSD68-dataset/51a07a95884ac7c8bdd5d1614f9da781adc3c4a0/CBSD68/original_png/"
_SET5 = _GITHUB + "cszn/KAIR/fc1732f4a4514e42ce15e5b3a1e18c828af47a1e/testsets/set5/"
cache.FILES |= {f"cbsd68/{name}": Remote(_CBSD68 + name, digest) for name, digest in CBSD68.items()}
cache.FILES |= {f"set5/{name}": Remote(_SET5 + name, digest) for name, digest in SET5.items()}


@dataclass(frozen=True, eq=False)
class Photos:
    """images: split -> uint8 (3, H, W) each, of any size; names: split -> what each is called. BadData otherwise."""

    images: dict[str, list[UInt8[Tensor, "3 h w"]]]
    names: dict[str, list[str]]
    origin: Origin

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            images, names = self.images.get(split, []), self.names.get(split, [])
            if not images or len(images) != len(names):
                raise BadData(f"{self.origin.title}, {split}: expected one image or more and a name for each, got "
                              f"{len(images)} and {len(names)}")
            for image, name in zip(images, names, strict=True):
                if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
                    raise BadData(f"{self.origin.title}, {split}, {name}: expected uint8 (3, H, W), got {image.dtype} "
                                  f"{tuple(image.shape)}")


def decode(content: bytes | Path, name: str) -> Tensor:
    """A file's image as uint8 (3, H, W), upright, grey made RGB."""
    image, ops = need("PIL.Image", "pillow"), need("PIL.ImageOps", "pillow")
    try:
        with image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            if opened.mode.startswith(("I", "F")):
                raise BadData(f"{name} has pixels of 16 bits or more; save it with 8")
            array = np.array(ops.exif_transpose(opened).convert("RGB"))
    except BadData:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadData(f"{name} cannot be read as an image ({error})") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _read(archive: str, folder: str, files: Mapping[str, str]) -> list[Tensor]:
    """The images `files` (name -> SHA-256) from a zip in FORMARIUM_DATA, where it is; else each on its own, downloaded."""
    path = in_folder(archive)
    if path is None:
        return [decode(locate(f"{folder}/{name}"), name) for name in files]
    try:
        with zipfile.ZipFile(path) as opened:
            members = {Path(m).name: m for m in opened.namelist() if not m.endswith("/")}
            missing = [name for name in files if name not in members]
            if missing:
                raise BadData(f"{path} has no {missing[0]} ({len(missing)} of {len(files)} images are missing)")
            contents = {name: opened.read(members[name]) for name in files}
    except (OSError, zipfile.BadZipFile) as error:
        raise BadData(f"{path} is no whole zip archive ({error}); remove it and the images are downloaded") from error
    other = [name for name, content in contents.items() if hashlib.sha256(content).hexdigest() != files[name]]
    if other:
        raise BadData(f"{path}: {other[0]} is damaged or another image ({len(other)} of {len(files)} have another "
                      "SHA-256); remove the archive and the images are downloaded")
    return [decode(content, name) for name, content in contents.items()]


def _split(count: int, val: int, test: int) -> dict[str, list[int]]:
    """Indices: of a fixed shuffle the first `val` are for validation, the next `test` for testing."""
    # the stream of RandomState is frozen, that of the newer generators may change between versions of NumPy
    order = np.random.RandomState(0).permutation(count).tolist()
    return {"train": sorted(order[val + test:]), "val": sorted(order[:val]), "test": sorted(order[val:val + test])}


def _pick(values: Sequence[T], parts: Mapping[str, Sequence[int]]) -> dict[str, list[T]]:
    return {split: [values[i] for i in part] for split, part in parts.items()}


def cbsd68() -> Photos:
    """CBSD68, 68 photographs of 481x321 or 321x481 pixels: 44, 8 and 16."""
    parts = _split(len(CBSD68), 8, 16)
    return Photos(_pick(_read("cbsd68.zip", "cbsd68", CBSD68), parts), _pick(list(CBSD68), parts), Origin(
        "CBSD68, photographs", "https://github.com/clausmichele/CBSD68-dataset", "none stated; cite Martin et al., 2001",
        "44, 8 and 16 of the 68 images; the field trains on others and tests on all 68, so published results differ"))


def cbsd68_set5() -> Photos:
    """60 and 8 images of CBSD68 for training and validation; the five of Set5 for testing."""
    parts = _split(len(CBSD68), 8, 0)
    images, names = _pick(_read("cbsd68.zip", "cbsd68", CBSD68), parts), _pick(list(CBSD68), parts)
    return Photos(images | {"test": _read("set5.zip", "set5", SET5)}, names | {"test": list(SET5)}, Origin(
        "CBSD68 and Set5, photographs", "https://github.com/clausmichele/CBSD68-dataset, https://github.com/cszn/KAIR",
        "none stated; cite Martin et al., 2001, and Bevilacqua et al., 2012",
        "60 and 8 images of CBSD68, then the five of Set5; the field trains on more images"))


def two_photos() -> Photos:
    """scikit-learn's china.jpg and flower.jpg, 640x427: of each the left 384 columns, the next 128 and the last 128."""
    arrays = need("sklearn.datasets", "scikit-learn").load_sample_images().images
    whole = [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]
    columns = {"train": slice(0, 384), "val": slice(384, 512), "test": slice(512, 640)}
    images = {split: [x[..., part].contiguous() for x in whole] for split, part in columns.items()}
    return Photos(images, {split: ["china.jpg", "flower.jpg"] for split in columns}, Origin(
        "Two photographs", "scikit-learn, load_sample_images", "CC BY 2.0 and 3.0",
        "of each photograph the left 384 columns, the next 128 and the last 128"))


def folder(path: str | Path) -> Photos:
    """Your own images, a folder of three or more: 80, 10 and 10 % of them, and no part empty."""
    root = Path(path).expanduser()
    try:
        if not root.is_dir():
            raise BadData(f"{root} {'is a file' if root.exists() else 'does not exist'}; write denoise:PATH or sr:PATH, "
                          "PATH being a folder of images")
        files = sorted(f for f in root.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    except OSError as error:
        raise BadData(f"cannot read the folder {root}: {error}") from error
    if len(files) < 3:
        raise BadData(f"{root} has {len(files)} images ({', '.join(SUFFIXES)}); three or more are needed, one for each of "
                      "training, validation and testing")
    tenth = max(1, round(len(files) / 10))
    parts = _split(len(files), tenth, tenth)
    return Photos(_pick([decode(f, str(f)) for f in files], parts), _pick([f.name for f in files], parts), Origin(
        f"Images of {root.resolve().name}", str(path), "yours"))
