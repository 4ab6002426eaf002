"""Language decoders, in double precision, so that equal means equal."""

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.ctx import Cache
from formarium.core.errors import DoesNotFit
from formarium.core.model import Model
from formarium.skeletons.decoder import Decoder

KINDS["language"] = Kind(Decoder, lambda model, batch: (*batch.shape, model.vocab))


@check("language")
def causal(case):
    model = case.build().double()
    batch = model.example(2)
    before = answer(model, batch)
    for t in (1, batch.shape[1] // 2, batch.shape[1] - 1):
        other = batch.clone()
        other[:, t] = (other[:, t] + 1) % model.vocab
        after = answer(model, other)
        assert_close(after[:, :t], before[:, :t])
        changed = (after - before).abs().amax(dim=(0, 2)) > 1e-6
        assert changed[t]
        assert not changed[:t].any()


def with_cache(model: Model, batch: Tensor, pieces: list[int]) -> Tensor:
    cache = Cache()
    out = torch.cat([model(piece, cache=cache) for piece in batch.split(pieces, dim=1)], dim=1)
    assert cache.length == batch.shape[1]
    return out


@check("language")
def cache_by_token(case):
    model = case.build().double().eval()
    batch = model.example(2)
    with torch.no_grad():
        assert_close(with_cache(model, batch, [1] * batch.shape[1]), model(batch))


@check("language")
def cache_by_chunk(case):
    model = case.build().double().eval()
    batch = model.example(2)
    n = batch.shape[1]
    with torch.no_grad():
        for pieces in ([n - 1, 1], [3, 1, n - 4], [n // 2 + 1, n - n // 2 - 1]):
            assert_close(with_cache(model, batch, pieces), model(batch))


@torch.no_grad()
def greedy(model: Model, prompt: Tensor, tokens: int) -> Tensor:
    """The likeliest continuation without a cache; a full context goes on from its last half."""
    seen, out = prompt[:, -model.context:], prompt
    for _ in range(tokens):
        if seen.shape[1] > model.context:
            seen = seen[:, -(model.context // 2):]
        new = model(seen)[:, -1].argmax(-1, keepdim=True)
        seen, out = torch.cat((seen, new), dim=1), torch.cat((out, new), dim=1)
    return out


@check("language")
def generates(case):
    """At temperature 0 as without a cache, within the context and past it; sampled, a function of the generator."""
    model = case.build().double().eval()
    prompt = model.example(2, (9,))
    assert torch.equal(model.generate(prompt, 12, temperature=0), greedy(model, prompt, 12))
    assert torch.equal(model.generate(prompt, 12, top_k=1), greedy(model, prompt, 12))
    for length in (model.context - 2, model.context, model.context + 5):
        prompt = model.example(2, (length,))
        assert torch.equal(model.generate(prompt, 5, temperature=0), greedy(model, prompt, 5))
    first, again, other = (model.generate(prompt, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@check("language")
def refuses_wrong_ids(case):
    model = case.build().eval()
    batch = model.example(2)
    for wrong in (batch.float(), batch.bool(), batch.to(torch.uint8), batch[0], batch[None]):
        with pytest.raises(DoesNotFit, match=re.escape(f"(B, N), int64 or int32, got {tuple(wrong.shape)} {wrong.dtype}")):
            model(wrong)
    longer = torch.cat((batch, batch[:, :1]), dim=1)
    with pytest.raises(DoesNotFit, match=f"{model.context} tokens, got {model.context + 1}"):
        model(longer)
    cache = Cache()
    model(batch, cache=cache)
    with pytest.raises(DoesNotFit, match=f"{model.context} tokens, got {model.context + 1}"):
        model(batch[:, :1], cache=cache)
    with pytest.raises(DoesNotFit, match="at least one token"):
        model.generate(batch[:, :0], 1)


@check("language", lambda case: "packed" in case.card.can)
def packed(case):
    model = case.build().double().eval()
    lengths = (5, 1, 17, 5)
    row = model.example(1, (sum(lengths),))
    alone = torch.cat([answer(model, sequence) for sequence in row.split(lengths, dim=1)], dim=1)
    assert_close(model(row, lengths=lengths), alone)
    for wrong in ((5, 5), (28, 1)):
        with pytest.raises(DoesNotFit, match="one row"):
            model(row, lengths=wrong)
    with pytest.raises(DoesNotFit, match="one row"):
        model(row.expand(2, -1), lengths=lengths)
