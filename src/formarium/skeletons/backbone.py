"""Images to tokens, feature maps and logits: one stage (ViT) or several (pyramids)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.ctx import Ctx, Place
from ..core.errors import DoesNotFit
from ..core.model import Feature, FeatureInfo, Model
from ..core.part import Resample, Residual
from ..core.spec import Spec, spec
from ..parts.embed import pair, to_map
from ..parts.norm import LayerNorm
from ..weights.adapt import Change, refit_classifier
from .stack import Stack, Sublayers


class Stage(NamedTuple):
    """A stack to be built. resample: called as resample(dim of the stage before, dim)."""

    dim: int
    depth: int
    sublayers: Sublayers
    residual: Spec[Residual]
    resample: Spec[Resample] | None = None


class Backbone(Model):
    """embed -> stages -> norm -> pool -> head.

    embed: a Resample with `in_chans` and `step`, the pixels between two tokens. img_size: what it is built for.
    pool: "token" takes the first token, "mean" the mean over the grid. num_classes: 0 gives the pooled features.
    pool_first: pool before the final norm, not after.
    """

    pipeline = "image-classification"
    adapts = ("num_classes",)

    def __init__(self, embed: Resample, stages: Sequence[Stage], *, img_size: int | Sequence[int],
                 norm: Spec[nn.Module] = spec(LayerNorm), num_classes: int = 1000, pool: str = "mean",
                 pool_first: bool = False) -> None:
        super().__init__()
        if pool not in ("token", "mean"):
            raise DoesNotFit(f"pool is 'token' or 'mean', not {pool!r}")
        self.embedding, self.pool, self.pool_first = embed, pool, pool_first
        self.img_size = pair(img_size)
        depth = sum(s.depth for s in stages)
        built, layer, before = [], 0, 0
        for i, s in enumerate(stages):
            resample = None if s.resample is None else s.resample(before, s.dim)
            place = Place(layer=layer, depth=depth, stage=i, stages=len(stages))
            built.append(Stack(s.dim, s.depth, s.sublayers, s.residual, place=place, resample=resample))
            layer, before = layer + s.depth, s.dim
        self.stages = nn.ModuleList(built)
        self.num_features = before
        self.norm = norm(before)
        self.head: nn.Module
        self.reset_classifier(num_classes)

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Float[Tensor, "b c h w"]:
        return torch.randn(batch, *(shape or (self.embedding.in_chans, *self.img_size)))  # type: ignore[misc]

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear head for `num_classes` classes; 0: none, the model answers with the pooled features."""
        if num_classes < 0:
            raise DoesNotFit(f"num_classes is 0 (features) or more, not {num_classes}")
        self.num_classes = num_classes
        old = next(self.norm.parameters(), None)
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head if old is None else head.to(old.device, old.dtype)

    def refit(self, name: str, tensor: Tensor | None, was: "Backbone") -> Change | None:
        return refit_classifier(self, name, was)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Channels and stride of each map that `features` gives, shallow to deep."""
        strides = [self.embedding.step[0]]  # type: ignore[index]
        for stage in list(self.stages)[1:]:
            strides.append(strides[-1] * (stage.resample.step[0] if stage.resample else 1))  # type: ignore
        if len(self.stages) > 1:
            return [FeatureInfo(s.dim, stride) for s, stride in zip(self.stages, strides, strict=True)]  # type: ignore
        return [FeatureInfo(self.num_features, strides[0])] * len(self._taps())

    def _taps(self) -> list[int]:
        """Layers of a single stage whose maps are given: four, evenly spaced, the last among them."""
        depth: int = self.stages[0].depth  # type: ignore[assignment]
        return sorted({max(0, round(depth * i / 4) - 1) for i in (1, 2, 3, 4)})

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        """Feature maps (B, C, H', W') with strides: one a stage, or four layers of a single-stage model."""
        x, ctx = self.embed(batch)
        maps = []
        for stage in self.stages:
            taps = self._taps() if len(self.stages) == 1 else [stage.depth - 1]
            x, ctx, seen = stage.intermediates(x, ctx, taps)  # type: ignore[operator]
            maps += [to_map(t, ctx.need_grid(self, prefix=True), ctx.prefix) for t in seen]
        return [Feature(m, info.stride) for m, info in zip(maps, self.feature_info, strict=True)]

    def embed(self, batch: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        return self.embedding(batch, Ctx())

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        """Through all stages, and the final norm."""
        for stage in self.stages:
            x, ctx = stage(x, ctx)
        return (x if self.pool_first else self.norm(x)), ctx

    def forward_features(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """The last tokens, class token included."""
        return self.encode(*self.embed(batch))[0]

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.pooled(*self.encode(*self.embed(batch)))
        return self.head(self.norm(x) if self.pool_first else x)

    def pooled(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        """One vector of the last tokens, for the classifier."""
        return x[:, 0] if self.pool == "token" else x[:, ctx.prefix:].mean(1)
