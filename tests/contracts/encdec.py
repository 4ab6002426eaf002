"""Encoder-decoders, in double precision, so that equal means equal: causality, padding, cache, beam search."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.ctx import Cache
from formarium.core.errors import BadData, DoesNotFit
from formarium.skeletons.encdec import EncDec

KINDS["encdec"] = Kind(EncDec, lambda model, batch: (*batch[1].shape, model.vocab))


@check("encdec")
def causal_in_the_target(case):
    model = case.build().double()
    source, target = model.example(2)
    before = answer(model, (source, target))
    for t in (1, target.shape[1] // 2, target.shape[1] - 1):
        other = target.clone()
        other[:, t] = (other[:, t] + 1) % model.vocab
        after = answer(model, (source, other))
        assert_close(after[:, :t], before[:, :t])
        assert ((after - before)[:, t].abs().amax(1) > 1e-6).all()


@check("encdec")
def sees_the_whole_source(case):
    """Each target token depends on each source token."""
    model = case.build().double()
    source, target = model.example(1)
    before = answer(model, (source, target))
    for t in (0, source.shape[1] // 2, source.shape[1] - 1):
        other = source.clone()
        other[:, t] = model.end if other[0, t] != model.end else model.start
        assert ((answer(model, (other, target)) - before).abs().amax(-1) > 1e-9).all()


@check("encdec")
def source_padding(case):
    """Padding changes no answer and gets no gradient; neither does what stands beside a sample in a batch."""
    model = case.build().double()
    source, target = model.example(2)
    short = source[:, :source.shape[1] - 5]
    padded = torch.cat((short, torch.full_like(source[:, :5], model.pad)), dim=1)
    assert_close(answer(model, (padded, target)), answer(model, (short, target)))
    mixed = torch.cat((padded[:1], source[1:]))
    assert_close(answer(model, (mixed, target))[:1], answer(model, (short[:1], target[:1])))
    with pytest.raises(BadData, match=rf"1 of 2 sources are nothing but padding \(token {model.pad}\).* number 1,"):
        model((torch.cat((source[:1], torch.full_like(source[1:], model.pad))), target))


@check("encdec")
def cached_target(case):
    model = case.build().double().eval()
    source, target = model.example(2)
    source[0, -4:] = model.pad
    m = target.shape[1]
    with torch.no_grad():
        memory = model.encode(*model.embed(source))
        whole = model((source, target))
        for pieces in ([1] * m, [m - 1, 1], [3, 1, m - 4], [m // 2 + 1, m - m // 2 - 1]):
            cache = Cache()
            out = torch.cat([model.decode(piece, memory, cache) for piece in target.split(pieces, dim=1)], dim=1)
            assert cache.length == m
            assert_close(out, whole)


@torch.no_grad()
def next_tokens(model: EncDec, source: Tensor, ids: list[int]) -> list[float]:
    """Log probabilities after start and these tokens, without cache; neither padding nor, unless it is `end`, start."""
    logits = model((source[None], torch.tensor([[model.start, *ids]])))[0, -1]
    logits[[t for t in (model.pad, model.start) if t != model.end]] = -math.inf
    return logits.log_softmax(-1).tolist()


def search(model: EncDec, source: Tensor, tokens: int, beam: int, length_penalty: float) -> list[int]:
    """Beam search of one sample by its definition."""
    def score(logp: float, ids: list[int]) -> float:
        return logp / ((5 + len(ids)) / 6) ** length_penalty

    live, complete = [(0.0, [])], []
    for _ in range(tokens):
        grown = [(logp + more, [*ids, t]) for logp, ids in live for t, more in enumerate(next_tokens(model, source, ids))]
        grown = sorted((g for g in grown if g[0] > -math.inf), key=lambda g: -g[0])
        complete += [g for g in grown[:beam] if g[1][-1] == model.end][:beam - len(complete)]
        live = [g for g in grown if g[1][-1] != model.end][:beam]
        if len(complete) == beam:
            break
    complete += live[:beam - len(complete)]
    return max(complete, key=lambda g: score(*g))[1]


def ends_often(case, by: float) -> EncDec:
    """Ends some hypotheses early: `end` is made likelier at every place. A tied head would repeat its last token."""
    model = case.build(tie="none").double().eval()
    model.decode = lambda *a, plain=model.decode: plain(*a) + by * torch.eye(model.vocab)[model.end]
    return model


@check("encdec")
def greedy_generation(case):
    """A beam of one takes the likeliest token at each step."""
    for by in (0.0, 2.0):
        model = ends_often(case, by)
        source, _ = model.example(5)
        source[3, -7:] = model.pad
        out = model.generate(source, 12)
        for row, ids in zip(source, out.tolist(), strict=True):
            alone = []
            while len(alone) < 12 and model.end not in alone:
                likely = next_tokens(model, row, alone)
                alone.append(likely.index(max(likely)))
            assert ids == alone + [model.pad] * (out.shape[1] - len(alone))


@check("encdec")
def beam_search(case):
    """A batch as each alone, with and without a length penalty; some samples end before others."""
    lengths = set()
    for by, beam, penalty in ((0.0, 3, 0.6), (2.0, 2, 0.0), (3.0, 3, 0.6), (3.0, 4, 1.5)):
        model = ends_often(case, by)
        source, _ = model.example(4)
        source[2, -7:] = model.pad
        out = model.generate(source, 8, beam=beam, length_penalty=penalty)
        for row, ids in zip(source, out.tolist(), strict=True):
            alone = search(model, row, 8, beam, penalty)
            assert ids == alone + [model.pad] * (out.shape[1] - len(alone))
            lengths.add(len(alone))
            assert torch.equal(model.generate(row[None], 8, beam=beam, length_penalty=penalty)[0], torch.tensor(alone))
    assert len(lengths) > 2
    assert 8 in lengths


@check("encdec")
def refuses_wrong_pairs(case):
    model = case.build().eval()
    source, target = model.example(2)
    for wrong in (source.float(), source.bool(), source[0], source[None]):
        with pytest.raises(DoesNotFit, match=re.escape(f"source ids (B, N), int64 or int32, got {tuple(wrong.shape)}")):
            model((wrong, target))
        with pytest.raises(DoesNotFit, match=re.escape(f"target ids (B, N), int64 or int32, got {tuple(wrong.shape)}")):
            model((source, wrong))
    n, m = source.shape[1], target.shape[1]
    with pytest.raises(DoesNotFit, match=f"built for {n} source tokens, got {n + 1}.*source_context="):
        model((torch.cat((source, source[:, :1]), dim=1), target))
    with pytest.raises(DoesNotFit, match=f"built for {m} target tokens, got {m + 1}.* context="):
        model((source, torch.cat((target, target[:, :1]), dim=1)))
    for tokens in (0, m + 1):
        with pytest.raises(DoesNotFit, match=f"1 to {m}, the context .* not {tokens}"):
            model.generate(source, tokens)
    with pytest.raises(DoesNotFit, match="beam is 1 or more, not 0"):
        model.generate(source, beam=0)
