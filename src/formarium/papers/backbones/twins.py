"""Twins: Revisiting the Design of Spatial Attention in Vision Transformers (Chu et al., NeurIPS 2021), arXiv 2104.13840.

New: spatially separable attention (Eq. 5). Layers take turns: attention within windows that stay where they are (LSA), then
of all tokens to one for each k x k of them, made by a strided convolution (GSA), which joins the windows. This is
Twins-SVT; Twins-PCPVT is a PVT (arXiv 2102.12122), so GSA in all layers. Both have conditional positions: after the
first layer of each stage a depthwise convolution of the map is added (PEG, arXiv 2102.10882), in place of tables.

Decisions, after the authors' code: norms have eps 1e-6, but 1e-5 after patches and strides. Grids that are no multiple of
the window are padded with zeros below and to the right, after the norm, as the detection code has it; padding is not
masked. Images that are no multiple of the patch are padded likewise; merging leaves an odd row or column out. So any size
works that leaves a token for each stride. With a stride of 1 attention is global and has no convolution.
"""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import ConvEmbed, PatchEmbed, pair, to_map, to_tokens
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition
from ...parts.residual import PreNorm, start_residuals
from ...parts.stem import Stem
from ...parts.window import from_windows, pad_to_windows, to_windows
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.stack import Stack
from ...weights.keys import Assumed, State, as_preset, count, keymap, rule, told_ratio

PATCH_NORM = spec(LayerNorm, eps=1e-5)

CARD = Card(
    title="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
    authors="Xiangxiang Chu, Zhi Tian, Yuqing Wang, Bo Zhang, Haibing Ren, Xiaolin Wei, Huaxia Xia, Chunhua Shen",
    venue="NeurIPS 2021",
    arxiv="2104.13840",
    year=2021,
    code="https://github.com/Meituan-AutoML/Twins",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("window attention", "subsampled attention", "pyramid", "conditional positions"),
    claim="Windows that stay, in turn with attention to a subsampled map, beat shifted windows at less cost: Twins-SVT-S "
          "has 81.7 % ImageNet top-1 at 2.9 G MACs, Swin-T 81.3 % at 4.5 G.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "svt_small": Published(params=24.06e6, macs=2.9e9, input=(3, 224, 224), results={"ImageNet top-1": 81.7},
                               note="24.06 M parameters in the authors' code, 24 M in their table; MACs here and below "
                                    "are the paper's, quoted from memory (2.8, 8.3, 14.8, 3.7, 6.4 and 9.5 G in their "
                                    "table of files, without the products of attention)"),
        "svt_base": Published(params=56.07e6, macs=8.6e9, input=(3, 224, 224), results={"ImageNet top-1": 83.2},
                              note="56.07 M parameters in the authors' code, 56 M in their table"),
        "svt_large": Published(params=99.2e6, macs=15.1e9, input=(3, 224, 224), results={"ImageNet top-1": 83.7}),
        "pcpvt_small": Published(params=24.1e6, macs=3.8e9, input=(3, 224, 224), results={"ImageNet top-1": 81.2}),
        "pcpvt_base": Published(params=43.8e6, macs=6.7e9, input=(3, 224, 224), results={"ImageNet top-1": 82.7}),
        "pcpvt_large": Published(params=60.9e6, macs=9.8e9, input=(3, 224, 224), results={"ImageNet top-1": 83.1}),
    },
    can=("any_size",),
)

PARTS = {
    "mixer": {"local": "LocalAttention", "subsampled": "SubsampledAttention"},
}


