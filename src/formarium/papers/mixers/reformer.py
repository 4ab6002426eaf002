"""Reformer: The Efficient Transformer (Kitaev, Kaiser, Levskaya, ICLR 2020), arXiv 2001.04451.

New: attention among tokens of one hash bucket, and layers whose activations are not kept.
LSH attention: queries are their own keys, normalised (shared QK). A random rotation R gives the bucket
h(x) = argmax([xR; -xR]); token i attends to P_i = {j : h(q_i) = h(k_j)} (Eq. 3). The tokens are sorted by bucket and cut
into chunks; a chunk sees itself and the one before it (Eq. 4). Several rounds of hashing are weighted by their softmax
denominators (Eqs. 6, 7). A token sees itself only where it sees nothing else.
Reversible layers (section 3): Y1 = X1 + F(X2), Y2 = X2 + G(Y1). The backward pass finds X2 = Y2 - G(Y1), X1 = Y1 - F(X2)
from the end, so memory does not grow with depth. Feed-forward in chunks; axial positions: a table for each digit.

Decisions. Chunks of the sorted tokens have borders that later tokens move, so as published a token's answer depends on what
comes after it, and a cache cannot repeat it. `strict`, on unless asked otherwise, is causal to the bit: a token sees the
last `before * chunk` tokens of its own bucket, Eq. 3 with a limit. Files in transformers' layout get the published form.
There as here: the first chunk looks back to the last of the round before, one token in two rounds counts twice, padding has
a bucket of its own, of up to `chunk` tokens all are seen. Rotations are drawn once, from `seed`, the same for every layer
(transformers' hash_seed); the authors draw new ones for each training pass (`fresh`). Buckets found going forward hold
in the backward pass. The last tokens are both streams side by side (their code); in hosts of ours their mean. Sizes of
enwik8 and crime_and_punishment are those of the released models, of imagenet64 those of Trax's configuration. The head has
the bias that those files hold; transformers 5 no longer adds it. No dropout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition, LearnedPosition, positions
from ...parts.residual import PreNorm
from ...skeletons.decoder import Decoder
from ...skeletons.stack import Stack
from ...weights.keys import FUSE, UNSQUEEZE, Assumed, Op, State, count, drop, keymap, rule, told_ratio, twin

CARD = Card(
    title="Reformer: The Efficient Transformer",
    authors="Nikita Kitaev, Łukasz Kaiser, Anselm Levskaya",
    venue="ICLR 2020",
    arxiv="2001.04451",
    year=2020,
    code="https://github.com/google/trax/tree/master/trax/models/reformer",
    licence="Apache-2.0",
    kind="mixer",
    domain="language",
    tags=("efficient", "sparse attention", "hashing", "reversible", "memory"),
    claim="On par with the Transformer, with memory that does not grow with depth and much faster on long sequences.",
    variants={
        "nano": Published(note="ours: local and strict LSH attention in turns, reversible layers, axial positions"),
        "enwik8": Published(input=(65536,), results={"enwik8 bits per dim": 1.05},
                            note="sizes of google/reformer-enwik8; the result is quoted from memory of the paper's text"),
        "crime_and_punishment": Published(input=(524288,), note="sizes of google/reformer-crime-and-punishment"),
        "imagenet64": Published(input=(12288,), note="64 x 64 x 3 bytes; six layers, LSH attention in all"),
    },
    hosts=("gpt/nano", "vit/nano"),
    can=("causal", "bidirectional", "cache", "packed"),
)

PARTS = {
    "residual": {"reversible": "Reversible"},
    "channel": {"chunked": "ChunkedMlp"},
    "position": {"axial": "AxialPosition"},
}

SELF = -1e5  # score of a token with itself: it counts where nothing else is seen
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


# LSH attention

def look_around(x: Float[Tensor, "b h c m *d"], before: int, after: int) -> Float[Tensor, "b h c s *d"]:
    """Each of C chunks of m tokens with the chunks before and after it; the first follows the last."""
    return torch.cat([x.roll(i, dims=2) for i in range(before, -after - 1, -1)], dim=3)


def as_keys(q: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Shared QK: the key of a query is its direction. The score q . key needs no further scale."""
    return q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5


