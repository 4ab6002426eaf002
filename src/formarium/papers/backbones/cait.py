"""Going Deeper with Image Transformers (Touvron et al., ICCV 2021), arXiv 2103.17239.

New: LayerScale, a learned factor a channel on every branch that starts near zero (Eq. 4; here `PreNorm(layer_scale=)`),
so that deep nets train; and two phases: patches attend to each other without a class token, then the class token alone
reads the patches, which stay as they are (class-attention: queries of the class token, keys and values of all, Eqs. 5 to
8). Attention among patches is talking-heads attention (Shazeer et al. 2020, arXiv 2003.02436): the heads' scores are mixed
linearly before the softmax, the weights after it.

Decisions: both mixes have a bias, as the code has it; that of the scores moves all keys alike, so softmax does not notice
it. Where keys are hidden they stay hidden after the second mix, whose bias would give them a weight; the paper has no
masks. The rate of stochastic depth is the same in all layers, and zero in the class phase. LayerScale starts at 1e-5 in the
released models of 24 layers and of width 192, at 1e-6 in the others, as the code has it, at 0.1 in `nano`, as the paper
has it up to 18 layers. Of the paper's models the authors released ten; XXS24 to M48 here are all, without and with
fine-tuning at 384 or 448 pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention, CrossAttention
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import PatchEmbed
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, ScorePosition, seat
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.stack import Stack
from ...weights.keys import FUSE_PAIR, State, count, keymap, rule, told_ratio

CARD = Card(
    title="Going Deeper with Image Transformers",
    authors="Hugo Touvron, Matthieu Cord, Alexandre Sablayrolles, Gabriel Synnaeve, Hervé Jégou",
    venue="ICCV 2021",
    arxiv="2103.17239",
    year=2021,
    code="https://github.com/facebookresearch/deit",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("plain", "LayerScale", "class-attention", "talking heads", "deep"),
    claim="With LayerScale and class-attention image Transformers keep improving with depth: CaiT-M48 reaches 86.5 % "
          "ImageNet top-1 without other data.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "xxs24": Published(params=12.0e6, macs=2.5e9, input=(3, 224, 224),
                           results={"ImageNet top-1": 77.6, "ImageNet top-1 (distilled)": 78.4},
                           note="results quoted from memory, as those of all models without distillation"),
        "xxs24_384": Published(params=12.0e6, macs=9.5e9, input=(3, 384, 384),
                               results={"ImageNet top-1": 80.4, "ImageNet top-1 (distilled)": 80.9},
                               note="results and MACs quoted from memory"),
        "xxs36": Published(params=17.3e6, macs=3.8e9, input=(3, 224, 224),
                           results={"ImageNet top-1": 79.1, "ImageNet top-1 (distilled)": 79.7},
                           note="results and MACs quoted from memory"),
        "xxs36_384": Published(params=17.3e6, macs=14.3e9, input=(3, 384, 384),
                               results={"ImageNet top-1": 81.8, "ImageNet top-1 (distilled)": 82.2}),
        "xs24": Published(params=26.6e6, macs=5.4e9, input=(3, 224, 224),
                          results={"ImageNet top-1": 81.8, "ImageNet top-1 (distilled)": 82.0},
                          note="results and MACs quoted from memory"),
        "xs24_384": Published(params=26.6e6, macs=19.3e9, input=(3, 384, 384),
                              results={"ImageNet top-1": 83.8, "ImageNet top-1 (distilled)": 84.1}),
        "xs36": Published(params=38.6e6, macs=8.1e9, input=(3, 224, 224),
                          results={"ImageNet top-1": 82.6, "ImageNet top-1 (distilled)": 82.9},
                          note="results and MACs quoted from memory"),
        "xs36_384": Published(params=38.6e6, macs=28.8e9, input=(3, 384, 384),
                              results={"ImageNet top-1": 84.3, "ImageNet top-1 (distilled)": 84.8}),
        "s24": Published(params=46.9e6, macs=9.4e9, input=(3, 224, 224),
                         results={"ImageNet top-1": 82.7, "ImageNet top-1 (distilled)": 83.5}),
        "s24_384": Published(params=46.9e6, macs=32.2e9, input=(3, 384, 384),
                             results={"ImageNet top-1": 84.3, "ImageNet top-1 (distilled)": 85.1}),
        "s36": Published(params=68.2e6, macs=13.9e9, input=(3, 224, 224),
                         results={"ImageNet top-1": 83.3, "ImageNet top-1 (distilled)": 84.0},
                         note="results and MACs quoted from memory"),
        "s36_384": Published(params=68.2e6, macs=48.0e9, input=(3, 384, 384),
                             results={"ImageNet top-1": 85.0, "ImageNet top-1 (distilled)": 85.4}),
        "s48": Published(params=89.5e6, macs=18.6e9, input=(3, 224, 224),
                         results={"ImageNet top-1": 83.5, "ImageNet top-1 (distilled)": 83.9},
                         note="all numbers quoted from memory"),
        "s48_384": Published(params=89.5e6, macs=63.8e9, input=(3, 384, 384),
                             results={"ImageNet top-1": 85.1, "ImageNet top-1 (distilled)": 85.3},
                             note="all numbers quoted from memory"),
        "m24": Published(params=185.9e6, macs=36.0e9, input=(3, 224, 224),
                         results={"ImageNet top-1": 83.4, "ImageNet top-1 (distilled)": 84.7},
                         note="all numbers quoted from memory"),
        "m24_384": Published(params=185.9e6, macs=116.1e9, input=(3, 384, 384),
                             results={"ImageNet top-1": 84.5, "ImageNet top-1 (distilled)": 85.8},
                             note="all numbers quoted from memory"),
        "m36": Published(params=270.9e6, macs=53.7e9, input=(3, 224, 224),
                         results={"ImageNet top-1": 83.8, "ImageNet top-1 (distilled)": 85.1},
                         note="results and MACs quoted from memory"),
        "m36_384": Published(params=270.9e6, macs=173.3e9, input=(3, 384, 384),
                             results={"ImageNet top-1": 84.9, "ImageNet top-1 (distilled)": 86.1}),
        "m36_448": Published(params=270.9e6, macs=247.8e9, input=(3, 448, 448),
                             results={"ImageNet top-1 (distilled)": 86.3}, note="all numbers quoted from memory"),
        "m48_448": Published(params=356e6, macs=329.6e9, input=(3, 448, 448), results={"ImageNet top-1 (distilled)": 86.5}),
    },
)

PARTS = {
    "mixer": {"talking_heads": "TalkingHeads", "class_attention": "ClassAttention"},
}


class TalkingHeads(Attention):
    """Softmax attention whose heads' scores are mixed before the softmax, and whose weights after it.

    talk_bias: of both mixes; other options as `Attention` has them. Positions may multiply the scores, before the mix.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, inner: int | None = None, bias: bool = True,
                 qkv_bias: bool | None = None, talk_bias: bool = True, causal: bool = False, window: int | None = None,
                 position: Spec[ScorePosition] | None = None) -> None:
        super().__init__(dim, place, heads=heads, inner=inner, bias=bias, qkv_bias=qkv_bias, causal=causal, window=window,
                         position=position)
        kind = ScorePosition if self.position is None else type(self.position)
        if kind.attend is not ScorePosition.attend and kind.weigh is ScorePosition.weigh:
            raise DoesNotFit(f"{kind.__name__} attends by itself, and talking heads mix scores; take "
                             "position='rotary' or one that is added to the scores or multiplies them")
        self.proj_l, self.proj_w = (linear(heads, heads, bias=talk_bias) for _ in range(2))

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        scores = (q * q.shape[-1] ** -0.5) @ k.contiguous().transpose(-2, -1)
        if self.position is not None:
            bias = self.position.bias(q.shape[2], k.shape[2], ctx)
            scores = self.position.weigh(scores, ctx)
            scores = scores if bias is None else scores + bias
        scores = talk(scores, self.proj_l)
        seen = self._visible(q.shape[2], k.shape[2], ctx, q.device)
        if seen is None:
            return talk(scores.softmax(-1), self.proj_w) @ v
        weights = talk(scores.masked_fill(~seen, float("-inf")).softmax(-1), self.proj_w)
        return weights.masked_fill(~seen, 0) @ v


