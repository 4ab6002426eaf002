"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021), arXiv 2103.14030.

New: attention within windows of M x M tokens, at a cost linear in the image (Eq. 2); every second layer shifts the windows
by M/2, so that they exchange (Eq. 3), by a cyclic shift and a mask; a bias for each offset in the window (Eq. 4); four
stages, between which 2x2 tokens are merged.

Decisions: a stage whose grid is no larger than the window takes one window of the grid's size and does not shift, as the
classifier's code has it. Grids that are no multiple of the window are padded below and to the right before the shift, as
the authors' detection code has it; padding is not masked (timm pads after the shift, which lets the wrapped rows see
their opposites). So any image size works.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.embed import PatchEmbed, pair
from ...parts.norm import LayerNorm
from ...parts.residual import PreNorm, start_residuals
from ...parts.window import RelativeBias, from_windows, pad_to_windows, shift_mask, to_windows
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import FUSE, Assumed, State, count, drop, keymap, rule

NORM = spec(LayerNorm, eps=1e-5)

CARD = Card(
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    authors="Ze Liu, Yutong Lin, Yue Cao, Han Hu, Yixuan Wei, Zheng Zhang, Stephen Lin, Baining Guo",
    venue="ICCV 2021",
    arxiv="2103.14030",
    year=2021,
    code="https://github.com/microsoft/Swin-Transformer",
    licence="MIT (code and weights)",
    kind="backbone",
    domain="image",
    tags=("window attention", "pyramid", "relative position bias"),
    claim="Shifted windows keep attention linear in the image size and beat global attention on classification, detection "
          "and segmentation (87.3 % ImageNet top-1, 58.7 box AP on COCO, 53.5 mIoU on ADE20K).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(params=28.29e6, macs=4.5e9, input=(3, 224, 224), results={"ImageNet top-1": 81.2}),
        "small": Published(params=49.61e6, macs=8.7e9, input=(3, 224, 224), results={"ImageNet top-1": 83.2}),
        "base": Published(params=87.77e6, macs=15.4e9, input=(3, 224, 224),
                          results={"ImageNet top-1": 83.5, "ImageNet top-1 (ImageNet-22K)": 85.2}),
        "base_384": Published(params=87.9e6, macs=47.1e9, input=(3, 384, 384),
                              results={"ImageNet top-1": 84.5, "ImageNet top-1 (ImageNet-22K)": 86.4}),
        "large": Published(params=196.53e6, macs=34.5e9, input=(3, 224, 224),
                           results={"ImageNet top-1 (ImageNet-22K)": 86.3}),
        "large_384": Published(params=196.7e6, macs=103.9e9, input=(3, 384, 384),
                               results={"ImageNet top-1 (ImageNet-22K)": 87.3}),
    },
    can=("any_size",),
)

PARTS = {
    "mixer": {"window": "WindowAttention"},
}


class WindowAttention(Part):
    """Attention within windows, with a bias for each offset; shifted: the windows lie half a window further.

    window: (M, M), or smaller where the grid it is built for is (`grid`).
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, window: int = 7, shifted: bool = False,
                 grid: tuple[int, int] | None = None) -> None:
        super().__init__(dim, place)
        head_dim(dim, heads)
        self.heads, self.shifted = heads, shifted
        h, w = (window, window) if grid is None else (min(window, grid[0]), min(window, grid[1]))
        self.window = (h, w)
        self.qkv = linear(dim, 3 * dim)
        self.bias = RelativeBias(self.window, heads)
        self.proj = linear(dim, dim)

    def shift(self, grid: tuple[int, int]) -> tuple[int, int]:
        """By how much the windows of a grid lie further; an axis that one window covers does not shift."""
        (h, w), (m, n) = grid, self.window
        return (m // 2 if self.shifted and h > m else 0, n // 2 if self.shifted and w > n else 0)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h, w = ctx.need_grid(self)
        shift = self.shift((h, w))
        x = pad_to_windows(x.unflatten(1, (h, w)), self.window)
        padded = (x.shape[1], x.shape[2])
        q, k, v = split_heads(self.qkv(to_windows(x, self.window, shift)), 3, self.heads)
        bias = self._scores_bias(padded, shift, x)
        if bias.ndim == 4:  # one for each window: an axis of the batch apart, so that it need not be repeated
            q, k, v = (t.unflatten(0, (-1, len(bias))) for t in (q, k, v))
        x = self.proj(join_heads(self.mix(q, k, v, bias, padded, shift).flatten(0, -4)))
        return from_windows(x, self.window, padded, shift)[:, :h, :w].flatten(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        """The heads' outputs in each window: what papers that change the attention itself define anew."""
        return attend(q, k, v, bias=bias)

    def _scores_bias(self, grid: tuple[int, int], shift: tuple[int, int], x: Tensor) -> Tensor:
        """(heads, M*M, M*M), or one for each window, (windows, heads, M*M, M*M), where a shift needs its mask."""
        bias = self.bias()
        if not any(shift):
            return bias
        return bias.masked_fill(~shift_mask(grid, self.window, shift, x.device)[:, None], -100.0)


