"""An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale (Dosovitskiy et al., ICLR 2021),
arXiv 2010.11929.

New: an image is a sequence of patches. They are embedded linearly, a class token is put before them and learned positions
are added (Eq. 1); pre-norm layers of attention (Eq. 2) and MLP (Eq. 3); the class token, normed, is classified (Eq. 4).
Hybrids put a ResNet with group norm and standardised weights before the patches (section 3.1).

Decisions: the presets tiny and small are from How to train your ViT? (arXiv 2106.10270), giant_p14 (g/14) from Scaling
Vision Transformers (arXiv 2106.04560). GELU is exact, as in the PyTorch ports; the authors' JAX code takes the tanh form,
which files in their layout get (`approximate`). No pre-logits layer: the released classifiers have none. Options of later
plain ViTs stand here too, as they change no idea: registers (arXiv 2309.16588), positions of the patches alone and layer
scale (DeiT III, arXiv 2204.07118).
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import nn

from ...core.card import Card, Published
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, SwiGLU
from ...parts.embed import PatchEmbed
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PreNorm
from ...parts.stem import ResNetStem
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import (
    FUSE,
    HWIO,
    TRANSPOSE,
    Assumed,
    Op,
    Rule,
    State,
    as_preset,
    count,
    drop,
    keymap,
    rule,
    told_ratio,
)

CARD = Card(
    title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    authors="Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner, "
            "Mostafa Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, Neil Houlsby",
    venue="ICLR 2021",
    arxiv="2010.11929",
    year=2021,
    code="https://github.com/google-research/vision_transformer",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "host"),
    claim="A plain Transformer on image patches, pre-trained on enough data, beats the best convolutional networks at "
          "about a quarter of their pre-training compute (88.55 % ImageNet top-1 with JFT-300M).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=5.72e6, macs=1.26e9, input=(3, 224, 224)),
        "small": Published(params=22.05e6, macs=4.61e9, input=(3, 224, 224)),
        "small_p32": Published(params=22.88e6, macs=1.15e9, input=(3, 224, 224)),
        "base": Published(params=86.57e6, macs=17.58e9, input=(3, 224, 224),
                          results={"ImageNet top-1 (ImageNet-21k, 384 px)": 83.97}),
        "base_p8": Published(params=86.58e6, macs=78.22e9, input=(3, 224, 224)),
        "base_p32": Published(params=88.22e6, macs=4.41e9, input=(3, 224, 224),
                              results={"ImageNet top-1 (ImageNet-21k, 384 px)": 81.28}),
        "large": Published(params=304.33e6, macs=61.60e9, input=(3, 224, 224),
                           results={"ImageNet top-1 (ImageNet-21k, 384 px)": 85.15, "ImageNet top-1 (JFT-300M)": 87.76}),
        "large_p32": Published(params=306.54e6, macs=15.39e9, input=(3, 224, 224),
                               results={"ImageNet top-1 (ImageNet-21k, 384 px)": 80.99}),
        "huge_p14": Published(params=632.05e6, macs=167.40e9, input=(3, 224, 224),
                              results={"ImageNet top-1 (JFT-300M)": 88.55}),
        "giant_p14": Published(params=1012.61e6, macs=267.18e9, input=(3, 224, 224),
                               note="g/14 of Scaling Vision Transformers, with a class token"),
        "r_tiny_p8": Published(params=6.34e6, macs=0.44e9, input=(3, 224, 224),
                               note="R+Ti/16: root convolution, patches of 8"),
        "r26_small": Published(params=36.43e6, macs=3.56e9, input=(3, 224, 224), note="R26+S/32"),
        "r50_base": Published(params=98.66e6, macs=21.66e9, input=(3, 224, 224), note="R50+B/16"),
        "r50_large": Published(params=328.99e6, macs=19.58e9, input=(3, 224, 224), note="R50+L/32"),
    },
)


class ViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    pool: "token" classifies the class token, "mean" the mean of the patches. class_token: is there one? None: if it is
    classified. pool_first: the mean is taken before the last norm. registers: learned tokens after the class token.
    position_first: positions are the patches' alone. layer_scale: a learned factor on each channel of each branch, which
    starts at this value. stem_layers: blocks of each ResNet stage before the patches; () is its root convolution alone.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 12, heads: int = 3, drop_path: float = 0.0,
                 pool: str = "token", class_token: bool | None = None, pool_first: bool = False, registers: int = 0,
                 position_first: bool = False, layer_scale: float | None = None,
                 stem_layers: tuple[int, ...] | None = None, mixer: Spec[Part] = spec(Attention),
                 channel: Spec[Part] = spec(Mlp), norm: Spec[nn.Module] = spec(LayerNorm),
                 residual: Spec[Residual] = spec(PreNorm), position: Spec[Any] = spec(LearnedPosition)) -> None:
        if pool == "token" and (pool_first or class_token is False):
            raise DoesNotFit("pool='token' classifies the class token: it needs one, and pools nothing before the norm; "
                             "take pool='mean'")
        mixer, position = seat(position, mixer.offer(heads=heads))
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, registers=registers, position=position,
                           class_token=pool == "token" if class_token is None else class_token,
                           position_first=position_first,
                           stem=None if stem_layers is None else spec(ResNetStem, layers=stem_layers))
        residual = residual.offer(norm=norm, drop_path=drop_path)
        if layer_scale is not None:
            residual = residual.require("layer_scale= is a factor on its branch", layer_scale=layer_scale)
        stage = Stage(dim, depth, {"mixer": mixer, "channel": channel}, residual)
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes, pool=pool,
                         pool_first=pool_first)


PRESETS = {
    "nano": spec(ViT, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "tiny": spec(ViT, dim=192, depth=12, heads=3),
    "small": spec(ViT, dim=384, depth=12, heads=6),
    "small_p32": spec(ViT, dim=384, depth=12, heads=6, patch=32),
    "base": spec(ViT, dim=768, depth=12, heads=12),
    "base_p8": spec(ViT, dim=768, depth=12, heads=12, patch=8),
    "base_p32": spec(ViT, dim=768, depth=12, heads=12, patch=32),
    "large": spec(ViT, dim=1024, depth=24, heads=16),
    "large_p32": spec(ViT, dim=1024, depth=24, heads=16, patch=32),
    "huge_p14": spec(ViT, dim=1280, depth=32, heads=16, patch=14),
    "giant_p14": spec(ViT, dim=1408, depth=40, heads=16, patch=14, channel=spec(Mlp, ratio=48 / 11)),
    "r_tiny_p8": spec(ViT, dim=192, depth=12, heads=3, patch=8, stem_layers=()),
    "r26_small": spec(ViT, dim=384, depth=12, heads=6, patch=1, stem_layers=(2, 2, 2, 2)),
    "r50_base": spec(ViT, dim=768, depth=12, heads=12, patch=1, stem_layers=(3, 4, 9)),
    "r50_large": spec(ViT, dim=1024, depth=24, heads=16, patch=1, stem_layers=(3, 4, 6, 3)),
}

OURS = "stages.0.layers.{i}"
ROOT = ("conv.weight", "norm.weight", "norm.bias")
THEIRS = "Transformer/encoderblock_{i}"  # JAX
ATTENTION = f"{THEIRS}/MultiHeadDotProductAttention_1"
QKV = ("query", "key", "value")
FLAT = Op(lambda t, o: [t[0].flatten()], lambda t, o: [t[0]])  # group norms of the hybrids are stored (1, 1, 1, C)
QKV_KERNEL = Op(lambda t, o: FUSE.there([x.flatten(1).t() for x in t], o),  # (D, heads, d) each
                lambda t, o: [x.t().unflatten(1, (o["heads"], -1)) for x in FUSE.back(t, o)])
QKV_BIAS = Op(lambda t, o: FUSE.there([x.flatten() for x in t], o),
              lambda t, o: [x.unflatten(0, (o["heads"], -1)) for x in FUSE.back(t, o)])
OUT_KERNEL = Op(lambda t, o: [t[0].flatten(0, 1).t()], lambda t, o: [t[0].t().unflatten(0, (o["heads"], -1))])


def _stem_rules() -> list[Any]:
    """The hybrids' ResNet: JAX counts blocks and units from 1."""
    rules = [rule("conv_root/kernel", "embedding.stem.conv.weight", HWIO)]
    pairs = [("gn_root", "embedding.stem.norm")]
    for s in range(4):
        for u in range(9):
            theirs, ours = f"block{s + 1}/unit{u + 1}", f"embedding.stem.stages.{s}.{u}"
            for a, b in (("_proj", "0"), ("1", "1"), ("2", "2"), ("3", "3")):
                rules.append(rule(f"{theirs}/conv{a}/kernel", f"{ours}.conv{b}.weight", HWIO))
                pairs.append((f"{theirs}/gn{a}", f"{ours}.norm{b}"))
    for theirs, ours in pairs:
        rules += [rule(f"{theirs}/scale", f"{ours}.weight", FLAT), rule(f"{theirs}/bias", f"{ours}.bias", FLAT)]
    return rules


