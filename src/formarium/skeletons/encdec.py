"""An encoder and a decoder: source ids to target ids, with cached generation by beam search."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core.ctx import Cache, Ctx
from ..core.errors import BadData, DoesNotFit, unknown
from ..core.model import Model
from ..core.part import Residual
from ..core.spec import Spec, spec
from ..parts.norm import NoNorm
from ..parts.position import AbsolutePosition
from ..weights.adapt import Change, refit_vocabulary
from .stack import Stack

TIES = ("all", "target", "none")
Memory = tuple[Tensor, Ctx]  # tokens of the source, and what is true of them


class CrossStack(Stack):
    """Layers of which the sublayer `cross` alone sees the memory: a mixer that can work on either must not mistake it."""

    def _layer(self, i: int, ctx: Ctx) -> list[tuple[Residual, Ctx]]:
        assert ctx.memory is not None
        alone, crossing = replace(ctx, memory=None), replace(ctx, mask=ctx.memory[1].mask)
        return [(s, crossing if name == "cross" else alone) for name, s in self.layers[i].items()]  # type: ignore[operator]


class EncDec(Model):
    """(source ids (B, N), target ids (B, M)) -> logits (B, M, vocab) of the tokens after those of the target.

    No target token sees a later one; source tokens `pad` are seen by none. A target begins with `start`, ends with `end`.
    source_context, context: the longest source and target. tie: "all" embeddings and the head share their weights,
    "target": those of the target alone, "none". scale_embedding: embeddings are multiplied by sqrt(dim).
    norm: after each stack, for residual schemes that leave the tokens without one.
    """

    pipeline = "translation"
    adapts = ("vocab", "source_vocab")

    def __init__(self, encoder: Stack, decoder: CrossStack, *, source_vocab: int, vocab: int, source_context: int,
                 context: int, position: Spec[AbsolutePosition], norm: Spec[nn.Module] = spec(NoNorm), tie: str = "all",
                 scale_embedding: bool = True, pad: int = 0, start: int = 1, end: int = 2) -> None:
        super().__init__()
        if tie not in TIES:
            raise unknown("tie", tie, TIES)
        if tie == "all" and source_vocab != vocab:
            raise DoesNotFit(f"tie='all' shares one table of tokens, and source_vocab={source_vocab} is not vocab={vocab}; "
                             "take tie='target' or 'none'")
        if not all(0 <= token < vocab for token in (pad, start, end)) or pad in (start, end) or pad >= source_vocab:
            raise DoesNotFit(f"pad={pad}, start={start} and end={end} are tokens of the target's {vocab}, pad is also one "
                             f"of the source's {source_vocab} and neither start nor end")
        self.source_vocab, self.vocab, self.source_context, self.context = source_vocab, vocab, source_context, context
        self.pad, self.start, self.end = pad, start, end
        dim = decoder.dim
        self.scale = math.sqrt(dim) if scale_embedding else 1.0
        self.source_token = None if tie == "all" else _embedding(source_vocab, dim)
        self.token = _embedding(vocab, dim)
        self.source_position, self.position = position(dim, source_context), position(dim, context)
        self.encoder, self.decoder = encoder, decoder
        self.encoder_norm, self.norm = norm(dim), norm(dim)
        self.head = nn.Linear(dim, vocab, bias=False) if tie == "none" else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=dim**-0.5)
        for module in self.modules():
            if getattr(module, "across_tokens", False):
                raise DoesNotFit(f"{type(module).__name__} does not fit here: it takes statistics over all tokens, and "
                                 "here no token may see padding or a later one of the target")

    def refit(self, name: str, tensor: Tensor | None, was: "EncDec") -> Change | None:
        return refit_vocabulary(name, tensor, {"source_token.weight": self.source_vocab, "token.weight": self.vocab,
                                               "head.weight": self.vocab})

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """shape: (N, M). No padding."""
        n, m = shape or (self.source_context, self.context)
        low = min(max(self.pad, self.start, self.end) + 1, self.source_vocab - 1, self.vocab - 1)
        return torch.randint(low, self.source_vocab, (batch, n)), torch.randint(low, self.vocab, (batch, m))

    def embed(self, batch: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        """The source."""
        _check_ids(batch, "source", self.source_context, 0)
        seen = batch != self.pad
        if not (torch.compiler.is_compiling() or batch.is_meta or seen.any(1).all()):
            empty = (~seen.any(1)).nonzero().flatten().tolist()
            raise BadData(f"{len(empty)} of {len(batch)} sources are nothing but padding (token {self.pad}), the first is "
                          f"number {empty[0]}, counted from 0")
        ctx = Ctx(mask=seen[:, None, None])
        table = self.token if self.source_token is None else self.source_token
        return self.source_position(self.scale * table(batch), ctx), ctx

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Memory:
        x, ctx = self.encoder(x, ctx)
        return self.encoder_norm(x), ctx

    def decode(self, target: Int[Tensor, "b m"], memory: Memory, cache: Cache | None = None) -> Float[Tensor, "b m v"]:
        """Logits after each token of the target. cache: target tokens already seen, extended in place."""
        _check_ids(target, "target", self.context, 0 if cache is None else cache.length)
        ctx = Ctx(memory=memory, cache=cache)
        x, _ = self.decoder(self.position(self.scale * self.token(target), ctx), ctx)
        if cache is not None:
            cache.length += target.shape[1]
        return F.linear(self.norm(x), self.token.weight if self.head is None else self.head.weight)

    def forward(self, batch: tuple[Int[Tensor, "b n"], Int[Tensor, "b m"]]) -> Float[Tensor, "b m v"]:
        source, target = batch
        return self.decode(target, self.encode(*self.embed(source)))

    @torch.no_grad()
    def generate(self, source: Int[Tensor, "b n"], tokens: int | None = None, *, beam: int = 1,
                 length_penalty: float = 0.6) -> Int[Tensor, "b m"]:
        """The best targets found, without `start`, up to `end`, then padding. tokens: at most; None: as the context allows.

        beam: hypotheses kept at a time; 1 is greedy. A hypothesis is complete when `end` makes it one of the best; a search
        is over with `beam` complete ones, or at the last token with those left as they are. The best has the highest log
        probability / ((5 + length) / 6)^length_penalty (Wu et al. 2016, arXiv 1609.08144, Eq. 14).
        """
        limit = self.context if tokens is None else tokens
        if not 1 <= limit <= self.context:
            raise DoesNotFit(f"tokens is 1 to {self.context}, the context that the model is built for, not {limit}")
        if beam < 1:
            raise DoesNotFit(f"beam is 1 or more, not {beam}")
        memory = _rows_of_memory(self.encode(*self.embed(source)),
                                 torch.arange(len(source), device=source.device).repeat_interleave(beam))
        cache, never = Cache(), [t for t in {self.pad, self.start} if t != self.end]
        searched = list(range(len(source)))  # the samples that the rows belong to, `beam` rows each
        complete: list[list[tuple[float, Tensor]]] = [[] for _ in searched]  # of each sample: score and ids
        live = source.new_full((len(source), beam, 1), self.start)
        scores = torch.full((len(source), beam), -math.inf, device=source.device)
        scores[:, 0] = 0.0  # at first all hypotheses of a sample are the same
        for length in range(1, limit + 1):
            logits = self.decode(live[:, :, -1].flatten()[:, None], memory, cache)[:, -1]
            logits[:, never] = -math.inf
            logs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            scores = scores.to(logs.dtype)
            ranked, at = (scores[..., None] + logs.unflatten(0, (-1, beam))).flatten(1).topk(2 * beam)
            parents, new = at // self.vocab, at % self.vocab
            ids = torch.cat((live.gather(1, parents[..., None].expand(-1, -1, length)), new[..., None]), dim=2)
            penalty = ((5 + length) / 6) ** length_penalty
            ends = new == self.end
            for row, rank in (ends & ranked.isfinite())[:, :beam].nonzero().tolist():
                if len(complete[searched[row]]) < beam:
                    complete[searched[row]].append((ranked[row, rank].item() / penalty, ids[row, rank, 1:]))
            going = ends.int().sort(dim=1, stable=True).indices[:, :beam]  # the best that do not end
            scores, parents = ranked.gather(1, going), parents.gather(1, going)
            live = ids.gather(1, going[..., None].expand(-1, -1, length + 1))
            if length == limit:
                for row, sample in enumerate(searched):
                    left = [j for j in range(beam - len(complete[sample])) if scores[row, j].isfinite()]
                    complete[sample] += [(scores[row, j].item() / penalty, live[row, j, 1:]) for j in left]
                break
            open_rows = [row for row, sample in enumerate(searched) if len(complete[sample]) < beam]
            if not open_rows:
                break
            kept = torch.tensor(open_rows, device=source.device)
            rows = (kept[:, None] * beam + parents[kept]).flatten()
            if not torch.equal(rows, torch.arange(len(live) * beam, device=source.device)):
                memory, searched = _rows_of_memory(memory, rows), [searched[row] for row in open_rows]
                live, scores = live[kept], scores[kept]
                cache.states = {place: tree_map_only(Tensor, lambda t, rows=rows: t[rows], state)
                                for place, state in cache.states.items()}
        best = [max(found, key=lambda f: f[0])[1] for found in complete]
        return nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=self.pad)


def _embedding(vocab: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(vocab, dim)
    nn.init.normal_(table.weight, std=dim**-0.5)
    return table


def _check_ids(ids: Tensor, what: str, context: int, seen: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise DoesNotFit(f"expected {what} ids (B, N), int64 or int32, got {tuple(ids.shape)} {ids.dtype}")
    if ids.shape[1] + seen > context:
        name = "source_context" if what == "source" else "context"
        raise DoesNotFit(f"built for {context} {what} tokens, got {ids.shape[1] + seen}; shorten it or build with {name}=")


def _rows_of_memory(memory: Memory, rows: Int[Tensor, "r"]) -> Memory:
    tokens, ctx = memory
    return tokens[rows], replace(ctx, mask=None if ctx.mask is None else ctx.mask[rows])
