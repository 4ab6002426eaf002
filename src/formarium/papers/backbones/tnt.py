"""Transformer in Transformer (Han et al., NeurIPS 2021), arXiv 2103.00112.

New: patches are sentences, and the pixels in them words. Each layer first lets the words of every sentence attend to each
other (Eqs. 5, 6, weights shared by all sentences), then adds them, projected, to their sentence (Eq. 7), then lets the
sentences attend to each other (Eqs. 8, 9). Words have positions within their sentence, shared by all sentences; sentences
have positions as ViT's (section 2.3).

Decisions, after the released code: words come from each patch on its own, by a 7x7 convolution of stride 4 that pads each
patch with zeros; the projection has a norm before it over all words of a sentence, one after it, and no bias; queries, keys
and values have no biases. `legacy` is the first release, which timm keeps: the convolution runs over the whole image, the
norm over each word, and the projection has a bias and no norm after it. Where the tensors do not tell the stride of the
words, 4 is taken. No size of the released models needs the rounding of widths that the code has. The paper's gate
(squeeze and excitation), which no released model has, is left out.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Feature
from ...core.part import Part
from ...core.spec import spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import PatchEmbed, to_tokens
from ...parts.norm import LayerNorm, NoNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import Assumed, Op, State, as_preset, count, drop, keymap, rule, told_ratio

NORM = spec(LayerNorm, eps=1e-5)

CARD = Card(
    title="Transformer in Transformer",
    authors="Kai Han, An Xiao, Enhua Wu, Jianyuan Guo, Chunjing Xu, Yunhe Wang",
    venue="NeurIPS 2021",
    arxiv="2103.00112",
    year=2021,
    code="https://github.com/huawei-noah/Efficient-AI-Backbones",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention within patches"),
    claim="Attention inside patches beside attention among them: TNT-S reaches 81.5 % ImageNet top-1, 1.7 % more than "
          "DeiT-S at a similar cost.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=6.1e6, macs=1.4e9, input=(3, 224, 224), results={"ImageNet top-1": 73.9},
                          note="quoted from memory"),
        "small": Published(params=23.8e6, macs=5.2e9, input=(3, 224, 224), results={"ImageNet top-1": 81.5}),
        "base": Published(params=65.6e6, macs=14.1e9, input=(3, 224, 224), results={"ImageNet top-1": 82.9}),
        "small_legacy": Published(params=23.76e6, input=(3, 224, 224), note="parameters as timm counts them"),
    },
)


def cut(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b*n c p q"]:
    """Patches of this size, row by row."""
    p, q = size
    return x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


class Gather(nn.Module):
    """The words of each sentence, side by side, as a vector of the sentence's width.

    legacy: the norm before is each word's, and there is a bias and none after.
    """

    def __init__(self, words: int, word_dim: int, dim: int, *, bias: bool, legacy: bool = False) -> None:
        super().__init__()
        self.norm1 = NORM(word_dim if legacy else words * word_dim)
        self.proj = linear(words * word_dim, dim, bias=bias)
        self.norm2 = None if legacy else NORM(dim)

    def forward(self, words: Float[Tensor, "b*n m c"], batch: int) -> Float[Tensor, "b n d"]:
        side_by_side = words.reshape(batch, -1, self.proj.in_features)
        if self.norm2 is None:
            return self.proj(self.norm1(words).view_as(side_by_side))
        return self.norm2(self.proj(self.norm1(side_by_side)))


class WordEmbed(PatchEmbed):
    """Images to sentences, class token before; their words (B * N, m, word_dim) are the memory of the Ctx."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, word_dim: int, patch: int, stride: int, img_size: int | Sequence[int],
                 legacy: bool) -> None:
        if patch % stride:
            raise DoesNotFit(f"a patch of {patch} pixels holds no whole number of words that are {stride} apart; "
                             "take a stride that divides it")
        super().__init__(in_chans, dim, patch=patch, img_size=img_size, class_token=True, position=spec(LearnedPosition))
        side = patch // stride
        self.legacy, self.stride, self.word_grid = legacy, stride, (side, side)
        self.proj = nn.Conv2d(in_chans, word_dim, 7, stride, 3)
        self.word_position = LearnedPosition(word_dim, side**2, grid=self.word_grid)
        self.gather = Gather(side**2, word_dim, dim, bias=True)

    def tokens(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        h, w = self.check(x)
        maps = cut(self.proj(x), self.word_grid) if self.legacy else self.proj(cut(x, self.patch))
        told = Ctx(grid=self.word_grid)
        words = self.word_position(to_tokens(maps).contiguous(), told)  # contiguous once, or every norm would copy them
        sentences = torch.cat((self.cls.expand(len(x), -1, -1), self.gather(words, len(x))), dim=1)
        return sentences, replace(ctx, grid=(h // self.patch[0], w // self.patch[1]), prefix=1, memory=(words, told))


class Words(Part):
    """The inner Transformer of a layer: words (B * N, m, word_dim) -> words, for all sentences in one call."""

    def __init__(self, dim: int, place: Place, *, words: int, word_dim: int, heads: int, ratio: float, qkv_bias: bool,
                 drop_path: float, legacy: bool) -> None:
        super().__init__(dim, place)
        attention = Attention(word_dim, place, heads=heads, qkv_bias=qkv_bias)
        self.mixer = PreNorm(word_dim, place, attention, norm=NORM, drop_path=drop_path)
        self.channel = PreNorm(word_dim, place, Mlp(word_dim, place, ratio=ratio), norm=NORM, drop_path=drop_path)
        self.gather = Gather(words, word_dim, dim, bias=legacy, legacy=legacy)

    def forward(self, x: Float[Tensor, "b*n m c"], ctx: Ctx) -> Float[Tensor, "b*n m c"]:
        return self.channel(self.mixer(x, ctx), ctx)


class Nested(PreNorm):
    """PreNorm for sentences, with the words beside them: the state is (words, sentences); the words begin as the memory."""

    def __init__(self, dim: int, place: Place, inner: Part, *, drop_path: float = 0.0) -> None:
        super().__init__(dim, place, inner, norm=spec(NoNorm) if isinstance(inner, Words) else NORM, drop_path=drop_path)

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return None, x

    def forward(self, state: Any, ctx: Ctx) -> Any:
        words, x = state
        if not isinstance(self.inner, Words):
            return words, super().forward(x, ctx)
        assert ctx.memory is not None
        first, told = ctx.memory
        words = self.inner(first if words is None else words, told)
        cls, sentences = x[:, :ctx.prefix], x[:, ctx.prefix:]
        return words, torch.cat((cls, sentences + self.inner.gather(words, len(x))), dim=1)  # Eq. 7; the class has no words

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return state[1]


class TNT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    dim, heads: of the sentences; word_dim, word_heads: of the words, `stride` pixels apart. legacy: as first released.
    init_std: of the linear layers, the authors' 0.02; None: Xavier, which small widths need.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 16, stride: int = 4, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 384, word_dim: int = 24, depth: int = 12, heads: int = 6,
                 word_heads: int = 4, ratio: float = 4.0, qkv_bias: bool = False, legacy: bool = False,
                 drop_path: float = 0.0, init_std: float | None = 0.02) -> None:
        embed = WordEmbed(in_chans, dim, word_dim=word_dim, patch=patch, stride=stride, img_size=img_size, legacy=legacy)
        words = spec(Words, words=embed.word_position.tokens, word_dim=word_dim, heads=word_heads, ratio=ratio,
                     qkv_bias=qkv_bias, drop_path=drop_path, legacy=legacy)
        sublayers = {"words": words, "mixer": spec(Attention, heads=heads, qkv_bias=qkv_bias),
                     "channel": spec(Mlp, ratio=ratio)}
        super().__init__(embed, [Stage(dim, depth, sublayers, spec(Nested, drop_path=drop_path))], img_size=img_size,
                         norm=NORM, num_classes=num_classes, pool="token")
        restart_linears(self, init_std)
        nn.init.trunc_normal_(embed.cls, std=0.02)
        start_residuals(self)

    def word_features(self, batch: Float[Tensor, "b c h w"]) -> Feature:
        """The words after the last layer, as a map (B, word_dim, H / stride, W / stride) of the whole image."""
        x, ctx = self.embed(batch)
        state: Any = (None, x)
        for layer in self.stages[0].layers:
            for sublayer in layer.values():
                state = sublayer(state, ctx)
        (gh, gw), (h, w) = ctx.need_grid(self, prefix=True), self.embedding.word_grid
        maps = state[0].unflatten(1, (h, w)).unflatten(0, (-1, gh, gw))  # (B, gh, gw, h, w, c)
        return Feature(maps.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), self.embedding.stride)


PRESETS = {
    "nano": spec(TNT, dim=48, word_dim=12, depth=4, heads=4, word_heads=2, patch=4, stride=2, img_size=28, init_std=None),
    "tiny": spec(TNT, dim=192, word_dim=12, heads=3, word_heads=2),
    "small": spec(TNT),
    "base": spec(TNT, dim=640, word_dim=40, heads=10),
    "small_legacy": spec(TNT, legacy=True),
}

FUSE_QK_V = Op(lambda t, o: [torch.cat(t)], lambda t, o: list(t[0].split((len(t[0]) // 3 * 2, len(t[0]) // 3))))
AS_MAP = Op(lambda t, o: [to_tokens(t[0])],  # timm's positions of the words are a map
            lambda t, o: [t[0].mT.unflatten(2, (isqrt(t[0].shape[1]), -1))])
OURS = "stages.0.layers.{i}"


def _names(words: str, sentences: str, embed: str, norm: str) -> list[Any]:
    """words, sentences: what norms, attention and MLP of each are called; norm: the first and the second of `Gather`."""
    rules = [rule("cls_token", "embedding.cls"), rule(f"{embed}.proj.*", "embedding.proj.*")]
    for theirs, ours in (("", "embedding.gather."), ("blocks.{i}.", f"{OURS}.words.inner.gather.")):
        rules += [rule(f"{theirs}{norm.format(n)}.*", f"{ours}norm{n}.*") for n in (1, 2)]
        rules += [rule(f"{theirs}proj.*", f"{ours}proj.*")]
    for names, ours in ((words, f"{OURS}.words.inner"), (sentences, OURS)):
        norm1, attention, norm2, mlp = (f"blocks.{{i}}.{x}" for x in names.split())
        rules += [rule(f"{norm1}.*", f"{ours}.mixer.norm.*"),
                  *[rule((f"{attention}.qk.{kind}", f"{attention}.v.{kind}"), f"{ours}.mixer.inner.qkv.{kind}", FUSE_QK_V)
                    for kind in ("weight", "bias")],
                  rule(f"{attention}.proj.*", f"{ours}.mixer.inner.proj.*"),
                  rule(f"{norm2}.*", f"{ours}.channel.norm.*"), rule(f"{mlp}.*", f"{ours}.channel.inner.*")]
    return [*rules, rule("norm.*", "norm.*"), rule("head.*", "head.*")]


KEYS = {
    "timm": keymap(
        rule("patch_pos", "embedding.position.table"), rule("pixel_pos", "embedding.word_position.table", AS_MAP),
        *_names("norm_in attn_in norm_mlp_in mlp_in", "norm_out attn_out norm_mlp mlp", "pixel_embed", "norm{}_proj")),
    "authors": keymap(
        rule("outer_pos", "embedding.position.table"), rule("inner_pos", "embedding.word_position.table"),
        drop("outer_tokens", "zeros that nothing reads",
             made=("embedding.position.table", lambda table, state, o: torch.zeros_like(table[:, 1:]))),
        *_names("inner_norm1 inner_attn inner_norm2 inner_mlp", "outer_norm1 outer_attn outer_norm2 outer_mlp",
                "patch_embed", "proj_norm{}"),
        without={"small_legacy": "as first released, under the names that timm has kept"}),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads and the size of patches in pixels, with it the image's. Square images."""
    dim, (word_dim, in_chans, _, _) = state["embedding.cls"].shape[-1], state["embedding.proj.weight"].shape
    words = state["embedding.word_position.table"].shape[1]
    sizes = {"dim": dim, "word_dim": word_dim}
    stride = as_preset(PRESETS, "stride", 4, **sizes)
    patch = isqrt(words) * stride.value
    side = isqrt(state["embedding.position.table"].shape[1] - 1)
    first = f"{OURS.format(i=0)}.words.inner"
    ratio = told_ratio(state[f"{first}.channel.inner.fc1.weight"].shape[0], word_dim)
    return {
        **sizes, "in_chans": in_chans, "stride": stride, "patch": Assumed(patch, stride.why),
        "img_size": Assumed(side * patch, stride.why), "depth": count(state, f"{OURS}.mixer.norm.weight"),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), **sizes),
        "word_heads": as_preset(PRESETS, "word_heads", 4 if word_dim % 4 == 0 else 1, **sizes),
        "ratio": ratio, "qkv_bias": f"{first}.mixer.inner.qkv.bias" in state,
        "legacy": f"{first}.gather.norm2.weight" not in state,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
