"""Toward a Deeper Understanding: RetNet Viewed through Convolution (Li, Zhang, Pattern Recognition 2024), arXiv 2309.05375.

New: attention whose scores are multiplied by a mask over pairs of tokens, as RetNet does in one dimension, which for a
mask of constant diagonals is an element-wise convolution. ELM: the mask is learned, a number for each pair. GMM: it is a
mixture of Gaussians of the distance d on the grid, M = sum_k alpha_k exp(-d^2 / (2 sigma_k^2)), two numbers for each head
and kernel: softmax(M * q k^T / sqrt(d_h)) v.

Decisions, after the authors' code: the mask comes before the softmax (the paper finds little difference); 1e-5 is added to
sigma^2; five kernels; one ELM serves all heads and starts at zero, where attention is a plain mean. Their base
exp(-d^2) is rounded to zero from distances of 10 tokens up, whatever sigma; the formula is kept here. Masked models drop
the class token and take the norm of the mean. Tokens before the grid, in hosts that have them, are not masked. Their ViT
is plain but for projections of q, k, v without a bias; it is this library's ViT. The numbers of the mask depend on the
offset alone, so exponentials are taken for H*W offsets, not for all pairs. Any `Attention` on a grid takes a mask, talking
heads too, which mix masked scores; windows take it as `mixer="masked_window"`, before the bias of offsets.

The paper's other hosts are small forms of their namesakes, here as their code has them. Swin adds learned positions to its
patches. CaiT has heads of 64 whatever its width, and no biases in projections and mixes; its class token reads the patches
alone, as they are, by talking heads. The 5.1 M and 305.9 M MACs of the table are those of the code's "cait-tiny", of width
108; the code's own "cait", of width 192, is `cait_w192`. PiT's patches do not overlap, its class token has a position, and
each pooling has a pointwise convolution after it. T2T-ViT is masked in its token layers too, has no class token, and its
attention adds what it reads to its normed input. Their code builds ELM for no Swin; here it has a number for each pair in
a window.
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
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part
from ...core.spec import Spec, spec
from ...parts.attend import visible
from ...parts.attention import Attention, join_heads, split_heads
from ...parts.channel import Mlp, linear
from ...parts.embed import PatchEmbed, pair, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, ScorePosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import (
    TRANSPOSE,
    Assumed,
    KeyMap,
    Make,
    Op,
    Options,
    Passed,
    Rule,
    State,
    as_preset,
    count,
    drop,
    keymap,
    rule,
    told_ratio,
)
from ..backbones import cait, swin, t2t_vit, vit
from ..backbones.cait import CaiT, ClassAlone, TalkingHeads
from ..backbones.pit import TokenPooling
from ..backbones.swin import Swin, WindowAttention
from ..backbones.t2t_vit import Sinusoids, TokensToToken, TokenTransformer
from ..backbones.vit import ViT

CARD = Card(
    title="Toward a Deeper Understanding: RetNet Viewed through Convolution",
    authors="Chenghao Li, Chaoning Zhang",
    venue="Pattern Recognition 2024",
    arxiv="2309.05375",
    year=2023,
    code="https://github.com/CatworldLee/Gaussian-Mixture-Mask-Attention",
    licence="none stated; no weights are released",
    kind="position",
    domain="image",
    tags=("mask", "locality", "small data", "RetNet"),
    claim="A mixture of Gaussians of the distance, multiplied to the scores, lifts a small ViT on CIFAR-100 from 75.36 to "
          "77.81 % and on Tiny-ImageNet from 59.89 to 62.27 %, at almost no parameters.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "vit": Published(params=2.7e6, input=(3, 32, 32),
                         results={"CIFAR-10 top-1": 95.06, "CIFAR-100 top-1": 77.81, "SVHN top-1": 98.01},
                         note="of 100 classes; 170.9 M MACs in the paper leave out the two products of attention, with "
                              "which they are 8 % more"),
        "vit_64": Published(input=(3, 64, 64), results={"Tiny-ImageNet top-1": 62.27}, note="patches of 8, 200 classes"),
        "vit_elm": Published(input=(3, 32, 32), note="the element-wise mask that the paper begins with"),
        "vit_d6": Published(input=(3, 32, 32), note="in the code"),
        "vit_d15": Published(input=(3, 32, 32), note="in the code"),
        "vit_d30": Published(input=(3, 32, 32), note="in the code"),
        "vit_d30_w108": Published(input=(3, 32, 32), note="in the code, d30*"),
        "vit_d30_w192": Published(input=(3, 32, 32), note="in the code, d30**"),
        "vit_d60": Published(input=(3, 32, 32), note="in the code"),
        "swin": Published(params=7.1e6, macs=236.9e6, input=(3, 32, 32),
                          results={"CIFAR-10 top-1": 95.39, "CIFAR-100 top-1": 78.26, "SVHN top-1": 97.90}),
        "swin_64": Published(input=(3, 64, 64), results={"Tiny-ImageNet top-1": 61.03}, note="patches of 4, 200 classes"),
        "cait": Published(params=5.1e6, input=(3, 32, 32),
                          results={"CIFAR-10 top-1": 95.15, "CIFAR-100 top-1": 78.97, "SVHN top-1": 98.09},
                          note="the code's cait-tiny; 305.9 M MACs in the paper, without the products of attention"),
        "cait_64": Published(input=(3, 64, 64), results={"Tiny-ImageNet top-1": 63.64}, note="patches of 8, 200 classes"),
        "cait_w192": Published(input=(3, 32, 32), note="in the code, where it is called cait"),
        "pit": Published(params=7.0e6, input=(3, 32, 32),
                         results={"CIFAR-10 top-1": 94.41, "CIFAR-100 top-1": 74.16, "SVHN top-1": 97.82},
                         note="239.1 M MACs in the paper, without the products of attention"),
        "pit_64": Published(input=(3, 64, 64), results={"Tiny-ImageNet top-1": 58.37}, note="patches of 4, 200 classes"),
        "t2t": Published(params=6.5e6, input=(3, 32, 32),
                         results={"CIFAR-10 top-1": 96.16, "CIFAR-100 top-1": 79.91, "SVHN top-1": 97.98},
                         note="417.4 M MACs in the paper, without the products of attention"),
        "t2t_64": Published(input=(3, 64, 64), results={"Tiny-ImageNet top-1": 63.33}, note="three splits, 200 classes"),
    },
    hosts=("gmm_mask/nano",),
)

PARTS = {
    "position": {"elm": "ELM"},
    "mixer": {"masked_window": "MaskedWindows"},
}

NORM = spec(LayerNorm, eps=1e-5)
HALF = spec(Mlp, ratio=2.0)  # of the usual width


class Mask(ScorePosition):
    """Multiplies the scores of tokens on a grid; those before the grid are left as they are."""

    def mask(self, ctx: Ctx) -> Float[Tensor, "h n n"]:
        """By which the scores of grid tokens are multiplied; one, or each head's own."""
        raise TypeError(f"{type(self).__name__} must define mask")

    def weigh(self, scores: Float[Tensor, "*b h n n"], ctx: Ctx) -> Float[Tensor, "*b h n n"]:
        return scores * F.pad(self.mask(ctx), (ctx.prefix, 0, ctx.prefix, 0), value=1.0)

    def attend(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], ctx: Ctx, *,
               causal: bool, window: int | None, scale: float | None) -> Float[Tensor, "b h n d"]:
        scores = self.weigh((q * (self.head_dim**-0.5 if scale is None else scale)) @ k.transpose(-2, -1), ctx)
        if causal or window is not None:
            scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], causal, window, q.device), float("-inf"))
        if ctx.mask is not None:
            scores = scores.masked_fill(~ctx.mask, float("-inf"))
        return scores.softmax(-1) @ v


