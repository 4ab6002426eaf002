"""Positions: added to the tokens once (AbsolutePosition), or working on the scores of every layer (ScorePosition)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx
from ..core.errors import DoesNotFit
from ..core.spec import Spec, spec
from ..weights.adapt import Change, refit_map
from .attend import attend

PARTS = {
    "position": {"learned": "LearnedPosition", "rotary": "Rotary", "none": "NoPosition"},
}


class AbsolutePosition(nn.Module):
    """Changes the tokens once, where they are embedded. Built as position(dim, tokens)."""

    undecayed: tuple[str, ...] = ()

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.dim, self.tokens = dim, tokens

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        raise TypeError(f"{type(self).__name__} must define forward")


class ScorePosition(nn.Module):
    """Works inside a mixer that forms scores of queries and keys. Built as position(head_dim, heads), one a layer.

    One that must know its layer has an option `place`, which the mixer offers.
    """

    undecayed: tuple[str, ...] = ()

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, heads

    def rotate(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same new tokens, changed by their positions."""
        return q, k

    def bias(self, n: int, m: int, ctx: Ctx) -> Float[Tensor, "b h n m"] | None:
        """Added to the scores of the last n of m tokens."""
        return None

    def weigh(self, scores: Float[Tensor, "*b h n m"], ctx: Ctx) -> Float[Tensor, "*b h n m"]:
        """The scaled scores, each by a factor, before `bias` is added. For mixers that write their scores out; positions
        that define it define `attend` too, for those that do not."""
        return scores

    def attend(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], ctx: Ctx, *,
               causal: bool, window: int | None, scale: float | None) -> Float[Tensor, "b h n d"]:
        """The heads' outputs. Defined anew by positions that depend on queries, keys or values, or multiply the scores."""
        return attend(q, k, v, bias=self.bias(q.shape[2], k.shape[2], ctx), mask=ctx.mask, causal=causal, window=window,
                      lengths=ctx.lengths, scale=scale)


def seat(position: Spec[Any], mixer: Spec[Any]) -> tuple[Spec[Any], Spec[AbsolutePosition]]:
    """Where a position works: (mixer, position) with a ScorePosition handed to the mixer, which must take one."""
    if issubclass(position.target, AbsolutePosition):  # type: ignore[arg-type]
        return mixer, position
    why = f"{position.name} works on the scores of attention; take position='learned' or 'none'"
    return mixer.require(why, position=position), spec(NoPosition)


def positions(n: int, ctx: Ctx, device: torch.device) -> Float[Tensor, "b n"]:
    """Where the n new tokens stand: coords if given, else counted on from the cache, afresh in each packed sequence."""
    if ctx.coords is not None:
        return ctx.coords[..., 0]
    if ctx.lengths is not None:
        return torch.cat([torch.arange(length, device=device) for length in ctx.lengths])[None]
    start = 0 if ctx.cache is None else ctx.cache.length
    return torch.arange(start, start + n, device=device)[None]


class LearnedPosition(AbsolutePosition):
    """One learned vector a place.

    grid: the places are cells of a map of these sides, after `prefix` of class or register tokens; None: of a sequence.
    """

    undecayed = ("table",)
    adapts = ("img_size", "patch", "context")

    def __init__(self, dim: int, tokens: int, *, std: float = 0.02, grid: tuple[int, ...] | None = None,
                 prefix: int = 0) -> None:
        super().__init__(dim, tokens)
        if grid is not None and prefix + math.prod(grid) != tokens:
            raise DoesNotFit(f"{prefix} tokens before a grid of {'x'.join(map(str, grid))} are not {tokens} tokens")
        self.grid, self.prefix = grid, prefix
        self.table = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.lengths is not None or ctx.coords is not None:
            return x + self.table[0, positions(x.shape[1], ctx, x.device).long()]
        start = 0 if ctx.cache is None else ctx.cache.length
        if start + x.shape[1] > self.tokens:
            raise DoesNotFit(f"learned positions for {self.tokens} tokens, got {start + x.shape[1]}; build the model with "
                             "a longer context, or with position='rotary'")
        return x + self.table[:, start:start + x.shape[1]]

    def refit(self, name: str, tensor: Tensor | None, was: "LearnedPosition") -> Change | None:
        if name != "table" or tensor is None:
            return None
        if (self.prefix, self.grid is None) != (was.prefix, was.grid is None):
            of = ["a sequence" if p.grid is None else "a grid" for p in (was, self)]
            raise DoesNotFit(f"the file has {was.prefix} tokens before {of[0]}, the model {self.prefix} before {of[1]}")
        if self.grid is not None and was.grid is not None:
            return None if self.grid == was.grid else refit_map(tensor, 1, was.grid, self.grid, prefix=self.prefix)
        if self.tokens < was.tokens:
            return Change(tensor[:, :self.tokens], f"the first {self.tokens} of {was.tokens} positions kept")
        if self.tokens > was.tokens:
            return refit_map(tensor, 1, (was.tokens,), (self.tokens,))._replace(grows=True)
        return None


class NoPosition(AbsolutePosition):
    """Nothing: the order is left to the mixer."""

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x


class Rotary(ScorePosition):
    """Queries and keys turned by angles that grow with the position (RoFormer, Su et al. 2021, arXiv 2104.09864).

    interleaved: neighbours (2i, 2i+1) are turned together, as in the paper; else i and i + d/2, as in LLaMA.
    """

    def __init__(self, head_dim: int, heads: int, *, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__(head_dim, heads)
        if head_dim % 2:
            raise DoesNotFit(f"rotary positions turn pairs of channels: the head size must be even, got {head_dim}")
        self.base, self.interleaved = base, interleaved

    def rotate(self, q: Tensor, k: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        key = f"rotary {self.head_dim} {self.base} {self.interleaved}"
        if key not in ctx.shared:  # the same for every layer of the stage
            freqs = self.base ** (-torch.arange(0, self.head_dim, 2, device=q.device) / self.head_dim)  # always float32
            angle = positions(q.shape[2], ctx, q.device)[:, None, :, None] * freqs
            ctx.shared[key] = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        cos, sin = ctx.shared[key]
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