def talk(x: Float[Tensor, "b h n m"], layer: nn.Linear) -> Float[Tensor, "b h n m"]:
    """A linear layer along the heads, where they stand: moving them to the end and back would copy all scores twice."""
    weight = layer.weight.expand(len(x), -1, -1)
    mixed = weight @ x.flatten(2) if layer.bias is None else torch.baddbmm(layer.bias[:, None], weight, x.flatten(2))
    return mixed.view_as(x)


class ClassAttention(CrossAttention):
    """The class token (all tokens of the prefix) reads itself and the others, which get nothing (Eqs. 5 to 7).

    For other hosts: CaiT's own class phase keeps the others out of the branch altogether, see `ClassAlone`.
    """

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if not ctx.prefix:
            raise DoesNotFit("class-attention needs a class token, and here is none; build the model with pool='token'")
        told = replace(ctx, cache=None, memory=(x, ctx))
        return F.pad(super().forward(x[:, :ctx.prefix], told), (0, 0, 0, x.shape[1] - ctx.prefix))


class ClassToken(Resample):
    """Puts the class token before the patches, which have gone through their phase without it."""

    undecayed = ("cls",)
    step = (1, 1)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        return torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1), replace(ctx, prefix=1)


class ClassAlone(PreNorm):
    """As PreNorm, for the class token alone: cross attention reads all tokens, and nothing is added to the patches."""

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return x[:, :1], x[:, 1:]

    def forward(self, state: Any, ctx: Ctx) -> Any:
        token, patches = state
        if isinstance(self.inner, CrossAttention):
            x = self.norm(torch.cat(state, dim=1))
            return token + self.branch(x[:, :1], replace(ctx, memory=(x, ctx))), patches
        return token + self.branch(self.norm(token), ctx), patches

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return torch.cat(state, dim=1)


