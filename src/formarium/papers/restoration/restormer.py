"""Restormer: Efficient Transformer for High-Resolution Image Restoration (Zamir et al., CVPR 2022), arXiv 2111.09881.

New: attention between channels, not pixels (MDTA, Eq. 1): q, k and v come from a 1x1 and a depthwise 3x3 convolution, the
map of each head is c x c for its c channels, and the cost is linear in the pixels. A feed-forward network whose hidden
units, mixed over 3x3 pixels, gate one another (GDFN, Eq. 2). Both work in a U-shaped net of four levels, between which
pixel-unshuffle and pixel-shuffle change the grid; what it gives is added to the image.

Decisions, from the code: queries and keys have unit length over the pixels, and one learned temperature a head multiplies
their products (the paper divides by it). The last decoder level keeps the channels of the skip connection, so it and the
refinement are twice as wide, with the heads of the first level. The norm of the denoisers divides by the standard deviation
but leaves the mean in (`BiasFreeNorm`). For dual pixels the embedding is added before the last convolution, and the image
is not added. Sides are padded by reflection to multiples of 8, as the authors' test programs do; theirs is the net alone.
Ours: with `scale` the image is enlarged first, since the paper has no super-resolution; `depths` may have any number of
levels; `drop_path`. Deviation: 1x1 convolutions start at Xavier's weights. Not here: the authors' training on patches that
grow while the batches shrink (section 3.3).
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim
from ...parts.channel import linear
from ...parts.embed import to_map, to_tokens
from ...parts.norm import LayerNorm
from ...parts.residual import PreNorm
from ...skeletons.restorer import Restorer
from ...skeletons.stack import Stack
from ...weights.keys import LINEAR_AS_CONV, State, count, keymap, rule

CARD = Card(
    title="Restormer: Efficient Transformer for High-Resolution Image Restoration",
    authors="Syed Waqas Zamir, Aditya Arora, Salman Khan, Munawar Hayat, Fahad Shahbaz Khan, Ming-Hsuan Yang",
    venue="CVPR 2022",
    arxiv="2111.09881",
    year=2021,
    code="https://github.com/swz30/Restormer",
    licence="academic, non-commercial",
    kind="restoration",
    domain="restoration",
    tags=("denoising", "deblurring", "deraining", "channel attention", "u-net", "any size", "host"),
    claim="Attention over channels and gated convolutional feed-forward networks are state of the art on 16 restoration "
          "benchmarks (GoPro 32.92 dB, SIDD 40.02 dB) at 26 M parameters and 141 G MACs for 256x256 pixels.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons"),
        "deraining": Published(params=26.12e6, input=(3, 256, 256),
                               results={"Rain100L PSNR": 38.99, "Rain100H PSNR": 31.46, "Test100 PSNR": 32.00,
                                        "Test1200 PSNR": 33.19, "Test2800 PSNR": 34.18},
                               note="the authors' 140.99 G MACs leave out the products of attention, 13.9 G more"),
        "deblurring": Published(params=26.12e6, input=(3, 256, 256),
                                results={"GoPro PSNR": 32.92, "HIDE PSNR": 31.22, "RealBlur-R PSNR": 36.19,
                                         "RealBlur-J PSNR": 28.96}),
        "defocus": Published(input=(3, 256, 256), results={"DPDD PSNR": 25.98, "DPDD SSIM": 0.811}),
        "defocus_dual": Published(input=(6, 256, 256), results={"DPDD PSNR": 26.66, "DPDD SSIM": 0.833},
                                  note="left and right view as six channels"),
        "color_blind": Published(input=(3, 256, 256), results={"CBSD68 sigma 15 PSNR": 34.39, "CBSD68 sigma 25 PSNR": 31.78,
                                                               "CBSD68 sigma 50 PSNR": 28.59},
                                 note="one set of weights for all noise levels"),
        "color_sigma15": Published(input=(3, 256, 256), results={"CBSD68 PSNR": 34.40}),
        "color_sigma25": Published(input=(3, 256, 256), results={"CBSD68 PSNR": 31.79}),
        "color_sigma50": Published(input=(3, 256, 256), results={"CBSD68 PSNR": 28.60}),
        "gray_blind": Published(input=(1, 256, 256), results={"BSD68 sigma 15 PSNR": 31.95, "BSD68 sigma 25 PSNR": 29.51,
                                                              "BSD68 sigma 50 PSNR": 26.62},
                                note="one set of weights for all noise levels"),
        "gray_sigma15": Published(input=(1, 256, 256), results={"BSD68 PSNR": 31.96}),
        "gray_sigma25": Published(input=(1, 256, 256), results={"BSD68 PSNR": 29.52}),
        "gray_sigma50": Published(input=(1, 256, 256), results={"BSD68 PSNR": 26.62}),
        "real_denoising": Published(params=26.11e6, input=(3, 256, 256),
                                    results={"SIDD PSNR": 40.02, "DND PSNR": 40.03}),
    },
)
PARTS = {
    "mixer": {"mdta": "MDTA"},
    "channel": {"gdfn": "GDFN"},
    "norm": {"bias_free": "BiasFreeNorm"},
}


class BiasFreeNorm(nn.Module):
    """x / sqrt(var(x) + eps) * weight over the channels; the mean is not taken off."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return x * (x.var(-1, keepdim=True, correction=0) + self.eps).rsqrt() * self.weight


