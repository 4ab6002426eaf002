"""What every model of the house answers, whatever its domain."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from .ctx import Ctx
from .errors import DoesNotFit
from .hub import OnHub


class Feature(NamedTuple):
    """A feature map (B, C, H, W) and the pixels between two of its cells."""

    map: Float[Tensor, "b c h w"]
    stride: int


class FeatureInfo(NamedTuple):
    channels: int
    stride: int


class Trainable(nn.Module):
    """What training asks of a model, or of an objective around one."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations; the gradients are the same."""
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone beyond the vectors (norms, biases): tables, tokens."""
        return {f"{path}.{name}" if path else name
                for path, module in self.named_modules() for name in getattr(module, "undecayed", ())
                if isinstance(getattr(module, name), nn.Parameter)}

    def parameter_groups(self, weight_decay: float, head_weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Two groups for an optimizer: matrices with weight decay; vectors, tables and tokens without.

        head_weight_decay: of the matrices of `head`, a third group (arXiv 2106.04560, section 3.1).
        """
        spared = self.no_weight_decay()

        def decays(name: str, p: nn.Parameter) -> bool:
            return p.ndim > 1 and name not in spared

        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        groups: Iterable[tuple[bool, float]] = ((True, weight_decay), (False, 0.0))
        if head_weight_decay is None:
            return [{"params": [p for n, p in named if decays(n, p) is yes], "weight_decay": wd} for yes, wd in groups]
        head = [p for n, p in named if n.removeprefix("model.").startswith("head.") and decays(n, p)]  # in an objective too
        if not head:
            raise DoesNotFit(f"{type(self).__name__} has no classifier `head` here, which head_weight_decay= is for")
        rest = self.parameter_groups(weight_decay)
        rest[0]["params"] = [p for p in rest[0]["params"] if all(p is not h for h in head)]
        return [*rest, {"params": head, "weight_decay": head_weight_decay}]


class Model(Trainable, OnHub):
    """batch -> embed -> tokens, ctx -> encode -> tokens, ctx -> head -> answer.

    `recipe` says how the model was made ({"name", "changes"}); `create_model` writes it, files carry it.
    `save_pretrained`, `push_to_hub`, `from_pretrained` are those of huggingface_hub's mixin.
    """

    recipe: dict[str, Any]

    def embed(self, batch: Tensor) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define embed")

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        raise TypeError(f"{type(self).__name__} must define encode")

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Any:
        """What `forward` takes as its first argument, on the current default device: a tensor, or a tuple or list of them.

        shape: of one sample, else what the model is built for.
        """
        raise TypeError(f"{type(self).__name__} must define example")


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
