"""Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context (Dai, Yang, Yang, Carbonell, Le, Salakhutdinov,
ACL 2019), arXiv 1901.02860.

New: (1) segment-level recurrence. A layer's queries come from the segment, its keys and values from the segment and from
a memory: the layer's own inputs in the segments before, without gradient (Section 3.2). (2) Relative positions that hold
for any distance. With R a sinusoid of the distance and u, v learned vectors a head, the score of query i and key j is
(q_i + u) . k_j + (q_i + v) . W_R R_{i-j}, over sqrt(d) (Section 3.3). The second term is computed for all distances at
once and shifted row by row (Appendix B). (3) A memory longer than in training may be used for evaluation.

Decisions. The mixer is a part, `transformer_xl`: without a memory, plain attention with relative positions; not causal,
keys ahead have negative distances. The memory of a model is `model.memory(mem_len)`, given as `cache`. While something
is learned it holds the layers' inputs, so that their keys and values pass gradients to the weights, else keys and
values. Generation goes on with the memory, where other decoders start again from the last half. Few queries are
multiplied with W_R, not the sinusoids: the same sum, cheaper. `same_length` is a sliding window of mem_len, `clamp` the
largest distance: for evaluation.

Where paper and code disagree. u and v: one pair for all layers in the authors' PyTorch (`shared`), a pair a layer in
their TensorFlow and in transformers. The clusters of the adaptive softmax: in their PyTorch in reverse order, in
TensorFlow and in transformers forwards; ours are forwards, KEYS turns them. The memory starts empty in PyTorch, as zeros
that are attended to in the others (`memory(zeros=batch)`). Deviations: no dropout; LayerNorm starts at one; with
residual="pre_norm" (no published model) the memory is kept behind the norm, which learns from it nothing. Their
attention types 1 to 3 are ablations, not here.

The adaptive embedding and softmax (arXiv 1611.01462, 1809.10853): frequent words first, cut at `cutoffs` into clusters
whose width falls by `div`. `forward` gives log-probabilities of all words; `nll` computes a cluster for its own targets
alone. No sizes are published for the 18-layer enwik8 model and for Penn Treebank, so there are no such presets.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Cache, Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import linear, restart_linears
from ...parts.norm import LayerNorm, NoNorm
from ...parts.position import NoPosition
from ...parts.residual import PostNorm
from ...skeletons.memory import Memory, MemoryDecoder
from ...skeletons.stack import Stack
from ...weights.keys import SAME, TIED, Assumed, Op, Options, State, as_preset, count, drop, keymap, rule, same

CARD = Card(
    title="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
    authors="Zihang Dai, Zhilin Yang, Yiming Yang, Jaime Carbonell, Quoc V. Le, Ruslan Salakhutdinov",
    venue="ACL 2019",
    arxiv="1901.02860",
    year=2019,
    code="https://github.com/kimiyoung/transformer-xl",
    licence="Apache-2.0",
    kind="language",
    domain="language",
    tags=("decoder", "causal", "memory", "recurrent", "relative position", "length extrapolation", "adaptive softmax"),
    claim="A memory of the segments before, with relative positions, learns dependencies 450 % longer than a plain "
          "Transformer and is up to 1,800 times faster in evaluation; 0.99 bits a character on enwik8, perplexity 18.3 on "
          "WikiText-103.",
    variants={
        "nano": Published(note="ours, byte level: for tests and quick comparisons"),
        "enwik8_12l": Published(params=41e6, input=(512,), results={"enwik8 bits per character": 1.06}),
        "enwik8_24l": Published(params=277e6, input=(768,), results={"enwik8 bits per character": 0.99}),
        "text8_24l": Published(params=277e6, input=(768,), results={"text8 bits per character": 1.08}),
        "wt103_base": Published(params=151e6, input=(150,), results={"WikiText-103 perplexity": 24.0}),
        "wt103_large": Published(input=(384,), results={"WikiText-103 perplexity": 18.3},
                                 note="257M in the paper; the released weights, and ours, have 285M"),
        "lm1b_base": Published(input=(32,), results={"One Billion Word perplexity": 23.5},
                               note="the authors' script, which gives 357M; 0.46B in the paper"),
        "lm1b_large": Published(input=(32,), results={"One Billion Word perplexity": 21.8},
                                note="the authors' script, which gives 841M; 0.8B in the paper"),
    },
    can=("causal", "cache", "packed"),
    exceptions={"generates": "past the context it goes on with its memory, where others start again from the last half"},
)

PARTS = {
    "mixer": {"transformer_xl": "RelativeAttention"},
}

BASE = 10000.0  # of the sinusoids


def sinusoid(distance: Float[Tensor, "m"], dim: int) -> Float[Tensor, "m c"]:
    """Sines, then cosines, of the distances in tokens, at dim / 2 wavelengths."""
    angle = distance[:, None] * BASE ** (-torch.arange(0, dim, 2, device=distance.device) / dim)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def relative_shift(x: Float[Tensor, "... n k"], m: int) -> Float[Tensor, "... n m"]:
    """Row i moved to the left by n - 1 - i: from columns that count distances, m - 1 downwards, to columns that are m keys.

    The rows are read as if they were one number shorter, which is the shift: a view, no copy. The last column is for that
    alone. Keys whose distance has no column get numbers of the next row (keys ahead, if the columns count down to -1).
    """
    n, k = x.shape[-2:]
    return x.flatten(-2)[..., n - 1:n - 1 + n * (k - 1)].unflatten(-1, (n, k - 1))[..., :m]


class RelativeAttention(Part):
    """Attention with relative positions, and with a memory if the cache is one.

    width: channels of all heads together; None: dim. window: a token sees neighbours closer than this. clamp: larger
    distances count as this. shared: the first layer of the stack has u and v, the others take them.
    """

    undecayed = ("u", "v")

    def __init__(self, dim: int, place: Place, *, heads: int = 4, causal: bool = False, width: int | None = None,
                 window: int | None = None, clamp: int | None = None, shared: bool = False) -> None:
        super().__init__(dim, place)
        if dim % 2:
            raise DoesNotFit(f"a sinusoid of the distance has sine and cosine: the width must be even, got {dim}")
        if clamp is not None and clamp < 1:
            raise DoesNotFit(f"clamp is a distance of 1 or more (None: no limit), got {clamp}")
        width = dim if width is None else width
        self.heads, self.causal, self.width, self.window, self.clamp = heads, causal, width, window, clamp
        self.shared, size = shared, head_dim(width, heads)
        self.qkv = linear(dim, 3 * width, bias=False)
        self.relative = linear(dim, width, bias=False)
        self.proj = linear(width, dim, bias=False)
        owner = not shared or place.nth == 0
        self.u, self.v = (nn.Parameter(0.02 * torch.randn(heads, size)) if owner else None for _ in "uv")

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.coords is not None:
            raise DoesNotFit("RelativeAttention counts distances in tokens; these have coordinates of their own")
        if ctx.lengths is not None:
            if ctx.cache is not None:
                raise DoesNotFit("RelativeAttention caches one sequence a row, a packed row has several: decode a batch")
            alone = replace(ctx, lengths=None)
            return torch.cat([self(sequence, alone) for sequence in x.split(ctx.lengths, dim=1)], dim=1)
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        window = self.window
        if ctx.cache is not None:
            k, v = self._remember(x, k, v, ctx.cache)
            window = ctx.cache.window if isinstance(ctx.cache, Memory) else window
        scale = q.shape[-1] ** -0.5
        content, position = self._biases(ctx)
        bias = relative_shift(self._position_scores((q + position[:, None]) * scale, k.shape[2], ctx), k.shape[2])
        x = attend(q + content[:, None], k, v, bias=bias, mask=ctx.mask, causal=self.causal, window=window, scale=scale)
        return self.proj(join_heads(x))

    def _biases(self, ctx: Ctx) -> tuple[Float[Tensor, "h d"], Float[Tensor, "h d"]]:
        """u and v."""
        key = f"transformer_xl biases {self.heads} {self.width}"
        if self.u is not None and self.v is not None:
            if self.shared:
                ctx.shared[key] = self.u, self.v
            return self.u, self.v
        if key not in ctx.shared:
            raise DoesNotFit(f"RelativeAttention(shared=True) takes u and v from the first layer, which must be one of "
                             f"{self.heads} heads as well; take shared=False where mixers take turns")
        return ctx.shared[key]

    def _position_scores(self, q: Float[Tensor, "b h n d"], m: int, ctx: Ctx) -> Float[Tensor, "b h n k"]:
        """q . W_R R for the distances m - 1, m - 2, ... to 0, or to 1 - n where keys may lie ahead, and one more."""
        n = q.shape[2]
        key = f"transformer_xl distances {n} {m} {self.causal} {self.clamp} {self.dim}"
        if key not in ctx.shared:  # the same for every layer
            exact = torch.promote_types(q.dtype, torch.float32)
            distance = torch.arange(m - 1, -2 if self.causal else -n - 1, -1, device=q.device, dtype=exact)
            if self.clamp is not None:
                distance = distance.clamp(-self.clamp, self.clamp)
            ctx.shared[key] = sinusoid(distance, self.dim).to(q.dtype)
        if n < q.shape[3]:  # cheaper: a query has heads * dim numbers then, but the distances need no projection
            return q @ self.relative.weight.unflatten(0, (self.heads, -1)) @ ctx.shared[key].t()
        return q @ split_heads(self.relative(ctx.shared[key])[None], 1, self.heads)[0].transpose(-2, -1)

    def _remember(self, x: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and of the new tokens x; keeps what comes after it needs."""
        past, inputs = cache.states.get(self.place), x
        learning = self.training or torch.is_grad_enabled()
        if isinstance(past, Tensor):  # inputs of this layer
            inputs = torch.cat((past, x), dim=1)
            past = split_heads(F.linear(past, self.qkv.weight[self.width:]), 2, self.heads)
        elif past is not None and learning and isinstance(cache, Memory):
            raise DoesNotFit("this memory holds keys and values, of which nothing can be learned: it was used in "
                             "evaluation without gradients; start with a new one, model.memory()")
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        if not isinstance(cache, Memory):
            cache.states[self.place] = k, v
        elif cache.limit:
            cache.kept[self.place] = cache.last(inputs) if learning else (cache.last(k), cache.last(v))
        return k, v


