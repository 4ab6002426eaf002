"""Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers (Wang, Dedhia,
Jha, CVPR 2024), arXiv 2305.17328.

New: tokens are pruned from a trained ViT without training. The attention of a head is a directed graph, on which each token
votes for those that it attends to, the more the more votes it has (Weighted Page Rank: s <- A^T s). Scores are joined over
heads by their root mean square (emphasising informative regions), without heads of too little or too much variance. A
pruning layer between two layers has three stages: I' ranks the tokens by one vote; S parts them by rank into two groups and
drops those of the less important group whose keys are most like a key of the other; I votes among the rest and keeps the
most important. The class token starts with sqrt(N) times the score of another and is never pruned.

Decisions. Scores are in units of their mean, where the published bounds of the variance (0.01 to 0.7) mean something; it is
taken over the tokens that may be pruned. Where no head is within the bounds, all count. After S the rows of the remaining
graph sum to one again. Votes are counted a fixed number of times: 30 in the first quarter of the layers, 5, and 1 in the
last quarter, the least of the published numbers (30 to 50, 5 to 10, 1). `keep` is a share of what S leaves. The rates that
the authors' search found are not at hand; SCHEDULES has one of the form of theirs and near them in cost. Their code is not
public: the method is told by the paper's abstract, figures and tables, and by accounts of its equations.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.part import Part, Resample, Residual
from ...core.spec import spec
from ...parts.attention import Attention, join_heads
from ...parts.position import ScorePosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone
from ...skeletons.stack import Stack

CARD = Card(
    title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
    authors="Hongjie Wang, Bhishma Dedhia, Niraj K. Jha",
    venue="CVPR 2024",
    arxiv="2305.17328",
    year=2024,
    code="https://jha-lab.github.io/zerotprune (no code yet)",
    kind="transform",
    domain="image",
    tags=("token pruning", "compression", "training-free"),
    claim="Without training, DeiT-S has 34.7 % fewer FLOPs and 45.3 % more throughput at 0.4 points less ImageNet top-1; "
          "at 3.08 GFLOPs it keeps 79.4 of 79.8 %, where tokens dropped at random leave 76.8 %.",
    hosts=("vit/nano",),
)

LOOKS_FOR = ("a plain ViT: one stage, whose layers keep the tokens alone as their state, with softmax attention among all "
             "tokens (no window, no bias of positions) where tokens are pruned")
IDENTITY = {"keep": 1.0, "similar": 0}
SCHEDULES: dict[str, dict[str, Any]] = {
    "deit_s_3g": {"layers": (1, 3, 6, 9, 11), "keep": (1.0, 0.9, 0.8, 0.7, 1.0), "similar": 10},
}
GRAPH = "zero_tprune"  # in ctx.shared: attention (B, H, N, N) and keys (B, H, N, D) of the last layer of a stage


class Observed(Part):
    """Attention written out, which leaves its probabilities and keys to the pruning after its layer."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention.dim, attention.place)
        self.attention = attention

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        a = self.attention
        q, k, v = a.project(x)
        if a.position is not None:
            q, k = a.position.rotate(q, k, ctx)
        scores = (q * (q.shape[-1]**-0.5 if a.scale is None else a.scale)) @ k.transpose(-2, -1)
        if ctx.mask is not None:
            scores = scores.masked_fill(~ctx.mask, -math.inf)
        probabilities = scores.softmax(-1)
        ctx.shared[GRAPH] = probabilities.detach(), k.detach()
        return a.proj(join_heads(probabilities @ v))


