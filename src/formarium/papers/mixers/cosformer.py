"""cosFormer: Rethinking Softmax in Attention (Qin et al., ICLR 2022), arXiv 2202.08791.

New: linear attention with ReLU features (Eq. 8), so that no weight is negative, and a cosine that favours near tokens:
s_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j)/M) (Eq. 9). The cosine of a difference splits (Eq. 10), so features of
twice the width, [q sin, q cos], keep the product order that costs O(N) (Eqs. 11, 12).

Decisions: M is the longer of source and target of the current input, as the authors' code has it, unless `length` fixes
it; generation needs it fixed, since every weight depends on it. The authors' causal form stores a matrix a token; ours
works in chunks and carries a state. Positions count from 1, as in the code.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part
from ...core.spec import spec
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import linear
from ...parts.linear import causal_linear_attention, linear_attention
from ...weights.keys import FUSE_PAIR, Assumed, State, keymap, rule
from ..language.gpt import PRESETS as GPT
from ..language.gpt import host_settings

CARD = Card(
    title="cosFormer: Rethinking Softmax in Attention",
    authors="Zhen Qin, Weixuan Sun, Hui Deng, Dongxu Li, Yunshen Wei, Baohong Lv, Junjie Yan, Lingpeng Kong, Yiran Zhong",
    venue="ICLR 2022",
    arxiv="2202.08791",
    year=2022,
    code="https://github.com/OpenNLPLab/cosFormer",
    licence="Apache-2.0",
    kind="mixer",
    domain="language",
    tags=("linear attention", "efficient", "locality"),
    claim="ReLU features with cosine re-weighting match or beat softmax attention on language modelling and "
          "understanding, and are best on Long-Range Arena among the efficient models of their time.",
    variants={"nano": Published(note="ours: gpt/nano with this mixer")},
    hosts=("gpt/nano", "vit/nano"),
    can=("causal", "bidirectional", "cross", "cache"),
)


class CosFormer(Part):
    """Linear attention, re-weighted by the cosine of the distance.

    causal: no token sees a later one. length: M, at least the longest sequence; None: the current one's.
    reweight: False is plain linear attention with ReLU features, without the cosine. With ctx.memory the keys and values
    are the memory's tokens (cross attention). ctx.mask (B, 1, 1, M) hides keys.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, causal: bool = False,
                 length: int | None = None, reweight: bool = True) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads, self.causal, self.length, self.reweight = heads, causal, length, reweight
        self.q = linear(dim, dim, bias=bias)
        self.kv = linear(dim, 2 * dim, bias=bias)
        self.proj = linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.lengths is not None:
            raise DoesNotFit("cosFormer does not take packed batches: its weights depend on each sequence's length")
        source = x if ctx.memory is None else ctx.memory[0]
        seen = 0 if ctx.cache is None else ctx.cache.length
        before = seen if ctx.memory is None else 0  # keys that the cache holds already
        (q,), (k, v) = split_heads(F.relu(self.q(x)), 1, self.heads), split_heads(self.kv(source), 2, self.heads)
        k = F.relu(k)
        if ctx.mask is not None:
            if ctx.mask.shape[-2] != 1:
                raise DoesNotFit("cosFormer forms no scores, so a mask can hide keys (B, 1, 1, M) but not single pairs; "
                                 f"got {tuple(ctx.mask.shape)}")
            k = k * ctx.mask.transpose(-2, -1)
        if self.reweight:
            length = self._length(seen + x.shape[1], before + source.shape[1], cached=ctx.cache is not None)
            q, k = self._reweight(q, seen, length), self._reweight(k, before, length)
        if self.causal and ctx.memory is None:
            state = None if ctx.cache is None else ctx.cache.states.get(self.place)
            out, state = causal_linear_attention(q, k, v, state=state)
            if ctx.cache is not None:
                ctx.cache.states[self.place] = state
        else:
            out = linear_attention(q, k, v)
        return self.proj(join_heads(out))

    def _length(self, n: int, m: int, *, cached: bool) -> int:
        if self.length is None:
            if cached:
                raise DoesNotFit("cosFormer's weights depend on the length M: fix it with length= to decode with a cache")
            return max(n, m)
        if max(n, m) > self.length:
            raise DoesNotFit(f"cosFormer was built for at most {self.length} tokens (length=), got {max(n, m)}")
        return self.length

    def _reweight(self, x: Float[Tensor, "b h n d"], seen: int, length: int) -> Float[Tensor, "b h n 2*d"]:
        """[x sin(pi i / 2M), x cos(pi i / 2M)], Eq. 10."""
        i = torch.arange(seen + 1, seen + 1 + x.shape[2], device=x.device)
        angle = (math.pi / 2 / length * i)[:, None]
        return torch.cat((x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)), dim=-1)


PART = spec(CosFormer)

PRESETS = {"nano": GPT["nano"].but(mixer=PART)}

KEYS = {
    "authors": keymap(  # one attention layer: the authors released no whole model
        rule("q_proj.*", "q.*"),
        rule(("k_proj.weight", "v_proj.weight"), "kv.weight", FUSE_PAIR),
        rule(("k_proj.bias", "v_proj.bias"), "kv.bias", FUSE_PAIR),
        rule("out_proj.*", "proj.*"),
        makes="part",
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Of the part: its width. Of a model: all sizes. Untold by the tensors: the heads, 64 channels each are taken where no
    preset has the width; the length M of a part."""
    if "q.weight" not in state:
        return host_settings(state, PRESETS) | {"mixer": PART}
    dim = state["q.weight"].shape[0]
    return {"dim": dim, "bias": "q.bias" in state,
            "heads": Assumed(max(1, dim // 64), "leaves no trace in the tensors; 64 channels each"),
            "causal": Assumed(False, "leaves no trace in the tensors; as the authors' code has it, unless asked otherwise")}
