"""A deferred call that checks its options where they are written, prints, compares, and goes to JSON and back."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from .errors import DoesNotFit, unknown

T = TypeVar("T")


@cache
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


@dataclass(frozen=True)
class Spec(Generic[T]):
    """`spec(WindowAttention, window=7)` is WindowAttention called later, with more arguments: `s(dim, place)`."""

    target: Callable[..., T]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any, **more: Any) -> T:
        return self.target(*args, **dict(self.options), **more)

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options)})"

    @property
    def name(self) -> str:
        return getattr(self.target, "__name__", str(self.target))

    def takes(self, option: str) -> bool:
        """Has the target an option of this name?"""
        return option in _parameters(self.target)

    def but(self, **changes: Any) -> "Spec[T]":
        """The same call with these options changed; an option that the target has not raises with the nearest ones."""
        return spec(self.target, **{**dict(self.options), **changes})

    def offer(self, **defaults: Any) -> "Spec[T]":
        """As `but`, for those options only that the target has and that are not set yet."""
        mine = dict(self.options)
        return self.but(**{k: v for k, v in defaults.items() if self.takes(k) and k not in mine})

    def require(self, why: str, **options: Any) -> "Spec[T]":
        """As `but`, but an option that the target has not raises DoesNotFit, saying `why` it was needed."""
        for option in options:
            if not self.takes(option):
                raise DoesNotFit(f"{self.name} does not fit here: {why}, and it has no option {option!r}")
        return self.but(**options)

    def to_json(self) -> dict[str, Any]:
        """{"spec": "module:Class", "options": {...}}; options are JSON values, tuples and Specs."""
        return {"spec": f"{self.target.__module__}:{self.name}", "options": {k: to_json(v) for k, v in self.options}}


def spec(target: Callable[..., T], /, **options: Any) -> Spec[T]:
    """A deferred call of `target`; a misspelt option raises here, where it is written."""
    known = _parameters(target)
    for option in options:
        if option not in known:
            raise unknown(f"option of {getattr(target, '__name__', target)}", option, _settable(known))
    return Spec(target, tuple(sorted(options.items())))


def _settable(parameters: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    return (n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY or p.default is not p.empty)


def option_names(target: Callable[..., Any]) -> list[str]:
    """Names that `spec(target, ...)` takes."""
    return list(_settable(_parameters(target)))


def to_json(value: Any) -> Any:
    """A JSON form that `from_json` turns back into an equal value; tuples and Specs survive."""
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, tuple):
        return {"tuple": [to_json(v) for v in value]}
    if isinstance(value, list):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} cannot be written into a recipe: options are numbers, strings, tuples and Specs")


def from_json(value: Any) -> Any:
    """The value that `to_json` wrote. Only names of parts, skeletons and papers, or of a user's papers, are imported."""
    if isinstance(value, dict) and "spec" in value:
        module, _, name = value["spec"].partition(":")
        if not module.startswith(("formarium.parts.", "formarium.skeletons.", "formarium.papers.", "formarium_user.")):
            raise DoesNotFit(f"the recipe names {value['spec']!r}, which is not a part of Formarium")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise DoesNotFit(f"the recipe names {value['spec']!r}, which this version of Formarium has not") from None
        if not isinstance(target, type) or target.__module__ != module:  # a file must not name just any callable
            raise DoesNotFit(f"the recipe names {value['spec']!r}, which is not a part of Formarium")
        return spec(target, **{k: from_json(v) for k, v in value["options"].items()})
    if isinstance(value, dict) and "tuple" in value:
        return tuple(from_json(v) for v in value["tuple"])
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return value