def plain_rules(norm: str = "norm.*") -> tuple[Rule, ...]:
    """timm's names. norm: what the last one is called."""
    return (
        rule("cls_token", "embedding.cls"),
        rule("reg_token", "embedding.registers"),
        rule("pos_embed", "embedding.position.table"),
        rule("patch_embed.proj.*", "embedding.proj.*"),
        rule("blocks.{i}.norm1.*", f"{OURS}.mixer.norm.*"),
        rule("blocks.{i}.attn.qkv.*", f"{OURS}.mixer.inner.qkv.*"),
        rule("blocks.{i}.attn.proj.*", f"{OURS}.mixer.inner.proj.*"),
        rule("blocks.{i}.ls1.gamma", f"{OURS}.mixer.scale"),
        rule("blocks.{i}.norm2.*", f"{OURS}.channel.norm.*"),
        rule("blocks.{i}.mlp.*", f"{OURS}.channel.inner.*"),
        rule("blocks.{i}.ls2.gamma", f"{OURS}.channel.scale"),
        rule(norm, "norm.*"),
        rule("head.*", "head.*"),
    )


def _transformers(before: str) -> list[Any]:
    """Files and models of version 4; then the names that version 5 gives them in memory, its files have the old ones."""
    old, new = f"{before}encoder.layer.{{i}}", f"{before}layers.{{i}}"
    rules = [rule(f"{before}embeddings.cls_token", "embedding.cls"),
             rule(f"{before}embeddings.position_embeddings", "embedding.position.table"),
             rule(f"{before}embeddings.patch_embeddings.projection.*", "embedding.proj.*"),
             drop(f"{before}embeddings.mask_token", "for pre-training on masked images"),
             rule(f"{old}.attention.output.dense.*", f"{OURS}.mixer.inner.proj.*"),
             rule(f"{old}.intermediate.dense.*", f"{OURS}.channel.inner.fc1.*"),
             rule(f"{old}.output.dense.*", f"{OURS}.channel.inner.fc2.*"),
             rule(f"{new}.attention.o_proj.*", f"{OURS}.mixer.inner.proj.*"),
             rule(f"{new}.mlp.*", f"{OURS}.channel.inner.*"),
             rule(f"{before}layernorm.*", "norm.*"),
             drop(f"{before}pooler.*", "a layer after the class token that classifiers have not")]
    for layer, at, names in ((old, "attention.attention", QKV), (new, "attention", ("q_proj", "k_proj", "v_proj"))):
        rules += [rule([f"{layer}.{at}.{x}.{kind}" for x in names], f"{OURS}.mixer.inner.qkv.{kind}", FUSE)
                  for kind in ("weight", "bias")]
        rules += [rule(f"{layer}.layernorm_before.*", f"{OURS}.mixer.norm.*"),
                  rule(f"{layer}.layernorm_after.*", f"{OURS}.channel.norm.*")]
    return rules