class FeedForward(Part):
    """Linear, ReLU, linear."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0) -> None:
        super().__init__(dim, place)
        self.fc1 = linear(dim, round(dim * ratio))
        self.fc2 = linear(round(dim * ratio), dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return self.fc2(F.relu(self.fc1(x)))


class AdaptiveEmbedding(nn.Module):
    """ids (B, N) -> sqrt(dim) times their vectors (B, N, dim).

    cutoffs: first ids of the clusters after the first. embed: width of the first cluster's vectors; cluster i has
    embed // div**i, and a projection to dim. With div = 1 there is one table, projected where embed is not dim.
    """

    def __init__(self, vocab: int, dim: int, *, cutoffs: tuple[int, ...] = (), div: int = 1,
                 embed: int | None = None) -> None:
        super().__init__()
        self.dim, self.edges = dim, (0, *cutoffs, vocab)
        self.sizes = [b - a for a, b in zip(self.edges, self.edges[1:], strict=False)]
        embed = dim if embed is None else embed
        widths = [embed] if div == 1 else [embed // div**i for i in range(len(self.sizes))]
        if min(self.sizes) < 1 or div < 1 or min(widths) < 1:
            raise DoesNotFit("cutoffs rise from 1 to below the vocabulary, and every cluster has a width of 1 or more: got "
                             f"{cutoffs} for {vocab} words, and widths of {widths}")
        rows = [vocab] if div == 1 else self.sizes
        self.tables = nn.ModuleList(nn.Embedding(n, w) for n, w in zip(rows, widths, strict=True))
        self.projections = nn.ParameterList(
            nn.Parameter(0.01 * torch.randn(dim, w)) for w in widths if div > 1 or embed != dim)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)

    def projection(self, cluster: int) -> Float[Tensor, "c w"] | None:
        return self.projections[min(cluster, len(self.projections) - 1)] if len(self.projections) else None

    def weights(self) -> list[Float[Tensor, "k w"]]:
        """The table of each cluster."""
        if len(self.tables) == 1:
            return list(self.tables[0].weight.split(self.sizes))
        return [table.weight for table in self.tables]

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        x = None
        for i, table in enumerate(self.tables):
            projection = self.projection(i)
            own = table((ids - self.edges[i]).clamp(0, len(table.weight) - 1))  # of other clusters: any vector
            own = own if projection is None else F.linear(own, projection)
            x = own if x is None else torch.where((ids >= self.edges[i])[..., None], own, x)
        return x * math.sqrt(self.dim)


class AdaptiveSoftmax(nn.Module):
    """Tokens (B, N, dim) -> logits of all words; with clusters, log-probabilities: those of the first cluster's words and
    of the other clusters, and in each of these those of its words.

    tie: the words' vectors are the embedding's. tie_projections: so are the projections, but for the first cluster's.
    """

    def __init__(self, token: AdaptiveEmbedding, *, tie: bool = True, tie_projections: bool = True) -> None:
        super().__init__()
        self.sizes, clusters, width = token.sizes, len(token.sizes) - 1, token.tables[0].embedding_dim
        shapes = [table.weight.shape for table in token.tables]
        self.tables = None if tie else nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n, _ in shapes)
        own = range(clusters + 1) if not tie_projections else (0,)
        self.projections = nn.ParameterDict({
            str(i): nn.Parameter(0.01 * torch.randn(p.shape)) for i in own if (p := token.projection(i)) is not None})
        self.cluster_weight = nn.Parameter(0.02 * torch.randn(clusters, width)) if clusters else None
        self.cluster_bias = nn.Parameter(torch.zeros(clusters)) if clusters else None

    def _clusters(self, token: AdaptiveEmbedding) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Weight, bias and projection of each cluster, those of the clusters themselves at the end of the first."""
        weights = token.weights() if self.tables is None else list(self.tables)
        biases = list(self.biases)
        if len(biases) == 1:
            weights, biases = list(torch.cat(weights).split(self.sizes)), list(biases[0].split(self.sizes))
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weights[0] = torch.cat((weights[0], self.cluster_weight))
            biases[0] = torch.cat((biases[0], self.cluster_bias))
        projections = [self.projections[str(i)] if str(i) in self.projections else token.projection(i)
                       for i in range(len(weights))]
        return list(zip(weights, biases, projections, strict=True))

    @staticmethod
    def _scores(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
        return F.linear(x if projection is None else x @ projection, weight, bias)

    def forward(self, x: Float[Tensor, "b n c"], token: AdaptiveEmbedding) -> Float[Tensor, "b n v"]:
        first, *others = self._clusters(token)
        head = self._scores(x, *first)
        if not others:
            return head
        words, clusters = head.log_softmax(-1).split((self.sizes[0], len(others)), dim=-1)
        inside = [self._scores(x, *other).log_softmax(-1) for other in others]
        return torch.cat((words, *(c + i for c, i in zip(clusters.split(1, dim=-1), inside, strict=True))), dim=-1)

    def nll(self, x: Float[Tensor, "b n c"], targets: Int[Tensor, "b n"], token: AdaptiveEmbedding) -> Float[Tensor, "b n"]:
        """-log p of the targets. Each cluster but the first is computed for its own targets alone."""
        (first, *others), n = self._clusters(token), self.sizes[0]
        x, wanted = x.flatten(0, 1), targets.flatten()
        cluster = torch.bucketize(wanted, torch.tensor(token.edges[1:-1], device=wanted.device), right=True)
        head = torch.where(cluster == 0, wanted, n - 1 + cluster)  # the word, or its cluster
        out = F.cross_entropy(self._scores(x, *first), head, reduction="none")
        for i, other in enumerate(others, 1):
            rows = (cluster == i).nonzero()[:, 0]
            inside = F.cross_entropy(self._scores(x[rows], *other), wanted[rows] - token.edges[i], reduction="none")
            out = out.index_add(0, rows, inside)
        return out.view_as(targets)


class TransformerXL(MemoryDecoder):
    """ids (B, N) -> logits (B, N, vocab); with cutoffs, log-probabilities. `memory` starts what is carried on.

    context: the longest segment. mem_len: tokens of memory; with same_length every token sees so many. width: channels of
    all heads; None: dim. cutoffs, div, embed, tie, tie_projections: of embedding and softmax. shared: one u and v for all
    layers. init_std: of the linear layers; None: Xavier.
    """

    def __init__(self, *, vocab: int = 256, context: int = 128, mem_len: int = 128, dim: int = 64, depth: int = 4,
                 heads: int = 4, width: int | None = None, ratio: float = 4.0, cutoffs: tuple[int, ...] = (), div: int = 1,
                 embed: int | None = None, tie: bool = True, tie_projections: bool = True, shared: bool = True,
                 same_length: bool = False, clamp: int | None = None, drop_path: float = 0.0,
                 init_std: float | None = None, residual: Spec[Residual] = spec(PostNorm)) -> None:
        if mem_len < 0 or (same_length and not mem_len):
            raise DoesNotFit(f"mem_len is 0 or more, and 1 or more with same_length, got {mem_len}")
        self_attention = spec(RelativeAttention, heads=heads, causal=True, width=width, clamp=clamp, shared=shared,
                              window=mem_len if same_length else None)
        stack = Stack(dim, depth, {"mixer": self_attention, "channel": spec(FeedForward, ratio=ratio)},
                      residual.offer(norm=spec(LayerNorm, eps=1e-5), drop_path=drop_path))
        restart_linears(stack, init_std)
        token = AdaptiveEmbedding(vocab, dim, cutoffs=tuple(cutoffs), div=div, embed=embed)
        super().__init__(vocab, context, stack, position=spec(NoPosition), norm=spec(NoNorm), token=token)
        self.head = AdaptiveSoftmax(token, tie=tie, tie_projections=tie_projections)
        self.mem_len, self.same_length = mem_len, same_length

    def memory(self, mem_len: int | None = None, *, zeros: int = 0) -> Memory:
        """A memory of `mem_len` tokens, None: as many as in training. It is empty; with zeros=B it is full of zeros for B
        rows, as TensorFlow's and transformers' models start."""
        memory = super().memory(mem_len)
        memory.window = memory.limit or None if self.same_length else None
        if zeros:
            empty = self.token.tables[0].weight.new_zeros(zeros, memory.limit, self.stack.dim)
            memory.states = {layer["mixer"].place: empty for layer in self.stack.layers}
        return memory

    def logits(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n v"]:
        return self.head(x, self.token)

    def nll(self, batch: Int[Tensor, "b n"], targets: Int[Tensor, "b n"], *,
            cache: Cache | None = None) -> Float[Tensor, "b n"]:
        """-log p of the targets, those of rare words' clusters computed where they are needed."""
        return self.head.nll(self.hidden(batch, cache=cache), targets, self.token)


PAPER = spec(TransformerXL, init_std=0.02)
CHARACTERS = PAPER.but(vocab=204, context=768, mem_len=768, dim=1024, depth=24, heads=8, ratio=3.0)
WORDS = PAPER.but(vocab=267735, cutoffs=(20000, 40000, 200000))
SENTENCES = PAPER.but(vocab=793471, cutoffs=(60000, 100000, 640000), context=32, mem_len=32, div=4, tie_projections=False)
PRESETS = {
    "nano": spec(TransformerXL),
    "enwik8_12l": CHARACTERS.but(context=512, mem_len=512, dim=512, depth=12, ratio=4.0),
    "enwik8_24l": CHARACTERS,
    "text8_24l": CHARACTERS.but(vocab=27),
    "wt103_base": WORDS.but(context=150, mem_len=150, dim=410, depth=16, heads=10, ratio=2100 / 410),
    "wt103_large": WORDS.but(context=384, mem_len=384, dim=1024, depth=18, heads=16, div=4, shared=False),
    "lm1b_base": SENTENCES.but(dim=1024, depth=18, heads=8),
    "lm1b_large": SENTENCES.but(dim=1280, depth=24, heads=16, ratio=6.4),
}

def _frequencies(weight: Tensor, state: State, options: Options) -> Tensor:
    return BASE ** (-torch.arange(0, weight.shape[1], 2) / weight.shape[1])


REVERSED = Op(lambda t, o: [t[0].flip(0)], lambda t, o: [t[0].flip(0)])


def _layout(body: str, clusters: Op, *, shared: bool) -> list[Any]:
    """shared: whether u and v of the first layer are written under the model's name or the layer's; both are read."""
    theirs, ours = f"{body}layers.{{i}}.", "stack.layers.{i}."
    one = [rule(f"{body}r_w_bias", "stack.layers.0.mixer.inner.u"), rule(f"{body}r_r_bias", "stack.layers.0.mixer.inner.v")]
    each = [rule(f"{theirs}dec_attn.r_w_bias", f"{ours}mixer.inner.u"),
            rule(f"{theirs}dec_attn.r_r_bias", f"{ours}mixer.inner.v")]
    return [
        *(one + each if shared else each + one),
        drop(f"{body}pos_emb.inv_freq", "frequencies of the sinusoid, recomputed",
             ("stack.layers.0.mixer.inner.relative.weight", _frequencies)),
        rule(f"{theirs}dec_attn.qkv_net.weight", f"{ours}mixer.inner.qkv.weight"),
        rule(f"{theirs}dec_attn.r_net.weight", f"{ours}mixer.inner.relative.weight"),
        rule(f"{theirs}dec_attn.o_net.weight", f"{ours}mixer.inner.proj.weight"),
        rule(f"{theirs}dec_attn.layer_norm.*", f"{ours}mixer.norm.*"),
        rule(f"{theirs}pos_ff.CoreNet.0.*", f"{ours}channel.inner.fc1.*"),
        rule(f"{theirs}pos_ff.CoreNet.3.*", f"{ours}channel.inner.fc2.*"),
        rule(f"{theirs}pos_ff.layer_norm.*", f"{ours}channel.norm.*"),
        *[rule(names, f"token.{ours}", TIED) for names, ours in (
            ((f"{body}word_emb.emb_layers.{{i}}.weight", "crit.out_layers.{i}.weight"), "tables.{i}.weight"),
            ((f"{body}word_emb.emb_projs.{{i}}", "crit.out_projs.{i}"), "projections.{i}"))],
        rule(f"{body}word_emb.emb_layers.{{i}}.weight", "token.tables.{i}.weight"),
        rule(f"{body}word_emb.emb_projs.{{i}}", "token.projections.{i}"),
        rule("crit.out_layers.{i}.weight", "head.tables.{i}"),
        rule("crit.out_layers.{i}.bias", "head.biases.{i}"),
        rule("crit.out_projs.{i}", "head.projections.{i}"),
        rule("crit.cluster_weight", "head.cluster_weight", clusters),
        rule("crit.cluster_bias", "head.cluster_bias", clusters),
    ]


KEYS = {
    "authors": keymap(*_layout("", REVERSED, shared=True)),  # pytorch/mem_transformer.py
    "transformers": keymap(*_layout("transformer.", SAME, shared=False)),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes and what is tied. Untold by the tensors: context and mem_len, the preset's of the sizes or 512; clamp and
    same_length, which are for evaluation; where the norm stands; cutoffs where there is one table (div=1), unless a preset
    has that vocabulary."""
    dim = state["stack.layers.0.mixer.inner.proj.weight"].shape[0]
    heads, size = state["stack.layers.0.mixer.inner.u"].shape
    depth = count(state, "stack.layers.{i}.mixer.norm.weight")
    tables = [state[f"token.tables.{i}.weight"] for i in range(count(state, "token.tables.{i}.weight"))]
    projections = [state[f"token.projections.{i}"] for i in range(count(state, "token.projections.{i}"))]
    vocab, embed = sum(len(t) for t in tables), tables[0].shape[1]
    div = 1
    cutoffs: Any = ()
    if len(tables) > 1:
        div = next(d for d in range(2, embed + 2) if all(embed // d**i == t.shape[1] for i, t in enumerate(tables)))
        cutoffs = tuple(sum(len(t) for t in tables[:i]) for i in range(1, len(tables)))
    elif "head.cluster_weight" in state:
        known = [p["cutoffs"] for p in PRESETS.values() if "cutoffs" in dict(p.options) and p["vocab"] == vocab]
        cutoffs = next((c for c in known if len(c) == len(state["head.cluster_weight"])), ())
        cutoffs = Assumed(cutoffs, "one table of tokens does not show them; those of a preset with this vocabulary, if any")
    elif projections and embed == dim:
        div = 2  # one cluster, with a projection that div = 1 has not

    def tied(ours: str, theirs: Tensor) -> bool:
        return ours not in state or same(state[ours], theirs)

    clusters = range(1, 1 + len(state.get("head.cluster_weight", ())))
    sizes = {"vocab": vocab, "dim": dim, "depth": depth}
    return sizes | {
        **{k: as_preset(PRESETS, k, 512, **sizes) for k in ("context", "mem_len")}, "heads": heads,
        "width": None if heads * size == dim else heads * size,
        "ratio": state["stack.layers.0.channel.inner.fc1.weight"].shape[0] / dim,
        "cutoffs": cutoffs, "div": div, "embed": None if embed == dim else embed,
        "tie": all(tied(f"head.tables.{i}", t) for i, t in enumerate(tables)),
        "tie_projections": not projections or all(
            tied(f"head.projections.{i}", projections[min(i, len(projections) - 1)]) for i in clusters),
        "shared": all(tied(f"stack.layers.{i}.mixer.inner.{b}", state[f"stack.layers.0.mixer.inner.{b}"])
                      for i in range(1, depth) for b in "uv"),
    }
