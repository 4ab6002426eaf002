"""Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More (Wang, Yu, Wei, Shao, Zhou, Yuille, Xie,
ICML 2025), arXiv 2502.03738; the backbone is Adventurer (Wang et al., CVPR 2025), arXiv 2410.07599.

New: a finding. With everything else fixed, smaller patches classify better, down to a patch of one pixel. What makes that
affordable is Adventurer, a plain causal backbone whose cost is linear in the tokens: its mixer is Mamba-2 (arXiv
2405.21060), h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, here in chunks within which the scores are
written out. The class token comes last and so sees all; the mean of the tokens is put before the sequence (heading
average), so that the first see something too; in some layers the patches are taken in reverse order (inter-layer flipping).

Decisions: the paper flips two layers of every four, the released code the layers 2 and 3 (from 0) alone; the weights were
trained with the code, so that is the default (`alternate=True`: as the paper says). Our tokens have the class token first,
as all backbones here; the mixer puts it last, and files in the authors' layout are read so. The rates of drop path grow
from the first layer on, the authors' from the second. The DeiT arms are ViTs of another patch size. Training in three
stages of resolution is a matter of `load(..., img_size=)`, which resizes the positions; `patch=` resizes the patches'
kernel too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.build import create_model
from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.macs import count_macs
from ...core.model import Model, count_parameters
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import head_dim
from ...parts.channel import SwiGLU, linear
from ...parts.embed import PatchEmbed
from ...parts.norm import RMSNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...weights.keys import FUSE_PAIR, Assumed, Op, State, count, keymap, rule
from . import vit
from .vit import ViT

CARD = Card(
    title="Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    authors="Feng Wang, Yaodong Yu, Guoyizhe Wei, Wei Shao, Yuyin Zhou, Alan Yuille, Cihang Xie",
    venue="ICML 2025",
    arxiv="2502.03738",
    year=2025,
    code="https://github.com/wangf3014/Patch_Scaling",
    licence="the code and weights without a statement",
    kind="backbone",
    domain="image",
    tags=("plain", "state space", "recurrent", "patch size"),
    claim="Accuracy rises as patches shrink, down to one pixel: Adventurer-Base reaches 84.6 % ImageNet top-1 with the "
          "50,176 tokens of 224 x 224 pixels.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "tiny_p16": Published(params=11.61e6, input=(3, 224, 224), note="parameters of the authors' code"),
        "small_p16": Published(input=(3, 224, 224)),
        "base_p16": Published(input=(3, 224, 224)),
        "large_p16": Published(input=(3, 224, 224)),
        "tiny_p1": Published(input=(3, 224, 224), results={"ImageNet top-1": 81.9}),
        "small_p1": Published(input=(3, 224, 224), results={"ImageNet top-1": 83.8}),
        "base_p1": Published(input=(3, 224, 224), results={"ImageNet top-1": 84.6}),
        "large_p1": Published(input=(3, 224, 224)),
        "tiny_p1_128": Published(input=(3, 128, 128), results={"ImageNet top-1": 80.7}),
        "small_p1_128": Published(input=(3, 128, 128), results={"ImageNet top-1": 81.4}),
        "base_p1_128": Published(input=(3, 128, 128), results={"ImageNet top-1": 82.4}),
        "tiny_p1_64": Published(input=(3, 64, 64), results={"ImageNet top-1": 77.4}),
        "small_p1_64": Published(input=(3, 64, 64), results={"ImageNet top-1": 80.5}),
        "base_p1_64": Published(input=(3, 64, 64), results={"ImageNet top-1": 80.9}),
        "deit_base_p16": Published(params=86.57e6, macs=17.58e9, input=(3, 224, 224), note="the DeiT arm: a ViT"),
        "deit_base_p8": Published(input=(3, 224, 224), note="the DeiT arm"),
        "deit_base_p4": Published(input=(3, 224, 224), note="the DeiT arm"),
        "deit_base_p2": Published(input=(3, 224, 224), note="the DeiT arm"),
        "deit_base_p1": Published(input=(3, 224, 224), note="the DeiT arm"),
    },
)


# the sweep


class Row(NamedTuple):
    """One patch size of a sweep. tokens: those of patches. measured: what `measure` gave, e.g. an accuracy."""

    patch: int
    tokens: int
    parameters: int
    macs: int
    measured: float | None = None


def sweep(name: str, patches: Sequence[int], measure: Callable[[Model], float] | None = None,
          changes: Mapping[str, Any] | None = None) -> list[Row]:
    """A model by name, with its other `changes`, at each patch size. measure: gets the model afresh, trains it and says how
    good it is; without it only sizes are told."""
    rows = []
    for patch in patches:
        with torch.device("meta"):
            model = create_model(name, patch=patch, **(changes or {}))
            example = model.example(1)
            _, ctx = model.embed(example)
        if ctx.grid is None:
            raise DoesNotFit(f"a sweep of patch sizes needs a model of tokens on a grid, {name} has none")
        found = None if measure is None else float(measure(create_model(name, patch=patch, **(changes or {}))))
        rows.append(Row(patch, math.prod(ctx.grid), count_parameters(model), count_macs(model.eval(), example), found))
    return rows


def table(rows: Sequence[Row], measured: str = "accuracy") -> str:
    """A sweep as text."""
    lines = [f"{'patch':>5} {'tokens':>8} {'parameters':>12} {'MACs':>16}" + f" {measured:>10}"]
    return "\n".join(lines + [f"{r.patch:>5} {r.tokens:>8,} {r.parameters:>12,} {r.macs:>16,} "
                              + (f"{r.measured:>10.4f}" if r.measured is not None else f"{'-':>10}") for r in rows])


# Mamba-2


def state_space(x: Float[Tensor, "b n h p"], dt: Float[Tensor, "b n h"], a: Float[Tensor, "h"], b: Float[Tensor, "b n s"],
                c: Float[Tensor, "b n s"], *, chunk: int = 64) -> Float[Tensor, "b n h p"]:
    """y_t = h_t c_t with h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, from h = 0 on. a: negative. chunk: for speed alone.

    Within a chunk y_i is the sum over j <= i of (c_i . b_j) exp(l_i - l_j) dt_j x_j, where l is the running sum of dt a;
    what lies before it comes from the state at its start. In float32 at least.
    """
    n, answer = x.shape[1], x.dtype
    exact = torch.promote_types(answer, torch.float32)
    chunk = min(chunk, n)
    left = -n % chunk
    x, dt, a, b, c = (t.to(exact) for t in (x, dt, a, b, c))
    x = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, left)).unflatten(1, (-1, chunk)).transpose(2, 3)  # (B, K, H, L, P)
    b, c = (F.pad(t, (0, 0, 0, left)).unflatten(1, (-1, chunk)) for t in (b, c))  # (B, K, L, S)
    run = F.pad(dt * a, (0, 0, 0, left)).unflatten(1, (-1, chunk)).cumsum(2).transpose(2, 3)  # (B, K, H, L)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (run[..., :, None] - run[..., None, :]).masked_fill(later, -math.inf).exp()
    out = ((c @ b.transpose(-2, -1))[:, :, None] * decay) @ x
    added = (x * (run[..., -1:] - run).exp()[..., None]).transpose(-2, -1) @ b[:, :, None]  # (B, K, H, P, S)
    state, states = torch.zeros_like(added[:, 0]), []
    for kept, new in zip(run[..., -1].exp()[..., None, None].unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = kept * state + new
    out = out + run.exp()[..., None] * (c[:, :, None] @ torch.stack(states, 1).transpose(-2, -1))
    return out.transpose(2, 3).flatten(1, 2)[:, :n].to(answer)


class Mamba2(Part):
    """The selective state space of Mamba-2 as a causal token mixer, with one group of B and C.

    expand: inner width in units of dim; width: of a head; state: of a state; conv: tokens that the short convolution sees.
    eps: of the gated norm.
    """

    def __init__(self, dim: int, place: Place, *, state: int = 64, expand: float = 2, width: int = 64, conv: int = 4,
                 eps: float = 1e-5) -> None:
        super().__init__(dim, place)
        if min(state, width, conv) < 1:
            raise DoesNotFit(f"state, width and conv are 1 or more, got {state}, {width} and {conv}")
        inner = int(dim * expand)
        heads = inner // head_dim(inner, max(1, inner // width))
        self.sizes = (inner, inner + 2 * state, heads)
        self.state, self.heads = state, heads
        self.qkv = linear(dim, sum(self.sizes), bias=False)  # the gate; x, B and C; dt
        self.conv = nn.Conv1d(self.sizes[1], self.sizes[1], conv, groups=self.sizes[1])
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1))).clamp_min(1e-4)
        self.dt = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt
        self.decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.through = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=eps)
        self.proj = linear(inner, dim, bias=False)
        with torch.no_grad():
            self.proj.weight /= math.sqrt(place.depth)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        gate, mixed, dt = self.qkv(x).split(self.sizes, dim=-1)
        mixed = F.silu(self.conv(F.pad(mixed.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0)))).transpose(1, 2)
        x, b, c = mixed.split((self.sizes[0], self.state, self.state), dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        y = state_space(x, F.softplus(dt + self.dt), -self.decay.exp(), b, c) + x * self.through[:, None]
        return self.proj(self.norm(y.flatten(2) * F.silu(gate)))


class AdventurerMixer(Mamba2):
    """Mamba-2 over the mean of all tokens, the patches, and the class token. flip: the patches in reverse order."""

    def __init__(self, dim: int, place: Place, *, state: int = 64, expand: float = 2, width: int = 64, conv: int = 4,
                 flip: bool = False) -> None:
        super().__init__(dim, place, state=state, expand=expand, width=width, conv=conv)
        self.flip = flip

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        before, patches = x[:, :ctx.prefix], x[:, ctx.prefix:]
        row = torch.cat((x.mean(1, keepdim=True), patches.flip(1) if self.flip else patches, before), dim=1)
        y = super().forward(row, ctx)[:, 1:]
        patches, before = y[:, :patches.shape[1]], y[:, patches.shape[1]:]
        return torch.cat((before, patches.flip(1) if self.flip else patches), dim=1)


class Adventurer(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    state, expand, width, conv: see `Mamba2`. ratio: hidden width of the SwiGLU. alternate: every other pair of layers is
    flipped, as in the paper; else the layers 2 and 3 alone, as in the released code.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 256, depth: int = 12, state: int = 64, expand: float = 2,
                 width: int = 64, conv: int = 4, ratio: float = 2.5, alternate: bool = False,
                 drop_path: float = 0.0, residual: Spec[Residual] = spec(PreNorm)) -> None:
        norm = spec(RMSNorm, eps=1e-5)
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=True, position=spec(LearnedPosition))
        mixer = spec(AdventurerMixer, state=state, expand=expand, width=width, conv=conv)
        turns = [mixer.but(flip=i // 2 % 2 == 1 if alternate else i // 2 == 1) for i in range(depth)]
        block = {"mixer": turns, "channel": spec(SwiGLU, ratio=1.5 * ratio, bias=True)}
        super().__init__(embed, [Stage(dim, depth, block, residual.offer(norm=norm, drop_path=drop_path))],
                         img_size=img_size, norm=norm, num_classes=num_classes, pool="token")
        nn.init.trunc_normal_(embed.cls, std=0.02)  # type: ignore[arg-type]


SIZES = {"tiny": spec(Adventurer), "small": spec(Adventurer, dim=512), "base": spec(Adventurer, dim=768),
         "large": spec(Adventurer, dim=1024, depth=24)}
PRESETS = {
    "nano": spec(Adventurer, img_size=28, patch=4, dim=64, depth=4, state=16, width=16),
    **{f"{size}_p{patch}": model.but(patch=patch) for patch in (16, 1) for size, model in SIZES.items()},
    **{f"{size}_p1_{pixels}": SIZES[size].but(patch=1, img_size=pixels) for pixels in (128, 64)
       for size in ("tiny", "small", "base")},
    **{f"deit_base_p{patch}": spec(ViT, dim=768, depth=12, heads=12, patch=patch) for patch in (16, 8, 4, 2, 1)},
}

LAST_FIRST = Op(lambda t, o: [t[0].roll(1, 1)], lambda t, o: [t[0].roll(-1, 1)])  # their class token is the last
OURS = "stages.0.layers.{i}"
KEYS = {"authors": keymap(
    rule("cls_token", "embedding.cls"),
    rule("pos_embed", "embedding.position.table", LAST_FIRST),
    rule("patch_embed.proj.*", "embedding.proj.*"),
    rule("layers.{i}.norm.weight", f"{OURS}.mixer.norm.weight"),
    rule("layers.{i}.mixer.in_proj.weight", f"{OURS}.mixer.inner.qkv.weight"),
    rule("layers.{i}.mixer.conv1d.*", f"{OURS}.mixer.inner.conv.*"),
    rule("layers.{i}.mixer.dt_bias", f"{OURS}.mixer.inner.dt"),
    rule("layers.{i}.mixer.A_log", f"{OURS}.mixer.inner.decay"),
    rule("layers.{i}.mixer.D", f"{OURS}.mixer.inner.through"),
    rule("layers.{i}.mixer.norm.weight", f"{OURS}.mixer.inner.norm.weight"),
    rule("layers.{i}.mixer.out_proj.weight", f"{OURS}.mixer.inner.proj.weight"),
    rule("layers.{i}.norm_mlp.weight", f"{OURS}.channel.norm.weight"),
    *[rule((f"layers.{{i}}.mlp.w1.{x}", f"layers.{{i}}.mlp.w2.{x}"), f"{OURS}.channel.inner.fc1.{x}", FUSE_PAIR)
      for x in ("weight", "bias")],
    rule("layers.{i}.mlp.w3.*", f"{OURS}.channel.inner.fc2.*"),
    rule("norm_f.weight", "norm.weight"),
    rule("head.*", "head.*"),
    without={v: "a ViT, which the authors' other layout holds" for v in PRESETS if v.startswith("deit")},
)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes. Square images. Untold by the tensors: which layers are flipped."""
    layer = "stages.0.layers.0"
    if f"{layer}.mixer.inner.decay" not in state:
        return vit.settings(state, layout)
    dim, in_chans, patch, _ = state["embedding.proj.weight"].shape
    inner, heads = state[f"{layer}.mixer.inner.proj.weight"].shape[1], len(state[f"{layer}.mixer.inner.decay"])
    channels, _, conv = state[f"{layer}.mixer.inner.conv.weight"].shape
    return {
        "dim": dim, "in_chans": in_chans, "patch": patch, "depth": count(state, f"{OURS}.mixer.norm.weight"),
        "img_size": round((state["embedding.position.table"].shape[1] - 1) ** 0.5) * patch,
        "expand": inner / dim, "width": inner // heads, "state": (channels - inner) // 2, "conv": conv,
        "ratio": state[f"{layer}.channel.inner.fc2.weight"].shape[1] / dim,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "alternate": Assumed(False, "the order of the patches leaves no trace in the tensors; as the released code has it"),
    }
