"""DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer (Tang et al., MIDL
2025), arXiv 2506.12982.

New: the cells of a convolutional network's last map are regions of the image. A region's tokens are its cells in the maps
of several stages, 1 + 4 + 16 + 64 of them, each projected to one width (multi-scale patch tokenisation). A scale token
stands before them; with positions that all regions share, they attend within their region (local, scale attention). Then
the scale tokens of all regions and a class token attend to each other (global, patch attention).

Decisions, as the authors' code has it: tokens stand coarse before fine, those of the second-coarsest scale by columns, the
others by rows. Of `patch_blocks`, "bare" is attention alone, without norm, skip or MLP, and the class token goes to
the classifier without the norm that the code computes and drops; "pre_norm" are the usual layers and that norm. The scale
token is one learned vector ("random") or made from all stages by convolutions ("channel"). The code's ResNet-18 cannot run
(it expects other widths than the network has): here it is as ResNet-50. `freeze` also keeps the network's batch norms as
they are. Any network with `features()` whose maps are multiples of the last one serves as `backbone`, a Spec or a name.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit, unknown
from ...core.model import Feature, FeatureInfo
from ...core.part import Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.embed import check_images, check_multiple, pair, to_map
from ...parts.norm import BatchNorm, LayerNorm, NoNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...parts.resnet import ResNet, torchvision_rules
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.segmenter import build_trunk
from ...weights.keys import Assumed, State, as_preset, count, drop, keymap, rule, told_ratio

CARD = Card(
    title="DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer",
    authors="Xiaoya Tang, Bodong Zhang, Man Minh Ho, Beatrice S. Knudsen, Tolga Tasdizen",
    venue="MIDL 2025",
    arxiv="2506.12982",
    year=2025,
    code="https://github.com/xiaoyatang/duoformer_TCGA",
    licence="none stated for code or weights",
    kind="backbone",
    domain="image",
    tags=("attention", "hybrid", "multi-scale", "medical"),
    claim="Attention among the scales of a region, then among regions, classifies medical images better than the ResNet it "
          "stands on and than ViT hybrids on the same network.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "r50_4": Published(note="86 tokens a region; sizes of the authors' code, which publishes no counts"),
        "r50_3": Published(note="22 tokens a region"),
        "r50_2": Published(note="6 tokens a region"),
        "r50_4_channel": Published(note="the scale token is made from all stages"),
        "r50_3_channel": Published(note="the scale token is made from all stages"),
        "r50_2_channel": Published(note="the scale token is made from all stages"),
        "r18_4": Published(note="on ResNet-18"),
        "former_3": Published(note="the Transformer alone, on tokens of 49 regions (B, 49, 22, 768)"),
    },
    exceptions={"drop_path": "batch norms use the batch's own statistics in training"},
)


class Bare(Residual):
    """The part alone: no norm, no skip."""

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return self.inner(state, ctx)


class ChannelToken(nn.Module):
    """A token for each region from all maps: plain 3x3 convolutions with stride 2 and a max pooling to the size of the last
    one, then four 3x3 convolutions, each with batch norm and ReLU, over all channels."""

    def __init__(self, channels: Sequence[int], factors: Sequence[int], dim: int) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.down = nn.ModuleList(nn.ModuleList(nn.Conv2d(c, c, 3, 2, 1) for _ in range(f.bit_length() - 2))
                                  for c, f in zip(channels, factors, strict=True))
        self.fuse, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(4):
            self.fuse.append(nn.Conv2d(dim if i else sum(channels), dim, 3, 1, 1))
            self.norms.append(BatchNorm(dim))
        for conv in (c for convs in self.down for c in convs):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.normal_(conv.bias, std=1e-6)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "b r 1 d"]:
        small = []
        for x, convs, factor in zip(maps, self.down, self.factors, strict=True):
            for conv in convs:
                x = conv(x)
            small.append(F.max_pool2d(x, 2) if factor > 1 else x)
        x = torch.cat(small, dim=1)
        for conv, norm in zip(self.fuse, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x.flatten(2).transpose(1, 2)[:, :, None]


def region_tokens(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b r n c"]:
    """The factor x factor cells of each region, by rows; where there are 2 x 2, by columns."""
    x = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # B, C, h, down, w, across
    down, across = (5, 3) if factor == 2 else (3, 5)
    return x.permute(0, 2, 4, down, across, 1).flatten(3, 4).flatten(1, 2)


class ScalePosition(nn.Module):
    """What stands before the scale attention: positions of a region's tokens, the same for all regions."""

    undecayed = ("table",)

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, 1, tokens, dim))
        nn.init.trunc_normal_(self.table, std=0.036, a=-0.072, b=0.072)

    def forward(self, x: Float[Tensor, "b r s c"]) -> Float[Tensor, "b*r s c"]:
        return (x + self.table).flatten(0, 1)


