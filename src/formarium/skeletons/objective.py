"""Pretraining losses that wrap a model, by name: "droppos(pos_ratio=0.5)"."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.build import parse_name
from ..core.errors import FormariumError, unknown
from ..core.model import Model, Trainable
from ..core.registry import find, systems
from ..core.spec import Spec


class Objective(Trainable):
    """A loss around `self.model`, built as objective(model, *, options). It is no model: `export` gives the encoder.

    progress: part of the training budget that is done, 0 to 1; who trains writes it before each step. In eval mode
    nothing depends on it, so that losses can be compared over a run.
    """

    progress: Float[Tensor, ""]

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def forward(self, inputs: Any) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """What the model takes, without labels, to the loss and the numbers for the log."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def export(self) -> Model:
        """The encoder with its own recipe: `save` and `load` know nothing of the objective."""
        return self.model

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Any:
        return self.model.example(batch, shape)


def objective(text: str) -> Spec[Objective]:
    """The objective called `text`, e.g. "droppos(pos_ratio=0.5)". Unknown names and options raise with the nearest ones."""
    name, paren, rest = text.strip().partition("(")
    names = [n for n, e in systems().items() if e.card.kind == "objective"]
    if name.strip() not in names:
        raise unknown("objective", name.strip(), names)
    if paren and not rest.endswith(")"):
        raise FormariumError(f"cannot read {text!r}: a parenthesis is not closed")
    options = parse_name(f"{name}:{rest[:-1]}")[1] if paren else {}
    return find(name.strip()).module.OBJECTIVE.but(**options)
