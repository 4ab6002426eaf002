"""Save and load: our own files carry their recipe; foreign ones are read through the paper's KEYS.

A paper that reads foreign files has `KEYS` (layout -> KeyMap) and `settings(state, layout)`, which tells the options of
the constructor from the shapes of a converted state dict.
"""

import copy
import hashlib
import inspect
import json
import pickle
import re
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .build import create_model, from_recipe, resolve
from .ctx import Place
from .errors import BadCheckpoint, FormariumError
from .keys import Converted, KeyMap, State
from .model import Model
from .registry import find
from .spec import Spec, option_names
from .transform import apply, replay

NESTED = ("state_dict", "model", "model_state_dict", "params_ema", "params", "ema", "module")


def write_atomically(path: str | Path, write: Any) -> None:
    """Calls write(temporary path), then moves the file to `path`: a killed process leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode  # safetensors makes files that nobody else may read
        write(str(temporary))
        temporary.chmod(usual)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(model: Model, path: str | Path, *, only: Literal["trained"] | None = None) -> None:
    """Writes weights and recipe to a safetensors file; `load` gives the same model back.

    only="trained": what is trained (requires_grad), what transforms added, and a fingerprint of the rest, which
    `load(path, base=...)` takes from the model that was adapted.
    """
    if only not in (None, "trained"):
        raise FormariumError(f"only is 'trained' or None, not {only!r}")
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise FormariumError("this model has no recipe, so a file could not say how to build it; "
                             "make it with create_model(name, **changes)")
    from formarium import __version__

    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "formarium": __version__, "recipe": json.dumps(recipe)}
    if only:
        kept = {k for k, p in model.named_parameters(remove_duplicate=False) if p.requires_grad} | _added(recipe)
        if not kept:
            raise FormariumError("nothing in this model is trained (requires_grad), so there is nothing to save of it")
        metadata["frozen"] = _fingerprint({k: v for k, v in state.items() if k not in kept})
        state = {k: v for k, v in state.items() if k in kept}
    write_atomically(path, lambda name: save_file(state, name, metadata))


def _added(recipe: dict[str, Any]) -> set[str]:
    """Names of the floating point tensors that the transforms of a recipe put into the model."""
    with torch.device("meta"):
        model = from_recipe({**recipe, "transforms": []})
        before = dict(model.state_dict(keep_vars=True))
        replay(model, recipe.get("transforms", []))
    own = {id(t) for t in before.values()}
    return {k for k, t in model.state_dict(keep_vars=True).items() if t.is_floating_point() and id(t) not in own}


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(source: str | Path | Mapping[str, Tensor], name: str | None = None, *, layout: str | None = None,
         base: Model | str | Path | None = None, **options: Any) -> nn.Module:
    """A model from our own file, or from a foreign file or state dict of the system `name`. Returned in eval mode.

    layout: one of the paper's KEYS, where several read it; options: constructor options that the tensors cannot tell
    (heads) or that you want otherwise. Every tensor must find its place, or BadCheckpoint says which did not.
    base: for files that hold what was trained alone: the model (or its file) that was adapted; another one is refused.
    """
    told: dict[str, str] = {}
    if isinstance(source, Mapping):
        state, recipe = dict(source), None
    else:
        state, recipe = read(source, told)
    if (base is not None) != ("frozen" in told):
        raise BadCheckpoint(f"{_called(source)} " + ("holds all weights: leave base= out" if base is not None else
                            "holds only what was trained: give the model that was adapted, or its file, as base="))
    if recipe is not None:
        if name is not None and name.split("/")[0] != recipe["name"].split("/")[0]:
            raise BadCheckpoint(f"{source} holds {recipe['name']}, not {name}; leave the name out")
        model = from_recipe({**recipe, "changes": recipe["changes"] | options})
        if base is not None:
            state |= _frozen(model, state, told["frozen"], base, str(source))
        _fill(model, state, f"{source} ({recipe['name']})")
        return model.eval()
    if name is None:
        raise BadCheckpoint(f"{_called(source)} carries no recipe of ours: say whose it is, load(..., name='swin')")
    return _load_foreign(state, name.split("/")[0], layout, options).eval()


def _frozen(model: Model, trained: State, fingerprint: str, base: Model | str | Path, what: str) -> State:
    """The tensors of `model` that are not in the file, from the base, transformed as the file says."""
    if not isinstance(base, Model):
        given = load(base)
        assert isinstance(given, Model)
        base = given
    done, wanted = (m.recipe.get("transforms", []) for m in (base, model))
    rest: State = {}
    if wanted[:len(done)] == done:
        state = replay(copy.deepcopy(base), wanted[len(done):]).state_dict()
        rest = {k: state[k].detach().cpu() for k in model.state_dict() if k in state and k not in trained}
    if _fingerprint(rest) != fingerprint:
        raise BadCheckpoint(f"{what} was trained on another base: the frozen weights of this {base.recipe['name']} are not "
                            f"those of the {model.recipe['name']} that it adapts")
    return rest


def _called(source: object) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


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
        name, changes = _nearest_preset(system, merged)
        model = create_model(name, **changes)
    else:  # a model that the transform `system` was applied to
        own = {k: merged[k] for k in option_names(paper.TRANSFORM) if k in merged}
        name, changes = _nearest_preset(layouts[best].makes, {k: v for k, v in merged.items() if k not in own})
        model = apply(create_model(name, **changes), system, copy=False, **own)
    # again, now that the settings are known: some rules need them (heads)
    _fill(model, layouts[best].convert(state, merged).state, f"the {best} layout of {system}")
    return model


def _nearest_preset(system: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
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


def _fill(model: nn.Module, state: State, what: str) -> None:
    own = model.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own and not _is_copy(k, state, own)]
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or shapes:
        said = [f"{len(rows)} {word}: {'; '.join(rows[:3])}" for word, rows in
                (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if rows]
        raise BadCheckpoint(f"{what} does not match the model it describes: {'. '.join(said)}")
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise BadCheckpoint(f"{what} holds NaN or infinity in {len(bad)} tensors, e.g. {bad[0]}")
    model.load_state_dict({k: state[k] for k in own})


def _is_copy(name: str, state: State, own: Mapping[str, Tensor]) -> bool:
    """Is this tensor, which the model has no place for, equal to one that it has? So files hold tied weights."""
    tensor = state[name]
    return any(k in own and t.shape == tensor.shape and t.equal(tensor) for k, t in state.items() if k != name)


def read(path: str | Path, told: dict[str, str] | None = None) -> tuple[State, dict[str, Any] | None]:
    """The tensors of a .safetensors, .pth/.pt/.bin (weights only) or .npz file, and the recipe if it is ours.

    told: takes up what else a file of ours says.
    """
    path = Path(path)
    if not path.is_file():
        raise BadCheckpoint(f"no file {path}")
    with path.open("rb") as f:
        head = f.read(16)
    if not head:
        raise BadCheckpoint(f"{path} is empty")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {k: torch.from_numpy(arrays[k]) for k in arrays.files}, None
        if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):  # safetensors: a length, then JSON
            return _unwrap(torch.load(path, map_location="cpu", weights_only=True), path), None
        with safe_open(path, framework="pt") as f:
            recipe = (f.metadata() or {}).get("recipe")
            if told is not None and recipe:
                told.update(f.metadata())
            return {k: f.get_tensor(k) for k in f.keys()}, _recipe(recipe) if recipe else None  # noqa: SIM118
    except BadCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise BadCheckpoint(f"{path} is a pickle that wants to run more than tensors need{what}; refused") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError,
            zipfile.BadZipFile) as error:
        raise BadCheckpoint(f"{path} is damaged, truncated or not a checkpoint ({str(error).splitlines()[0]})") from None


def _recipe(text: str) -> dict[str, Any]:
    recipe = json.loads(text)
    if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) and isinstance(recipe.get("changes"), dict):
        transforms = recipe.get("transforms", [])
        if isinstance(transforms, list) and all(isinstance(t, dict) and isinstance(t.get("name"), str) and
                                                isinstance(t.get("settings"), dict) for t in transforms):
            return recipe
    raise ValueError(f"its recipe is not one: {text[:60]}")


def _unwrap(content: Any, path: Path) -> State:
    """The state dict inside a training checkpoint: under `model`, `state_dict`, ..., with `module.` cut off."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in NESTED if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise BadCheckpoint(f"{path} holds no state dict")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state