class Given(Resample):
    """Regions' tokens (B, R, S, C) as they come, scale token first."""

    def __init__(self, dim: int, tokens: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.dim, self.tokens, self.in_chans, self.step, self.regions = dim, tokens, dim, (1, 1), math.prod(grid)
        self.position = ScalePosition(dim, tokens)

    def forward(self, x: Float[Tensor, "b r s c"], ctx: Ctx) -> tuple[Float[Tensor, "b*r s c"], Ctx]:
        if x.ndim != 4 or x.shape[1:] != (self.regions, self.tokens, self.dim):
            raise DoesNotFit(f"expected tokens of regions (B, {self.regions}, {self.tokens}, {self.dim}), "
                             f"got {tuple(x.shape)}")
        return self.position(x), ctx


class ScaleTokens(Resample):
    """Images to the tokens of regions: a trunk, its last `scales` maps projected and cut, a scale token, positions."""

    undecayed = ("token",)
    adapts = ("in_chans", "img_size")

    def __init__(self, in_chans: int, dim: int, *, img_size: int | Sequence[int], backbone: Spec[Any] | str, scales: int,
                 scale_token: str, freeze: bool) -> None:
        super().__init__()
        self.in_chans, self.img_size, self.freeze = in_chans, pair(img_size), freeze
        self.trunk = build_trunk(backbone, self.img_size, in_chans)
        info = self.trunk.feature_info
        if not 1 <= scales <= len(info):
            raise DoesNotFit(f"this network has maps of {len(info)} scales, got scales={scales}")
        self.step = (info[-1].stride,) * 2
        check_multiple(self.img_size, self.step, "a grid of regions")
        self.grid = (self.img_size[0] // self.step[0], self.img_size[1] // self.step[1])
        self.factors = [info[-1].stride // i.stride for i in info]
        if any(f & (f - 1) for f in self.factors):
            raise DoesNotFit(f"each map has twice, four times, ... the cells of the last, here {self.factors}")
        self.used = range(len(info) - 1, len(info) - 1 - scales, -1)
        self.project = nn.ModuleDict({str(s): nn.Conv2d(info[s].channels, dim, 1) for s in self.used})
        for conv in self.project.values():
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            nn.init.normal_(conv.bias, std=1e-6)  # type: ignore[arg-type]
        self.token: nn.Parameter | ChannelToken
        if scale_token == "random":
            self.token = nn.Parameter(0.036 * torch.randn(1, 1, 1, dim))
        elif scale_token == "channel":
            self.token = ChannelToken([i.channels for i in info], self.factors, dim)
        else:
            raise unknown("scale token", scale_token, ("random", "channel"))
        self.tokens = 1 + sum(self.factors[s] ** 2 for s in self.used)
        self.position = ScalePosition(dim, self.tokens)
        if freeze:
            self.trunk.requires_grad_(False)

    def train(self, mode: bool = True) -> "ScaleTokens":
        super().train(mode)
        if self.freeze:
            self.trunk.eval()
        return self

    def maps(self, x: Float[Tensor, "b c h w"]) -> list[Feature]:
        """Those of the trunk, all of them."""
        check_images(x, self.in_chans)
        size = (x.shape[2], x.shape[3])
        if size != self.img_size:
            raise DoesNotFit(f"built for images {self.img_size[0]}x{self.img_size[1]}, got {size[0]}x{size[1]}; "
                             "resize them, or build the model with img_size=")
        return self.trunk.features(x)

    def regions(self, maps: Sequence[Feature]) -> Float[Tensor, "b*r s c"]:
        """The tokens of each region, the scale token first, then coarse to fine."""
        tokens = [region_tokens(self.project[str(s)](maps[s].map), self.factors[s]) for s in self.used]
        b, r = tokens[0].shape[:2]
        if isinstance(self.token, ChannelToken):
            first = self.token([m.map for m in maps])
        else:
            first = self.token.expand(b, r, -1, -1)
        return self.position(torch.cat((first, *tokens), dim=2))

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b*r s c"], Ctx]:
        return self.regions(self.maps(x)), ctx


class Gather(Resample):
    """The scale tokens of all regions, a class token before them, positions."""

    undecayed = ("cls",)
    step = (1, 1)

    def __init__(self, dim: int, out_dim: int, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.cls = nn.Parameter(0.036 * torch.randn(1, 1, dim))
        self.position = LearnedPosition(dim, 1 + math.prod(grid), std=0.036, grid=grid, prefix=1)

    def forward(self, x: Float[Tensor, "b*r s c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x = x[:, 0].unflatten(0, (-1, math.prod(self.grid)))
        ctx = replace(ctx, grid=self.grid, prefix=1)
        return self.position(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1), ctx), ctx


class _Duo(Backbone):
    """Scale attention, then patch attention, on what `embed` gives."""

    def __init__(self, embed: Resample, grid: tuple[int, int], *, img_size: int | Sequence[int], num_classes: int, dim: int,
                 depth: int, heads: int, ratio: float, patch_blocks: str, drop_path: float) -> None:
        if patch_blocks not in ("bare", "pre_norm"):
            raise unknown("kind of patch blocks", patch_blocks, ("bare", "pre_norm"))
        mixer, channel, usual = spec(Attention, heads=heads), spec(Mlp, ratio=ratio), spec(PreNorm, drop_path=drop_path)
        whole = {"mixer": mixer, "channel": channel}
        bare = patch_blocks == "bare"
        stages = [Stage(dim, depth, whole, usual),
                  Stage(dim, depth, {"mixer": mixer} if bare else whole, spec(Bare) if bare else usual,
                        spec(Gather, grid=grid))]
        super().__init__(embed, stages, img_size=img_size, norm=spec(NoNorm) if bare else spec(LayerNorm),
                         num_classes=num_classes, pool="token")


class MultiscaleFormer(_Duo):
    """tokens of regions (B, R, S, dim), scale token first -> logits (B, num_classes); see `DuoFormer`.

    grid: of regions, R of them; tokens: S, of a region.
    """

    def __init__(self, *, grid: tuple[int, int] = (7, 7), tokens: int = 22, num_classes: int = 1000, dim: int = 768,
                 depth: int = 12, heads: int = 12, ratio: float = 4.0, patch_blocks: str = "bare",
                 drop_path: float = 0.0) -> None:
        super().__init__(Given(dim, tokens, grid), grid, img_size=grid, num_classes=num_classes, dim=dim, depth=depth,
                         heads=heads, ratio=ratio, patch_blocks=patch_blocks, drop_path=drop_path)

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Float[Tensor, "b r s c"]:
        e = self.embedding
        return torch.randn(batch, *(shape or (e.regions, e.tokens, e.dim)))  # type: ignore[misc]

    def features(self, batch: Tensor) -> list[Feature]:
        raise DoesNotFit("tokens of regions are no image: the feature maps are those of the network that made them")


class DuoFormer(_Duo):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    backbone: a Spec or a preset's name of a network with `features`, maps of several scales. scales: how many of its last
    maps are attended to. scale_token: "random" or "channel". freeze: the network is not trained. depth: of the local
    layers, and of the global ones. patch_blocks: "bare" or "pre_norm".
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, in_chans: int = 3, num_classes: int = 1000, dim: int = 768,
                 depth: int = 12, heads: int = 12, ratio: float = 4.0, scales: int = 4, scale_token: str = "random",
                 backbone: Spec[Any] | str = spec(ResNet), freeze: bool = False, patch_blocks: str = "bare",
                 drop_path: float = 0.0) -> None:
        embed = ScaleTokens(in_chans, dim, img_size=img_size, backbone=backbone, scales=scales, scale_token=scale_token,
                            freeze=freeze)
        super().__init__(embed, embed.grid, img_size=img_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
                         ratio=ratio, patch_blocks=patch_blocks, drop_path=drop_path)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """The network's maps, and one of the regions."""
        embed = self.embedding
        return [*embed.trunk.feature_info, FeatureInfo(self.num_features, embed.step[0])]  # type: ignore[misc, union-attr, index, list-item]

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        maps = self.embedding.maps(batch)  # type: ignore[operator]
        x, ctx = self.embedding.regions(maps), Ctx()  # type: ignore[operator]
        for stage in self.stages:
            x, ctx = stage(x, ctx)
        return [*maps, Feature(to_map(x, ctx.need_grid(self, prefix=True), ctx.prefix), self.feature_info[-1].stride)]


R18 = spec(ResNet, layers=(2, 2, 2, 2), bottleneck=False)
PRESETS = {
    "nano": spec(DuoFormer, dim=32, depth=2, heads=4, scales=3, scale_token="channel", img_size=28,
                 backbone=spec(ResNet, layers=(1, 1, 1), width=8, bottleneck=False, stem="small")),
    **{f"r50_{n}{name}": spec(DuoFormer, scales=n, scale_token=token)
       for name, token in (("", "random"), ("_channel", "channel")) for n in (4, 3, 2)},
    "r18_4": spec(DuoFormer, backbone=R18),
    "former_3": spec(MultiscaleFormer),
}
FORMER, DUO = ["former_3"], [v for v in PRESETS if v != "former_3"]


def _former(before: str) -> list[Any]:
    """The Transformer's names after `before`."""
    rules = [rule(f"{before}pos_embed_for_scale", "embedding.position.table"),
             rule(f"{before}cls_token", "stages.1.resample.cls"),
             rule(f"{before}pos_embed", "stages.1.resample.position.table"),
             *[drop(f"{before}fc_norm.{kind}", "its result is not used",
                    ("stages.1.resample.cls", lambda t, state, o, one=one: t.new_full((t.shape[2],), one)))
               for kind, one in (("weight", 1.0), ("bias", 0.0))],
             rule(f"{before}head.*", "head.*")]
    for theirs, ours in (("scaleBlocks.{i}", "stages.0.layers.{i}"), ("blocks.{i}", "stages.1.layers.{i}")):
        theirs = before + theirs
        rules += [rule(f"{theirs}.norm1.*", f"{ours}.mixer.norm.*"), rule(f"{theirs}.attn.*", f"{ours}.mixer.inner.*"),
                  rule(f"{theirs}.norm2.*", f"{ours}.channel.norm.*"), rule(f"{theirs}.mlp.*", f"{ours}.channel.inner.*")]
    return rules


KEYS = {
    "authors": keymap(
        *torchvision_rules("resnet_projector.", "embedding.trunk.", ("0", "1", "4", "5", "6", "7")),
        *[replace(r, made=None) for r in torchvision_rules("resnet_projector.", "embedding.trunk.")],  # read, not written
        rule("channel_token", "embedding.token"),
        *[rule(f"chann_proj{s + 1}.conv{j + 1}.*", f"embedding.token.down.{s}.{j}.*") for s in range(3) for j in range(2)],
        *[drop(f"chann_proj_all.nConvs.{i}.norm.num_batches_tracked", "a count of steps",
               (f"embedding.token.norms.{i}.running_mean", lambda t, state, o: torch.zeros((), dtype=torch.int64)))
          for i in range(4)],
        rule("chann_proj_all.nConvs.{i}.conv.*", "embedding.token.fuse.{i}.*"),
        rule("chann_proj_all.nConvs.{i}.norm.*", "embedding.token.norms.{i}.*"),
        rule("projection.proj_heads{i}.*", "embedding.project.{i}.*"),
        *_former("vision_transformer."),
        without=dict.fromkeys(FORMER, "the Transformer alone")),
    "authors_former": keymap(
        *_former(""), without=dict.fromkeys(DUO, "has a network before the Transformer"),
        example=("former_3", {"dim": 48, "depth": 2, "heads": 4, "tokens": 6, "grid": (3, 3)})),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads and what is frozen; square grids of regions, and a trunk that is a ResNet."""
    dim, regions = state["stages.1.resample.cls"].shape[2], state["stages.1.resample.position.table"].shape[1] - 1
    side, layer = round(regions**0.5), "stages.0.layers.0.channel.inner.fc1.weight"
    found: dict[str, Any] = {
        "dim": dim, "depth": count(state, "stages.0.layers.{i}.mixer.norm.weight"),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64) if dim % 6 else 6, dim=dim),  # 6, as the code has it
        "ratio": told_ratio(len(state[layer]), dim),
        "patch_blocks": "pre_norm" if "stages.1.layers.0.mixer.norm.weight" in state else "bare",
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
    tokens = state["embedding.position.table"].shape[2]
    if "embedding.trunk.conv.weight" not in state:
        return found | {"tokens": tokens, "grid": (side, side)}
    width, in_chans, kernel, _ = state["embedding.trunk.conv.weight"].shape
    stages = range(count(state, "embedding.trunk.stages.{i}.0.conv1.weight"))
    layers = tuple(count(state, f"embedding.trunk.stages.{s}.{{i}}.conv1.weight") for s in stages)
    trunk = {"layers": layers, "width": width, "bottleneck": "embedding.trunk.stages.0.0.conv3.weight" in state,
             "stem": "large" if kernel == 7 else "small"}
    usual = {"layers": (3, 4, 6, 3), "width": 64, "bottleneck": True, "stem": "large"}
    return found | {
        "backbone": spec(ResNet, **{k: v for k, v in trunk.items() if v != usual[k]}), "in_chans": in_chans,
        "scales": count(state, "embedding.project.{i}.weight"),
        "scale_token": "random" if "embedding.token" in state else "channel",
        "img_size": side * (4 if kernel == 7 else 1) * 2 ** (len(layers) - 1),
        "freeze": Assumed(False, "leaves no trace in the tensors"),
    }
