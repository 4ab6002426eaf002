"""From images to tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx
from ..core.errors import DoesNotFit
from ..core.part import Resample
from ..core.spec import Spec, spec
from ..weights.adapt import Change, refit_kernel
from .norm import NoNorm
from .position import AbsolutePosition, NoPosition
from .stem import Stem


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """224 -> (224, 224); (224, 160) stays."""
    h, w = (size, size) if isinstance(size, int) else size
    return h, w


def to_map(x: Float[Tensor, "b n c"], grid: tuple[int, ...], prefix: int = 0) -> Float[Tensor, "b c h w"]:
    """Tokens after the prefix as a map; a view in channels-last memory."""
    return x[:, prefix:].unflatten(1, grid).movedim(-1, 1)


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """A map as tokens; free where the map is channels-last."""
    return x.movedim(1, -1).flatten(1, -2)


def check_images(x: Tensor, in_chans: int) -> None:
    """Raises unless x is a batch of images (B, in_chans, H, W)."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise DoesNotFit(f"expected images (B, {in_chans}, H, W), got {tuple(x.shape)}; "
                         "build the model with in_chans= for another number of channels")


def check_multiple(size: tuple[int, int], step: tuple[int, int], what: str, beyond: tuple[int, int] = (0, 0)) -> None:
    """Raises, with the nearest right sizes, where a size is not a positive multiple of `step`, plus `beyond`."""
    if all(s >= p + b and (s - b) % p == 0 for s, p, b in zip(size, step, beyond, strict=True)):
        return
    low = [max(p, (s - b) // p * p) + b for s, p, b in zip(size, step, beyond, strict=True)]
    high = [max(p, -(-(s - b) // p) * p) + b for s, p, b in zip(size, step, beyond, strict=True)]
    near = " or ".join(dict.fromkeys(f"{h}x{w}" for h, w in (low, high)))
    plus = f" plus {beyond[0]}x{beyond[1]}" if any(beyond) else ""
    raise DoesNotFit(f"{what} needs image sides that are multiples of {step[0]}x{step[1]}{plus}, got {size[0]}x{size[1]}; "
                     f"the nearest: {near}")


class PatchEmbed(Resample):
    """Patches to tokens by one convolution (ViT, arXiv 2010.11929, Eq. 1), then class token, positions and norm.

    stride: less than the patch where patches overlap.
    registers: learned tokens after the class token: DeiT's distillation token, or those of Vision Transformers Need
    Registers (arXiv 2309.16588). position_first: positions are the patches' alone, added before these tokens come.
    img_size: the size that the positions are made for; None: no table, any multiple of `patch`.
    pad: images that are no multiple get zeros to the right and below, instead of an error.
    stem: a network before it, e.g. the ResNet of a hybrid, built as stem(in_chans).
    """

    undecayed = ("cls", "registers")
    adapts = ("in_chans", "patch")

    def __init__(self, in_chans: int, dim: int, *, patch: int | tuple[int, int] = 16,
                 stride: int | tuple[int, int] | None = None, img_size: int | Sequence[int] | None = None,
                 class_token: bool = False, registers: int = 0, position_first: bool = False,
                 position: Spec[AbsolutePosition] = spec(NoPosition), norm: Spec[nn.Module] = spec(NoNorm),
                 pad: bool = False, stem: Spec[Stem] | None = None) -> None:
        super().__init__()
        self.in_chans, self.patch, self.pad = in_chans, pair(patch), pad
        self.stem = None if stem is None else stem(in_chans)
        channels, before = (in_chans, 1) if self.stem is None else (self.stem.channels, self.stem.stride)
        own = self.patch if stride is None else pair(stride)
        if min(*self.patch, *own) < 1:
            raise DoesNotFit(f"patches and their stride are 1 pixel or more, got patch={patch} and stride={stride}")
        self.step = (own[0] * before, own[1] * before)
        self.beyond = ((self.patch[0] - own[0]) * before, (self.patch[1] - own[1]) * before)
        self.img_size = None if img_size is None else pair(img_size)
        grid = None
        if self.img_size is not None:
            check_multiple(self.img_size, self.step, "patch embedding", self.beyond)
            down, across = ((self.img_size[i] - self.beyond[i]) // self.step[i] for i in (0, 1))
            grid = (down, across)
        self.proj = nn.Conv2d(channels, dim, self.patch, own)
        self.norm = norm(dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.registers = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.position_first = position_first
        prefix = 0 if position_first else int(class_token) + registers
        self.position = position.offer(grid=grid, prefix=prefix)(dim, prefix + (math.prod(grid) if grid else 0))

    def refit(self, name: str, tensor: Tensor | None, was: "PatchEmbed") -> Change | None:
        if name != "proj.weight" or tensor is None or (any(self.beyond) and was.patch != self.patch):
            return None  # patches that overlap are not enlarged one by one
        return refit_kernel(tensor, self.proj.weight.shape)

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = self.tokens(x, ctx)
        return x if self.position_first else self.position(x, ctx), ctx

    def check(self, x: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """The size of the images; raises where they are not of the kind that the positions are made for."""
        check_images(x, self.in_chans)
        size = (x.shape[2], x.shape[3])
        if self.img_size is not None and size != self.img_size:
            raise DoesNotFit(f"built for images {self.img_size[0]}x{self.img_size[1]}, got {size[0]}x{size[1]}; "
                             "resize them, or build the model with img_size=")
        return size

    def tokens(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        """The tokens before their positions are added, unless that comes first."""
        size = self.check(x)
        if self.pad:
            right, below = (-(size[i] - self.beyond[i]) % self.step[i] for i in (1, 0))
            x = F.pad(x, (0, right, 0, below))
        else:
            check_multiple(size, self.step, "patch embedding", self.beyond)
        x = self.proj(x if self.stem is None else self.stem(x))
        ctx = replace(ctx, grid=(x.shape[2], x.shape[3]))
        x = self.norm(to_tokens(x))
        if self.position_first:
            x = self.position(x, ctx)
        before = [t.expand(x.shape[0], -1, -1) for t in (self.cls, self.registers) if t is not None]
        if before:
            ctx = replace(ctx, prefix=ctx.prefix + sum(t.shape[1] for t in before))
            x = torch.cat((*before, x), dim=1)
        return x, ctx


class ConvEmbed(Resample):
    """Overlapping patches: one padded convolution with stride (PVT v2, PoolFormer). Takes images or tokens on a grid."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, kernel: int = 3, stride: int = 2, padding: int = 1) -> None:
        super().__init__()
        self.in_chans, self.step = in_chans, (stride, stride)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)

    def refit(self, name: str, tensor: Tensor | None, was: "ConvEmbed") -> Change | None:
        if name != "proj.weight" or tensor is None or tensor.shape[2:] != self.proj.weight.shape[2:]:
            return None  # patches that overlap are not enlarged one by one
        return refit_kernel(tensor, self.proj.weight.shape)

    def forward(self, x: Tensor, ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        if x.ndim == 3 and ctx.grid is not None:
            x = to_map(x, ctx.need_grid(self))
        check_images(x, self.in_chans)
        least = self.proj.kernel_size[0] - 2 * int(self.proj.padding[0])
        if min(x.shape[2:]) < least:
            raise DoesNotFit(f"the image is too small: a convolution needs at least {least}x{least} here, "
                             f"got {x.shape[2]}x{x.shape[3]}")
        x = self.proj(x)
        return to_tokens(x), replace(ctx, grid=(x.shape[2], x.shape[3]))
