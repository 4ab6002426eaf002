"""Sliced Recursive Transformer (Shen, Liu, Xing, ECCV 2022), arXiv 2111.05297.

New: every block is run several times with the same weights, z_l = F(z_{l-1}, W) again and again (section 3, recursion), at
no further parameters. Each run is followed by a small MLP of its own, a non-linear projection layer (NLL), so that the runs
differ; every residual has two learned scalars, a x + b f(x) (LRC). What the second run costs is saved by sliced group
attention: tokens are cut into equal slices that attend within themselves, other numbers of slices in the first and in the
later runs, and in the later ones the tokens are shuffled before, so that the slices exchange.

Decisions: the authors' code shuffles in evaluation too, so that its first stage answers at random; here evaluation is
deterministic, the tokens stay in order, unless `shuffle="always"`. Their code tells the later runs by (index + 2) % 4,
which is right for two runs alone; ours takes any number. Slices of a token count that they do not divide: the last one is
shorter. A stem of two or three halvings takes small images. The NLL has no drop path, as in the code; a block has one rate
for all its runs. "gflops" of the paper are multiply-accumulates. Distillation is on soft labels alone, which is the
objective deit(kind=soft,alpha=1.0,by_image=true); the distilled models are the same nets. Their files hold a shared block
once a run, under several names; the last is taken. The finetuned models for 384 and 512 pixels have other positions alone
(`img_size`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed, check_multiple, pair, to_map, to_tokens
from ...parts.norm import BatchNorm, LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...parts.stem import Stem
from ...skeletons.backbone import Backbone
from ...skeletons.stack import Stack, Sublayers
from ...weights.adapt import Change, refit_kernel
from ...weights.keys import Assumed, Op, Options, State, as_preset, count, defaults, drop, keymap, rule, told_ratio

CARD = Card(
    title="Sliced Recursive Transformer",
    authors="Zhiqiang Shen, Zechun Liu, Eric Xing",
    venue="ECCV 2022",
    arxiv="2111.05297",
    year=2021,
    code="https://github.com/szq0214/SReT",
    licence="MIT (code); the weights without a statement",
    kind="backbone",
    domain="image",
    tags=("weight sharing", "recursion", "group attention", "pyramid"),
    claim="Running each block twice with shared weights gains about 2 % ImageNet top-1 at no further parameters; slicing "
          "the attention then saves 10 to 30 % of the computation at a loss of about 0.1 %.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "t": Published(params=4.8e6, macs=1.1e9, input=(3, 224, 224),
                       results={"ImageNet top-1": 76.0, "ImageNet top-1 (distilled)": 77.6}),
        "t_unsliced": Published(params=4.8e6, macs=1.4e9, input=(3, 224, 224),
                                results={"ImageNet top-1": 76.1, "ImageNet top-1 (distilled)": 77.7}),
        "lt": Published(params=5.0e6, macs=1.2e9, input=(3, 224, 224),
                        results={"ImageNet top-1": 76.7, "ImageNet top-1 (distilled)": 77.7}),
        "lt_16_14_1": Published(params=5.0e6, macs=1.2e9, input=(3, 224, 224), results={"ImageNet top-1": 76.6}),
        "lt_unsliced": Published(params=5.0e6, macs=1.4e9, input=(3, 224, 224),
                                 results={"ImageNet top-1": 76.8, "ImageNet top-1 (distilled)": 77.9}),
        "s": Published(params=20.9e6, macs=4.2e9, input=(3, 224, 224), results={"ImageNet top-1": 81.9}),
        "s_unsliced": Published(params=20.9e6, macs=4.7e9, input=(3, 224, 224), results={"ImageNet top-1": 82.0}),
        "t_unsliced_384": Published(params=4.9e6, macs=6.4e9, input=(3, 384, 384),
                                    results={"ImageNet top-1 (distilled)": 79.7}),
        "s_unsliced_384": Published(params=21.0e6, macs=18.5e9, input=(3, 384, 384),
                                    results={"ImageNet top-1 (distilled)": 83.8}),
        "s_unsliced_512": Published(params=21.3e6, macs=42.8e9, input=(3, 512, 512),
                                    results={"ImageNet top-1 (distilled)": 84.3}),
    },
    exceptions={"drop_path": "the stem's batch norm uses the batch's own statistics in training, and the tokens are "
                             "shuffled in training alone"},
)

SHUFFLES = ("training", "always", "never")


class SlicedAttention(Attention):
    """Attention within slices of neighbouring tokens (section 3.4): `groups` of them in a block's first run, `regroups` in
    the later ones, where the tokens are shuffled before. 1: among all tokens.

    shuffle: "training", "always", or "never". Which run it is, ctx.shared["run"] says.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, groups: int = 1, regroups: int = 1,
                 shuffle: str = "training") -> None:
        super().__init__(dim, place, heads=heads)
        if min(groups, regroups) < 1:
            raise DoesNotFit(f"tokens fall into 1 slice or more, not {groups} and {regroups}")
        if shuffle not in SHUFFLES:
            raise unknown("time to shuffle", shuffle, SHUFFLES)
        self.groups, self.regroups, self.shuffle = groups, regroups, shuffle

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        again, n = ctx.shared.get("run", 0) > 0, q.shape[2]
        groups = self.regroups if again else self.groups
        if groups == 1:
            return attend(q, k, v)
        size = math.ceil(n / groups)
        groups = math.ceil(n / size)  # no slice of padding alone
        order = None
        if again and (self.shuffle == "always" or (self.shuffle == "training" and self.training)):
            order = torch.randperm(n, device=q.device)
            q, k, v = (t.index_select(2, order) for t in (q, k, v))
        left = groups * size - n
        mask = (torch.arange(groups * size, device=q.device) < n).view(groups, 1, 1, size) if left else None
        q, k, v = (F.pad(t, (0, 0, 0, left)).unflatten(2, (groups, size)).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, mask=mask).transpose(1, 2).flatten(2, 3)[:, :, :n]
        return out if order is None else out.index_select(2, order.argsort())