class CaiT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    depth: layers among the patches; class_depth: layers of the class token after them; 0: no second phase, the class token
    stands among the patches from the start. layer_scale: where the factors start; None: none. init_std: of the linear
    layers, the authors' 0.02; None: Xavier, which small widths need. class_mixer, class_residual: of the second phase.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 24, class_depth: int = 2, heads: int = 4,
                 layer_scale: float | None = 1e-5, drop_path: float = 0.0, init_std: float | None = 0.02,
                 mixer: Spec[Part] = spec(TalkingHeads), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(LearnedPosition), class_mixer: Spec[Part] = spec(CrossAttention),
                 class_residual: Spec[Residual] = spec(ClassAlone)) -> None:
        mixer, position = seat(position, mixer.offer(heads=heads))
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=class_depth == 0, position_first=True,
                           position=position)
        residual = residual.offer(norm=norm, drop_path=drop_path, even_drop=True, layer_scale=layer_scale)
        super().__init__(embed, [Stage(dim, depth, {"mixer": mixer, "channel": channel}, residual)], img_size=img_size,
                         norm=norm, num_classes=num_classes, pool="token")
        self.class_stage = Stack(dim, class_depth, {"mixer": class_mixer.offer(heads=heads), "channel": channel},
                                 class_residual.offer(norm=norm, layer_scale=layer_scale),
                                 place=Place(layer=depth, depth=depth + class_depth, stage=1, stages=2),
                                 resample=ClassToken(dim)) if class_depth else None
        restart_linears(self, init_std)
        cls = embed.cls if self.class_stage is None else self.class_stage.resample.cls
        nn.init.trunc_normal_(cls, std=0.02)  # type: ignore[arg-type]
        start_residuals(self)

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        """Through both phases, and the final norm; the class token comes first."""
        x, ctx = self.stages[0](x, ctx)
        if self.class_stage is not None:
            x, ctx = self.class_stage(x, ctx)
        return self.norm(x), ctx