KEYS = {
    "timm": keymap(
        *plain_rules(),
        rule([f"patch_embed.backbone.{x}" for x in ("stages.0.blocks.0.conv1.weight", *(f"stem.{y}" for y in ROOT))],
             [f"embedding.stem.{x}" for x in ("stages.0.0.conv1.weight", *ROOT)]),  # "stem" where there are stages
        rule("patch_embed.backbone.stages.{s}.blocks.{u}.downsample.conv.*", "embedding.stem.stages.{s}.{u}.conv0.*"),
        rule("patch_embed.backbone.stages.{s}.blocks.{u}.downsample.norm.*", "embedding.stem.stages.{s}.{u}.norm0.*"),
        rule("patch_embed.backbone.stages.{s}.blocks.{u}.*", "embedding.stem.stages.{s}.{u}.*"),
        rule("patch_embed.backbone.conv.*", "embedding.stem.conv.*"),
        rule("patch_embed.backbone.norm.*", "embedding.stem.norm.*"),
    ),
    "timm_gap": keymap(  # of those that average the patches and norm the mean
        *plain_rules("fc_norm.*"), example=("nano", {"pool": "mean", "pool_first": True}),
        without=dict.fromkeys(PRESETS, "it classifies the class token, normed before; this layout averages first")),
    "authors": keymap(  # the .npz files of google-research/vision_transformer
        rule("cls", "embedding.cls"),
        rule("Transformer/posembed_input/pos_embedding", "embedding.position.table"),
        rule("embedding/kernel", "embedding.proj.weight", HWIO),
        rule("embedding/bias", "embedding.proj.bias"),
        *_stem_rules(),
        rule(f"{THEIRS}/LayerNorm_0/scale", f"{OURS}.mixer.norm.weight"),
        rule(f"{THEIRS}/LayerNorm_0/bias", f"{OURS}.mixer.norm.bias"),
        rule([f"{ATTENTION}/{x}/kernel" for x in QKV], f"{OURS}.mixer.inner.qkv.weight", QKV_KERNEL),
        rule([f"{ATTENTION}/{x}/bias" for x in QKV], f"{OURS}.mixer.inner.qkv.bias", QKV_BIAS),
        rule(f"{ATTENTION}/out/kernel", f"{OURS}.mixer.inner.proj.weight", OUT_KERNEL),
        rule(f"{ATTENTION}/out/bias", f"{OURS}.mixer.inner.proj.bias"),
        rule(f"{THEIRS}/LayerNorm_2/scale", f"{OURS}.channel.norm.weight"),
        rule(f"{THEIRS}/LayerNorm_2/bias", f"{OURS}.channel.norm.bias"),
        rule(f"{THEIRS}/MlpBlock_3/Dense_0/kernel", f"{OURS}.channel.inner.fc1.weight", TRANSPOSE),
        rule(f"{THEIRS}/MlpBlock_3/Dense_0/bias", f"{OURS}.channel.inner.fc1.bias"),
        rule(f"{THEIRS}/MlpBlock_3/Dense_1/kernel", f"{OURS}.channel.inner.fc2.weight", TRANSPOSE),
        rule(f"{THEIRS}/MlpBlock_3/Dense_1/bias", f"{OURS}.channel.inner.fc2.bias"),
        rule("Transformer/encoder_norm/scale", "norm.weight"),
        rule("Transformer/encoder_norm/bias", "norm.bias"),
        rule("head/kernel", "head.weight", TRANSPOSE),
        rule("head/bias", "head.bias"),
        drop("pre_logits/*", "the layer before the pre-training classifier; fine-tuning removes it"),
    ),
    "transformers": keymap(*_transformers("vit."), *_transformers(""), rule("classifier.*", "head.*"),
                           without={v: "a hybrid, which their ViT is not" for v in PRESETS if v.startswith("r")}),
}


