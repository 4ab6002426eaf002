"""Reviving Shift Equivariance in Vision Transformers (Ding, Soselia, Armstrong, Su, Huang, 2023), arXiv 2306.07470.

New: adaptive polyphase anchoring (PolyOrder). Whatever subsamples a map with a step s, patches, windows or strided keys,
first rolls it around its edges so that the polyphase component x[i::s, j::s] of the largest norm comes to the origin
(Algorithm 1). Then a circular shift of the image only permutes the tokens around the edges. Positions come from a
circular depthwise convolution (PEG), so the whole net keeps this, and its pooled answer does not change at all.

Decisions, after the authors' code: norms are Euclidean, over channels and places; the PEG follows the patch embedding,
which has a norm, and the class token comes after it. Their maps are square, and rolled by sampling from a padded copy; a
gather does both sides of any map, and its backward pass is the roll back. The ViTs are those of How to train your ViT?,
whose weights the authors fine-tune.

PolyTwins is Twins-SVT (arXiv 2104.13840) with `Poly`, a residual scheme, around its attention, and PEGs that go around the
edges. Each block goes on with the rolled map, as in the authors' code: they anchor nothing before the patches of later
stages, which meet the same squares since the last block of a stage has anchored its even stride. So its feature maps
are rolled, each image's by its own. Alone, `residual=poly` rolls the mixer's answer back, which is the same up to a roll,
and leaves the stream in place.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed, check_multiple, pair, to_map
from ...parts.norm import LayerNorm
from ...parts.residual import PreNorm
from ...parts.stem import Stem
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import State, as_preset, count, keymap, rule, told_ratio
from . import twins, vit
from .swin import WindowAttention
from .twins import PEG, LocalAttention, SubsampledAttention, Twins

CARD = Card(
    title="Reviving Shift Equivariance in Vision Transformers",
    authors="Peijian Ding, Davit Soselia, Thomas Armstrong, Jiahao Su, Furong Huang",
    venue="arXiv 2023",
    arxiv="2306.07470",
    year=2023,
    code="https://github.com/willding123/Shift-Equivariant-Vision-Transformers",
    licence="MIT (code); weights without a licence of their own",
    kind="backbone",
    domain="image",
    tags=("shift equivariance", "polyphase", "plain", "attention"),
    claim="ViT and Twins give the same class for all circular shifts of an image (100 % consistency), where a small shift "
          "chosen against it takes Twins from 80.57 to 62.40 % ImageNet top-1.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "small": Published(input=(3, 224, 224), note="PolyViT-S/16; 100 % consistency"),
        "base": Published(input=(3, 224, 224), note="PolyViT-B/16; 100 % consistency"),
        "nano_twins": Published(note="ours: a small PolyTwins for tests and quick comparisons at 28 pixels"),
        "twins_s": Published(input=(3, 224, 224), note="PolyTwins of Twins-SVT-S; 100 % consistency"),
        "twins_b": Published(input=(3, 224, 224), note="PolyTwins of Twins-SVT-B; 100 % consistency"),
    },
    confused_with={
        "twins": "PolyTwins has the tensors of Twins-SVT, whose weights it may start from; it anchors its maps, and its "
                 "positions go around the edges.",
    },
)

PARTS = {
    "residual": {"poly": "Poly"},
}


def anchor(x: Float[Tensor, "b c h w"], step: tuple[int, int], invariant: bool = False) -> Int[Tensor, "b h*w"]:
    """PolyOrder (Algorithm 1): for each image, which cell comes to which place when it is rolled so that the polyphase
    component of the largest norm lies at the origin. H and W are multiples of the step.

    invariant: rolled on by whole steps, to the cell of the largest norm in that component: the same for all shifts.
    """
    (p, q), (h, w) = step, x.shape[2:]
    power = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1)
    components = power.unflatten(2, (-1, q)).unflatten(1, (-1, p)).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
    best = components.sum(2).argmax(1)
    down, across = best // q, best % q
    if invariant:
        cell = components.gather(1, best[:, None, None].expand(-1, 1, components.shape[2])).argmax(2)[:, 0]
        down, across = down + p * (cell // (w // q)), across + q * (cell % (w // q))
    rows = (torch.arange(h, device=x.device) + down[:, None]) % h
    cols = (torch.arange(w, device=x.device) + across[:, None]) % w
    return (rows[:, :, None] * w + cols[:, None, :]).flatten(1)


class PolyOrder(Stem):
    """Images (B, C, H, W), each rolled to the polyphase component of the largest norm, for patches of size `step`.

    invariant: see `anchor`; then all shifts of an image are the same image.
    """

    def __init__(self, in_chans: int, *, step: tuple[int, int], invariant: bool = False) -> None:
        super().__init__()
        self.channels, self.stride, self.step, self.invariant = in_chans, 1, step, invariant

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        place = anchor(x, self.step, self.invariant)
        return x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).unflatten(2, x.shape[2:])


class Poly(PreNorm):
    """Pre-norm layers whose mixer subsamples its grid, made equivariant under circular shifts: tokens are rolled before the
    mixer and rolled back after it.

    The norms that anchor are those of the residual stream: after a layer norm all tokens would be alike. step: of the
    mixer's windows or strides, which divides the sides of the grid; None: the mixer's own. back: False leaves the tokens
    rolled.
    """

    def __init__(self, dim: int, place: Place, inner: Part, *, step: int | tuple[int, int] | None = 7, back: bool = True,
                 norm: Spec[nn.Module] = spec(LayerNorm), drop_path: float = 0.0,
                 layer_scale: float | None = None) -> None:
        super().__init__(dim, place, inner, norm=norm, drop_path=drop_path, layer_scale=layer_scale)
        self.step, self.back = (1, 1), back
        if not place.sub:  # the channel mixer works on each token alone
            self.step = own_step(inner) if step is None else pair(step)

    def forward(self, state: Any, ctx: Ctx) -> Any:
        if self.place.sub or self.step == (1, 1):
            return super().forward(state, ctx)
        h, w = ctx.need_grid(self)
        if h % self.step[0] or w % self.step[1]:
            raise DoesNotFit(f"Poly rolls around the edges of a grid whose sides are multiples of its step, "
                             f"{self.step[0]}x{self.step[1]}; got {h}x{w}, take another step= or image size")
        place = anchor(to_map(state, (h, w)), self.step)[..., None].expand(state.shape)
        if not self.back:
            return super().forward(state.gather(1, place), ctx)
        mixed = self.branch(self.norm(state).gather(1, place), ctx)
        return state + torch.zeros_like(mixed).scatter(1, place, mixed)


def own_step(mixer: Part) -> tuple[int, int]:
    """The sides of a mixer's windows, or its strides."""
    if isinstance(mixer, LocalAttention | WindowAttention):
        return mixer.window
    if isinstance(mixer, SubsampledAttention):
        return mixer.step
    raise DoesNotFit(f"Poly knows the step of local, window and subsampled attention; name that of {type(mixer).__name__}, "
                     "e.g. residual='poly(step=7)'")


