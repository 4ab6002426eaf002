"""Of which class and object is each pixel? Mean intersection over union decides; panoptic quality is told too."""

import colorsys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..core.errors import DoesNotFit, unknown
from ..data import masks
from ..data.masks import VOID, Masks
from ..skeletons.segmenter import Segmenter
from .base import SPLITS, DataInfo, Task, evaluating, generator, order
from .classify import png, statistics

SHOWN = 6
AT_ONCE = 32  # images of an evaluation: a batch of masks is large

_order = lru_cache(maxsize=8)(order)


class Segment(Task):
    """Images (B, C, H, W), each channel with the mean 0 and deviation 1 of the training split. The truth (B, 2, H, W) is
    the class and the number of the segment of each pixel, VOID (255) where there is none.

    Every epoch sees each training image once. flip: left to right in half of the cases. The model's own criterion is the
    loss in training; the loss of an evaluation is the same for all: -log of the probability of each pixel's class.
    """

    metric = "miou"
    higher_is_better = True
    model_type = Segmenter
    domain = "dense"

    def __init__(self, name: str, data: Masks, *, flip: bool = False) -> None:
        self.name, self.data, self.flip = name, data, flip
        self.info = DataInfo(*data.origin[:3], sizes={s: len(data.pixels[s]) for s in SPLITS}, note=data.origin.note)
        self.mean, self.std = statistics(data.pixels["train"])

    def model_options(self) -> dict[str, Any]:
        _, channels, *size = self.data.pixels["train"].shape
        return {"num_classes": len(self.data.classes), "in_chans": channels, "img_size": tuple(size),
                "things": self.data.things}

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 of the same shape."""
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        n, start = self.info.sizes["train"], step * batch_size
        epochs = range(start // n, (start + batch_size - 1) // n + 1)
        index = torch.cat([_order(n, seed, e) for e in epochs])[start % n:][:batch_size]
        pixels, truth = self.data.pixels["train"][index], self.data.truth["train"][index].long()
        if self.flip:
            flipped = (torch.rand(batch_size, generator=generator(seed, step)) < 0.5)[:, None, None, None]
            pixels, truth = (torch.where(flipped, t.flip(3), t) for t in (pixels, truth))
        return self.normalise(pixels), truth

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        own: Any = getattr(model, "module", model)  # of a model spread over processes
        return own.criterion(model(batch[0], supervised=True), batch[1])

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, every image once."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        size = min(batch_size, AT_ONCE)
        for pixels, truth in zip(self.data.pixels[split].split(size), self.data.truth[split].split(size), strict=True):
            yield self.normalise(pixels), truth.long()

    def evaluate(self, model: Segmenter, split: str,  # type: ignore[override]
                 batch_size: int = 256) -> dict[str, float]:
        """loss, miou, pixel_accuracy, and pq: all over the labelled pixels of the whole split."""
        k, total, count = len(self.data.classes), 0.0, 0
        confusion, quality = torch.zeros(k, k, dtype=torch.int64), PanopticQuality(k)
        with evaluating(model) as device:
            for images, truth in self.batches(split, batch_size):
                images = images.to(device)
                found, (segments, classes) = self._read(model, images)
                total += F.nll_loss(found.clamp_min(1e-6).log(), truth[:, 0], ignore_index=VOID, reduction="sum").item()
                confusion += confusion_of(found.argmax(1), truth[:, 0], k)
                for own, labels, target in zip(segments, classes, truth, strict=True):
                    quality.add(own, labels, target)
                count += len(images)
        self.check_counted(count, split)
        pixels = max(1, int(confusion.sum()))
        return {"loss": total / pixels, "miou": mean_iou(confusion),
                "pixel_accuracy": confusion.diag().sum().item() / pixels, "pq": quality.result()}

    def _read(self, model: Segmenter, images: Tensor) -> tuple[Tensor, tuple[Tensor, list[list[int]]]]:
        """Probabilities of the classes, and segments with their classes, on the CPU."""
        found, (segments, classes) = model.both(images)
        found = found.float().cpu()
        wanted = (len(images), len(self.data.classes), *images.shape[2:])
        if found.shape != wanted:
            raise DoesNotFit(f"{self.name} needs probabilities {wanted}; the model gave {tuple(found.shape)}")
        return found, (segments.cpu(), classes)

    def show(self, model: Segmenter) -> dict[str, Any]:  # type: ignore[override]
        """Six test images, evenly spaced in the split: the image, the truth, and what the model sees, as PNG in base64.

        Classes are colours; between things of one class there is a white edge. Pixels without a label stay grey.
        """
        n = self.info.sizes["test"]
        index = torch.linspace(0, n - 1, min(SHOWN, n)).long()
        pixels, truth = self.data.pixels["test"][index], self.data.truth["test"][index].long()
        with evaluating(model) as device:
            images = self.normalise(pixels).to(device)
            found, (segments, _) = self._read(model, images)
        labels = found.argmax(1)
        colours = palette(len(self.data.classes))
        iou = [mean_iou(confusion_of(a, b, len(colours))) for a, b in zip(labels, truth[:, 0], strict=True)]
        edges = bool(self.data.things)
        return {"kind": "masks", "images": [png(p) for p in pixels], "iou": iou,
                "truth": [png(overlay(p, t[0], t[1], colours, edges)) for p, t in zip(pixels, truth, strict=True)],
                "predicted": [png(overlay(p, a, b, colours, edges))
                              for p, a, b in zip(pixels, labels, segments, strict=True)],
                "classes": list(self.data.classes), "colours": [f"#{bytes(c).hex()}" for c in colours.tolist()]}


def confusion_of(predicted: Int[Tensor, "*d"], truth: Int[Tensor, "*d"], k: int) -> Int[Tensor, "k k"]:
    """Pixels by (class, predicted class); those without a class are left out."""
    known = truth != VOID
    return torch.bincount(truth[known] * k + predicted[known], minlength=k * k).view(k, k)


def mean_iou(confusion: Int[Tensor, "k k"]) -> float:
    """Mean over the classes that occur, in truth or among the predictions; 0 where none does."""
    hits = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return (hits[union > 0] / union[union > 0]).double().mean().item() if union.any() else 0.0


class PanopticQuality:
    """Sum of the IoU of matched segments over (matches + half of the unmatched), a class; then the mean of the classes that
    occur (Kirillov et al. 2019, arXiv 1801.00868). A match: the same class and an IoU over 0.5."""

    def __init__(self, classes: int) -> None:
        self.iou, self.matched, self.extra, self.missed = torch.zeros(4, classes, dtype=torch.float64)

    def add(self, segments: Int[Tensor, "h w"], classes: Sequence[int], truth: Int[Tensor, "2 h w"]) -> None:
        """segments: 1, 2, ... of these classes, or 0; truth: class and number of the segment, or VOID. Void pixels are
        taken out of a predicted segment's area; one that is mostly void counts for nothing."""
        p, t = len(classes) + 1, VOID + 1
        labels, numbers = truth.flatten(1)
        both = torch.bincount(segments.flatten() * t + numbers, minlength=p * t).view(p, t).double()
        area, void, sizes = both.sum(1), both[:, VOID], both.sum(0)
        iou = both / (area[:, None] + sizes - both - void[:, None]).clamp_min(1)
        of_number = torch.full((t,), VOID)
        of_number[numbers] = labels
        met = torch.zeros(t, dtype=torch.bool)
        for i, k in enumerate(classes, 1):
            same = (of_number == k) & (iou[i] > 0.5)
            same[VOID] = False
            if same.any():  # one at most: segments do not overlap
                self.iou[k] += iou[i][same].sum()
                self.matched[k] += 1
                met |= same
            elif area[i] and void[i] <= 0.5 * area[i]:
                self.extra[k] += 1
        for number in ((sizes > 0) & ~met).nonzero().flatten().tolist():
            if number != VOID:
                self.missed[of_number[number]] += 1

    def result(self) -> float:
        of = self.matched + (self.extra + self.missed) / 2
        return (self.iou[of > 0] / of[of > 0]).mean().item() if of.any() else 0.0