class LocalAttention(Part):
    """LSA: attention within windows of `window` tokens a side, which stay where they are and have no positions."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, window: int | tuple[int, int] = 7) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads, self.window = heads, pair(window)
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h, w = ctx.need_grid(self)
        x = pad_to_windows(x.unflatten(1, (h, w)), self.window)
        padded = (x.shape[1], x.shape[2])
        q, k, v = split_heads(self.qkv(to_windows(x, self.window)), 3, self.heads)
        x = from_windows(self.proj(join_heads(attend(q, k, v))), self.window, padded)
        return x[:, :h, :w].flatten(1, 2)


class SubsampledAttention(Part):
    """GSA: all tokens attend to one for each `step` x `step` of them, a strided convolution and a norm (PVT, arXiv
    2102.12122). Sides that are no multiple lose their rest. step: 1 is attention to all tokens, without a convolution."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, step: int | tuple[int, int] = 7) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads, self.step = heads, pair(step)
        self.q = linear(dim, dim)
        self.sr = None if self.step == (1, 1) else nn.Conv2d(dim, dim, self.step, self.step)
        self.norm = None if self.sr is None else PATCH_NORM(dim)
        self.kv = linear(dim, 2 * dim)
        self.proj = linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        grid = ctx.need_grid(self)
        if grid[0] < self.step[0] or grid[1] < self.step[1]:
            raise DoesNotFit(f"SubsampledAttention takes one token for each {self.step[0]}x{self.step[1]}, the grid has "
                             f"{grid[0]}x{grid[1]}; take a smaller step=")
        few = x if self.sr is None or self.norm is None else self.norm(to_tokens(self.sr(to_map(x, grid))))
        (q,), (k, v) = split_heads(self.q(x), 1, self.heads), split_heads(self.kv(few), 2, self.heads)
        return self.proj(join_heads(attend(q, k, v)))


class PEG(AbsolutePosition):
    """x + a depthwise 3x3 convolution of x on the grid (arXiv 2102.10882): zeros at the edges tell where they are."""

    edges = "zeros"

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__(dim, tokens)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, padding_mode=self.edges)
        self.conv.undecayed = ("weight",)  # as the authors train it

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return x + to_tokens(self.conv(to_map(x, ctx.need_grid(self))))


