"""Our own files: safetensors that carry the recipe of their model, so that `restore` builds and fills it again."""

import copy
import hashlib
import json
import threading
import uuid
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from .build import from_recipe
from .errors import BadCheckpoint, FormariumError
from .model import Model
from .transform import replay

State = dict[str, Tensor]
FORMAT = 1  # of our files: raised when an older version could not read what this one writes
HIDDEN = 2 ** 30  # bytes of tables that a model may compute besides what files hold
RANDOM = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)


class NoStart(TorchFunctionMode):
    """Parameters are not given random values, as they are read next or never. Buffers are, as they may be in no file; but
    nothing is on the meta device, where torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        t = kwargs.get("tensor", args[0] if args else None) if func in RANDOM else None
        if isinstance(t, nn.Parameter) or (isinstance(t, Tensor) and t.is_meta):
            with torch.no_grad():
                return t.zero_()  # not as it lies in memory: truncated distributions would be drawn again
        return func(*args, **kwargs)


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
    metadata = {"format": "pt", "formarium": __version__, "formarium_format": str(FORMAT), "recipe": json.dumps(recipe)}
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


def restore(state: State, told: Mapping[str, str], what: str, base: Model | None = None, **options: Any) -> Model:
    """The model that a file of ours holds, in eval mode: from its tensors and what its metadata `told`. what: its name.

    base: for files that hold what was trained alone, the model that was adapted; another one is refused.
    """
    recipe = read_recipe(told["recipe"], what)
    if (base is not None) != ("frozen" in told):
        raise BadCheckpoint(f"{what} " + ("holds all weights: leave base= out" if base is not None else
                            "holds only what was trained: give the model that was adapted, or its file, as base="))
    named = f"{what} ({recipe['name']})"
    outline = _outline(recipe, state, base, what)
    if base is None:
        _compare(outline, state, named)
    model = from_recipe({**recipe, "changes": recipe["changes"] | options})
    if base is not None:
        state = state | _frozen(model, state, told["frozen"], base, what)
    fill(model, state, named)
    return model.eval()


def _outline(recipe: dict[str, Any], state: State, base: Model | None, what: str) -> State:
    """The state dict that a recipe describes, on the meta device: a file must not make us build what it cannot fill."""
    held = [*state.values(), *(base.state_dict().values() if base is not None else ())]
    room, me, made = sum(t.numel() for t in held), threading.get_ident(), 0
    too_large = BadCheckpoint(f"{what} is damaged: its recipe describes a far larger model than its tensors fill")

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == me
        if made > 4 * len(held) + 100:  # parameters made, of which transforms and ties leave some aside
            raise too_large

    guard = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), NoStart():
            model = from_recipe(recipe)
            outline = model.state_dict()
    except FormariumError:
        raise
    except Exception as error:  # whatever nonsense makes a constructor raise
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise BadCheckpoint(f"{what} is damaged: its recipe makes no model ({type(error).__name__}: {reason})") from error
    finally:
        guard.remove()
    if sum(b.nbytes for b in model.buffers()) > HIDDEN + 4 * room or (
            base is not None and sum(t.numel() for t in outline.values()) > 2 * room):
        raise too_large
    return outline


def check_format(told: Mapping[str, str], what: str) -> None:
    """Raises BadCheckpoint if the metadata are those of a newer format than this version reads."""
    number = told.get("formarium_format", "1")  # 0.1.0.dev wrote none
    if number not in {str(n) for n in range(1, FORMAT + 1)}:
        writer = told.get("formarium", "?")[:40]
        raise BadCheckpoint(f"{what} was written by formarium {writer} in format {number[:40]}; this version reads formats "
                            f"up to {FORMAT}: install that one or a newer")


def read_recipe(text: str, what: str) -> dict[str, Any]:
    """The recipe in a file's metadata; `what` names the file in the error if it is none."""
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        recipe = None
    if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) and isinstance(recipe.get("changes"), dict):
        transforms = recipe.get("transforms", [])
        if isinstance(transforms, list) and all(isinstance(t, dict) and isinstance(t.get("name"), str) and
                                                isinstance(t.get("settings"), dict) for t in transforms):
            return recipe
    raise BadCheckpoint(f"{what} is damaged: its recipe is not one ({text[:60]})")


def _frozen(model: Model, trained: State, fingerprint: str, base: Model, what: str) -> State:
    """The tensors of `model` that are not in the file, from the base, transformed as the file says."""
    done, wanted = (m.recipe.get("transforms", []) for m in (base, model))
    rest: State = {}
    if wanted[:len(done)] == done:
        state = replay(copy.deepcopy(base), wanted[len(done):]).state_dict()
        rest = {k: state[k].detach().cpu() for k in model.state_dict() if k in state and k not in trained}
    if _fingerprint(rest) != fingerprint:
        raise BadCheckpoint(f"{what} was trained on another base: the frozen weights of this {base.recipe['name']} are not "
                            f"those of the {model.recipe['name']} that it adapts")
    return rest


def fill(model: nn.Module, state: State, what: str) -> None:
    """Copies the tensors into the model; raises if one is missing, unknown, of another shape, or not finite."""
    own = model.state_dict()
    _compare(own, state, what)
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise BadCheckpoint(f"{what} holds NaN or infinity in {len(bad)} tensors, e.g. {bad[0]}")
    model.load_state_dict({k: state[k] for k in own})


def _compare(own: Mapping[str, Tensor], state: State, what: str) -> None:
    """Raises if a tensor of `own` is missing in the state, or one there is unknown or of another shape."""
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own and copy_of(k, state, own) is None]
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if missing or extra or shapes:
        said = [f"{len(rows)} {word}: {'; '.join(rows[:3])}" for word, rows in
                (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if rows]
        raise BadCheckpoint(f"{what} does not match the model it describes: {'. '.join(said)}")


def copy_of(name: str, state: State, own: Container[str]) -> str | None:
    """The tensor of the model that this one, for which it has no place, equals: so files hold tied weights."""
    tensor = state[name]
    return next((k for k, t in state.items() if k != name and k in own and same(t, tensor)), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Are the two equal? On the meta device, where nothing has a value: are they one and the same tensor?"""
    return a is b or (not (a.is_meta or b.is_meta) and a.shape == b.shape and bool((a == b).all()))
