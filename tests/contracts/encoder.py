"""Text encoders, in double precision, so that equal means equal."""

import re

import pytest
import torch
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.errors import BadData, DoesNotFit
from formarium.skeletons.encoder import Encoder

KINDS["encoder"] = Kind(Encoder, lambda model, batch: (*batch.shape, model.stack.dim))
LENGTHS = (5, 1, 17, 5)


@check("encoder")
@torch.no_grad()
def padded_texts(case):
    """What is in the padding does not matter, nor how much there is of it; it is not looked at."""
    model = case.build().double().eval()
    rows = [model.example(1, (n,)) for n in LENGTHS]
    for width in (max(LENGTHS), max(LENGTHS) + 9):
        ids, mask = model.example(4, (width,)), torch.zeros(4, width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, :row.shape[1]], mask[i, :row.shape[1]] = row, True
        out = model(ids, mask=mask)
        pooled = model.sentence(ids, mask=mask)
        for i, row in enumerate(rows):
            assert_close(out[i:i + 1, :row.shape[1]], model(row))
            assert_close(pooled[i:i + 1], model.sentence(row))
        assert_close(pooled.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    assert (model(ids) - out)[1, 0].abs().max() > 1e-6  # without the mask it is


@check("encoder")
@torch.no_grad()
def sees_both_ways(case):
    model = case.build().double()
    batch = model.example(1)
    before = answer(model, batch)
    for t in (0, batch.shape[1] // 2, batch.shape[1] - 1):
        other = batch.clone()
        other[:, t] = (other[:, t] + 1) % model.vocab
        assert ((answer(model, other) - before).abs().amax(dim=(0, 2)) > 1e-9).all()


@check("encoder")
@torch.no_grad()
def texts_of_any_length(case):
    model = case.build().eval()
    for n in (1, 2, model.context // 2 + 1, model.context):
        assert model(model.example(2, (n,))).shape[:2] == (2, n)
    with pytest.raises(DoesNotFit, match=f"built for {model.context} tokens, got {model.context + 1}; .*context="):
        model(model.example(2, (model.context + 1,)))
    longer = case.build(context=model.context + 1).eval()
    assert longer(longer.example(1)).shape[1] == model.context + 1


@check("encoder")
def segments_matter(case):
    model = case.build().eval()
    batch = model.example(2)
    first = torch.zeros_like(batch)
    assert_close(model(batch, segments=first), model(batch))
    assert (model(batch, segments=first + 1) - model(batch)).abs().max() > 1e-3
    plain = case.build(segments=0).eval()
    assert answer(plain, batch).isfinite().all()
    for built, wrong in ((plain, first), (model, first[:, 1:])):
        with pytest.raises(DoesNotFit, match=r"expected segments .*segments="):
            built(batch, segments=wrong)


@check("encoder")
def refuses_wrong_texts(case):
    model = case.build().eval()
    batch = model.example(2)
    for wrong in (batch.float(), batch.bool(), batch.to(torch.uint8), batch[0], batch[None]):
        with pytest.raises(DoesNotFit, match=re.escape(f"(B, N), int64 or int32, got {tuple(wrong.shape)} {wrong.dtype}")):
            model(wrong)
    real = torch.ones_like(batch, dtype=torch.bool)
    for wrong in (real[:, 1:], real[0], real.float()):
        with pytest.raises(DoesNotFit, match="True where a token is real, got"):
            model(batch, mask=wrong)
    real[1] = False
    with pytest.raises(BadData, match="padding alone"):
        model(batch, mask=real)


@check("encoder", lambda case: "packed" in case.card.can)
@torch.no_grad()
def packed_texts(case):
    model = case.build().double().eval()
    row = model.example(1, (sum(LENGTHS),))
    alone = torch.cat([answer(model, sequence) for sequence in row.split(LENGTHS, dim=1)], dim=1)
    assert_close(model(row, lengths=LENGTHS), alone)
    for wrong in ((5, 5), (28, 1)):
        with pytest.raises(DoesNotFit, match="one row"):
            model(row, lengths=wrong)
    with pytest.raises(DoesNotFit, match="one row"):
        model(row.expand(2, -1), lengths=LENGTHS)
    with pytest.raises(DoesNotFit, match="give lengths or mask, not both"):
        model(row, lengths=LENGTHS, mask=torch.ones_like(row, dtype=torch.bool))
