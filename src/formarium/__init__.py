"""Formarium: published Transformers from one shelf of parts, compared, loaded and re-tested.

    import formarium as fm
    fm.create_model("swin/tiny", num_classes=10)
    fm.compare(["vit/nano", "swin/nano"], task="mnist5k")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module; imported on first use, so that `import formarium` and listing stay without torch
_PUBLIC = {
    "list_models": "core.registry", "list_parts": "core.registry", "card": "core.registry", "add_module": "core.registry",
    "Card": "core.card", "Published": "core.card",
    "create_model": "core.build", "part": "core.build", "preset": "core.build",
    "Spec": "core.spec", "spec": "core.spec",
    "Ctx": "core.ctx", "Place": "core.ctx", "Cache": "core.ctx",
    "Part": "core.part", "Resample": "core.part", "Residual": "core.part",
    "Model": "core.model", "Feature": "core.model",
    "load": "weights.load", "from_pretrained": "weights.hub", "save": "weights.save",
    "apply": "core.transform", "list_transforms": "core.transform",
    "explain": "arena.explanations", "Explanation": "arena.explanations",
    "FormariumError": "core.errors",
    "compare": "arena.compare", "train": "arena.train", "pretrain": "arena.pretrain",
    "replicate": "arena.replicate",
    "uncertainty": "arena.calibration", "fit_scaling_law": "arena.scaling", "frontier": "arena.scaling",
    "smoothness": "papers.objectives.bamboo", "iso_parameter": "papers.objectives.bamboo",
    "search": "papers.backbones.vit_resnas",
    "list_tasks": "tasks.registry", "get_task": "tasks.registry",
}

if TYPE_CHECKING:
    from .core.build import create_model, part, preset
    from .core.card import Card, Published
    from .core.ctx import Cache, Ctx, Place
    from .core.errors import FormariumError
    from .core.model import Feature, Model
    from .core.part import Part, Resample, Residual
    from .core.registry import add_module, card, list_models, list_parts
    from .core.spec import Spec, spec
    from .core.transform import apply, list_transforms
    from .weights.hub import from_pretrained
    from .weights.load import load
    from .weights.save import save

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'formarium' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
