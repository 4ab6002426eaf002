"""Multiply-accumulates of a forward pass, counted on the meta device: no memory, no arithmetic."""

from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


def _mv(matrix: tuple[int, ...], vector: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of model(example) in evaluation, for the whole batch; the model is left as it is.

    Counted: matrix products, convolutions, attention (the full N x M product, also where a mask hides half of it). Not
    counted: element-wise operations, norms, pooling, look-ups and Fourier transforms. On the meta device, since the fused
    attention of the CPU is not counted there.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    meta = {name: torch.empty_like(t, device="meta") for name, t in tensors}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv})
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), counter:
            functional_call(model, meta, (tree_map_only(Tensor, lambda t: t.to("meta"), example),))
    finally:
        for module in training:
            module.training = True
    return counter.get_total_flops() // 2
