"""Rethinking Spatial Dimensions of Vision Transformers (Heo et al., ICCV 2021), arXiv 2103.16302.

New: a ViT with the dimensions of a convolutional network. Between stages a pooling layer halves the map and doubles the
channels (section 3.2, figure 4): a depthwise convolution with stride 2 for the patches, a linear layer for the class token,
which goes with them through all stages. Patches overlap, and positions are added to the map alone, before that token.

Decisions: the distilled models have a second token and a second classifier, as DeiT's (arXiv 2012.12877): in training they
answer with both logits (class token's, distillation token's), else with the mean. Patches must cover the image: the
authors' convolution leaves out pixels at the right and below where they do not. All last tokens are normed, the authors
norm the class token alone, from which they classify: the same answer. Stochastic depth grows up to `drop_path` in the last
layer, the authors' up to one layer's share less.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear
from ...parts.embed import PatchEmbed, to_map, to_tokens
from ...parts.position import AbsolutePosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Stage
from ...weights.adapt import Change, refit_map
from ...weights.keys import Assumed, Op, Options, Passed, State, as_preset, count, keymap, rule, told_ratio
from .deit import TwoHeads

CARD = Card(
    title="Rethinking Spatial Dimensions of Vision Transformers",
    authors="Byeongho Heo, Sangdoo Yun, Dongyoon Han, Sanghyuk Chun, Junsuk Choe, Seong Joon Oh",
    venue="ICCV 2021",
    arxiv="2103.16302",
    year=2021,
    code="https://github.com/naver-ai/pit",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("attention", "pyramid", "pooling", "distillation"),
    claim="Fewer tokens and more channels with depth help a ViT as they help a convolutional network: PiT-B has 82.0 % "
          "ImageNet top-1 (84.0 % distilled) at 12.5 G MACs, DeiT-B 81.8 % (83.4 %) at 17.6 G.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=4.85e6, macs=0.71e9, input=(3, 224, 224), results={"ImageNet top-1": 73.0},
                          note="4.85 M parameters in the authors' code, 4.9 M in their table"),
        "xs": Published(params=10.6e6, macs=1.4e9, input=(3, 224, 224), results={"ImageNet top-1": 78.1}),
        "small": Published(params=23.5e6, macs=2.9e9, input=(3, 224, 224), results={"ImageNet top-1": 80.9}),
        "base": Published(params=73.8e6, macs=12.5e9, input=(3, 224, 224), results={"ImageNet top-1": 82.0}),
        "tiny_distilled": Published(params=5.10e6, macs=0.71e9, input=(3, 224, 224), results={"ImageNet top-1": 74.6},
                                    note="parameters of the distilled models as timm counts them, quoted from memory"),
        "xs_distilled": Published(params=11.0e6, macs=1.4e9, input=(3, 224, 224), results={"ImageNet top-1": 79.1}),
        "small_distilled": Published(params=24.04e6, macs=2.9e9, input=(3, 224, 224), results={"ImageNet top-1": 81.9}),
        "base_distilled": Published(params=74.79e6, macs=12.5e9, input=(3, 224, 224), results={"ImageNet top-1": 84.0}),
    },
    exceptions={
        "not_square": "overlapping patches without padding: an image has not size / stride of them (27 of 8 pixels in 224)",
        "features": "as not_square; the maps are tested with their own sizes",
    },
)


class MapPosition(AbsolutePosition):
    """One learned vector a cell, kept as the map (1, C, H, W) that it is; tokens before the grid have none."""

    undecayed = ("table",)
    adapts = ("img_size", "patch", "stride")

    def __init__(self, dim: int, tokens: int, *, grid: tuple[int, int], std: float = 0.02) -> None:
        super().__init__(dim, tokens)
        self.table = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x + to_tokens(self.table)

    def refit(self, name: str, tensor: Tensor | None, was: "MapPosition") -> Change | None:
        old, new = (m.table.shape[2:] for m in (was, self))
        if name != "table" or tensor is None or old == new:
            return None
        change = refit_map(tensor.flatten(2), 2, old, new)
        return change._replace(tensor=None if change.tensor is None else change.tensor.unflatten(2, new))


class TokenPooling(Resample):
    """Half the map, more channels: a depthwise convolution for the grid, a linear layer for the tokens before it."""

    step = (2, 2)

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        if out_dim % dim:
            raise DoesNotFit(f"pooling makes each channel into as many others: {out_dim} are no multiple of {dim}")
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1, groups=dim)
        self.fc = linear(dim, out_dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n2 c2"], Ctx]:
        grid = self.conv(to_map(x, ctx.need_grid(self, prefix=True), ctx.prefix))
        x = torch.cat((self.fc(x[:, :ctx.prefix]), to_tokens(grid)), dim=1)
        return x, replace(ctx, grid=(grid.shape[2], grid.shape[3]))


class PiT(TwoHeads):
    """images (B, in_chans, H, W) -> logits (B, num_classes); sides are a multiple of `stride` plus what patches overlap.

    distilled: a second token and classifier; then training gives both logits, (class, distillation).
    dims, depths, heads: of each stage. stride: between patches, half a patch unless given.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 16, stride: int | None = None,
                 in_chans: int = 3, num_classes: int = 1000, dims: tuple[int, ...] = (96, 192, 384),
                 depths: tuple[int, ...] = (2, 6, 4), heads: tuple[int, ...] = (2, 4, 8), distilled: bool = False,
                 drop_path: float = 0.0,
                 mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 residual: Spec[Residual] = spec(PreNorm)) -> None:
        if not len(dims) == len(depths) == len(heads):
            raise DoesNotFit(f"{len(dims)} stages (dims) need as many depths and heads, got {len(depths)} and {len(heads)}")
        self.distilled = distilled
        stride = max(1, patch // 2) if stride is None else stride
        embed = PatchEmbed(in_chans, dims[0], patch=patch, stride=stride, img_size=img_size, class_token=True,
                           registers=int(distilled), position_first=True, position=spec(MapPosition))
        residual = residual.offer(drop_path=drop_path)
        stages = [Stage(dim, depth, {"mixer": mixer.offer(heads=h), "channel": channel}, residual,
                        spec(TokenPooling) if i else None)
                  for i, (dim, depth, h) in enumerate(zip(dims, depths, heads, strict=True))]
        super().__init__(embed, stages, img_size=img_size, num_classes=num_classes, pool="token")
        for token in (embed.cls, embed.registers):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


TINY = spec(PiT, dims=(64, 128, 256))
SMALL = spec(PiT, dims=(144, 288, 576), heads=(3, 6, 12))
BASE = spec(PiT, dims=(256, 512, 1024), depths=(3, 6, 4), heads=(4, 8, 16), patch=14)
PRESETS = {
    "nano": spec(PiT, dims=(24, 48, 96), depths=(1, 2, 1), patch=8, img_size=28),
    "tiny": TINY,
    "xs": spec(PiT),
    "small": SMALL,
    "base": BASE,
    "tiny_distilled": TINY.but(distilled=True),
    "xs_distilled": spec(PiT, distilled=True),
    "small_distilled": SMALL.but(distilled=True),
    "base_distilled": BASE.but(distilled=True),
}


def _two(t: list[Tensor], o: Options) -> list[Tensor]:
    if t[0].shape[1] != 2:
        raise Passed
    return list(t[0].chunk(2, dim=1))


TWO_TOKENS = Op(_two, lambda t, o: [torch.cat(t, dim=1)])


def _keys(pool: str, after: int) -> Any:
    """The authors count poolings, timm gives each to the stage after it."""
    theirs, ours = "transformers.{s}.blocks.{i}", "stages.{s}.layers.{i}"
    return keymap(
        rule("cls_token", ("embedding.cls", "embedding.registers"), TWO_TOKENS),
        rule("cls_token", "embedding.cls"),
        rule("pos_embed", "embedding.position.table"),
        rule("patch_embed.conv.*", "embedding.proj.*"),
        *[rule(f"{pool.format(s - after)}.*", f"stages.{s}.resample.*") for s in range(1, 8)],
        rule(f"{theirs}.norm1.*", f"{ours}.mixer.norm.*"),
        rule(f"{theirs}.attn.*", f"{ours}.mixer.inner.*"),
        rule(f"{theirs}.norm2.*", f"{ours}.channel.norm.*"),
        rule(f"{theirs}.mlp.*", f"{ours}.channel.inner.*"),
        rule("norm.*", "norm.*"),
        rule("head.*", "head.*"),
        rule("head_dist.*", "head_dist.*"),
    )


KEYS = {"authors": _keys("pools.{}", 1), "timm": _keys("transformers.{}.pool", 0)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but heads and stride; the image is as large as its positions are for patches that overlap by half."""
    _, in_chans, patch, _ = state["embedding.proj.weight"].shape
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    dims = tuple(state[f"stages.{s}.layers.0.mixer.norm.weight"].shape[0] for s in stages)
    stride, hidden = max(1, patch // 2), state["stages.0.layers.0.channel.inner.fc1.weight"].shape[0]
    h, w = ((n - 1) * stride + patch for n in state["embedding.position.table"].shape[2:])
    return {
        "dims": dims, "in_chans": in_chans, "patch": patch, "img_size": h if h == w else (h, w),
        "depths": tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages),
        "heads": as_preset(PRESETS, "heads", tuple(max(1, d // 48) for d in dims), dims=dims),
        "stride": Assumed(None, "half a patch, as in all that are published; it leaves no trace in the tensors"),
        "channel": spec(Mlp) if hidden == 4 * dims[0] else spec(Mlp, ratio=told_ratio(hidden, dims[0])),
        "distilled": "embedding.registers" in state,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
