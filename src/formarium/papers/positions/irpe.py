"""Rethinking and Improving Relative Position Encoding for Vision Transformer (Wu et al., ICCV 2021), arXiv 2107.14222.

New: relative positions of images, iRPE. An offset on the grid falls into a bucket: near offsets have their own, far ones
share one by the logarithm of their distance (piecewise index g, Eq. 18). Four ways to a bucket: the Euclidean distance,
the quantised squared distance, rows and columns apart and summed (cross), each pair of row and column (product). A bucket
holds a number for the scores (bias mode, Eq. 14) or a vector that meets the query, the key or the value (contextual mode,
Eqs. 15 to 17). Products with the few buckets are taken first and then spread over the pairs, which costs
O(N d buckets) in place of O(N^2 d) (section 4.1).

Decisions, after the authors' code: alpha : beta : gamma = 1 : 2 : 8, so one `ratio` says all; vectors that meet keys are
scaled as the scores are; all pairs with a class token share a bucket of their own, the last; the tables start at zero,
shared by the heads; weight decay takes them as any matrix. The table has this bucket even where the host has no class
token. The models are DeiTs, which keep their absolute positions: `mixer="attention(position=irpe)"`; a host's own
`position="irpe"` leaves them away. "quant" takes the squared distance itself for a number of the index, as the code has
it. The authors' values spread the vectors over all pairs, at more products than here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit, unknown
from ...core.spec import Spec, spec
from ...parts.attend import attend, visible
from ...parts.attention import Attention, Seen
from ...parts.position import ScorePosition
from ...weights.keys import State, keymap, rule
from ..backbones import vit

CARD = Card(
    title="Rethinking and Improving Relative Position Encoding for Vision Transformer",
    authors="Kan Wu, Houwen Peng, Minghao Chen, Jianlong Fu, Hongyang Chao",
    venue="ICCV 2021",
    arxiv="2107.14222",
    year=2021,
    code="https://github.com/microsoft/Cream/tree/main/iRPE",
    licence="Apache-2.0 (code and weights)",
    kind="position",
    domain="image",
    tags=("relative position", "contextual", "DeiT"),
    claim="Relative positions alone, without tuning anything, add up to 1.5 points ImageNet top-1 to DeiT and 1.3 mAP on "
          "COCO to DETR.",
    variants={
        "nano": Published(note="ours: vit/nano with this on queries, keys and values, besides its own positions"),
        "tiny_k": Published(params=5.76e6, macs=1.284e9, input=(3, 224, 224), results={"ImageNet top-1": 73.7}),
        "small_k": Published(params=22.09e6, macs=4.659e9, input=(3, 224, 224), results={"ImageNet top-1": 80.9}),
        "small_qk": Published(params=22.13e6, macs=4.706e9, input=(3, 224, 224), results={"ImageNet top-1": 81.0}),
        "small_qkv": Published(params=22.17e6, input=(3, 224, 224), results={"ImageNet top-1": 81.2},
                               note="theirs takes 4.885 G MACs, more than ours by the vectors spread over all pairs of "
                                    "values, which is just beyond the 3 % that cards are held to"),
        "base_k": Published(params=86.61e6, macs=17.684e9, input=(3, 224, 224), results={"ImageNet top-1": 82.3}),
        "base_qkv": Published(params=86.68e6, macs=18.137e9, input=(3, 224, 224), results={"ImageNet top-1": 82.8},
                              note="their form on values takes more MACs than ours"),
        "small_euc_k": Published(input=(3, 224, 224), note="in the code, without weights"),
        "small_quant_k": Published(input=(3, 224, 224), note="in the code, without weights"),
        "small_cross_k": Published(input=(3, 224, 224), note="in the code, without weights"),
    },
    hosts=("vit/nano",),
)

METHODS = ("euc", "quant", "cross", "product")


def piecewise_index(x: Float[Tensor, "..."], ratio: float) -> Int[Tensor, "..."]:
    """g of Eq. 18, in [-int(2 ratio), int(2 ratio)]: x rounded up to `ratio`, then growing with its logarithm."""
    far = ratio + (x.abs().clamp(min=ratio) / ratio).log() / math.log(8) * ratio
    far = x.sign() * far.round().clamp(max=2 * ratio)
    return torch.where(x.abs() <= ratio, x.round(), far).long()


def buckets_of(method: str, ratio: float) -> int:
    """How many a table has, without the one for a class token."""
    side = 2 * int(2 * ratio) + 1
    return side**2 if method == "product" else side


class IRPE(ScorePosition):
    """Relative positions of tokens on a grid, after any number of class or register tokens.

    on: which of queries, keys and values the buckets meet: a choice of the letters q, k and v. method: "euc", "quant",
    "cross" or "product". mode: "contextual" or "bias", which has none on values. ratio: tokens up to this distance have
    buckets of their own. shared: one table for all heads.
    """

    def __init__(self, head_dim: int, heads: int, *, on: str = "k", method: str = "product", mode: str = "contextual",
                 ratio: float = 1.9, shared: bool = True) -> None:
        super().__init__(head_dim, heads)
        if method not in METHODS:
            raise unknown("method of iRPE", method, METHODS)
        if mode not in ("bias", "contextual"):
            raise unknown("mode of iRPE", mode, ("bias", "contextual"))
        if not on or len(set(on)) < len(on) or set(on) - set("qkv"):
            raise DoesNotFit(f"on= is a choice of the letters q, k and v, such as 'qk', not {on!r}")
        if mode == "bias" and "v" in on:
            raise DoesNotFit("a bias is added to scores, so there is none on values; take on='qk', or mode='contextual'")
        if ratio < 0.5:
            raise DoesNotFit(f"ratio is 0.5 or more, else all offsets share one bucket; got {ratio}")
        self.on, self.method, self.mode, self.ratio = on, method, mode, ratio
        self.buckets = buckets_of(method, ratio) + 1
        sizes = {"q": (head_dim, self.buckets), "k": (head_dim, self.buckets), "v": (self.buckets, head_dim)}
        own = 1 if shared else heads
        self.tables = nn.ParameterDict({
            name: nn.Parameter(torch.zeros(own, *(sizes[x] if mode == "contextual" else (self.buckets,))))
            for x in "qkv" if x in on for name in self._names(x)})

    def _names(self, x: str) -> list[str]:
        """Of the tables on x: two for "cross"."""
        ends = ("_rows", "_cols") if self.method == "cross" else ("",)
        return [x + end + ("_bias" if self.mode == "bias" else "") for end in ends]

    def index(self, ctx: Ctx) -> list[Int[Tensor, "n n"]]:
        """The bucket of each query (row) and key (column): one, or for "cross" one by rows and one by columns."""
        h, w = ctx.need_grid(self, prefix=True)
        device = next(iter(self.tables.values())).device
        row = torch.arange(h, device=device, dtype=torch.float32).repeat_interleave(w)
        col = torch.arange(w, device=device, dtype=torch.float32).repeat(h)
        down, right = row[:, None] - row, col[:, None] - col
        most = int(2 * self.ratio)
        if self.method in ("euc", "quant"):
            squared = down.square() + right.square()
            found = [piecewise_index(squared.sqrt().round() if self.method == "euc" else squared, self.ratio) + most]
        else:
            found = [piecewise_index(x, self.ratio) + most for x in (down, right)]
            if self.method == "product":
                found = [found[0] * (2 * most + 1) + found[1]]
        return [F.pad(x, (ctx.prefix, 0, ctx.prefix, 0), value=self.buckets - 1) for x in found]

    def _shared_index(self, ctx: Ctx) -> list[Int[Tensor, "n n"]]:
        key = f"irpe {self.method} {self.ratio}"
        if key not in ctx.shared:  # the same for every layer of the stage
            ctx.shared[key] = self.index(ctx)
        return ctx.shared[key]

    def scores(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], ctx: Ctx,
               scale: float) -> Float[Tensor, "b h n n"] | None:
        """What is added to the scores; None where only values have positions."""
        total: Tensor | None = None
        for x, other in (("k", q), ("q", k)):  # a key's vectors meet the queries, and the reverse
            for name, index in zip(self._names(x) if x in self.on else (), self._shared_index(ctx), strict=False):
                if self.mode == "bias":
                    found = self.tables[name][:, index.flatten()].unflatten(-1, index.shape)[None]
                else:
                    found = (other * scale) @ self.tables[name]
                    found = found.gather(-1, index.expand(*found.shape[:2], *index.shape))
                found = found if x == "k" else found.transpose(-2, -1)
                total = found if total is None else total + found
        return total

    def attend(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], ctx: Ctx, *,
               causal: bool, window: int | None, scale: float | None) -> Float[Tensor, "b h n d"]:
        scale = self.head_dim**-0.5 if scale is None else scale
        bias = self.scores(q, k, ctx, scale)
        if "v" not in self.on:
            return attend(q, k, v, bias=bias, mask=ctx.mask, causal=causal, window=window, scale=scale)
        mask = ctx.mask
        if causal or window is not None:
            seen = visible(q.shape[2], k.shape[2], causal, window, q.device)
            mask = seen if mask is None else mask & seen
        weights = Seen(q, k, v, bias, mask, scale).log_probabilities().exp()
        out = weights.to(v.dtype) @ v
        for name, index in zip(self._names("v"), self._shared_index(ctx), strict=True):
            mass = weights.new_zeros(*weights.shape[:3], self.buckets)  # of each bucket, summed over its keys
            mass = mass.scatter_add(-1, index.expand(weights.shape), weights)
            out = out + mass.to(v.dtype) @ self.tables[name]
        return out


PART = spec(IRPE)


def _on(position: Spec[IRPE]) -> Spec[Attention]:
    return spec(Attention, position=position)


PRESETS = {
    "nano": vit.PRESETS["nano"].but(mixer=_on(PART.but(on="qkv"))),
    "tiny_k": vit.PRESETS["tiny"].but(mixer=_on(PART)),
    "small_k": vit.PRESETS["small"].but(mixer=_on(PART)),
    "small_qk": vit.PRESETS["small"].but(mixer=_on(PART.but(on="qk"))),
    "small_qkv": vit.PRESETS["small"].but(mixer=_on(PART.but(on="qkv"))),
    "base_k": vit.PRESETS["base"].but(mixer=_on(PART)),
    "base_qkv": vit.PRESETS["base"].but(mixer=_on(PART.but(on="qkv"))),
    "small_euc_k": vit.PRESETS["small"].but(mixer=_on(PART.but(method="euc", ratio=20))),
    "small_quant_k": vit.PRESETS["small"].but(mixer=_on(PART.but(method="quant", ratio=33))),
    "small_cross_k": vit.PRESETS["small"].but(mixer=_on(PART.but(method="cross", ratio=20))),
}

TABLES = f"{vit.OURS}.mixer.inner.position.tables"


def _rules() -> Iterator[Any]:
    for x in "qkv":
        for part in ("", "rows", "cols"):
            theirs = f"blocks.{{i}}.attn.rpe_{x}.{f'rp_{part}.' if part else ''}lookup_table"
            ours = f"{TABLES}.{x}{f'_{part}' if part else ''}"
            yield rule(f"{theirs}_weight", ours)
            yield rule(f"{theirs}_bias", f"{ours}_bias")


KEYS = {"authors": keymap(*_rules(), *vit.KEYS["timm"].rules)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All of it but the ratio and, of equal sizes, the method: as a preset has them whose tables are of this size, else
    the product of rows and columns where that gives the number of buckets, and Euclidean distance where not. One bias for
    all heads does not tell how many they are.

    What is taken so does not show as assumed when a file is loaded: `Assumed` stands for an option of the model, and these
    are options of the position inside its mixer. The whole mixer cannot be assumed: it would give way to a preset's, with
    other tables. So 82 rows are read as Euclidean distance with ratio 20, though the product has as many with ratios from
    2 up to 2.5, and any ratio is read as the preset's of its number of buckets, or as the least that gives it. Whoever
    knows better names the mixer: load(file, mixer="attention(position=irpe(ratio=2.0))").
    """
    first = TABLES.format(i=0)
    tables = {k.removeprefix(f"{first}."): t for k, t in state.items() if k.startswith(f"{first}.")}
    name, table = next(iter(tables.items()))
    told = vit.settings(state, "timm")
    bias = name.endswith("_bias")
    buckets = table.shape[-2 if name.startswith("v") else -1] - 1
    if not bias:
        told["heads"] = told["dim"] // table.shape[-1 if name.startswith("v") else -2]
    elif table.shape[0] > 1:
        told["heads"] = table.shape[0]
    options = {"on": "".join(x for x in "qkv" if any(n.startswith(x) for n in tables)),
               "mode": "bias" if bias else "contextual", "shared": table.shape[0] == 1}
    options["method"], options["ratio"] = _method(buckets, "_rows" in name or "_cols" in name)
    usual = {"on": "k", "mode": "contextual", "shared": True, "method": "product", "ratio": 1.9}
    position = spec(IRPE, **{k: v for k, v in options.items() if v != usual[k]})
    return told | {"mixer": told.get("mixer", spec(Attention)).but(position=position)}


def _method(buckets: int, cross: bool) -> tuple[str, float]:
    for method, ratio in (("product", 1.9), ("euc", 20), ("quant", 33), ("cross", 20)):
        if buckets_of(method, ratio) == buckets and (method == "cross") == cross:
            return method, ratio
    side = math.isqrt(buckets)
    if not cross and side**2 == buckets:
        return "product", (side // 2) / 2
    return "cross" if cross else "euc", (buckets // 2) / 2
