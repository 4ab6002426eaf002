"""Multi-Dimensional Hyena for Spatial Inductive Bias (Zimerman, Wolf, AISTATS 2024), arXiv 2309.13600.

New: Hyena, which mixes tokens by long convolutions and gates, on grids. Projections v, x_0, x_1, ... of the tokens pass a
short depthwise convolution; then v <- k_o * (v x_o) for each gate but one, and y = v x_0. The filter k_o is as large as
the grid and implicit: a product of a network for rows and one for columns (`product`), one network of both places (`2d`),
or free numbers (`direct`), under a window that decays with the distance. A filter sees one quadrant, up and to the left,
so directions are joined: by flipping the map before one of the convolutions (`seq`), by four sets of channels
(`parallel`), or by running all four flips and mixing the answers (`4dir`, by one number a direction, `4dirp`, by a matrix).
Hybrids have Hyena in the first layers and attention in the last.

Decisions, after the authors' supplementary code: a product with the filter's transform is divided by the side of the
padded map once more than a convolution asks, 1/(2 L), so answers are small at the start; on rectangles by the mean of the
sides, sqrt(2H 2W). `parallel` flips nothing: its four sets differ by their short convolutions alone. `seq` flips the first
convolution, so with one (order 2) all look down and to the right. The sine's frequencies are one vector for all layers of
both networks. The code learns the features of places at a rate of 1e-5, from their formula; here they keep the formula,
over the current grid, so any grid will do. Weight decay spares the filters. The sizes of all ViTs here (width 192, 9
layers, 12 heads, an MLP of twice the width, patches of 4) are assumed: those of the small ViT that the literature on few
images uses. The card holds them to no published parameters or MACs; the authors released no weights, and their code names
no model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear
from ...parts.embed import PatchEmbed, to_map, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition, LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import State, as_preset, count, told_ratio

CARD = Card(
    title="Multi-Dimensional Hyena for Spatial Inductive Bias",
    authors="Itamar Zimerman, Lior Wolf",
    venue="AISTATS 2024",
    arxiv="2309.13600",
    year=2023,
    licence="code in the supplement, without a licence; no weights",
    kind="mixer",
    domain="image",
    tags=("long convolution", "implicit filter", "gating", "small data", "hybrid"),
    claim="Hyena N-D in place of attention makes ViT, Swin and DeiT better on small data, and is favourable to ViTs made "
          "for it; Hyena in the first layers and attention in the last helps throughout.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels; a hybrid, in four directions"),
        "vit": Published(input=(3, 32, 32), note="sizes as the docstring says"),
        "vit_2d": Published(input=(3, 32, 32), note="one network for both axes"),
        "vit_4dir": Published(input=(3, 32, 32), note="four directions, mixed by one number each"),
        "vit_4dirp": Published(input=(3, 32, 32), note="four directions, mixed by a matrix"),
        "vit_hybrid": Published(input=(3, 32, 32), note="attention in the last third of the layers"),
    },
    hosts=("hyena_nd/nano",),
)

FILTERS = ("product", "2d", "direct")
DECAYS = ("standard", "learn", "symmetric", "none")
DIRECTIONS = ("one", "seq", "parallel", "4dir", "4dirp")
FLIPS: tuple[tuple[int, ...], ...] = ((), (-2, -1), (-1,), (-2,))  # of a map (..., H, W)


def long_convolution(x: Float[Tensor, "b c h w"], filters: Float[Tensor, "c h w"]) -> Float[Tensor, "b c h w"]:
    """Each channel with its filter over all cells above and to the left, by the FFT; divided by sqrt(2H 2W)."""
    size = (2 * x.shape[2], 2 * x.shape[3])  # padded, so that nothing comes around
    exact = torch.promote_types(x.dtype, torch.float32)  # there are no transforms of halves
    product = torch.fft.rfft2(x.to(exact), s=size) * torch.fft.rfft2(filters.to(exact), s=size)
    out = torch.fft.irfft2(product, s=size)[..., :x.shape[2], :x.shape[3]]
    return (out / math.sqrt(size[0] * size[1])).to(x.dtype)


def features(n: int, width: int, like: Tensor) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n"]]:
    """Of n places of an axis: t from 0 to 1, cosines and sines of it; and t."""
    place = torch.arange(n, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    t, bands = place / max(1, n - 1), (width - 1) // 2
    step = (bands - 1 - 1e-4) / max(1, bands - 1)  # linspace(1e-4, bands - 1, bands)
    frequency = 1e-4 + step * torch.arange(bands, device=like.device, dtype=t.dtype)
    angle = place[:, None] * (2 * math.pi / n) * frequency
    return torch.cat((t[:, None], angle.cos(), -angle.sin()), dim=1).to(like.dtype), t.to(like.dtype)


class FilterLinear(nn.Linear):
    """A layer of an implicit filter, which weight decay leaves alone."""

    undecayed = ("weight",)


class FilterNet(nn.Module):
    """features of a place -> a number for each channel; sines between the layers."""

    def __init__(self, inputs: int, width: int, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FilterLinear(inputs if i == 0 else width, width) for i in range(inner + 1)])
        self.out = FilterLinear(width, channels, bias=False)

    def forward(self, z: Float[Tensor, "*n inputs"], frequency: Float[Tensor, "width"]) -> Float[Tensor, "*n channels"]:
        for layer in self.layers:
            z = (frequency * layer(z)).sin()
        return self.out(z)


class Filter(nn.Module):
    """Filters (channels, H, W) for a grid of any size; "direct": of the size `grid` alone.

    kind: "product", "2d" or "direct". decay: the window, "standard" (fixed), "learn", "symmetric" (for "2d": by the sum
    of both offsets) or "none". width, inner: of the networks; features: of a place, odd. root: the square root of the
    window, for "2d".
    """

    def __init__(self, channels: int, *, kind: str, decay: str, width: int, inner: int, features: int, root: bool,
                 grid: tuple[int, int] | None) -> None:
        super().__init__()
        if kind not in FILTERS:
            raise unknown("filter of Hyena N-D", kind, FILTERS)
        if decay not in DECAYS:
            raise unknown("decay of Hyena N-D", decay, DECAYS)
        if features < 3 or features % 2 == 0:
            raise DoesNotFit(f"features of a place are t and pairs of cosine and sine: odd, 3 or more; got {features}")
        if kind != "2d" and (decay == "symmetric" or root):
            raise DoesNotFit("decay='symmetric' and root=True are for filters of both axes; take filter='2d'")
        if kind == "direct" and grid is None:
            raise DoesNotFit("a direct filter has a number for each cell: give grid=(H, W), or take filter='product'")
        self.kind, self.decay, self.features, self.root = kind, "none" if kind == "direct" else decay, features, root
        if kind == "direct" and grid is not None:
            self.free = nn.Parameter(torch.randn(channels, *grid))
            self.undecayed: tuple[str, ...] = ("free",)
            return
        inputs = 2 * features if kind == "2d" else features
        self.nets = nn.ModuleList([FilterNet(inputs, width, channels, inner) for _ in range(1 if kind == "2d" else 2)])
        self.frequency = nn.Parameter(torch.ones(width))
        self.undecayed = ()
        if decay in ("learn", "symmetric"):
            self.undecayed = ("deltas", "shift")
            axes = 1 if decay == "symmetric" else 2
            self.deltas = nn.Parameter(self._deltas(channels).repeat(axes, 1))
            self.shift = nn.Parameter(torch.rand(1 if kind == "2d" else 2, channels))

    @staticmethod
    def _deltas(channels: int) -> Float[Tensor, "c"]:
        """A filter falls to 0.01 within 0.3 to 1.5 of the side."""
        slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
        return slow + (fast - slow) / max(1, channels - 1) * torch.arange(channels)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "c h w"]:
        if self.kind == "direct":
            if tuple(self.free.shape[1:]) != tuple(grid):
                raise DoesNotFit(f"this direct filter is for a grid of {self.free.shape[1]}x{self.free.shape[2]}, "
                                 f"got {grid[0]}x{grid[1]}; build it with grid={tuple(grid)}, or take filter='product'")
            return self.free
        (zh, th), (zw, tw) = (features(n, self.features, self.frequency) for n in grid)
        if self.kind == "product":
            rows, cols = (net(z, self.frequency) for net, z in zip(self.nets, (zh, zw), strict=True))
            if self.decay != "none":
                rows, cols = rows * (self._window(0, th) + self._shift(0)), cols * (self._window(1, tw) + self._shift(1))
            return torch.einsum("hc,wc->chw", rows, cols)
        both = torch.cat((zh[:, None].expand(-1, grid[1], -1), zw[None].expand(grid[0], -1, -1)), dim=-1)
        found = self.nets[0](both, self.frequency)
        if self.decay == "none":
            return found.movedim(-1, 0)
        if self.decay == "symmetric":
            window = (-(torch.arange(grid[0], device=both.device)[:, None, None] +
                        torch.arange(grid[1], device=both.device)[:, None]) * self.deltas[0].abs()).exp()
        else:
            window = self._window(0, th)[:, None] * self._window(1, tw)
        return (found * ((window.sqrt() if self.root else window) + self._shift(0))).movedim(-1, 0)

    def _window(self, axis: int, t: Float[Tensor, "n"]) -> Float[Tensor, "n c"]:
        fixed = self.decay == "standard"
        deltas = self._deltas(self.nets[0].out.out_features).to(t) if fixed else self.deltas[axis]  # type: ignore
        return (-t[:, None] * deltas.abs()).exp()

    def _shift(self, axis: int) -> Tensor | float:
        return 0.0 if self.decay == "standard" else self.shift[axis]


class HyenaND(Part):
    """Long gated convolutions of tokens on a grid (H, W) of any size.

    order: gates; one less are the long convolutions. filter, decay, width, inner, features, root, grid: of `Filter`.
    directions: "one", "seq", "parallel", "4dir" or "4dirp".
    """

    undecayed = ("bias",)

    def __init__(self, dim: int, place: Place, *, order: int = 2, filter: str = "product", decay: str = "standard",
                 directions: str = "one", width: int = 64, inner: int = 2, features: int = 3, root: bool = False,
                 grid: tuple[int, int] | None = None) -> None:
        super().__init__(dim, place)
        if directions not in DIRECTIONS:
            raise unknown("directions of Hyena N-D", directions, DIRECTIONS)
        if order < 2:
            raise DoesNotFit(f"order is 2 or more, as order 1 has no long convolution; got {order}")
        self.order, self.directions = order, directions
        inside, self.sets = dim * (order + 1), 4 if directions == "parallel" else 1
        self.project = linear(dim, inside)
        self.short = nn.Conv2d(inside, inside * self.sets, 3, padding=1, groups=inside)
        self.filter = Filter(dim * (order - 1), kind=filter, decay=decay, width=width, inner=inner, features=features,
                             root=root, grid=grid)
        self.bias = nn.Parameter(torch.randn(order - 1, dim))
        self.mix: nn.Module | None = None
        if directions.startswith("4dir"):
            self.mix = nn.Linear(4, 1) if directions == "4dir" else nn.Linear(4 * dim, dim)
        self.out = linear(dim * self.sets, dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h, w = ctx.need_grid(self)
        x = self.short(to_map(self.project(x), (h, w)))
        if self.sets > 1:
            x = x.unflatten(1, (self.sets, -1)).flatten(0, 1)  # the sets stand side by side in the batch
        last, *gates, v = x.split(self.dim, dim=1)
        filters = self.filter((h, w)).unflatten(0, (self.order - 1, -1))
        if self.mix is None:
            y = self._convolved(v, gates, filters) * last
            y = y.unflatten(0, (-1, self.sets)).flatten(1, 2)
            return self.out(to_tokens(y))
        four = [torch.cat([t.flip(f) for f in FLIPS]) for t in (v, last, *gates)]
        y = self._convolved(four[0], four[2:], filters) * four[1]
        y = torch.stack([t.flip(f) for t, f in zip(y.chunk(4), FLIPS, strict=True)], dim=-1)  # (B, C, H, W, 4)
        y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)
        return self.out(self.mix(y).squeeze(-1) if self.directions == "4dir" else self.mix(y.flatten(2)))

    def _convolved(self, v: Float[Tensor, "b c h w"], gates: Sequence[Tensor],
                   filters: Float[Tensor, "o c h w"]) -> Float[Tensor, "b c h w"]:
        for o, gate in enumerate(reversed(gates)):
            v = v * gate
            turned = self.directions == "seq" and o == 0
            v = v.flip(-2, -1) if turned else v
            v = long_convolution(v, filters[o]) + v * self.bias[o][:, None, None]
            v = v.flip(-2, -1) if turned else v
        return v


PART = spec(HyenaND)


class HyenaViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes): a ViT without a class token, whose first layers take `mixer`.

    attention: how many of the last layers are attention, of `heads` heads; 0: none.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 32, patch: int = 4, in_chans: int = 3, num_classes: int = 100,
                 dim: int = 192, depth: int = 9, heads: int = 12, attention: int = 0, drop_path: float = 0.0,
                 mixer: Spec[Part] = PART, channel: Spec[Part] = spec(Mlp, ratio=2.0),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[AbsolutePosition] = spec(LearnedPosition)) -> None:
        if not 0 <= attention <= depth:
            raise DoesNotFit(f"attention= is how many of the {depth} layers have it, the last ones; got {attention}")
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, position=position)
        grid = tuple(s // p for s, p in zip(embed.img_size or (), embed.step, strict=True))
        mixers = [mixer.offer(heads=heads, grid=grid)] * (depth - attention) + [spec(Attention, heads=heads)] * attention
        stage = Stage(dim, depth, {"mixer": mixers, "channel": channel}, residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes)


PAPER = spec(HyenaViT)
PRESETS = {
    "nano": PAPER.but(img_size=28, dim=48, depth=4, heads=4, attention=1, mixer=PART.but(directions="4dir", decay="learn",
                                                                                        width=16)),
    "vit": PAPER,
    "vit_2d": PAPER.but(mixer=PART.but(filter="2d")),
    "vit_4dir": PAPER.but(mixer=PART.but(directions="4dir")),
    "vit_4dirp": PAPER.but(mixer=PART.but(directions="4dirp")),
    "vit_hybrid": PAPER.but(attention=3),
}

LAYER = "stages.0.layers.{i}"


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads of attention, whether `seq`, and which fixed window or none: "one" and "standard" are taken,
    as the presets have them. Square images."""
    dim, in_chans, patch, _ = state["embedding.proj.weight"].shape
    depth, attention = (count(state, f"{LAYER}.mixer.{x}") for x in ("norm.weight", "inner.qkv.weight"))
    hidden = state[f"{LAYER}.channel.inner.fc1.weight".format(i=0)].shape[0]
    told = {
        "dim": dim, "in_chans": in_chans, "patch": patch, "depth": depth, "attention": attention,
        "img_size": patch * math.isqrt(state["embedding.position.table"].shape[1]),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 16), dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "channel": spec(Mlp, ratio=told_ratio(hidden, dim)),
    }
    if attention == depth:
        return told
    own = {k.removeprefix(f"{LAYER}.mixer.inner.".format(i=0)): t for k, t in state.items()}
    options: dict[str, Any] = {"order": own["bias"].shape[0] + 1}
    if "mix.weight" in own:
        options["directions"] = "4dir" if own["mix.weight"].shape == (1, 4) else "4dirp"
    elif own["short.weight"].shape[0] > own["project.weight"].shape[0]:
        options["directions"] = "parallel"
    if "filter.free" in own:
        options |= {"filter": "direct", "grid": tuple(own["filter.free"].shape[1:])}
    else:
        both = "filter.nets.1.out.weight" not in own
        width, inputs = own["filter.nets.0.layers.0.weight"].shape
        options |= {"filter": "2d" if both else "product", "width": width, "features": inputs // 2 if both else inputs,
                    "inner": count(own, "filter.nets.0.layers.{i}.weight") - 1}
        if "filter.deltas" in own:
            options["decay"] = "symmetric" if len(own["filter.deltas"]) == 1 else "learn"
    usual = {"order": 2, "filter": "product", "width": 64, "features": 3, "inner": 2}
    return told | {"mixer": spec(HyenaND, **{k: v for k, v in options.items() if usual.get(k) != v})}
