"""What is done to labelled images in training besides a crop and a flip: the ingredients of DeiT's recipe
(arXiv 2012.12877, section 6 and table 9). All of it is off unless asked for, and drawn from the random numbers of one step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..core.errors import DoesNotFit

ROUNDS = 2  # operations that RandAugment does to an image, each with a probability of one half


@dataclass(frozen=True)
class Augmentation:
    """repeats: how often each image stands in a row in the data's order, each time augmented anew; an epoch sees the first
    part of a new order, as many images as the split has (Repeated Augmentation, arXiv 1901.09335).
    rand_augment: strength, 0 to 10, of two random operations an image (RandAugment, arXiv 1909.13719).
    erasing: probability that a rectangle of an image becomes noise (arXiv 1708.04896).
    mixup, cutmix: alpha of the Beta(alpha, alpha) by which images are mixed (arXiv 1710.09412), or a rectangle of another
    is put in (arXiv 1905.04899), and the labels with them; with both, one is drawn a batch.
    smoothing: part of a label's weight that is spread evenly over all classes.
    """

    repeats: int = 1
    rand_augment: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (self.repeats >= 1 and 0 <= self.rand_augment <= 10 and 0 <= self.erasing <= 1 and self.mixup >= 0
                and self.cutmix >= 0 and 0 <= self.smoothing < 1):
            raise DoesNotFit("expected repeats >= 1, rand_augment from 0 to 10, erasing from 0 to 1, mixup >= 0, "
                             f"cutmix >= 0, smoothing in [0, 1); got {self}")

    @property
    def soft(self) -> bool:
        """Are targets shares of classes, (B, K), not numbers of classes, (B,)?"""
        return bool(self.mixup or self.cutmix or self.smoothing)

    @property
    def random(self) -> bool:
        """Does it draw random numbers?"""
        return bool(self.rand_augment or self.erasing or self.mixup or self.cutmix)

    def targets(self, labels: Int[Tensor, "b"], classes: int) -> Tensor:
        """The labels, or where they are to be mixed or smoothed the shares (B, classes)."""
        if not self.soft:
            return labels
        return F.one_hot(labels, classes) * (1 - self.smoothing) + self.smoothing / classes


def rand_augment(pixels: UInt8[Tensor, "b c h w"], strength: float, random: torch.Generator) -> UInt8[Tensor, "b c h w"]:
    """Two random operations an image, each done or not; their strengths have a deviation of 0.5 (timm's rand-m9-mstd0.5),
    and those with two directions take one by chance."""
    x, b = pixels.float(), len(pixels)
    for _ in range(ROUNDS):
        chosen = torch.randint(len(OPERATIONS), (b,), generator=random)
        done = torch.rand(b, generator=random) < 0.5
        amount = (strength + 0.5 * torch.randn(b, generator=random)).clamp(0, 10) / 10
        amount = torch.where(torch.rand(b, generator=random) < 0.5, amount, -amount)
        for i, operation in enumerate(OPERATIONS.values()):
            rows = (done & (chosen == i)).nonzero()[:, 0]
            if len(rows):
                x[rows] = operation(x[rows], amount[rows]).clamp(0, 255)
    return x.round().to(torch.uint8)


def _warp(x: Tensor, *rows: Tensor) -> Tensor:
    """Each image seen through an affine map of the plane, given as six numbers an image; black comes in."""
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _rotate(x: Tensor, m: Tensor) -> Tensor:
    cos, sin, zero = (m * math.pi / 6).cos(), (m * math.pi / 6).sin(), torch.zeros_like(m)
    return _warp(x, cos, -sin, zero, sin, cos, zero)


def _move(x: Tensor, shear_x: Tensor, right: Tensor, shear_y: Tensor, down: Tensor) -> Tensor:
    one = torch.ones_like(right)
    return _warp(x, one, shear_x, right, shear_y, one, down)


def _blend(x: Tensor, other: Tensor | float, m: Tensor) -> Tensor:
    """Away from `other` where m is positive, towards it where it is negative."""
    return other + (1 + 0.9 * m)[:, None, None, None] * (x - other)


def _blurred(x: Tensor) -> Tensor:
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate"), kernel[None, None]).view_as(x)


def _stretched(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) * 255 / (high - low).clamp_min(1)


def _equalized(x: Tensor) -> Tensor:
    """Values of a channel spread so that all become about as frequent, in Pillow's arithmetic."""
    values = x.round().long().flatten(2).flatten(0, 1)
    counts = torch.zeros(len(values), 256, dtype=torch.long).scatter_add_(1, values, torch.ones_like(values))
    step = (values.shape[1] - counts.gather(1, values.amax(1, keepdim=True))) // 255
    table = ((step // 2 + counts.cumsum(1) - counts) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step > 0, table.gather(1, values), values).view_as(x).to(x)


def _posterized(x: Tensor, m: Tensor) -> Tensor:
    step = 2.0 ** (4 + (4 * m.abs()).floor())[:, None, None, None]  # 4 bits are left at least, 0 at most strength
    return (x / step).floor() * step


def _solarized(x: Tensor, m: Tensor) -> Tensor:
    return torch.where(x >= 256 * (1 - m.abs())[:, None, None, None], 255 - x, x)


def _dark_up(x: Tensor, m: Tensor) -> Tensor:
    return torch.where(x < 128, x + 110 * m.abs()[:, None, None, None], x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (images, strength -1 to 1 an image) -> images, 0 to 255
    "rotate": _rotate,
    "shear_x": lambda x, m: _move(x, 0.3 * m, 0 * m, 0 * m, 0 * m),
    "shear_y": lambda x, m: _move(x, 0 * m, 0 * m, 0.3 * m, 0 * m),
    "translate_x": lambda x, m: _move(x, 0 * m, 0.9 * m, 0 * m, 0 * m),  # 45 % of the side
    "translate_y": lambda x, m: _move(x, 0 * m, 0 * m, 0 * m, 0.9 * m),
    "brightness": lambda x, m: _blend(x, 0.0, m),
    "contrast": lambda x, m: _blend(x, x.mean((1, 2, 3), keepdim=True), m),
    "colour": lambda x, m: _blend(x, x.mean(1, keepdim=True), m),
    "sharpness": lambda x, m: _blend(x, _blurred(x), m),
    "posterize": _posterized,
    "solarize": _solarized,
    "solarize_add": _dark_up,
    "invert": lambda x, m: 255 - x,
    "autocontrast": lambda x, m: _stretched(x),
    "equalize": lambda x, m: _equalized(x),
}


def erase(images: Float[Tensor, "b c h w"], probability: float, random: torch.Generator) -> Float[Tensor, "b c h w"]:
    """In this part of the images a rectangle of 2 to 33 % of the area, with sides of a ratio of 0.3 to 3.3, is noise."""
    b, _, height, width = images.shape
    hit, area, ratio, top, left = torch.rand(5, b, generator=random)
    area, ratio = (0.02 + (1 / 3 - 0.02) * area) * height * width, torch.exp((2 * ratio - 1) * math.log(1 / 0.3))
    h, w = ((area * ratio).sqrt().round().clamp(1, height), (area / ratio).sqrt().round().clamp(1, width))
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    tall = (rows >= top[:, None]) & (rows < (top + h)[:, None])
    wide = (columns >= left[:, None]) & (columns < (left + w)[:, None])
    there = (hit < probability)[:, None, None] & tall[:, :, None] & wide[:, None]
    return torch.where(there[:, None], torch.randn(images.shape, generator=random), images)


def mix(images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"], mixup: float, cutmix: float,
        random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every image with the one as far from the batch's end, in the same shares as their targets."""
    cut = cutmix > 0 and (mixup == 0 or bool(torch.rand((), generator=random) < 0.5))
    alpha = cutmix if cut else mixup
    share = np.random.default_rng(int(torch.randint(2**62, (), generator=random))).beta(alpha, alpha)
    if cut:
        height, width = images.shape[2:]
        (y, x), side = (int(torch.randint(s, (), generator=random)) for s in (height, width)), math.sqrt(1 - share)
        h, w = int(height * side) // 2, int(width * side) // 2
        rows, columns = slice(max(0, y - h), min(height, y + h)), slice(max(0, x - w), min(width, x + w))
        mixed = images.clone()
        mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        mixed = images.lerp(images.flip(0), 1 - share)
    return mixed, targets.lerp(targets.flip(0), 1 - share)
