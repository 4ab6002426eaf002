"""Channel mixers: what happens to each token on its own."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx, Place
from ..core.part import Part

PARTS = {
    "channel": {"mlp": "Mlp", "swiglu": "SwiGLU"},
}


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that starts at Xavier's uniform weights and zero bias: right at any width."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def restart_linears(model: nn.Module, std: float | None) -> None:
    """All linear layers from a truncated normal, as many papers at widths of 400 to 1,000 have it; None: left alone."""
    for module in model.modules():
        if std is not None and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)


class Mlp(Part):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, bias: bool = True, approximate: bool = False) -> None:
        super().__init__(dim, place)
        self.approximate = "tanh" if approximate else "none"
        self.fc1 = linear(dim, int(dim * ratio), bias=bias)
        self.fc2 = linear(int(dim * ratio), dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(Part):
    """(silu(x W) * x V) W2 (Shazeer 2020, arXiv 2002.05202), at the parameters of an Mlp of the same ratio."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, bias: bool = False) -> None:
        super().__init__(dim, place)
        hidden = round(dim * ratio * 2 / 3)
        self.fc1 = linear(dim, 2 * hidden, bias=bias)
        self.fc2 = linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)
