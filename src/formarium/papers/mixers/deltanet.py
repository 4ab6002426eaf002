"""Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang, Wang, Zhang, Shen, Kim,
NeurIPS 2024), arXiv 2406.06484. The delta rule in attention is from Schlag et al. 2021, arXiv 2102.11174.

New: a state S that is corrected, not only added to. Token t writes the part of its value that its key does not give yet,
S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, and reads o_t = S_t^T q_t / sqrt(d). The transitions I - beta k k^T are
Householder-like, and their product over a chunk has the WY form I - sum_j k_j w_j^T. So a chunk of C tokens needs one
triangular solve and matrix products, and only the chunks follow one another: O(N C d + N d^2).

The layer: queries, keys and values pass a causal depthwise convolution and SiLU; queries and keys are L2-normalised, beta
is a sigmoid a head; the answers are RMS-normalised a head before the output projection. No positions.

Decisions: the rule runs in float32 at least, as the authors' kernels accumulate. The norm of q and k is
sqrt(sum x^2 + 1e-6), theirs. Queries, keys and values share one projection and one convolution. "l1" is their "sum" for
features that are not negative, and stays finite for others. Their output gate (off in every published model) is not here.
Sizes are those of the authors' configurations; "340M" and "1.3B" do not count the head, which is not tied. The hybrids'
attention has rotary positions, as their code has it; their window is not in the weights, 2,048 as in their example is
taken. The card's perplexities are quoted from memory of the paper's table.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part
from ...core.spec import spec
from ...parts.attention import Attention, head_dim, join_heads, split_heads
from ...parts.channel import SwiGLU, linear
from ...parts.norm import RMSNorm
from ...parts.position import NoPosition, Rotary
from ...weights.keys import FUSE_PAIR, TIED, Assumed, Op, Options, State, drop, keymap, rule, told_ratio
from ..language.gpt import GPT, host_settings
from ..language.gpt import PRESETS as GPTS

CARD = Card(
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    authors="Songlin Yang, Bailin Wang, Yu Zhang, Yikang Shen, Yoon Kim",
    venue="NeurIPS 2024",
    arxiv="2406.06484",
    year=2024,
    code="https://github.com/fla-org/flash-linear-attention",
    licence="MIT",
    kind="mixer",
    domain="language",
    tags=("linear attention", "delta rule", "recurrent", "efficient", "hybrid"),
    claim="A 1.3B DeltaNet trained on 100B tokens beats Mamba and GLA in perplexity and on tasks that need recall; with a "
          "few attention layers it beats strong Transformers.",
    variants={
        "nano": Published(note="ours: gpt/nano with this mixer"),
        "340m": Published(input=(2048,), results={"WikiText perplexity": 28.24}, note="15B tokens of SlimPajama"),
        "1.3b": Published(input=(2048,), results={"WikiText perplexity": 16.87}, note="100B tokens of SlimPajama"),
        "340m_sliding": Published(input=(2048,), note="sliding-window attention in every other layer"),
        "1.3b_sliding": Published(input=(2048,), results={"WikiText perplexity": 16.56},
                                  note="sliding-window attention in every other layer"),
        "340m_global": Published(input=(2048,), note="attention in the second layer and in the one after the middle"),
        "1.3b_global": Published(input=(2048,), results={"WikiText perplexity": 16.55},
                                 note="attention in the second layer and in the one after the middle"),
    },
    hosts=("gpt/nano",),
    can=("causal", "cache", "packed"),
)

EPS = 1e-6  # added to the squared norm of queries and keys; smallest l1 norm
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x,
}
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt(),
    "l1": lambda x: F.normalize(x, p=1, dim=-1, eps=EPS),
}


def delta_rule(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], beta: Float[Tensor, "b h n"], *,
    state: Float[Tensor, "b h d e"] | None = None, chunk: int = 64,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """o_t = S_t^T q_t / sqrt(d), S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T: the answers, in v's type, and the
    last S, in float32 at least. state: S before the first token; None: zero. chunk: tokens solved for together.

    Within a chunk S_t = S + sum_{j<=t} k_j u_j^T, where u_t = beta_t (v_t - S^T k_t - sum_{j<t} (k_t . k_j) u_j): a unit
    triangular system, solved for v and for k before S is known (the WY form).
    """
    n, d, e, answer = q.shape[2], k.shape[3], v.shape[3], v.dtype
    exact = torch.promote_types(answer, torch.float32)
    q, k, v, beta = q.to(exact) * d**-0.5, k.to(exact), v.to(exact), beta.to(exact)[..., None]
    if state is None:
        state = k.new_zeros(*k.shape[:2], d, e)
    if n == 1:
        state = state + k.transpose(-2, -1) @ (beta * (v - k @ state))
        return (q @ state).to(answer), state
    chunk = min(chunk, n)
    chunks = math.ceil(n / chunk)
    # padded tokens have k = 0 and beta = 0: they write nothing
    q, k, v, beta = (F.pad(t, (0, 0, 0, chunks * chunk - n)).unflatten(2, (chunks, chunk)) for t in (q, k, v, beta))
    # not by powers of the matrix, which cancel where keys repeat; only what is below the diagonal is read
    system, right = (beta * k) @ k.transpose(-2, -1), torch.cat((beta * v, beta * k), dim=-1)
    solved = torch.linalg.solve_triangular(system.to(exact), right, upper=False, unitriangular=True)
    u, w = solved.split((e, d), dim=-1)
    scores = (q @ k.transpose(-2, -1)).tril()
    out = []
    for q_i, k_i, u_i, w_i, scores_i in zip(*(t.unbind(2) for t in (q, k, u, w, scores)), strict=True):
        u_i = u_i - w_i @ state
        out.append(q_i @ state + scores_i @ u_i)
        state = state + k_i.transpose(-2, -1) @ u_i
    return torch.stack(out, dim=2).flatten(2, 3)[:, :, :n].to(answer), state


class ShortConv(nn.Module):
    """A causal depthwise convolution over tokens (B, N, C), without bias. `past`: its last size - 1 inputs."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(dim, 1, size))
        nn.init.uniform_(self.weight, -size**-0.5, size**-0.5)  # as nn.Conv1d starts

    def forward(self, x: Float[Tensor, "b n c"], past: Float[Tensor, "b m c"] | None) -> tuple[Tensor, Tensor]:
        """The answers, and `past` for the tokens that follow."""
        x = F.pad(x, (0, 0, self.size - 1, 0)) if past is None else torch.cat((past, x), dim=1)
        out = F.conv1d(x.transpose(1, 2), self.weight, groups=x.shape[2]).transpose(1, 2)
        return out, x[:, x.shape[1] - self.size + 1:]


