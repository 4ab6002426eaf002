"""Scaling Vision Transformers (Zhai, Kolesnikov, Houlsby, Beyer; CVPR 2022), arXiv 2106.04560.

New: a ViT without class token, whose tokens are pooled by attention: a learned probe is the only query (MAP head, section
3.2); sizes up to two billion parameters (table 2); and how to train them: much stronger weight decay in the classifier than
in the body (section 3.1), a rate that falls as 1 / sqrt(time) and linearly to zero at the end (section 3.5). Over all sizes
and budgets the error follows E = a (C + d)^-b + c in the compute C (section 2): it saturates at both ends.

Here: `MAPHead`; `variant("G/14")` for the names of the table; in training, `head_weight_decay`, `schedule="rsqrt"`,
`timescale` and `cooldown` of a recipe (arena/config.py); the law in arena/scaling.py.

Decisions: the head is as in the authors' code: the probe attends to the normed tokens, then a residual MLP of the body's
width under a norm. The table counts encoders without this head and the classifier. The classifier starts as elsewhere here,
not at zero with a bias of -10, which is for sigmoids on 29,593 classes of JFT-3B. Adafactor with momentum in bfloat16 is
left out: it saves memory where parameters fill it. Files in the authors' layout get the tanh form of GELU, which JAX has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention, CrossAttention
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import FUSE_PAIR, HWIO, TRANSPOSE, Op, Rule, State, as_preset, count, drop, keymap, rule, told_ratio
from .vit import OURS, OUT_KERNEL, QKV, QKV_BIAS, QKV_KERNEL, plain_rules

CARD = Card(
    title="Scaling Vision Transformers",
    authors="Xiaohua Zhai, Alexander Kolesnikov, Neil Houlsby, Lucas Beyer",
    venue="CVPR 2022",
    arxiv="2106.04560",
    year=2021,
    code="https://github.com/google-research/big_vision",
    licence="Apache-2.0 (code; the weights of this paper are not released, those of SigLIP's image encoders are)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "pooling"),
    claim="A ViT of 1.84 billion parameters trained on three billion images reaches 90.45 % ImageNet top-1, and 84.86 % "
          "with ten images a class; errors follow a saturating power law of the compute.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "xs_p28": Published(params=5.4e6, input=(3, 224, 224), note="s/28; 0.7 GFLOPs, too few digits to hold us to"),
        "xs": Published(params=5.0e6, macs=1.1e9, input=(3, 224, 224), note="s/16"),
        "tiny": Published(params=5.5e6, macs=1.25e9, input=(3, 224, 224), note="Ti/16"),
        "small_p32": Published(params=22e6, macs=1.15e9, input=(3, 224, 224), note="S/32"),
        "small": Published(params=22e6, macs=4.6e9, input=(3, 224, 224), note="S/16"),
        "base_p32": Published(params=87e6, macs=4.35e9, input=(3, 224, 224), note="B/32"),
        "base_p28": Published(params=87e6, macs=5.65e9, input=(3, 224, 224), note="B/28"),
        "base": Published(params=86e6, macs=17.55e9, input=(3, 224, 224), note="B/16"),
        "large": Published(params=303e6, macs=61.45e9, input=(3, 224, 224), note="L/16"),
        "giant_p14": Published(params=1011e6, macs=266.55e9, input=(3, 224, 224), note="g/14"),
        "gigantic_p14": Published(params=1843e6, macs=482.65e9, input=(3, 224, 224),
                                  results={"ImageNet top-1 (JFT-3B)": 90.45, "ImageNet top-1 (ten images a class)": 84.86},
                                  note="G/14. Table 2, of all variants, is quoted from memory; its FLOPs are two a MAC"),
    },
    exceptions={"parameters_published": "table 2 counts encoders without MAP head and classifier; its test checks that"},
)


class MAPHead(nn.Module):
    """Multi-head attention pooling: tokens (B, N, C) -> (B, C). A learned probe attends to them; then a residual MLP."""

    undecayed = ("probe",)

    def __init__(self, dim: int, *, heads: int, mlp: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm)) -> None:
        super().__init__()
        limit = (6 / (1 + dim)) ** 0.5  # Xavier, of a matrix 1 x dim
        self.probe = nn.Parameter(torch.empty(1, 1, dim).uniform_(-limit, limit))
        self.attention = CrossAttention(dim, Place(), heads=heads)
        self.norm = norm(dim)
        self.mlp = mlp(dim, Place())

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        x = self.attention(self.probe.expand(len(x), -1, -1), Ctx(memory=(x, ctx)))
        return (x + self.mlp(self.norm(x), Ctx()))[:, 0]


class ScalingViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    pool: "map" attends with a learned probe, "mean" takes the mean of the patches, "token" the class token, which comes
    after the positions. channel: None where the mixer is the whole layer. map_mlp: of the MAP head, channel unless given.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 12, heads: int = 3, drop_path: float = 0.0,
                 pool: str = "map", mixer: Spec[Part] = spec(Attention), channel: Spec[Part] | None = spec(Mlp),
                 map_mlp: Spec[Part] | None = None, norm: Spec[nn.Module] = spec(LayerNorm),
                 residual: Spec[Residual] = spec(PreNorm), position: Spec[Any] = spec(LearnedPosition)) -> None:
        if pool not in ("map", "mean", "token"):
            raise DoesNotFit(f"pool is 'map', 'mean' or 'token', not {pool!r}")
        mixer, position = seat(position, mixer.offer(heads=heads))
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=pool == "token", position_first=True,
                           position=position)
        layer = {"mixer": mixer} if channel is None else {"mixer": mixer, "channel": channel}
        stage = Stage(dim, depth, layer, residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes,
                         pool="mean" if pool == "map" else pool)
        self.pool = pool
        self.map_head = MAPHead(dim, heads=heads, mlp=map_mlp or channel or spec(Mlp), norm=norm) if pool == "map" else None

    def pooled(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        if self.map_head is None:
            return super().pooled(x, ctx)
        return self.map_head(x[:, ctx.prefix:], replace(ctx, prefix=0))


SIZES = {  # width, depth, width of the MLP, heads: table 2, and further ones of the authors' code
    "mu": (32, 1, 128, 2), "Ti": (192, 12, 768, 3), "s": (256, 6, 1024, 8), "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8), "B": (768, 12, 3072, 12), "L": (1024, 24, 4096, 16), "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16), "g-opt": (1536, 40, 6144, 16), "G": (1664, 48, 8192, 16), "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def mlp_of(hidden: int, dim: int) -> Spec[Part]:
    return spec(Mlp) if hidden == 4 * dim else spec(Mlp, ratio=told_ratio(hidden, dim))


def variant(text: str) -> Spec[ScalingViT]:
    """The model of a name as in the paper: "g/14" is the size g with patches of 14 pixels, "B" has patches of 16."""
    size, slash, patch = text.partition("/")
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    if slash and not (patch.isdecimal() and int(patch)):
        raise DoesNotFit(f"expected a size and the side of its patches, as in 'g/14', got {text!r}")
    dim, depth, hidden, heads = SIZES[size]
    return spec(ScalingViT, dim=dim, depth=depth, heads=heads, channel=mlp_of(hidden, dim), patch=int(patch or 16))


PRESETS = {
    "nano": spec(ScalingViT, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "xs_p28": variant("s/28"),
    "xs": variant("s/16"),
    "tiny": variant("Ti/16"),
    "small_p32": variant("S/32"),
    "small": variant("S/16"),
    "base_p32": variant("B/32"),
    "base_p28": variant("B/28"),
    "base": variant("B/16"),
    "large": variant("L/16"),
    "giant_p14": variant("g/14"),
    "gigantic_p14": variant("G/14"),
}

POOL = "map_head.attention"
THEIRS = "Transformer/encoderblock_{i}"
ONE_KERNEL = Op(lambda t, o: [t[0].flatten(1).t()], lambda t, o: [t[0].t().unflatten(1, (o["heads"], -1))])
ONE_BIAS = Op(lambda t, o: [t[0].flatten()], lambda t, o: [t[0].unflatten(0, (o["heads"], -1))])
PAIR_KERNEL = Op(lambda t, o: FUSE_PAIR.there([x.flatten(1).t() for x in t], o),
                 lambda t, o: [x.t().unflatten(1, (o["heads"], -1)) for x in FUSE_PAIR.back(t, o)])
PAIR_BIAS = Op(lambda t, o: FUSE_PAIR.there([x.flatten() for x in t], o),
               lambda t, o: [x.unflatten(0, (o["heads"], -1)) for x in FUSE_PAIR.back(t, o)])


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [rule(f"{theirs}/scale", f"{ours}.weight"), rule(f"{theirs}/bias", f"{ours}.bias")]


def _dense(theirs: str, ours: str) -> list[Rule]:
    return [rule(f"{theirs}/kernel", f"{ours}.weight", TRANSPOSE), rule(f"{theirs}/bias", f"{ours}.bias")]


def _authors(at: str, pool: str) -> list[Rule]:
    """at: before all names; pool: before those of the MAP head."""
    block, attention = f"{at}{THEIRS}", f"{at}{THEIRS}/MultiHeadDotProductAttention_0"
    probing = f"{at}{pool}MultiHeadDotProductAttention_0"
    return [
        rule(f"{at}pos_embedding", "embedding.position.table"),
        rule(f"{at}Transformer/pos_embedding", "embedding.position.table"),
        rule(f"{at}Transformer/posembed_input/pos_embedding", "embedding.position.table"),
        rule(f"{at}embedding/kernel", "embedding.proj.weight", HWIO),
        rule(f"{at}embedding/bias", "embedding.proj.bias"),
        *_norm(f"{block}/LayerNorm_0", f"{OURS}.mixer.norm"),
        rule([f"{attention}/{x}/kernel" for x in QKV], f"{OURS}.mixer.inner.qkv.weight", QKV_KERNEL),
        rule([f"{attention}/{x}/bias" for x in QKV], f"{OURS}.mixer.inner.qkv.bias", QKV_BIAS),
        rule(f"{attention}/out/kernel", f"{OURS}.mixer.inner.proj.weight", OUT_KERNEL),
        rule(f"{attention}/out/bias", f"{OURS}.mixer.inner.proj.bias"),
        *_norm(f"{block}/LayerNorm_1", f"{OURS}.channel.norm"),
        *_dense(f"{block}/MlpBlock_0/Dense_0", f"{OURS}.channel.inner.fc1"),
        *_dense(f"{block}/MlpBlock_0/Dense_1", f"{OURS}.channel.inner.fc2"),
        *_norm(f"{at}Transformer/encoder_norm", "norm"),
        rule(f"{at}{pool}probe", "map_head.probe"),
        rule(f"{probing}/query/kernel", f"{POOL}.q.weight", ONE_KERNEL),
        rule(f"{probing}/query/bias", f"{POOL}.q.bias", ONE_BIAS),
        rule([f"{probing}/{x}/kernel" for x in QKV[1:]], f"{POOL}.kv.weight", PAIR_KERNEL),
        rule([f"{probing}/{x}/bias" for x in QKV[1:]], f"{POOL}.kv.bias", PAIR_BIAS),
        rule(f"{probing}/out/kernel", f"{POOL}.proj.weight", OUT_KERNEL),
        rule(f"{probing}/out/bias", f"{POOL}.proj.bias"),
        *_norm(f"{at}{pool}LayerNorm_0", "map_head.norm"),
        *_dense(f"{at}{pool}MlpBlock_0/Dense_0", "map_head.mlp.fc1"),
        *_dense(f"{at}{pool}MlpBlock_0/Dense_1", "map_head.mlp.fc2"),
        *_dense(f"{at}head", "head"),
    ]


KEYS = {
    "timm": keymap(
        *plain_rules(),
        rule("attn_pool.latent", "map_head.probe"),
        rule("attn_pool.norm.*", "map_head.norm.*"),
        rule("attn_pool.mlp.*", "map_head.mlp.*"),
        rule("attn_pool.*", f"{POOL}.*"),
    ),
    "authors": keymap(  # the .npz files of big_vision; SigLIP's image encoders; files of old with the MAP head's names bare
        *(r for at in ("params/", "params/img/", "") for pool in ("MAPHead_0/", "") for r in _authors(at, pool)),
        drop("params/txt/*", "the text encoder"),
        drop("params/t", "the temperature of the contrastive loss"),
        drop("params/b", "the bias of the contrastive loss"),
        drop("opt/*", "the state of the optimiser"),
        drop("extra/*", "the state of the training"),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads. Square images. JAX's GELU has the tanh form; so have timm's largest (g-opt)."""
    if "map_head.probe" not in state:
        raise DoesNotFit("without a MAP head it is a ViT like any other: name='vit'")
    dim, in_chans, *patch = state["embedding.proj.weight"].shape
    side = round(state["embedding.position.table"].shape[1] ** 0.5)
    mlp = mlp_of(state["map_head.mlp.fc1.weight"].shape[0], dim)
    depth = count(state, f"{OURS}.mixer.norm.weight")
    tanh = layout == "authors" or (layout == "timm" and (dim, depth) == SIZES["g-opt"][:2])
    return {
        "dim": dim, "depth": depth, "in_chans": in_chans, "patch": patch[0] if patch[0] == patch[1] else tuple(patch),
        "img_size": side * patch[0] if patch[0] == patch[1] else (side * patch[0], side * patch[1]),
        "heads": as_preset(PRESETS, "heads", next((h for d, _, _, h in SIZES.values() if d == dim), max(1, dim // 64)),
                           dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "pool": "map", "channel": mlp.but(approximate=True) if tanh else mlp, "norm": spec(LayerNorm),
    }