def depthwise(channels: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)


def over_grid(conv: nn.Module, x: Float[Tensor, "b n c"], grid: tuple[int, ...]) -> Float[Tensor, "b n d"]:
    """A convolution of the tokens where they stand."""
    return to_tokens(conv(to_map(x, grid)))


class MDTA(Part):
    """Multi-Dconv head transposed attention (Eq. 1): each head's channels attend to each other, over all pixels."""

    undecayed = ("temperature",)

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = False) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads = heads
        self.qkv = linear(dim, 3 * dim, bias=bias)
        self.conv = depthwise(3 * dim, bias)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.proj = linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        x = over_grid(self.conv, self.qkv(x), ctx.need_grid(self))
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # (B, heads, c, N): channels are the tokens
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        x = attend(q * self.temperature, k, v, scale=1.0)
        return self.proj(x.flatten(1, 2).transpose(1, 2))


class GDFN(Part):
    """Gated-Dconv feed-forward network (Eq. 2): GELU of one half of the hidden units multiplies the other half."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 2.66, bias: bool = False) -> None:
        super().__init__(dim, place)
        hidden = int(dim * ratio)
        self.fc1 = linear(dim, 2 * hidden, bias=bias)
        self.conv = depthwise(2 * hidden, bias)
        self.fc2 = linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        gate, value = over_grid(self.conv, self.fc1(x), ctx.need_grid(self)).chunk(2, dim=-1)
        return self.fc2(F.gelu(gate) * value)


class Downsample(Resample):
    """Half the grid, twice the channels: a 3x3 convolution to `before` / 2, then pixel-unshuffle."""

    step = (2, 2)

    def __init__(self, before: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, before // 2, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        h, w = ctx.need_grid(self)
        x = F.pixel_unshuffle(self.conv(to_map(x, (h, w))), 2)
        return to_tokens(x), replace(ctx, grid=(h // 2, w // 2))


class Upsample(Resample):
    """Twice the grid, half the channels: a 3x3 convolution to 2 `before`, then pixel-shuffle."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, 2 * before, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        h, w = ctx.need_grid(self)
        x = F.pixel_shuffle(self.conv(to_map(x, (h, w))), 2)
        return to_tokens(x), replace(ctx, grid=(2 * h, 2 * w))


class Decoder(nn.Module):
    """A level on the way up: upsample, append the encoder's tokens, halve the channels (`reduce`), then the layers."""

    def __init__(self, up: Upsample, reduce: nn.Linear | None, stack: Stack) -> None:
        super().__init__()
        self.up, self.reduce, self.stack = up, reduce, stack

    def forward(self, x: Float[Tensor, "b n c"], skip: Float[Tensor, "b m d"],
                ctx: Ctx) -> tuple[Float[Tensor, "b m e"], Ctx]:
        x, ctx = self.up(x, ctx)
        x = torch.cat((x, skip), dim=-1)
        return self.stack(x if self.reduce is None else self.reduce(x), ctx)


