"""A state dict read as one system in one layout: which model it is, and what stands against it.

A paper that reads foreign files has `KEYS` (layout -> KeyMap) and `settings(state, layout)`, which tells the options of
the constructor from the shapes of a converted state dict. Our own names are the layout "formarium" of every system.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.build import create_model, resolve
from ..core.checkpoint import NoStart, copy_of
from ..core.ctx import Place
from ..core.errors import BadCheckpoint, FormariumError, unknown
from ..core.registry import find
from ..core.spec import Spec, option_names
from ..core.transform import apply
from .keys import Assumed, Converted, KeyMap, Options, State, defaults, keymap, rule

OWN = "formarium"
SAME_NAMES = keymap(rule("*", "*"))
UNTOLD = (LookupError, ValueError, ArithmeticError, StopIteration, TypeError, AttributeError, RuntimeError,
          AssertionError)  # of rules, `settings` and constructors, when tensors are not what they count on
DOORS = ("num_classes", "img_size", "in_chans", "vocab", "context")  # changed without making another model of it


def layouts_of(system: str) -> dict[str, KeyMap]:
    """Layout -> key map: those of the paper, and our own names where it builds models."""
    entry = find(system)
    own = {OWN: SAME_NAMES} if hasattr(entry.module, "PRESETS") else {}
    return {**getattr(entry.module, "KEYS", {}), **own}


@dataclass
class Plan:
    """How a model is made: `build()`; `name` and `changes` as for create_model, where it is one; `spec` is the same for
    plans of the same function."""

    name: str
    changes: Options
    build: Callable[[], nn.Module]
    spec: Any = None


@dataclass
class Fit:
    """What a state dict is, read as `system` in `layout`. error: why it is not; None if every tensor has its place.

    told: options from the shapes; assumed: those that leave no trace, with what was taken and why; asked: options that the
    caller names and the plan has not, as the tensors fit without them alone: to adapt; also: presets that have the same
    tensors -> what tells them from the one that was taken.
    """

    system: str
    layout: str
    keys: KeyMap
    converted: Converted
    told: Options = field(default_factory=dict)
    assumed: dict[str, Assumed] = field(default_factory=dict)
    plan: Plan | None = None
    asked: Options = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    error: FormariumError | None = None

    @property
    def changed(self) -> int:
        return len(self.plan.changes) if self.plan else 99

    def contradicts(self, option: str, value: Any) -> bool:
        """Do the tensors say that this option of the caller's is another?"""
        return option in self.told and option not in self.assumed and resolve(option, value) != self.told[option]


def fit(state: State, system: str, layout: str, variant: str = "", given: Mapping[str, Any] = {},
        partial: bool = False) -> Fit:
    """Reads `state`, whose names begin as the layout's do. variant: take this preset; given: options that the caller names.

    partial: what has no place, or is missing, is no error.
    """
    keys = layouts_of(system)[layout]
    found = Fit(system, layout, keys, Converted(unmatched=list(state)))
    try:
        found.converted = keys.convert({k: t.to("meta") for k, t in state.items()}, dict(given))
        if found.converted.unmatched and not partial:
            raise _strays(system, layout, state, found.converted)
        found.converted = keys.convert(state, dict(given))  # with values: whether two are tied shows in them alone
        told = _told(found, len(state), partial)
        if told is None:
            variant, told = variant or _by_shapes(system, found.converted.state), {}
        told = {k: v for k, v in told.items() if not (isinstance(v, Assumed) and k in given)}  # the caller says it
        found.assumed = {k: v for k, v in told.items() if isinstance(v, Assumed)}
        found.told = {k: v.value if isinstance(v, Assumed) else v for k, v in told.items()}
        kept = dict(given)  # the caller may say what shapes do not: 7x28 cells
        if partial or _try(found, variant, kept, partial) is not None:
            kept = {k: v for k, v in given.items() if not found.contradicts(k, v)}
            found.error = _try(found, variant, kept, partial)
            if found.error is not None and kept and _try(found, variant, {}, partial) is None:
                found.error, kept = None, {}  # no tensor tells this option, but their shapes depend on it
        found.asked = {k: v for k, v in given.items() if k not in kept}
    except FormariumError as error:
        found.error = error
    except UNTOLD as error:
        found.error = BadCheckpoint(f"{system}: the settings that the shapes tell make no model ({error})")
    return found


def _try(found: Fit, variant: str, given: Mapping[str, Any], partial: bool) -> FormariumError | None:
    """Plans the model with these options of the caller's; what stands against it."""
    try:
        found.plan = plan(found, variant, given)
        return None if partial else misfit(found)
    except FormariumError as error:
        return error


def _told(found: Fit, tensors: int, partial: bool) -> Options | None:
    """What the paper's `settings` say; None if it has none, or if tensors are missing and may be."""
    paper = find(found.system).module
    try:
        return paper.settings(found.converted.state, found.layout) if hasattr(paper, "settings") else None
    except UNTOLD as error:
        if partial:
            return None
        if isinstance(error, FormariumError):
            raise
        raise BadCheckpoint(f"{found.system}: a tensor is missing or of another shape, so the settings cannot be told "
                            f"({error}; {tensors} tensors, layout {found.layout!r})") from None


