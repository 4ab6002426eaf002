"""Which part of the input made the answer? What an explanation is worth, and how it looks beside the picture."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checkpoint import write_atomically
from ..core.errors import BadData, DoesNotFit, FormariumError, unknown
from ..core.model import Model
from ..core.registry import systems
from ..core.spec import spec
from ..data.cache import need
from ..tasks.base import evaluating
from ..tasks.classify import Classify

STEPS = 10
Method = Callable[..., Tensor]


@dataclass(frozen=True)
class Explanation:
    """relevance of the patches, (B, H, W), or of the pixels, for the answer `target` (B); logits: the model's (B, K)."""

    relevance: Float[Tensor, "b h w"]
    target: Int[Tensor, "b"]
    logits: Float[Tensor, "b k"]
    method: str

    def upsampled(self, size: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """At the size of the image, bilinearly."""
        return F.interpolate(self.relevance[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def methods() -> dict[str, Method]:
    """Every method by name, from `METHODS` of the papers of the kind "explanation"."""
    return {name: f for e in systems().values() if e.card.kind == "explanation" for name, f in e.module.METHODS.items()}


def explain(model: Model, x: Float[Tensor, "b c h w"], target: int | Tensor | None = None, *,
            method: str = "transformer_attribution", **settings: Any) -> Explanation:
    """The relevance of each patch of the images x for class `target` (one for all, or one each; None: the predicted one).

    settings: those of the method. The model is not changed: a copy in double precision is asked, since rules that divide by
    activations lose single precision. Raises DoesNotFit for models that the method has no rules for.
    """
    known = methods()
    if method not in known:
        raise unknown("method", method, known)
    asked = spec(known[method], **settings)
    if not x.isfinite().all():
        raise BadData(f"{int((~x.isfinite()).sum())} values of the images are NaN or infinite")
    exact = copy.deepcopy(model).double().eval().requires_grad_(False)
    x = x.detach().double()
    with torch.no_grad():
        logits = exact(x)
    if logits.ndim != 2 or logits.shape[1] < 1 or not getattr(exact, "num_classes", 0):
        raise DoesNotFit(f"only a classifier can be explained; {type(model).__name__} answered {tuple(logits.shape)}")
    classes = logits.argmax(1) if target is None else torch.as_tensor(target, device=x.device).expand(len(x))
    if classes.is_floating_point() or classes.min() < 0 or classes.max() >= logits.shape[1]:
        raise DoesNotFit(f"target is a class from 0 to {logits.shape[1] - 1}, or one for each of {len(x)} images, "
                         f"got {target}")
    with torch.enable_grad():
        relevance = asked(exact, x, classes)
    return Explanation(relevance.detach().float(), classes, logits.float(), method)


def deletion(model: Model, images: Float[Tensor, "b c h w"], relevance: Float[Tensor, "b h w"], target: Int[Tensor, "b"],
             steps: int = STEPS) -> Float[Tensor, "b"]:
    """Mean probability of the target while its most relevant pixels become zero, tenth by tenth: lower is better.

    Relevance of patches is spread evenly over their pixels. Images are normalised, so zero is the mean.
    """
    return _curve(model, images, relevance, target, steps, keep=False)


def insertion(model: Model, images: Float[Tensor, "b c h w"], relevance: Float[Tensor, "b h w"], target: Int[Tensor, "b"],
              steps: int = STEPS) -> Float[Tensor, "b"]:
    """The same while they appear, from nothing: higher is better."""
    return _curve(model, images, relevance, target, steps, keep=True)


def _curve(model: Model, images: Tensor, relevance: Tensor, target: Tensor, steps: int, keep: bool) -> Tensor:
    b, _, h, w = images.shape
    if relevance.shape[0] != b or h % relevance.shape[1] or w % relevance.shape[2]:
        raise DoesNotFit(f"expected relevance of {b} images whose cells divide {h}x{w}, got {tuple(relevance.shape)}")
    spread = relevance.repeat_interleave(h // relevance.shape[1], 1).repeat_interleave(w // relevance.shape[2], 2)
    rank = spread.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    found = []
    with evaluating(model):
        for i in range(steps + 1):
            first = (rank < round(i / steps * h * w)).view(b, 1, h, w)
            found.append(model(images * (first == keep)).softmax(1).gather(1, target[:, None])[:, 0])
    return torch.stack(found).mean(0)


def explain_image(model: Model, image: Path, *, target: int | None = None, method: str = "transformer_attribution",
                  task: Classify | None = None) -> tuple[Explanation, Tensor]:
    """The explanation of an image file, and its pixels as the model saw them, uint8 (C, H, W).

    The picture is brought to the model's size and channels. Its values are normalised as `task` does, which the model was
    trained on; without one, to mean 0 and deviation 1 of the picture itself.
    """
    size, channels = getattr(model, "img_size", None), getattr(getattr(model, "embedding", None), "in_chans", None)
    if size is None or channels not in (1, 3):
        raise DoesNotFit(f"{type(model).__name__} does not take grey or colour images, so no picture can be explained")
    pixels = read_image(image, channels, size)
    if task is not None:
        options = task.model_options()
        if options["in_chans"] != channels or options["num_classes"] != getattr(model, "num_classes", None):
            theirs, mine = options["num_classes"], getattr(model, "num_classes", 0)
            raise DoesNotFit(f"{task.name} has {theirs} classes and {options['in_chans']} channels, the model {mine} and "
                             f"{channels}; name the task it was trained on")
        x = task.normalise(pixels[None])
    else:
        x = pixels[None].float()
        x = (x - x.mean()) / x.std().clamp(min=1e-6)
    return explain(model, x, target, method=method), pixels


def read_image(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W); BadData where the file is none that can be read."""
    image = need("PIL.Image", "pillow")
    import numpy as np

    try:
        with image.open(path) as picture:
            seen = picture.convert("L" if channels == 1 else "RGB").resize((size[1], size[0]), image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise BadData(f"there is no image {path}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadData(f"{path} cannot be read as an image ({error}); give a PNG or JPEG file") from None
    return torch.from_numpy(np.array(seen)).view(*size, channels).permute(2, 0, 1)


def overlay(pixels: Tensor, found: Explanation, path: Path, title: str) -> None:
    """Writes a PNG: the image, and the image under its relevance, which is scaled to its largest absolute value."""
    need("matplotlib", "matplotlib")
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise FormariumError(f"the picture is written as PNG; give a path that ends in .png, not {path.name}")
    picture = pixels.permute(1, 2, 0).squeeze(-1).numpy()
    heat = found.upsampled((pixels.shape[1], pixels.shape[2]))[0]
    reach = heat.abs().max().item() or 1.0
    figure = Figure((7, 3.7), dpi=140, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for ax, name in zip(figure.subplots(1, 2), ("what the model saw", found.method.replace("_", " ")), strict=True):
        ax.imshow(picture, cmap="gray" if pixels.shape[0] == 1 else None, interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    shown = ax.imshow(heat.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, alpha=0.6)
    figure.colorbar(shown, ax=ax, shrink=0.8, label="relevance")
    write_atomically(path, lambda name: figure.savefig(name, format="png"))