class CircularPEG(PEG):
    """x + a depthwise 3x3 convolution of x around the edges of the grid."""

    edges = "circular"


class PolyViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes), the same for all circular shifts of an image.

    pool: "token" classifies a class token, "mean" the mean of the patches. patch_eps: of the norm after the patches.
    invariant: not the tokens' order either depends on the shift, so the feature maps do not.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 384, depth: int = 12, heads: int = 6, drop_path: float = 0.0,
                 pool: str = "token", mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 patch_eps: float = 1e-5, invariant: bool = False) -> None:
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=pool == "token", position_first=True,
                           position=spec(CircularPEG), norm=spec(LayerNorm, eps=patch_eps),
                           stem=spec(PolyOrder, step=pair(patch), invariant=invariant))
        stage = Stage(dim, depth, {"mixer": mixer.offer(heads=heads), "channel": channel},
                      residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes, pool=pool)


class PolyTwins(Twins):
    """images (B, in_chans, H, W) -> logits (B, num_classes), the same for all circular shifts of an image.

    Options as of Twins. Sides are multiples of every window and stride, in pixels (224 in those that are published). Each
    stage but the last ends with an even stride. Feature maps are rolled.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 4, in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (2, 2, 10, 4),
                 heads: tuple[int, ...] = (2, 4, 8, 16), ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0), window: int = 7,
                 steps: tuple[int, ...] = (8, 4, 2, 1), drop_path: float = 0.0, init_std: float | None = 0.02) -> None:
        every = math.lcm(*(patch * 2**i * math.lcm(window, step) for i, step in enumerate(steps)))
        check_multiple(pair(img_size), (every, every), "PolyTwins")
        if any(depth % 2 or step % 2 for depth, step in zip(depths[:-1], steps[:-1], strict=True)):
            raise DoesNotFit("merging meets the same squares for all shifts where the stage before it ends with an even "
                             f"stride: even depths and steps in all stages but the last; got {depths}, {steps}")
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dims=dims,
                         depths=depths, heads=heads, ratios=ratios, window=window, steps=steps, drop_path=drop_path,
                         residual=spec(Poly, step=None, back=False), peg=spec(CircularPEG),
                         stem=spec(PolyOrder, step=(patch, patch)), init_std=init_std)
        self.every = every

    def embed(self, batch: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        if batch.ndim == 4:  # else the embedding says it
            check_multiple((batch.shape[2], batch.shape[3]), (self.every, self.every), "PolyTwins")
        return super().embed(batch)


OF_TWINS = "a PolyTwins, whose names are those of the layout authors_twins"
OF_VIT = "a PolyViT, whose names are those of the layout authors"
PRESETS = {
    "nano": spec(PolyViT, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "small": spec(PolyViT),
    "base": spec(PolyViT, dim=768, heads=12),
    "nano_twins": spec(PolyTwins, dims=(32, 64), depths=(2, 2), heads=(2, 4), ratios=(4.0, 4.0), steps=(2, 1), patch=2,
                       img_size=28, init_std=None),
    "twins_s": spec(PolyTwins),
    "twins_b": spec(PolyTwins, dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
}

KEYS = {
    "authors": keymap(  # models/vision_transformer.py, on timm's ViT
        rule("patch_embed.norm.*", "embedding.norm.*"),
        rule("pos_conv.proj.*", "embedding.position.conv.*"),
        *vit.plain_rules(),
        without=dict.fromkeys(("nano_twins", "twins_s", "twins_b"), OF_TWINS),
    ),
    "authors_twins": keymap(  # models/polytwins.py, on timm's Twins
        *twins.RULES, without=dict.fromkeys(("nano", "small", "base"), OF_VIT), example=("nano_twins", {}),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads and the image size, of which the preset's are taken, and the windows of a PolyTwins."""
    if "stages.0.position.conv.weight" in state:
        told = twins.settings(state, layout)
        del told["mixers"]
        return told | {"img_size": as_preset(PRESETS, "img_size", 224, dims=told["dims"])}
    dim, in_chans, patch, patch_w = state["embedding.proj.weight"].shape
    hidden = state[f"{vit.OURS.format(i=0)}.channel.inner.fc1.weight"].shape[0]
    told = {
        "dim": dim, "in_chans": in_chans, "patch": patch if patch == patch_w else (patch, patch_w),
        "depth": count(state, f"{vit.OURS}.mixer.norm.weight"),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim),
        "img_size": as_preset(PRESETS, "img_size", 14 * patch, patch=patch),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "pool": "token" if "embedding.cls" in state else "mean",
    }
    return told if hidden == 4 * dim else told | {"channel": spec(Mlp, ratio=told_ratio(hidden, dim))}