class LearnableResidual(PreNorm):
    """a x + b * drop(inner(norm(x))), two learned scalars that start at 1 (LRC, section 3.3)."""

    undecayed = ("keep", "add")

    def __init__(self, dim: int, place: Place, inner: Part, *, norm: Spec[nn.Module] = spec(LayerNorm),
                 drop_path: float = 0.0) -> None:
        super().__init__(dim, place, inner, norm=norm, drop_path=drop_path)
        self.keep, self.add = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return self.keep * state + self.add * self.branch(self.norm(state), ctx)


class RecursiveStack(Stack):
    """`unique` layers, each run `loops` times in a row; after each run a projection of its own, unless that is None.

    place: of the first run, with the runs of the whole net as its depth. ctx.shared["run"] counts the runs of a layer.
    """

    def __init__(self, dim: int, unique: int, loops: int, sublayers: Sublayers, residual: Spec[Residual], *, place: Place,
                 projection: Spec[Part] | None, resample: Resample | None = None) -> None:
        super().__init__(dim, unique, sublayers, residual, place=place, resample=resample)
        self.loops, self.depth = loops, unique * loops
        self.projections = None
        if projection is not None:
            ends = [place._replace(layer=place.layer + i, nth=i, sub=len(sublayers), subs=len(sublayers) + 1)
                    for i in range(self.depth)]
            self.projections = nn.ModuleList(residual.but(drop_path=0.0)(dim, at, projection(dim, at)) for at in ends)

    def _layer(self, i: int, ctx: Ctx) -> list[tuple[Residual, Ctx]]:
        layer = super()._layer(i // self.loops, replace(ctx, shared={**ctx.shared, "run": i % self.loops}))
        return layer if self.projections is None else [*layer, (self.projections[i], ctx)]  # type: ignore[list-item]

    def _end(self, i: int) -> Residual:
        return super()._end(i // self.loops)


class Convs(Stem):
    """Three 3x3 convolutions with batch norm and ReLU, of half the width and twice the whole; the first log2(stride) of
    them halve the image."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, *, dim: int, stride: int = 8) -> None:
        super().__init__()
        if stride not in (1, 2, 4, 8):
            raise DoesNotFit(f"three convolutions make tokens of 1, 2, 4 or 8 pixels, not {stride}")
        self.channels, self.stride = dim, stride
        widths = (in_chans, dim // 2, dim, dim)
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, 2 if stride > 2**i else 1, 1) for i in range(3))
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:])

    def refit(self, name: str, tensor: Tensor | None, was: "Convs") -> Change | None:
        if name != "convs.0.weight" or tensor is None:
            return None
        return refit_kernel(tensor, self.convs[0].weight.shape)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class ConvStem(PatchEmbed):
    """Images to the maps of `Convs` as tokens, and learned positions."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, stride: int, img_size: int | Sequence[int]) -> None:
        check_multiple(pair(img_size), (stride, stride), "the stem")
        super().__init__(in_chans, dim, patch=1, img_size=img_size, position=spec(LearnedPosition),
                         stem=spec(Convs, dim=dim, stride=stride))
        self.proj = nn.Identity()  # the last convolution gives the tokens


class ConvPooling(Resample):
    """A 3x3 convolution of stride 2, each channel on its own to a multiple of channels (as in PiT)."""

    step = (2, 2)

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        if out_dim % dim:
            raise DoesNotFit(f"each of {dim} channels becomes several, so {out_dim} must be a multiple of {dim}")
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        x = self.conv(to_map(x, ctx.need_grid(self)))
        return to_tokens(x), replace(ctx, grid=(x.shape[2], x.shape[3]))


class SReT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    dims, heads, unique: width, heads and blocks of each stage. loops: how often each block is run. groups, regroups:
    slices of each stage in a block's first and in its later runs. shuffle: see `SlicedAttention`. projection_ratio: of the
    NLL; None: no NLL. patch: pixels of a token, 1, 2, 4 or 8. drop_path: grows over all runs of the net; the blocks of
    a stage have the rates of its first runs.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 8, in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, ...] = (64, 128, 256), heads: tuple[int, ...] = (2, 4, 8),
                 unique: tuple[int, ...] = (2, 5, 3), loops: int = 2, groups: tuple[int, ...] = (8, 4, 1),
                 regroups: tuple[int, ...] = (2, 1, 1), shuffle: str = "training", ratio: float = 3.6,
                 projection_ratio: float | None = 1.0, drop_path: float = 0.0) -> None:
        if not len(dims) == len(heads) == len(unique) == len(groups) == len(regroups):
            raise DoesNotFit(f"dims, heads, unique, groups and regroups are of the same stages, got {dims}, {heads}, "
                             f"{unique}, {groups} and {regroups}")
        if loops < 1 or min(unique) < 1:
            raise DoesNotFit(f"every stage has a block or more, run once or more, got unique={unique} and loops={loops}")
        super().__init__(ConvStem(in_chans, dims[0], stride=patch, img_size=img_size), [], img_size=img_size,
                         norm=spec(nn.Identity), num_classes=0, pool_first=True)
        depth, layer, residual = sum(unique) * loops, 0, spec(LearnableResidual, drop_path=drop_path)
        for i, (dim, blocks) in enumerate(zip(dims, unique, strict=True)):
            mixer = spec(SlicedAttention, heads=heads[i], groups=groups[i], regroups=regroups[i], shuffle=shuffle)
            self.stages.append(RecursiveStack(
                dim, blocks, loops, {"mixer": mixer, "channel": spec(Mlp, ratio=ratio)}, residual,
                place=Place(layer=layer, depth=depth, stage=i, stages=len(dims)),
                projection=None if projection_ratio is None else spec(Mlp, ratio=projection_ratio),
                resample=ConvPooling(dims[i - 1], dim) if i else None))
            layer += blocks * loops
        self.num_features = dims[-1]
        self.norm = LayerNorm(dims[-1])
        self.reset_classifier(num_classes)