class DeltaNet(Part):
    """The delta rule as a causal token mixer.

    expand_k, expand_v: width of keys and values, in units of dim. conv: tokens that the short convolution sees; None: no
    convolution, which the authors advise against. qk_activation: "silu", "relu", "elu" (+ 1) or "identity"; qk_norm: "l2"
    or "l1". beta_max: 2 lets the transitions have negative eigenvalues (arXiv 2411.12537). chunk: tokens solved for
    together, for speed alone. eps: of the output norm.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, causal: bool = True, expand_k: float = 1.0,
                 expand_v: float = 1.0, conv: int | None = 4, qk_activation: str = "silu", qk_norm: str = "l2",
                 beta_max: float = 1.0, chunk: int = 64, eps: float = 1e-5) -> None:
        super().__init__(dim, place)
        if not causal:
            raise DoesNotFit("DeltaNet has no form that sees later tokens: its state is built from first to last; "
                             "take causal=True")
        for what, name, known in (("query and key activation", qk_activation, ACTIVATIONS),
                                  ("query and key norm", qk_norm, NORMS)):
            if name not in known:
                raise unknown(what, name, known)
        if chunk < 1 or (conv is not None and conv < 1):
            raise DoesNotFit(f"chunk and conv are 1 or more (conv=None: no convolution), got {chunk} and {conv}")
        self.heads, self.beta_max, self.chunk = heads, beta_max, chunk
        self.activation, self.normalise = ACTIVATIONS[qk_activation], NORMS[qk_norm]
        self.widths = (int(dim * expand_k), int(dim * expand_k), int(dim * expand_v))
        head_dim(self.widths[0], heads)
        self.qkv = linear(dim, sum(self.widths), bias=False)
        self.beta = linear(dim, heads, bias=False)
        self.conv = None if conv is None else ShortConv(sum(self.widths), conv)
        self.out_norm = RMSNorm(head_dim(self.widths[2], heads), eps=eps)
        self.proj = linear(self.widths[2], dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.mask is not None:
            raise DoesNotFit("DeltaNet forms no scores that a mask could hide, and a hidden token would stay in its state: "
                             "leave padding out, or pack the sequences (lengths=)")
        if ctx.lengths is not None:
            if ctx.cache is not None:
                raise DoesNotFit("DeltaNet caches one state for each row, and a packed row has several: decode a batch")
            alone = replace(ctx, lengths=None)
            return torch.cat([self(sequence, alone) for sequence in x.split(ctx.lengths, dim=1)], dim=1)
        state, past = (None, None) if ctx.cache is None else ctx.cache.states.get(self.place, (None, None))
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, past = self.conv(qkv, past)
        q, k, v = (split_heads(t, 1, self.heads)[0] for t in qkv.split(self.widths, dim=-1))
        exact = torch.promote_types(q.dtype, torch.float32)
        q, k = (self.normalise(self.activation(t).to(exact)) for t in (q, k))
        beta = self.beta(x).sigmoid().transpose(1, 2) * self.beta_max
        out, state = delta_rule(q, k, F.silu(v), beta, state=state, chunk=self.chunk)
        if ctx.cache is not None:  # a copy: the slice would keep the whole prompt's projections
            ctx.cache.states[self.place] = state, None if past is None else past.clone()
        return self.proj(join_heads(self.out_norm(out)))


PART = spec(DeltaNet)

PAPER = spec(GPT, vocab=32000, context=2048, depth=24, bias=False, tie=False, init_std=0.02, mixer=PART.but(eps=1e-6),
             channel=spec(SwiGLU, ratio=4.125), norm=spec(RMSNorm, eps=1e-6), position=spec(NoPosition))
SIZES = {"340m": PAPER.but(dim=1024, heads=8), "1.3b": PAPER.but(dim=2048, heads=16)}
GLOBAL = spec(Attention, position=spec(Rotary))
SLIDING = (PAPER["mixer"], GLOBAL.but(window=2048))
TWO_GLOBAL = tuple(GLOBAL if i in (1, 12) else PAPER["mixer"] for i in range(24))  # layers 2 and N/2 + 1, from 1
PRESETS = {
    "nano": GPTS["nano"].but(mixer=PART),
    **SIZES,
    **{f"{size}_sliding": model.but(mixer=SLIDING) for size, model in SIZES.items()},
    **{f"{size}_global": model.but(mixer=TWO_GLOBAL) for size, model in SIZES.items()},
}


def _fused(t: list[Tensor], o: Options) -> list[Tensor]:
    """Projections and, where there are, convolutions of q, k and v, and the output projection, which comes last."""
    return [*(torch.cat(t[i:i + 3]) for i in range(0, len(t) - 1, 3)), t[-1]]


def _split(t: list[Tensor], o: Options) -> list[Tensor]:
    """Keys may be of another width than values, which the output projection takes."""
    value = t[-1].shape[1]
    key = (t[0].shape[0] - value) // 2
    return [part for whole in t[:-1] for part in whole.split((key, key, value))] + [t[-1]]


QKV = Op(_fused, _split)


def _layer(theirs: str, ours: str) -> list[Any]:
    projections, out = [f"{theirs}{x}_proj.weight" for x in "qkv"], f"{theirs}o_proj.weight"
    return [
        rule([*projections, *(f"{theirs}{x}_conv1d.weight" for x in "qkv"), out],
             [f"{ours}{x}.weight" for x in ("qkv", "conv", "proj")], QKV),
        rule([*projections, out], [f"{ours}{x}.weight" for x in ("qkv", "proj")], QKV),  # also of the hybrids' attention
        rule(f"{theirs}b_proj.weight", f"{ours}beta.weight"),
        rule(f"{theirs}o_norm.weight", f"{ours}out_norm.weight"),
        drop(f"{theirs}rotary.inv_freq", "frequencies of the rotary positions, recomputed"),
    ]


MLP = "model.layers.{i}.mlp"
KEYS = {
    "fla": keymap(
        rule(("model.embeddings.weight", "lm_head.weight"), "token.weight", TIED),
        rule("model.embeddings.weight", "token.weight"),
        rule("model.layers.{i}.attn_norm.weight", "stack.layers.{i}.mixer.norm.weight"),
        *_layer("model.layers.{i}.attn.", "stack.layers.{i}.mixer.inner."),
        rule("model.layers.{i}.mlp_norm.weight", "stack.layers.{i}.channel.norm.weight"),
        rule((f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"), "stack.layers.{i}.channel.inner.fc1.weight", FUSE_PAIR),
        rule(f"{MLP}.down_proj.weight", "stack.layers.{i}.channel.inner.fc2.weight"),
        rule("model.norm.weight", "norm.weight"),
        rule("lm_head.weight", "head.weight"),
        without={"nano": "GPT-2's shape: learned positions, layer norms and biases, which fla's model has not"},
        example=("340m_sliding", {"vocab": 96, "context": 32, "dim": 64, "depth": 2, "heads": 2}),
    ),
    "fla_layer": keymap(*_layer("", ""), makes="part"),
}


def _layer_settings(state: State, at: str = "") -> dict[str, Any]:
    dim, value = state[f"{at}proj.weight"].shape
    conv = state.get(f"{at}conv.weight")
    key = (state[f"{at}qkv.weight"].shape[0] - value) // 2
    told = {"expand_k": told_ratio(key, dim), "expand_v": told_ratio(value, dim),
            "conv": None if conv is None else conv.shape[2]}
    usual = {"expand_k": 1.0, "expand_v": 1.0, "conv": 4}
    return {k: v for k, v in told.items() if v != usual[k]}  # so that the presets' mixer is recognised


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes. Untold by the tensors: the context, and the window of the hybrids' attention (mixer=); attention in every
    other layer is taken as the presets' sliding window, elsewhere as global. Nor are beta_max, and the activation and norm
    of queries and keys: the published ones are taken."""
    if "token.weight" not in state:
        return {"dim": state["proj.weight"].shape[0], "heads": state["beta.weight"].shape[0], **_layer_settings(state)}
    told = host_settings(state, PRESETS)
    layers = [f"stack.layers.{i}.mixer.inner." for i in range(told["depth"])]
    delta = next(at for at in layers if f"{at}beta.weight" in state)
    known = PART if "position.table" in state else PAPER["mixer"]  # which differ in an epsilon
    own = known.but(**_layer_settings(state, delta))
    attends = [f"{at}beta.weight" not in state for at in layers]
    why = "the window of attention and what is done to queries and keys leave no trace in the tensors; as published"
    mixer: Any = own
    if attends == [i % 2 == 1 for i in range(len(layers))]:
        mixer = (own, SLIDING[1])
    elif any(attends):
        mixer = tuple(GLOBAL if a else own for a in attends)
    told |= {"heads": state[f"{delta}beta.weight"].shape[0], "mixer": Assumed(mixer, why)}
    return told if "norm.bias" in state else told | {"norm": PAPER["norm"], "position": PAPER["position"]}
