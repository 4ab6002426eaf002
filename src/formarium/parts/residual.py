"""Residual schemes: where the norm stands, how the branch is scaled and dropped."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx, Place
from ..core.part import Part, Residual
from ..core.spec import Spec, spec
from .norm import LayerNorm

PARTS = {
    "residual": {"pre_norm": "PreNorm", "post_norm": "PostNorm"},
}


def drop_path(x: Tensor, rate: float, training: bool, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): each sample's branch is dropped with probability `rate`, the rest scaled up.

    lengths: of the sequences of a packed row (1, N, C), each of which is dropped on its own.
    """
    if not training or rate == 0:
        return x
    if lengths is not None:
        keep = torch.rand(len(lengths), device=x.device) >= rate
        keep = keep.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=x.shape[1])[None, :, None]
    else:
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


def start_residuals(model: nn.Module) -> None:
    """Lets each residual scheme have its word on the initial weights; hosts call it when they have set theirs."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.start()


class PreNorm(Residual):
    """x + scale * drop(inner(norm(x))). The drop rate grows linearly with depth, up to `drop_path`.

    even_drop: the same rate in every layer. layer_scale: a learned factor a channel, started at this value (CaiT, arXiv
    2103.17239).
    """

    def __init__(self, dim: int, place: Place, inner: Part, *, norm: Spec[nn.Module] = spec(LayerNorm),
                 drop_path: float = 0.0, even_drop: bool = False, layer_scale: float | None = None) -> None:
        super().__init__(dim, place, inner)
        self.norm = norm(dim)
        self.rate = drop_path if even_drop else drop_path * place.layer / max(1, place.depth - 1)
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def branch(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        x = self.inner(x, ctx)
        return drop_path(x if self.scale is None else x * self.scale, self.rate, self.training, ctx.lengths)

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return state + self.branch(self.norm(state), ctx)


class PostNorm(PreNorm):
    """norm(x + scale * drop(inner(x))), as the first Transformer had it."""

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return self.norm(state + self.branch(state, ctx))
