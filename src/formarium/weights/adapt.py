"""Weights for a model of other options than theirs: another image size, patch, window, other channels or classes.

A module says itself how the tensors in it and below it change:

    adapts = ("img_size",)                        # options of a model that ask for it
    def refit(self, name, tensor, was) -> Change | None

`self` is the module as it is wanted, `was` the one that the tensor is of, `name` the tensor's, from this module on.
`tensor` is None where `was` has none of that name. None: this module has nothing to say of it, those around it are asked.
DoesNotFit gives the reason why it cannot be. Equal shapes are asked about too: 2x8 cells are as many as 4x4.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import BadCheckpoint, DoesNotFit
from ..core.spec import option_names
from .keys import State


class Change(NamedTuple):
    """A tensor made to fit, and how; None: the model has no place for it. grows: only if the caller says `grow`, since the
    model then answers otherwise where it answered before."""

    tensor: Tensor | None
    how: str
    grows: bool = False


class Row(NamedTuple):
    """What `adapt` did to a tensor: its shape before (None: new) and after (None: left out)."""

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    how: str


def adapt(state: Mapping[str, Tensor], was: nn.Module, model: nn.Module, *, grow: bool = False) -> tuple[State, list[Row]]:
    """The tensors of a `was` as those of `model`, of the same system with other options, and what was done to which.

    was: may be on the meta device; model: what is new (the head of other classes) is taken from it. grow: also what only
    training makes right: learned positions of longer texts, rows of a larger vocabulary. What cannot be made to fit raises
    DoesNotFit. Tensors missing from `state`, or unknown to both models, are left to the caller.
    """
    theirs, ours = was.state_dict(), model.state_dict()
    before, after = (dict(m.named_modules(remove_duplicate=False)) for m in (was, model))
    out: State = {}
    rows = []
    for name in {**ours, **state}:
        tensor, wanted = state.get(name), ours.get(name)
        if name not in theirs and name not in ours:
            out[name] = state[name]
            continue
        if tensor is None and name in theirs:
            continue
        if _shape(tensor) != _shape(theirs.get(name)):
            raise BadCheckpoint(f"{name} is {_said(tensor)}, but {_said(theirs.get(name))} in the model that the tensors "
                                "are said to be of")
        try:
            change = _ask(name, tensor, before, after)
        except DoesNotFit as error:
            raise _misfit(name, tensor, wanted, was, model, str(error)) from None
        made = tensor if change is None else change.tensor
        if _shape(made) != _shape(wanted):
            lacks = "leave it out" if wanted is None else "make it up" if tensor is None else "change its size"
            raise _misfit(name, tensor, wanted, was, model, f"no part of the model says how to {lacks}")
        if change is not None and change.grows and not grow:
            raise _misfit(name, tensor, wanted, was, model,
                          f"{change.how}, only if you say grow=True; the model is then to be trained")
        if made is not None:
            out[name] = made if tensor is None else made.to(tensor.dtype)
        if change is not None:
            rows.append(Row(name, _shape(tensor), _shape(made), change.how))
    return out, rows


def _ask(name: str, tensor: Tensor | None, before: dict[str, nn.Module], after: dict[str, nn.Module]) -> Change | None:
    """What the nearest module around the tensor that knows it makes of it."""
    path = name.split(".")
    for i in reversed(range(len(path))):
        was, module = (modules.get(".".join(path[:i])) for modules in (before, after))
        if hasattr(module, "refit") and type(was) is type(module):
            change = module.refit(".".join(path[i:]), tensor, was)  # type: ignore[union-attr, operator]
            if change is not None:
                return change
    return None


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _said(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def _misfit(name: str, tensor: Tensor | None, wanted: Tensor | None, was: nn.Module, model: nn.Module,
            why: str) -> DoesNotFit:
    options = option_names(type(model))
    known = sorted({o for m in model.modules() for o in getattr(m, "adapts", ()) if o in options})
    return DoesNotFit(f"{name} is {_said(tensor)} in the file and {_said(wanted)} in the model asked for"
                      f"{_asked(was, model)}: {why}. "
                      f"What a {type(model).__name__} can be adapted in: {', '.join(known) or 'nothing'}")


def _asked(was: nn.Module, model: nn.Module) -> str:
    """Options that the recipes of the two models differ in: " (dim=32, ...)"."""
    old, new = (getattr(m, "recipe", {}).get("changes", {}) for m in (was, model))
    said = [k if isinstance(v, dict) else f"{k}={v!r}" for k, v in new.items() if k not in old or old[k] != v]
    return f" ({', '.join(said)})" if said else ""


@cache
def _bicubic(old: int, new: int) -> Float[Tensor, "new old"]:
    """Bicubic interpolation of a line of `old` numbers as a matrix. It is separable, so one a side of a map is enough."""
    line = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(line, size=(new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


@cache
def _pseudo_inverse(old: int, new: int) -> Float[Tensor, "new old"]:
    return torch.linalg.pinv(_bicubic(old, new).t())


def _along(x: Tensor, axis: int, matrix: Float[Tensor, "new old"]) -> Tensor:
    return torch.tensordot(matrix.to(x), x, ([1], [axis])).movedim(0, axis)


def _size(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def resize_map(tensor: Float[Tensor, "..."], axis: int, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """`tensor`, whose axis counts the cells of a map of `old` sides, for a map of `new` sides: bicubic with antialiasing,
    as timm's resample_abs_pos_embed. A map without time (H, W) is one of a single step (1, H, W)."""
    axes = max(len(old), len(new))
    sides = [(1,) * (axes - len(side)) + tuple(side) for side in (old, new)]
    out = tensor.double().unflatten(axis, sides[0])
    for i, (a, b) in enumerate(zip(*sides, strict=True)):
        if a != b:
            out = _along(out, axis + i, _bicubic(a, b))
    return out.flatten(axis, axis + axes - 1).to(tensor.dtype)