class Restormer(Restorer):
    """image (B, in_chans, H, W) -> image (B, out_chans, scale H, scale W), of any size.

    depths, heads: of each level, from the image's grid down; dim: channels at the first, doubled from level to level.
    refinement: layers after the last decoder level. ratio: hidden units of the feed-forward network in channels.
    dual_pixel: the image is not added to the answer; the embedding is, before the last convolution.
    """

    def __init__(self, *, in_chans: int = 3, out_chans: int = 3, scale: int = 1, img_size: int = 64, dim: int = 48,
                 depths: tuple[int, ...] = (4, 6, 6, 8), refinement: int = 4, heads: tuple[int, ...] = (1, 2, 4, 8),
                 ratio: float = 2.66, bias: bool = False, dual_pixel: bool = False, drop_path: float = 0.0,
                 mixer: Spec[Part] = spec(MDTA), channel: Spec[Part] = spec(GDFN),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5), residual: Spec[Residual] = spec(PreNorm)) -> None:
        levels = len(depths)
        if not levels or len(heads) != levels or min(depths) < 1:
            raise DoesNotFit(f"depths and heads are of the same levels, of 1 layer or more each; got {depths} and {heads}")
        if dim % 2 or dim < 2:
            raise DoesNotFit(f"dim is even, as pixel-unshuffle starts from half of the channels; got {dim}")
        super().__init__(in_chans=in_chans, out_chans=out_chans, scale=scale, multiple=2 ** (levels - 1),
                         residual=not dual_pixel, img_size=img_size)
        depth, first = sum(depths) + sum(depths[:-1]) + refinement, 0
        residual, channel = residual.offer(norm=norm, drop_path=drop_path), channel.offer(bias=bias)

        def stack(width: int, level: int, layers: int, resample: Resample | None = None) -> Stack:
            nonlocal first
            sublayers = {"mixer": mixer.offer(heads=heads[level], bias=bias), "channel": channel.offer(ratio=ratio)}
            place = Place(layer=first, depth=depth, stage=level, stages=levels)
            first += layers
            return Stack(width, layers, sublayers, residual, place=place, resample=resample)

        widths = [dim * 2**i for i in range(levels)]
        self.embedding = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(stack(w, i, n, Downsample(w // 2) if i else None)
                                     for i, (w, n) in enumerate(zip(widths, depths, strict=True)))
        self.decoder = nn.ModuleList()
        for i in reversed(range(levels - 1)):  # at the first level both inputs are kept
            reduce = linear(2 * widths[i], widths[i], bias=bias) if i else None
            layers = stack(widths[i] if i else 2 * dim, i, depths[i])
            self.decoder.append(Decoder(Upsample(widths[i + 1]), reduce, layers))
        last = 2 * dim if levels > 1 else dim
        self.refinement = stack(last, 0, refinement)
        self.skip = linear(dim, last, bias=bias) if dual_pixel else None
        self.head = nn.Conv2d(last, out_chans, 3, padding=1, bias=bias)

    def embed(self, batch: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x = self.embedding(self.enlarge(batch))
        return to_tokens(x), Ctx(grid=(x.shape[2], x.shape[3]))

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n d"], Ctx]:
        embedded, seen = x, []
        for level in self.encoder:
            x, ctx = level(x, ctx)
            seen.append(x)
        for level, skip in zip(self.decoder, seen[-2::-1], strict=True):
            x, ctx = level(x, skip, ctx)
        x, ctx = self.refinement(x, ctx)
        return (x if self.skip is None else x + self.skip(embedded)), ctx

    def project(self, x: Float[Tensor, "b n d"], ctx: Ctx) -> Float[Tensor, "b c h w"]:
        return self.head(to_map(x, ctx.need_grid(self)))


DENOISER = spec(Restormer, norm=spec(BiasFreeNorm))
GRAY = DENOISER.but(in_chans=1, out_chans=1)
PRESETS = {
    "nano": DENOISER.but(dim=16, depths=(1, 1, 1), heads=(1, 2, 4), refinement=1, img_size=32),
    "deraining": spec(Restormer),
    "deblurring": spec(Restormer),
    "defocus": spec(Restormer),
    "defocus_dual": spec(Restormer, in_chans=6, dual_pixel=True),
    "color_blind": DENOISER,
    "color_sigma15": DENOISER,
    "color_sigma25": DENOISER,
    "color_sigma50": DENOISER,
    "gray_blind": GRAY,
    "gray_sigma15": GRAY,
    "gray_sigma25": GRAY,
    "gray_sigma50": GRAY,
    "real_denoising": DENOISER,
}

_LEVELS = {"encoder_level1": "encoder.0", "encoder_level2": "encoder.1", "encoder_level3": "encoder.2",
           "latent": "encoder.3", "decoder_level3": "decoder.0.stack", "decoder_level2": "decoder.1.stack",
           "decoder_level1": "decoder.2.stack", "refinement": "refinement"}
_PROJECTIONS = {"attn.qkv": "mixer.inner.qkv", "attn.project_out": "mixer.inner.proj",
                "ffn.project_in": "channel.inner.fc1", "ffn.project_out": "channel.inner.fc2"}
_SAME = {"norm1.body": "mixer.norm", "norm2.body": "channel.norm", "attn.qkv_dwconv": "mixer.inner.conv",
         "ffn.dwconv": "channel.inner.conv"}
KEYS = {
    "authors": keymap(
        rule("patch_embed.proj.weight", "embedding.weight"),
        *[r for theirs, ours in _LEVELS.items() for r in (
            *[rule(f"{theirs}.{{i}}.{a}.weight", f"{ours}.layers.{{i}}.{b}.weight", LINEAR_AS_CONV)
              for a, b in _PROJECTIONS.items()],
            *[rule(f"{theirs}.{{i}}.{a}.bias", f"{ours}.layers.{{i}}.{b}.bias") for a, b in _PROJECTIONS.items()],
            *[rule(f"{theirs}.{{i}}.{a}.*", f"{ours}.layers.{{i}}.{b}.*") for a, b in _SAME.items()],
            rule(f"{theirs}.{{i}}.attn.temperature", f"{ours}.layers.{{i}}.mixer.inner.temperature"))],
        *[rule(f"down{i}_{i + 1}.body.0.weight", f"encoder.{i}.resample.conv.weight") for i in (1, 2, 3)],
        *[rule(f"up{i}_{i - 1}.body.0.weight", f"decoder.{4 - i}.up.conv.weight") for i in (4, 3, 2)],
        *[rule(f"reduce_chan_level{i}.weight", f"decoder.{3 - i}.reduce.weight", LINEAR_AS_CONV) for i in (3, 2)],
        *[rule(f"reduce_chan_level{i}.bias", f"decoder.{3 - i}.reduce.bias") for i in (3, 2)],
        rule("skip_conv.weight", "skip.weight", LINEAR_AS_CONV),
        rule("skip_conv.bias", "skip.bias"),
        rule("output.*", "head.*"),
        without={"nano": "three levels, where their nets have four"},
        example=("deraining", {"dim": 8, "depths": (1, 1, 1, 1), "refinement": 1, "img_size": 16}),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes, and the norm. The ratio is the shortest decimal number that gives the hidden widths of all levels."""
    dim, in_chans = state["embedding.weight"].shape[:2]
    levels = range(count(state, "encoder.{i}.layers.0.mixer.inner.temperature"))
    depths = tuple(count(state, f"encoder.{i}.layers.{{i}}.mixer.inner.temperature") for i in levels)
    heads = tuple(len(state[f"encoder.{i}.layers.0.mixer.inner.temperature"]) for i in levels)
    hidden = {dim * 2**i: state[f"encoder.{i}.layers.0.channel.inner.fc2.weight"].shape[1] for i in levels}
    biased = "encoder.0.layers.0.mixer.norm.bias" in state
    return {"dim": dim, "in_chans": in_chans, "out_chans": state["head.weight"].shape[0], "depths": depths, "heads": heads,
            "refinement": count(state, "refinement.layers.{i}.mixer.inner.temperature"), "ratio": shortest_ratio(hidden),
            "bias": "encoder.0.layers.0.mixer.inner.qkv.bias" in state, "dual_pixel": "skip.weight" in state,
            "norm": spec(LayerNorm, eps=1e-5) if biased else spec(BiasFreeNorm)}


def shortest_ratio(hidden: dict[int, int]) -> float:
    """The number r of fewest decimals with int(width * r) == hidden for every width; ValueError where there is none."""
    for digits in range(9):
        r = math.ceil(max(h / w for w, h in hidden.items()) * 10**digits) / 10**digits
        if all(int(w * r) == h for w, h in hidden.items()):
            return r
    raise ValueError(f"no ratio gives the hidden widths {hidden}")
