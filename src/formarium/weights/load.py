"""A model from a file: ours by its recipe, a foreign one through its paper's KEYS.

A paper that reads foreign files has `KEYS` (layout -> KeyMap) and `settings(state, layout)`, which tells the options of
the constructor from the shapes of a converted state dict.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.build import create_model, resolve
from ..core.checkpoint import fill, read_recipe, restore
from ..core.ctx import Place
from ..core.errors import BadCheckpoint
from ..core.model import Model
from ..core.registry import find
from ..core.spec import Spec, option_names
from ..core.transform import apply
from .files import Contents, read
from .keys import Converted, KeyMap, State


def load(source: str | Path | Mapping[str, Tensor], name: str | None = None, *, layout: str | None = None,
         base: Model | str | Path | None = None, **options: Any) -> nn.Module:
    """A model from our own file, or from a foreign file or state dict of the system `name`. Returned in eval mode.

    layout: one of the paper's KEYS, where several read it; options: constructor options that the tensors cannot tell
    (heads) or that you want otherwise. Every tensor must find its place, or BadCheckpoint says which did not.
    base: for files that hold what was trained alone: the model (or its file) that was adapted; another one is refused.
    """
    contents = Contents(dict(source)) if isinstance(source, Mapping) else read(source)
    what = "the state dict" if isinstance(source, Mapping) else str(source)
    if contents.told:
        recipe = read_recipe(contents.told["recipe"], what)
        if name is not None and name.split("/")[0] != recipe["name"].split("/")[0]:
            raise BadCheckpoint(f"{what} holds {recipe['name']}, not {name}; leave the name out")
        return restore(contents.state, contents.told, what, _model(base), **options)
    if base is not None:
        raise BadCheckpoint(f"{what} holds all weights: leave base= out")
    if name is None:
        raise BadCheckpoint(f"{what} carries no recipe of ours: say whose it is, load(..., name='swin')")
    return _load_foreign(contents.state, name.split("/")[0], layout, options).eval()


def _model(base: Model | str | Path | None) -> Model | None:
    if base is None or isinstance(base, Model):
        return base
    given = load(base)
    assert isinstance(given, Model)
    return given


def _load_foreign(state: State, system: str, layout: str | None, options: dict[str, Any]) -> nn.Module:
    paper = find(system).module
    layouts: dict[str, KeyMap] = getattr(paper, "KEYS", {})
    if not layouts:
        raise BadCheckpoint(f"{system} reads its own files only: its paper has no released weights that we know of")
    if layout is not None and layout not in layouts:
        raise BadCheckpoint(f"{system} has no layout {layout!r}; there are: {', '.join(layouts)}")
    tried = {n: m.convert(state, options) for n, m in layouts.items() if layout in (None, n)}
    best = min(tried, key=lambda n: len(tried[n].unmatched))
    converted = tried[best]
    if converted.unmatched:
        raise BadCheckpoint(_mismatch(system, best, state, converted))
    try:
        told = paper.settings(converted.state, best)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise BadCheckpoint(f"{system}: a tensor is missing or of another shape, so the settings cannot be told "
                            f"({error}; {len(state)} tensors, layout {best!r})") from None
    merged = told | options
    if layouts[best].makes == "part":
        dim = merged.pop("dim")
        model = paper.PART.but(**{k: resolve(k, v) for k, v in merged.items()})(dim, Place())
    elif layouts[best].makes == "model":
        name, changes = nearest_preset(system, merged)
        model = create_model(name, **changes)
    else:  # a model that the transform `system` was applied to
        own = {k: merged[k] for k in option_names(paper.TRANSFORM) if k in merged}
        name, changes = nearest_preset(layouts[best].makes, {k: v for k, v in merged.items() if k not in own})
        model = apply(create_model(name, **changes), system, copy=False, **own)
    # again, now that the settings are known: some rules need them (heads)
    fill(model, layouts[best].convert(state, merged).state, f"the {best} layout of {system}")
    return model


def nearest_preset(system: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset that differs least from these options, and the options that differ from it."""
    def changes(variant: str) -> dict[str, Any]:
        has = presets[variant]
        return {k: v for k, v in options.items() if k not in settled(has) or settled(has)[k] != v}

    def settled(preset: Spec[Any]) -> dict[str, Any]:
        defaults = {k: p.default for k, p in inspect.signature(preset.target).parameters.items()}
        return defaults | dict(preset.options)

    presets = find(system).module.PRESETS
    presets = {v: p for v, p in presets.items() if all(map(p.takes, options))} or presets  # they may differ in class
    best = min(presets, key=lambda variant: len(changes(variant)))
    return f"{system}/{best}", changes(best)


def _mismatch(system: str, layout: str, state: State, converted: Converted) -> str:
    stray = converted.unmatched
    return (f"not a checkpoint of {system}: {len(stray)} of {len(state)} tensors have no place in its nearest layout "
            f"{layout!r}, e.g. {', '.join(stray[:3])}")
