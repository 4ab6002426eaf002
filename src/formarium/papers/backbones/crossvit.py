"""CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification (Chen et al., ICCV 2021),
arXiv 2103.14899.

New: two Transformers side by side, a narrow and shallow one on small patches and a wide and deep one on large patches of
the same image, resized for each. After some layers of each the class tokens change places: projected to the other's width,
one reads the other's patches by cross-attention with a single query, at linear cost, and is projected back (section 3.3,
Eqs. 3 to 6). Both class tokens are classified, and the logits averaged. The dagger models take three convolutions instead
of the linear patch embedding (section 4.1).

Decisions, after the released code: images are resized bicubically without antialiasing, and only where their size is not
the branch's; so images of any size are taken, and the positions stay those of `img_size`. Another img_size gives each
branch the nearest multiple of its patch to its scale. Cross-attention has no MLP after it. Rates of stochastic depth grow
with the longer branch. For dense tasks, `features` and `forward_features` give both branches' tokens side by side on the
finer grid, those of large patches repeated; without classes the answer is both class tokens side by side. The paper's table
gives Ti 6.9 M parameters; the code, here and in timm, has 7.01 M.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Feature, FeatureInfo
from ...core.part import Resample
from ...core.spec import spec
from ...parts.attention import Attention, CrossAttention
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import PatchEmbed, check_images, pair, to_map, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.stack import Stack
from ...weights.adapt import Change, refit_kernel
from ...weights.keys import FUSE_PAIR, Assumed, KeyMap, State, as_preset, count, keymap, rule, told_ratio
from .cait import ClassAlone

CARD = Card(
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    authors="Chun-Fu (Richard) Chen, Quanfu Fan, Rameswar Panda",
    venue="ICCV 2021",
    arxiv="2103.14899",
    year=2021,
    code="https://github.com/IBM/CrossViT",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("two branches", "multi-scale", "cross-attention", "class-attention"),
    claim="Two branches of different patches, fused by the cross-attention of their class tokens, beat DeiT by about 2 % "
          "ImageNet top-1 at a small to moderate increase in cost (CrossViT-18+ 82.8 %, DeiT-B 81.8 %).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=7.01e6, macs=1.6e9, input=(3, 240, 240), results={"ImageNet top-1": 73.4},
                          note="6.9 M parameters in the paper's table; results of all variants quoted from memory"),
        "small": Published(params=26.7e6, macs=5.6e9, input=(3, 240, 240), results={"ImageNet top-1": 81.0}),
        "base": Published(params=104.7e6, macs=21.2e9, input=(3, 240, 240), results={"ImageNet top-1": 82.2}),
        "9": Published(params=8.6e6, macs=1.8e9, input=(3, 240, 240), results={"ImageNet top-1": 73.9}),
        "9_dagger": Published(params=8.8e6, macs=2.0e9, input=(3, 240, 240), results={"ImageNet top-1": 77.1}),
        "15": Published(params=27.4e6, macs=5.8e9, input=(3, 240, 240), results={"ImageNet top-1": 81.5}),
        "15_dagger": Published(params=28.2e6, macs=6.1e9, input=(3, 240, 240), results={"ImageNet top-1": 82.3}),
        "15_dagger_384": Published(params=28.5e6, macs=21.4e9, input=(3, 408, 408), results={"ImageNet top-1": 83.5}),
        "18": Published(params=43.3e6, macs=9.0e9, input=(3, 240, 240), results={"ImageNet top-1": 82.5}),
        "18_dagger": Published(params=44.3e6, macs=9.5e9, input=(3, 240, 240), results={"ImageNet top-1": 82.8}),
        "18_dagger_384": Published(params=44.6e6, macs=32.4e9, input=(3, 408, 408), results={"ImageNet top-1": 83.9}),
    },
    can=("any_size",),
)

STRIDES = {4: (2, 2, 1), 8: (4, 2, 1), 12: (4, 3, 1), 16: (4, 2, 2)}  # of the three convolutions; 4 and 8 are ours


class ConvPatches(PatchEmbed):
    """Patches by three convolutions, a quarter, half and all of the channels wide, with ReLU between."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, patch: int, img_size: Sequence[int]) -> None:
        super().__init__(in_chans, dim, patch=patch, img_size=img_size, class_token=True, position=spec(LearnedPosition))
        if patch not in STRIDES or dim % 4:
            raise DoesNotFit(f"patches of {patch} pixels and {dim} channels: the three convolutions make patches of "
                             f"{', '.join(map(str, STRIDES))} and a multiple of 4 channels; take conv_stem=False")
        a, b, c = STRIDES[patch]
        self.proj = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(in_chans, dim // 4, 7, a, 3), nn.ReLU(inplace=True),
            nn.Conv2d(dim // 4, dim // 2, 3, b, 0 if b == 3 else 1), nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, dim, 3, c, 1))

    def refit(self, name: str, tensor: Tensor | None, was: PatchEmbed) -> Change | None:
        wanted = self.state_dict()["proj.0.weight"].shape
        return refit_kernel(tensor, wanted) if name == "proj.0.weight" and tensor is not None else None


class TwoScales(Resample):
    """Images of any size to the tokens of both branches: those of large patches are the memory of the Ctx."""

    def __init__(self, in_chans: int, dims: tuple[int, int], *, patch: tuple[int, int], sizes: Sequence[tuple[int, int]],
                 conv_stem: bool) -> None:
        super().__init__()
        self.in_chans, self.step, self.sizes = in_chans, (patch[0], patch[0]), tuple(sizes)
        self.branches = nn.ModuleList(
            ConvPatches(in_chans, d, patch=p, img_size=s) if conv_stem else
            PatchEmbed(in_chans, d, patch=p, img_size=s, class_token=True, position=spec(LearnedPosition))
            for d, p, s in zip(dims, patch, sizes, strict=True))

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        check_images(x, self.in_chans)
        small, large = (branch(x if x.shape[2:] == size else F.interpolate(x, size, mode="bicubic"), ctx)
                        for branch, size in zip(self.branches, self.sizes, strict=True))
        return small[0], replace(small[1], memory=large)


class Fusion(nn.Module):
    """The class token of one branch (B, 1, dim) reads the patches of the other (B, N, other) (Eqs. 3 to 6)."""

    def __init__(self, dim: int, other: int, place: Place, *, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm_there, self.there = LayerNorm(dim), linear(dim, other)
        self.attention = ClassAlone(other, place, CrossAttention(other, place, heads=heads), drop_path=drop_path)
        self.norm_back, self.back = LayerNorm(other), linear(other, dim)

    def forward(self, token: Float[Tensor, "b 1 c"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b 1 c"]:
        token, _ = self.attention((self.there(F.gelu(self.norm_there(token))), patches), Ctx(prefix=1))
        return self.back(F.gelu(self.norm_back(token)))


Pair = tuple[Float[Tensor, "b n c"], Float[Tensor, "b m d"]]


class MultiScale(nn.Module):
    """Layers of each branch, then the fusion of their class tokens. place: its first layer, of the longer branch."""

    def __init__(self, dims: tuple[int, int], depths: tuple[int, int], place: Place, *, heads: tuple[int, int],
                 ratios: tuple[float, float], drop_path: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            Stack(d, n, {"mixer": spec(Attention, heads=h), "channel": spec(Mlp, ratio=r)},
                  spec(PreNorm, drop_path=drop_path), place=place)
            for d, n, h, r in zip(dims, depths, heads, ratios, strict=True))
        last = place._replace(layer=place.layer + max(depths) - 1)
        self.fusion = nn.ModuleList(
            Fusion(dims[i], dims[1 - i], last, heads=heads[1 - i], drop_path=drop_path) for i in (0, 1))

    def forward(self, x: Pair, told: tuple[Ctx, Ctx]) -> Pair:
        small, large = (branch(t, ctx)[0] for branch, t, ctx in zip(self.branches, x, told, strict=True))
        tokens = self.fusion[0](small[:, :1], large[:, 1:]), self.fusion[1](large[:, :1], small[:, 1:])
        return torch.cat((tokens[0], small[:, 1:]), dim=1), torch.cat((tokens[1], large[:, 1:]), dim=1)


class PairNorm(nn.ModuleList):
    """A norm for the channels of each branch."""

    def __init__(self, dim: int, *, dims: tuple[int, int]) -> None:
        super().__init__(LayerNorm(d) for d in dims)
        self.dims = dims

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        return torch.cat([norm(t) for norm, t in zip(self, x.split(self.dims, dim=-1), strict=True)], dim=-1)


class PairHead(nn.ModuleList):
    """A classifier for the channels of each branch; their logits are averaged."""

    def __init__(self, dims: tuple[int, int], num_classes: int) -> None:
        super().__init__(nn.Linear(d, num_classes) for d in dims)
        self.dims = dims
        for head in self:
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b k"]:
        small, large = (head(t) for head, t in zip(self, x.split(self.dims, dim=-1), strict=True))
        return (small + large) / 2


class CrossViT(Backbone):
    """images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    In pairs, small patches first: dims, patch, heads, ratios, and scales: each branch's share of the sides of img_size.
    depths: layers of both branches in each stage, before a fusion. conv_stem: the dagger models' patch embedding. init_std:
    of the linear layers, the authors' 0.02; None: Xavier, which small widths need.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 240, scales: tuple[float, float] = (1.0, 224 / 240),
                 patch: tuple[int, int] = (12, 16), in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, int] = (192, 384), depths: tuple[tuple[int, int], ...] = ((1, 4),) * 3,
                 heads: tuple[int, int] = (6, 6), ratios: tuple[float, float] = (4.0, 4.0), conv_stem: bool = False,
                 drop_path: float = 0.0, init_std: float | None = 0.02) -> None:
        if not depths or min(scales) <= 0:
            raise DoesNotFit(f"expected one stage or more and scales above 0, got depths={depths} and scales={scales}")
        sizes = [tuple(max(1, round(scale * side / p)) * p for side in pair(img_size))
                 for scale, p in zip(scales, patch, strict=True)]
        embed = TwoScales(in_chans, dims, patch=patch, sizes=sizes, conv_stem=conv_stem)  # type: ignore[arg-type]
        width = Stage(sum(dims), 0, {}, spec(PreNorm))  # no layers of the usual kind: the stages follow
        super().__init__(embed, [width], img_size=img_size, norm=spec(PairNorm, dims=dims), num_classes=num_classes,
                         pool="token")
        longest = [max(d) for d in depths]
        self.stages = nn.ModuleList(
            MultiScale(dims, d, Place(layer=sum(longest[:i]), depth=sum(longest), stage=i, stages=len(depths)), heads=heads,
                       ratios=ratios, drop_path=drop_path) for i, d in enumerate(depths))
        restart_linears(self, init_std)
        for branch in embed.branches:
            nn.init.trunc_normal_(branch.cls, std=0.02)  # type: ignore[arg-type]
        start_residuals(self)

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        if isinstance(self.head, nn.Linear):
            self.head = PairHead(self.norm.dims, num_classes).to(self.head.weight)  # type: ignore[arg-type]

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.num_features, self.embedding.step[0])] * len(self.stages)  # type: ignore[index]

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        """A map (B, sum(dims), H', W') after each stage: both branches' patches on the finer grid."""
        pairs, told = self._through(*self.embed(batch))
        maps = [to_map(self._joined(p, told), told[0].need_grid(self, prefix=True), 1) for p in pairs]
        return [Feature(m, info.stride) for m, info in zip(maps, self.feature_info, strict=True)]

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        """Through all stages, and the final norms: both branches' tokens (B, 1 + N, sum(dims)) on the finer grid."""
        pairs, told = self._through(x, ctx)
        return self.norm(self._joined(pairs[-1], told)), told[0]

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        pairs, _ = self._through(*self.embed(batch))  # as encode, for the class tokens alone
        return self.head(self.norm(torch.cat([x[:, 0] for x in pairs[-1]], dim=-1)))

    def _through(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[list[Pair], tuple[Ctx, Ctx]]:
        """Both branches' tokens after each stage, and what is true of them."""
        assert ctx.memory is not None
        other, larger = ctx.memory
        told, pairs = (replace(ctx, memory=None), larger), [(x, other)]
        for stage in self.stages:
            pairs.append(stage(pairs[-1], told))
        return pairs[1:], told

    def _joined(self, x: Pair, told: tuple[Ctx, Ctx]) -> Float[Tensor, "b n c"]:
        small, large = x
        grid, coarse = (ctx.need_grid(self, prefix=True) for ctx in told)
        patches = to_tokens(F.interpolate(to_map(large, coarse, 1), grid, mode="nearest"))
        return torch.cat((small, torch.cat((large[:, :1], patches), dim=1)), dim=-1)


def _numbered(dims: tuple[int, int], heads: int, depth: int, **more: Any) -> Any:
    return spec(CrossViT, dims=dims, heads=(heads, heads), depths=((1, depth),) * 3, ratios=(3.0, 3.0), **more)


AT_384 = {"img_size": 408, "scales": (1.0, 384 / 408)}
PRESETS = {
    "nano": spec(CrossViT, img_size=28, scales=(1.0, 24 / 28), patch=(4, 8), dims=(32, 48), depths=((1, 2), (1, 1)),
                 heads=(2, 4), ratios=(3.0, 2.0), conv_stem=True, init_std=None),
    "tiny": spec(CrossViT, dims=(96, 192), heads=(3, 3)),
    "small": spec(CrossViT),
    "base": spec(CrossViT, dims=(384, 768), heads=(12, 12)),
    "9": _numbered((128, 256), 4, 3),
    "9_dagger": _numbered((128, 256), 4, 3, conv_stem=True),
    "15": _numbered((192, 384), 6, 5),
    "15_dagger": _numbered((192, 384), 6, 5, conv_stem=True),
    "15_dagger_384": _numbered((192, 384), 6, 5, conv_stem=True, **AT_384),
    "18": _numbered((224, 448), 7, 6),
    "18_dagger": _numbered((224, 448), 7, 6, conv_stem=True),
    "18_dagger_384": _numbered((224, 448), 7, 6, conv_stem=True, **AT_384),
}


def _keys(dot: str) -> KeyMap:
    """dot: stands between the name of a parameter and the number of its branch."""
    layer, ours = "blocks.{s}.blocks.{b}.{i}", "stages.{s}.branches.{b}.layers.{i}"
    cross, fusion = "blocks.{s}.fusion.{b}", "stages.{s}.fusion.{b}"
    return keymap(
        *[rule(f"cls_token{dot}{b}", f"embedding.branches.{b}.cls") for b in (0, 1)],
        *[rule(f"pos_embed{dot}{b}", f"embedding.branches.{b}.position.table") for b in (0, 1)],
        rule("patch_embed.{b}.proj.*", "embedding.branches.{b}.proj.*"),
        rule(f"{layer}.norm1.*", f"{ours}.mixer.norm.*"),
        rule(f"{layer}.attn.*", f"{ours}.mixer.inner.*"),
        rule(f"{layer}.norm2.*", f"{ours}.channel.norm.*"),
        rule(f"{layer}.mlp.*", f"{ours}.channel.inner.*"),
        rule("blocks.{s}.projs.{b}.0.*", f"{fusion}.norm_there.*"),
        rule("blocks.{s}.projs.{b}.2.*", f"{fusion}.there.*"),
        rule(f"{cross}.norm1.*", f"{fusion}.attention.norm.*"),
        rule(f"{cross}.attn.wq.*", f"{fusion}.attention.inner.q.*"),
        *[rule((f"{cross}.attn.wk.{kind}", f"{cross}.attn.wv.{kind}"), f"{fusion}.attention.inner.kv.{kind}", FUSE_PAIR)
          for kind in ("weight", "bias")],
        rule(f"{cross}.attn.proj.*", f"{fusion}.attention.inner.proj.*"),
        rule("blocks.{s}.revert_projs.{b}.0.*", f"{fusion}.norm_back.*"),
        rule("blocks.{s}.revert_projs.{b}.2.*", f"{fusion}.back.*"),
        rule("norm.{b}.*", "norm.{b}.*"),
        rule("head.{b}.*", "head.{b}.*"),
    )


KEYS = {"timm": _keys("_"), "authors": _keys(".")}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads, and the patches of convolutional stems, with them the image's size. Square images."""
    conv = "embedding.branches.0.proj.0.weight" in state
    first = [state[f"embedding.branches.{b}.proj.{'0.' if conv else ''}weight"] for b in (0, 1)]
    dims = tuple(state[f"embedding.branches.{b}.cls"].shape[-1] for b in (0, 1))
    patch = as_preset(PRESETS, "patch", (12, 16), dims=dims, conv_stem=True) if conv else tuple(w.shape[-1] for w in first)
    sides = [isqrt(state[f"embedding.branches.{b}.position.table"].shape[1] - 1) * p
             for b, p in enumerate(patch.value if isinstance(patch, Assumed) else patch)]
    found: dict[str, Any] = {"img_size": sides[0], "scales": (1.0, sides[1] / sides[0])}
    if isinstance(patch, Assumed):
        found = {k: Assumed(v, patch.why) for k, v in found.items()}

    def layers(stage: int, branch: int) -> int:
        return count(state, f"stages.{stage}.branches.{branch}.layers.{{i}}.mixer.norm.weight")

    return found | {
        "patch": patch, "dims": dims, "conv_stem": conv, "in_chans": first[0].shape[1],
        "depths": tuple((layers(s, 0), layers(s, 1)) for s in range(count(state, "stages.{i}.fusion.0.there.weight"))),
        "heads": as_preset(PRESETS, "heads", tuple(max(1, d // 64) for d in dims), dims=dims),
        "ratios": tuple(told_ratio(state[f"stages.0.branches.{b}.layers.0.channel.inner.fc1.weight"].shape[0], d)
                        for b, d in enumerate(dims)),
        "num_classes": state["head.0.weight"].shape[0] if "head.0.weight" in state else 0,
    }
