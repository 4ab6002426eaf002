"""Does a classifier know when it is wrong, and when an image is of nothing that it was trained on?

    uncertainty(model, get_task("mnist5k"), get_task("cifar10")) -> {"accuracy", "nll", "ece", "auroc", "aupr"}
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import BadData, unknown
from ..core.model import Model
from ..tasks.base import SPLITS, evaluating
from ..tasks.classify import Classify

SCORES = ("max_probability", "entropy")


def expected_calibration_error(probabilities: Float[Tensor, "n k"], labels: Int[Tensor, "n"], *, bins: int = 15) -> float:
    """ECE (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599): |accuracy - confidence| by bins of equal width of the
    confidence, open on the left, weighted by their samples; 0 to 1."""
    confidence, predicted = _checked(probabilities, labels).max(1)
    excess = confidence - (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, place, excess).abs().sum().item() / len(labels)


def negative_log_likelihood(probabilities: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """NLL of the true classes, in nats: the mean of -log p."""
    true = _checked(probabilities, labels).gather(1, labels[:, None])
    return -true.clamp_min(torch.finfo(torch.float64).tiny).log().mean().item()


def auroc(inside: Float[Tensor, "n"], outside: Float[Tensor, "m"]) -> float:
    """The area under the ROC curve: how often a score of `outside` is above one of `inside`; ties count half."""
    _, at, counts = _pooled(inside, outside).unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[at]  # from 1; the mean rank of those that are equal
    n, m = len(inside), len(outside)
    return ((ranks[n:].sum() - m * (m + 1) / 2) / (n * m)).item()


def aupr(inside: Float[Tensor, "n"], outside: Float[Tensor, "m"]) -> float:
    """The average precision of finding `outside` by its higher scores; chance is m / (n + m)."""
    values, at = _pooled(inside, outside).unique(return_inverse=True)
    counts = torch.zeros(2, len(values), dtype=torch.float64)
    counts[0].index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
    counts[1].index_add_(0, at[len(inside):], torch.ones(len(outside), dtype=torch.float64))
    found = counts.flip(1).cumsum(1)  # at thresholds from the highest score down: all, and those of outside
    return (found[1] / found[0] * counts[1].flip(0)).sum().item() / len(outside)


def _checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    found = probabilities.double()
    one = found.new_ones(())
    if len(labels) == 0 or found.shape[:1] != labels.shape or not torch.allclose(found.sum(1), one, atol=1e-3):
        raise BadData("expected probabilities (N, classes), rows that sum to 1, and N > 0 labels; got "
                      f"{tuple(found.shape)} and {tuple(labels.shape)}")
    return found


def _pooled(inside: Tensor, outside: Tensor) -> Tensor:
    if not (inside.ndim == outside.ndim == 1 and len(inside) and len(outside)):
        raise BadData("expected scores (N,) and (M,), one or more each, got "
                      f"{tuple(inside.shape)} and {tuple(outside.shape)}")
    pooled = torch.cat((inside.double(), outside.double()))
    if pooled.isnan().any():
        raise BadData("scores are not numbers")
    return pooled


def uncertainty(model: Model, inside: Classify, outside: Classify | None = None, split: str = "test", *, bins: int = 15,
                score: str = "max_probability", batch_size: int = 256) -> dict[str, float]:
    """accuracy, nll and ece of a split of `inside`; auroc and aupr of telling that of `outside` from it.

    outside: images of another task, brought to the channels, size and normalisation of `inside`. score: "max_probability",
    one less the highest (Hendrycks and Gimpel 2017, arXiv 1610.02136), or "entropy", of the classes' probabilities.
    """
    if score not in SCORES:
        raise unknown("score of uncertainty", score, SCORES)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    with evaluating(model) as device:
        def probabilities(batches: Iterator[Tensor]) -> Tensor:
            return torch.cat([model(images.to(device)).cpu().double().softmax(1) for images in batches])

        known = probabilities(images for images, _ in inside.batches(split, batch_size))
        strange = None if outside is None else probabilities(
            inside.normalise(as_images_of(inside, pixels)) for pixels in outside.data.pixels[split].split(batch_size))
    labels = inside.data.labels[split][:len(known)]
    found = {"accuracy": (known.argmax(1) == labels).double().mean().item(),
             "nll": negative_log_likelihood(known, labels), "ece": expected_calibration_error(known, labels, bins=bins)}
    if strange is not None:
        scores = [1 - p.amax(1) if score == "max_probability" else torch.special.entr(p).sum(1) for p in (known, strange)]
        found |= {"auroc": auroc(*scores), "aupr": aupr(*scores)}
    return found


def as_images_of(task: Classify, pixels: Tensor) -> Tensor:
    """uint8 images (B, 1 or 3, H, W) with the channels and the size of a task's; colours become their mean."""
    _, channels, *size = task.data.pixels["train"].shape
    found = pixels.float()
    if found.shape[1] != channels:
        found = found.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if found.shape[2:] != tuple(size):
        found = F.interpolate(found, size=size, mode="bilinear", antialias=True)
    return found.round().clamp(0, 255).to(torch.uint8)