T = spec(SReT)
LT = T.but(ratio=4.0)
S = spec(SReT, dims=(126, 252, 504), heads=(3, 6, 12), ratio=3.0, projection_ratio=2.0)
WHOLE = {"groups": (1, 1, 1), "regroups": (1, 1, 1)}
PRESETS = {
    "nano": spec(SReT, img_size=28, patch=2, dims=(32, 64), heads=(2, 4), unique=(1, 2), groups=(4, 2), regroups=(2, 1)),
    "t": T,
    "t_unsliced": T.but(**WHOLE),
    "lt": LT,
    "lt_16_14_1": LT.but(groups=(16, 14, 1), regroups=(1, 1, 1)),
    "lt_unsliced": LT.but(**WHOLE),
    "s": S,
    "s_unsliced": S.but(**WHOLE),
    "t_unsliced_384": T.but(img_size=384, **WHOLE),
    "s_unsliced_384": S.but(img_size=384, **WHOLE),
    "s_unsliced_512": S.but(img_size=512, **WHOLE),
}


def _as_map(t: list[Tensor], o: Options) -> list[Tensor]:
    size, patch = pair(o.get("img_size", 224)), o.get("patch", 8)
    return [t[0].transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))]


MAP = Op(lambda t, o: [t[0].flatten(2).transpose(1, 2)], _as_map)
BLOCK = {"norm1.*": "mixer.norm.*", "attn.*": "mixer.inner.*", "norm2.*": "channel.norm.*", "mlp.*": "channel.inner.*",
         "coefficient1.bias": "mixer.keep", "coefficient2.bias": "mixer.add", "coefficient3.bias": "channel.keep",
         "coefficient4.bias": "channel.add"}
