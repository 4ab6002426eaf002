"""What a task is: fixed data, a loss, a metric on the whole test set, and something to show."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import BadData, DoesNotFit
from ..core.model import Model

SPLITS = ("train", "val", "test")
Batch = tuple[Any, ...]  # inputs and targets: tensors, tuples of them, or lists of samples whose shapes differ


@dataclass(frozen=True)
class DataInfo:
    """Where the data is from and how it is split, for the report."""

    title: str
    source: str
    licence: str
    sizes: dict[str, int]  # split -> samples (images, or predicted bytes)
    note: str = ""


class Task:
    """Data, loss and metric of a job. Tasks never appear inside a model; models never inside a task.

    A training batch is a function of (seed, step) alone, so every model sees the same data in the same order and a
    resumed run goes on where it was.
    """

    name: str
    metric: ClassVar[str]  # the key of `evaluate` that decides
    higher_is_better: ClassVar[bool]
    model_type: ClassVar[type[Model]]
    domain: ClassVar[str]  # of the cards whose models fit
    info: DataInfo

    def model_options(self) -> dict[str, Any]:
        """Options for `create_model` that make a model fit this data (classes, channels, image size, vocabulary)."""
        raise TypeError(f"{type(self).__name__} must define model_options")

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Inputs and targets of one step."""
        raise TypeError(f"{type(self).__name__} must define train_batch")

    def augmented(self, **options: Any) -> "Task":
        """The task with other augmentation of its training batches (Augmentation's fields)."""
        raise DoesNotFit(f"{', '.join(options)}: augmentation of labelled images, of which {self.name} has none")

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch, a scalar."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """Metrics over the whole split, the loss among them; raises if the samples counted are not the split's size."""
        raise TypeError(f"{type(self).__name__} must define evaluate")

    def show(self, model: Model) -> dict[str, Any]:
        """Something a person can look at, the same samples for every model: JSON with a "kind", which `arena/shown/KIND.py`
        draws, e.g. {"kind": "text", "prompt": "...", "text": "..."}."""
        raise TypeError(f"{type(self).__name__} must define show")

    def check_fits(self, model: torch.nn.Module, name: str) -> None:
        if not isinstance(model, self.model_type):
            raise DoesNotFit(f"the task {self.name} needs a model of the domain {self.domain!r}; {name} is another; "
                             f"see: formarium list --domain {self.domain}")

    def check_counted(self, counted: int, split: str) -> None:
        if counted != self.info.sizes[split]:
            raise BadData(f"{self.name}: {counted} samples of the {split} split were evaluated, "
                          f"it has {self.info.sizes[split]}")


def share(batch: Any, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> Any:
    """The samples of process `rank` of `world`, on its device. Tuples hold the parts of a batch; a tensor's first axis, or
    a list, holds the samples (a list where their shapes differ)."""
    if isinstance(batch, tuple):
        return tuple(share(part, rank, world, device) for part in batch)
    if isinstance(batch, list):
        return [sample.to(device) for sample in batch[rank::world]]
    return batch[rank::world].to(device)


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n samples in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, on the CPU; neighbouring seeds and steps have nothing in common."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; afterwards the mode is what it was. Gives the device of the model."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        model.train(before)
