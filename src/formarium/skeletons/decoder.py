"""A language decoder: token ids to the next token's logits, with cached generation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.ctx import Cache, Ctx
from ..core.errors import DoesNotFit
from ..core.model import Model
from ..core.spec import Spec, spec
from ..parts.norm import LayerNorm
from ..parts.position import AbsolutePosition
from ..weights.adapt import Change, refit_vocabulary
from .stack import Stack


class Decoder(Model):
    """ids (B, N) -> embedding + position -> stack -> norm -> logits (B, N, vocab). No token sees a later one.

    tie: the head uses the embedding's weights. context: the longest sequence it is built for. token: what embeds the ids,
    where that is no plain table; `logits` is then the model's own.
    """

    pipeline = "text-generation"
    adapts = ("vocab",)

    def __init__(self, vocab: int, context: int, stack: Stack, *, position: Spec[AbsolutePosition],
                 norm: Spec[nn.Module] = spec(LayerNorm), tie: bool = True, token: nn.Module | None = None) -> None:
        super().__init__()
        self.vocab, self.context = vocab, context
        if token is None:
            token = nn.Embedding(vocab, stack.dim)
            nn.init.normal_(token.weight, std=0.02)
        self.token = token
        self.position = position(stack.dim, context)
        self.stack = stack
        self.norm = norm(stack.dim)
        self.head = None if tie else nn.Linear(stack.dim, vocab, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
        for module in self.modules():
            if getattr(module, "across_tokens", False):
                raise DoesNotFit(f"{type(module).__name__} does not fit here: in a language decoder no token may see a "
                                 "later one, and it takes statistics over all of them")

    def refit(self, name: str, tensor: Tensor | None, was: "Decoder") -> Change | None:
        return refit_vocabulary(name, tensor, {"token.weight": self.vocab, "head.weight": self.vocab})

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Int[Tensor, "b n"]:
        return torch.randint(self.vocab, (batch, *(shape or (self.context,))))

    def embed(self, batch: Int[Tensor, "b n"], cache: Cache | None = None,
              lengths: tuple[int, ...] | None = None) -> tuple[Float[Tensor, "b n c"], Ctx]:
        if batch.ndim != 2 or batch.dtype not in (torch.int64, torch.int32):
            raise DoesNotFit(f"expected token ids (B, N), int64 or int32, got {tuple(batch.shape)} {batch.dtype}")
        if lengths and (batch.shape[0] != 1 or batch.shape[1] != sum(lengths)):
            raise DoesNotFit(f"lengths={lengths} describe one row (1, {sum(lengths)}), got {tuple(batch.shape)}")
        longest = max(lengths) if lengths else batch.shape[1] + (0 if cache is None else cache.length)
        if longest > self.context:
            raise DoesNotFit(f"built for {self.context} tokens, got {longest}; shorten the text or build with context=")
        ctx = Ctx(cache=cache, lengths=lengths)
        return self.position(self.token(batch), ctx), ctx

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = self.stack(x, ctx)
        return self.norm(x), ctx

    def forward(self, batch: Int[Tensor, "b n"], *, cache: Cache | None = None,
                lengths: tuple[int, ...] | None = None) -> Float[Tensor, "b n v"]:
        """cache: tokens already seen, extended in place. lengths: batch is one packed row of sequences of these lengths."""
        return self.logits(self.hidden(batch, cache=cache, lengths=lengths))

    def hidden(self, batch: Int[Tensor, "b n"], *, cache: Cache | None = None,
               lengths: tuple[int, ...] | None = None) -> Float[Tensor, "b n c"]:
        """As forward, but the last tokens, of which `logits` are made."""
        x = self.encode(*self.embed(batch, cache, lengths))[0]
        if cache is not None:
            cache.length += batch.shape[1]
        return x

    def logits(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n v"]:
        return F.linear(x, self.token.weight if self.head is None else self.head.weight)

    @torch.no_grad()
    def generate(self, prompt: Int[Tensor, "b n"], tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Int[Tensor, "b m"]:
        """The prompt with `tokens` more: sampled, or the likeliest at temperature 0. Past the context half is kept."""
        return torch.cat([prompt, *self.stream(prompt, tokens, temperature, top_k, generator)], dim=1)

    @torch.no_grad()
    def stream(self, prompt: Int[Tensor, "b n"], tokens: int, temperature: float = 1.0, top_k: int | None = None,
               generator: torch.Generator | None = None) -> Iterator[Int[Tensor, "b 1"]]:
        """The tokens of `generate`, one at a time."""
        if prompt.shape[1] == 0:
            raise DoesNotFit("generation needs a prompt of at least one token")
        ids, cache, new = prompt[:, -self.context:], Cache(), prompt[:, -self.context:]
        for _ in range(tokens):
            if cache.length + new.shape[1] > self.context:  # full: start again from the last half
                ids = ids[:, -max(1, self.context // 2):]
                cache, new = Cache(), ids
            new = pick(self(new, cache=cache)[:, -1], temperature, top_k, generator)
            ids = torch.cat((ids, new), dim=1)
            yield new


def pick(logits: Float[Tensor, "b v"], temperature: float, top_k: int | None,
         generator: torch.Generator | None) -> Int[Tensor, "b 1"]:
    """The next token: sampled among the `top_k` likeliest, or the likeliest at temperature 0."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
