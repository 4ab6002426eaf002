"""ViR: Towards Efficient Vision Retention Backbones (Hatamizadeh, Ranzinger, Lan, Alvarez, Fidler, Kautz, 2023; first as
Vision Retention Networks), arXiv 2310.19731. Retention is from Retentive Network (Sun et al. 2023, arXiv 2307.08621).

New: an image backbone with retention instead of attention. A head forgets at its own rate gamma:
o_n = q_n S_n / sqrt(d), S_n = gamma S_{n-1} + k_n^T v_n, which in parallel is O = (Q K^T / sqrt(d) * D) V with
D_nm = gamma^(n-m) for n >= m, else 0; and chunk by chunk. All three give the same numbers: one trains in parallel and
answers in a memory that does not grow with the image. No softmax, no gate. Patches follow one another row by row, so the
class token comes last, as it must see all of them. HViR: convolutions in the first two stages, retention in the last two.

Decisions: NVlabs/ViR, the repository that the paper names, holds a README alone. Sizes, rates (1 - gamma from 1/32 to
1/512, evenly in the logarithm), layer scale, positions of the patches alone and the names of tensors are those of the code
"by authors of ViR" in anom63931/ViR; it has no weights. That code's parallel form takes a softmax after D, so that hidden
tokens weigh too and it equals neither of its other forms; ours is the equations'. Chunks of all tokens are the parallel
form and chunks of one the recurrent: it is one function. The class token lies first in memory, as everywhere in this
library, and is read last. It starts at a deviation of 0.02, theirs of 1e-6: a query of zero reads nothing. The
convolutional stages of HViR are those of the same authors' FasterViT, as we remember it, and its sizes are ours: no text
that we could read tells them. Their bidirectional mode, which runs over the patches there and back, and the second
version's two-dimensional retention are not here. The preset tiny is not in their code.
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
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear
from ...parts.embed import ConvEmbed, PatchEmbed, check_images, to_map, to_tokens
from ...parts.norm import BatchNorm, LayerNorm, NoNorm
from ...parts.position import AbsolutePosition, LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.adapt import Change, refit_kernel
from ...weights.keys import Assumed, State, as_preset, count, keymap, rule
from . import vit

CARD = Card(
    title="ViR: Towards Efficient Vision Retention Backbones",
    authors="Ali Hatamizadeh, Michael Ranzinger, Shiyi Lan, Jose M. Alvarez, Sanja Fidler, Jan Kautz",
    venue="arXiv 2023",
    arxiv="2310.19731",
    year=2023,
    code="https://github.com/NVlabs/ViR",
    licence="not said (no code in the repository that the paper names)",
    kind="backbone",
    domain="image",
    tags=("retention", "recurrent", "linear attention", "causal", "efficient"),
    claim="The first general vision backbone with equal parallel and recurrent forms: about the accuracy of ViT, more "
          "images a second and less memory at high resolution.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "tiny": Published(note="ViR-T/16"),
        "small": Published(note="ViR-S/16"),
        "base": Published(note="ViR-B/16"),
        "large": Published(note="ViR-L/16"),
        "large_p14": Published(note="ViR-L/14"),
        "hvir_nano": Published(note="ours: the hybrid; the sizes of HViR-1 to 4 are not known to us"),
    },
)

PARTS = {
    "mixer": {"retention": "Retention"},
}

MODES = ("parallel", "chunkwise", "recurrent")


def retention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], decay: Float[Tensor, "h"], *,
    state: Float[Tensor, "b h d e"] | None = None, chunk: int = 64,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """o_n = q_n S_n, S_n = gamma S_{n-1} + k_n^T v_n for gamma = `decay` of each head: the answers, and the last S.

    state: S before the first token; None: zero. chunk: tokens whose scores are written out together; n is the parallel
    form, 1 the recurrent. Only the state passes from chunk to chunk.
    """
    chunk = min(chunk, q.shape[2])
    i = torch.arange(chunk, device=q.device)
    rate = decay.log()[:, None, None]
    among = (rate * (i[:, None] - i).clamp_min(0)).exp().tril().to(q.dtype)  # D, (H, chunk, chunk)
    since = (rate * (i + 1)[:, None]).exp().to(q.dtype)  # gamma^1, gamma^2, ...: (H, chunk, 1)
    out = []
    for q_i, k_i, v_i in zip(*(t.split(chunk, dim=2) for t in (q, k, v)), strict=True):
        n = q_i.shape[2]
        o = (q_i @ k_i.transpose(-2, -1) * among[:, :n, :n]) @ v_i
        added = (k_i * among[:, n - 1, :n, None]).transpose(-2, -1) @ v_i
        if state is not None:
            o, added = o + q_i * since[:, :n] @ state, added + since[:, n - 1:n] * state
        state = added
        out.append(o)
    assert state is not None
    return torch.cat(out, dim=2), state


class Retention(Part):
    """Multi-head retention: a causal mixer. Tokens before the grid (ctx.prefix) are read last.

    mode: "parallel", "chunkwise" (of `chunk` tokens) or "recurrent": the same answers at other memory and speed.
    span: tokens after which the first and the last head have forgotten all but 1/e, about; 1 / (1 - gamma).
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, causal: bool = True,
                 mode: str = "parallel", chunk: int = 64, span: tuple[float, float] = (32.0, 512.0)) -> None:
        super().__init__(dim, place)
        if not causal:
            raise DoesNotFit("retention has no form that sees later tokens: its state is built from first to last; "
                             "take causal=True")
        if min(span) <= 1:
            raise DoesNotFit(f"span is of more than one token, got {span}")
        self.heads, self.span = heads, span
        self.scale = head_dim(dim, heads) ** -0.5
        self.read(mode, chunk)
        self.qkv = linear(dim, 3 * dim, bias=bias)
        self.out_proj = linear(dim, dim, bias=bias)

    def read(self, mode: str, chunk: int) -> None:
        """From now on in this mode."""
        if mode not in MODES:
            raise unknown("mode of retention", mode, MODES)
        if chunk < 1:
            raise DoesNotFit(f"a chunk is 1 token or more, got {chunk}")
        self.mode, self.chunk = mode, chunk

    def decay(self, device: torch.device | None = None) -> Float[Tensor, "h"]:
        """gamma of each head."""
        first, last = (-math.log(s) for s in self.span)
        return 1 - torch.linspace(first, last, self.heads, device=device, dtype=torch.float32).exp()

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        if ctx.mask is not None:
            raise DoesNotFit("retention forms no scores that a mask could hide, and a hidden token would stay in its "
                             "state: leave padding out, or pack the sequences (lengths=)")
        if ctx.lengths is not None:
            if ctx.cache is not None:
                raise DoesNotFit("retention caches one state for each row, and a packed row has several: decode a batch")
            alone = replace(ctx, lengths=None)
            return torch.cat([self(sequence, alone) for sequence in x.split(ctx.lengths, dim=1)], dim=1)
        q, k, v = split_heads(self.qkv(_rolled(x, ctx.prefix)), 3, self.heads)
        state = None if ctx.cache is None else ctx.cache.states.get(self.place)
        chunk = {"parallel": x.shape[1], "chunkwise": self.chunk, "recurrent": 1}[self.mode]
        out, state = retention(q * self.scale, k, v, self.decay(x.device), state=state, chunk=chunk)
        if ctx.cache is not None:
            ctx.cache.states[self.place] = state
        return _rolled(self.out_proj(join_heads(out)), x.shape[1] - ctx.prefix)


