"""Transforms: each on every host of its card, alone and after and before each other one."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from contract import answer, check
from formarium.core.build import create_model, from_recipe
from formarium.core.checkpoint import save
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.core.model import Model
from formarium.core.registry import card
from formarium.core.spec import option_names
from formarium.core.transform import apply, list_transforms
from formarium.weights.load import load


def hosts(case):
    """Each host, its parameters moved away from their start, and a batch."""
    for host in case.card.hosts:
        torch.manual_seed(0)
        model = create_model(host).eval()
        yield host, moved(model), model.example(2)


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
    return model


def layout(model):
    """All that a recipe must give again, but for the values."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n: (t.shape, t.dtype, n in trained) for n, t in model.state_dict().items()}


@check("transform")
def identity(case):
    """At strength zero the answers stay, also of adapters that were trained."""
    for host, model, batch in hosts(case):
        same = apply(model, case.name, **case.entry.module.IDENTITY)
        assert_close(answer(same, batch), answer(model, batch), atol=1e-5, rtol=1e-5)
        own = {id(p) for p in same.parameters()}
        again = apply(model, case.name, copy=False, **case.entry.module.IDENTITY)
        assert again is model
        assert not own & {id(p) for p in again.parameters()}
        assert host == again.recipe["name"]


@check("transform")
def leaves_the_original(case):
    for _, model, batch in hosts(case):
        before, told, kept = answer(model, batch), layout(model), {n: t.clone() for n, t in model.state_dict().items()}
        recipe = dict(model.recipe)
        moved(apply(model, case.name))
        assert layout(model) == told
        assert model.recipe == recipe
        assert all(t.equal(kept[n]) for n, t in model.state_dict().items())
        assert_close(answer(model, batch), before, atol=0, rtol=0)


@check("transform")
def replays(case):
    """The recipe, and the name with +, give the same tensors, trained or frozen alike."""
    for host, model, _ in hosts(case):
        settings = case.entry.module.IDENTITY
        changed = apply(apply(model, case.name, **settings), case.name)
        assert changed.recipe == model.recipe | {"transforms": [
            {"name": case.name, "settings": settings}, {"name": case.name, "settings": {}}]}
        with torch.device("meta"):
            again = from_recipe(changed.recipe)
        assert layout(again) == layout(changed)
        assert again.recipe == changed.recipe
        text = f"{host}+{case.name}({','.join(f'{k}={v}' for k, v in settings.items())}) + {case.name}"
        named = create_model(text)
        assert (named.recipe, layout(named)) == (changed.recipe, layout(changed))


@check("transform")
def saves_and_loads(case):
    """Whole; and what is trained alone, put onto the base, which no other model can take the place of."""
    for host, model, batch in hosts(case):
        changed = apply(model, case.name)
        with torch.no_grad():
            for p in changed.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
        with tempfile.TemporaryDirectory() as folder:
            whole, part, base = (Path(folder) / f"{n}.safetensors" for n in ("whole", "part", "base"))
            save(changed, whole)
            save(changed, part, only="trained")
            save(model, base)
            found = [load(whole), load(part, base=model), load(part, base=base), load(part, base=changed)]
            with pytest.raises(BadCheckpoint, match="give the model that was adapted"):
                load(part)
            with pytest.raises(BadCheckpoint, match="leave base= out"):
                load(whole, base=model)
            other = moved(from_recipe(model.recipe))
            if any(not trained for *_, trained in layout(changed).values()):  # else there is nothing to tell it by
                with pytest.raises(BadCheckpoint, match=f"another base: the frozen weights of this {host} are not"):
                    load(part, base=other)
        for again in found:
            assert again.recipe == changed.recipe
            assert not again.training
            assert layout(again) == layout(changed)
            assert_close(answer(again, batch), answer(changed, batch), atol=0, rtol=0)


@check("transform")
def chains(case):
    """After and before every transform that shares a host with it: runs, is told by the recipe, and comes back."""
    for host, model, batch in hosts(case):
        for other in (n for n in list_transforms() if host in card(n).hosts):
            for pair in ((case.name, other), (other, case.name)):
                changed = apply(apply(model, pair[0]), pair[1], copy=False)
                assert [t["name"] for t in changed.recipe["transforms"]] == list(pair)
                out = answer(changed, batch)
                assert out.isfinite().all()
                assert out.shape == answer(model, batch).shape
                with tempfile.TemporaryDirectory() as folder:
                    save(changed, Path(folder) / "m.safetensors")
                    again = load(Path(folder) / "m.safetensors")
                assert layout(again) == layout(changed)
                assert_close(answer(again, batch), out, atol=0, rtol=0)


@check("transform")
def says_why_not(case):
    """A model without layers has nothing to change; an unknown setting names the nearest."""
    class Bare(Model):
        pass

    with pytest.raises(DoesNotFit, match=f"{case.name} finds nothing to change in this Bare: it looks for"):
        apply(Bare(), case.name)
    setting = option_names(case.entry.module.TRANSFORM)[0]
    for _, model, _ in hosts(case):
        with pytest.raises(UnknownName, match=f"unknown setting of {case.name} '{setting}x'; did you mean .*{setting}"):
            apply(model, case.name, **{f"{setting}x": 1})
