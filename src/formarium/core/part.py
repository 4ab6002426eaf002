"""The three plugs that papers fill: a part keeps the token set, a resample changes it, a residual wraps a part."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .ctx import Ctx, Place


class Part(nn.Module):
    """A token mixer or channel mixer: (B, N, C) -> (B, N, C). Options are keyword-only, after `dim` and `place`.

    `undecayed` names own parameters that weight decay must leave alone (tables, scales that start at one).
    """

    undecayed: tuple[str, ...] = ()

    def __init__(self, dim: int, place: Place) -> None:
        super().__init__()
        self.dim, self.place = dim, place

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        raise TypeError(f"{type(self).__name__} must define forward")


class Resample(nn.Module):
    """Changes the token set: patch embedding, merging, class token, pruning. Returns the tokens and what is now true."""

    undecayed: tuple[str, ...] = ()

    def forward(self, x: Tensor, ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define forward")


class Residual(nn.Module):
    """How a part's output joins the stream: norm placement, scaling, drop path, history.

    The state that passes from sublayer to sublayer is the residual's own affair: the first sublayer of a stack makes it
    with `enter`, the last gives the tokens back with `leave`.
    """

    undecayed: tuple[str, ...] = ()

    def __init__(self, dim: int, place: Place, inner: Part) -> None:
        super().__init__()
        self.place, self.inner = place, inner

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return x

    def forward(self, state: Any, ctx: Ctx) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward")

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return state