class GMM(Mask):
    """M_ij = sum_k alpha_k exp(-d_ij^2 / (2 sigma_k^2)) for each head; d_ij: tokens between i and j on the grid.

    kernels: Gaussians of the mixture.
    """

    def __init__(self, head_dim: int, heads: int, *, kernels: int = 5) -> None:
        super().__init__(head_dim, heads)
        if kernels < 1:
            raise DoesNotFit(f"a mixture has 1 kernel or more, got {kernels}")
        self.sigma = nn.Parameter(torch.randn(kernels, heads) * 10 + 10)
        self.alpha = nn.Parameter(torch.randn(kernels, heads) * 2)

    def mask(self, ctx: Ctx) -> Float[Tensor, "h n n"]:
        h, w = ctx.need_grid(self, prefix=True)
        row, col = torch.arange(h, device=self.sigma.device), torch.arange(w, device=self.sigma.device)
        squared = (row[:, None] ** 2 + col**2).flatten()  # of each offset down and right
        exact = torch.promote_types(self.sigma.dtype, torch.float32)
        sharpness = 0.5 / (self.sigma.to(exact) ** 2 + 1e-5)
        of_offset = torch.einsum("kh,kho->ho", self.alpha.to(exact), (-squared * sharpness[..., None]).exp())
        down, right = (row[:, None] - row).abs(), (col[:, None] - col).abs()
        index = (down[:, None, :, None] * w + right[None, :, None, :]).flatten()  # of rows and columns i, j
        return of_offset.to(self.alpha.dtype)[:, index].unflatten(1, (h * w, h * w))


