"""Degraded photographs back to the originals: noise taken off, resolution regained. PSNR over a whole split decides."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.errors import BadData, DoesNotFit, unknown
from ..core.model import Model
from ..data import photos
from ..data.photos import Photos
from ..skeletons.restorer import Restorer
from .base import SPLITS, DataInfo, Task, evaluating, generator
from .classify import png

SHOWN = 4  # patches
SHOWN_SIDE = 96  # pixels, a multiple of every scale
WINDOW = 11  # of SSIM


class Restore(Task):
    """Degraded images (B, 3, H, W) -> originals (B, 3, S H, S W), pixels from 0 to 1; the loss is the mean distance (L1).

    patch: side of the degraded patches in training, cut at random from a random image, turned and mirrored at random.
    Evaluation takes whole images, one by one, degraded in the same way every time; the answers are rounded to 8 bits.
    A subclass defines `degrade`, `baseline`, and which pixels are scored.
    """

    metric = "psnr"
    higher_is_better = True
    model_type = Restorer
    domain = "restoration"
    scale = 1

    def __init__(self, name: str, data: Photos, *, patch: int, about: str) -> None:
        if not isinstance(patch, int) or patch < 8:
            raise DoesNotFit(f"patch is the side of a training patch in pixels, 8 or more, not {patch!r}")
        self.name, self.data, self.patch = name, data, patch
        least = {"train": patch * self.scale, **dict.fromkeys(("val", "test"), WINDOW + 3 * self.scale)}
        for split in SPLITS:
            for image, called in zip(data.images[split], data.names[split], strict=True):
                if min(image.shape[1:]) < least[split]:
                    raise BadData(f"{name}: {called} has {image.shape[2]}x{image.shape[1]} pixels; images of {split} need "
                                  f"{least[split]}x{least[split]} or more; leave it out, or give a smaller patch=")
        sizes = {split: len(data.images[split]) for split in SPLITS}
        self.baselines = self._mean(self.score(self.baseline(x), y) for x, y in self.pairs("test"))
        found = "a PSNR of {psnr:.2f} dB and an SSIM of {ssim:.4f}".format(**self.baselines)
        note = f"{about} {found} on the test split, which a model should exceed"
        self.info = DataInfo(*data.origin[:3], sizes=sizes, note="; ".join(filter(None, (data.origin.note, note))))

    def degrade(self, clean: Float[Tensor, "b 3 h w"], random: torch.Generator) -> Float[Tensor, "b 3 h2 w2"]:
        raise TypeError(f"{type(self).__name__} must define degrade")

    def baseline(self, degraded: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """What one has without a model."""
        raise TypeError(f"{type(self).__name__} must define baseline")

    def scored(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """The channels and pixels that count."""
        return images

    def model_options(self) -> dict[str, Any]:
        return {"in_chans": 3, "out_chans": 3, "scale": self.scale, "img_size": self.patch}

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        random, images, side = generator(seed, step), self.data.images["train"], self.patch * self.scale
        patches = []
        for _ in range(batch_size):
            image = images[_below(len(images), random)]
            top, left = (_below(size - side + 1, random) for size in image.shape[1:])
            patch = image[:, top:top + side, left:left + side].rot90(_below(4, random), (1, 2))
            patches.append(patch.flip(2) if _below(2, random) else patch)
        clean = torch.stack(patches) / 255
        return self.degrade(clean, random), clean

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.l1_loss(model(batch[0]), batch[1])

    def pairs(self, split: str) -> Iterator[tuple[Float[Tensor, "1 3 h w"], Float[Tensor, "1 3 h2 w2"]]]:
        """A split in order, every image once, degraded and whole; its sides are cut to multiples of the scale."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        for i, image in enumerate(self.data.images[split]):
            h, w = (size // self.scale * self.scale for size in image.shape[1:])
            clean = image[None, :, :h, :w] / 255
            yield self.degrade(clean, generator(-1 - SPLITS.index(split), i)), clean

    def evaluate(self, model: Model, split: str, batch_size: int = 1) -> dict[str, float]:
        """loss, psnr (dB) and ssim, each the mean over the images. They differ in size, so batch_size changes nothing."""
        found = []
        with evaluating(model) as device:
            for degraded, clean in self.pairs(split):
                answer = self._restore(model, degraded.to(device), clean)
                found.append({"loss": F.l1_loss(answer, clean).item(), **self.score(answer, clean)})
        self.check_counted(len(found), split)
        return self._mean(found)

    def score(self, answer: Float[Tensor, "1 3 h w"], clean: Float[Tensor, "1 3 h w"]) -> dict[str, float]:
        x, y = self.scored(eight_bits(answer)), self.scored(clean)
        return {"psnr": psnr(x, y), "ssim": ssim(x, y)}

    @staticmethod
    def _mean(found: Any) -> dict[str, float]:
        rows = list(found)
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def _restore(self, model: Model, degraded: Tensor, clean: Tensor) -> Tensor:
        out = model(degraded).float().cpu()
        if out.shape != clean.shape:
            raise DoesNotFit(f"{self.name} needs images {tuple(clean.shape)}; the model gave {tuple(out.shape)}")
        return out

    def show(self, model: Model) -> dict[str, Any]:
        """The middles of four test images, evenly spaced in the split: input, truth and answer as PNG, PSNR of the answer
        and without a model."""
        images = self.data.images["test"]
        index = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long().tolist()
        found: dict[str, list[Any]] = {name: [] for name in ("names", "input", "truth", "answer", "psnr", "baseline")}
        with evaluating(model) as device:
            for i in index:
                h, w = images[i].shape[1:]
                side = min(SHOWN_SIDE, h, w) // self.scale * self.scale
                top, left = (h - side) // 2, (w - side) // 2
                clean = images[i][None, :, top:top + side, left:left + side] / 255
                degraded = self.degrade(clean, generator(-1 - len(SPLITS), i))
                answer = self._restore(model, degraded.to(device), clean)
                for name, image in (("input", degraded), ("truth", clean), ("answer", answer)):
                    found[name].append(png((eight_bits(image)[0] * 255).round().byte()))
                found["names"].append(self.data.names["test"][i])
                found["psnr"].append(self.score(answer, clean)["psnr"])
                found["baseline"].append(self.score(self.baseline(degraded), clean)["psnr"])
        return {"kind": "restoration", **found}


def _below(n: int, random: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=random))


