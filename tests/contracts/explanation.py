"""Explanations: every method on every host of the card."""

import pytest
import torch
from torch.testing import assert_close

from contract import check
from formarium.arena.explanations import explain, methods
from formarium.core.build import create_model
from formarium.core.errors import BadData, DoesNotFit, UnknownName


def each(case):
    """(method, model) for every method and host; models have left their start."""
    assert case.card.hosts
    assert set(case.entry.module.METHODS) <= set(methods())
    for host in case.card.hosts:
        torch.manual_seed(0)
        model = create_model(host).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        for method in case.entry.module.METHODS:
            yield method, model


@check("explanation")
def explains(case):
    """A map a sample, finite, for the predicted class unless one is given; a batch is as each image alone."""
    for method, model in each(case):
        batch = model.example(3)
        found = explain(model, batch, method=method)
        assert found.method == method
        assert found.relevance.shape[0] == 3
        assert found.relevance.isfinite().all()
        assert found.relevance.any()
        assert torch.equal(found.target, model(batch).argmax(1))
        assert found.upsampled((30, 31)).shape == (3, 30, 31)
        alone = torch.cat([explain(model, one, t, method=method).relevance
                           for one, t in zip(batch.split(1), found.target, strict=True)])
        assert_close(found.relevance, alone, atol=1e-5, rtol=1e-3)


@check("explanation")
def leaves_the_model(case):
    for method, model in each(case):
        before, batch = {k: v.clone() for k, v in model.state_dict().items()}, model.example(1)
        model.train()
        explain(model, batch, 1, method=method)
        assert model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not batch.requires_grad


@check("explanation")
def depends_on_the_class(case):
    """The method of the paper's name is specific to the class."""
    for method, model in each(case):
        if method == case.entry.name:
            batch = model.example(1)
            one, other = (explain(model, batch, t, method=method).relevance for t in (0, 1))
            assert (one - other).norm() > 0.01 * one.norm()


@check("explanation")
def refuses(case):
    for method, model in each(case):
        batch = model.example(2)
        for target in (-1, model.num_classes, 0.5):
            with pytest.raises(DoesNotFit, match="target is a class from 0 to"):
                explain(model, batch, target, method=method)
        with pytest.raises(BadData, match="NaN or infinite"):
            explain(model, torch.full_like(batch, torch.nan), method=method)
        with pytest.raises(UnknownName, match="layers"):
            explain(model, batch, method=method, layers=3)
    with pytest.raises(UnknownName, match=case.entry.name):
        explain(model, batch, method=f"{case.entry.name}s")
    with pytest.raises(DoesNotFit, match="plain ViTs"):
        explain(create_model("swin/nano"), create_model("swin/nano").example(1), method=case.entry.name)
    with pytest.raises(DoesNotFit, match="only a classifier"):
        explain(create_model("vit/nano", num_classes=0), batch, method=case.entry.name)
