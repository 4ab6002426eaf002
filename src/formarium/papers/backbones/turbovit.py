"""TurboViT: Generating Fast Vision Transformers via Generative Architecture Search (Wong, Abbasi, Nair, 2023),
arXiv 2308.11421; its blocks are Hiera's (Ryali et al., ICML 2023), arXiv 2306.00989.

New: a constrained search, max U(G(s)) subject to bounds of accuracy, size and computation (Eq. 1), over hierarchical ViTs
of two patterns: mask-unit attention, softmax attention within local units of tokens, and Q-pooling, where the grid is
halved by max-pooling the queries, and the residual with them, inside a block that widens the channels. What it found is
plain: narrow early stages of few blocks, few heads, and most blocks after the second Q-pooling.

Decisions: the paper draws its network without numbers, and nothing was released. From the abstract's ratios follow at most
12.7 M parameters and 2.2 G multiply-accumulates; "turbovit" is our reconstruction within them, of the depths that code of
the authors' laboratory has for its TurboViT, 1, 2, 8 and 2 blocks, and narrower, uneven widths. That code's own numbers,
GenViT_2427 (widths 64 to 512 behind a stem of 96), are a preset too; they are above both bounds, so not the paper's
network. The generator and inquisitor of the search are not published either: here candidates come from evolution (`search`
of ViT-ResNAS) under bounds of parameters, multiply-accumulates and latency. As in Hiera, the first block of a stage attends
as the stage before it, and the tokens are pooled before the last norm; unlike its code, evaluation answers with logits, not
probabilities. Units that the grid does not fill are masked. Hiera's models for images have these parts and layout, so they
are presets and their files are read.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Feature, FeatureInfo
from ...core.part import Resample
from ...core.spec import spec
from ...parts.attend import attend
from ...parts.attention import Attention, head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import PatchEmbed, pair, to_map, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm, drop_path
from ...parts.window import from_windows, pad_to_windows, to_windows
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import Assumed, State, defaults, keymap, rule
from .vit_resnas import Found, search

CARD = Card(
    title="TurboViT: Generating Fast Vision Transformers via Generative Architecture Search",
    authors="Alexander Wong, Saad Abbasi, Saeejith Nair",
    venue="arXiv 2023",
    arxiv="2308.11421",
    year=2023,
    licence="nothing released; the code of Hiera (facebookresearch/hiera) Apache-2.0, its weights CC-BY-NC-4.0",
    kind="backbone",
    domain="image",
    tags=("architecture search", "pyramid", "window attention"),
    claim="82.1 % ImageNet top-1 with 2.47 times fewer parameters than FasterViT-0 at its accuracy, and 3.4 times less "
          "computation than MobileViTv2-2.0 at 0.9 % more.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "turbovit": Published(macs=2.2e9, input=(3, 224, 224), results={"ImageNet top-1": 82.1},
                              note="a reconstruction; multiply-accumulates by the abstract's ratio, which also gives at "
                                   "most 12.7 M parameters"),
        "genvit_2427": Published(input=(3, 224, 224), note="of the code of the authors' laboratory"),
        "hiera_tiny": Published(params=28e6, input=(3, 224, 224), results={"ImageNet top-1": 82.8},
                                note="Hiera, with its pretraining; all of Hiera's numbers from memory of its paper"),
        "hiera_small": Published(params=35e6, input=(3, 224, 224), results={"ImageNet top-1": 83.8}, note="Hiera"),
        "hiera_base": Published(params=52e6, input=(3, 224, 224), results={"ImageNet top-1": 84.5}, note="Hiera"),
        "hiera_base_plus": Published(params=70e6, input=(3, 224, 224), results={"ImageNet top-1": 85.2}, note="Hiera"),
        "hiera_large": Published(params=214e6, input=(3, 224, 224), results={"ImageNet top-1": 86.1}, note="Hiera"),
        "hiera_huge": Published(params=673e6, input=(3, 224, 224), results={"ImageNet top-1": 86.9}, note="Hiera"),
    },
)


def attend_in_units(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"],
                    grid: tuple[int, ...], unit: int, pool: int = 1) -> Float[Tensor, "b h n d"]:
    """Attention within units of `unit` x `unit` of the keys' grid; the queries' grid is `pool` times coarser."""
    (height, width), heads = grid, q.shape[1]
    coarse, few = (math.ceil(height / pool), math.ceil(width / pool)), unit // pool

    def cut(t: Tensor, grid: tuple[int, int], unit: int) -> Float[Tensor, "b w h n d"]:
        cells = pad_to_windows(join_heads(t).unflatten(1, grid), (unit, unit))
        return to_windows(cells, (unit, unit)).unflatten(0, (len(t), -1)).unflatten(-1, (heads, -1)).transpose(2, 3)

    mask = None
    if height % unit or width % unit:
        real = pad_to_windows(torch.ones(1, height, width, 1, device=q.device), (unit, unit))
        mask = to_windows(real, (unit, unit))[:, None, None, :, 0] > 0
    keys, values = (cut(t, (height, width), unit) for t in (k, v))
    out = attend(cut(q, coarse, few), keys, values, mask=mask).transpose(2, 3).flatten(-2).flatten(0, 1)
    padded = (math.ceil(coarse[0] / few) * few, math.ceil(coarse[1] / few) * few)
    cells = from_windows(out, (few, few), padded)[:, :coarse[0], :coarse[1]]
    return split_heads(cells.flatten(1, 2), 1, heads)[0]


class MaskUnitAttention(Attention):
    """Softmax attention within units of tokens; unit: their side, None: one of all tokens."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, unit: int | None = 8) -> None:
        super().__init__(dim, place, heads=heads)
        self.unit = unit

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        if self.unit is None:
            return super().mix(q, k, v, ctx)
        return attend_in_units(q, k, v, ctx.need_grid(self), self.unit)


