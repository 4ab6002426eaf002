"""Images to regions: dense logits of classes, or a set of masks with a class each; read as semantic or panoptic maps."""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.build import preset
from ..core.errors import DoesNotFit
from ..core.model import Feature, Model
from ..core.spec import Spec
from ..parts.channel import linear
from ..parts.embed import check_images, pair
from ..parts.norm import LayerNorm, NoNorm
from ..weights.adapt import Change, refit_classifier
from .backbone import Backbone

VOID = 255  # of pixels without a label


class Regions(NamedTuple):
    """Q regions an image: logits of K classes and, last, of "no region"; logits of the masks, softmax over the regions."""

    classes: Float[Tensor, "b q k+1"]
    masks: Float[Tensor, "b q h w"]


class Thresholds(NamedTuple):
    """What a region must pass to be a segment. thing, stuff: probability of its class; pixel: of the mask, for each pixel;
    overlap: share of its pixels that no better region has. The best comes first, by class * mask probability**power."""

    thing: float = 0.7
    stuff: float = 0.5
    pixel: float = 0.4
    overlap: float = 0.8
    power: float = 1.0


class Segmenter(Model):
    """images (B, in_chans, H, W) -> `Regions`, or dense logits (B, classes, h, w) if `queries` is None.

    h, w: H, W by `stride`, rounded up. things: the classes whose instances are segments of their own; the others are stuff,
    one segment a class and image. Pixels may be VOID in the truth: they count for nothing.
    """

    pipeline = "image-segmentation"
    stride: int
    queries: int | None = None

    def __init__(self, *, img_size: int | Sequence[int], in_chans: int, num_classes: int, things: tuple[int, ...] = (),
                 thresholds: tuple[float, ...] = Thresholds()) -> None:
        super().__init__()
        if not 1 <= num_classes < VOID:
            raise DoesNotFit(f"num_classes is 1 to {VOID - 1}, got {num_classes}")
        if any(not 0 <= t < num_classes for t in things):
            raise DoesNotFit(f"things are classes from 0 to {num_classes - 1}, got {things}")
        self.img_size, self.in_chans, self.num_classes = pair(img_size), in_chans, num_classes
        self.things, self.thresholds = tuple(things), Thresholds(*thresholds)

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Float[Tensor, "b c h w"]:
        return torch.randn(batch, *(shape or (self.in_chans, *self.img_size)))

    def forward(self, batch: Float[Tensor, "b c h w"], *, supervised: bool = False) -> Any:
        """supervised: the answer that `criterion` takes, with what only training asks for."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def criterion(self, answer: Any, truth: Int[Tensor, "b 2 h w"]) -> Tensor:
        """How far a supervised answer is from the truth (classes and numbers of segments, VOID where unknown), a scalar.

        Here: cross-entropy of the pixels' classes.
        """
        logits = resize(answer, truth.shape[2:], truth.shape[3])
        known = (truth[:, 0] != VOID).sum().clamp_min(1)  # none: 0, not NaN
        return F.cross_entropy(logits, truth[:, 0], ignore_index=VOID, reduction="sum") / known

    def _upsampled(self, batch: Float[Tensor, "b c h w"]) -> Any:
        answer, size = self(batch), batch.shape[2:]
        if isinstance(answer, Regions):
            return answer.classes.softmax(-1)[..., :-1], resize(answer.masks, size, size[1]).softmax(1)
        return resize(answer, size, size[1]).softmax(1)

    def semantic(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Probabilities of the classes at each pixel; together less than 1 where the model sees no region."""
        return self._semantic(self._upsampled(batch))

    def panoptic(self, batch: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, "b h w"], list[list[int]]]:
        """Segments 1, 2, ... of each image, 0 where there is none; and for each image the classes of its segments in order.

        Regions pass the thresholds one after the other; stuff of a class is one segment. Dense logits: the segments are
        the pixels whose likeliest class it is, of things each connected part (4 neighbours; needs SciPy).
        """
        return self._panoptic(self._upsampled(batch))

    def both(self, batch: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k h w"], Any]:
        """What `semantic` and what `panoptic` gives, at the cost of one forward pass."""
        found = self._upsampled(batch)
        return self._semantic(found), self._panoptic(found)

    def _semantic(self, found: Any) -> Float[Tensor, "b k h w"]:
        return torch.einsum("bqk,bqhw->bkhw", *found) if isinstance(found, tuple) else found

    def _panoptic(self, found: Any) -> tuple[Int[Tensor, "b h w"], list[list[int]]]:
        if not isinstance(found, tuple):
            each = [_connected(image, self.things) for image in found.argmax(1)]
        else:
            each = [_merge(scores, masks, self.things, self.thresholds) for scores, masks in zip(*found, strict=True)]
        return torch.stack([segments for segments, _ in each]), [classes for _, classes in each]


def resize(x: Float[Tensor, "b c h w"], size: Sequence[int], side: int | None = None) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear. An odd `side` (the width of x unless given) aligns the corners: sizes are then multiples, and one."""
    corners = (x.shape[-1] if side is None else side) % 2 == 1
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=corners)


def _merge(scores: Float[Tensor, "q k"], masks: Float[Tensor, "q h w"], things: tuple[int, ...],
           least: Thresholds) -> tuple[Int[Tensor, "h w"], list[int]]:
    score, label = scores.max(-1)
    inside = masks > least.pixel
    area = inside.flatten(1).sum(1)
    confidence = (masks * inside).flatten(1).sum(1) / area.clamp_min(1)
    segments, classes = torch.zeros_like(inside[0], dtype=torch.int64), []
    of_stuff: dict[int, int] = {}
    for i in (score * confidence**least.power).argsort(descending=True).tolist():
        k = int(label[i])
        thing = k in things
        free = inside[i] & (segments == 0)
        if score[i] <= (least.thing if thing else least.stuff) or free.sum() <= area[i] * least.overlap:
            continue
        if thing or k not in of_stuff:
            classes.append(k)
            of_stuff[k] = len(classes)
        segments[free] = len(classes) if thing else of_stuff[k]
    return segments, classes


def _connected(labels: Int[Tensor, "h w"], things: tuple[int, ...]) -> tuple[Int[Tensor, "h w"], list[int]]:
    segments, classes = torch.zeros_like(labels), list[int]()
    for k in labels.unique().tolist():
        own = labels == k
        parts, count = own.long(), 1
        if k in things:
            from scipy.ndimage import label

            numbers, count = label(own.cpu().numpy())
            parts = torch.from_numpy(numbers).to(labels)
        segments += torch.where(own, parts + len(classes), 0)
        classes += [k] * count
    return segments, classes


def build_trunk(backbone: Spec[Any] | str, img_size: tuple[int, int], in_chans: int) -> Any:
    """A network with `features` and `feature_info`: a Spec, or the name of a preset of the house, without its head."""
    if isinstance(backbone, str):
        backbone = preset(backbone)
    wanted = {"img_size": img_size, "in_chans": in_chans, "num_classes": 0}
    trunk = backbone.but(**{k: v for k, v in wanted.items() if backbone.takes(k)})()
    if not hasattr(trunk, "features"):
        raise DoesNotFit(f"{backbone.name} does not fit here: a segmenter reads the feature maps of a backbone, "
                         "and it has none")
    if isinstance(trunk, Backbone):
        trunk.norm = NoNorm(trunk.num_features)  # the maps are read before it
    return trunk


class LinearSegmenter(Segmenter):
    """The plain baseline: a linear layer on the normed maps of a backbone, at the finest one's size, gives dense logits."""

    adapts = ("num_classes",)

    def __init__(self, *, img_size: int | Sequence[int] = 32, in_chans: int = 3, num_classes: int = 11,
                 things: tuple[int, ...] = (), backbone: Spec[Any] | str = "swin/nano") -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, num_classes=num_classes, things=things)
        self.trunk = build_trunk(backbone, self.img_size, in_chans)
        self.stride = self.trunk.feature_info[0].stride
        channels = [info.channels for info in self.trunk.feature_info]
        self.norms = nn.ModuleList(LayerNorm(c) for c in channels)
        self.heads = nn.ModuleList(linear(c, num_classes, bias=i == 0) for i, c in enumerate(channels))

    def refit(self, name: str, tensor: Tensor | None, was: "LinearSegmenter") -> Change | None:
        return refit_classifier(self, name, was, "heads")

    def forward(self, batch: Float[Tensor, "b c h w"], *, supervised: bool = False) -> Float[Tensor, "b k h w"]:
        check_images(batch, self.in_chans)
        maps: list[Feature] = self.trunk.features(batch)
        size = maps[0].map.shape[2:]
        logits = [head(norm(f.map.movedim(1, -1))).movedim(-1, 1)
                  for f, norm, head in zip(maps, self.norms, self.heads, strict=True)]
        return torch.stack([resize(x, size) for x in logits]).sum(0)


def cells(size: Sequence[int], stride: int) -> tuple[int, ...]:
    """Cells of a map of an image of this size."""
    return tuple(ceil(s / stride) for s in size)