def palette(k: int) -> Int[Tensor, "k 3"]:
    """k colours far apart: hues by the golden angle, two brightnesses."""
    rows = [colorsys.hsv_to_rgb((0.6 + i * 0.618034) % 1, 0.75, (0.95, 0.7)[i % 2]) for i in range(k)]
    return (torch.tensor(rows) * 255).round().to(torch.uint8)


def overlay(pixels: Int[Tensor, "c h w"], labels: Int[Tensor, "h w"], numbers: Int[Tensor, "h w"],
            colours: Int[Tensor, "k 3"], edges: bool) -> Int[Tensor, "3 h w"]:
    """The grey image under the colours of its classes; edges: white between segments of one class."""
    grey = pixels.float().mean(0).expand(3, -1, -1)
    known = labels != VOID
    colour = colours[torch.where(known, labels, 0)].movedim(-1, 0).float()
    out = torch.where(known, 0.45 * grey + 0.55 * colour, grey)
    if edges:
        edge = torch.zeros_like(known)
        edge[1:] |= (numbers[1:] != numbers[:-1]) & (labels[1:] == labels[:-1])
        edge[:, 1:] |= (numbers[:, 1:] != numbers[:, :-1]) & (labels[:, 1:] == labels[:, :-1])
        out = torch.where(edge, 255.0, out)
    return out.round().to(torch.uint8)


def digit_scenes() -> Segment:
    """Digits in front of one another, 64x64 grey."""
    return Segment("digit_scenes", masks.digit_scenes())


def camvid(*, size: int = 72, flip: bool = True) -> Segment:
    """701 street scenes, `size` pixels high."""
    return Segment("camvid", masks.camvid(size), flip=flip)


def folder(path: str | Path, *, size: int = 64, flip: bool = True) -> Segment:
    """Your images and masks, made `size` pixels wide and high."""
    return Segment(f"masks:{path}", masks.folder(path, size), flip=flip)
