"""Transforms, which turn a model into another: `apply(model, "zero_tprune(keep=0.7)")`.

A transform is a paper whose file exports TRANSFORM, a function (model, *, settings) that changes the model in place and
returns the number of places it changed; LOOKS_FOR, what it changes, in words; IDENTITY, settings at which the answers stay.
"""

import copy as copies
from typing import Any

from torch import nn

from .build import parse_call
from .errors import DoesNotFit, FormariumError, unknown
from .model import Model
from .registry import Entry, find, systems
from .spec import from_json, option_names, to_json


def apply(model: Model, transform: str, /, *, copy: bool = True, **settings: Any) -> Model:
    """A copy of the model, transformed; copy=False changes the model itself. The recipe tells of it.

    transform: a name, with settings: "zero_tprune(keep=0.7)". Unknown names and settings raise with the nearest ones, a
    model in which nothing is to change raises DoesNotFit.
    """
    name, told = parse_call(transform)
    return _run(model, name, told | settings, copy)


def replay(model: Model, transforms: list[dict[str, Any]]) -> Model:
    """Applies, in place, what the recipe of another model lists under "transforms"."""
    for t in transforms:
        _run(model, t["name"], {k: from_json(v) for k, v in t["settings"].items()}, copy=False)
    return model


def list_transforms() -> list[str]:
    """Names that `apply` takes."""
    return [n for n, e in systems().items() if e.card.kind == "transform" or _has_transform(e)]


def _has_transform(entry: Entry) -> bool:
    """Has a system of another kind a transform beside its models? Read from its text."""
    return "\nTRANSFORM = " in entry.path.read_text(encoding="utf-8")


def size(model: nn.Module) -> dict[str, int]:
    """Parameters, those of them that are trained, and bytes of the state dict (tied tensors count once)."""
    parameters = list(model.parameters())
    stored = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return {"parameters": sum(p.numel() for p in parameters), "bytes": sum(stored.values()),
            "trainable parameters": sum(p.numel() for p in parameters if p.requires_grad)}


def _run(model: Model, name: str, settings: dict[str, Any], copy: bool) -> Model:
    if name not in list_transforms():
        if name in systems():
            raise FormariumError(f"{name} is no transform, its kind is {find(name).card.kind!r}; there are: "
                                 f"{', '.join(list_transforms())}")
        raise unknown("transform", name, list_transforms())
    module = find(name).module
    known = option_names(module.TRANSFORM)
    for setting in settings:
        if setting not in known:
            raise unknown(f"setting of {name}", setting, known)
    model = copies.deepcopy(model) if copy else model
    if not module.TRANSFORM(model, **settings):
        raise DoesNotFit(f"{name} finds nothing to change in this {type(model).__name__}: it looks for {module.LOOKS_FOR}")
    recipe = getattr(model, "recipe", None)
    if recipe is not None:  # a model that was not made by name has none
        done = {"name": name, "settings": {k: to_json(v) for k, v in settings.items()}}
        model.recipe = {**recipe, "transforms": [*recipe.get("transforms", ()), done]}
    return model