def refit_map(tensor: Float[Tensor, "..."], axis: int, old: Sequence[int], new: Sequence[int], *,
              prefix: int = 0) -> Change:
    """As `resize_map`, for a table that has `prefix` rows before those of the map, which are kept."""
    first, cells = tensor.split((prefix, tensor.shape[axis] - prefix), axis)
    kept = f", {prefix} prefix token{'s' * (prefix > 1)} kept" if prefix else ""
    return Change(torch.cat((first, resize_map(cells, axis, old, new)), axis),
                  f"interpolated bicubically from {_size(old)} to {_size(new)}{kept}")


def fold_channels(weight: Float[Tensor, "o i *k"], channels: int) -> Float[Tensor, "o j *k"]:
    """The weight of a convolution for another number of channels; images whose channels are equal get the same answer.

    Fewer: channel i is added to i modulo `channels`. More: they are repeated, and each shares its weight with its copies.
    As timm's adapt_input_conv where one number is a multiple of the other (it scales all alike: for 3 -> 4 another sum).
    """
    old = weight.shape[1]
    place = torch.arange(max(old, channels), device=weight.device) % min(old, channels)
    if channels < old:
        return torch.zeros_like(weight[:, :channels]).index_add(1, place, weight)
    copies = place.bincount()[place].to(weight.dtype)
    return weight[:, place] / copies.view(-1, *(1,) * (weight.ndim - 2))


def refit_kernel(weight: Float[Tensor, "o i *k"], shape: Sequence[int]) -> Change | None:
    """The weight of a convolution whose stride is its size, as one of this shape (o, j, *l); None: it is, or o differs.

    Channels by `fold_channels`. Another size by the pseudo-inverse of bicubic interpolation (FlexiViT, arXiv 2212.08013,
    Eq. 4 to 6): enlarged patches give the same answer, exactly. Images to videos: repeated over time and divided by it, so
    that a still gives the same answer (I3D, arXiv 1705.07750); back: summed over time.
    """
    if weight.shape == torch.Size(shape) or weight.shape[0] != shape[0] or abs(weight.ndim - len(shape)) > 1:
        return None
    out, how = weight.double(), []
    if weight.ndim < len(shape):
        out = out[:, :, None].repeat_interleave(shape[2], 2) / shape[2]
        how.append(f"repeated over {shape[2]} steps of time and divided by them")
    elif weight.ndim > len(shape):
        out = out.sum(2)
        how.append(f"summed over {weight.shape[2]} steps of time")
    if out.shape[1] != shape[1]:
        how.append(f"{out.shape[1]} channels {'folded' if shape[1] < out.shape[1] else 'shared out'} to {shape[1]}")
        out = fold_channels(out, shape[1])
    if out.shape[2:] != torch.Size(shape[2:]):
        how.append(f"resized from {_size(out.shape[2:])} to {_size(shape[2:])} by pseudo-inverse")
    for axis in range(2, out.ndim):
        if out.shape[axis] != shape[axis]:
            out = _along(out, axis, _pseudo_inverse(out.shape[axis], shape[axis]))
    return Change(out.to(weight.dtype), ", ".join(how))


def refit_vocabulary(name: str, weight: Tensor | None, vocab: Mapping[str, int]) -> Change | None:
    """A table of tokens (V, C) for more of them: the first stay, new ones start at their mean. Fewer raise.

    vocab: the tables' names, and how many tokens they are wanted for.
    """
    if weight is None or name not in vocab or len(weight) == vocab[name]:
        return None
    more = vocab[name] - len(weight)
    if more < 0:
        raise DoesNotFit(f"a smaller vocabulary leaves {-more} tokens of the text without a row")
    mean = weight.mean(0, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)
    return Change(torch.cat((weight, mean.expand(more, -1))), f"{more} rows appended, each the mean of those before",
                  grows=True)


def refit_classifier(model: Any, name: str, was: Any, head: str = "head") -> Change | None:
    """A tensor of the module called `head`: the new one of the model, where the number of classes is another."""
    if not name.startswith(f"{head}.") or model.num_classes == was.num_classes:
        return None
    new, now, before = model.state_dict().get(name), model.num_classes, was.num_classes
    if not now:
        return Change(new, f"left out: features instead of {before} classes")
    return Change(new, f"new: {now} classes instead of {before or 'features'}")
