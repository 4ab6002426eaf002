"""A text encoder: token ids to one vector a token; every token sees all others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.ctx import Ctx
from ..core.errors import BadData, DoesNotFit
from ..core.model import Model
from ..core.spec import Spec, spec
from ..parts.channel import linear
from ..parts.norm import NoNorm
from ..parts.position import AbsolutePosition
from ..weights.adapt import Change, refit_vocabulary
from .stack import Stack


class Encoder(Model):
    """ids (B, N) -> embedding + position + segment -> norm -> stack -> norm -> tokens (B, N, C).

    context: the longest sequence it is built for. segments: kinds of text that are told apart (question, answer); 0: none.
    embed_norm: before the stack; norm: after it, which stacks with post-norm have already. embed_dim: width of the
    embeddings and their norm, where a projection takes them to the stack's.
    """

    pipeline = "feature-extraction"
    adapts = ("vocab",)

    def __init__(self, vocab: int, context: int, stack: Stack, *, position: Spec[AbsolutePosition], segments: int = 0,
                 embed_norm: Spec[nn.Module] = spec(NoNorm), norm: Spec[nn.Module] = spec(NoNorm),
                 embed_dim: int | None = None) -> None:
        super().__init__()
        self.vocab, self.context, self.segments = vocab, context, segments
        width = embed_dim or stack.dim
        self.token = nn.Embedding(vocab, width)
        nn.init.normal_(self.token.weight, std=0.02)
        self.position = position(width, context)
        self.segment = nn.Embedding(segments, width) if segments else None
        if self.segment is not None:
            nn.init.normal_(self.segment.weight, std=0.02)
        self.embed_norm = embed_norm(width)
        self.project = nn.Identity() if embed_dim is None else linear(embed_dim, stack.dim)
        self.stack = stack
        self.norm = norm(stack.dim)

    def refit(self, name: str, tensor: Tensor | None, was: "Encoder") -> Change | None:
        return refit_vocabulary(name, tensor, {"token.weight": self.vocab})

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Int[Tensor, "b n"]:
        return torch.randint(self.vocab, (batch, *(shape or (self.context,))))

    def embed(self, batch: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None,
              segments: Int[Tensor, "b n"] | None = None,
              lengths: Sequence[int] | None = None) -> tuple[Float[Tensor, "b n c"], Ctx]:
        self._check(batch, mask, segments, lengths)
        ctx = Ctx(mask=None if mask is None else mask[:, None, None], lengths=None if lengths is None else tuple(lengths))
        x = self.token(batch)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(batch) if segments is None else segments)
        return self.project(self.embed_norm(self.position(x, ctx))), ctx

    def _check(self, batch: Tensor, mask: Tensor | None, segments: Tensor | None, lengths: Sequence[int] | None) -> None:
        if batch.ndim != 2 or batch.dtype not in (torch.int64, torch.int32):
            raise DoesNotFit(f"expected token ids (B, N), int64 or int32, got {tuple(batch.shape)} {batch.dtype}")
        if lengths is not None and (batch.shape[0] != 1 or batch.shape[1] != sum(lengths)):
            raise DoesNotFit(f"lengths={lengths} describe one row (1, {sum(lengths)}), got {tuple(batch.shape)}")
        if lengths is not None and mask is not None:
            raise DoesNotFit("packed sequences have no padding: give lengths or mask, not both")
        longest = batch.shape[1] if lengths is None else max(lengths)
        if longest > self.context:
            raise DoesNotFit(f"built for {self.context} tokens, got {longest}; shorten the text or build with context=")
        if mask is not None and (mask.shape != batch.shape or mask.dtype != torch.bool):
            raise DoesNotFit(f"expected a mask {tuple(batch.shape)} of bool, True where a token is real, got "
                             f"{tuple(mask.shape)} {mask.dtype}")
        if segments is not None and (self.segment is None or segments.shape != batch.shape):
            raise DoesNotFit(f"expected segments {tuple(batch.shape)} of a model built with segments=, got "
                             f"{tuple(segments.shape)} for one with segments={self.segments}")
        if mask is not None and not torch.compiler.is_compiling() and not mask.is_meta and not mask.any(1).all():
            raise BadData("a sequence of the batch is padding alone; leave it out")

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = self.stack(x, ctx)
        return self.norm(x), ctx

    def forward(self, batch: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None,
                segments: Int[Tensor, "b n"] | None = None, lengths: Sequence[int] | None = None) -> Float[Tensor, "b n c"]:
        """mask: True where a token is real, not padding. lengths: batch is one packed row of sequences of these lengths."""
        return self.encode(*self.embed(batch, mask, segments, lengths))[0]

    def sentence(self, batch: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b c"]:
        """One unit vector a sequence: the mean of its real tokens, scaled to length 1 (Sentence-BERT, arXiv 1908.10084).

        Dot products of these vectors are cosine similarities.
        """
        x = self(batch, mask=mask)
        real = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask
        weights = real.to(x.dtype)[..., None]
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)