class ELM(Mask):
    """A learned number for each pair of tokens, the same for all heads. tokens: of the grid."""

    undecayed = ("table",)

    def __init__(self, head_dim: int, heads: int, *, tokens: int | None = None) -> None:
        super().__init__(head_dim, heads)
        if tokens is None:
            raise DoesNotFit("ELM has a number for each pair of tokens, so it must know how many the grid has: "
                             "position='elm(tokens=49)'")
        self.table = nn.Parameter(torch.zeros(tokens, tokens))

    def mask(self, ctx: Ctx) -> Float[Tensor, "1 n n"]:
        h, w = ctx.need_grid(self, prefix=True)
        if h * w != len(self.table):
            raise DoesNotFit(f"ELM was built for {len(self.table)} tokens, the grid has {h}x{w}; build the model with "
                             f"position='elm(tokens={h * w})'")
        return self.table[None]


PART = spec(GMM)


# the other hosts


def _built(position: Spec[Mask], head_dim: int, heads: int, grid: tuple[int, int]) -> Mask:
    """For a grid that is known; raises where the position is no mask."""
    if not issubclass(position.target, Mask):  # type: ignore[arg-type]
        raise DoesNotFit(f"{position.name} is no mask of scores; take position='gmm_mask' or 'elm'")
    return position.offer(tokens=math.prod(grid))(head_dim, heads)


