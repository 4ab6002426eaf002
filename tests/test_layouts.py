"""Names of others, both ways, for every preset of every system: made from the registry.

A preset's state dict goes into a layout of its paper's KEYS and comes back with the same names and shapes, and `settings`
tells the preset again. What it cannot tell is `Assumed`; presets that a layout cannot hold are in the layout's `without`.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from formarium.core.build import create_model, preset, resolve
from formarium.core.ctx import Place
from formarium.core.errors import DoesNotFit
from formarium.core.registry import list_models, systems
from formarium.core.transform import apply
from formarium.weights.fit import fit, layouts_of, outline
from formarium.weights.keys import State
from formarium.weights.load import load
from golden_replay import outputs_of, replay

WHOLE = [(name, layout) for name in list_models("*/*") for layout, keys in layouts_of(name.split("/")[0]).items()
         if keys.makes == "model"]


@functools.cache
def on_meta(name: str) -> State:
    return outline(preset(name))


def options_of(name: str) -> dict[str, Any]:
    """All options of a preset, written or not."""
    made = preset(name)
    return {k: p.default for k, p in inspect.signature(made.target).parameters.items()} | dict(made.options)


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}


def back_and_forth(keys: Any, state: State, options: dict[str, Any]) -> State:
    """In the names of others, which must be read back."""
    theirs = keys.convert(state, options, back=True)
    assert not theirs.unmatched, f"no name for {theirs.unmatched[:3]}"
    ours = keys.convert(theirs.state, options)
    assert not ours.unmatched, f"read back, no place for {ours.unmatched[:3]}"
    assert shapes(ours.state) == shapes(state)
    return theirs.state


@pytest.mark.parametrize(("name", "layout"), WHOLE)
def test_every_preset(name, layout):
    system, variant = name.split("/")
    keys = layouts_of(system)[layout]
    if variant in keys.without:
        assert len(keys.without[variant]) > 10, "say why"
        return
    found = fit(back_and_forth(keys, on_meta(name), options_of(name)), system, layout)
    if found.error:  # it builds the model again and compares
        raise found.error
    nearest = options_of(found.plan.name) | {k: resolve(k, v) for k, v in found.plan.changes.items()}
    own = options_of(name)
    apart = {k: (own[k], nearest.get(k)) for k in own if own[k] != nearest.get(k) and k not in found.assumed
             and nearest.get(k) is not None}  # None: any will do
    if layout != "formarium":  # a layout may stand for another function: the same of all presets, whatever they have
        apart = {k: v for k, v in apart.items() if found.told.get(k) == told_by_names(name)[k]}
    assert not apart, f"taken for {found.plan.name} with {found.plan.changes}"


@functools.cache
def told_by_names(name: str) -> dict[str, Any]:
    return fit(on_meta(name), name.split("/")[0], "formarium").told


# other sizes than the presets'

EACH = [(system, layout) for system, entry in systems().items() if entry.card.variants or hasattr(entry.module, "KEYS")
        for layout in layouts_of(system)]
OTHER_SIZES = {"depth": 3, "encoder_depth": 3, "vocab": 77, "context": 40, "horizon": 5, "num_classes": 7, "in_chans": 4,
               "dim": 192, "ratio": 2.6, "tie": False, "queries": 6, "refinement": 2, "blocks": 2, "bias": True,
               "dual_pixel": True, "semantic": None}


def example(system: str, layout: str) -> tuple[str, dict[str, Any]]:
    variant, changes = layouts_of(system)[layout].example
    return f"{system}/{variant or next(iter(systems()[system].card.variants))}", changes


def makes(system: str, layout: str) -> str:
    return layouts_of(system)[layout].makes


@pytest.mark.parametrize(("system", "layout"), [e for e in EACH if makes(*e) == "model"])
def test_other_sizes(system, layout):
    """Each of the options above that the example has and that can be changed alone."""
    name, changes = example(system, layout)
    own, done = options_of(name) | changes, []
    for option, value in OTHER_SIZES.items():
        if option not in own or own[option] == value or isinstance(own[option], str):
            continue
        try:
            state = outline(functools.partial(create_model, name, **changes | {option: value}))
        except DoesNotFit:
            continue
        keys = layouts_of(system)[layout]
        if keys.convert(state, own, back=True).unmatched:
            continue  # of which this layout has nothing
        found = fit(back_and_forth(keys, state, own | {option: value}), system, layout)
        if found.error:
            raise AssertionError(f"{option}={value}: {found.error}")
        done.append(option)
    assert len(done) > 1


@pytest.mark.parametrize(("system", "layout"), [e for e in EACH if makes(*e) == "part"])
@pytest.mark.parametrize("dim", [64, 192])
def test_parts(system, layout, dim):
    made = systems()[system].module.PART
    state = outline(lambda: made(dim, Place()))
    found = fit(back_and_forth(layouts_of(system)[layout], state, dict(made.options)), system, layout)
    if found.error:
        raise found.error
    assert shapes(outline(found.plan.build)) == shapes(state)


def transformed(system: str, layout: str, variant: str) -> Any:
    return apply(create_model(f"{makes(system, layout)}/{variant}"), system, copy=False)


@pytest.mark.parametrize(("system", "layout"), [e for e in EACH if makes(*e) not in ("model", "part")])
@pytest.mark.parametrize("variant", ["nano", "small"])
def test_transformed_models(system, layout, variant):
    state = outline(lambda: transformed(system, layout, variant))
    found = fit(back_and_forth(layouts_of(system)[layout], state, {}), system, layout)
    if found.error:
        raise found.error
    assert found.plan.name == f"{makes(system, layout)}/{variant}+{system}"
    assert not found.plan.changes


# values

def values(model: torch.nn.Module) -> torch.nn.Module:
    """With parameters and running statistics that no two models share."""
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                t += 0.1 * torch.rand_like(t) if name.endswith("running_var") else 0.1 * torch.randn_like(t)
    return model.eval()


def implied(system: str, layout: str) -> dict[str, Any]:
    """Options that the layout stands for, whatever the example has: another GELU, another epsilon."""
    name, changes = example(system, layout)
    own = options_of(name) | {k: resolve(k, v) for k, v in changes.items()}
    state = outline(functools.partial(create_model, name, **changes))
    found = fit(back_and_forth(layouts_of(system)[layout], state, own), system, layout)
    return {k: v for k, v in found.told.items() if k not in found.assumed and own.get(k, v) != v and v is not None}


@pytest.mark.parametrize(("system", "layout"), EACH)
@torch.no_grad()
def test_values_survive(system, layout):
    """To others' names and back bit by bit; the loaded model answers the same."""
    keys, made = layouts_of(system)[layout], makes(system, layout)
    if made == "part":
        model, own = systems()[system].module.PART(64, Place()), dict(systems()[system].module.PART.options)
    elif made == "model":
        name, changes = example(system, layout)
        changes = changes | implied(system, layout)
        model, own = create_model(name, **changes), options_of(name) | changes
    else:
        model, own = transformed(system, layout, "nano"), {}
    state = values(model).state_dict()
    theirs = keys.convert(state, own, back=True)
    ours = keys.convert(theirs.state, own)
    assert not theirs.unmatched + ours.unmatched
    assert all(torch.equal(ours.state[k], t) for k, t in state.items())
    if made == "part":  # what it answers is in the paper's tests
        found = load(theirs.state, system, layout=layout).state_dict()
        assert all(torch.equal(found[k], t) for k, t in state.items())
        return
    found = fit(theirs.state, system, layout)
    given = {k: own[k] for k in found.assumed if k in own}
    again, batch = load(theirs.state, system, layout=layout, **given), model.example(2)
    for one, other in zip(outputs_of(again(batch)), outputs_of(model(batch)), strict=True):
        assert torch.equal(one, other)


