"""Scalable Vision Transformers with Hierarchical Pooling (Pan et al., ICCV 2021), arXiv 2103.10619.

New: the sequence of tokens shrinks on its way through a plain ViT. The layers are parted into stages; after the first layer
of each, max pooling over the sequence (windows of 3 tokens, stride 2) and new learned positions (section 3.2). There is no
class token: the mean of the last tokens is classified. What is saved may be spent on width, depth, resolution or patches
(section 3.4).

Decisions: the schedule is `pools` (after which layers, counted from 0), `kernel` and `stride`. Pooling runs along the rows
of the image one after the other, as in the authors' code: windows reach over the ends of rows, and what comes out is a
sequence, no map, so there are no feature maps. Tokens before the grid (a class token) are not pooled. HVT-S-0, without
pooling, is a ViT. The same schedule goes into any other plain ViT: "deit/small+hvt(pools=(0,6))". For another image size a
pooled token takes the position of the old one that is nearest in the image.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone
from ...skeletons.stack import Stack
from ...weights.adapt import Change
from ...weights.keys import Assumed, State, as_preset, count, keymap, rule, told_ratio
from .vit import OURS, ViT, plain_rules
from .vit import settings as vit_settings

CARD = Card(
    title="Scalable Vision Transformers with Hierarchical Pooling",
    authors="Zizheng Pan, Bohan Zhuang, Jing Liu, Haoyu He, Jianfei Cai",
    venue="ICCV 2021",
    arxiv="2103.10619",
    year=2021,
    code="https://github.com/MonashAI/HVT",
    licence="Apache-2.0 (code; the weights are released with it)",
    kind="backbone",
    domain="image",
    tags=("attention", "pooling", "plain", "efficiency"),
    claim="Pooling the tokens pays for a wider ViT: with four poolings and twice the width, Scale HVT-Ti-4 has 75.23 % "
          "ImageNet top-1 at 1.39 G MACs, DeiT-Ti 72.2 % at 1.25 G.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "ti_1": Published(params=5.74e6, macs=0.64e9, input=(3, 224, 224), results={"ImageNet top-1": 69.64}),
        "s_0": Published(params=22.05e6, macs=4.57e9, input=(3, 224, 224), results={"ImageNet top-1": 80.39},
                         note="no pooling: a ViT whose tokens are averaged"),
        "s_1": Published(params=22.09e6, macs=2.40e9, input=(3, 224, 224), results={"ImageNet top-1": 78.00}),
        "s_2": Published(params=22.11e6, macs=1.94e9, input=(3, 224, 224), results={"ImageNet top-1": 77.36}),
        "s_3": Published(params=22.11e6, macs=1.62e9, input=(3, 224, 224), results={"ImageNet top-1": 76.32}),
        "s_4": Published(params=22.12e6, macs=1.39e9, input=(3, 224, 224), results={"ImageNet top-1": 75.23},
                         note="also Scale HVT-Ti-4: HVT-Ti with four poolings and twice the width"),
    },
    exceptions={
        "features": "pooled tokens are a sequence and form no map",
        "not_square": "as features, which it asks for; images that are not square are in the paper's tests",
        "forward_features": "as features",
    },
)

KERNEL, STRIDE = 3, 2
Where = list[tuple[float, float]]  # of each token: down and across, as shares of the image


class TokenPooling(Resample):
    """Max pooling over the sequence of tokens after the prefix, then learned positions.

    where: the tokens that come in. Those that go out stand where the middle of their window does.
    """

    undecayed = ("table",)
    adapts = ("img_size", "patch")

    def __init__(self, dim: int, where: Where, *, kernel: int = KERNEL, stride: int = STRIDE) -> None:
        super().__init__()
        if stride < 1 or not 1 <= kernel <= len(where):
            raise DoesNotFit(f"windows of {kernel} tokens with stride {stride} do not fit {len(where)} tokens; take fewer "
                             "poolings, a smaller kernel, or larger images")
        self.kernel, self.stride = kernel, stride
        self.where = where[(kernel - 1) // 2:len(where) - kernel // 2:stride]
        self.table = nn.Parameter(torch.empty(1, len(self.where), dim))
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n2 c"], Ctx]:
        tokens = F.max_pool1d(x[:, ctx.prefix:].transpose(1, 2), self.kernel, self.stride).transpose(1, 2) + self.table
        x = torch.cat((x[:, :ctx.prefix], tokens), dim=1) if ctx.prefix else tokens
        return x, replace(ctx, grid=None)

    def refit(self, name: str, tensor: Tensor | None, was: "TokenPooling") -> Change | None:
        if name != "table" or tensor is None or self.where == was.where:
            return None
        old, new = (torch.tensor(p.where, device=tensor.device) for p in (was, self))
        nearest = torch.cdist(new, old).argmin(1)
        return Change(tensor[:, nearest], f"{len(new)} positions, each that of the nearest of {len(old)} in the image")


class PooledStack(Stack):
    """The layers of a stack, with a pooling after some of them. where: the tokens that come in."""

    def __init__(self, stack: Stack, where: Where, *, pools: Sequence[int], kernel: int, stride: int) -> None:
        super().__init__(stack.dim, 0, {}, spec(PreNorm), resample=stack.resample)
        if list(pools) != sorted(set(pools)) or not all(0 <= i < stack.depth for i in pools):
            raise DoesNotFit(f"pools are layers in order, 0 to {stack.depth - 1} here, after each of which the tokens are "
                             f"pooled once; got {tuple(pools)}")
        self.layers, self.depth = stack.layers, stack.depth
        self.pools = nn.ModuleDict()
        for i in pools:
            pooling = TokenPooling(stack.dim, where, kernel=kernel, stride=stride)
            self.pools[str(i)], where = pooling, pooling.where

    def span(self, x: Float[Tensor, "b n c"], ctx: Ctx, taps: Sequence[int],
             layers: range) -> tuple[Tensor, Ctx, list[Tensor]]:
        seen, done = [], layers.start
        for i, pooling in self.pools.items():
            x, ctx, own = super().span(x, ctx, taps, range(done, int(i) + 1))
            x, ctx = pooling(x, ctx)
            seen, done = seen + own, int(i) + 1
        x, ctx, own = super().span(x, ctx, taps, range(done, layers.stop))
        return x, ctx, seen + own


def pool_tokens(model: nn.Module, *, pools: Sequence[int] = (0,), kernel: int = KERNEL, stride: int = STRIDE) -> int:
    """Puts poolings after these layers of a plain ViT, in place; returns how many."""
    if not isinstance(model, Backbone) or len(model.stages) != 1 or type(model.stages[0]) is not Stack:
        return 0
    (stack,) = model.stages
    for scheme in {type(s) for s in stack.modules() if isinstance(s, Residual)}:
        if scheme.enter is not Residual.enter or scheme.leave is not Residual.leave:
            raise DoesNotFit(f"{scheme.__name__} keeps more than the tokens from layer to layer, which cannot be pooled; "
                             "take residual='pre_norm'")
    with torch.no_grad():
        x, ctx = model.embed(model.example(1).to(next(model.parameters())))
    rows, columns = ctx.need_grid(model, prefix=True)
    where = [((r + 0.5) / rows, (c + 0.5) / columns) for r in range(rows) for c in range(columns)]
    pooled = PooledStack(stack, where, pools=pools, kernel=kernel, stride=stride)
    pooled.pools.to(x.device, x.dtype)
    model.stages[0] = pooled
    return len(pools)


TRANSFORM = pool_tokens
LOOKS_FOR = "a plain ViT: an image backbone of one stage whose tokens are not pooled yet, and at least one pooling"


class HVT(ViT):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    pools: after which layers, counted from 0, the tokens are pooled, by max over `kernel` of them, `stride` apart.
    Other options are those of ViT.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 384, depth: int = 12, heads: int = 6, drop_path: float = 0.0,
                 pools: tuple[int, ...] = (0,), kernel: int = KERNEL, stride: int = STRIDE, pool: str = "mean",
                 mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth,
                         heads=heads, drop_path=drop_path, pool=pool, mixer=mixer, channel=channel, norm=norm,
                         residual=residual, position=position)
        pool_tokens(self, pools=pools, kernel=kernel, stride=stride)


PRESETS = {
    "nano": spec(HVT, dim=64, depth=4, heads=4, patch=4, img_size=28, pools=(0, 2)),
    "ti_1": spec(HVT, dim=192, heads=3),
    "s_0": spec(ViT, dim=384, heads=6, pool="mean"),
    "s_1": spec(HVT),
    "s_2": spec(HVT, pools=(0, 6)),
    "s_3": spec(HVT, pools=(0, 4, 8)),
    "s_4": spec(HVT, pools=(0, 3, 6, 9)),
}

KEYS = {"authors": keymap(rule("blocks.{i}.pos_embed", "stages.0.pools.{i}.table"), *plain_rules())}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As ViT's, and the schedule, but for kernel and stride, of which others may leave as many tokens."""
    depth = count(state, f"{OURS}.mixer.norm.weight")
    pools = tuple(i for i in range(depth) if f"stages.0.pools.{i}.table" in state)
    if not pools:
        return vit_settings(state, "timm")
    token = "embedding.cls" in state
    lengths = [state["embedding.position.table"].shape[1] - int(token),
               *(state[f"stages.0.pools.{i}.table"].shape[1] for i in pools)]
    tried = [(KERNEL, STRIDE), *((k, s) for s in range(1, 9) for k in range(1, 9))]
    kernel, stride = next(t for t in tried if lengths == pooled_lengths(lengths[0], len(pools), *t))
    dim, in_chans, patch, across = state["embedding.proj.weight"].shape
    side, hidden = round(lengths[0] ** 0.5), state["stages.0.layers.0.channel.inner.fc1.weight"].shape[0]
    return {
        "dim": dim, "in_chans": in_chans, "patch": patch if patch == across else (patch, across), "depth": depth,
        "img_size": side * patch if patch == across else (side * patch, side * across),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim), "pools": pools,
        "kernel": Assumed(kernel, "leaves no trace but the number of tokens"),
        "stride": Assumed(stride, "leaves no trace but the number of tokens"),
        "channel": spec(Mlp) if hidden == 4 * dim else spec(Mlp, ratio=told_ratio(hidden, dim)),
        "pool": "token" if token else "mean",
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }


def pooled_lengths(tokens: int, pools: int, kernel: int, stride: int) -> list[int]:
    """Tokens before and after each of some poolings."""
    return list(accumulate(range(pools), lambda n, _: (n - kernel) // stride + 1, initial=tokens))
