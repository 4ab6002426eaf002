"""Scaling Vision Transformers to 22 Billion Parameters (Dehghani et al., ICML 2023), arXiv 2302.05442.

New, for a ViT that trains stably and fast at 22 billion parameters (section 2): attention and MLP stand side by side under
one norm, x + MLP(y) + Attention(y), y = LN(x), so that W1 and the QKV projection are one matrix, W2 and the output
projection another; queries and keys of each head are normed before their product, softmax(LN(X W_q) LN(X W_k)^T / sqrt(d)),
which keeps the scores from growing; no biases in the QKV projection and in norms. And asynchronous parallel linear
operations (section 3): a matrix spread over devices is multiplied block by block, while the next block is on its way
(`ShardedLinear`).

Decisions: no code and no weights are released. All norms scale only, those of queries and keys as well; MLP and output
projections have biases, which in the parallel block are one vector, as only their sum counts. The table's 21,743 M are the
matrices of 48 layers: no MAP head. So `22b` is that encoder with the mean of its tokens, and `22b_map` has the MAP head of
Scaling ViT, which the paper classifies with (22.2 B). Its 3,926 M of ViT-e are with MAP head and a classifier of JFT's
about 29,600 classes, its 1,843 M of ViT-G without both; these two are sequential, with biases, and without norms of queries
and keys: `e` and `g` are models of Scaling ViT.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention, join_heads, split_heads
from ...parts.channel import Mlp, linear
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, ScorePosition
from ...parts.residual import PreNorm
from ...weights.keys import State, as_preset, count, told_ratio
from . import scaling_vit
from .scaling_vit import ScalingViT, variant

CARD = Card(
    title="Scaling Vision Transformers to 22 Billion Parameters",
    authors="Mostafa Dehghani, Josip Djolonga, Basil Mustafa, Piotr Padlewski, Jonathan Heek, Justin Gilmer, "
            "Andreas Steiner and others",
    venue="ICML 2023",
    arxiv="2302.05442",
    year=2023,
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "parallel", "qk_norm", "distributed"),
    claim="A dense ViT of 22 billion parameters trains stably and efficiently with parallel layers and normed queries and "
          "keys: 89.5 % ImageNet top-1 by a linear classifier on frozen features.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "22b": Published(params=21743e6, input=(3, 224, 224), note="the encoder, as table 1 counts it; mean of its tokens"),
        "22b_map": Published(input=(3, 224, 224),
                             results={"ImageNet top-1 (linear, frozen)": 89.5, "ImageNet top-1 (LiT, zero-shot)": 85.9},
                             note="with the MAP head, which the table does not count. Results are quoted from memory"),
        "e": Published(input=(3, 224, 224), note="ViT-e of PaLI (arXiv 2209.06794); 3,926 M with a classifier of 29,600 "
                                                 "classes, the paper's test counts it so"),
        "g": Published(input=(3, 224, 224), note="ViT-G; 1,843 M without MAP head and classifier"),
    },
)

PARTS = {
    "mixer": {"parallel": "ParallelBlock"},
}


class ParallelBlock(Attention):
    """Attention and MLP of the same normed tokens, added up: two matrices a layer. It is the whole layer, not a sublayer.

    ratio: hidden width of the MLP over dim. bias: of the MLP and the output. Other options as those of Attention.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, ratio: float = 4.0, bias: bool = True,
                 qkv_bias: bool = False, qk_norm: Spec[nn.Module] | None = spec(LayerNorm, bias=False),
                 approximate: bool = False, position: Spec[ScorePosition] | None = None) -> None:
        super().__init__(dim, place, heads=heads, bias=False, qk_norm=qk_norm, position=position)
        hidden = int(dim * ratio)
        self.widths, self.approximate = (3 * dim, hidden), "tanh" if approximate else "none"
        fused = (self.qkv, linear(dim, hidden, bias=False)), (self.proj, linear(hidden, dim, bias=False))
        del self.qkv, self.proj  # each started by its own width, then made one with its neighbour
        self.weight_in = nn.Parameter(torch.cat([m.weight.detach() for m in fused[0]]))
        self.weight_out = nn.Parameter(torch.cat([m.weight.detach() for m in fused[1]], dim=1))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * dim)) if qkv_bias else None
        self.hidden_bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        qkv, hidden = F.linear(x, self.weight_in).split(self.widths, dim=-1)
        qkv = qkv if self.qkv_bias is None else qkv + self.qkv_bias
        hidden = hidden if self.hidden_bias is None else hidden + self.hidden_bias
        q, k, v = split_heads(qkv, 3, self.heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx)
        both = torch.cat((join_heads(self.mix(q, k, v, ctx)), F.gelu(hidden, approximate=self.approximate)), dim=-1)
        return F.linear(both, self.weight_out, self.bias)