class QPooling(Resample):
    """A block that widens the channels and, unless pool is 1, halves the grid: the queries and the residual are max-pooled.

    in_dim: of the tokens that come. unit: side of the units before pooling; None: one of all tokens.
    """

    def __init__(self, dim: int, out_dim: int, *, in_dim: int, heads: int, unit: int | None, pool: int, ratio: float,
                 drop_path: float) -> None:
        super().__init__()
        head_dim(out_dim, heads)
        if unit is not None and unit % pool:
            raise DoesNotFit(f"pooling halves the units, whose side is even, not {unit}")
        self.heads, self.unit, self.pool, self.rate, self.step = heads, unit, pool, drop_path, (pool, pool)
        self.norm = LayerNorm(in_dim)
        self.qkv, self.proj = linear(in_dim, 3 * out_dim), linear(out_dim, out_dim)
        self.skip = linear(in_dim, out_dim)
        self.channel = PreNorm(out_dim, Place(), Mlp(out_dim, Place(), ratio=ratio), drop_path=drop_path, even_drop=True)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        grid, x = ctx.need_grid(self), self.norm(x)

        def coarser(t: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
            return t if self.pool == 1 else to_tokens(F.max_pool2d(to_map(t, grid), self.pool, ceil_mode=True))

        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(t, 1, self.heads)[0] for t in (coarser(q), k, v))
        out = attend(q, k, v) if self.unit is None else attend_in_units(q, k, v, grid, self.unit, self.pool)
        x = coarser(self.skip(x)) + drop_path(self.proj(join_heads(out)), self.rate, self.training)
        ctx = replace(ctx, grid=(math.ceil(grid[0] / self.pool), math.ceil(grid[1] / self.pool)))
        return self.channel(x, ctx), ctx


