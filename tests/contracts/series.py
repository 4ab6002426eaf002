"""Forecasters: histories, horizons, normalisation."""

import re

import pytest
import torch

from contract import KINDS, Kind, answer, check
from formarium.core.errors import BadData, DoesNotFit
from formarium.skeletons.series import Forecaster

KINDS["series"] = Kind(Forecaster, lambda model, batch: (len(batch), model.horizon, batch.shape[2]))


@check("series")
def refuses_wrong_histories(case):
    model = case.build(variates=5).eval()
    batch = model.example(2)
    assert batch.shape == (2, model.context, 5)
    wrong_shapes = (batch[:, 1:], torch.cat((batch, batch[:, :1]), 1), batch[..., 1:], batch[0], batch.mT)
    for wrong in (*wrong_shapes, batch.long()):
        with pytest.raises(DoesNotFit, match=re.escape(f"(B, {model.context}, 5) of floating point numbers, steps before "
                                                       f"variates, got {tuple(wrong.shape)} {wrong.dtype}")):
            model(wrong)
    for value in (torch.nan, torch.inf):
        wrong = batch.clone()
        wrong[1, 3, 2] = value
        with pytest.raises(BadData, match=r"1 of \d+ values of the history are NaN or infinite, in variate 2 "):
            model(wrong)


@check("series")
def horizons(case):
    for horizon in (1, 7, 96):
        model = case.build(horizon=horizon)
        assert model.horizon == horizon
        assert answer(model, model.example(2)).shape[1] == horizon
    for option in ("context", "horizon", "variates"):
        with pytest.raises(DoesNotFit, match=f"{option} is 1 or more, got 0"):
            case.build(**{option: 0})


@check("series")
def contexts(case):
    for context in (96, 192):
        model = case.build(context=context)
        assert model.example(2).shape[1] == context
        assert answer(model, model.example(2)).isfinite().all()


@check("series")
def normalises(case):
    """What scales and shifts a variate's history does so to its forecast; not where normalise is off."""
    scale, shift = 3.0, -20.0
    for normalise in (True, False):
        model = case.build(normalise=normalise).double()
        batch = model.example(2).double() * 5
        out, other = answer(model, batch), answer(model, batch * scale + shift)
        distance = (other - (out * scale + shift)).abs().max() / out.abs().max()
        assert (distance < 1e-4) == normalise
    model = case.build()
    assert answer(model, torch.ones_like(model.example(2))).isfinite().all()  # a variate that does not change
