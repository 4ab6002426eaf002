"""MetaFormer Is Actually What You Need for Vision (Yu et al., CVPR 2022), arXiv 2111.11418.

New: the frame of a Transformer, with any token mixer, is what works (MetaFormer, Eqs. 1 to 3); PoolFormer proves it with
average pooling less the input (Eq. 4, Algorithm 1). Norms are over all tokens and channels of a sample (group norm with
one group); branches are scaled by a learned factor a channel.

Decisions: tokens are (B, N, C) and 1x1 convolutions are linear layers. The authors norm, then pool for the classifier;
timm pools, then applies a layer norm to the same weights, another function: `pool_first`, which files in timm's layout get.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Identity
from ...parts.channel import Mlp, restart_linears
from ...parts.embed import ConvEmbed, to_map, to_tokens
from ...parts.norm import GroupNorm, LayerNorm
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import LINEAR_AS_CONV, SAME, Assumed, State, count, keymap, rule

CARD = Card(
    title="MetaFormer Is Actually What You Need for Vision",
    authors="Weihao Yu, Mi Luo, Pan Zhou, Chenyang Si, Yichen Zhou, Xinchao Wang, Jiashi Feng, Shuicheng Yan",
    venue="CVPR 2022",
    arxiv="2111.11418",
    year=2022,
    code="https://github.com/sail-sg/poolformer",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("pooling", "pyramid", "MetaFormer", "host"),
    claim="With plain pooling as its mixer, a MetaFormer reaches 82.1 % ImageNet top-1 and beats DeiT-B with 35 % fewer "
          "parameters and 50 % fewer MACs: the frame matters more than the mixer.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "s12": Published(params=11.92e6, macs=1.82e9, input=(3, 224, 224), results={"ImageNet top-1": 77.2}),
        "s24": Published(params=21.39e6, macs=3.40e9, input=(3, 224, 224), results={"ImageNet top-1": 80.3}),
        "s36": Published(params=30.86e6, macs=4.99e9, input=(3, 224, 224), results={"ImageNet top-1": 81.4}),
        "m36": Published(params=56.17e6, macs=8.78e9, input=(3, 224, 224), results={"ImageNet top-1": 82.1}),
        "m48": Published(params=73.47e6, macs=11.56e9, input=(3, 224, 224), results={"ImageNet top-1": 82.5}),
        "id_s12": Published(params=11.92e6, macs=1.82e9, input=(3, 224, 224), results={"ImageNet top-1": 74.3},
                            note="the identity as mixer (table 5)"),
    },
    can=("any_size",),
)

PARTS = {
    "mixer": {"pooling": "Pooling"},
}


class Pooling(Part):
    """The mean of the neighbours, less the token itself (Eq. 4); cells outside the image do not count."""

    def __init__(self, dim: int, place: Place, *, size: int = 3) -> None:
        super().__init__(dim, place)
        if size % 2 == 0:
            raise DoesNotFit(f"the pooling window must be odd to keep the grid, got {size}")
        self.size = size

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        grid = to_map(x.contiguous(), ctx.need_grid(self))  # channels-last, where pooling is several times faster
        pooled = F.avg_pool2d(grid, self.size, 1, self.size // 2, count_include_pad=False)
        return to_tokens(pooled) - x


class MetaFormer(Backbone):
    """images (B, in_chans, H, W) of any size -> logits (B, num_classes). Four stages, each with its token mixer.

    init_std: of the linear layers, the authors' 0.02; None: Xavier, which small widths need.
    mixers: one name or Spec for all stages, or one each, e.g. ("pooling", "pooling", "attention", "attention").
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, ...] = (64, 128, 320, 512), depths: tuple[int, ...] = (2, 2, 6, 2),
                 mixers: Spec[Part] | tuple[Spec[Part], ...] = spec(Pooling), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(GroupNorm), residual: Spec[Residual] = spec(PreNorm),
                 layer_scale: float = 1e-5, stride: int = 4, drop_path: float = 0.0, pool_first: bool = False,
                 init_std: float | None = 0.02) -> None:
        each = (mixers,) * len(dims) if isinstance(mixers, Spec) else mixers
        if not len(each) == len(depths) == len(dims):
            raise DoesNotFit(f"{len(dims)} stages (dims) need as many depths and mixers, got {len(depths)} and {len(each)}")
        residual = residual.offer(norm=norm, drop_path=drop_path, layer_scale=layer_scale)
        stages = [Stage(d, n, {"mixer": m.offer(heads=max(1, d // 32)), "channel": channel}, residual,
                        spec(ConvEmbed) if i else None)
                  for i, (d, n, m) in enumerate(zip(dims, depths, each, strict=True))]
        stem = ConvEmbed(in_chans, dims[0], kernel=2 * stride - 1, stride=stride, padding=stride // 2)
        super().__init__(stem, stages, img_size=img_size, norm=spec(LayerNorm) if pool_first else norm,
                         num_classes=num_classes, pool_first=pool_first)
        restart_linears(self, init_std)
        start_residuals(self)


PRESETS = {
    "nano": spec(MetaFormer, dims=(48, 96), depths=(2, 2), stride=2, layer_scale=1.0, img_size=28, init_std=None),
    "s12": spec(MetaFormer),
    "s24": spec(MetaFormer, depths=(4, 4, 12, 4)),
    "s36": spec(MetaFormer, depths=(6, 6, 18, 6), layer_scale=1e-6),
    "m36": spec(MetaFormer, depths=(6, 6, 18, 6), dims=(96, 192, 384, 768), layer_scale=1e-6),
    "m48": spec(MetaFormer, depths=(8, 8, 24, 8), dims=(96, 192, 384, 768), layer_scale=1e-6),
    "id_s12": spec(MetaFormer, mixers=spec(Identity)),
}


def _stage(theirs: str, ours: str, scale: str) -> list[Any]:
    return [
        rule(f"{theirs}.norm1.*", f"{ours}.mixer.norm.*"),
        rule(f"{theirs}.{scale.format(1)}", f"{ours}.mixer.scale"),
        rule(f"{theirs}.norm2.*", f"{ours}.channel.norm.*"),
        rule(f"{theirs}.mlp.fc1.weight", f"{ours}.channel.inner.fc1.weight", LINEAR_AS_CONV),
        rule(f"{theirs}.mlp.fc2.weight", f"{ours}.channel.inner.fc2.weight", LINEAR_AS_CONV),
        rule(f"{theirs}.mlp.*", f"{ours}.channel.inner.*"),
        rule(f"{theirs}.{scale.format(2)}", f"{ours}.channel.scale"),
    ]


def _transformers(before: str) -> list[Any]:
    theirs, ours = f"{before}encoder.block.{{s}}.{{i}}", "stages.{s}.layers.{i}"
    return [rule(f"{before}encoder.patch_embeddings.0.projection.*", "embedding.proj.*"),
            rule(f"{before}encoder.patch_embeddings.{{s}}.projection.*", "stages.{s}.resample.proj.*"),
            rule(f"{theirs}.before_norm.*", f"{ours}.mixer.norm.*"),
            rule(f"{theirs}.layer_scale_1", f"{ours}.mixer.scale"),
            rule(f"{theirs}.after_norm.*", f"{ours}.channel.norm.*"),
            *[rule(f"{theirs}.output.conv{n}.{kind}", f"{ours}.channel.inner.fc{n}.{kind}", op)
              for n in (1, 2) for kind, op in (("weight", LINEAR_AS_CONV), ("bias", SAME))],
            rule(f"{theirs}.layer_scale_2", f"{ours}.channel.scale")]


KEYS = {
    "timm": keymap(
        rule("stem.conv.*", "embedding.proj.*"),
        rule("stages.{s}.downsample.conv.*", "stages.{s}.resample.proj.*"),
        *_stage("stages.{s}.blocks.{i}", "stages.{s}.layers.{i}", "layer_scale{}.scale"),
        rule("head.norm.*", "norm.*"),
        rule("head.fc.*", "head.*"),
    ),
    "authors": keymap(
        rule("patch_embed.proj.*", "embedding.proj.*"),
        *[r for s in range(4) for r in _stage(f"network.{2 * s}.{{i}}", f"stages.{s}.layers.{{i}}", "layer_scale_{}")],
        *[rule(f"network.{2 * s - 1}.proj.*", f"stages.{s}.resample.proj.*") for s in range(1, 4)],
        rule("norm.*", "norm.*"),
        rule("head.*", "head.*"),
    ),
    "transformers": keymap(*_transformers("poolformer."), *_transformers(""), rule("norm.*", "norm.*"),
                           rule("classifier.*", "head.*")),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the image size, the start of the scales, mixers without parameters, and where timm's norm stands."""
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    return {
        "dims": tuple(state[f"stages.{s}.layers.0.mixer.norm.weight"].shape[0] for s in stages),
        "depths": tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages),
        "in_chans": state["embedding.proj.weight"].shape[1],
        "stride": (state["embedding.proj.weight"].shape[-1] + 1) // 2,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "mixers": Assumed(spec(Pooling), "pooling has no parameters, nor has the identity"),
        "pool_first": layout == "timm",
    }