def _rolled(x: Tensor, first: int) -> Tensor:
    """The first tokens after all others."""
    return x if first % x.shape[1] == 0 else torch.cat((x[:, first:], x[:, :first]), dim=1)


def set_mode(model: nn.Module, mode: str, chunk: int = 64) -> int:
    """All retention layers of a model answer in this mode from now on; returns how many they are."""
    layers = [m for m in model.modules() if isinstance(m, Retention)]
    if not layers:
        raise DoesNotFit(f"{type(model).__name__} has no retention layer; build it with mixer='retention'")
    for layer in layers:
        layer.read(mode, chunk)
    return len(layers)


class ViR(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    mode: "parallel", "chunkwise" (of `chunk` tokens) or "recurrent"; `set_mode` changes it. pool: "token" classifies the
    class token, which is read last, "mean" the mean of the patches.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 384, depth: int = 12, heads: int = 6, drop_path: float = 0.0,
                 layer_scale: float | None = 1e-5, pool: str = "token", mode: str = "parallel", chunk: int = 64,
                 mixer: Spec[Part] = spec(Retention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[AbsolutePosition] = spec(LearnedPosition)) -> None:
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=pool == "token", position=position,
                           position_first=True)
        stage = Stage(dim, depth, {"mixer": mixer.offer(heads=heads, mode=mode, chunk=chunk), "channel": channel},
                      residual.offer(norm=norm, drop_path=drop_path, layer_scale=layer_scale))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes, pool=pool)
        if embed.cls is not None:
            nn.init.trunc_normal_(embed.cls, std=0.02)


class ConvStem(Resample):
    """Two 3x3 convolutions of stride 2, each with batch norm and ReLU."""

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.in_chans, self.step = in_chans, (4, 4)
        self.conv1, self.norm1 = nn.Conv2d(in_chans, dim, 3, 2, 1, bias=False), BatchNorm(dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, 2, 1, bias=False), BatchNorm(dim)

    def refit(self, name: str, tensor: Tensor | None, was: "ConvStem") -> Change | None:
        return refit_kernel(tensor, self.conv1.weight.shape) if name == "conv1.weight" and tensor is not None else None

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        check_images(x, self.in_chans)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return to_tokens(x), replace(ctx, grid=(x.shape[2], x.shape[3]))


