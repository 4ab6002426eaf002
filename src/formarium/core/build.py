"""From a name to a model: `create_model("gpt/nano:mixer=cosformer", depth=6)`."""

import ast
import re
from typing import Any

from .errors import DoesNotFit, FormariumError, unknown
from .model import Model
from .registry import PART_KINDS, find, list_parts, named_parts, split_name
from .spec import Spec, from_json, spec, to_json


def parse_name(text: str) -> tuple[str, dict[str, Any]]:
    """"gpt/nano:mixer=cosformer,depth=4" -> ("gpt/nano", {"mixer": "cosformer", "depth": 4}).

    Transforms, which stand last, stay with the name: "vit/nano:depth=2+llm_int8" -> ("vit/nano+llm_int8", {"depth": 2}).
    """
    model, *transforms = split_transforms(text)
    name, colon, rest = model.partition(":")
    return "+".join([name.strip(), *transforms]), _parse_options(rest, text) if colon else {}


def split_transforms(text: str) -> list[str]:
    """"vit/nano:depth=2+zero_tprune(keep=0.7)+llm_int8" -> ["vit/nano:depth=2", "zero_tprune(keep=0.7)", "llm_int8"]."""
    items = [""]
    for piece in re.split(r"\+(?=\s*[A-Za-z_])", text):  # not the sign of an exponent
        if items[-1].count("(") > items[-1].count(")"):
            items[-1] += f"+{piece}"
        else:
            items.append(piece)
    return [i.strip() for i in items[1:]]


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """"zero_tprune(keep=0.7)" -> ("zero_tprune", {"keep": 0.7}); options that take parts hold Specs."""
    name, paren, rest = text.strip().partition("(")
    if paren and not rest.endswith(")"):
        raise FormariumError(f"cannot read {text!r}: a parenthesis is not closed, or something follows it; options of the "
                             "model come before the first +")
    return name.strip(), _resolve_all(_parse_options(rest.removesuffix(")"), text)) if paren else {}


def _parse_options(text: str, whole: str) -> dict[str, Any]:
    options = {}
    for item in _split(text):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise FormariumError(f"cannot read {item!r} in {whole!r}: write NAME:option=value,option=value, "
                                 "a part with options as residual=denseformer(dilation=4,period=5)")
        options[key.strip()] = _parse_value(value.strip(), key.strip())
    return options


def _parse_value(text: str, option: str) -> Any:
    if text.startswith("(") and text.endswith(")"):
        return tuple(_parse_value(t.strip(), option) for t in _split(text[1:-1]))
    if _part_kind(option):
        return text  # "none" is the name of a part
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text, text)


def _part_kind(option: str) -> str:
    """The kind of part that an option of this name takes; "" if none."""
    kind = option.removesuffix("s")
    return kind if kind in PART_KINDS else ""


def _split(text: str) -> list[str]:
    """Splits at the commas that are not inside parentheses."""
    items, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            items.append("")
        else:
            items[-1] += c
    return [i for i in items if i.strip()]


def part(kind: str, text: str) -> Spec[Any]:
    """The part called `text` for an option of this kind, e.g. part("residual", "denseformer(dilation=4)")."""
    name, options = parse_call(text)
    if name in named_parts()[kind]:
        module, class_name = named_parts()[kind][name]
        found = from_json({"spec": f"{module}:{class_name}", "options": {}})
    elif name in list_parts(kind):
        found = find(name).module.PART
    else:
        raise unknown(kind, name, list_parts(kind))
    return found.but(**options) if options else found


def resolve(option: str, value: Any) -> Any:
    """Part names become Specs where the option's name is a kind of part ("mixer") or several ("mixers")."""
    kind = _part_kind(option)
    if kind:
        if isinstance(value, str):
            return part(kind, value)
        if isinstance(value, list | tuple):
            return tuple(resolve(kind, v) for v in value)
        if not isinstance(value, Spec):
            raise DoesNotFit(f"{option} takes a name or a Spec, not {value!r}; names: {', '.join(list_parts(kind))}")
    return value


def _resolve_all(options: dict[str, Any]) -> dict[str, Any]:
    return {k: resolve(k, v) for k, v in options.items()}


def preset(name: str) -> Spec[Model]:
    """The Spec behind "system/variant": `preset("swin/tiny").but(window=12)`."""
    entry, variant = split_name(name)
    presets = entry.module.PRESETS
    if variant not in presets:
        raise FormariumError(f"{entry.path.name} has a card for {variant!r} but no preset of that name")
    return presets[variant]


def create_model(name: str, /, **changes: Any) -> Model:
    """A model by name, with any option of its constructor changed.

    create_model("swin/tiny", num_classes=10, img_size=64); create_model("gpt/nano", mixer="cosformer");
    create_model("gpt/nano:mixer=cosformer"); create_model("vit/nano+zero_tprune(keep=0.7)"), transformed. Unknown names and
    options raise with the nearest valid ones.
    """
    name, options = parse_name(name)
    base, *transforms = split_transforms(name)
    options |= changes
    entry, variant = split_name(base)
    model = preset(base).but(**_resolve_all(options))()
    model.recipe = {"name": f"{entry.name}/{variant}", "changes": {k: to_json(v) for k, v in options.items()}}
    from .transform import apply  # which reads names with what stands above

    for transform in transforms:
        apply(model, transform, copy=False)
    return model


def from_recipe(recipe: dict[str, Any]) -> Model:
    """The model, newly initialised and transformed, that a recipe describes."""
    from .transform import replay

    model = create_model(recipe["name"], **{k: from_json(v) for k, v in recipe["changes"].items()})
    return replay(model, recipe.get("transforms", []))


__all__ = ["create_model", "from_recipe", "parse_call", "parse_name", "part", "preset", "resolve", "spec",
           "split_transforms"]
