"""LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (Dettmers, Lewis, Belkada, Zettlemoyer, NeurIPS 2022),
arXiv 2208.07339.

New: linear layers in int8 without calibration and without loss. Vector-wise quantisation: each row of the inputs X and each
output's row of the weights W has its own scale, the greatest absolute value over 127, so X W^T is an integer product times
an outer product of scales (Eq. 7, section 3.1). Mixed-precision decomposition: feature dimensions in which some input
reaches the threshold of 6 are taken out and multiplied in floating point (Eq. 8, section 3.2).

Decisions, all as the authors' code (bitsandbytes) has it: a row's scale is taken without the outlying values, not without
the outlying dimensions; weights and inputs pass through half precision before they are rounded; the weights of outlying
dimensions are made from the int8 ones, whose float form is not kept. Scales are multiplied by 1 / 127^2, for which their
code has a number 1.8e-5 of it greater. Outliers are looked for over all rows of a call, so an
answer depends a little on its batch. The layers of the stacks are quantised; embeddings, norms and the head stay. Gradients
reach the inputs (through the dequantised weights), not the weights.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from ...core.card import Card
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...skeletons.stack import Stack

CARD = Card(
    title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    authors="Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer",
    venue="NeurIPS 2022",
    arxiv="2208.07339",
    year=2022,
    code="https://github.com/bitsandbytes-foundation/bitsandbytes",
    licence="MIT",
    kind="transform",
    domain="language",
    tags=("quantisation", "int8", "outliers"),
    claim="Int8 inference of models of up to 175B parameters, at half the memory and without a loss: over 99.9 % of the "
          "values are multiplied in 8 bits, the few outlying feature dimensions in 16.",
    hosts=("gpt/nano", "vit/nano", "swin/nano", "poolformer/nano"),
)

LOOKS_FOR = "linear layers in the layers of its stacks"
IDENTITY = {"threshold": 0.0}
INT8_UNITS = torch.cpu._is_vnni_supported()
EXACT_TERMS = 2**24 // 127**2  # products of two int8 values that a float32 sums exactly


def kernel(device: torch.device | str = "cpu") -> str:
    """How integers are multiplied there: "int_mm" (int8 units) or "float32" (exact sums of whole numbers in float units).

    torch._int_mm is written out in scalar code where the processor has no int8 dot products (AVX-512 VNNI);
    `benchmarks/int8.py` measures both.
    """
    kind = torch.device(device).type
    return "int_mm" if kind == "cuda" or (kind == "cpu" and INT8_UNITS) else "float32"


def int8_matmul(a: Int8[Tensor, "m k"], b: Int8[Tensor, "n k"]) -> Tensor:
    """a b^T, exactly: int32, or whole numbers in float32."""
    if kernel(a.device) == "int_mm":
        return _int_mm(a, b)
    if a.shape[1] <= EXACT_TERMS:
        return a.float() @ b.float().t()
    parts = zip(a.split(EXACT_TERMS, dim=1), b.split(EXACT_TERMS, dim=1), strict=True)
    return sum((x.float() @ y.float().t()).int() for x, y in parts)  # type: ignore[return-value]


def _int_mm(a: Int8[Tensor, "m k"], b: Int8[Tensor, "n k"]) -> Int[Tensor, "m n"]:
    """By int8 units; those of CUDA take more than 16 rows and multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    if a.is_cuda:
        a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
        b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.t())[:m, :n]


def quantise(x: Float[Tensor, "m k"]) -> tuple[Int8[Tensor, "m k"], Float[Tensor, "m"]]:
    """Rows as whole numbers of -127..127, and the greatest absolute value of each, in float32: x is near q * s / 127."""
    x = x.half().float()
    scale = x.abs().amax(1)
    return (x * (127 / scale.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round().to(torch.int8), scale


class Product(torch.autograd.Function):
    """x W^T from int8 weights (N, K) with their scales (N,). threshold: None: no decomposition."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "m k"], weight: Int8[Tensor, "n k"], scale: Float[Tensor, "n"],
                threshold: float | None) -> Float[Tensor, "m n"]:
        ctx.save_for_backward(weight, scale)
        outliers = None if threshold is None else x.half().abs() >= threshold
        rows, row_scale = quantise(x if outliers is None else x.masked_fill(outliers, 0))
        columns = None if outliers is None else outliers.any(0)
        if columns is not None:
            rows = rows.masked_fill(columns, 0)
        scales = torch.outer(row_scale, scale.float()) / 127**2
        out = (int8_matmul(rows, weight) * scales).to(x.dtype)
        if columns is None or x.is_meta:  # where values are not known, all count as int8
            return out
        if torch.compiler.is_compiling():  # the number of outlying dimensions is not known
            return out + x.masked_fill(~columns, 0) @ dequantise(weight, scale, x.dtype).t()
        where = columns.nonzero()[:, 0]
        if len(where):
            out += x[:, where] @ dequantise(weight[:, where], scale, x.dtype).t()
        return out

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "m n"]):
        weight, scale = ctx.saved_tensors
        return grad @ dequantise(weight, scale, grad.dtype), None, None, None


def dequantise(weight: Int8[Tensor, "n k"], scale: Float[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n k"]:
    return (weight * (scale.float() / 127)[:, None]).to(dtype)


class Int8Linear(nn.Module):
    """A linear layer (Eq. 8) with int8 weights. threshold: dimensions with an input this great or greater are outliers."""

    def __init__(self, linear: nn.Linear, threshold: float | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.threshold = linear.in_features, linear.out_features, threshold
        weight, scale = quantise(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b n"]:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # sums in less would not be exact
            out = Product.apply(x.reshape(-1, self.in_features), self.weight, self.scale, self.threshold)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def llm_int8(model: Model, *, threshold: float | None = 6.0) -> int:
    """Int8 linear layers; returns their number. Layers that are int8 already get the threshold.

    threshold: of outlying inputs; None: no decomposition; 0: every dimension is an outlier: all stays in floating point.
    """
    if threshold is not None and not 0 <= threshold < math.inf:
        raise DoesNotFit(f"threshold is 0 or more, or None for no decomposition, got {threshold}")
    places = {(parent, name): child for stack in model.modules() if isinstance(stack, Stack)
              for parent in stack.layers.modules() for name, child in parent.named_children()
              if type(child) in (nn.Linear, Int8Linear)}
    for (parent, name), child in places.items():
        if isinstance(child, Int8Linear):
            child.threshold = threshold
        elif threshold != 0:
            setattr(parent, name, Int8Linear(child, threshold))
    return len(places)


TRANSFORM = llm_int8
