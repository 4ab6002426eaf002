"""Softmax attention as a token mixer, among tokens and to those of an encoder; no mixing at all."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..core.ctx import Ctx, Place
from ..core.errors import DoesNotFit
from ..core.part import Part
from ..core.spec import Spec
from .attend import attend, visible
from .channel import linear
from .position import ScorePosition

PARTS = {
    "mixer": {"attention": "Attention", "identity": "Identity"},
}


def head_dim(dim: int, heads: int) -> int:
    """Channels of a head; raises where the heads do not divide the width."""
    if heads < 1 or dim % heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        nearest = min(near, key=lambda h: abs(h - heads))
        raise DoesNotFit(f"{heads} heads do not divide a width of {dim}; the nearest number that does is {nearest}")
    return dim // heads


def split_heads(x: Float[Tensor, "b n (k h d)"], parts: int, heads: int) -> tuple[Float[Tensor, "b h n d"], ...]:
    """One projection (B, N, parts*heads*d) as `parts` tensors (B, heads, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n (h d)"]:
    return x.transpose(1, 2).flatten(2)


class Seen(NamedTuple):
    """What a call of softmax attention was computed from, for losses and explanations: the fused kernels keep no scores."""

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h m d"]
    v: Float[Tensor, "b h m d"]
    bias: Float[Tensor, "..."] | None = None
    mask: Bool[Tensor, "..."] | None = None  # True where a key may be seen
    scale: float | None = None  # 1 / sqrt(d) where None

    def log_probabilities(self) -> Float[Tensor, "b h n m"]:
        """log softmax(q k^T * scale + bias) over the keys that may be seen, in float32 or better; -inf at the others."""
        scores = self.q @ self.k.transpose(-2, -1) * (self.q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.bias is not None:
            scores = scores + self.bias
        scores = scores if self.mask is None else scores.masked_fill(~self.mask, -math.inf)
        return scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def check_plain(attention: nn.Module) -> None:
    """Raises unless this forms its output as softmax(q k^T * scale + bias) v, of which losses and explanations know."""
    other = None if type(attention).mix is Attention.mix else attention  # type: ignore[attr-defined]
    position = attention.position
    if position is not None and type(position).attend is not ScorePosition.attend:  # type: ignore[union-attr]
        other = position  # type: ignore[assignment]
    if other is not None:
        raise DoesNotFit(f"{type(other).__name__} changes the scores in a way of its own; this works on plain softmax "
                         "attention alone (mixer='attention', position='learned', 'rotary' or 'none')")


@contextmanager
def watching(attention: nn.Module) -> Iterator[list[Seen]]:
    """Within, each call of this `Attention` adds what it was computed from to the list, with its graph."""
    check_plain(attention)
    seen: list[Seen] = []
    attention.watch = seen.append  # type: ignore[assignment]
    try:
        yield seen
    finally:
        attention.watch = None  # type: ignore[assignment]


class Attention(Part):
    """Multi-head softmax attention (Vaswani et al. 2017, arXiv 1706.03762).

    inner: width of all heads together, dim unless given. qkv_bias: as bias unless given. qk_norm: of each head's queries
    and keys, built as norm(width of a head). scale: of the scores, 1 / sqrt(width of a head) unless given.
    causal: no token sees a later one. window: it sees neighbours closer than this. position: a ScorePosition.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, inner: int | None = None, bias: bool = True,
                 qkv_bias: bool | None = None, qk_norm: Spec[nn.Module] | None = None, scale: float | None = None,
                 causal: bool = False, window: int | None = None, position: Spec[ScorePosition] | None = None) -> None:
        super().__init__(dim, place)
        if position is not None and not issubclass(position.target, ScorePosition):  # type: ignore[arg-type]
            raise DoesNotFit(f"{position.name} is added to the tokens, attention takes a position that works on scores; "
                             "give it to the model (position=), or take 'rotary'")
        self.heads, self.scale, self.causal, self.window = heads, scale, causal, window
        self.watch: Callable[[Seen], None] | None = None  # set by `watching`
        inner = inner or dim
        width = head_dim(inner, heads)
        self.position = None if position is None else position.offer(place=place)(width, heads)
        self.qkv = linear(dim, 3 * inner, bias=bias if qkv_bias is None else qkv_bias)
        self.q_norm = None if qk_norm is None else qk_norm(width)
        self.k_norm = None if qk_norm is None else qk_norm(width)
        self.proj = linear(inner, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        q, k, v = self.project(x)
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx)
        if ctx.cache is not None:
            if self.place in ctx.cache.states:
                past_k, past_v = ctx.cache.states[self.place]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            ctx.cache.states[self.place] = k, v
        return self.proj(join_heads(self.mix(q, k, v, ctx)))

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b h n d"], ...]:
        """Queries, keys and values of each head, before their positions."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return (q, k, v) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        """The heads' outputs, before they are joined: what papers that change the attention itself define anew."""
        if self.watch is not None:
            bias = None if self.position is None else self.position.bias(q.shape[2], k.shape[2], ctx)
            self.watch(Seen(q, k, v, bias, self._visible(q.shape[2], k.shape[2], ctx, q.device), self.scale))
        if self.position is not None:
            return self.position.attend(q, k, v, ctx, causal=self.causal, window=self.window, scale=self.scale)
        return attend(q, k, v, mask=ctx.mask, causal=self.causal, window=self.window, lengths=ctx.lengths,
                      scale=self.scale)

    def _visible(self, n: int, m: int, ctx: Ctx, device: torch.device) -> Bool[Tensor, "..."] | None:
        """The keys that each query may see, from all that hides some; None where nothing does."""
        mask = visible(n, m, self.causal, self.window, device) if self.causal or self.window is not None else None
        if ctx.lengths is not None:
            row = torch.arange(len(ctx.lengths), device=device).repeat_interleave(torch.tensor(ctx.lengths, device=device))
            same = row[:, None] == row
            mask = same if mask is None else mask & same
        return mask if ctx.mask is None else ctx.mask if mask is None else mask & ctx.mask


class CrossAttention(Part):
    """Queries from the tokens, keys and values from those of an encoder, ctx.memory (Vaswani et al. 2017, section 3.2.3).

    The mask of the memory's own Ctx hides its padding. With a cache, keys and values are projected once and kept.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads = heads
        self.q = linear(dim, dim, bias=bias)
        self.kv = linear(dim, 2 * dim, bias=bias)
        self.proj = linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.memory is None:
            raise DoesNotFit("cross attention needs the tokens of an encoder (ctx.memory), and here are none")
        memory, told = ctx.memory
        (q,) = split_heads(self.q(x), 1, self.heads)
        kept = None if ctx.cache is None else ctx.cache.states.get(self.place)
        k, v = split_heads(self.kv(memory), 2, self.heads) if kept is None else kept
        if ctx.cache is not None:
            ctx.cache.states[self.place] = k, v
        return self.proj(join_heads(attend(q, k, v, mask=told.mask)))


class Identity(Part):
    """No mixing at all: the control of MetaFormer's ablation."""

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x
