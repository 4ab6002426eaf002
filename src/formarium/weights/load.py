"""A model from anyone's file: ours by its recipe, another's by what its tensors are called and shaped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..core.build import from_recipe
from ..core.checkpoint import NoStart, copy_of, fill, read_recipe, restore
from ..core.errors import BadCheckpoint, DoesNotFit, FormariumError, UnknownName
from ..core.model import Model
from .adapt import Row as Adapted
from .adapt import adapt
from .detect import TRIED, Candidate, detect, no_match, of_system, order, rivals, under
from .files import Contents, held, read
from .fit import OWN, SAME_NAMES, UNTOLD, Fit, fit, layouts_of, on_meta, outline, plan
from .keys import State
from .report import Report, trace

GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}  # theirs -> `approximate`
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def load(source: str | Path | Mapping[str, Tensor], name: str | None = None, *, report: Literal[False] = False,
         **options: Any) -> nn.Module: ...
@overload
def load(source: str | Path | Mapping[str, Tensor], name: str | None = None, *, report: Literal[True],
         **options: Any) -> tuple[nn.Module, Report]: ...


def load(source: str | Path | Mapping[str, Tensor], name: str | None = None, *, layout: str | None = None,
         base: Model | str | Path | None = None, part: str | None = None, partial: bool = False, grow: bool = False,
         report: bool = False, **options: Any) -> nn.Module | tuple[nn.Module, Report]:
    """A model from a file or state dict: ours, or anyone's, which is recognised by its tensors. Returned in eval mode.

    name: "swin" or "swin/tiny", where you know it or detection cannot decide; layout: one of the paper's KEYS, or
    "formarium" for our own names; part: which of several state dicts in a file ("student"). options: constructor options
    that the tensors cannot tell (heads), or that you want otherwise (img_size, in_chans, num_classes, patch): then the
    weights are adapted (grow: also to longer texts and larger vocabularies). partial: load what has a place, leave the rest
    as a new model has it. base: for files that hold what was trained alone: the model (or its file) that was adapted.
    report: also returns the Report of every tensor.

    Raises BadCheckpoint where the file is no checkpoint, of an unknown net, ambiguous or incomplete, saying what is nearest
    and what does not fit; DoesNotFit where weights cannot be adapted to the options.
    """
    what = "the state dict" if isinstance(source, Mapping) else str(source)
    contents = held(source, part) if isinstance(source, Mapping) else read(source, part=part)
    model: nn.Module
    if contents.told:
        model, told = _ours(contents, what, name, layout, base, grow, options)
    elif base is not None:
        raise BadCheckpoint(f"{what} holds all weights: leave base= out")
    else:
        model, told = _theirs(contents, what, name, layout, partial, grow, options)
        told.notes += _against(contents.config, model)
    told.notes = [*contents.notes, *told.notes, *_casts(contents.state, model)]
    return (model.eval(), told) if report else model.eval()


def _ours(contents: Contents, what: str, name: str | None, layout: str | None, base: Model | str | Path | None, grow: bool,
          options: dict[str, Any]) -> tuple[Model, Report]:
    """The model of a file of ours; other options than its recipe's adapt its weights."""
    recipe, state = read_recipe(contents.told["recipe"], what), contents.state
    if name and name.rstrip("/") not in (recipe["name"], recipe["name"].split("/")[0]):
        raise BadCheckpoint(f"{what} holds {recipe['name']}, not {name}; leave the name out")
    if layout not in (None, OWN):
        raise BadCheckpoint(f"{what} is a file of ours, not of the layout {layout!r}; leave layout= out")
    rows: list[Adapted] = []
    if options and base is None and "frozen" not in contents.told:
        was = restore(state, contents.told, what)
        with _fitting(options):
            model = from_recipe({**recipe, "changes": recipe["changes"] | options})
            adapted, rows = adapt(was.state_dict(), was, model, grow=grow)
        fill(model, adapted, what)
    else:
        model = restore(state, contents.told, what, _model(base), **options)
    own = model.state_dict()
    copies = {k: twin for k in state if k not in own and (twin := copy_of(k, state, own))}
    traced = trace(state, own, SAME_NAMES.convert(state), adapted=rows, copies=copies, missing="of the base")
    name, changes = model.recipe["name"], model.recipe["changes"]
    return model, Report(what, name.split("/")[0], name, "a file of ours", changes, rows=traced)


@contextmanager
def _fitting(options: Mapping[str, Any]) -> Iterator[None]:
    """Whatever a model makes of options that are of no use to it, told as DoesNotFit."""
    try:
        yield
    except FormariumError:
        raise
    except UNTOLD as error:
        said = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise DoesNotFit(f"no model can be made with {said} ({error})") from error


def _model(base: Model | str | Path | None) -> Model | None:
    if base is None or isinstance(base, Model):
        return base
    given = load(base)
    assert isinstance(given, Model)
    return given