class OverlapEmbed(PatchEmbed):
    """Patches of `kernel` pixels, padded, a token each `stride` pixels; learned positions."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, kernel: int, stride: int, img_size: int | Sequence[int]) -> None:
        super().__init__(in_chans, dim, patch=stride, img_size=img_size, position=spec(LearnedPosition))
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2)


class TurboViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    dims, depths, heads: width, blocks and heads of each stage. stem_dim: width of the first tokens, dims[0] unless given.
    patch: pixels between two tokens; kernel: of the stem. unit: side of the mask units in the first stage.
    local: stages with mask-unit attention, the first ones, 0: none; the others attend to all. pools: how many of the later
    stages begin with a Q-pooling, the first ones; the others only widen. init_std: of the linear layers, 0.02 as Hiera
    has it; None: Xavier, which small widths need.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 4, kernel: int = 7, in_chans: int = 3,
                 num_classes: int = 1000, dims: tuple[int, ...] = (64, 128, 256, 512),
                 depths: tuple[int, ...] = (1, 2, 8, 2), heads: tuple[int, ...] = (1, 2, 4, 8), stem_dim: int | None = None,
                 unit: int = 8, local: int = 2, pools: int = 3, ratio: float = 4.0, drop_path: float = 0.0,
                 init_std: float | None = 0.02) -> None:
        _check(dims, depths, heads, pools, unit)
        embed = OverlapEmbed(in_chans, stem_dim or dims[0], kernel=kernel, stride=patch, img_size=img_size)
        residual, total = spec(PreNorm, drop_path=drop_path), sum(depths)
        stages, ends, before, side = [], [], stem_dim or dims[0], unit
        for s, (dim, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
            pool = 2 if 0 < s <= pools else 1
            near = side if max(0, s - 1) < local else None  # the first block attends as the stage before
            side = side // pool
            for i in range(depth):
                if i == 0 and (s or before != dim):
                    rate = drop_path * len(stages) / max(1, total - 1)
                    block = spec(QPooling, in_dim=before, heads=h, unit=near, pool=pool, ratio=ratio, drop_path=rate)
                    stages.append(Stage(dim, 0, {}, residual, block))
                else:
                    mixer = spec(MaskUnitAttention, heads=h, unit=side if s < local else None)
                    stages.append(Stage(dim, 1, {"mixer": mixer, "channel": spec(Mlp, ratio=ratio)}, residual))
            before = dim
            ends.append(len(stages) - 1)
        super().__init__(embed, stages, img_size=img_size, num_classes=num_classes, pool_first=True)
        self.ends = ends
        restart_linears(self, init_std)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        stride, found = self.embedding.step[0], []  # type: ignore[index]
        for i, stage in enumerate(self.stages):
            stride *= stage.resample.step[0] if stage.resample else 1  # type: ignore
            if i in self.ends:
                found.append(FeatureInfo(stage.dim, stride))  # type: ignore[arg-type]
        return found

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        """The map after each stage."""
        x, ctx = self.embed(batch)
        maps = []
        for i, stage in enumerate(self.stages):
            x, ctx = stage(x, ctx)
            if i in self.ends:
                maps.append(to_map(x, ctx.need_grid(self)))
        return [Feature(m, info.stride) for m, info in zip(maps, self.feature_info, strict=True)]


def _check(dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], pools: int, unit: int) -> None:
    if not len(dims) == len(depths) == len(heads) or min((*dims, *depths)) < 1:
        raise DoesNotFit(f"dims, depths and heads are of the same stages, each 1 or more, got {dims}, {depths}, {heads}")
    if not 0 <= pools < len(dims):
        raise DoesNotFit(f"{len(dims)} stages have 0 to {len(dims) - 1} Q-poolings between them, not {pools}")
    if unit < 1:
        raise DoesNotFit(f"mask units have a side of 1 token or more, got unit={unit}; local=0 takes none")
    if any(a == b for a, b in pairwise(dims)):
        raise DoesNotFit(f"each stage has another width than the one before, got dims={dims}")


# the constrained search


class SearchSpace(NamedTuple):
    """Choices of each stage: widths, blocks, and channels of a head."""

    dims: tuple[tuple[int, ...], ...]
    depths: tuple[tuple[int, ...], ...]
    head_dims: tuple[tuple[int, ...], ...]

    def options(self, genome: Sequence[int]) -> dict[str, Any]:
        """What a genome means: the options dims, depths and heads of a TurboViT."""
        n = len(self.dims)
        dims, depths, sizes = genome[:n], genome[n:2 * n], genome[2 * n:]
        return {"dims": tuple(dims), "depths": tuple(depths),
                "heads": tuple(d // c if d % c == 0 else 1 for d, c in zip(dims, sizes, strict=True))}


SPACE = SearchSpace(dims=((32, 48, 64, 96), (96, 128, 160, 192), (224, 256, 320, 384), (448, 512, 640, 768)),
                    depths=((1, 2), (1, 2, 3), (4, 6, 8, 10, 12, 16), (1, 2, 3)), head_dims=((32, 64), ) * 4)


class Design(NamedTuple):
    """A network that a search found: options of TurboViT, its score, and what was bounded of it, by name."""

    options: dict[str, Any]
    score: float
    costs: dict[str, float]


def size(base: dict[str, Any]) -> tuple[int, int]:
    """Parameters and multiply-accumulates of TurboViT(**base), counted without building it."""
    o = defaults(spec(TurboViT)) | base
    dims, ratio, before = o["dims"], o["ratio"], o["stem_dim"] or o["dims"][0]
    grid, side = [s // o["patch"] for s in pair(o["img_size"])], o["unit"]
    taps = o["in_chans"] * o["kernel"]**2
    tokens = math.prod(grid)
    parameters, macs = before * (taps + 1 + tokens), tokens * before * taps
    for s, (dim, depth) in enumerate(zip(dims, o["depths"], strict=True)):
        pool = 2 if 0 < s <= o["pools"] else 1
        hidden = int(dim * ratio)
        mlp, attention = 2 * dim * hidden + dim + hidden, dim * dim
        for i in range(depth):
            widens = i == 0 and (s > 0 or before != dim)
            near = side if (max(0, s - 1) if widens else s) < o["local"] else None
            after = [math.ceil(g / pool) for g in grid] if widens else grid
            n, m = math.prod(grid), math.prod(after)
            source = before if widens else dim
            parameters += 2 * source + (source + 1) * 3 * dim + attention + dim + 2 * dim + mlp
            macs += n * source * 3 * dim + m * (attention + 2 * dim * hidden)
            if near is None:
                macs += 2 * n * m * dim
            else:
                step = near // pool if widens else near
                units = math.prod(math.ceil(g / near) for g in grid)
                macs += 2 * units * near**2 * step**2 * dim
            if widens:
                parameters += (source + 1) * dim
                macs += n * source * dim
                grid, side = after, side // pool
        before = dim
    return parameters + 2 * before + (before + 1) * o["num_classes"], macs + before * o["num_classes"]


@torch.no_grad()
def latency(options: dict[str, Any], repeats: int = 5) -> float:
    """Seconds of TurboViT(**options) for one image on this machine, the median."""
    model, times = TurboViT(**options).eval(), []
    x = model.example(1)
    for _ in range(repeats + 1):  # the first does not count
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def generate(score: Callable[[dict[str, Any]], float], *, space: SearchSpace = SPACE, base: dict[str, Any] | None = None,
             parameters: float | None = None, macs: float | None = None, seconds: float | None = None,
             at_least: float = 0.0, population: int = 100, generations: int = 10, parents: int = 20, children: int = 20,
             seed: int = 0) -> list[Design]:
    """Networks within the bounds of parameters, multiply-accumulates and seconds an image, the best by `score` first.

    score: options of TurboViT -> how good it is, e.g. the accuracy after a short training. base: options that are not
    searched for. at_least: of the first bound, the share that a network must use. generations=1 is random search.
    """
    fixed = base or {}

    def options(genome: Sequence[int]) -> dict[str, Any]:
        return fixed | space.options(genome)

    costs: dict[str, tuple[Callable[[Sequence[int]], float], float | None]] = {
        "parameters": (lambda g: size(options(g))[0], parameters), "macs": (lambda g: size(options(g))[1], macs),
        "seconds": (lambda g: latency(options(g)), seconds)}
    bounded = {name: (cost, limit) for name, (cost, limit) in costs.items() if limit is not None}
    genes = [*space.dims, *space.depths, *space.head_dims]
    found: list[Found] = search(genes, lambda g: score(options(g)), list(bounded.values()), population=population,
                                generations=generations, parents=parents, children=children, at_least=at_least, seed=seed)
    return [Design(options(f.genome), f.score, dict(zip(bounded, f.costs, strict=True))) for f in found]


def _hiera(dim: int, heads: int, depths: tuple[int, ...]) -> Any:
    return spec(TurboViT, dims=(dim, 2 * dim, 4 * dim, 8 * dim), heads=(heads, 2 * heads, 4 * heads, 8 * heads),
                depths=depths)


PRESETS = {
    "nano": spec(TurboViT, img_size=28, patch=2, kernel=3, dims=(32, 64, 96), depths=(1, 2, 2), heads=(1, 2, 3), unit=2,
                 local=1, pools=1, init_std=None),
    "turbovit": spec(TurboViT, dims=(48, 112, 256, 480)),
    "genvit_2427": spec(TurboViT, stem_dim=96),
    "hiera_tiny": _hiera(96, 1, (1, 2, 7, 2)),
    "hiera_small": _hiera(96, 1, (1, 2, 11, 2)),
    "hiera_base": _hiera(96, 1, (2, 3, 16, 3)),
    "hiera_base_plus": _hiera(112, 2, (2, 3, 16, 3)),
    "hiera_large": _hiera(144, 2, (2, 6, 36, 4)),
    "hiera_huge": _hiera(256, 4, (2, 6, 36, 4)),
}

OURS, THEIRS, WIDENS = "stages.{i}.layers.0", "blocks.{i}", "stages.{i}.resample"
BLOCK = {"norm1": "mixer.norm", "attn.qkv": "mixer.inner.qkv", "attn.proj": "mixer.inner.proj", "norm2": "channel.norm",
         "mlp.fc1": "channel.inner.fc1", "mlp.fc2": "channel.inner.fc2"}
WIDER = {"proj": "skip", "norm1": "norm", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "channel.norm",
         "mlp.fc1": "channel.inner.fc1", "mlp.fc2": "channel.inner.fc2"}
BOTH = ("weight", "bias")
KEYS = {"hiera": keymap(  # facebookresearch/hiera, models of images
    rule("pos_embed", "embedding.position.table"),
    rule("patch_embed.proj.*", "embedding.proj.*"),
    rule([f"{THEIRS}.{a}.{x}" for a in WIDER for x in BOTH], [f"{WIDENS}.{b}.{x}" for b in WIDER.values() for x in BOTH]),
    *[rule(f"{THEIRS}.{a}.*", f"{OURS}.{b}.*") for a, b in BLOCK.items()],
    rule("norm.*", "norm.*"),
    rule("head.projection.*", "head.*"),
)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes. Square images. Untold by the tensors: heads, and of what is attended to and pooled; taken as the preset of
    these widths has it, else as Hiera."""
    stem, in_chans, kernel, _ = state["embedding.proj.weight"].shape
    dims: list[int] = []
    depths: list[int] = []
    for i in range(len({k.split(".")[1] for k in state if k.startswith("stages.")})):
        fc2 = state[f"stages.{i}.resample.channel.inner.fc2.weight" if f"stages.{i}.resample.skip.weight" in state
                    else f"stages.{i}.layers.0.channel.inner.fc2.weight"]
        if not dims or len(fc2) != dims[-1]:
            dims.append(len(fc2))
            depths.append(0)
        depths[-1] += 1
        ratio = fc2.shape[1] / fc2.shape[0]
    known = next((own for own in map(defaults, PRESETS.values()) if own["dims"] == tuple(dims)), None)
    has = known or {"heads": tuple(max(1, d // 96) for d in dims), "unit": 8, "local": min(2, len(dims)),
                    "pools": len(dims) - 1, "patch": 4}
    why = "leaves no trace in the tensors; as the preset of these widths has it, else as Hiera"
    patch = has["patch"]
    return {"dims": tuple(dims), "depths": tuple(depths), "stem_dim": None if stem == dims[0] else stem, "kernel": kernel,
            "in_chans": in_chans, "ratio": ratio, "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
            "img_size": round(state["embedding.position.table"].shape[1] ** 0.5) * patch,
            **{k: Assumed(has[k], why) for k in ("heads", "unit", "local", "pools", "patch")}}
