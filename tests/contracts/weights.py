"""Checkpoints: every preset, under our names and those of every layout, is recognised by its tensors alone."""

import pytest
import torch
from torch.testing import assert_close

from contract import answer, check
from formarium.core.build import create_model, preset, resolve
from formarium.core.errors import BadCheckpoint
from formarium.core.registry import systems
from formarium.weights.detect import detect, rivals
from formarium.weights.fit import OWN, Fit, defaults, fit, layouts_of, outline
from formarium.weights.load import load


def confused(name):
    """Systems of the same tensors, as either card says."""
    return {*systems()[name].card.confused_with, *(n for n, e in systems().items() if name in e.card.confused_with)}


def layouts(name):
    """Each layout that this preset has a form in, with its key map."""
    system, variant = name.split("/")
    return {n: k for n, k in layouts_of(system).items() if k.makes == "model" and variant not in k.without}


def settings_of(found: Fit):
    return defaults(preset(found.plan.name)) | {k: resolve(k, v) for k, v in found.plan.changes.items()}


def apart(name, found: Fit, layout):
    """Options of a preset that it was read without, but for those that are said to be assumed, or `also` names the preset
    for. Under others' names: nor those that the layout stands for, as it says the same of every model."""
    own, read = defaults(preset(name)), settings_of(found)
    assert outline(found.plan.build).keys() == outline(preset(name)).keys()
    wrong = {k for k in own if own[k] != read[k] and k not in found.assumed and read[k] is not None}
    if found.also.get(name):
        wrong -= {k for k in own if defaults(preset(name))[k] != defaults(preset(found.plan.name))[k]}
    if layout != OWN and wrong:
        plain = fit(outline(preset(name)), found.system, OWN).told
        wrong = {k for k in wrong if k in found.told and found.told[k] == plain.get(k)}
    return wrong


@check("preset")
def recognised(case):
    """On the meta device: the system, the layout, the settings; or it is said with what it can be confused."""
    system, state = case.entry.name, outline(preset(case.name))
    for layout, keys in layouts(case.name).items():
        found = detect(keys.convert(state, defaults(preset(case.name)), back=True).state)
        assert found[0].fits, f"{layout}: {found[0].why}"
        mine = next(c for c in found if c.fits and c.system == system)
        others = [c for c in [found[0], *rivals(found)] if c.fit.plan.spec != mine.fit.plan.spec]  # DeiT's tiny is ViT's
        assert {c.system for c in others} - {system} <= confused(system), layout
        assert {n: t.shape for n, t in outline(mine.fit.plan.build).items()} == {n: t.shape for n, t in state.items()}
        assert mine.layout == layout or same_rules(mine.layout, layout, system), f"{layout} was taken for {mine.layout}"
        assert not apart(case.name, mine.fit, layout), f"{layout}: taken for {mine.fit.plan.name}, {mine.fit.plan.changes}"


def same_rules(one, other, system):
    """Have two layouts of a system the same rules? Then the first is taken."""
    return layouts_of(system)[one].rules == layouts_of(system)[other].rules


@check("system", lambda case: bool(case.card.variants))
@torch.no_grad()
def loads_without_a_name(case):
    """The nano, with real values, under every layout's names: the same answers."""
    name, system = f"{case.entry.name}/nano", case.entry.name
    for layout, keys in layouts(name).items():
        options = defaults(preset(name))
        read = fit(keys.convert(outline(preset(name)), options, back=True).state, system, layout)
        stands_for = {k: v for k, v in read.told.items() if k not in read.assumed and v is not None and options[k] != v}
        model = create_model(name, **stands_for).eval()
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        theirs = keys.convert(model.state_dict(), options | stands_for, back=True).state
        if confused(system) and rivals(detect(theirs)):
            with pytest.raises(BadCheckpoint, match="equally"):
                load(theirs)
            again = load(theirs, system)
        else:
            again = load(theirs)
        batch = model.example(2)
        assert_close(answer(again, batch), answer(model, batch), atol=1e-5, rtol=1e-5)


@check("system", lambda case: bool(case.card.confused_with))
def confusions_are_real(case):
    """What the card says cannot be told apart cannot: under our names both fit, and load asks for the name."""
    for other in case.card.confused_with:
        said = set()
        for name in (f"{case.entry.name}/{v}" for v in case.card.variants if v.startswith("nano")):
            found = detect(outline(preset(name)))
            said |= {c.system for c in [found[0], *rivals(found)]} if rivals(found) else set()
        assert {case.entry.name, other} <= said


@check("system", lambda case: bool(case.card.confused_with))
def asks_for_the_name(case):
    for variant in case.card.variants:
        state = create_model(f"{case.entry.name}/{variant}").state_dict() if variant.startswith("nano") else {}
        if state and rivals(detect(state)):
            with pytest.raises(BadCheckpoint, match=r"equally.*name="):
                load(state)
            assert load(state, case.entry.name).recipe["name"] == f"{case.entry.name}/{variant}"
            return
    raise AssertionError("nothing of the card's nanos is ambiguous")
