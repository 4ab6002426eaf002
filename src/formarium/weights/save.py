"""A model to a file: ours, with its recipe, or under the names that another library reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from ..core import checkpoint
from ..core.build import preset, resolve
from ..core.checkpoint import write_atomically
from ..core.errors import DoesNotFit, FormariumError, unknown
from ..core.model import Model
from ..core.spec import Spec, from_json
from .fit import DOORS, OWN, defaults, fit, layouts_of
from .keys import State

PICKLED = (".pth", ".pt", ".bin")


def save(model: Model, path: str | Path, *, layout: str | None = None, only: Literal["trained"] | None = None) -> None:
    """Writes the model to a file; `load` gives it back.

    layout: None for our own file (safetensors with the recipe), else whose names it takes: one of the KEYS of the model's
    paper ("timm", "authors", "transformers", ...). Such a file is safetensors, or for .pth, .pt and .bin a state dict by
    torch.save. only="trained": of our own file, what is trained and what transforms added. UnknownName for a layout that
    the paper has not, DoesNotFit where the layout cannot hold the model.
    """
    if layout is None:
        with _writing(path):
            checkpoint.save(model, path, only=only)
        return
    if only is not None:
        raise FormariumError(f"the layout {layout!r} is of whole models; leave only= out, or layout=")
    state = {k: t.detach().cpu().contiguous().clone() for k, t in in_layout(model, layout).items()}
    with _writing(path):
        if Path(path).suffix in PICKLED:
            write_atomically(path, lambda name: torch.save(state, name))
        else:
            write_atomically(path, lambda name: save_file(state, name, {"format": "pt"}))


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    if Path(path).is_dir():
        raise FormariumError(f"{path} cannot be written: it is a folder; name a file")
    try:
        yield
    except OSError as error:
        raise FormariumError(f"{path} cannot be written: {error.strerror or error}") from error


def _parts(value: Any) -> bool:
    """Is it a part, or several?"""
    return isinstance(value, Spec) or (isinstance(value, tuple) and any(isinstance(v, Spec) for v in value))


def in_layout(model: Model, layout: str) -> State:
    """The model's state dict under the names of a layout of its paper; raises as `save` does."""
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise FormariumError("this model has no recipe, so whose names it has is not known; make it with create_model")
    done = [t["name"] for t in recipe.get("transforms", [])]
    host, variant = recipe["name"].split("/")
    system, makes = (done[-1], host) if done else (host, "model")
    known = {n: keys for n, keys in layouts_of(system).items() if keys.makes == makes and n != OWN}
    if layout not in known:
        raise unknown(f"layout of {system}", layout, known)
    if not recipe["changes"] and variant in known[layout].without:
        raise DoesNotFit(f"{recipe['name']} has no form in the layout {layout!r}: {known[layout].without[variant]}")
    options = defaults(preset(recipe["name"])) | {k: resolve(k, from_json(v)) for k, v in recipe["changes"].items()}
    converted = known[layout].convert(dict(model.state_dict()), options, back=True)
    if converted.unmatched:
        raise DoesNotFit(f"the layout {layout!r} of {system} has no name for {len(converted.unmatched)} tensors of this "
                         f"model, e.g. {', '.join(converted.unmatched[:3])}; without layout= a file of ours holds it")
    doors = {k: options[k] for k in DOORS if k in options}
    read = fit(converted.state, system, layout, given=doors)
    if read.error is not None:
        raise DoesNotFit(f"the layout {layout!r} of {system} does not hold this model: {read.error}")
    other = {k: v for k, v in read.told.items() if k not in read.assumed and v is not None and options.get(k, v) != v
             and (k not in doors or k in read.asked)}
    if makes == "model":
        assert read.plan is not None
        meant = defaults(preset(read.plan.name)) | {k: resolve(k, v) for k, v in read.plan.changes.items()}
        other |= {k: meant[k] for k in recipe["changes"] if k not in read.told and k in meant and _parts(options[k])
                  and meant[k] != options[k]}  # as a residual, which leaves no trace
    if other:
        raise DoesNotFit(f"a file in the layout {layout!r} means {', '.join(f'{k}={v}' for k, v in other.items())}, this "
                         f"model has {', '.join(f'{k}={options[k]}' for k in other)}: it would be read as another function")
    return converted.state