def lsh_attention(
    q: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], buckets: Int[Tensor, "b h r n"], *,
    chunk: int, causal: bool = False, strict: bool = False, before: int = 1, after: int = 0,
    hidden: Bool[Tensor, "b h n"] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Attention within the chunks of the tokens sorted by bucket, and to their neighbours, over r rounds.

    N is a whole number of chunks. strict: only to the last before * chunk tokens of the own bucket. hidden: keys that no
    other token sees. Written out, not through `attend`: the rounds are weighted by the denominators of their softmax.
    """
    rounds, n = buckets.shape[2:]
    order = buckets.argsort(dim=-1, stable=True)
    at = order.flatten(2)  # round after round
    if strict:
        before, after = min(before, at.shape[2] // chunk), 0

    def arrange(x: Tensor) -> Tensor:  # (B, H, N, ...) -> (B, H, C, m, ...)
        index = at if x.ndim == 3 else at[..., None].expand(*at.shape, x.shape[-1])
        return x.gather(2, index).unflatten(2, (-1, chunk))

    q = arrange(q)
    keys, values = (look_around(t, before, after) for t in (as_keys(q), arrange(v)))
    here = at.unflatten(2, (-1, chunk))
    there = look_around(here, before, after)[..., None, :]
    here = here[..., None]
    scores = (q @ keys.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    hide = there > here if causal else torch.zeros_like(there, dtype=torch.bool)
    if hidden is not None:
        hide = hide | look_around(arrange(hidden), before, after)[..., None, :]
    if strict:
        named = buckets.gather(-1, order) + torch.arange(rounds, device=at.device)[:, None] * (buckets.max() + 1)
        named = named.flatten(2).unflatten(2, (-1, chunk))
        behind = torch.arange(chunk, device=at.device)[:, None] - torch.arange(-before * chunk, chunk, device=at.device)
        hide = hide | (look_around(named, before, after)[..., None, :] != named[..., None]) | (behind > before * chunk)
    scores = scores.masked_fill(hide, -math.inf).masked_fill(there == here, SELF)
    total = scores.logsumexp(-1, keepdim=True)
    out = (scores - total).exp().to(v.dtype) @ values
    back = (order.argsort(-1) + n * torch.arange(rounds, device=at.device)[:, None]).flatten(2)[..., None]
    total = total.flatten(2, 3).gather(2, back).unflatten(2, (rounds, n))
    out = out.flatten(2, 3).gather(2, back.expand(*back.shape[:3], v.shape[-1])).unflatten(2, (rounds, n))
    return (out * total.softmax(2).to(v.dtype)).sum(2)


def bucket_sizes(length: int, chunk: int) -> tuple[int, ...]:
    """Twice as many buckets as chunks, a power of 2; the product of two hashes where one would be wide (transformers)."""
    bits = max(2, 2 * (length // chunk)).bit_length() - 1
    if 2**bits <= 2 * max(math.isqrt(length // chunk), chunk):
        return (2**bits,)
    return 2 ** (bits // 2), 2 ** (bits - bits // 2)


class LSHAttention(Part):
    """Multi-head attention with shared queries and keys, among tokens of one bucket.

    rounds: of hashing; more are nearer to full attention, and cost in proportion. They may differ from those of training.
    chunk: tokens sorted by bucket that are attended to together, with `before` chunks before them and `after` chunks after.
    buckets: how many, even; several numbers are multiplied; None: told by `length`, the longest sequence. strict: no later
    token changes what is seen; for causal attention. width: of all heads together; None: dim. seed: of the rotations.
    fresh: new rotations in each training pass. multiple: sequences are padded to a multiple of it and of the chunk.
    ctx.mask (B, 1 or heads, 1, M) hides keys.
    """

    rotations: Tensor

    def __init__(self, dim: int, place: Place, *, heads: int = 4, causal: bool = False, rounds: int = 8, chunk: int = 64,
                 buckets: int | tuple[int, ...] | None = None, length: int = 256, strict: bool = True, before: int = 1,
                 after: int = 0, width: int | None = None, seed: int = 0, fresh: bool = False, multiple: int = 1) -> None:
        super().__init__(dim, place)
        width = width or dim
        d = head_dim(width, heads)
        if min(rounds, chunk, multiple) < 1 or min(before, after) < 0:
            raise DoesNotFit("rounds, chunk and multiple are 1 or more, before and after not negative; "
                             f"got {rounds}, {chunk}, {multiple}, {before} and {after}")
        if buckets is None:
            buckets = bucket_sizes(length, chunk)
        sizes = (buckets,) if isinstance(buckets, int) else tuple(buckets)
        if not sizes or any(s < 2 or s % 2 for s in sizes):
            raise DoesNotFit(f"buckets come in pairs, x and -x: their number is even, got {buckets}")
        self.heads, self.causal, self.strict, self.fresh = heads, causal, strict and causal, fresh
        self.chunk, self.before, self.after, self.step = chunk, before, after, math.lcm(chunk, multiple)
        if self.strict and before < 1:
            raise DoesNotFit("strict attention sees the last before * chunk tokens of a bucket: before is 1 or more; "
                             "take strict=False for single chunks")
        self.sizes, self.buckets = sizes, math.prod(sizes)
        self.qk = linear(dim, width, bias=False)
        self.v = linear(dim, width, bias=False)
        self.proj = linear(width, dim, bias=False)
        generator = torch.Generator().manual_seed(seed)
        rotations = torch.randn(heads, d, rounds, sum(sizes) // 2, generator=generator, device="cpu")
        self.register_buffer("rotations", rotations.to(self.qk.weight.device), persistent=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.lengths is not None:
            return one_by_one(self, x, ctx)
        q, v = (split_heads(project(x), 1, self.heads)[0] for project in (self.qk, self.v))
        hidden, new = _hidden(ctx, q), x.shape[1]
        found = self._hash(q, None if hidden is None else hidden[..., -new:], ctx)
        if ctx.cache is not None:
            if self.place in ctx.cache.states:
                past_q, past_v, past = ctx.cache.states[self.place]
                q, v, found = torch.cat((past_q, q), dim=2), torch.cat((past_v, v), dim=2), torch.cat((past, found), dim=3)
            ctx.cache.states[self.place] = q, v, found
        if self.strict and new == 1:
            out = self._newest(q, v, found)
        elif not self.strict and q.shape[2] <= self.chunk:  # nothing to choose from
            itself = torch.zeros_like(q[0, 0, :, 0]).fill_(_self(q.dtype)).diag()
            mask = None if hidden is None else ~hidden[:, :, None] | (itself != 0)
            out = attend(q, as_keys(q), v, bias=itself, mask=mask, causal=self.causal, scale=1.0)
        else:
            out = self._chunked(q, v, found, hidden)
        return self.proj(join_heads(out[:, :, -new:]))

    def _hash(self, q: Float[Tensor, "b h n d"], hidden: Bool[Tensor, "b h n"] | None, ctx: Ctx) -> Int[Tensor, "b h r n"]:
        """The bucket of each token in each round; hidden tokens have their own, after the others."""
        key, exact = f"buckets {self.place}", torch.promote_types(q.dtype, torch.float32)
        rotations = torch.randn_like(self.rotations) if self.fresh and self.training else self.rotations
        if key in ctx.shared:  # this is the second run, in the backward pass: rounding must not change a bucket
            return ctx.shared[key].long()
        turned = torch.einsum("bhnd,hdrf->bhrnf", q.detach().to(exact), rotations.to(exact))
        found, factor = torch.zeros_like(turned[..., 0], dtype=torch.long), 1
        for t, size in zip(turned.split([s // 2 for s in self.sizes], dim=-1), self.sizes, strict=True):
            found, factor = found + factor * torch.cat((t, -t), dim=-1).argmax(-1), factor * size
        if hidden is not None:
            found = found.masked_fill(hidden[:, :, None], self.buckets)
        if self.training and ctx.cache is None:
            ctx.shared[key] = found.to(torch.int16 if self.buckets < 2**15 else torch.int32)
        return found

    def _chunked(self, q: Tensor, v: Tensor, found: Tensor, hidden: Tensor | None) -> Tensor:
        n = q.shape[2]
        more = -n % self.step
        if more:
            q, v = F.pad(q, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))
            found = F.pad(found, (0, more), value=self.buckets)
            hidden = torch.zeros_like(found[:, :, 0, :n], dtype=torch.bool) if hidden is None else hidden
            hidden = F.pad(hidden, (0, more), value=True)
        return lsh_attention(q, v, found, chunk=self.chunk, causal=self.causal, strict=self.strict, before=self.before,
                             after=self.after, hidden=hidden)[:, :, :n]

    def _newest(self, q: Tensor, v: Tensor, found: Tensor) -> Tensor:
        """The strict answer of the last token alone. A key seen in c rounds counts c times: log c is added to its score."""
        seen = found == found[..., -1:]
        nth = seen.cumsum(-1)
        times = (seen & (nth >= nth[..., -1:] - self.before * self.chunk)).sum(2, keepdim=True)[..., :-1].to(q.dtype)
        bias = F.pad(times.log(), (0, 1), value=_self(q.dtype))
        return attend(q[:, :, -1:], as_keys(q), v, bias=bias, scale=1.0)


def _self(dtype: torch.dtype) -> float:
    return max(SELF, torch.finfo(dtype).min / 2)


def _hidden(ctx: Ctx, q: Float[Tensor, "b h n d"]) -> Bool[Tensor, "b h m"] | None:
    """The keys that ctx.mask hides."""
    if ctx.mask is None:
        return None
    if ctx.mask.ndim != 4 or ctx.mask.shape[-2] != 1:
        raise DoesNotFit("attention in chunks takes a mask that hides keys (B, 1, 1, M), not single pairs; "
                         f"got {tuple(ctx.mask.shape)}")
    return ~ctx.mask[:, :, 0].expand(*q.shape[:2], -1)


def one_by_one(part: Part, x: Float[Tensor, "1 n c"], ctx: Ctx) -> Float[Tensor, "1 n c"]:
    """The sequences of a packed row, each alone."""
    if ctx.cache is not None or ctx.mask is not None:
        raise DoesNotFit(f"{type(part).__name__} takes a packed row without a cache or a mask: decode a batch instead")
    rows = x.split(ctx.lengths, dim=1)  # type: ignore[arg-type, no-untyped-call]
    return torch.cat([part(row, replace(ctx, lengths=None, shared={})) for row in rows], dim=1)


class LocalAttention(Part):
    """Causal attention within chunks of the sequence and to the `before` chunks before: the Reformer's other layers."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, causal: bool = True, chunk: int = 64, before: int = 1,
                 width: int | None = None) -> None:
        super().__init__(dim, place)
        if not causal:
            raise DoesNotFit("LocalAttention looks back only: take causal=True, or the mixer 'attention' with a window")
        if chunk < 1 or before < 0:
            raise DoesNotFit(f"chunk is 1 or more, before not negative; got {chunk} and {before}")
        width = width or dim
        head_dim(width, heads)
        self.heads, self.chunk, self.before = heads, chunk, before
        self.qkv = linear(dim, 3 * width, bias=False)
        self.proj = linear(width, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.lengths is not None:
            return one_by_one(self, x, ctx)
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        n, start, hidden = x.shape[1], 0, _hidden(ctx, q)
        if ctx.cache is not None:
            start = ctx.cache.length
            if self.place in ctx.cache.states:
                past_k, past_v = ctx.cache.states[self.place]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            needed = start + n - max(0, (start + n) // self.chunk - self.before) * self.chunk
            unused = max(0, k.shape[2] - needed)
            ctx.cache.states[self.place] = k[:, :, unused:].clone(), v[:, :, unused:].clone()
        m = k.shape[2]
        if m == n and n > self.chunk and start == 0:
            return self.proj(join_heads(self._chunked(q, k, v, hidden)))
        at = torch.arange(start + n - m, start + n, device=x.device)
        here = at[-n:, None]
        seen = (at <= here) & (at // self.chunk >= here // self.chunk - self.before)
        if hidden is not None:
            seen = seen & ~hidden[:, :, None, -m:] | (at == here)
        return self.proj(join_heads(attend(q, k, v, mask=seen)))

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        b, _, n, _ = q.shape
        q, k, v = (F.pad(t, (0, 0, 0, -n % self.chunk)).unflatten(2, (-1, self.chunk)) for t in (q, k, v))
        before = min(self.before, q.shape[2] - 1)
        here = torch.arange(q.shape[2] * self.chunk, device=q.device).view(1, 1, -1, self.chunk)
        there = look_around(here, before, 0)[..., None, :]
        seen = there <= here[..., None]
        if hidden is not None:
            hidden = F.pad(hidden, (0, -n % self.chunk)).unflatten(2, (-1, self.chunk))
            seen = seen & ~look_around(hidden, before, 0)[..., None, :] | (there == here[..., None])
        q, k, v, seen = (t.flatten(0, 1) for t in (q, look_around(k, before, 0), look_around(v, before, 0), seen))
        return attend(q, k, v, mask=seen).flatten(1, 2).unflatten(0, (b, -1))[:, :, :n]


# reversible layers

class Reversible(PreNorm):
    """Two streams: each branch reads one and is added to the other, which it swaps places with. State: the pair.

    With two sublayers a layer: Y1 = X1 + F(X2), Y2 = X2 + G(Y1). The streams start equal and leave as their mean. No
    activations are kept but the last pair: the backward pass takes the branches away again. Gradients are those of plain
    layers, up to the rounding of that subtraction. Under torch.compile, and with a cache, the layers run plainly.
    """

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return x, x

    def forward(self, state: Any, ctx: Ctx) -> Any:
        other, x = state
        return x, other + self.branch(self.norm(x), ctx)

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return (state[0] + state[1]) / 2

    def run(self, layers: Sequence[Sequence[tuple[Residual, Ctx]]], state: Any, again: bool) -> Any:
        steps = [step for layer in layers for step in layer]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or any(ctx.cache is not None for _, ctx in steps):
            return super().run(layers, state, again)
        walk = _Walk(steps)
        first, second, *written = _Reverse.apply(walk, *state, *walk.given, *walk.params)
        walk.hand_over(steps[0][1].shared, written)
        return first, second


class _Walk:
    """A way through sublayers that keeps no graph, and back, with the graph of one sublayer at a time.

    Tensors that sublayers read beside the state (of their Ctx, `shared` among it) get their gradients too. Those that a
    sublayer wrote to `shared` are computed again where they are floating point; choices (indices) stand.
    """

    def __init__(self, steps: Sequence[tuple[Residual, Ctx]]) -> None:
        self.shared = dict(steps[0][1].shared)  # a copy: the caller's will hold our outputs, and they us
        self.steps = [(sublayer, replace(ctx, shared={})) for sublayer, ctx in steps]
        beside = [t for _, ctx in self.steps for t in self._beside(ctx, self.shared)]
        self.given = list({id(t): t for t in beside if t.requires_grad}.values())
        self.params = list({id(p): p for s, _ in steps for p in s.parameters() if p.requires_grad}.values())
        self.records: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    @staticmethod
    def _beside(ctx: Ctx, shared: dict[str, Any]) -> list[Tensor]:
        told = [ctx.cond, ctx.coords, None if ctx.memory is None else ctx.memory[0], *tree_leaves(shared)]
        return [t for t in told if isinstance(t, Tensor) and t.is_floating_point()]

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        kind = state[0].device.type
        self.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind),
                         "dtype": torch.get_autocast_dtype(kind)}
        shared = self.shared
        for sublayer, ctx in self.steps:
            before, random = dict(shared), (torch.get_rng_state(), *get_device_states(state[0]))
            with torch.enable_grad():  # the same kernels as in the second run, so that it subtracts what was added
                first, second = sublayer(state, replace(ctx, shared=shared))
            state = first.detach(), second.detach()
            wrote = {k: tree_map_only(Tensor, Tensor.detach, v) for k, v in shared.items()
                     if k not in before or before[k] is not v}
            shared |= wrote
            self.records.append((random, before, wrote))
        return state

    def written(self) -> list[Tensor]:
        """The floating-point tensors in `shared` that these sublayers wrote."""
        old = {id(t) for t in tree_leaves(self.records[0][1])}
        return [t for t in tree_leaves(self.shared)
                if isinstance(t, Tensor) and t.is_floating_point() and id(t) not in old]

    def hand_over(self, shared: dict[str, Any], outputs: Sequence[Tensor]) -> None:
        """Gives the caller what the sublayers wrote, as part of the graph."""
        new = {id(t): out for t, out in zip(self.written(), outputs, strict=True)}
        shared |= {k: tree_map_only(Tensor, lambda t: new.get(id(t), t), v) for k, v in self.shared.items()}

    def backward(self, state: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor],
                 found: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of the first state. found: gradients by the id of the tensor, added to."""
        (p, q), (dp, dq) = state, grads
        inner = {id(t) for _, _, wrote in self.records for t in tree_leaves(wrote)}
        wanted = inner | {id(t) for t in self.given}
        for (sublayer, ctx), (random, before, wrote) in zip(reversed(self.steps), reversed(self.records), strict=True):
            twins = {id(t): t.detach().requires_grad_() for t in self._beside(ctx, before) if id(t) in wanted}
            again, x = self._again(ctx, before, wrote, twins), p.detach().requires_grad_()
            with torch.random.fork_rng(random[1]), torch.autocast(**self.autocast), torch.enable_grad():
                torch.set_rng_state(random[0])
                set_device_states(*random[1:])
                _, branch = sublayer((0, x), again)  # beside nothing the branch stands alone
            outs, douts = [branch], [dq.to(branch.dtype)]
            for old, new in zip(tree_leaves(wrote), tree_leaves({k: again.shared[k] for k in wrote}), strict=True):
                if id(old) in found and new.requires_grad:
                    outs.append(new)
                    douts.append(found.pop(id(old)))
            dx, *others = torch.autograd.grad(outs, [x, *twins.values(), *self.params], douts, allow_unused=True)
            for name, grad in zip([*twins, *map(id, self.params)], others, strict=True):
                if grad is not None:
                    found[name] = found[name] + grad if name in found else grad
            p, q = q - branch.detach(), p
            dp, dq = dq, dp if dx is None else dp + dx
        return dp, dq

    @staticmethod
    def _again(ctx: Ctx, before: dict[str, Any], wrote: dict[str, Any], twins: dict[int, Tensor]) -> Ctx:
        """What a sublayer was told, in tensors that gradients stop at, and the choices that it made."""
        def twin(value: Any) -> Any:
            return tree_map_only(Tensor, lambda t: twins.get(id(t), t), value)

        chosen = {k: v for k, v in wrote.items()
                  if all(isinstance(t, Tensor) and not t.is_floating_point() for t in tree_leaves(v))}
        memory = None if ctx.memory is None else (twin(ctx.memory[0]), ctx.memory[1])
        return replace(ctx, cond=twin(ctx.cond), coords=twin(ctx.coords), memory=memory, shared=twin(before) | chosen)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(node: Any, walk: _Walk, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = walk.forward((tensors[0].detach(), tensors[1].detach()))
        node.walk = walk
        node.set_materialize_grads(False)
        node.save_for_backward(*state)
        return (*state, *(t.view_as(t) for t in walk.written()))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(node: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        walk, state = node.walk, node.saved_tensors
        ends = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(state, grads[:2], strict=True))
        found = {id(t): g for t, g in zip(walk.written(), grads[2:], strict=True) if g is not None}
        ends = walk.backward(state, ends, found)
        return (None, *ends, *(found.get(id(t)) for t in (*walk.given, *walk.params)))


class ReversiblePair(Reversible):
    """Leaves with both streams side by side: 2 dim channels, for a model that expects them."""

    def leave(self, state: Any) -> Float[Tensor, "b n 2*c"]:
        return torch.cat(state, dim=-1)


# the rest of the model

class ChunkedMlp(Mlp):
    """Linear, activation, linear. In training `chunk` tokens at a time are run again in the backward pass, so that only
    their hidden units are held; None: all at once. activation: "relu", "gelu" or "gelu_tanh"."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, bias: bool = True, activation: str = "gelu",
                 chunk: int | None = None) -> None:
        super().__init__(dim, place, ratio=ratio, bias=bias)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if chunk is not None and chunk < 1:
            raise DoesNotFit(f"chunk is 1 or more tokens (None: all at once), got {chunk}")
        self.activation, self.chunk = ACTIVATIONS[activation], chunk

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if self.chunk is None:
            return self._tokens(x)
        pieces = x.split(self.chunk, dim=1)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self._tokens, piece, use_reentrant=False) for piece in pieces], dim=1)
        return torch.cat([self._tokens(piece) for piece in pieces], dim=1)

    def _tokens(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class AxialPosition(AbsolutePosition):
    """A position as the digits of a number, each with its own table; the vectors of the digits are put side by side.

    shape: values of each digit, the last runs fastest; None: two of about the root of the tokens. dims: channels of each
    digit; None: even shares.
    """

    def __init__(self, dim: int, tokens: int, *, shape: tuple[int, ...] | None = None, dims: tuple[int, ...] | None = None,
                 std: float = 0.02) -> None:
        super().__init__(dim, tokens)
        if shape is None:
            columns = math.isqrt(max(0, tokens - 1)) + 1
            shape = (max(1, math.ceil(tokens / columns)), columns)
        share = dim // len(shape)
        dims = (*[share] * (len(shape) - 1), dim - share * (len(shape) - 1)) if dims is None else dims
        if len(dims) != len(shape) or sum(dims) != dim or min(*shape, *dims) < 1:
            raise DoesNotFit(f"axial positions of shape {shape} need as many dims, of {dim} channels in all; got {dims}")
        if math.prod(shape) < tokens:
            raise DoesNotFit(f"axial positions of shape {shape} are {math.prod(shape)}, for {tokens} tokens; give a larger "
                             "shape=, or shape=None")
        self.shape = tuple(shape)
        self.undecayed = tuple(f"table{i}" for i in range(len(shape)))
        for i, d in enumerate(dims):
            table = torch.empty(*[size if i == j else 1 for j, size in enumerate(shape)], d)
            setattr(self, f"table{i}", nn.Parameter(nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)))

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        last = x.shape[1] + (0 if ctx.cache is None else ctx.cache.length)
        if ctx.lengths is None and ctx.coords is None and last > math.prod(self.shape):
            raise DoesNotFit(f"axial positions for {math.prod(self.shape)} tokens, got {last}; build the model with a "
                             "longer context, or shorten the text")
        at, found = positions(x.shape[1], ctx, x.device).long(), []
        for i in reversed(range(len(self.shape))):
            found.insert(0, getattr(self, f"table{i}").flatten(0, -2)[at % self.shape[i]])
            at = at // self.shape[i]
        return x + torch.cat(found, dim=-1)