# names of the references

GOLDEN = {path.name.removesuffix(".json.gz"): path for path in sorted(Path(__file__).with_name("golden").glob("*.gz"))}
NO_LAYOUT = {"deltanet__ops_h4_l128", "denseformer__dwa_n7_dil2_period1", "gmm_mask__gmm_layer",
             "llm_int8__matmul8bit_thr6_d96",
             "transformer_attribution__vit_96_d192_l4_class3"}  # functions, and a model of another paper
OTHERWISE = {  # names that are read, and written with other values or not at all
    "embed_positions.weight": "its first two rows, of padding, are used by none",
    "lm_head.bias": "one tensor under two names, which the recording filled apart",
    "query_key.weight": "of attention without its projection, which we write with one", "value.weight": "as query_key",
    "head.weight": "written as the released files have it, behind a batch norm", "head.bias": "as head.weight",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_written_as_the_references_have_it(name):
    """A reference's state dict, read and written again: every name with its values, but for what was dropped."""
    state, _, _ = replay(GOLDEN[name])
    system = name.split("__")[0]
    fits = [f for layout in layouts_of(system) if not (f := fit(state, system, layout)).error]
    assert bool(fits) != (name in NO_LAYOUT)
    for found in fits:
        theirs = found.keys.convert(found.converted.state, found.told, back=True)
        assert not theirs.unmatched
        wrong = {k for k in state if k not in theirs.state or not torch.equal(theirs.state[k], state[k])}
        assert wrong - found.converted.ignored.keys() <= OTHERWISE.keys()
