"""timm as a peer. It imports torchvision, whose wheel may lack its operators here (a CUDA wheel beside a CPU torch)."""

from types import ModuleType
from typing import Any

import torch


def import_timm() -> ModuleType:
    """timm, also where torchvision's operators (nms and the like, which no model here calls) could not be loaded."""
    real = torch.library.register_fake

    def register(op: Any, *args: Any, **options: Any) -> Any:
        space, _, name = str(op).partition("::")
        if space == "torchvision" and not hasattr(torch.ops.torchvision, name):
            return lambda function: function
        return real(op, *args, **options)

    torch.library.register_fake = register
    try:
        import timm
    finally:
        torch.library.register_fake = real
    return timm