XXS24 = spec(CaiT)
XXS36 = spec(CaiT, depth=36)
XS24 = spec(CaiT, dim=288, heads=6)
XS36 = spec(CaiT, dim=288, depth=36, heads=6, layer_scale=1e-6)
S24 = spec(CaiT, dim=384, heads=8)
S36 = spec(CaiT, dim=384, depth=36, heads=8, layer_scale=1e-6)
S48 = spec(CaiT, dim=384, depth=48, heads=8, layer_scale=1e-6)
M24 = spec(CaiT, dim=768, heads=16)
M36 = spec(CaiT, dim=768, depth=36, heads=16, layer_scale=1e-6)
M48 = spec(CaiT, dim=768, depth=48, heads=16, layer_scale=1e-6)
PRESETS = {
    "nano": spec(CaiT, dim=48, depth=4, class_depth=2, heads=4, patch=4, img_size=28, layer_scale=0.1, init_std=None),
    "xxs24": XXS24, "xxs24_384": XXS24.but(img_size=384),
    "xxs36": XXS36, "xxs36_384": XXS36.but(img_size=384),
    "xs24": XS24, "xs24_384": XS24.but(img_size=384),
    "xs36": XS36, "xs36_384": XS36.but(img_size=384),
    "s24": S24, "s24_384": S24.but(img_size=384),
    "s36": S36, "s36_384": S36.but(img_size=384),
    "s48": S48, "s48_384": S48.but(img_size=384),
    "m24": M24, "m24_384": M24.but(img_size=384),
    "m36": M36, "m36_384": M36.but(img_size=384), "m36_448": M36.but(img_size=448),
    "m48_448": M48.but(img_size=448),
}


def _stage(theirs: str, ours: str) -> list[Any]:
    return [
        rule(f"{theirs}.norm1.*", f"{ours}.mixer.norm.*"),
        *[rule((f"{theirs}.attn.k.{kind}", f"{theirs}.attn.v.{kind}"), f"{ours}.mixer.inner.kv.{kind}", FUSE_PAIR)
          for kind in ("weight", "bias") if "token" in theirs],
        rule(f"{theirs}.attn.*", f"{ours}.mixer.inner.*"),
        rule(f"{theirs}.gamma_1", f"{ours}.mixer.scale"),
        rule(f"{theirs}.norm2.*", f"{ours}.channel.norm.*"),
        rule(f"{theirs}.mlp.*", f"{ours}.channel.inner.*"),
        rule(f"{theirs}.gamma_2", f"{ours}.channel.scale"),
    ]


NAMES = keymap(
    rule("cls_token", "class_stage.resample.cls"),
    rule("pos_embed", "embedding.position.table"),
    rule("patch_embed.proj.*", "embedding.proj.*"),
    *_stage("blocks.{i}", "stages.0.layers.{i}"),
    *_stage("blocks_token_only.{i}", "class_stage.layers.{i}"),
    rule("norm.*", "norm.*"),
    rule("head.*", "head.*"),
)
KEYS = {"timm": NAMES, "authors": NAMES}  # the authors' files have "module." before each name


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but where the factors start. Square images."""
    dim, in_chans, patch, patch_w = state["embedding.proj.weight"].shape
    side = round(state["embedding.position.table"].shape[1] ** 0.5)
    ratio = told_ratio(state["stages.0.layers.0.channel.inner.fc1.weight"].shape[0], dim)
    found: dict[str, Any] = {
        "dim": dim, "patch": patch if patch == patch_w else (patch, patch_w), "in_chans": in_chans,
        "img_size": side * patch if patch == patch_w else (side * patch, side * patch_w),
        "depth": count(state, "stages.0.layers.{i}.mixer.norm.weight"),
        "class_depth": count(state, "class_stage.layers.{i}.mixer.norm.weight"),
        "heads": state["stages.0.layers.0.mixer.inner.proj_l.weight"].shape[0],
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "channel": spec(Mlp) if ratio == 4 else spec(Mlp, ratio=ratio),
    }
    return found if "stages.0.layers.0.mixer.scale" in state else found | {"layer_scale": None}