def _theirs(contents: Contents, what: str, name: str | None, layout: str | None, partial: bool, grow: bool,
            options: dict[str, Any]) -> tuple[nn.Module, Report]:
    state = contents.state
    system, _, variant = (name or "").partition("/")
    known = layouts_of(system) if system else {}
    if system and layout is not None and layout not in known:
        raise BadCheckpoint(f"{system} has no layout {layout!r}; there are: {', '.join(known) or 'none'}")
    found = of_system(state, system, variant, options, partial) if system else detect(state, options, layout)
    found = [c for c in found if layout in (None, c.layout)]
    best = found[0] if found else None
    others = rivals(found) if best is not None and best.fits and not system else []
    if contents.heads is not None and best is not None and best.fit is not None and "heads" in best.fit.assumed:
        options = {"heads": contents.heads, **options}
        best.fit = fit(under(best.prefix, state), best.system, best.layout, variant, options, partial)
        contents.notes.append(f"heads={contents.heads}: config.json beside it says so")
    if partial and best is not None and not best.fits and best.tensors > 0.5:
        tied = [c for c in found[:TRIED] if round(c.score, 3) == round(best.score, 3)]
        for c in tied:
            c.fit = fit(under(c.prefix, state), c.system, c.layout, variant, options, partial)
        best = min(tied, key=order)
    if best is None or best.fit is None or best.fit.error is not None:
        anyhow = detect(state) if layout is not None and not system else found
        if anyhow and anyhow[0].fits:
            raise BadCheckpoint(f"{what} is of no system in the layout {layout!r}; it fits {anyhow[0]}: leave layout= out")
        raise _refusal(best, anyhow, state, system)
    if others:
        raise BadCheckpoint(f"{what} fits {best} and {', '.join(map(str, others))} equally, and they compute different "
                            f"things: say which, name={best.system!r} or {', '.join(f'name={c.system!r}' for c in others)}")
    return _build(best, best.fit, state, what, variant, partial, grow, options, found)


def _refusal(best: Candidate | None, found: list[Candidate], state: State, system: str) -> Exception:
    error = best.fit.error if best is not None and best.fit is not None else None
    if error is not None and (system or isinstance(error, UnknownName)):
        return error
    if system and best is None:
        return BadCheckpoint(f"{system} reads its own files only: its paper has no released weights that we know of")
    return no_match(found, state)


def _build(best: Candidate, fitted: Fit, state: State, what: str, variant: str, partial: bool, grow: bool,
           options: dict[str, Any], found: list[Candidate]) -> tuple[nn.Module, Report]:
    """The model of the best candidate, filled; adapted, where the caller's options ask for it."""
    assert fitted.plan is not None
    wanted = fitted.plan
    inner = under(best.prefix, state)
    # again, now that the settings are known: some rules need them (heads)
    fitted.converted = fitted.keys.convert(inner, fitted.told | options)
    weights, rows = fitted.converted.state, list[Adapted]()
    if fitted.asked:
        was = on_meta(fitted.plan.build)
        with _fitting(options):
            wanted = plan(fitted, variant, options)
            model = wanted.build()
            weights, rows = adapt({k: t for k, t in weights.items() if k in was.state_dict()}, was, model, grow=grow)
    else:
        with NoStart() if all(k in weights for k in outline(fitted.plan.build)) else nullcontext():
            model = fitted.plan.build()
    own = model.state_dict()
    if partial:
        placed = {k: t for k, t in weights.items() if k in own and t.shape == own[k].shape}
        if not placed:
            raise BadCheckpoint(f"no tensor of {what} has a place in {wanted.name}")
        weights = own | placed
    odd = [k for k, t in weights.items() if k in own and own[k].is_floating_point() and t.dtype not in FLOATS]
    if odd:
        raise BadCheckpoint(f"{what} holds {len(odd)} weights that are no floating point numbers of 16 bits or more, e.g. "
                            f"{odd[0]} ({weights[odd[0]].dtype}): quantised weights are not read")
    fill(model, weights, f"{what} ({best})")
    copies = {k: twin for k in fitted.converted.state if k not in own
              and (twin := copy_of(k, fitted.converted.state, own))}
    rest = [k for k in state if not best.prefix.startswith("+") and not k.startswith(best.prefix)]
    traced = trace(state, own, fitted.converted, best.prefix, rest, rows, copies)
    notes = best.renamed + [
        f"{c} fits as well, with {c.fit.changed} changes to a preset; name={c.system!r} takes it" for c in found[1:]
        if c.fit and c.fits and c.fit.plan and c.fit.plan.spec != fitted.plan.spec and c.system != best.system]
    return model, Report(what, best.system, wanted.name, best.layout, wanted.changes, fitted.assumed, fitted.also, notes,
                         traced, found)


def _against(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What a config of the transformers library says of norms and GELUs, where the model has them otherwise."""
    eps = config.get("layer_norm_eps", config.get("layer_norm_epsilon"))
    act = config.get("hidden_act", config.get("activation_function"))
    has_eps = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    has_gelu: set[Any] = {m.approximate for m in model.modules() if hasattr(m, "approximate")}
    said = []
    if isinstance(eps, float) and has_eps - {eps}:
        said.append(f"the epsilon of norms is {eps}, the model has {' and '.join(map(str, sorted(has_eps)))}")
    if isinstance(act, str) and has_gelu - {GELU.get(act)}:
        said.append(f"the activation is {act}, the model has {'the tanh form of' if 'tanh' in has_gelu else 'exact'} GELU")
    return [f"config.json beside it says that {one}: the answers differ" for one in said]


def _casts(state: State, model: nn.Module) -> list[str]:
    """What is said of weights that are stored in another precision than the model's."""
    own = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    stored = {t.dtype for t in state.values() if t.is_floating_point()} - own
    names = " and ".join(sorted(str(d).removeprefix("torch.") for d in stored))
    return [f"stored as {names}, loaded as {', '.join(str(d).removeprefix('torch.') for d in own)}"] if stored else []
