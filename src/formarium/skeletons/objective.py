"""Losses that wrap a model, by name: "droppos(pos_ratio=0.5)"; and those that also see labels."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.build import create_model, parse_name
from ..core.errors import DoesNotFit, FormariumError, unknown
from ..core.model import Model, Trainable
from ..core.registry import Entry, find, systems
from ..core.spec import Spec
from ..weights.load import load


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


class Supervised(Objective):
    """An objective that also sees the targets of a task's batch; `train(objective=)` trains a model for the task so."""

    def forward(self, inputs: Any, targets: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:  # type: ignore[override]
        raise TypeError(f"{type(self).__name__} must define forward")


def loss_of(wrapped: Any, kind: Objective, batch: tuple[Any, ...]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """What an objective of this kind says of a task's batch of inputs and targets. wrapped: it, maybe compiled."""
    return wrapped(batch[0], batch[1]) if isinstance(kind, Supervised) else wrapped(batch[0])


def find_teacher(teacher: str | nn.Module, student: Model, who: str) -> nn.Module:
    """A module as it is, a file that `load` reads, or the name of a model, made of the student's sizes; frozen."""
    if isinstance(teacher, nn.Module):
        return teacher.requires_grad_(False)
    if not teacher:
        raise DoesNotFit(f"{who} needs a teacher, a file or a model's name: {who}(teacher=teacher.safetensors)")
    if teacher.endswith(".safetensors") or Path(teacher).is_file():
        return load(teacher).requires_grad_(False)
    sizes = {k: getattr(student, k) for k in ("vocab", "context", "num_classes", "img_size") if hasattr(student, k)}
    if hasattr(getattr(student, "embedding", None), "in_chans"):
        sizes["in_chans"] = student.embedding.in_chans  # type: ignore[union-attr]
    return create_model(teacher, **sizes).requires_grad_(False)


def objective(text: str) -> Spec[Objective]:
    """The objective called `text`, e.g. "droppos(pos_ratio=0.5)". Unknown names and options raise with the nearest ones."""
    name, paren, rest = text.strip().partition("(")
    names = [n for n, e in systems().items() if e.card.kind == "objective" or _has_objective(e)]
    if name.strip() not in names:
        raise unknown("objective", name.strip(), names)
    if paren and not rest.endswith(")"):
        raise FormariumError(f"cannot read {text!r}: a parenthesis is not closed")
    options = parse_name(f"{name}:{rest[:-1]}")[1] if paren else {}
    return find(name.strip()).module.OBJECTIVE.but(**options)


def _has_objective(entry: Entry) -> bool:
    """Has a system of another kind an objective beside its models? Read from its text."""
    return "\nOBJECTIVE = " in entry.path.read_text(encoding="utf-8")