def plan(found: Fit, variant: str, given: Mapping[str, Any]) -> Plan:
    """The model of these settings, with the options that the caller names."""
    system, paper, makes = found.system, find(found.system).module, found.keys.makes
    own = {k: resolve(k, v) for k, v in given.items()}
    if makes == "part":
        merged = found.told | own
        dim = merged.pop("dim")
        made = paper.PART.but(**{k: resolve(k, v) for k, v in merged.items()})
        return Plan(f"{system} (the part alone)", {}, lambda: made(dim, Place()), (made, dim))
    if makes == "model":
        name, changes = _preset(found, system, variant, found.told, own)
        return Plan(name, changes, lambda: create_model(name, **changes), _settled(name, changes))
    knows = option_names(paper.TRANSFORM)  # a model that the transform `system` was applied to
    of_transform = {k: v for k, v in (found.told | own).items() if k in knows}
    name, changes = _preset(found, makes, variant, {k: v for k, v in found.told.items() if k not in knows},
                            {k: v for k, v in own.items() if k not in knows})
    return Plan(f"{name}+{system}", changes,
                lambda: apply(create_model(name, **changes), system, copy=False, **of_transform),
                (_settled(name, changes), system, tuple(sorted(of_transform.items()))))


def _preset(found: Fit, system: str, variant: str, told: Options, given: Options) -> tuple[str, Options]:
    """The nearest preset to what was told; an assumption gives way to a preset that has the rest but for its doors."""
    presets = find(system).module.PRESETS
    if variant and variant not in presets:
        raise unknown(f"variant of {system}", variant, presets)
    firm = {k: v for k, v in told.items() if k not in found.assumed}
    name, changes = nearest_preset(system, told, found.assumed, variant, given)
    preset = presets[name.split("/")[1]]
    has = defaults(preset)
    if set(changes) - set(found.assumed) <= set(DOORS):
        for k in [k for k in changes if k in found.assumed and has[k] is not None]:  # None: no such tensors
            del changes[k]
            found.assumed[k] = Assumed(has[k], f"{found.assumed[k].why}; {name} has it so")
    found.also = {}
    for other, p in presets.items():
        if p.target is preset.target and f"{system}/{other}" != name:
            theirs = defaults(p)
            apart = {k: theirs[k] for k in has if theirs[k] != has[k]}
            if apart and not set(apart) & set(firm):
                found.also[f"{system}/{other}"] = ", ".join(f"{k}={v}" for k, v in apart.items())
    return name, {k: v for k, v in (changes | given).items() if has.get(k) != v}


def nearest_preset(system: str, options: Options, assumed: Container[str] = (), variant: str = "",
                   given: Options = {}) -> tuple[str, Options]:  # noqa: B006
    """The preset that differs least from these options, and the options that differ from it; what is `assumed` counts
    last. variant: it is this one; given: options that it must have."""
    def changes(v: str) -> Options:
        has = defaults(presets[v])
        return {k: o for k, o in options.items() if k not in has or has[k] != o}

    def distance(v: str) -> tuple[int, int, int]:
        differ = changes(v)  # of equals, the class with the fewest options that nothing was said of
        return sum(k not in assumed for k in differ), len(differ), len(defaults(presets[v]))

    presets: dict[str, Spec[Any]] = find(system).module.PRESETS
    presets = {variant: presets[variant]} if variant else {  # they may differ in class
        v: p for v, p in presets.items() if all(map(p.takes, (*options, *given)))} or presets
    best = min(presets, key=distance)
    return f"{system}/{best}", changes(best)


def _settled(name: str, changes: Options) -> Any:
    system, variant = name.split("/")
    made = find(system).module.PRESETS[variant]
    return made.target, defaults(made) | {k: resolve(k, v) for k, v in changes.items()}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory for its weights; random values on the meta device would import torch's compiler."""
    with torch.device("meta"), NoStart():
        return build()


def outline(build: Callable[[], nn.Module]) -> State:
    """The names and shapes of a model's tensors, on the meta device."""
    return dict(on_meta(build).state_dict())


def misfit(found: Fit) -> BadCheckpoint | None:
    """What is missing, left over or of another shape in the model of these settings, in the file's names."""
    assert found.plan is not None
    own, state = outline(found.plan.build), found.converted.state
    theirs = {t: " + ".join(m.sources) for m in found.converted.moves for t in m.targets}
    missing = [k for k in own if k not in state]
    extra = [theirs[k] for k in state if k not in own and copy_of(k, state, own) is None]
    shapes = [f"{theirs[k]} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              + (f" as {k}" if theirs[k] != k else "") for k in own
              if k in state and state[k].shape != own[k].shape]
    said = [f"{len(rows)} {word}: {'; '.join(rows[:3])}" for word, rows in
            (("of another shape", shapes), ("missing", missing), ("unknown", extra)) if rows]
    what = f"{found.plan.name} in the layout {found.layout!r}"
    return BadCheckpoint(f"{what} does not match: {'. '.join(said)}") if said else None


def _by_shapes(system: str, state: State) -> str:
    """The preset that most of these tensors fit."""
    presets = find(system).module.PRESETS

    def fitting(variant: str) -> int:
        own = outline(presets[variant])
        return sum(k in own and own[k].shape == t.shape for k, t in state.items()) - sum(k not in state for k in own)

    if not presets:
        raise BadCheckpoint(f"{system} builds no model of its own")
    return max(presets, key=fitting)


def _strays(system: str, layout: str, state: State, converted: Converted) -> BadCheckpoint:
    stray = converted.unmatched
    return BadCheckpoint(f"not a checkpoint of {system}: {len(stray)} of {len(state)} tensors have no place in its nearest "
                         f"layout {layout!r}, e.g. {', '.join(stray[:3])}")