class Reformer(Decoder):
    """ids (B, N) -> logits (B, N, vocab), through reversible layers; the head reads both streams.

    mixer: one, or several that take turns. chunk, rounds, buckets, seed, strict: offered to the mixers. init_std: of the
    linear layers; None: Xavier.
    """

    def __init__(self, *, vocab: int = 256, context: int = 256, dim: int = 64, depth: int = 4, heads: int = 4,
                 drop_path: float = 0.0, init_std: float | None = None, chunk: int = 64, rounds: int = 4,
                 buckets: int | tuple[int, ...] | None = None, seed: int = 0, strict: bool = True,
                 mixer: Spec[Part] | tuple[Spec[Part], ...] = (spec(LocalAttention), spec(LSHAttention)),
                 channel: Spec[Part] = spec(ChunkedMlp), norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-12),
                 position: Spec[AbsolutePosition] = spec(AxialPosition)) -> None:
        mixers = [one.require("in a language decoder no token may see a later one", causal=True).offer(
            heads=heads, length=context, chunk=chunk, rounds=rounds, buckets=buckets, seed=seed, strict=strict)
            for one in ((mixer,) if isinstance(mixer, Spec) else mixer)]
        if not mixers:
            raise DoesNotFit("expected one mixer, or several that take turns, got none")
        chunks = [dict(one.options)["chunk"] for one in mixers if one.takes("chunk")]
        stack = Stack(dim, depth, {"mixer": [one.offer(multiple=math.lcm(*chunks)) for one in mixers], "channel": channel},
                      spec(ReversiblePair, norm=norm, drop_path=drop_path))
        super().__init__(vocab, context, stack, position=position)
        restart_linears(stack, init_std)
        self.norm = norm(2 * dim)
        self.head = nn.Linear(2 * dim, vocab)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def logits(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n v"]:
        return self.head(x)  # type: ignore[misc]


PART = spec(LSHAttention)

PAPER = spec(Reformer, strict=False, init_std=0.02, channel=spec(ChunkedMlp, activation="relu"))
LOCAL, LSH = spec(LocalAttention), spec(LSHAttention, fresh=True)
PRESETS = {
    "nano": spec(Reformer, dim=64, depth=4, heads=4, context=128, chunk=16),
    "enwik8": PAPER.but(vocab=258, context=65536, dim=1024, depth=12, heads=8, rounds=4, buckets=512,
                        mixer=(LOCAL.but(chunk=128), LOCAL.but(chunk=128), LSH.but(chunk=256), LOCAL.but(chunk=128)),
                        position=spec(AxialPosition, shape=(128, 512), dims=(256, 768))),
    "crime_and_punishment": PAPER.but(
        vocab=320, context=524288, dim=256, depth=6, heads=2, chunk=64, rounds=1, buckets=(64, 128),
        mixer=(LOCAL.but(width=128), LSH.but(width=128)), channel=spec(ChunkedMlp, activation="relu", ratio=2.0),
        position=spec(AxialPosition, shape=(512, 1024), dims=(64, 192))),
    "imagenet64": PAPER.but(
        vocab=256, context=12288, dim=1024, depth=6, heads=8, chunk=128, rounds=2, buckets=192, mixer=(LSH.but(width=512),),
        channel=spec(ChunkedMlp, activation="gelu_tanh"),
        position=spec(AxialPosition, shape=(64, 64, 3), dims=(384, 384, 256))),
}

ENCODER = "reformer.encoder.layers.{i}"
SELF_ATTENTION = f"{ENCODER}.attention.self_attention"
OURS = "stack.layers.{i}"
# the attention alone has no output projection: the identity
ALONE = Op(lambda t, o: [*t, torch.eye(t[1].shape[0], dtype=t[1].dtype)], lambda t, o: t[:2])
TWICE = Op(lambda t, o: [t[0]], lambda t, o: [t[0], t[0]])  # one tensor under two names; older files have the second
KEYS = {
    "transformers": keymap(
        rule("reformer.embeddings.word_embeddings.weight", "token.weight"),
        rule("reformer.embeddings.position_embeddings.weights.{i}", "position.table{i}"),
        rule("reformer.embeddings.position_embeddings.embedding.weight", "position.table", UNSQUEEZE),
        drop(f"{SELF_ATTENTION}.self_mask_value_*", "constants"),
        drop(f"{SELF_ATTENTION}.mask_value_*", "constants"),
        rule(f"{ENCODER}.attention.layer_norm.*", f"{OURS}.mixer.norm.*"),
        rule(f"{SELF_ATTENTION}.query_key.weight", f"{OURS}.mixer.inner.qk.weight"),
        rule([f"{SELF_ATTENTION}.{x}.weight" for x in ("query", "key", "value")], f"{OURS}.mixer.inner.qkv.weight", FUSE),
        rule(f"{SELF_ATTENTION}.value.weight", f"{OURS}.mixer.inner.v.weight"),
        rule(f"{ENCODER}.attention.output.dense.weight", f"{OURS}.mixer.inner.proj.weight"),
        rule(f"{ENCODER}.feed_forward.layer_norm.*", f"{OURS}.channel.norm.*"),
        rule(f"{ENCODER}.feed_forward.dense.dense.*", f"{OURS}.channel.inner.fc1.*"),
        rule(f"{ENCODER}.feed_forward.output.dense.*", f"{OURS}.channel.inner.fc2.*"),
        rule("reformer.encoder.layer_norm.*", "norm.*"),
        rule(("lm_head.decoder.bias", "lm_head.bias"), "head.bias", TWICE),
        rule("lm_head.bias", "head.bias"),
        rule("lm_head.decoder.*", "head.*"),
        example=("nano", {"strict": False, "channel": spec(ChunkedMlp, activation="relu")}),
    ),
    "transformers_lsh": keymap(
        rule("self_attention.query_key.weight", "qk.weight"),
        rule("self_attention.value.weight", "v.weight"),
        rule("output.dense.weight", "proj.weight"),
        rule(("query_key.weight", "value.weight"), ("qk.weight", "v.weight", "proj.weight"), ALONE),
        drop("*mask_value_float{i}", "constants"),
        makes="part",
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes. Untold by the tensors: heads (64 channels each), chunk, rounds, buckets, seed, the activation (ReLU, as
    released) and, of the attention alone, causal; where all shapes are a preset's, its. Files in transformers' layout get
    the published form, ours the strict one."""
    if "qk.weight" in state:
        width, dim = state["qk.weight"].shape
        return {"dim": dim, "width": width, "heads": Assumed(max(1, width // 64), "leaves no trace; 64 channels each"),
                "strict": layout == "formarium"}
    vocab, dim = state["token.weight"].shape
    depth = count(state, "stack.layers.{i}.mixer.norm.weight")
    kinds = ["qk" if f"stack.layers.{i}.mixer.inner.qk.weight" in state else "qkv" for i in range(depth)]
    width = state["stack.layers.0.mixer.inner.proj.weight"].shape[1]
    option = {} if width == dim else {"width": width}
    period = next(n for n in range(1, depth + 1) if kinds == [kinds[i % n] for i in range(depth)])
    made = {"qk": spec(LSHAttention, **option), "qkv": spec(LocalAttention, **option)}
    hidden = state["stack.layers.0.channel.inner.fc1.weight"].shape[0]
    tables = [state[f"position.table{i}"] for i in range(count(state, "position.table{i}"))]
    shape = tuple(t.shape[i] for i, t in enumerate(tables))
    axial = spec(AxialPosition, shape=shape, dims=tuple(t.shape[-1] for t in tables))
    sizes: dict[str, Any] = {"vocab": vocab, "dim": dim, "depth": depth}
    told: dict[str, Any] = sizes | {
        "heads": Assumed(max(1, width // 64), "leaves no trace in the tensors; 64 channels each"),
        "strict": layout == "formarium", "context": math.prod(shape) if tables else state["position.table"].shape[1],
        "position": axial if tables else spec(LearnedPosition), "mixer": tuple(made[k] for k in kinds[:period]),
        "channel": Assumed(spec(ChunkedMlp, activation="relu", ratio=told_ratio(hidden, dim)), "ReLU, as released")}
    if layout != "formarium":  # their positions are given as tables
        return told | twin(PRESETS, state, ("heads", "mixer", "channel"), **sizes)
    return told | twin(PRESETS, state, ("heads", "mixer", "channel", "strict", "context", "position"), **sizes)
