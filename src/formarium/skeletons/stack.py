"""Layers of sublayers, each wrapped by a residual scheme."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx, Place
from ..core.part import Part, Resample, Residual
from ..core.spec import Spec

Sublayers = Mapping[str, Spec[Part] | Sequence[Spec[Part]]]


class Stack(nn.Module):
    """`depth` layers; each holds the named sublayers in order, e.g. {"mixer": spec(Attention), "channel": spec(Mlp)}.

    A sublayer given as several Specs takes turns: layer i gets number i modulo their count (shifted windows, hybrids).
    resample: applied to the tokens first (patch merging between stages). place: the stack's first layer, with the depth
    of the whole net.
    """

    def __init__(self, dim: int, depth: int, sublayers: Sublayers, residual: Spec[Residual], *,
                 place: Place | None = None, resample: Resample | None = None) -> None:
        super().__init__()
        place = place or Place(depth=depth)
        self.dim, self.depth, self.checkpointing = dim, depth, False
        self.resample = resample
        self.layers = nn.ModuleList()
        for i in range(depth):
            layer = nn.ModuleDict()
            for j, (name, entry) in enumerate(sublayers.items()):
                at = place._replace(layer=place.layer + i, nth=i, sub=j, subs=len(sublayers))
                part = entry if isinstance(entry, Spec) else entry[i % len(entry)]
                layer[name] = residual(dim, at, part(dim, at))
            self.layers.append(layer)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx, _ = self.intermediates(x, ctx, ())
        return x, ctx

    def intermediates(self, x: Float[Tensor, "b n c"], ctx: Ctx, taps: Sequence[int]) -> tuple[Tensor, Ctx, list[Tensor]]:
        """As forward, with the tokens after each of the layers `taps`."""
        if self.resample is not None:
            x, ctx = self.resample(x, ctx)
        return self.span(x, ctx, taps, range(self.depth))

    def span(self, x: Float[Tensor, "b n c"], ctx: Ctx, taps: Sequence[int],
             layers: range) -> tuple[Tensor, Ctx, list[Tensor]]:
        """As `intermediates`, through these successive layers alone."""
        ctx = replace(ctx, shared={})  # values shared between layers must not leak into a stage of another width
        if not layers:
            return x, ctx, []
        state, seen, done = self._end(layers[0]).enter(x), [], layers[0]
        for last in sorted({*(t for t in taps if t in layers), layers[-1]}):
            told = [self._layer(i, ctx) for i in range(done, last + 1)]
            state, done = self._end(last).run(told, state, self.checkpointing and self.training), last + 1
            if last in taps:
                seen.append(self._end(last).leave(state))
        return self._end(layers[-1]).leave(state), ctx, seen

    def _layer(self, i: int, ctx: Ctx) -> list[tuple[Residual, Ctx]]:
        """The sublayers of layer i in order, each with what it is told."""
        return [(sublayer, ctx) for sublayer in self.layers[i].values()]  # type: ignore[operator]

    def _end(self, i: int) -> Residual:
        """The last sublayer of layer i: the one that knows how to enter and leave the state."""
        return list(self.layers[i].values())[-1]  # type: ignore[operator, return-value]