class ViT22B(ScalingViT):
    """images (B, in_chans, H, W) -> logits (B, num_classes): a ViT with any of the paper's three changes.

    block: "parallel" or "sequential". qk_norm: queries and keys are normed. qkv_bias, norm_bias: are there such biases?
    ratio: hidden width of the MLPs over dim. pool: as ScalingViT's.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 14, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 12, heads: int = 3, ratio: float = 4.0,
                 drop_path: float = 0.0, pool: str = "map", block: str = "parallel", qk_norm: bool = True,
                 qkv_bias: bool = False, norm_bias: bool = False, residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        if block not in ("parallel", "sequential"):
            raise DoesNotFit(f"block is 'parallel' or 'sequential', not {block!r}")
        norm, mlp = spec(LayerNorm, bias=norm_bias), spec(Mlp, ratio=ratio)
        attention = {"qkv_bias": qkv_bias, "qk_norm": norm if qk_norm else None}
        parallel = block == "parallel"
        super().__init__(
            img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            drop_path=drop_path, pool=pool, residual=residual, position=position, norm=norm, map_mlp=mlp,
            mixer=spec(ParallelBlock, ratio=ratio, **attention) if parallel else spec(Attention, **attention),
            channel=None if parallel else mlp)


PRESETS = {
    "nano": spec(ViT22B, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "22b": spec(ViT22B, dim=6144, depth=48, heads=48, pool="mean"),
    "22b_map": spec(ViT22B, dim=6144, depth=48, heads=48),
    "e": variant("e/14"),
    "g": variant("G/14"),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads, which the norms of queries and keys tell. Square images."""
    layer = "stages.0.layers.{i}.mixer"
    first, parallel = "stages.0.layers.0.mixer.inner", "stages.0.layers.0.mixer.inner.weight_in" in state
    dim, in_chans, *patch = state["embedding.proj.weight"].shape
    side = round(state["embedding.position.table"].shape[1] ** 0.5)
    hidden = state[f"{first}.weight_in"].shape[0] - 3 * dim if parallel else state[
        "stages.0.layers.0.channel.inner.fc1.weight"].shape[0]
    normed = f"{first}.q_norm.weight" in state
    found = {
        "dim": dim, "depth": count(state, f"{layer}.norm.weight"), "in_chans": in_chans,
        "patch": patch[0] if patch[0] == patch[1] else tuple(patch),
        "img_size": side * patch[0] if patch[0] == patch[1] else (side * patch[0], side * patch[1]),
        "heads": dim // state[f"{first}.q_norm.weight"].shape[0] if normed else as_preset(
            PRESETS, "heads", max(1, dim // 64), dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "pool": "map" if "map_head.probe" in state else "token" if "embedding.cls" in state else "mean",
    }
    changed = {"block": "parallel" if parallel else "sequential", "qk_norm": normed,
               "qkv_bias": f"{first}.{'qkv_bias' if parallel else 'qkv.bias'}" in state,
               "norm_bias": "norm.bias" in state}
    if changed == {"block": "sequential", "qk_norm": False, "qkv_bias": True, "norm_bias": True}:
        return scaling_vit.settings(state, layout)  # nothing of this paper: as e and g
    return found | changed | {"ratio": told_ratio(hidden, dim)}


# a matrix spread over processes

def _around(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, list[Any]]:
    """Starts sending x to the next process of the ring, and receiving from the one before; a copy of x has to be kept."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    arriving = torch.empty_like(x)
    to, by = (dist.get_global_rank(group or dist.group.WORLD, r % world) for r in (rank + 1, rank - 1))
    both = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, arriving, by, group)]
    return arriving, dist.batch_isend_irecv(both)


def _ring(x: Tensor, group: dist.ProcessGroup | None) -> Any:
    """(j, the x of process j) for all j, this process's first; while one is in use, the next is on its way."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x = x.contiguous()
    for t in range(world):
        arriving, under_way = _around(x, group) if t + 1 < world else (x, [])
        yield (rank - t) % world, x
        for work in under_way:
            work.wait()
        x = arriving


def _by_rows(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This process's part of A x, where it holds rows of A: the parts of x go round."""
    blocks = weight.chunk(dist.get_world_size(group), dim=1)
    return sum(F.linear(part, blocks[j]) for j, part in _ring(x, group))  # type: ignore[return-value]


def _by_columns(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This process's part of A x, where it holds columns of A: sums of the parts of A x go round."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    blocks = weight.chunk(world, dim=0)
    total = F.linear(x, blocks[(rank - 1) % world])
    for t in range(2, world + 1):
        arriving, under_way = _around(total.contiguous(), group)
        mine = F.linear(x, blocks[(rank - t) % world])
        for work in under_way:
            work.wait()
        total = arriving + mine
    return total


class _Multiply(torch.autograd.Function):
    """The gradient of one form by x is the other form with the transposed weight; that by the weight is one more round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: bool, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.group = rows, group
        return (_by_rows if rows else _by_columns)(x, weight, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        by_x = (_by_columns if ctx.rows else _by_rows)(grad, weight.t(), ctx.group)
        flat_x, flat_grad = x.flatten(0, -2), grad.flatten(0, -2)
        if ctx.rows:
            parts = [flat_grad.t() @ part for _, part in sorted(_ring(flat_x, ctx.group), key=lambda at: at[0])]
            return by_x, torch.cat(parts, dim=1), None, None
        parts = [part.t() @ flat_x for _, part in sorted(_ring(flat_grad, ctx.group), key=lambda at: at[0])]
        return by_x, torch.cat(parts), None, None


class ShardedLinear(nn.Module):
    """y = A x + bias on torch.distributed (section 3): x (..., in / k) of each of k processes -> y (..., out / k).

    by: what each process holds of A, "rows" (then the parts of x travel) or "columns" (then partial sums of y travel; less
    where the output is the smaller). The bias is cut like y. The sum's order differs from that of one multiplication.
    """

    def __init__(self, plain: nn.Linear, *, by: Literal["rows", "columns"] = "rows",
                 group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if by not in ("rows", "columns"):
            raise unknown("way to cut a matrix", by, ("rows", "columns"))
        if not dist.is_initialized():
            raise DoesNotFit("a sharded linear layer runs in several processes: call torch.distributed.init_process_group "
                             "first (torchrun), or keep the plain layer")
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        if plain.in_features % world or plain.out_features % world:
            raise DoesNotFit(f"a matrix {plain.out_features}x{plain.in_features} cannot be cut evenly for {world} "
                             "processes")
        self.by, self.group = by, group
        self.weight = nn.Parameter(plain.weight.detach().chunk(world, dim=0 if by == "rows" else 1)[rank].clone())
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().chunk(world)[rank].clone())

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = _Multiply.apply(x, self.weight, self.by == "rows", self.group)
        return y if self.bias is None else y + self.bias
