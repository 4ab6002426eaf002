"""Softmax attention as a token mixer, and the two trivial mixers."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.ctx import Ctx, Place
from ..core.errors import DoesNotFit
from ..core.part import Part
from ..core.spec import Spec
from .attend import attend
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


class Attention(Part):
    """Multi-head softmax attention (Vaswani et al. 2017, arXiv 1706.03762).

    causal: no token sees a later one. window: it sees neighbours closer than this. position: a ScorePosition.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, causal: bool = False,
                 window: int | None = None, position: Spec[ScorePosition] | None = None) -> None:
        super().__init__(dim, place)
        if position is not None and not issubclass(position.target, ScorePosition):  # type: ignore[arg-type]
            raise DoesNotFit(f"{position.name} is added to the tokens, attention takes a position that works on scores; "
                             "give it to the model (position=), or take 'rotary'")
        self.heads, self.causal, self.window = heads, causal, window
        self.position = None if position is None else position.offer(place=place)(head_dim(dim, heads), heads)
        head_dim(dim, heads)
        self.qkv = linear(dim, 3 * dim, bias=bias)
        self.proj = linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx)
        if ctx.cache is not None:
            if self.place in ctx.cache.states:
                past_k, past_v = ctx.cache.states[self.place]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            ctx.cache.states[self.place] = k, v
        bias = None if self.position is None else self.position.bias(q.shape[2], k.shape[2], ctx)
        x = attend(q, k, v, bias=bias, mask=ctx.mask, causal=self.causal, window=self.window, lengths=ctx.lengths)
        return self.proj(join_heads(x))


class Identity(Part):
    """No mixing at all: the control of MetaFormer's ablation."""

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x
