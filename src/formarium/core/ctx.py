"""What is true of a token set, and where a part stands in the net."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from .errors import DoesNotFit


class Place(NamedTuple):
    """Where a part stands: layer `layer` of `depth`, counted over the whole net; `nth` counts within its stage.

    sub, subs: which sublayer of its layer (0 the first), of how many.
    """

    layer: int = 0
    depth: int = 1
    nth: int = 0
    stage: int = 0
    stages: int = 1
    sub: int = 0
    subs: int = 1

    @property
    def ends_layer(self) -> bool:
        return self.sub == self.subs - 1


@dataclass
class Cache:
    """Decoding state. A part keeps its own under `states[self.place]`; `length` counts the tokens already seen."""

    length: int = 0
    states: dict[Place, Any] = field(default_factory=dict)


@dataclass
class Ctx:
    """Side information of tokens x (B, N, C). A closed list; parts write to `shared` and `cache.states` only.

    grid: (H, W) or (D, H, W) of the tokens after the prefix; None once they were dropped, merged or sorted.
    prefix: leading class or register tokens, not part of the grid.
    coords: positions (B, N, d) where they are not simply 0, 1, 2, ...
    mask: True where a key may be attended to, broadcastable to (B, heads, N, M).
    lengths: tokens of each sequence where x is one packed row (1, sum(lengths), C).
    memory: tokens and Ctx of an encoder, for cross mixing. cond: conditioning vector (B, D).
    cache: decoding state. shared: values passed between layers of one stage; assigned, never appended (layers may run
    twice under gradient checkpointing).
    """

    grid: tuple[int, ...] | None = None
    prefix: int = 0
    coords: Float[Tensor, "b n d"] | None = None
    mask: Bool[Tensor, "..."] | None = None
    lengths: tuple[int, ...] | None = None
    memory: "tuple[Tensor, Ctx] | None" = None
    cond: Float[Tensor, "b d"] | None = None
    cache: Cache | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def need_grid(self, who: object, *, prefix: bool = False) -> tuple[int, ...]:
        """The grid, for a part that works on neighbours; raises where the tokens no longer form one.

        prefix: `who` can take tokens before the grid.
        """
        if self.grid is None:
            raise DoesNotFit(f"{type(who).__name__} needs tokens on a full grid; these are a sequence, or were dropped, "
                             "merged or sorted before it")
        if self.prefix and not prefix:
            raise DoesNotFit(f"{type(who).__name__} needs tokens on a grid and nothing before it, here are {self.prefix} "
                             "class or register tokens; build the model without them (pool='mean')")
        return self.grid