class Denoise(Restore):
    """White Gaussian noise of deviation `sigma` on the scale of 0 to 255, not clipped; the field's measure, all RGB."""

    def __init__(self, name: str, data: Photos, *, sigma: float = 25, patch: int = 64) -> None:
        if not isinstance(sigma, int | float) or not 0 < sigma <= 255:
            raise DoesNotFit(f"sigma is the noise's deviation on the scale of 0 to 255, more than 0, not {sigma!r}")
        self.sigma = sigma
        super().__init__(name, data, patch=patch, about=f"noise of sigma {sigma:g}; the noisy images themselves have")

    def degrade(self, clean: Tensor, random: torch.Generator) -> Tensor:
        return clean + self.sigma / 255 * torch.randn(clean.shape, generator=random)

    def baseline(self, degraded: Tensor) -> Tensor:
        return degraded


class SuperResolve(Restore):
    """Images `scale` times smaller by antialiased cubic interpolation (Keys' kernel, as MATLAB's imresize), in 8 bits.

    As the field does, the luma is scored, without a border as wide as the scale.
    """

    def __init__(self, name: str, data: Photos, *, scale: int = 2, patch: int = 48) -> None:
        if scale not in (2, 3, 4):
            raise DoesNotFit(f"scale is 2, 3 or 4, not {scale!r}")
        self.scale = scale
        super().__init__(name, data, patch=patch, about=f"images {scale} times smaller; cubic interpolation has")

    def degrade(self, clean: Tensor, random: torch.Generator) -> Tensor:
        return eight_bits(resize(clean, (clean.shape[2] // self.scale, clean.shape[3] // self.scale)))

    def baseline(self, degraded: Tensor) -> Tensor:
        return resize(degraded, (degraded.shape[2] * self.scale, degraded.shape[3] * self.scale))

    def scored(self, images: Tensor) -> Tensor:
        return luma(images)[..., self.scale:-self.scale, self.scale:-self.scale]


def resize(images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Cubic interpolation (Keys 1981, a = -1/2), antialiased where it makes images smaller."""
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def eight_bits(images: Tensor) -> Tensor:
    """Clipped to 0 to 1 and rounded to 256 levels, as an image file holds them."""
    return (images.clamp(0, 1) * 255).round() / 255


def luma(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Y of YCbCr (ITU-R BT.601, from 16 to 235 of 255)."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=images.dtype)[:, None, None]
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images from 0 to 1; 100 at most, so that equal images have one."""
    return -10 * math.log10(max(1e-10, F.mse_loss(x.double(), y.double()).item()))


def ssim(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> float:
    """Structural similarity of images from 0 to 1 (Wang et al. 2004): Gaussian window of 11x11 pixels, deviation 1.5.

    The mean over channels and over the places where the window lies within the image.
    """
    taps = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2).square() / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(images: Tensor) -> Tensor:  # by shifting: convolution in float64 is slow
        for axis in (-2, -1):
            length = images.shape[axis] - WINDOW + 1
            images = sum(tap * images.narrow(axis, i, length) for i, tap in enumerate(taps.tolist()))
        return images

    x, y = x.double(), y.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.mean().item()


def denoise(path: str | Path = "", *, sigma: float = 25, patch: int = 64) -> Denoise:
    """CBSD68, or your images, with Gaussian noise."""
    name, data = (f"denoise:{path}", photos.folder(path)) if path else ("denoise", photos.cbsd68())
    return Denoise(name, data, sigma=sigma, patch=patch)


def sr(path: str | Path = "", *, scale: int = 2, patch: int = 48) -> SuperResolve:
    """CBSD68 and, for testing, Set5, or your images, made smaller."""
    name, data = (f"sr:{path}", photos.folder(path)) if path else ("sr", photos.cbsd68_set5())
    return SuperResolve(name, data, scale=scale, patch=patch)


def two_photos(*, sigma: float = 25, patch: int = 64) -> Denoise:
    """scikit-learn's two photographs with Gaussian noise."""
    return Denoise("two_photos", photos.two_photos(), sigma=sigma, patch=patch)
