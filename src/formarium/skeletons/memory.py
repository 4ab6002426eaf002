"""A decoder with a memory: it reads a text segment by segment and carries what its layers saw from one to the next."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.ctx import Cache, Ctx, Place
from ..core.errors import DoesNotFit
from .decoder import Decoder, pick


@dataclass
class Memory(Cache):
    """What a part kept of the segments before is under `states[self.place]`; what it keeps for the next one goes to
    `kept[self.place]`, since layers run twice under gradient checkpointing. No gradient enters a memory.

    limit: the most tokens that a part keeps. window: a token sees so many at most, itself included.
    """

    limit: int = 0
    window: int | None = None
    kept: dict[Place, Any] = field(default_factory=dict)

    def last(self, tokens: Float[Tensor, "... n d"]) -> Float[Tensor, "... m d"]:
        """Of (..., N, D) the last `limit` tokens, without gradient."""
        return tokens.detach()[..., max(0, tokens.shape[-2] - self.limit):, :]


class MemoryDecoder(Decoder):
    """A decoder that takes a Memory as its `cache`: the batch is then the next segment of each row's text.

    context: the longest segment. mem_len: tokens that a new memory holds. A plain Cache decodes within one segment.
    """

    mem_len: int

    def memory(self, mem_len: int | None = None) -> Memory:
        """An empty memory of `mem_len` tokens; None: as many as the model is built with."""
        return Memory(limit=self.mem_len if mem_len is None else mem_len)

    def embed(self, batch: Int[Tensor, "b n"], cache: Cache | None = None,
              lengths: tuple[int, ...] | None = None) -> tuple[Float[Tensor, "b n c"], Ctx]:
        if not isinstance(cache, Memory):
            return super().embed(batch, cache, lengths)
        if lengths is not None:
            raise DoesNotFit("a memory belongs to one text a row, and a packed row holds several; give them as a batch")
        x, ctx = super().embed(batch)
        return x, replace(ctx, cache=cache)

    def hidden(self, batch: Int[Tensor, "b n"], *, cache: Cache | None = None,
               lengths: tuple[int, ...] | None = None) -> Float[Tensor, "b n c"]:
        """As forward, but the last tokens; a Memory moves on by one segment."""
        if not isinstance(cache, Memory):
            return super().hidden(batch, cache=cache, lengths=lengths)
        segment = replace(cache, kept={})  # layers that run again must find the states of the first time
        x = super().hidden(batch, cache=segment, lengths=lengths)
        cache.states, cache.length = segment.kept, segment.length
        return x

    @torch.no_grad()
    def stream(self, prompt: Int[Tensor, "b n"], tokens: int, temperature: float = 1.0, top_k: int | None = None,
               generator: torch.Generator | None = None) -> Iterator[Int[Tensor, "b 1"]]:
        """The tokens of `generate`, one at a time: the memory goes on, however long the text becomes."""
        if prompt.shape[1] == 0:
            raise DoesNotFit("generation needs a prompt of at least one token")
        memory = self.memory(max(self.mem_len, self.context - 1))  # a text within the context is seen whole
        *before, new = prompt.split(self.context, dim=1)
        for segment in before:
            self.hidden(segment, cache=memory)
        for _ in range(tokens):
            new = pick(self(new, cache=memory)[:, -1], temperature, top_k, generator)
            yield new