PROJECTION = {"norm1.*": "norm.*", "mlp.*": "inner.*", "coefficient1.bias": "keep", "coefficient2.bias": "add"}
STAGES, MOST = 4, 8  # stages, and blocks of one, that the table of names is made for


def _blocks() -> list[Any]:
    """Of each block the first run, its NLL, the second run under other names, its NLL."""
    rules = []
    for theirs, ours in ((f"transformers.{s}.blocks", f"stages.{s}") for s in range(STAGES)):
        for i in range(MOST):
            rules += [rule(f"{theirs}.{4 * i + 2}.{a}", f"{ours}.layers.{i}.{b}") for a, b in BLOCK.items()]
            for run in (0, 1):
                rules += [rule(f"{theirs}.{4 * i + 2 * run + 1}.{a}", f"{ours}.projections.{2 * i + run}.{b}")
                          for a, b in PROJECTION.items()]
            rules += [drop(f"{theirs}.{4 * i}.{a}", "a block's first run, with the weights of its second",
                           made=(f"{ours}.layers.{i}.{b}", lambda t, state, o: t)) for a, b in BLOCK.items()]
    return rules


KEYS = {"authors": keymap(
    rule("pos_embed", "embedding.position.table", MAP),
    *[rule(f"patch_embed.conv{i + 1}.*", f"embedding.stem.convs.{i}.*") for i in range(3)],
    drop("patch_embed.bn{i}.num_batches_tracked", "a count of training steps"),
    *[rule(f"patch_embed.bn{i + 1}.*", f"embedding.stem.norms.{i}.*") for i in range(3)],
    *_blocks(),
    *[rule(f"pools.{s}.conv.*", f"stages.{s + 1}.resample.conv.*") for s in range(STAGES - 1)],
    rule("norm.*", "norm.*"),
    rule("head.*", "head.*"),
)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes. Square images. Untold by the tensors: heads, slices, the pixels of a token, runs where there is no NLL."""
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    dims = tuple(state[f"stages.{s}.layers.0.mixer.norm.weight"].shape[0] for s in stages)
    unique = tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages)
    projections = count(state, "stages.0.projections.{i}.norm.weight")
    found: dict[str, Any] = {"dims": dims, "unique": unique,
                             "in_chans": state["embedding.stem.convs.0.weight"].shape[1],
                             "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0}
    hidden = tuple(state[f"stages.{s}.layers.0.channel.inner.fc1.weight"].shape[0] for s in stages)
    for ratio in (3.6, 3.0, 4.0):  # as published; rounded widths tell no ratio exactly
        if hidden == tuple(int(d * ratio) for d in dims):
            found["ratio"] = ratio
            break
    else:
        found["ratio"] = told_ratio(hidden[0], dims[0])
    if projections:
        wide = state["stages.0.projections.0.inner.fc1.weight"].shape[0]
        found |= {"loops": projections // unique[0], "projection_ratio": told_ratio(wide, dims[0])}
    else:
        found |= {"loops": Assumed(2, "runs of the same weights leave no trace without projections; as published"),
                  "projection_ratio": None}
    plain = (1,) * len(dims)
    for option, default in (("heads", tuple(max(1, d // 32) for d in dims)), ("groups", plain), ("regroups", plain)):
        found[option] = as_preset(PRESETS, option, default, dims=dims, ratio=found["ratio"])
    patch = as_preset(PRESETS, "patch", 8, dims=dims)
    side = round(state["embedding.position.table"].shape[1] ** 0.5) * patch.value
    if any(p["img_size"] == side for p in map(defaults, PRESETS.values()) if p["dims"] == dims):
        like = {"dims": dims, "ratio": found["ratio"], "img_size": side}
        found |= {k: as_preset(PRESETS, k, plain, **like) for k in ("groups", "regroups")}
    return found | {"patch": patch, "img_size": side}