class NormedMerging(ConvEmbed):
    """2x2 neighbours to one token of `out_dim`, by a convolution with a norm after it. An odd side loses its last line."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel=2, stride=2, padding=0)
        self.norm = PATCH_NORM(out_dim)

    def forward(self, x: Tensor, ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = super().forward(x, ctx)
        return self.norm(x), ctx


class PositionedStack(Stack):
    """The layers of a stack, with a position after the first, which leaves its residual scheme for it."""

    def __init__(self, stack: Stack, position: AbsolutePosition) -> None:
        super().__init__(stack.dim, 0, {}, spec(PreNorm), resample=stack.resample)
        self.layers, self.depth, self.position = stack.layers, stack.depth, position

    def span(self, x: Float[Tensor, "b n c"], ctx: Ctx, taps: Sequence[int],
             layers: range) -> tuple[Tensor, Ctx, list[Tensor]]:
        if 0 not in layers:
            return super().span(x, ctx, taps, layers)
        x, ctx, _ = super().span(x, ctx, (), range(1))
        x = self.position(x, ctx)
        last, ctx, seen = super().span(x, ctx, taps, range(1, layers.stop))
        return last, ctx, [x, *seen] if 0 in taps else seen


class Twins(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    dims, depths, heads, ratios: of each stage. mixers: take turns in each stage. window: of local attention. steps: of
    subsampled attention in each stage. peg: the position after the first layer of a stage. stem: before the patches.
    init_std: of the linear layers, the authors' 0.02, with convolutions by their fan-out; None: what small widths need.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 4, in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (2, 2, 10, 4),
                 heads: tuple[int, ...] = (2, 4, 8, 16), ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0), window: int = 7,
                 steps: tuple[int, ...] = (8, 4, 2, 1), drop_path: float = 0.0,
                 mixers: Spec[Part] | tuple[Spec[Part], ...] = (spec(LocalAttention), spec(SubsampledAttention)),
                 channel: Spec[Part] = spec(Mlp), residual: Spec[Residual] = spec(PreNorm),
                 peg: Spec[AbsolutePosition] = spec(PEG), stem: Spec[Stem] | None = None,
                 init_std: float | None = 0.02) -> None:
        if not len(dims) == len(depths) == len(heads) == len(ratios) == len(steps) or not all(d > 0 for d in depths):
            raise DoesNotFit(f"{len(dims)} stages (dims) need as many depths, heads, ratios and steps, and each a layer at "
                             f"least; got {depths}, {heads}, {ratios}, {steps}")
        turns = (mixers,) if isinstance(mixers, Spec) else mixers
        residual = residual.offer(drop_path=drop_path)
        stages = [Stage(dim, depth, {"mixer": [m.offer(heads=h, window=window, step=step) for m in turns],
                                     "channel": channel.offer(ratio=ratio)}, residual, spec(NormedMerging) if i else None)
                  for i, (dim, depth, h, ratio, step) in enumerate(zip(dims, depths, heads, ratios, steps, strict=True))]
        super().__init__(PatchEmbed(in_chans, dims[0], patch=patch, norm=PATCH_NORM, pad=True, stem=stem), stages,
                         img_size=img_size, num_classes=num_classes)
        for i, stack in enumerate(self.stages):
            self.stages[i] = PositionedStack(stack, peg(dims[i], 0))  # type: ignore[arg-type]
        restart_linears(self, init_std)
        for module in self.modules():
            if init_std is not None and isinstance(module, nn.Conv2d) and module.bias is not None:
                each = math.prod(module.kernel_size) * module.out_channels / module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / each))
                nn.init.zeros_(module.bias)
        start_residuals(self)


PCPVT = spec(Twins, dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), ratios=(8.0, 8.0, 4.0, 4.0),
             mixers=(spec(SubsampledAttention),))
PRESETS = {
    "nano": spec(Twins, dims=(32, 64), depths=(2, 2), heads=(2, 4), ratios=(4.0, 4.0), steps=(2, 1), patch=2, img_size=28,
                 init_std=None),
    "svt_small": spec(Twins),
    "svt_base": spec(Twins, dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "svt_large": spec(Twins, dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "pcpvt_small": PCPVT.but(depths=(3, 4, 6, 3)),
    "pcpvt_base": PCPVT.but(depths=(3, 4, 18, 3)),
    "pcpvt_large": PCPVT.but(depths=(3, 8, 27, 3)),
}

OURS = "stages.{s}.layers.{i}"
RULES = (  # of the authors, whose names are timm's
    rule("patch_embeds.0.*", "embedding.*"),
    *[rule(f"patch_embeds.{s}.*", f"stages.{s}.resample.*") for s in range(1, 8)],
    rule("blocks.{s}.{i}.norm1.*", f"{OURS}.mixer.norm.*"),
    rule("blocks.{s}.{i}.attn.*", f"{OURS}.mixer.inner.*"),
    rule("blocks.{s}.{i}.norm2.*", f"{OURS}.channel.norm.*"),
    rule("blocks.{s}.{i}.mlp.*", f"{OURS}.channel.inner.*"),
    rule("pos_block.{s}.proj.0.*", "stages.{s}.position.conv.*"),
    rule("norm.*", "norm.*"),
    rule("head.*", "head.*"),
)
KEYS = {"timm": keymap(*RULES)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but heads, window and image size."""
    _, in_chans, patch, _ = state["embedding.proj.weight"].shape
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    depths = tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages)
    dims = tuple(state[f"stages.{s}.layers.0.mixer.norm.weight"].shape[0] for s in stages)
    hidden = [state[f"stages.{s}.layers.0.channel.inner.fc1.weight"].shape[0] for s in stages]
    strided = [[t.shape[-1] for name, t in state.items() if name.startswith(f"stages.{s}.layers.")
                and name.endswith(".mixer.inner.sr.weight")] for s in stages]
    deep = depths.index(max(depths))
    local = [f"stages.{deep}.layers.{i}.mixer.inner.qkv.weight" in state for i in range(min(2, depths[deep]))]
    kinds = local[:1] if len(set(local)) == 1 else local
    return {
        "dims": dims, "depths": depths, "in_chans": in_chans, "patch": patch,
        "ratios": tuple(told_ratio(h, d) for h, d in zip(hidden, dims, strict=True)),
        "steps": tuple(steps[0] if steps else 1 for steps in strided),
        "mixers": tuple(spec(LocalAttention) if here else spec(SubsampledAttention) for here in kinds),
        "heads": as_preset(PRESETS, "heads", tuple(max(1, d // 32) for d in dims), dims=dims),
        "window": Assumed(7, "leaves no trace in the tensors; as in all that are published"),
        "img_size": as_preset(PRESETS, "img_size", 224, dims=dims),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