class MaskedWindows(WindowAttention):
    """Window attention whose scores are masked, each window being a grid of its own, before their bias is added."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, window: int = 7, shifted: bool = False,
                 grid: tuple[int, int] | None = None, position: Spec[Mask] = PART) -> None:
        super().__init__(dim, place, heads=heads, window=window, shifted=shifted, grid=grid)
        self.position = _built(position, dim // heads, heads, self.window)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        scores = self.position.weigh((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), Ctx(grid=self.window))
        return (scores + bias).softmax(-1) @ v


class MaskedSwin(Swin):
    """images (B, in_chans, H, W) of one size -> logits (B, num_classes). position: in each window; else as Swin."""

    def __init__(self, *, img_size: int | Sequence[int] = 32, patch: int = 2, in_chans: int = 3, num_classes: int = 100,
                 dim: int = 96, depths: tuple[int, ...] = (2, 6, 4), heads: tuple[int, ...] = (3, 6, 12), window: int = 4,
                 drop_path: float = 0.0, position: Spec[Mask] = PART, channel: Spec[Part] = HALF) -> None:
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim,
                         depths=depths, heads=heads, window=window, drop_path=drop_path,
                         mixer=spec(MaskedWindows, position=position), channel=channel)
        self.embedding = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, norm=NORM,
                                    position=spec(LearnedPosition))


class TalkingReader(TalkingHeads):
    """Talking heads that read the tokens of ctx.memory, without biases of queries, keys, values and mixes."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, inner: int | None = None) -> None:
        super().__init__(dim, place, heads=heads, inner=inner, talk_bias=False)
        del self.qkv
        inner = self.proj.in_features
        self.q, self.kv = linear(dim, inner, bias=False), linear(dim, 2 * inner, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.memory is None:
            raise DoesNotFit("this reads the tokens of an encoder (ctx.memory), and here are none")
        memory, told = ctx.memory
        (q,), (k, v) = split_heads(self.q(x), 1, self.heads), split_heads(self.kv(memory), 2, self.heads)
        return self.proj(join_heads(self.mix(q, k, v, told)))


class ReadsPatches(ClassAlone):
    """The class token alone is normed and changed; it reads the patches as they are."""

    def forward(self, state: Any, ctx: Ctx) -> Any:
        token, patches = state
        return token + self.branch(self.norm(token), replace(ctx, memory=(patches, ctx))), patches


class MaskedCaiT(CaiT):
    """images (B, in_chans, H, W) -> logits (B, num_classes). head_dim: channels of a head; else as CaiT.

    LayerScale starts at 0.1, from the 19th layer at 1e-5, from the 25th at 1e-6.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 32, patch: int | tuple[int, int] = 4, in_chans: int = 3,
                 num_classes: int = 100, dim: int = 108, depth: int = 24, class_depth: int = 2, heads: int = 4,
                 head_dim: int = 64, drop_path: float = 0.0, position: Spec[Mask] = PART,
                 channel: Spec[Part] = HALF) -> None:
        cells = math.prod(s // p for s, p in zip(pair(img_size), pair(patch), strict=True))
        mixer = spec(TalkingHeads, inner=heads * head_dim, qkv_bias=False, talk_bias=False,
                     position=position.offer(tokens=cells))
        reads = spec(ReadsPatches, drop_path=drop_path, even_drop=True)
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth,
                         class_depth=class_depth, heads=heads, layer_scale=0.1, drop_path=drop_path, init_std=None,
                         mixer=mixer, channel=channel, norm=NORM, position=spec(LearnedPosition, std=1.0),
                         class_mixer=spec(TalkingReader, inner=heads * head_dim), class_residual=reads)
        for i, layer in enumerate(self.stages[0].layers):
            for sublayer in layer.values():
                nn.init.constant_(sublayer.scale, 0.1 if i < 18 else 1e-5 if i < 24 else 1e-6)


class PointwisePooling(TokenPooling):
    """Token pooling whose channels are mixed after it."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim)
        self.conv = nn.Sequential(self.conv, nn.Conv2d(out_dim, out_dim, 1))


class MaskedPiT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes). dims, depths, heads: of each stage; position: in all."""

    def __init__(self, *, img_size: int | Sequence[int] = 32, patch: int = 2, in_chans: int = 3, num_classes: int = 100,
                 dims: tuple[int, ...] = (96, 192, 384), depths: tuple[int, ...] = (2, 6, 4),
                 heads: tuple[int, ...] = (2, 4, 8), drop_path: float = 0.0, position: Spec[Mask] = PART,
                 channel: Spec[Part] = HALF) -> None:
        embed = PatchEmbed(in_chans, dims[0], patch=patch, img_size=img_size, class_token=True,
                           position=spec(LearnedPosition, std=1.0))
        if not len(dims) == len(depths) == len(heads):
            raise DoesNotFit(f"{len(dims)} stages (dims) need as many depths and heads, got {len(depths)} and {len(heads)}")
        nn.init.normal_(embed.cls)
        grid, stages = [s // patch for s in pair(img_size)], []
        for i, (dim, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
            mixer = spec(Attention, heads=h, qkv_bias=False, position=position.offer(tokens=math.prod(grid)))
            stages.append(Stage(dim, depth, {"mixer": mixer, "channel": channel},
                                spec(PreNorm, norm=NORM, drop_path=drop_path, even_drop=True),
                                spec(PointwisePooling) if i else None))
            grid = [-(-s // 2) for s in grid]
        super().__init__(embed, stages, img_size=img_size, norm=NORM, num_classes=num_classes, pool="token")


class MaskedTokenLayer(TokenTransformer):
    """A token layer whose one head is masked on this grid."""

    def __init__(self, dim: int, out_dim: int, position: Spec[Mask], grid: tuple[int, int]) -> None:
        super().__init__(dim, out_dim)
        self.grid, self.position = grid, _built(position, out_dim, 1, grid)

    def attention(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, dim=-1))
        read = self.position.attend(q, k, v, Ctx(grid=self.grid), causal=False, window=None, scale=x.shape[-1] ** -0.5)
        return v[:, 0], read[:, 0]


class MaskedTokens(TokensToToken):
    """Images to tokens by soft splits with masked token layers between them; no class token."""

    undecayed = ()

    def __init__(self, in_chans: int, dim: int, *, img_size: int | Sequence[int], token_dim: int,
                 strides: tuple[int, ...], position: Spec[Mask]) -> None:
        super().__init__(in_chans, dim, img_size=img_size, tokens="transformer", token_dim=token_dim, strides=strides)
        del self.cls
        h, w = self.img_size
        for i, layer in enumerate(self.layers):
            h, w = h // strides[i], w // strides[i]
            self.layers[i] = MaskedTokenLayer(layer.qkv.in_features, token_dim, position, (h, w))
        grid = (self.img_size[0] // self.step[0], self.img_size[1] // self.step[1])
        self.position = Sinusoids(dim, math.prod(grid), grid=grid)

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x = self.split(x)
        ctx = replace(ctx, grid=(x.shape[2], x.shape[3]))
        return self.position(to_tokens(x), ctx), ctx


class AddedAttention(Attention):
    """Attention that adds what it reads to its input, within the branch."""

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x + super().forward(x, ctx)


class MaskedT2T(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes). token_dim, strides: of `TokensToToken`.

    position: in all layers, the token layers among them.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 32, in_chans: int = 3, num_classes: int = 100, dim: int = 256,
                 depth: int = 12, heads: int = 4, token_dim: int = 64, strides: tuple[int, ...] = (2, 2),
                 drop_path: float = 0.0, position: Spec[Mask] = PART, channel: Spec[Part] = HALF) -> None:
        embed = MaskedTokens(in_chans, dim, img_size=img_size, token_dim=token_dim, strides=strides, position=position)
        mixer = spec(AddedAttention, heads=heads, qkv_bias=False, position=position.offer(tokens=embed.position.tokens))
        stage = Stage(dim, depth, {"mixer": mixer, "channel": channel}, spec(PreNorm, norm=NORM, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=NORM, num_classes=num_classes)


def _masked(position: Spec[Mask]) -> Spec[Attention]:
    return spec(Attention, qkv_bias=False, position=position)


PAPER = spec(ViT, img_size=32, patch=4, num_classes=100, dim=192, depth=9, heads=12, pool="mean", pool_first=True,
             mixer=_masked(PART), channel=HALF, norm=NORM,
             position=spec(LearnedPosition, std=1.0))
CAIT_MLP = spec(Mlp, ratio=told_ratio(384, 108))  # 384 hidden channels at any width
PRESETS = {
    "nano": PAPER.but(img_size=28, dim=64, depth=4, heads=4, num_classes=1000),
    "vit": PAPER,
    "vit_64": PAPER.but(img_size=64, patch=8, num_classes=200),
    "vit_elm": PAPER.but(mixer=_masked(spec(ELM, tokens=64))),
    "vit_d6": PAPER.but(dim=252, depth=6),
    "vit_d15": PAPER.but(dim=144, depth=15),
    "vit_d30": PAPER.but(dim=72, depth=30),
    "vit_d30_w108": PAPER.but(dim=108, depth=30),
    "vit_d30_w192": PAPER.but(depth=30),
    "vit_d60": PAPER.but(dim=72, depth=60),
    "swin": spec(MaskedSwin),
    "swin_64": spec(MaskedSwin, img_size=64, patch=4, num_classes=200),
    "cait": spec(MaskedCaiT, channel=CAIT_MLP),
    "cait_64": spec(MaskedCaiT, channel=CAIT_MLP, img_size=64, patch=8, num_classes=200),
    "cait_w192": spec(MaskedCaiT, dim=192),
    "pit": spec(MaskedPiT),
    "pit_64": spec(MaskedPiT, img_size=64, patch=4, num_classes=200),
    "t2t": spec(MaskedT2T),
    "t2t_64": spec(MaskedT2T, img_size=64, strides=(2, 2, 2), num_classes=200),
}

POSITION = f"{vit.OURS}.mixer.inner.position"


def _patches(t: list[Tensor], options: Options) -> list[Tensor]:
    """Their patches are flattened as (row, column, channel). Unless told, the first of 3, 4 and 1 channels that
    makes them square."""
    n = t[0].shape[1]
    asked = options.get("in_chans")
    channels = next(c for c in ((asked,) if asked else (3, 4, 1)) if n % c == 0 and vit.square(n // c))
    side = round((n // channels) ** 0.5)
    return [t[0].unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)]


def _table(t: list[Tensor], options: Options) -> list[Tensor]:
    if t[0].ndim != 2:  # the base mask of a GMM stands under the same name
        raise Passed
    return t


def _gaussian(side: int) -> Float[Tensor, "1 1 n n"]:
    """Their fixed exp(-d^2 / 2) of a square grid."""
    at = torch.arange(side, dtype=torch.float32)
    line = (at[:, None] - at).square()
    squared = line[:, None, :, None] + line[None, :, None, :]
    return (-squared / 2).exp().reshape(1, 1, side**2, side**2)


def _base(tensor: Tensor, state: State, options: Options) -> Tensor:
    return _gaussian(_side(state["embedding.position.table"].shape[1]))


def _of_window(tensor: Tensor, state: State, options: Options) -> Tensor:
    return _gaussian(_window(state))


def _of_stage(s: int) -> Make:
    """After s poolings of PiT."""
    return lambda tensor, state, options: _gaussian(-(-_side(state["embedding.position.table"].shape[1] - 1) // 2**s))


def _of_layer(n: int) -> Make:
    """Token layer n of T2T, after which some splits are to come."""
    def make(tensor: Tensor, state: State, options: Options) -> Tensor:
        last = _side(state["embedding.position.table"].shape[1])
        return _gaussian(last * 2 ** (count(state, "embedding.layers.{i}.proj.weight") - n))
    return make


def _side(tokens: int) -> int:
    return round(tokens**0.5)


def _window(state: State) -> int:
    return (_side(state["stages.0.layers.0.mixer.inner.bias.table"].shape[0]) + 1) // 2


PATCHES = Op(_patches, lambda t, o: [t[0].permute(0, 2, 3, 1).flatten(1)])
KERNELS = Op(lambda t, o: [t[0].flatten(1)], lambda t, o: [t[0][..., None, None]])
SCALES = Op(lambda t, o: [t[0].flatten()], lambda t, o: [t[0][None, None]])
FUSE_QKV = Op(lambda t, o: [torch.cat(t)], lambda t, o: list(t[0].tensor_split([len(t[0]) // 3])))  # q, and k with v
BASE = "the fixed Gaussian, rebuilt from the grid"
UNUSED = "their forward pass never uses it"


def _mask_rules(theirs: str, ours: str, made: Make) -> list[Rule]:
    return [rule(f"{theirs}.sigma", f"{ours}.sigma", KERNELS), rule(f"{theirs}.alpha", f"{ours}.alpha", KERNELS),
            rule(f"{theirs}.mask", f"{ours}.table", Op(_table, _table)),
            drop(f"{theirs}.mask", BASE, (f"{ours}.sigma", made))]


def _layer_rules(theirs: str, ours: str, made: Make) -> list[Rule]:
    """Of ViT and PiT."""
    return [rule(f"{theirs}.0.norm.*", f"{ours}.mixer.norm.*"),
            rule(f"{theirs}.0.fn.to_qkv.weight", f"{ours}.mixer.inner.qkv.weight"),
            rule(f"{theirs}.0.fn.to_out.0.*", f"{ours}.mixer.inner.proj.*"),
            *_mask_rules(f"{theirs}.0.fn.mask", f"{ours}.mixer.inner.position", made),
            rule(f"{theirs}.1.norm.*", f"{ours}.channel.norm.*"),
            rule(f"{theirs}.1.fn.net.0.*", f"{ours}.channel.inner.fc1.*"),
            rule(f"{theirs}.1.fn.net.3.*", f"{ours}.channel.inner.fc2.*")]


def _talking_rules(theirs: str, ours: str) -> list[Rule]:
    """Of both phases of CaiT; queries, keys and values are one matrix of ours in the first."""
    at, own = f"{theirs}.0.fn.fn", f"{ours}.mixer.inner"
    return [rule(f"{theirs}.0.scale", f"{ours}.mixer.scale", SCALES),
            rule(f"{theirs}.0.fn.norm.*", f"{ours}.mixer.norm.*"),
            rule((f"{at}.to_q.weight", f"{at}.to_kv.weight"), f"{own}.qkv.weight", FUSE_QKV) if "patch" in theirs else
            rule((f"{at}.to_q.weight", f"{at}.to_kv.weight"), (f"{own}.q.weight", f"{own}.kv.weight")),
            rule(f"{at}.mix_heads_pre_attn", f"{own}.proj_l.weight", TRANSPOSE),
            rule(f"{at}.mix_heads_post_attn", f"{own}.proj_w.weight", TRANSPOSE),
            rule(f"{at}.to_out.0.*", f"{own}.proj.*"),
            *_mask_rules(f"{at}.mask", f"{own}.position", _base),
            rule(f"{theirs}.1.scale", f"{ours}.channel.scale", SCALES),
            rule(f"{theirs}.1.fn.norm.*", f"{ours}.channel.norm.*"),
            rule(f"{theirs}.1.fn.fn.net.0.*", f"{ours}.channel.inner.fc1.*"),
            rule(f"{theirs}.1.fn.fn.net.3.*", f"{ours}.channel.inner.fc2.*")]


HEAD = (rule("mlp_head.0.*", "norm.*"), rule("mlp_head.1.*", "head.*"))
PATCH = (rule("to_patch_embedding.1.weight", "embedding.proj.weight", PATCHES),
         rule("to_patch_embedding.1.bias", "embedding.proj.bias"))


def _map(host: type[nn.Module], *rules: Rule, example: tuple[str, Options] = ("", {})) -> KeyMap:
    return keymap(*rules, without={v: "another host, with a layout of its own" for v, p in PRESETS.items()
                                   if p.target is not host}, example=example)


KEYS = {
    "authors": _map(  # models/vit.py
        ViT, rule("pos_embedding", "embedding.position.table"), *PATCH,
        *_layer_rules("transformer.layers.{i}", vit.OURS, _base),
        drop("mask", BASE, ("embedding.position.table", _base)), *HEAD),
    "authors_swin": _map(  # models/swin.py
        MaskedSwin, rule("absolute_pos_embed", "embedding.position.table"),
        *_mask_rules("layers.{s}.blocks.{i}.attn.mask", "stages.{s}.layers.{i}.mixer.inner.position", _of_window),
        drop("mask", BASE, ("embedding.position.table", _of_window)), *swin.KEYS["authors"].rules,
        example=("swin", {"dim": 24, "depths": (2, 2, 2)})),
    "authors_cait": _map(  # models/cait.py
        MaskedCaiT, *PATCH, rule("pos_embedding", "embedding.position.table"),
        rule("cls_token", "class_stage.resample.cls"),
        *_talking_rules("patch_transformer.layers.{i}", vit.OURS),
        *_talking_rules("cls_transformer.layers.{i}", "class_stage.layers.{i}"),
        drop("mask", BASE, ("embedding.position.table", _base)), *HEAD,
        example=("cait_w192", {"dim": 48, "depth": 2})),
    "authors_pit": _map(  # models/pit.py
        MaskedPiT, rule("pos_embedding", "embedding.position.table"), rule("cls_token", "embedding.cls"),
        rule("to_patch_embedding.0.*", "embedding.proj.*"),
        *[r for s in range(8) for r in (
            *_layer_rules(f"layers.{2 * s}.layers.{{i}}", f"stages.{s}.layers.{{i}}", _of_stage(s)),
            drop(f"layers.{2 * s}.mask", BASE, (f"stages.{s}.layers.0.mixer.norm.weight", _of_stage(s))),
            rule(f"layers.{2 * s - 1}.downsample.net.0.*", f"stages.{s}.resample.conv.0.*"),
            rule(f"layers.{2 * s - 1}.downsample.net.1.*", f"stages.{s}.resample.conv.1.*"),
            rule(f"layers.{2 * s - 1}.cls_ff.*", f"stages.{s}.resample.fc.*"))],
        *HEAD, example=("pit", {"dims": (24, 48, 96), "depths": (1, 1, 1)})),
    "authors_t2t": _map(  # models/t2t.py
        MaskedT2T, drop("cls_token", UNUSED, ("norm.weight", lambda t, state, o: torch.zeros(1, 1, len(t)))),
        drop("tokens_to_token.norm.weight", UNUSED,
             ("embedding.project.weight", lambda t, state, o: torch.ones(t.shape[1]))),
        drop("tokens_to_token.norm.bias", UNUSED,
             ("embedding.project.weight", lambda t, state, o: torch.zeros(t.shape[1]))),
        *[r for n in range(4) for r in (
            drop(f"tokens_to_token.attention{n + 1}.mask", BASE, (f"embedding.layers.{n}.proj.bias", _of_layer(n))),
            *_mask_rules(f"tokens_to_token.attention{n + 1}.attn.mask", f"embedding.layers.{n}.position", _of_layer(n)))],
        *_mask_rules("blocks.{i}.attn.mask", POSITION, _base),
        drop("mask", BASE, ("embedding.position.table", _base)), *t2t_vit.KEYS["authors"].rules,
        example=("t2t", {"dim": 64, "depth": 2})),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything, but for the heads of an ELM: as a preset has them of the same width. Square images."""
    first = POSITION.format(i=0)
    if "embedding.project.weight" in state:
        return _other_host(state) | _t2t(state)
    if "class_stage.resample.cls" in state:
        heads = len(state["stages.0.layers.0.mixer.inner.proj_l.weight"])
        inner = state["stages.0.layers.0.mixer.inner.proj.weight"].shape[1]
        return cait.settings(state, "timm") | _other_host(state) | {"head_dim": inner // heads}
    if "stages.0.layers.0.mixer.inner.bias.table" in state:
        told = swin.settings(state, "authors") | _other_host(state)
        return told | {"img_size": told["patch"] * _side(state["embedding.position.table"].shape[1])}
    if "embedding.cls" in state and "stages.1.resample.conv.1.weight" in state:
        return _other_host(state) | _pit(state)
    told = vit.settings(state, "timm") | {"pool": "mean", "pool_first": True, "norm": NORM}
    told["position"] = Assumed(PAPER["position"], "how positions start leaves no trace in the tensors")
    if f"{first}.table" in state:
        told["heads"] = as_preset(PRESETS, "heads", max(1, told["dim"] // 16), dim=told["dim"])
        position: Spec[Mask] = spec(ELM, tokens=len(state[f"{first}.table"]))
    else:
        told["heads"] = state[f"{first}.sigma"].shape[1]
        position = _kernels(state[f"{first}.sigma"])
    bias = f"{vit.OURS.format(i=0)}.mixer.inner.qkv.bias" in state
    return told | {"mixer": spec(Attention, position=position) if bias else _masked(position)}


def _kernels(sigma: Tensor) -> Spec[Mask]:
    return PART if len(sigma) == 5 else PART.but(kernels=len(sigma))


def _other_host(state: State) -> dict[str, Any]:
    """What is told of Swin, CaiT, PiT and T2T alike."""
    sigma, (hidden, dim) = f"{POSITION}.sigma".format(i=0), state["stages.0.layers.0.channel.inner.fc1.weight"].shape
    return {
        "position": _kernels(state[sigma]) if sigma in state else spec(ELM),
        "channel": spec(Mlp, ratio=told_ratio(hidden, dim)),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }


def _heads(state: State, stage: int, default: int) -> int | Assumed:
    sigma = f"stages.{stage}.layers.0.mixer.inner.position.sigma"
    return state[sigma].shape[1] if sigma in state else Assumed(default, "an ELM, the same for all heads, tells no heads; "
                                                                "as wide as the paper has them")


def _pit(state: State) -> dict[str, Any]:
    _, in_chans, patch, _ = state["embedding.proj.weight"].shape
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    dims = tuple(len(state[f"stages.{s}.layers.0.mixer.norm.weight"]) for s in stages)
    heads = [_heads(state, s, max(1, d // 48)) for s, d in enumerate(dims)]
    plain = tuple(h.value if isinstance(h, Assumed) else h for h in heads)
    return {
        "in_chans": in_chans, "patch": patch, "dims": dims,
        "heads": heads[0]._replace(value=plain) if isinstance(heads[0], Assumed) else plain,
        "depths": tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages),
        "img_size": patch * _side(state["embedding.position.table"].shape[1] - 1),
    }


def _t2t(state: State) -> dict[str, Any]:
    dim, layers = len(state["embedding.project.weight"]), count(state, "embedding.layers.{i}.proj.weight")
    unfolded = state["embedding.layers.0.norm1.weight" if layers else "embedding.project.weight"].shape[-1]
    return {
        "dim": dim, "depth": count(state, f"{vit.OURS}.mixer.norm.weight"), "heads": _heads(state, 0, max(1, dim // 64)),
        "in_chans": unfolded // 9, "token_dim": len(state["embedding.layers.0.proj.weight"]) if layers else 64,
        "strides": Assumed((2,) * (layers + 1), "leave no trace; all are 2 in the authors' code"),
        "img_size": _side(state["embedding.position.table"].shape[1]) * 2 ** (layers + 1),
    }
