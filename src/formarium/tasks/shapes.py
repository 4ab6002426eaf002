"""What does this set of points show? Cross-entropy; accuracy on the whole split decides."""

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import DoesNotFit, unknown
from ..core.model import Model
from ..data import points as data_points
from ..data.cache import need
from ..data.points import Clouds
from ..skeletons.points import UNIT, PointBackbone
from .base import SPLITS, DataInfo, Task, evaluating, generator, order

SHOWN = 10
DRAWN = 200  # points of a shown set
TURN, TILT = math.radians(30), math.radians(20)  # how a set whose z points up is looked at

_order = lru_cache(maxsize=8)(order)


class ClassifyPoints(Task):
    """Lists of sets (N_i, 3), x, y, z from -1 to 1 -> logits (B, classes).

    Every epoch sees each training set once. points: of larger sets so many are taken, at random in training, else always
    the same ones. augment: in training each set is turned about its z axis and made smaller, down to 0.8.
    """

    metric = "accuracy"
    higher_is_better = True
    model_type = PointBackbone
    domain = "points"

    def __init__(self, name: str, data: Clouds, *, points: int = 1024, augment: bool = False) -> None:
        if not isinstance(points, int) or points < 1:
            raise DoesNotFit(f"points is the most points of a set, 1 or more, not {points!r}")
        self.name, self.data, self.points, self.augment = name, data, points, augment
        self.info = DataInfo(*data.origin[:3], sizes={s: len(data.labels[s]) for s in SPLITS}, note=data.origin.note)

    def model_options(self) -> dict[str, Any]:
        return {"num_classes": len(self.data.classes), "in_chans": 0, "bounds": UNIT}

    def _thin(self, points: Tensor, random: torch.Generator) -> Tensor:
        if len(points) <= self.points:
            return points
        return points[torch.randperm(len(points), generator=random)[:self.points]]

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[list[Tensor], Tensor]:
        n, start = self.info.sizes["train"], step * batch_size
        epochs = range(start // n, (start + batch_size - 1) // n + 1)
        index = torch.cat([_order(n, seed, e) for e in epochs])[start % n:][:batch_size]
        random = generator(seed, step)
        sets = [self._thin(self.data.sets["train"][i], random) for i in index.tolist()]
        if self.augment:
            sets = [turn_and_shrink(points, random) for points in sets]
        return sets, self.data.labels["train"][index]

    def loss(self, model: torch.nn.Module, batch: tuple[list[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def fixed(self, split: str, i: int) -> Tensor:
        """Set i of a split as it is evaluated."""
        return self._thin(self.data.sets[split][i], generator(0, i))

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """A split in order, every set once."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        for index in torch.arange(len(self.data.sets[split])).split(batch_size):
            yield [self.fixed(split, i) for i in index.tolist()], self.data.labels[split][index]

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """loss, accuracy, and macro_f1: the mean F1 of the classes that occur, in truth or among the predictions."""
        k, total, answers, truth = len(self.data.classes), 0.0, [], []
        with evaluating(model) as device:
            for sets, labels in self.batches(split, batch_size):
                logits = self._logits(model, sets, device)
                total += F.cross_entropy(logits, labels, reduction="sum").item()
                answers.append(logits.argmax(1))
                truth.append(labels)
        predicted, labels = torch.cat(answers), torch.cat(truth)
        self.check_counted(len(predicted), split)
        f1 = need("torchmetrics.functional.classification", "torchmetrics").multiclass_f1_score(predicted, labels, k)
        accuracy = (predicted == labels).double().mean().item()
        return {"loss": total / len(labels), "accuracy": accuracy, "macro_f1": f1.item()}

    def _logits(self, model: Model, sets: list[Tensor], device: torch.device) -> Tensor:
        logits, wanted = model([points.to(device) for points in sets]).float().cpu(), (len(sets), len(self.data.classes))
        if logits.shape != wanted:
            raise DoesNotFit(f"{self.name} has {wanted[1]} classes, so {wanted[0]} sets need logits {wanted}; the model "
                             f"gave {tuple(logits.shape)}")
        return logits

    def show(self, model: Model) -> dict[str, Any]:
        """Ten test sets, evenly spaced in the split, with the class and the probability that the model gives. A set is
        drawn by up to 200 points: right, up, both from -1 to 1, and nearness from 0 to 1."""
        n = self.info.sizes["test"]
        index = torch.linspace(0, n - 1, min(SHOWN, n)).long().tolist()
        sets = [self.fixed("test", i) for i in index]
        with evaluating(model) as device:
            confidence, predicted = self._logits(model, sets, device).softmax(1).max(1)
        drawn = [look(points[torch.randperm(len(points), generator=generator(1, i))[:DRAWN]], self.data.flat)
                 for i, points in zip(index, sets, strict=True)]
        return {"kind": "points", "sets": [[[round(v, 3) for v in p] for p in d.tolist()] for d in drawn],
                "truth": [self.data.classes[i] for i in self.data.labels["test"][index].tolist()],
                "predicted": [self.data.classes[i] for i in predicted.tolist()], "confidence": confidence.tolist()}


def turn_and_shrink(points: Tensor, random: torch.Generator) -> Tensor:
    """(N, 3) turned about the z axis by any angle, and scaled by 0.8 to 1."""
    angle, scale = (torch.rand(2, generator=random) * torch.tensor([2 * math.pi, 0.2])).tolist()
    c, s = math.cos(angle), math.sin(angle)
    return points @ (torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]]) * (1 - scale))


def look(points: Tensor, flat: bool) -> Tensor:
    """(N, 3) -> right, up and nearness: from above where the set is flat, else from the side, turned and tilted."""
    x, y, z = points.unbind(1)
    if flat:
        return torch.stack((x, y, z.clamp(0, 1)), dim=1)
    right, away = x * math.cos(TURN) - y * math.sin(TURN), x * math.sin(TURN) + y * math.cos(TURN)
    up, near = z * math.cos(TILT) + away * math.sin(TILT), z * math.sin(TILT) - away * math.cos(TILT)
    return torch.stack((right, up, ((near + 1) / 2).clamp(0, 1)), dim=1)


def points(*, points: int = 1024) -> ClassifyPoints:
    """5000 digits of MNIST as sets of points, a point for each pixel with ink."""
    return ClassifyPoints("points", data_points.mnist_points(), points=points)


def clouds(path: str | Path, *, points: int = 1024, augment: bool = True) -> ClassifyPoints:
    """Your clouds: a folder with a sub-folder for each class."""
    return ClassifyPoints(f"clouds:{path}", data_points.clouds(path), points=points, augment=augment)
