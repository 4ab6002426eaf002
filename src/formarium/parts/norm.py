"""Normalisations on tokens (B, N, C). Called as norm(dim)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PARTS = {
    "norm": {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "group_norm": "GroupNorm", "none": "NoNorm"},
}


class LayerNorm(nn.LayerNorm):
    def __init__(self, dim: int, *, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)


class RMSNorm(nn.RMSNorm):
    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)


class GroupNorm(nn.Module):
    """One group: mean and variance over all tokens and channels of a sample, scale and shift for each channel."""

    across_tokens = True  # so a decoder refuses it

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        # layer_norm over both axes: group_norm wants channels first, and the tokens would come back strided
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[1:], eps=self.eps), self.weight)


class NoNorm(nn.Identity):
    def __init__(self, dim: int) -> None:
        super().__init__()


class BatchNorm(nn.Module):
    """Batch norm of maps (B, C, *). Without a count of steps, which a fixed momentum does not need."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "b c *d"]) -> Float[Tensor, "b c *d"]:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum,
                            self.eps)