class ConvBlock(Part):
    """3x3 convolution, batch norm, GELU, 3x3 convolution, batch norm."""

    def __init__(self, dim: int, place: Place) -> None:
        super().__init__(dim, place)
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, 1, 1), BatchNorm(dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, 1, 1), BatchNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        y = F.gelu(self.norm1(self.conv1(to_map(x, ctx.need_grid(self)))))
        return to_tokens(self.norm2(self.conv2(y)))


class HViR(Backbone):
    """images (B, in_chans, H, W) of any size -> logits (B, num_classes). Convolutions, then, in two stages, retention.

    heads: of the last two stages.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, in_chans: int = 3, num_classes: int = 1000,
                 dims: tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (2, 3, 6, 5),
                 heads: tuple[int, int] = (8, 16), drop_path: float = 0.0, layer_scale: float | None = None,
                 mode: str = "parallel", chunk: int = 64, channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm)) -> None:
        if not len(dims) == len(depths) == 4 or len(heads) != 2:
            raise DoesNotFit("HViR has four stages, retention in the last two: four dims and depths, two heads; got "
                             f"{dims}, {depths} and {heads}")
        residual = spec(PreNorm, drop_path=drop_path, layer_scale=layer_scale)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            own = residual.but(norm=spec(NoNorm) if i < 2 else norm)
            mixer = spec(Retention, heads=heads[max(0, i - 2)], mode=mode, chunk=chunk)
            sublayers = {"conv": spec(ConvBlock)} if i < 2 else {"mixer": mixer, "channel": channel}
            stages.append(Stage(dim, depth, sublayers, own, spec(ConvEmbed) if i else None))
        super().__init__(ConvStem(in_chans, dims[0]), stages, img_size=img_size, norm=norm, num_classes=num_classes)


PRESETS = {
    "nano": spec(ViR, dim=64, depth=4, heads=4, patch=4, img_size=28, layer_scale=1.0),
    "tiny": spec(ViR, dim=192, heads=3),
    "small": spec(ViR),
    "base": spec(ViR, dim=768, heads=12),
    "large": spec(ViR, dim=1024, depth=24, heads=16),
    "large_p14": spec(ViR, dim=1024, depth=24, heads=16, patch=14),
    "hvir_nano": spec(HViR, dims=(16, 32, 48, 64), depths=(1, 1, 2, 2), heads=(3, 4), img_size=28),
}

KEYS = {
    "authors": keymap(
        rule("cls_token", "embedding.cls"),
        rule("pos_embed", "embedding.position.table"),
        rule("patch_embed.proj.*", "embedding.proj.*"),
        rule("blocks.{i}.norm1.*", f"{vit.OURS}.mixer.norm.*"),
        rule("blocks.{i}.retention.*", f"{vit.OURS}.mixer.inner.*"),
        rule("blocks.{i}.ls1.gamma", f"{vit.OURS}.mixer.scale"),
        rule("blocks.{i}.norm2.*", f"{vit.OURS}.channel.norm.*"),
        rule("blocks.{i}.mlp.*", f"{vit.OURS}.channel.inner.*"),
        rule("blocks.{i}.ls2.gamma", f"{vit.OURS}.channel.scale"),
        rule("norm.*", "norm.*"),
        rule("head.*", "head.*"),
        without={"hvir_nano": "their code has no hybrid"},
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but heads, rates and the start of the layer scale; of the hybrid, also but the image size."""
    if "embedding.conv1.weight" in state:
        stages = range(count(state, "stages.{i}.layers.0.conv.inner.conv1.weight") + 2)
        first = [f"stages.{s}.layers.0.{'conv.inner.conv1' if s < 2 else 'mixer.norm'}.weight" for s in stages]
        dims = tuple(state[name].shape[0] for name in first)
        return {
            "dims": dims, "in_chans": state["embedding.conv1.weight"].shape[1],
            "depths": tuple(len({k.split(".")[3] for k in state if k.startswith(f"stages.{s}.layers.")}) for s in stages),
            "heads": as_preset(PRESETS, "heads", tuple(max(1, d // 32) for d in dims[2:]), dims=dims),
            "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        }
    told = vit.settings({k: t for k, t in state.items() if k != "embedding.cls"}, "timm")  # its place is not in the table
    same = ("dim", "depth", "patch", "in_chans", "img_size", "num_classes", "channel", "norm")
    dim, scaled = told["dim"], "stages.0.layers.0.mixer.scale" in state
    scale = as_preset(PRESETS, "layer_scale", 1e-5, dim=dim) if scaled else None
    return {k: told[k] for k in same} | {
        "pool": "token" if "embedding.cls" in state else "mean", "layer_scale": scale,
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim),
        "mode": Assumed("parallel", "leaves no trace in the tensors; the answers are the same"),
    }