class PatchMerging(Resample):
    """2x2 neighbours to one token of `out_dim`: concatenated, normed, projected. Odd sides are padded with zeros."""

    step = (2, 2)

    def __init__(self, dim: int, out_dim: int, *, norm: Spec[nn.Module] = NORM) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        h, w = ctx.need_grid(self)
        x = pad_to_windows(x.unflatten(1, (h, w)), (2, 2))
        h, w = x.shape[1] // 2, x.shape[2] // 2
        x = x.unflatten(1, (h, 2)).unflatten(3, (w, 2)).permute(0, 1, 3, 4, 2, 5)  # down first, then right
        return self.reduction(self.norm(x.flatten(1, 2).flatten(2))), replace(ctx, grid=(h, w))


class Swin(Backbone):
    """images (B, in_chans, H, W) of any size from one patch up -> logits (B, num_classes).

    img_size: the size that the windows of the last stages are cut for; a larger image at run time is fine.
    dim: width of the first stage; it doubles from stage to stage. shifted: False is the paper's ablation (table 4).
    init_std: of the linear layers, the authors' 0.02; None: Xavier, which small widths need.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int = 4, in_chans: int = 3, num_classes: int = 1000,
                 dim: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), heads: tuple[int, ...] = (3, 6, 12, 24),
                 window: int = 7, shifted: bool = True, drop_path: float = 0.0, init_std: float | None = 0.02,
                 mixer: Spec[Part] = spec(WindowAttention), channel: Spec[Part] = spec(Mlp),
                 residual: Spec[Residual] = spec(PreNorm)) -> None:
        size = pair(img_size)
        residual = residual.offer(norm=NORM, drop_path=drop_path)
        stages = []
        for i, (depth, h) in enumerate(zip(depths, heads, strict=True)):
            cell = patch * 2**i
            grid = (-(-size[0] // cell), -(-size[1] // cell))
            own = mixer.offer(heads=h, window=window, grid=grid)
            turns = [own.offer(shifted=False), own.offer(shifted=shifted)]
            merging = spec(PatchMerging) if i else None
            stages.append(Stage(dim * 2**i, depth, {"mixer": turns, "channel": channel}, residual, merging))
        super().__init__(PatchEmbed(in_chans, dim, patch=patch, norm=NORM, pad=True), stages, img_size=img_size,
                         norm=NORM, num_classes=num_classes)
        restart_linears(self, init_std)
        start_residuals(self)


PRESETS = {
    "nano": spec(Swin, dim=32, depths=(2, 2), heads=(2, 4), patch=2, window=7, img_size=28, init_std=None),
    "tiny": spec(Swin),
    "small": spec(Swin, depths=(2, 2, 18, 2)),
    "base": spec(Swin, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "base_384": spec(Swin, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12, img_size=384),
    "large": spec(Swin, dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
    "large_384": spec(Swin, dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, img_size=384),
}


def _keys(merging_after: int, head: str) -> Any:
    """timm merges at the start of a stage, the authors at the end of the one before; their heads differ by a name."""
    return keymap(
        rule("patch_embed.proj.*", "embedding.proj.*"),
        rule("patch_embed.norm.*", "embedding.norm.*"),
        drop("layers.{s}.blocks.{i}.attn_mask", "rebuilt from the window size"),
        drop("layers.{s}.blocks.{i}.attn.relative_position_index", "rebuilt from the window size"),
        rule("layers.{s}.blocks.{i}.norm1.*", "stages.{s}.layers.{i}.mixer.norm.*"),
        rule("layers.{s}.blocks.{i}.attn.relative_position_bias_table", "stages.{s}.layers.{i}.mixer.inner.bias.table"),
        rule("layers.{s}.blocks.{i}.attn.*", "stages.{s}.layers.{i}.mixer.inner.*"),
        rule("layers.{s}.blocks.{i}.norm2.*", "stages.{s}.layers.{i}.channel.norm.*"),
        rule("layers.{s}.blocks.{i}.mlp.*", "stages.{s}.layers.{i}.channel.inner.*"),
        *[rule(f"layers.{s - merging_after}.downsample.*", f"stages.{s}.resample.*") for s in range(1, 8)],
        rule("norm.*", "norm.*"),
        rule(f"{head}.*", "head.*"),
    )


def _transformers(before: str) -> list[Any]:
    """Files and models of version 4, and after each the names that models have in memory in version 5."""
    theirs, ours = f"{before}encoder.layers.{{s}}.blocks.{{i}}", "stages.{s}.layers.{i}"
    parts = {"layernorm_before.*": "mixer.norm.*", "layernorm_after.*": "channel.norm.*",
             "attention.self.relative_position_bias_table": "mixer.inner.bias.table",
             "attention.relative_position_bias.relative_position_bias_table": "mixer.inner.bias.table",
             "attention.output.dense.*": "mixer.inner.proj.*", "attention.o_proj.*": "mixer.inner.proj.*",
             "intermediate.dense.*": "channel.inner.fc1.*", "output.dense.*": "channel.inner.fc2.*",
             "mlp.*": "channel.inner.*"}
    qkv = [[f"self.{x}" for x in ("query", "key", "value")], ["q_proj", "k_proj", "v_proj"]]
    return [rule(f"{before}embeddings.patch_embeddings.projection.*", "embedding.proj.*"),
            rule(f"{before}embeddings.norm.*", "embedding.norm.*"),
            drop(f"{before}embeddings.mask_token", "for pre-training on masked images"),
            drop(f"{theirs}.attention.self.relative_position_index", "rebuilt from the window size"),
            *[rule(f"{theirs}.{a}", f"{ours}.{b}") for a, b in parts.items()],
            *[rule([f"{theirs}.attention.{x}.{kind}" for x in names], f"{ours}.mixer.inner.qkv.{kind}", FUSE)
              for names in qkv for kind in ("weight", "bias")],
            *[rule(f"{before}encoder.layers.{s - 1}.downsample.*", f"stages.{s}.resample.*") for s in range(1, 8)],
            rule(f"{before}layernorm.*", "norm.*")]


KEYS = {"timm": _keys(0, "head.fc"), "authors": _keys(1, "head"),
        "transformers": keymap(*_transformers("swin."), *_transformers(""), rule("classifier.*", "head.*"))}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the image size: windows cut short by it show in their tables, else 32 windows' patches are taken."""
    dim, in_chans, patch, _ = state["embedding.proj.weight"].shape
    stages = range(count(state, "stages.{i}.layers.0.mixer.norm.weight"))
    tables = [state[f"stages.{s}.layers.0.mixer.inner.bias.table"].shape for s in stages]
    windows = [(round(rows**0.5) + 1) // 2 for rows, _ in tables]
    return {
        "dim": dim, "in_chans": in_chans, "patch": patch, "window": max(windows),
        "depths": tuple(count(state, f"stages.{s}.layers.{{i}}.mixer.norm.weight") for s in stages),
        "heads": tuple(heads for _, heads in tables),
        "img_size": Assumed(patch * 2 ** (len(windows) - 1) * windows[-1], "one window in the last stage; all sizes work"),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
