"""Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet (Yuan et al., ICCV 2021), arXiv 2101.11986.

New: an image becomes tokens step by step. Windows of the map that overlap are unfolded, each into one long token (soft
split, Eq. 3); a small Transformer layer relates all of them and narrows them (Eq. 1); they are put back as a map (Eq. 2),
and so on. After the last split a linear layer gives the tokens of a plain, deep and narrow ViT (Eq. 4, 5) with fixed
sinusoids as positions.

Decisions: `tokens` says what relates the tokens: "performer", linear attention by positive random features (FAVOR+, arXiv
2009.14794), 32 of them for 64 channels; "transformer", softmax attention whose scores are divided by the square root of the
width that comes in; or "convolution", the paper's comparison, without attention. The skip around the attention takes the
values, as the width changes there. The authors drop 0.1 of the performer's branches in training: `token_drop`. Random
features and sinusoids are stored and not trained; the authors count them as parameters, we do not. The released weights
were trained with scores times dim ** -0.5, the code's default is that of a head: give `qk_scale=dim**-0.5` for them
(512 ** -0.5 for 14_wide). Soft splits of stride s have windows of 2s - 1. Not here: the dense, squeeze-and-excitation and
ghost variants of section 3.2, and the model trained with token labels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear
from ...parts.embed import check_images, check_multiple, pair, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.adapt import Change, fold_channels, refit_kernel
from ...weights.keys import Assumed, State, as_preset, count, keymap, rule, told_ratio
from .vit import OURS, plain_rules

NORM = spec(LayerNorm, eps=1e-5)

CARD = Card(
    title="Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
    authors="Li Yuan, Yunpeng Chen, Tao Wang, Weihao Yu, Yujun Shi, Zihang Jiang, Francis E.H. Tay, Jiashi Feng, "
            "Shuicheng Yan",
    venue="ICCV 2021",
    arxiv="2101.11986",
    year=2021,
    code="https://github.com/yitu-opensource/T2T-ViT",
    licence="Clear BSD (code; the weights are released with it)",
    kind="backbone",
    domain="image",
    tags=("attention", "plain", "linear attention", "tokens"),
    claim="From scratch on ImageNet T2T-ViT-14 has 81.5 % top-1 with 21.5 M parameters (83.3 % at 384 pixels), over 3 "
          "points more than a ViT of its cost, and more than ResNets.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "7": Published(params=4.26e6, input=(3, 224, 224), results={"ImageNet top-1": 71.7},
                       note="4.3 M in the authors' table with what is not trained; 1.1 G MACs there, rounded"),
        "10": Published(params=5.83e6, macs=1.5e9, input=(3, 224, 224), results={"ImageNet top-1": 75.2},
                        note="5.9 M in the authors' table with what is not trained"),
        "12": Published(params=6.9e6, macs=1.8e9, input=(3, 224, 224), results={"ImageNet top-1": 76.5}),
        "14": Published(params=21.5e6, macs=4.8e9, input=(3, 224, 224), results={"ImageNet top-1": 81.5}),
        "19": Published(params=39.2e6, macs=8.5e9, input=(3, 224, 224), results={"ImageNet top-1": 81.9}),
        "24": Published(params=64.1e6, macs=13.8e9, input=(3, 224, 224), results={"ImageNet top-1": 82.3}),
        "14_384": Published(params=21.5e6, input=(3, 384, 384), results={"ImageNet top-1": 83.3},
                            note="21.7 M in the authors' table with the sinusoids of 577 tokens, which are not trained"),
        "t_14": Published(params=21.5e6, macs=6.1e9, input=(3, 224, 224), results={"ImageNet top-1": 81.7}),
        "t_19": Published(params=39.2e6, macs=9.8e9, input=(3, 224, 224), results={"ImageNet top-1": 82.4}),
        "t_24": Published(params=64.1e6, macs=15.0e9, input=(3, 224, 224), results={"ImageNet top-1": 82.6}),
        "c_14": Published(note="convolutions as token layers, the paper's comparison; no released weights"),
        "14_resnext": Published(note="32 heads, as ResNeXt has groups"),
        "14_wide": Published(note="wide and shallow, as Wide ResNets are"),
    },
)


class Sinusoids(LearnedPosition):
    """Sines and cosines of the place in the sequence, stored as the authors' files have them; not trained."""

    def __init__(self, dim: int, tokens: int, *, grid: tuple[int, ...] | None = None, prefix: int = 0) -> None:
        super().__init__(dim, tokens, grid=grid, prefix=prefix)
        angle = np.arange(tokens)[:, None] / 10000.0 ** (np.arange(dim) // 2 * 2 / dim)
        angle[:, ::2], angle[:, 1::2] = np.sin(angle[:, ::2]), np.cos(angle[:, 1::2])
        del self.table
        self.register_buffer("table", torch.tensor(angle[None], dtype=torch.float32))


class TokenLayer(nn.Module):
    """tokens (B, N, dim) -> (B, N, out_dim): values + attention, then x + MLP, each normed before. Base of two kinds."""

    def __init__(self, dim: int, out_dim: int, *, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1, self.norm2 = NORM(dim), NORM(out_dim)
        self.proj = linear(out_dim, out_dim)
        self.mlp = Mlp(out_dim, Place(), ratio=1.0)

    def attention(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """The values, and what is read of them."""
        raise TypeError(f"{type(self).__name__} must define attention")

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        v, read = self.attention(self.norm1(x))
        x = v + F.dropout(self.proj(read), self.drop, self.training)
        return x + F.dropout(self.mlp(self.norm2(x), Ctx()), self.drop, self.training)


class TokenTransformer(TokenLayer):
    """One head of softmax attention, scaled for the width that comes in."""

    def __init__(self, dim: int, out_dim: int, *, drop: float = 0.0) -> None:
        super().__init__(dim, out_dim, drop=drop)
        self.qkv = linear(dim, 3 * out_dim, bias=False)

    def attention(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, dim=-1))
        return v[:, 0], attend(q, k, v, scale=x.shape[-1] ** -0.5)[:, 0]


class TokenPerformer(TokenLayer):
    """Linear attention: exp(q.k) as a product of positive random features, phi(z) = exp(W z - |z|^2 / 2) / sqrt(m)."""

    def __init__(self, dim: int, out_dim: int, *, drop: float = 0.0) -> None:
        super().__init__(dim, out_dim, drop=drop)
        self.kqv = linear(dim, 3 * out_dim)
        features = max(1, out_dim // 2)
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, out_dim)) * math.sqrt(features))

    def features(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n m"]:
        z, w = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (z, self.w))
        return (z @ w.t() - z.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))

    def attention(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        k, q, v = self.kqv(x).chunk(3, dim=-1)
        keys, queries = self.features(k), self.features(q)
        read = queries @ (keys.transpose(1, 2) @ v.to(keys.dtype))
        mass = queries @ keys.sum(1)[..., None]
        return v, (read / (mass + 1e-8)).to(v.dtype)


TOKENS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(Resample):
    """Images to tokens by soft splits of these strides with a token layer between them; class token, positions.

    tokens: "performer", "transformer" or "convolution". token_dim: width between the splits.
    """

    undecayed = ("cls",)
    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int, *, img_size: int | Sequence[int], tokens: str = "performer",
                 token_dim: int = 64, strides: tuple[int, ...] = (4, 2, 2), token_drop: float = 0.0) -> None:
        super().__init__()
        if tokens not in (*TOKENS, "convolution"):
            raise unknown("kind of token layers", tokens, (*TOKENS, "convolution"))
        if not strides or min(strides) < 1:
            raise DoesNotFit(f"strides are one whole number for each soft split, got {strides}")
        self.in_chans, self.img_size, self.strides = in_chans, pair(img_size), strides
        self.step = (math.prod(strides),) * 2
        check_multiple(self.img_size, self.step, "soft splits")
        grid = (self.img_size[0] // self.step[0], self.img_size[1] // self.step[1])
        widths = (in_chans, *(token_dim,) * (len(strides) - 1))
        self.layers = nn.ModuleList()
        self.project: nn.Module
        if tokens == "convolution":
            outs = (*(token_dim,) * (len(strides) - 1), dim)
            convolutions = [nn.Conv2d(i, o, 2 * s - 1, s, s // 2) for i, o, s in zip(widths, outs, strides, strict=True)]
            self.layers.extend(convolutions[:-1])
            self.project = convolutions[-1]
        else:
            sizes = [c * (2 * s - 1) ** 2 for c, s in zip(widths, strides, strict=True)]
            self.layers.extend(TOKENS[tokens](size, token_dim, drop=token_drop) for size in sizes[:-1])
            self.project = linear(sizes[-1], dim)
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.cls, std=0.02)
        self.position = Sinusoids(dim, 1 + math.prod(grid), grid=grid, prefix=1)

    def refit(self, name: str, tensor: Tensor | None, was: "TokensToToken") -> Change | None:
        """Other channels: of a convolution, and of the first token layer, whose norm and projection unfold them."""
        if tensor is None or not name.startswith(("layers.0.", "project.")) or was.in_chans == self.in_chans:
            return None
        first = self.state_dict()[name]
        if tensor.ndim == 4:
            return refit_kernel(tensor, first.shape)
        if tensor.shape == first.shape:
            return None
        unfolded = tensor.reshape(-1, was.in_chans, (2 * self.strides[0] - 1) ** 2)
        made = fold_channels(unfolded, self.in_chans)
        if tensor.ndim == 1:
            made = made / fold_channels(torch.ones_like(unfolded), self.in_chans)  # of a norm: their mean
        return Change(made.reshape(first.shape), f"{was.in_chans} channels folded or shared out to {self.in_chans}, which "
                      "is not exact behind a norm")

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x = self.split(x)
        ctx = replace(ctx, grid=(x.shape[2], x.shape[3]), prefix=ctx.prefix + 1)
        return self.position(torch.cat((self.cls.expand(x.shape[0], -1, -1), to_tokens(x)), dim=1), ctx), ctx

    def split(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The tokens as a map, before class token and positions."""
        check_images(x, self.in_chans)
        size = (x.shape[2], x.shape[3])
        if size != self.img_size:
            raise DoesNotFit(f"built for images {self.img_size[0]}x{self.img_size[1]}, got {size[0]}x{size[1]}; "
                             "resize them, or build the model with img_size=")
        for layer, s in zip((*self.layers, self.project), self.strides, strict=True):
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
            else:  # soft split, Transformer, and back to a map
                grid = [-(-n // s) for n in x.shape[2:]]
                x = layer(F.unfold(x, 2 * s - 1, padding=s // 2, stride=s).transpose(1, 2))
                x = x.transpose(1, 2).unflatten(2, grid)
        return x


class T2TViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    qk_scale: of the scores, 1 / sqrt(width of a head) unless given; the released weights want dim ** -0.5.
    tokens, token_dim, strides, token_drop: of `TokensToToken`.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, in_chans: int = 3, num_classes: int = 1000, dim: int = 384,
                 depth: int = 14, heads: int = 6, ratio: float = 3.0, qk_scale: float | None = None,
                 tokens: str = "performer", token_dim: int = 64, strides: tuple[int, ...] = (4, 2, 2),
                 token_drop: float = 0.0, drop_path: float = 0.0, mixer: Spec[Part] = spec(Attention, qkv_bias=False),
                 channel: Spec[Part] = spec(Mlp), residual: Spec[Residual] = spec(PreNorm)) -> None:
        embed = TokensToToken(in_chans, dim, img_size=img_size, tokens=tokens, token_dim=token_dim, strides=strides,
                              token_drop=token_drop)
        mixer = mixer.offer(heads=heads)
        if qk_scale is not None:
            mixer = mixer.require("qk_scale= is a factor on its scores", scale=qk_scale)
        sublayers = {"mixer": mixer, "channel": channel.offer(ratio=ratio)}
        stage = Stage(dim, depth, sublayers, residual.offer(norm=NORM, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=NORM, num_classes=num_classes, pool="token")


LITE = spec(T2TViT, dim=256, heads=4, ratio=2.0)
BASE = spec(T2TViT)
PRESETS = {
    "nano": spec(T2TViT, dim=64, depth=4, heads=4, ratio=2.0, token_dim=16, strides=(2, 2), img_size=28),
    "7": LITE.but(depth=7),
    "10": LITE.but(depth=10),
    "12": LITE.but(depth=12),
    "14": BASE,
    "19": BASE.but(dim=448, depth=19, heads=7),
    "24": BASE.but(dim=512, depth=24, heads=8),
    "14_384": BASE.but(img_size=384),
    "t_14": BASE.but(tokens="transformer"),
    "t_19": BASE.but(dim=448, depth=19, heads=7, tokens="transformer"),
    "t_24": BASE.but(dim=512, depth=24, heads=8, tokens="transformer"),
    "c_14": BASE.but(tokens="convolution"),
    "14_resnext": BASE.but(heads=32),
    "14_wide": BASE.but(dim=768, depth=4, heads=12),
}


def _token_rules(theirs: str, ours: str) -> list[Any]:
    """Both kinds have `proj` and an MLP, under other names; so these go with what only one kind has."""
    mlp = [(f"mlp.{a}.{kind}", f"mlp.{b}.{kind}") for a, b in (("0", "fc1"), ("2", "fc2")) for kind in ("weight", "bias")]
    return [rule([f"{theirs}.kqv.weight", *(f"{theirs}.{a}" for a, _ in mlp)],
                 [f"{ours}.kqv.weight", *(f"{ours}.{b}" for _, b in mlp)]),
            rule([f"{theirs}.attn.{x}" for x in ("qkv.weight", "proj.weight", "proj.bias")],
                 [f"{ours}.{x}" for x in ("qkv.weight", "proj.weight", "proj.bias")]),
            *[rule(f"{theirs}.{x}.*", f"{ours}.{x}.*") for x in ("norm1", "norm2", "kqv", "proj", "mlp")],
            rule(f"{theirs}.w", f"{ours}.w")]


KEYS = {"authors": keymap(
    *[r for n in range(4) for r in _token_rules(f"tokens_to_token.attention{n + 1}", f"embedding.layers.{n}")],
    *[rule(f"tokens_to_token.soft_split{n}.{kind}", f"embedding.layers.{n}.{kind}")
      for n in range(4) for kind in ("weight", "bias")],
    rule("tokens_to_token.project.*", "embedding.project.*"),
    *plain_rules(),
)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but heads, strides, what is dropped and the scale of scores; square images."""
    project, first = state["embedding.project.weight"], f"{OURS}.channel.inner.fc1.weight".format(i=0)
    dim, depth, layers = len(project), count(state, f"{OURS}.mixer.norm.weight"), 0
    while any(k.startswith(f"embedding.layers.{layers}.") for k in state):
        layers += 1
    strides = (4, *(2,) * layers) if layers > 1 else (2,) * (layers + 1)
    window = (2 * strides[0] - 1) ** 2
    if project.ndim == 4:
        tokens, token_dim = "convolution", project.shape[1]
        in_chans = state["embedding.layers.0.weight"].shape[1] if layers else token_dim
        strides = (strides[0], *(project.shape[-1] // 2 + 1,) * layers)
    else:
        tokens = "transformer" if "embedding.layers.0.qkv.weight" in state else "performer"
        token_dim = len(state["embedding.layers.0.proj.weight"])
        in_chans = len(state["embedding.layers.0.norm1.weight"]) // window
    side = round((state["embedding.position.table"].shape[1] - 1) ** 0.5) * math.prod(strides)
    return {
        "dim": dim, "depth": depth, "in_chans": in_chans, "tokens": tokens, "token_dim": token_dim, "img_size": side,
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim, depth=depth),
        "ratio": told_ratio(len(state[first]), dim),
        "strides": Assumed(strides, "leave no trace; the first is 4 where there are three, as the authors have it"),
        "qk_scale": Assumed(None, "leaves no trace; the released weights want qk_scale=dim**-0.5, 512**-0.5 the wide one"),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
