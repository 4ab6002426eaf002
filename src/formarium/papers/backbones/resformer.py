"""ResFormer: Scaling ViTs with Multi-Resolution Training (Tian et al., CVPR 2023), arXiv 2212.00776.

New: each image is seen at several resolutions in one step, and what the model makes of a smaller one follows what it makes
of the next larger one (scale consistency, Eq. 3 and 4). Positions are made for the grid at hand, so that any resolution can
be taken: sines and cosines of the normalised place through a depth-wise convolution, added to the patches once (global,
Eq. 6), and in each attention a depth-wise convolution of the values, shared by the heads, added to what they give (local,
Eq. 7).

    fm.train("resformer/nano", "cifar10", objective="resformer")     # or under it any backbone that takes any size

Decisions: as in the authors' code, the teacher's features are normed without gain (smooth L1), each resolution's teacher is
the one before it and gets no gradient, and the sum is divided by the number of resolutions. Ours: the replicas are one
augmented image, resized (bicubic, antialiased), where their loader may augment each anew (`--sep-aug`); sides are rounded
to whole patches. Their code takes square images, ours any; sides that are no multiple of the patch get zeros. The class
token has neither position.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition, seat
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.objective import Supervised
from ...weights.keys import Assumed, State, count, keymap, rule, told_ratio
from .vit import OURS, plain_rules

CARD = Card(
    title="ResFormer: Scaling ViTs with Multi-Resolution Training",
    authors="Rui Tian, Zuxuan Wu, Qi Dai, Han Hu, Yu Qiao, Yu-Gang Jiang",
    venue="CVPR 2023",
    arxiv="2212.00776",
    year=2023,
    code="https://github.com/ruitian12/resformer",
    licence="MIT (code)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "multi-resolution", "positions"),
    claim="Trained at 128, 160 and 224 pixels, ResFormer-B has 75.86 % ImageNet top-1 at 96 pixels and 81.72 % at 640, 48 "
          "and 7.49 points more than DeiT-B.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=5.69e6, input=(3, 224, 224),
                          results={"ImageNet top-1": 73.85, "ImageNet top-1 (96 px)": 61.40,
                                   "ImageNet top-1 (384 px)": 75.04, "ImageNet top-1 (512 px)": 73.77},
                          note="parameters counted in the authors' model"),
        "small": Published(params=22.0e6, input=(3, 224, 224),
                           results={"ImageNet top-1": 82.16, "ImageNet top-1 (96 px)": 73.59,
                                    "ImageNet top-1 (384 px)": 82.72, "ImageNet top-1 (512 px)": 82.00},
                           note="trained at 128, 224 and 384 pixels instead: 82.28, 72.92, 83.70 and 83.86"),
        "base": Published(input=(3, 224, 224),
                          results={"ImageNet top-1": 82.72, "ImageNet top-1 (96 px)": 75.86,
                                   "ImageNet top-1 (384 px)": 83.29, "ImageNet top-1 (512 px)": 82.63}),
    },
    can=("any_size",),
    exceptions={"every_parameter_learns": "the last layer's local position reaches the patches alone, and the class token "
                                          "is classified"},
)


class Depthwise(nn.Conv2d):
    """3x3, each channel on its own, the grid kept."""

    undecayed = ("weight",)

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)


def sines(dim: int, grid: tuple[int, ...], like: Tensor) -> Float[Tensor, "1 c h w"]:
    """Of the row, then of the column: places 1 to n as shares of 2 pi, sines at even and cosines at odd channels."""
    half = dim // 2
    rates = 10000.0 ** (2 * (torch.arange(half, device=like.device) // 2) / half)
    maps = []
    for axis, n in enumerate(grid):
        places = torch.arange(1, n + 1, device=like.device) / (n + 1e-6) * 2 * math.pi
        angles = places[:, None] / rates
        line = torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1).t()
        maps.append((line[:, :, None] if axis == 0 else line[:, None]).expand(-1, *grid))
    return torch.cat(maps)[None].to(like.dtype)


class GlobalPosition(AbsolutePosition):
    """Sines of the grid at hand through a depth-wise convolution (Eq. 6); tokens before the grid get none."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__(dim, tokens)
        if dim % 4:
            raise DoesNotFit(f"sines and cosines of two axes need a width that 4 divides, got {dim}")
        self.conv = Depthwise(dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        grid = ctx.need_grid(self, prefix=True)
        return x + F.pad(to_tokens(self.conv(sines(self.dim, grid, x))), (0, 0, ctx.prefix, 0))


class LocalAttention(Attention):
    """Softmax attention, to whose heads a depth-wise convolution of their values is added (Eq. 7), zero at the start."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True) -> None:
        super().__init__(dim, place, heads=heads, bias=bias)
        self.local = Depthwise(dim // heads)
        nn.init.zeros_(self.local.weight)
        nn.init.zeros_(self.local.bias)

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        grid = ctx.need_grid(self, prefix=True)
        maps = v[:, :, ctx.prefix:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        local = self.local(maps).flatten(2).transpose(1, 2).unflatten(0, v.shape[:2])
        return super().mix(q, k, v, ctx) + F.pad(local, (0, 0, ctx.prefix, 0))


class ResFormer(Backbone):
    """images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    img_size: what examples are made of; nothing depends on it. mixer: with another, positions are global alone.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 16, in_chans: int = 3, num_classes: int = 1000,
                 dim: int = 192, depth: int = 12, heads: int = 3, drop_path: float = 0.0, pool: str = "token",
                 mixer: Spec[Part] = spec(LocalAttention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(GlobalPosition)) -> None:
        mixer, position = seat(position, mixer.offer(heads=heads))
        embed = PatchEmbed(in_chans, dim, patch=patch, class_token=pool == "token", position=position, pad=True)
        stage = Stage(dim, depth, {"mixer": mixer, "channel": channel}, residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes, pool=pool)


TARGETS = ("features", "mean", "logits")
KINDS = ("smooth_l1", "l2", "cosine", "soft")


class MultiResolution(Supervised):
    """images, targets -> the mean over resolutions of the cross-entropy, and from the second on alpha * the distance from
    the one before.

    scales: of the images' sides, largest first (224, 160 and 128 pixels of 224). target: what is to be consistent: the
    pooled "features" that the classifier reads, the "mean" of the patches, or the "logits". kind: "smooth_l1" to the
    teacher's normed features, "l2", "cosine", or the "soft" cross-entropy's divergence. alpha=0: no consistency. Numbers:
    loss_N, the cross-entropy at side N; consistency.
    """

    def __init__(self, model: Model, *, scales: tuple[float, ...] = (1.0, 5 / 7, 4 / 7), target: str = "features",
                 kind: str = "smooth_l1", alpha: float = 1.0) -> None:
        super().__init__(model)
        if target not in TARGETS:
            raise unknown("target of resformer", target, TARGETS)
        if kind not in KINDS:
            raise unknown("kind of resformer", kind, KINDS)
        if not scales or min(scales) <= 0 or list(scales) != sorted(scales, reverse=True) or alpha < 0:
            raise DoesNotFit(f"expected scales above 0, the largest first, and alpha >= 0, got {scales} and {alpha}")
        if not isinstance(model, Backbone) or type(model).forward is not Backbone.forward:
            raise DoesNotFit(f"resformer needs a backbone with one classifier; {type(model).__name__} is none")
        if getattr(model.embedding, "img_size", None) is not None:
            raise DoesNotFit(f"this {type(model).__name__} takes images of one size, as its positions are a table; "
                             "resformer needs a model that takes any, as resformer, swin or poolformer")
        self.scales, self.target, self.kind, self.alpha = scales, target, kind, alpha

    def sides(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sides of the replicas: whole patches, the image's own where the scale is 1."""
        step = self.model.embedding.step  # type: ignore[union-attr]

        def side(n: int, p: int, scale: float) -> int:
            return n if scale == 1 else max(p, round(n * scale / p) * p)

        return [(side(size[0], step[0], s), side(size[1], step[1], s)) for s in self.scales]

    def forward(self, inputs: Float[Tensor, "b c h w"], targets: Tensor) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        losses, numbers, apart, teacher = [], {}, [], None
        for size in self.sides((inputs.shape[2], inputs.shape[3])):
            images = inputs if size == inputs.shape[2:] else F.interpolate(inputs, size, mode="bicubic", antialias=True)
            seen, logits = self.look(images)
            losses.append(F.cross_entropy(logits, targets))
            numbers[f"loss_{size[0]}"] = losses[-1].detach()
            if teacher is not None and self.alpha:
                apart.append(self.distance(seen, teacher))
            teacher = seen.detach()
        consistency = torch.stack(apart).sum() if apart else losses[0].new_zeros(())
        loss = (torch.stack(losses).sum() + self.alpha * consistency) / len(losses)
        return loss, numbers | {"consistency": consistency.detach()}

    def look(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """What is to be consistent, and the logits."""
        model: Backbone = self.model  # type: ignore[assignment]
        x, ctx = model.encode(*model.embed(images))
        features = model.pooled(x, ctx)
        features = model.norm(features) if model.pool_first else features
        logits = model.head(features)
        return {"features": features, "mean": x[:, ctx.prefix:].mean(1), "logits": logits}[self.target], logits

    def distance(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:], eps=1e-6))
        if self.kind == "l2":
            return F.mse_loss(student, teacher)
        if self.kind == "cosine":
            return 1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-6).mean()
        return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


