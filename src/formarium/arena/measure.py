"""What a model costs: memory of a training step, latency and throughput, interleaved between models."""

import statistics
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.model import Model
from ..tasks.base import Task, share


def peak_memory(model: Model, task: Task, batch_size: int) -> int:
    """Bytes at the highest point of a training step: weights, gradients, optimiser state, activations. Trains the model."""
    device = next(model.parameters()).device
    batch = share(task.train_batch(0, 0, batch_size), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()

    def step() -> None:
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimiser's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    held = [*tree_leaves(batch), *model.parameters(), *model.buffers()]
    held += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    with _LiveMemory(held) as memory:
        step()
    return memory.peak


class _LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, followed through every operation: the processor keeps no such count itself."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@torch.no_grad()
def speeds(models: Mapping[str, Model], example: Any, *, rounds: int = 7, seconds: float = 0.1) -> dict[str, float]:
    """Seconds of one forward pass of each model on `example`: the median over rounds in which the models take turns.

    A round repeats a fast model until `seconds` have passed, so that the clock's grain does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            model.eval()
            calls, begun = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - begun < seconds:
                model(example)
                if any(p.is_cuda for p in model.parameters()):
                    torch.cuda.synchronize()
                calls += 1
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - begun) / calls)
    return {name: statistics.median(t) for name, t in times.items()}
