"""The three plugs that papers fill: a part keeps the token set, a resample changes it, a residual wraps a part."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    def start(self) -> None:
        """The last word on the initial weights of `inner`, for schemes that say what they are."""

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return x

    def forward(self, state: Any, ctx: Ctx) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward")

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return state

    def run(self, layers: Sequence[Sequence[tuple["Residual", Ctx]]], state: Any, again: bool) -> Any:
        """The state after these layers: sublayers in order, each with what it is told.

        again: run each layer a second time in the backward pass instead of keeping its activations.
        """
        for layer in layers:
            state = checkpoint(_through, layer, state, use_reentrant=False) if again else _through(layer, state)
        return state


def _through(layer: Sequence[tuple[Residual, Ctx]], state: Any) -> Any:
    for sublayer, ctx in layer:
        state = sublayer(state, ctx)
    return state