def square(n: int) -> bool:
    return n > 0 and isqrt(n) ** 2 == n


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads, and the value that layer scale started at. Square images. JAX's GELU has the tanh form;
    transformers' norms have another epsilon."""
    dim, in_chans, patch, patch_w = state["embedding.proj.weight"].shape
    token = "embedding.cls" in state
    registers = state["embedding.registers"].shape[1] if "embedding.registers" in state else 0
    rows = state["embedding.position.table"].shape[1]
    before = int(token) + registers
    first = before > 0 and square(rows) and not square(rows - before)
    side = round((rows - (0 if first else before)) ** 0.5)
    gap = layout == "timm_gap"
    found: dict[str, Any] = {
        "dim": dim, "patch": patch if patch == patch_w else (patch, patch_w), "in_chans": in_chans,
        "img_size": side * patch if patch == patch_w else (side * patch, side * patch_w),
        "depth": count(state, f"{OURS}.mixer.norm.weight"),
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "pool": "token" if token and not gap else "mean", "pool_first": gap,
        "class_token": True if token and gap else None, "registers": registers, "position_first": first,
        "layer_scale": Assumed(1e-4, "where training begins, as DeiT III; the trained values are the file's")
        if "stages.0.layers.0.mixer.scale" in state else None,
    }
    fc1, fc2 = (state[f"stages.0.layers.0.channel.inner.{x}.weight"] for x in ("fc1", "fc2"))
    hidden = fc2.shape[1]
    if fc1.shape[0] == 2 * hidden:
        ratio = round(1.5 * hidden / dim)
        ratio = ratio if round(dim * ratio * 2 / 3) == hidden else 1.5 * hidden / dim
        found["channel"] = spec(SwiGLU, ratio=ratio, bias="stages.0.layers.0.channel.inner.fc1.bias" in state)
    else:
        mlp = spec(Mlp) if hidden == 4 * dim else spec(Mlp, ratio=told_ratio(hidden, dim))
        found["channel"] = mlp.but(approximate=True) if layout == "authors" else mlp
    if "stages.0.layers.0.mixer.inner.qkv.bias" not in state:
        found["mixer"] = spec(Attention, qkv_bias=False)
    found["norm"] = spec(LayerNorm, eps=1e-12) if layout == "transformers" else spec(LayerNorm)
    if "embedding.stem.conv.weight" in state:
        stages = range(count(state, "embedding.stem.stages.{i}.0.conv1.weight"))
        layers = tuple(count(state, f"embedding.stem.stages.{s}.{{i}}.conv1.weight") for s in stages)
        found |= {"stem_layers": layers, "in_chans": state["embedding.stem.conv.weight"].shape[1],
                  "img_size": side * patch * 4 * 2 ** max(0, len(layers) - 1)}
    return found
