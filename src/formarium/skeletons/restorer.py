"""A degraded image to a better one of the same size, or of a larger one (super-resolution)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.ctx import Ctx
from ..core.errors import BadData, DoesNotFit
from ..core.model import Model
from ..parts.embed import check_images


class Restorer(Model):
    """image (B, in_chans, H, W) -> pad -> embed -> encode -> project -> add the image -> crop -> (B, out_chans, S H, S W).

    A paper defines `embed`, `encode` and `project`; `project` gives a map S = scale times as large as what `embed` took.
    Pixels go from 0 to 1. multiple: what the paper's sides must be multiples of; others are padded by reflection, right
    and below, and cropped back. residual: the network's answer is added to the image, enlarged by cubic interpolation
    where scale is more than 1. img_size: of `example`; the weights fit any size.
    """

    pipeline = "image-to-image"

    def __init__(self, *, in_chans: int = 3, out_chans: int = 3, scale: int = 1, multiple: int = 1, residual: bool = True,
                 img_size: int = 64) -> None:
        super().__init__()
        sizes = {"in_chans": in_chans, "out_chans": out_chans, "scale": scale, "img_size": img_size}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise DoesNotFit(f"{name} is 1 or more, got {value!r}")
        if residual and in_chans != out_chans:
            raise DoesNotFit("the answer is added to the image, so both have as many channels; got "
                             f"in_chans={in_chans} and out_chans={out_chans}")
        self.in_chans, self.out_chans, self.scale, self.multiple = in_chans, out_chans, scale, multiple
        self.residual, self.img_size = residual, img_size

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Float[Tensor, "b c h w"]:
        return torch.rand(batch, *(shape or (self.in_chans, self.img_size, self.img_size)))

    def check_image(self, batch: Tensor) -> None:
        """Raises unless `batch` are finite images, large enough to be padded."""
        check_images(batch, self.in_chans)
        least = self.multiple // 2 + 1
        if min(batch.shape[2:]) < least:
            raise DoesNotFit(f"images are at least {least}x{least}, so that reflection can pad them to multiples of "
                             f"{self.multiple}; got {batch.shape[2]}x{batch.shape[3]}")
        if torch.compiler.is_compiling() or batch.is_meta:  # values are not known there
            return
        if not batch.isfinite().all():
            bad = batch.isfinite().logical_not_().flatten(1).sum(1)
            raise BadData(f"{int(bad.sum())} of {batch.numel()} values of the images are NaN or infinite, the first in "
                          f"image {int(bad.nonzero()[0])} of the batch (counted from 0)")

    def pad(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        below, right = -batch.shape[2] % self.multiple, -batch.shape[3] % self.multiple
        return F.pad(batch, (0, right, 0, below), mode="reflect") if below or right else batch

    def enlarge(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """The images `scale` times as large, by cubic interpolation."""
        if self.scale == 1:
            return batch
        # antialias: changes the kernel to Keys' (a = -1/2), and nothing else where images grow
        return F.interpolate(batch, size=[self.scale * s for s in batch.shape[2:]], mode="bicubic", antialias=True)

    def embed(self, batch: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define embed")

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define encode")

    def project(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c h w"]:
        """The image, or what is to be added to it, from the last tokens."""
        raise TypeError(f"{type(self).__name__} must define project")

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        self.check_image(batch)
        padded = self.pad(batch)
        out = self.project(*self.encode(*self.embed(padded)))
        if self.residual:
            out = out + self.enlarge(padded)
        return out[..., :batch.shape[2] * self.scale, :batch.shape[3] * self.scale]
