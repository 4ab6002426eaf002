"""The past of a multivariate series to its future."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx
from ..core.errors import BadData, DoesNotFit
from ..core.model import Model
from ..core.spec import Spec, spec
from ..parts.norm import LayerNorm
from .stack import Stack

EPS = 1e-5  # added to the variance of a history


class Forecaster(Model):
    """history (B, context, variates) -> normalise -> embed -> stack -> norm -> project -> undo -> (B, horizon, variates).

    A paper defines `embed` and `project`. context: past steps; horizon: future steps. variates: None where the weights
    fit any number. normalise: each variate of a history is brought to mean 0 and variance 1 before the model, and its
    forecast back after it (reversible instance normalisation, Kim et al. 2022, without its learned scale and shift).
    """

    pipeline = "time-series-forecasting"

    def __init__(self, stack: Stack, *, context: int, horizon: int, variates: int | None, normalise: bool = True,
                 norm: Spec[nn.Module] = spec(LayerNorm)) -> None:
        super().__init__()
        for name, value in (("context", context), ("horizon", horizon), ("variates", variates)):
            if value is not None and value < 1:
                raise DoesNotFit(f"{name} is 1 or more, got {value}")
        self.context, self.horizon, self.variates, self.normalise = context, horizon, variates, normalise
        self.stack = stack
        self.norm = norm(stack.dim)

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Float[Tensor, "b t v"]:
        return torch.randn(batch, *(shape or (self.context, self.variates or 7)))

    def check_history(self, batch: Tensor, marks: Tensor | None) -> None:
        """Raises unless `batch` is a finite history (B, context, variates) and `marks` are of the same steps."""
        b, t, v = batch.shape if batch.ndim == 3 else (0, 0, 0)
        wanted = f"(B, {self.context}, {'V' if self.variates is None else self.variates})"
        if batch.ndim != 3 or t != self.context or self.variates not in (None, v) or not batch.is_floating_point():
            raise DoesNotFit(f"expected a history {wanted} of floating point numbers, steps before variates, got "
                             f"{tuple(batch.shape)} {batch.dtype}; build the model with context= and variates= for another")
        if marks is not None and (marks.ndim != 3 or marks.shape[:2] != (b, t)):
            raise DoesNotFit(f"expected marks ({b}, {t}, M) of the same steps as the history, got {tuple(marks.shape)}")
        if torch.compiler.is_compiling() or batch.is_meta:  # values are not known there
            return
        for what, values in (("history", batch), ("marks", marks)):
            bad = None if values is None else values.isfinite().logical_not_()
            if bad is not None and bad.any():
                where = bad.any(0).any(0).nonzero().flatten().tolist()
                raise BadData(f"{int(bad.sum())} of {bad.numel()} values of the {what} are NaN or infinite, in variate "
                              f"{', '.join(map(str, where[:5]))} (counted from 0); fill them first")

    def embed(self, batch: Float[Tensor, "b t v"],
              marks: Float[Tensor, "b t m"] | None = None) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define embed")

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = self.stack(x, ctx)
        return self.norm(x), ctx

    def project(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b h v"]:
        """The forecast from the last tokens."""
        raise TypeError(f"{type(self).__name__} must define project")

    def forward(self, batch: Float[Tensor, "b t v"], marks: Float[Tensor, "b t m"] | None = None) -> Float[Tensor, "b h v"]:
        """marks: what is known of the steps besides the values (hour, weekday), for models that take it."""
        self.check_history(batch, marks)
        if not self.normalise:
            return self.project(*self.encode(*self.embed(batch, marks)))
        mean = batch.mean(1, keepdim=True)
        deviation = (batch.var(1, keepdim=True, correction=0) + EPS).sqrt()
        x = self.project(*self.encode(*self.embed((batch - mean) / deviation, marks)))
        return x * deviation + mean