OBJECTIVE = spec(MultiResolution)

PRESETS = {
    "nano": spec(ResFormer, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "tiny": spec(ResFormer, dim=192, heads=3),
    "small": spec(ResFormer, dim=384, heads=6),
    "base": spec(ResFormer, dim=768, heads=12),
}

KEYS = {
    "authors": keymap(
        rule("pos_embed.embed_layer.*", "embedding.position.conv.*"),
        rule("blocks.{i}.attn.get_v.*", f"{OURS}.mixer.inner.local.*"),
        *[r for r in plain_rules() if r.theirs[0] not in ("pos_embed", "reg_token") and not r.theirs[0].endswith("gamma")],
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the image size, on which nothing depends; the heads are told by the width of the local convolution."""
    dim, in_chans, patch, _ = state["embedding.proj.weight"].shape
    hidden = state["stages.0.layers.0.channel.inner.fc1.weight"].shape[0]
    return {
        "dim": dim, "in_chans": in_chans, "patch": patch, "depth": count(state, f"{OURS}.mixer.norm.weight"),
        "heads": dim // state["stages.0.layers.0.mixer.inner.local.weight"].shape[0],
        "img_size": Assumed(14 * patch, "leaves no trace; all sizes work"),
        "pool": "token" if "embedding.cls" in state else "mean",
        "channel": spec(Mlp) if hidden == 4 * dim else spec(Mlp, ratio=told_ratio(hidden, dim)),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
