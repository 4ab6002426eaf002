"""Linear attention: non-negative features of queries and keys, products taken in the order that costs O(N)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6  # smallest denominator


def linear_attention(q: Float[Tensor, "b h n f"], k: Float[Tensor, "b h m f"],
                     v: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n d"]:
    """q (sum_j k_j v_j^T) / q . sum_j k_j: every query sees every key."""
    weighted = q @ (k.transpose(-2, -1) @ v)
    return weighted / (q @ k.sum(-2)[..., None]).clamp_min(EPS)


def causal_linear_attention(
    q: Float[Tensor, "b h n f"], k: Float[Tensor, "b h n f"], v: Float[Tensor, "b h n d"], *,
    state: Float[Tensor, "b h f e"] | None = None, chunk: int = 64,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h f e"]]:
    """As `linear_attention` over the keys up to each query's own; returns the answers and the state behind them.

    Within a chunk the scores are written out under a triangular mask; what lies before the chunk comes from the running
    sum of k v^T. The denominator is carried as one more column of v, so e = d + 1.
    """
    n = q.shape[2]
    v = F.pad(v, (0, 1), value=1.0)
    if n == 1:
        added = k.transpose(-2, -1) @ v
        state = added if state is None else state + added
        out = q @ state
        return out[..., :-1] / out[..., -1:].clamp_min(EPS), state
    chunks = math.ceil(n / chunk)
    q, k, v = (F.pad(t, (0, 0, 0, chunks * chunk - n)).unflatten(2, (chunks, chunk)) for t in (q, k, v))
    sums = (k.transpose(-2, -1) @ v).cumsum(2)  # (B, H, chunks, F, D + 1): after each chunk
    first = torch.zeros_like(sums[:, :, :1]) if state is None else state[:, :, None]
    before = torch.cat((first, sums[:, :, :-1] + first), dim=2)
    out = q @ before + (q @ k.transpose(-2, -1)).tril() @ v
    out = out.flatten(2, 3)[:, :, :n]
    return out[..., :-1] / out[..., -1:].clamp_min(EPS), sums[:, :, -1] + first[:, :, 0]