class Pruning(Resample):
    """Fewer tokens, by the attention and the keys of the layer before. The grid is lost; `coords` tells the places left.

    keep: share of the tokens that stage I keeps, of those that S left; similar: tokens that S drops, below 1 as a share.
    iterations: rounds of votes; variance: least and greatest of a head that counts; uniform: the class token starts as all.
    """

    step = (1, 1)

    def __init__(self, keep: float, similar: float, iterations: int, variance: tuple[float, float], uniform: bool) -> None:
        super().__init__()
        self.keep, self.similar, self.iterations = keep, similar, iterations
        self.variance, self.uniform = variance, uniform

    def extra_repr(self) -> str:
        return f"keep={self.keep}, similar={self.similar}, iterations={self.iterations}"

    def counts(self, n: int) -> tuple[int, int]:
        """Tokens left of n after stage S and after stage I; one stays."""
        dropped = int(self.similar if self.similar >= 1 else self.similar * n)
        left = n - min(n // 2, dropped)
        return left, max(1, round(self.keep * left))

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m c"], Ctx]:
        attention, keys = ctx.shared[GRAPH]
        b, n = x.shape[0], x.shape[1] - ctx.prefix
        if self.counts(n)[1] == n:
            return x, ctx
        first = torch.arange(ctx.prefix, device=x.device).expand(b, -1)
        kept = torch.cat((first, self.choose(attention, keys, ctx.prefix) + ctx.prefix), dim=1)
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[None, :, None]
        coords = (places if ctx.coords is None else ctx.coords).expand(b, -1, -1)
        return _take(x, kept), replace(ctx, grid=None, coords=_take(coords, kept))

    def choose(self, attention: Float[Tensor, "b h n n"], keys: Float[Tensor, "b h n d"],
               prefix: int) -> Int[Tensor, "b m"]:
        """The tokens to keep, counted from the first after the prefix, in their order. Stages I', S and I."""
        n = attention.shape[-1] - prefix
        left, kept = self.counts(n)
        stays = torch.ones(attention.shape[0], n, dtype=torch.long, device=attention.device)
        if left < n:
            order = self.importance(attention, prefix, 1).argsort(dim=1, descending=True)
            vectors = F.normalize(join_heads(keys)[:, prefix:], dim=-1)
            better, worse = order.split((n - n // 2, n // 2), dim=1)
            likeness = (_take(vectors, worse) @ _take(vectors, better).mT).amax(-1)
            stays = stays.scatter(1, worse.gather(1, likeness.topk(n - left, dim=1).indices), 0)
        if kept == left:
            return stays.argsort(dim=1, descending=True, stable=True)[:, :left]
        scores = self.importance(attention, prefix, self.iterations, stays)
        return scores.masked_fill(stays == 0, -1).topk(kept, dim=1).indices.sort(dim=1).values

    def importance(self, attention: Float[Tensor, "b h n n"], prefix: int, iterations: int,
                   stays: Int[Tensor, "b m"] | None = None) -> Float[Tensor, "b m"]:
        """Weighted Page Rank of the tokens after the prefix: votes in each head, joined over the heads that count.

        stays: 1 for those that are left of the graph, whose rows then sum to one again; 0 for the others, that get 0.
        """
        b, heads, n, _ = attention.shape
        seen = attention.new_ones(b, 1, n)
        if stays is not None:
            seen[:, 0, prefix:] = stays.to(seen.dtype)
        rows = (attention @ seen[..., None])[..., 0].clamp_min(torch.finfo(attention.dtype).tiny)
        scores = seen.repeat(1, heads, 1)
        if not self.uniform:
            scores[..., :prefix] = seen.sum(-1, keepdim=True).sqrt()
        scores = scores * (seen.sum(-1, keepdim=True) / scores.sum(-1, keepdim=True))
        for _ in range(iterations):
            scores = ((scores / rows)[..., None, :] @ attention)[..., 0, :] * seen
        scores, seen = scores[..., prefix:], seen[..., prefix:]
        count = seen.sum(-1, keepdim=True)
        spread = (scores / (scores.sum(-1, keepdim=True) / count) - seen).square().sum(-1, keepdim=True) / count
        votes = (spread >= self.variance[0]) & (spread <= self.variance[1])
        votes = votes | ~votes.any(1, keepdim=True)
        return ((scores.square() * votes).sum(1) / votes.sum(1)).sqrt()


class VotesAlone(Pruning):
    """Without stage S: the most voted for of all."""

    def choose(self, attention: Float[Tensor, "b h n n"], keys: Float[Tensor, "b h n d"],
               prefix: int) -> Int[Tensor, "b m"]:
        return self.best(self.importance(attention, prefix, self.iterations))

    def best(self, scores: Float[Tensor, "b n"]) -> Int[Tensor, "b m"]:
        """The tokens of the highest scores, in their order, as many as all stages would keep."""
        return scores.topk(self.counts(scores.shape[1])[1], dim=1).indices.sort(dim=1).values


class LikenessAlone(Pruning):
    """Without stage I: S, again and again where more than half of the tokens are to go."""

    def choose(self, attention: Float[Tensor, "b h n n"], keys: Float[Tensor, "b h n d"],
               prefix: int) -> Int[Tensor, "b m"]:
        n = attention.shape[-1] - prefix
        wanted, kept = self.counts(n)[1], torch.arange(n, device=attention.device).expand(len(attention), n)
        first = torch.arange(prefix, device=attention.device).expand(len(attention), prefix)
        while kept.shape[1] > wanted:
            m = kept.shape[1]
            alone = Pruning(1.0, min(m - wanted, m // 2), 1, self.variance, self.uniform)
            full = torch.cat((first, kept + prefix), dim=1)
            graph = torch.stack([a[:, i][:, :, i] for a, i in zip(attention, full, strict=True)])
            vectors = torch.stack([k[:, i] for k, i in zip(keys, full, strict=True)])
            kept = kept.gather(1, alone.choose(graph / graph.sum(-1, keepdim=True), vectors, prefix))
        return kept


class ByClassToken(VotesAlone):
    """Not the paper's: the tokens that the class token attends to most."""

    def choose(self, attention: Float[Tensor, "b h n n"], keys: Float[Tensor, "b h n d"],
               prefix: int) -> Int[Tensor, "b m"]:
        if not prefix:
            raise DoesNotFit("this model has no class token whose attention could choose (pool='mean')")
        return self.best(attention[:, :, 0, prefix:].mean(1))


class AtRandom(VotesAlone):
    """Chance decides, anew in each call."""

    def choose(self, attention: Float[Tensor, "b h n n"], keys: Float[Tensor, "b h n d"],
               prefix: int) -> Int[Tensor, "b m"]:
        return self.best(torch.rand_like(attention[:, 0, 0, prefix:]))


CHOICES: dict[str, type[Pruning]] = {"graph": Pruning, "votes": VotesAlone, "likeness": LikenessAlone,
                                     "class": ByClassToken, "random": AtRandom}


def _take(x: Float[Tensor, "*b n c"], index: Int[Tensor, "*b m"]) -> Float[Tensor, "*b m c"]:
    """The tokens (the last axis but one) of each sample at `index`."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def _stack(like: Stack, layers: Sequence[nn.Module], resample: Resample | None) -> Stack:
    """A stack of these layers."""
    stack = Stack(like.dim, 0, {}, spec(PreNorm), resample=resample)
    stack.layers.extend(layers)
    stack.depth, stack.checkpointing = len(layers), like.checkpointing
    return stack


def _attention(layer: nn.Module) -> Attention | None:
    """Attention among all tokens without a bias of positions, if that mixes the tokens of this layer."""
    mixer = getattr(layer["mixer"], "inner", None) if "mixer" in layer else None
    mixer = mixer.attention if isinstance(mixer, Observed) else mixer
    fits = (type(mixer) is Attention and not mixer.causal and mixer.window is None and
            (mixer.position is None or (type(mixer.position).bias is ScorePosition.bias and
                                        type(mixer.position).attend is ScorePosition.attend)))
    return mixer if fits else None


def zero_tprune(model: Model, *, layers: tuple[int, ...] | None = None, keep: float | tuple[float, ...] = 0.9,
                similar: float | tuple[float, ...] = 0.05, iterations: tuple[int, int, int] = (30, 5, 1),
                variance: tuple[float, float] = (0.01, 0.7), uniform: bool = False, by: str = "graph") -> int:
    """Prunes tokens after some layers; returns their number. A model that is pruned already is pruned anew.

    layers: counted from 1; None: where 1, 3, 6, 9 and 11 are of 12. keep, similar: one for all or one each, see Pruning.
    iterations: of votes in the first quarter of the layers, between, and in the last quarter. by: what chooses the tokens,
    "graph", or one of the others of CHOICES, which keep as many: controls.
    """
    if by not in CHOICES:
        raise unknown("choice of zero_tprune", by, CHOICES)
    if not isinstance(model, Backbone) or type(model).encode is not Backbone.encode:
        return 0
    first, *others = model.stages
    whole = [layer for stack in model.stages for layer in stack.layers]
    depth = len(whole)
    if layers is None:
        layers = tuple(sorted({max(1, min(round(depth * i / 12), depth - 1)) for i in (1, 3, 6, 9, 11)}))
    if not layers or any(b <= a for a, b in pairwise((0, *layers, depth))):
        raise DoesNotFit(f"layers are one or more increasing numbers from 1 to {depth - 1}, those after which tokens are "
                         f"pruned, got {layers}")
    keeps, similars = (tuple(v) if isinstance(v, Sequence) else (v,) * len(layers) for v in (keep, similar))
    if not len(keeps) == len(similars) == len(layers):
        raise DoesNotFit(f"keep and similar are a number or one for each of the layers {layers}, got {keep} and {similar}")
    if not all(0 < k <= 1 for k in keeps) or min(similars) < 0 or len(iterations) != 3 or min(iterations) < 1:
        raise DoesNotFit(f"keep is in (0, 1], similar 0 or more, iterations three numbers from 1 on, got {keep}, {similar} "
                         f"and {iterations}")
    plain = all(type(stack) is Stack for stack in model.stages) and all(
        type(sub).enter is Residual.enter for layer in whole for sub in layer.values())
    if not plain or not all(isinstance(s.resample, Pruning) for s in others) or not all(
            _attention(whole[i - 1]) for i in layers):
        return 0
    for i, layer in enumerate(whole, start=1):
        if "mixer" in layer and isinstance(getattr(layer["mixer"], "inner", None), Observed):
            layer["mixer"].inner = layer["mixer"].inner.attention
        if i in layers:
            layer["mixer"].inner = Observed(layer["mixer"].inner)
    pieces, start, resample = [], 0, first.resample
    for i, k, s in zip(layers, keeps, similars, strict=True):
        pieces.append(_stack(first, whole[start:i], resample))
        votes = iterations[0] if 4 * i <= depth else iterations[2] if 4 * i > 3 * depth else iterations[1]
        start, resample = i, CHOICES[by](k, s, votes, variance, uniform)
    model.stages = nn.ModuleList([*pieces, _stack(first, whole[start:], resample)])
    return len(layers)


TRANSFORM = zero_tprune
