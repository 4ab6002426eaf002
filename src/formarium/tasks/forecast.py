"""How does the series go on? Mean squared error over every window of a split decides."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import BadData, DoesNotFit, unknown
from ..core.model import Model
from ..data import series as tables
from ..data.series import Series
from ..skeletons.series import Forecaster
from .base import SPLITS, DataInfo, Task, evaluating, generator

SHOWN = 3  # windows


class Forecast(Task):
    """Histories (B, context, V) -> forecasts (B, horizon, V); each variate has mean 0 and deviation 1 in the training part.

    context: steps seen; horizon: steps to forecast. A window is a history and what follows it. The forecast part of a
    window of val or test lies in its split; its history may begin in the split before. Training takes windows at random.
    """

    metric = "mse"
    higher_is_better = False
    model_type = Forecaster
    domain = "series"

    def __init__(self, name: str, series: Series, *, context: int = 96, horizon: int = 96) -> None:
        for what, steps in (("context", context), ("horizon", horizon)):
            if not isinstance(steps, int) or steps < 1:
                raise DoesNotFit(f"{what} is a number of steps, 1 or more, not {steps!r}")
        self.name, self.series, self.context, self.horizon = name, series, context, horizon
        self.borders = {s: (max(0, a - context), b) for s, (a, b) in series.borders.items()}
        sizes = {s: b - a - context - horizon + 1 for s, (a, b) in self.borders.items()}
        if min(sizes.values()) < 1:
            rows = {s: b - a for s, (a, b) in series.borders.items()}
            raise BadData(f"{name} is too short for a context of {context} and a horizon of {horizon} steps: of its "
                          f"{len(series.values)} rows {rows['train']} are for train, {rows['val']} for val, {rows['test']} "
                          f"for test; train needs {context + horizon} or more, val and test {horizon}; give a longer "
                          "series or a smaller context= and horizon=")
        note = f"{series.origin.note}; a sample is a window of {context} steps seen and {horizon} forecast"
        self.info = DataInfo(*series.origin[:3], sizes=sizes, note=note.removeprefix("; "))
        train = series.values[slice(*series.borders["train"])]
        self.mean, self.std = train.mean(0), train.std(0)
        self.values = torch.from_numpy((series.values - self.mean) / self.std).float()

    def model_options(self) -> dict[str, Any]:
        return {"context": self.context, "horizon": self.horizon, "variates": len(self.series.names)}

    def windows(self, split: str) -> Tensor:
        """Every window of a split, in order: a view (N, context + horizon, V)."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return self.values[slice(*self.borders[split])].unfold(0, self.context + self.horizon, 1).transpose(1, 2)

    def train_batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(self.info.sizes["train"], (batch_size,), generator=generator(seed, step))
        return self._cut(self.windows("train")[index])

    def _cut(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        return windows[:, :self.context].contiguous(), windows[:, self.context:].contiguous()

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, every window once, the last batch as large as what is left."""
        for windows in self.windows(split).split(batch_size):
            yield self._cut(windows)

    def evaluate(self, model: Model, split: str, batch_size: int = 256) -> dict[str, float]:
        """mse (loss is the same) and mae of the standardised values, over all windows, steps and variates."""
        squares, distances, count = 0.0, 0.0, 0
        with evaluating(model) as device:
            for history, future in self.batches(split, batch_size):
                error = (self._forecast(model, history.to(device)) - future).double()
                squares += error.square().sum().item()
                distances += error.abs().sum().item()
                count += len(history)
        self.check_counted(count, split)
        numbers = count * self.horizon * len(self.series.names)
        return {"loss": squares / numbers, "mse": squares / numbers, "mae": distances / numbers}

    def _forecast(self, model: Model, history: Tensor) -> Tensor:
        out, wanted = model(history).float().cpu(), (len(history), self.horizon, len(self.series.names))
        if out.shape != wanted:
            raise DoesNotFit(f"{self.name} needs forecasts {wanted}; the model gave {tuple(out.shape)}")
        return out

    def show(self, model: Model) -> dict[str, Any]:
        """The last variate, in its own units, in three test windows evenly spaced in the split: a list a window."""
        windows = self.windows("test")
        index = torch.linspace(0, len(windows) - 1, min(SHOWN, len(windows))).long()
        history, truth = self._cut(windows[index])
        with evaluating(model) as device:
            forecast = self._forecast(model, history.to(device))

        def own_units(values: Tensor) -> list[list[float]]:
            return (values[..., -1].double() * self.std[-1] + self.mean[-1]).tolist()

        return {"kind": "series", "variate": self.series.names[-1], "history": own_units(history),
                "truth": own_units(truth), "forecast": own_units(forecast)}


def etth1(*, context: int = 96, horizon: int = 96) -> Forecast:
    """ETTh1, 7 variates, hourly."""
    return Forecast("etth1", tables.etth(1), context=context, horizon=horizon)


def etth2(*, context: int = 96, horizon: int = 96) -> Forecast:
    """ETTh2, 7 variates, hourly."""
    return Forecast("etth2", tables.etth(2), context=context, horizon=horizon)


def exchange(*, context: int = 96, horizon: int = 96) -> Forecast:
    """Exchange rates, 8 variates, daily."""
    return Forecast("exchange", tables.exchange(), context=context, horizon=horizon)


def temperatures(*, context: int = 96, horizon: int = 96) -> Forecast:
    """Hourly temperatures of two cities, embedded."""
    return Forecast("temperatures", tables.temperatures(), context=context, horizon=horizon)


def csv(path: str | Path, *, context: int = 96, horizon: int = 96) -> Forecast:
    """Your table of numbers."""
    return Forecast(f"csv:{path}", tables.csv(path), context=context, horizon=horizon)
