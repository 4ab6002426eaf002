"""The one place that chooses how softmax attention is computed. No part and no paper picks a kernel.

Measured on a 2-core AVX2 machine (`benchmarks/attention.py` re-measures): without a bias writing the product out is faster
in training up to about 64 tokens; with a bias always, up to about 256; a sliding window pays from about 1,024 tokens up.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.errors import DoesNotFit

EXPLICIT_TOKENS = 64  # windows of at most this many tokens are written out, on CPU
BIASED_TOKENS = 256  # the same with a bias: fused attention falls back to a slower form then
BANDED_TOKENS = 1024  # sequences of at least this many tokens use the banded form of a sliding window
CHUNK_TOKENS = 1024  # of them the banded form works on at a time


def attend(q: Float[Tensor, "*b h n d"], k: Float[Tensor, "*b hk m d"], v: Float[Tensor, "*b hk m e"], *,
           bias: Float[Tensor, "..."] | None = None, mask: Bool[Tensor, "..."] | None = None, causal: bool = False,
           window: int | None = None, lengths: Sequence[int] | None = None,
           scale: float | None = None) -> Float[Tensor, "*b h n e"]:
    """softmax(q k^T * scale + bias) v over the keys that may be seen.

    bias: added to the scores; mask: True where a key may be seen; both broadcast to (*B, heads, N, M).
    causal: query i sees keys up to i + M - N (the sequences end together). window: it sees keys closer than this,
    on both sides, or behind it if causal. lengths: tokens of each sequence of a packed row (B = 1); none sees another.
    hk may divide h (grouped queries). scale: 1 / sqrt(d) unless given.
    """
    if lengths is not None:
        return _packed(q, k, v, lengths, bias=bias, mask=mask, causal=causal, window=window, scale=scale)
    if k.shape[-3] != q.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    n, m = q.shape[-2], k.shape[-2]
    if window is not None and window >= max(n, m):
        window = None
    if window is not None and n == m >= BANDED_TOKENS and 4 * window <= n and bias is None and mask is None and q.ndim == 4:
        return _banded(q, k, v, window, causal, scale)
    if window is not None or (causal and (n != m or mask is not None or bias is not None)):
        if not (causal and window is None and n == 1):  # one new token sees every key
            seen = visible(n, m, causal, window, q.device)
            mask = seen if mask is None else mask & seen
        causal = False
    few = EXPLICIT_TOKENS if bias is None else BIASED_TOKENS
    if n * m <= few**2 and not causal and q.device.type == "cpu":
        return _explicit(q, k, v, bias, mask, scale)
    if bias is not None and mask is not None:
        bias, mask = bias.masked_fill(~mask, -math.inf), None
    added: Tensor | None = mask if bias is None else bias
    leading = q.shape[:-3]
    if q.ndim > 4:  # the fused kernels take four axes
        added = None if added is None else added.expand(*q.shape[:-1], m).flatten(0, -4)
        q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal and n > 1, scale=scale)
    return out.unflatten(0, leading) if len(leading) > 1 else out


def visible(n: int, m: int, causal: bool, window: int | None, device: torch.device | None = None) -> Bool[Tensor, "n m"]:
    """True where query i of n may see key j of m; the sequences end together."""
    ahead = torch.arange(m, device=device) - (torch.arange(n, device=device)[:, None] + m - n)
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None) -> Tensor:
    # k.contiguous(): matmul would copy a strided k transposed, which takes twice as long
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.contiguous().transpose(-2, -1)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, scale: float | None) -> Tensor:
    """Exact sliding window: each block of queries sees a span of keys, its own block and those within the window.

    The spans overlap. They are views of the keys, not copies, in chunks of the sequence that stay in the cache.
    """
    b, h, n, _ = q.shape
    block = 64 * math.ceil(window / 256)
    reach = math.ceil((window - 1) / block)  # blocks behind (and ahead) that a window can touch
    behind, ahead = reach * block, 0 if causal else reach * block
    span = behind + block + ahead
    chunk = max(CHUNK_TOKENS // block, reach) * block
    away = torch.arange(-behind, block + ahead, device=q.device) - torch.arange(block, device=q.device)[:, None]
    near = (away.abs() < window) & (away <= 0 if causal else torch.ones_like(away, dtype=torch.bool))
    qs, ks, vs = (F.pad(t, (0, 0, 0, -n % block)).flatten(0, 1).split(chunk, dim=1) for t in (q, k, v))
    out = []
    for i, queries in enumerate(qs):
        start, stop = i * chunk - behind, i * chunk + queries.shape[1] + ahead
        keys, values = (_with_neighbours(t, i, behind, ahead).unfold(1, span, block).permute(1, 0, 3, 2) for t in (ks, vs))
        mask = near
        if start < 0 or stop > n:
            place = torch.arange(start, stop, device=q.device)
            real = ((place >= 0) & (place < n)).unfold(0, span, block)[:, None, None]
            mask = near & real | (away == 0)  # padded queries see themselves, so that no row is empty
        queries = queries.unflatten(1, (-1, block)).transpose(0, 1)
        answers = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        out.append(answers.transpose(0, 1).flatten(1, 2))
    return torch.cat(out, dim=1)[:, :n].unflatten(0, (b, h))


def _with_neighbours(chunks: Sequence[Tensor], i: int, behind: int, ahead: int) -> Tensor:
    """Chunk i (B, N, D) with the last tokens of the one before it and the first of the next, or zeros."""
    own = chunks[i]
    before = chunks[i - 1][:, chunks[i - 1].shape[1] - behind:] if i else own.new_zeros(own.shape[0], behind, own.shape[2])
    after = chunks[i + 1][:, :ahead] if i + 1 < len(chunks) else own[:, :0]
    missing = own.new_zeros(own.shape[0], ahead - after.shape[1], own.shape[2])
    return torch.cat((before, own, after, missing), dim=1)


def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, bias: Tensor | None, mask: Tensor | None,
            causal: bool, window: int | None, scale: float | None) -> Tensor:
    """Sequence by sequence; those of equal length together."""
    masked = None if mask is None else tuple(mask.shape)
    if q.shape[0] != 1 or sum(lengths) != q.shape[2] or bias is not None or masked not in (None, (1, 1, 1, q.shape[2])):
        raise DoesNotFit(f"packed attention takes one row of {sum(lengths)} tokens, without a bias, and a mask of keys "
                         f"(1, 1, 1, {sum(lengths)}) or none; got {tuple(q.shape)}, mask {masked}")
    rows = [t.split(list(lengths), dim=2) for t in (q, k, v)]
    masks = None if mask is None else mask.split(list(lengths), dim=3)
    out: list[Tensor] = [q] * len(lengths)
    for length in set(lengths):
        same = [i for i, n in enumerate(lengths) if n == length]
        group = [torch.cat([row[i] for i in same]) for row in rows]
        seen = None if masks is None else torch.cat([masks[i] for i in same])
        answers = attend(*group, mask=seen, causal=causal, window=window, scale=scale)
        for i, answer in zip(same, answers.split(1), strict=True):
            out[i] = answer
    return torch.cat(out, dim=2)
