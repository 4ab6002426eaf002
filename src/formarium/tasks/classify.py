"""Which class is in the image? Cross-entropy; accuracy on the whole split decides."""

import base64
import copy
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import DoesNotFit, unknown
from ..core.model import Model
from ..data import images
from ..data.cache import need
from ..data.images import Images
from ..skeletons.backbone import Backbone
from .augment import Augmentation, erase, mix, rand_augment
from .base import SPLITS, DataInfo, Task, evaluating, generator, order

PADDING = 4
SHOWN = 12

_order = lru_cache(maxsize=8)(order)


class Classify(Task):
    """Images (B, C, S, S), each channel with the mean 0 and deviation 1 of the training split -> logits (B, classes).

    Every epoch sees each training image once. augment: in training, a random crop of the image with a black margin of 4
    pixels, and a flip left to right in half of the cases. augmentation: what else is done; `augmented` changes it.
    """

    metric = "accuracy"
    higher_is_better = True
    model_type = Backbone
    domain = "image"

    def __init__(self, name: str, data: Images, *, augment: bool = False,
                 augmentation: Augmentation = Augmentation()) -> None:
        self.name, self.data, self.augment, self.augmentation = name, data, augment, augmentation
        self.info = DataInfo(*data.origin[:3], sizes={s: len(data.labels[s]) for s in SPLITS}, note=data.origin.note)
        self.mean, self.std = statistics(data.pixels["train"])

    def model_options(self) -> dict[str, Any]:
        _, channels, size, _ = self.data.pixels["train"].shape
        return {"num_classes": len(self.data.classes), "in_chans": channels, "img_size": size}

    def augmented(self, **options: Any) -> "Classify":
        task = copy.copy(self)
        task.augmentation = replace(self.augmentation, **options)
        return task

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, S, S) -> float32 of the same shape."""
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        n, start, a = self.info.sizes["train"], step * batch_size, self.augmentation
        epochs = range(start // n, (start + batch_size - 1) // n + 1)
        index = torch.cat([_order(n, seed, e).repeat_interleave(a.repeats)[:n] for e in epochs])[start % n:][:batch_size]
        pixels, targets = self.data.pixels["train"][index], self.data.labels["train"][index]
        if not (self.augment or a.soft or a.random):
            return self.normalise(pixels), targets
        random, targets = generator(seed, step), a.targets(targets, len(self.data.classes))
        if self.augment:
            pixels = crop_and_flip(pixels, random)
        if a.rand_augment:
            pixels = rand_augment(pixels, a.rand_augment, random)
        inputs = self.normalise(pixels)
        if a.erasing:
            inputs = erase(inputs, a.erasing, random)
        return mix(inputs, targets, a.mixup, a.cutmix, random) if a.mixup or a.cutmix else (inputs, targets)

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy; of several heads, whose answers training keeps apart, its mean."""
        answers = model(batch[0])
        if isinstance(answers, Tensor):
            return F.cross_entropy(answers, batch[1])
        return torch.stack([F.cross_entropy(a, batch[1]) for a in answers]).mean()

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, every image once."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        for pixels, labels in zip(self.data.pixels[split].split(batch_size), self.data.labels[split].split(batch_size),
                                  strict=True):
            yield self.normalise(pixels), labels

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """loss, accuracy, and macro_f1: the mean F1 of the classes that occur, in truth or among the predictions."""
        k, total, answers, truth = len(self.data.classes), 0.0, [], []
        with evaluating(model) as device:
            for inputs, labels in self.batches(split, batch_size):
                logits = model(inputs.to(device)).float().cpu()
                if logits.shape != (len(labels), k):
                    raise DoesNotFit(f"{self.name} has {k} classes, so {len(labels)} images need logits "
                                     f"({len(labels)}, {k}); the model gave {tuple(logits.shape)}")
                total += F.cross_entropy(logits, labels, reduction="sum").item()
                answers.append(logits.argmax(1))
                truth.append(labels)
        predicted, labels = torch.cat(answers), torch.cat(truth)
        self.check_counted(len(predicted), split)
        f1 = need("torchmetrics.functional.classification", "torchmetrics").multiclass_f1_score(predicted, labels, k)
        accuracy = (predicted == labels).double().mean().item()
        return {"loss": total / len(labels), "accuracy": accuracy, "macro_f1": f1.item()}

    def show(self, model: Model) -> dict[str, Any]:
        """Twelve test images, evenly spaced in the split, with the class and the probability that the model gives."""
        n = self.info.sizes["test"]
        index = torch.linspace(0, n - 1, min(SHOWN, n)).long()
        pixels = self.data.pixels["test"][index]
        with evaluating(model) as device:
            confidence, predicted = model(self.normalise(pixels).to(device)).float().softmax(1).cpu().max(1)

        def named(labels: Tensor) -> list[str]:
            return [self.data.classes[i] for i in labels.tolist()]

        return {"kind": "images", "images": [png(p) for p in pixels], "truth": named(self.data.labels["test"][index]),
                "predicted": named(predicted), "confidence": confidence.tolist()}


def statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 (N, C, S, S), on its scale of 0 to 255; a deviation of 1 or more."""
    total, squares = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
    for part in pixels.split(1024):
        values = part.double()
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    mean, mean_square = (x / (pixels.numel() / pixels.shape[1]) for x in (total, squares))
    return mean.float(), (mean_square - mean.square()).clamp_min(1).sqrt().float()


def crop_and_flip(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Each image (C, S, S) of a batch moved by up to 4 pixels either way, black coming in, and flipped or not."""
    b, channels, size, _ = pixels.shape
    wide = size + 2 * PADDING
    down, right = torch.randint(2 * PADDING + 1, (2, b, 1), generator=random)
    flipped = torch.rand(b, 1, generator=random) < 0.5
    along = torch.arange(size)
    rows, columns = down + along, right + torch.where(flipped, along.flip(0), along)
    index = (rows[:, :, None] * wide + columns[:, None, :]).flatten(1)  # into the padded image, laid out flat
    padded = F.pad(pixels, (PADDING,) * 4).flatten(2)
    return padded.gather(2, index[:, None].expand(-1, channels, -1)).view(pixels.shape)


def png(pixels: Tensor) -> str:
    """uint8 (1 or 3, S, S) as a PNG file in base64."""
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    need("PIL.Image", "pillow").fromarray(array.contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def digits(*, augment: bool = False, augmentation: Augmentation = Augmentation()) -> Classify:
    """1797 handwritten digits, 8x8 grey."""
    return Classify("digits", images.digits(), augment=augment, augmentation=augmentation)


def mnist5k(*, augment: bool = False, augmentation: Augmentation = Augmentation()) -> Classify:
    """5000 images of MNIST, 28x28 grey."""
    return Classify("mnist5k", images.mnist5k(), augment=augment, augmentation=augmentation)


def cifar10(*, augment: bool = True, augmentation: Augmentation = Augmentation()) -> Classify:
    """15000 images of CIFAR-10, 32x32 colour."""
    return Classify("cifar10", images.cifar10(), augment=augment, augmentation=augmentation)


def imagefolder(path: str | Path, *, size: int = 32, augment: bool = True,
                augmentation: Augmentation = Augmentation()) -> Classify:
    """Your images: a folder with a sub-folder for each class, made `size` pixels wide and high."""
    return Classify(f"imagefolder:{path}", images.imagefolder(path, size), augment=augment, augmentation=augmentation)
