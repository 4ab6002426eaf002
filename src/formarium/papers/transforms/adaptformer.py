"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition (Chen, Ge, Tong, Wang, Song, Wang, Luo,
NeurIPS 2022), arXiv 2205.13535.

New: AdaptMLP. Parallel to the MLP of each layer stands a bottleneck, x + MLP(LN(x)) + s * up(ReLU(down(x))). It starts at
zero, so the adapted model starts as the pre-trained one; only the bottlenecks and the head are trained.

Decisions: the paper writes the bottleneck's input normed; the authors' code feeds the tokens as they are, which is what
their results have, so `layer_norm` is "none" unless given ("in": before down; "out": after up). The published setting is
parallel with s = 0.1 and dropout 0.1; "sequential" puts the bottleneck, with its own residual, behind the MLP's branch.
The branch is added to the stream, behind what the host does to the MLP's (layer scale, drop path, a norm after it). The
batch norm before the head in their image recipe is MAE's linear probe and not part of the method; from a file of theirs it
is folded into the head. Their files are a ViT with adapters, read with the help of papers/backbones/vit.py. The card's
accuracies are quoted from memory of the paper's table.
"""

import math
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.part import Part, Residual
from ...skeletons.stack import Stack
from ...weights.keys import FUSE, Assumed, Op, State, drop, keymap, rule
from ..backbones import vit

CARD = Card(
    title="AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
    authors="Shoufa Chen, Chongjian Ge, Zhan Tong, Jiangliu Wang, Yibing Song, Jue Wang, Ping Luo",
    venue="NeurIPS 2022",
    arxiv="2205.13535",
    year=2022,
    code="https://github.com/ShoufaChen/AdaptFormer",
    licence="MIT",
    kind="transform",
    domain="image",
    tags=("adapter", "fine-tuning", "parameter-efficient"),
    claim="Training bottlenecks beside the MLPs, under 2 % of the parameters, beats full fine-tuning of a ViT-B on "
          "Something-Something v2 (59.02 % against 53.97 %) and HMDB51 (55.69 % against 46.41 %).",
    hosts=("vit/nano", "swin/nano", "poolformer/nano", "gpt/nano"),
)

LOOKS_FOR = "layers with a sublayer 'channel' whose residual keeps the tokens alone as its state"
IDENTITY = {"scale": 0.0}
NORMS = ("none", "in", "out")


class Adapter(nn.Module):
    """scale * up(drop(ReLU(down(x)))), zero at the start. scale: a number, or None for one that is learned from 1 on."""

    undecayed = ("scale",)

    def __init__(self, dim: int, bottleneck: int, scale: float | None, dropout: float, layer_norm: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale = nn.Parameter(self.up.weight.new_ones(1)) if scale is None else scale
        self.dropout, self.first = dropout, layer_norm == "in"
        self.norm = None if layer_norm == "none" else nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if self.norm is not None and self.first:
            x = self.norm(x)
        x = self.up(F.dropout(F.relu(self.down(x)), self.dropout, self.training)) * self.scale
        return x if self.norm is None or self.first else self.norm(x)


class ParallelAdapter(Residual):
    """A residual with an adapter beside it; both read the tokens as they come."""

    def __init__(self, residual: Residual, adapter: Adapter) -> None:
        nn.Module.__init__(self)  # the inner part is the residual's
        self.place, self.residual, self.adapter = residual.place, residual, adapter

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return self.residual(state, ctx) + self.adapter(state)


class SequentialAdapter(Part):
    """A part with an adapter behind it."""

    def __init__(self, inner: Part, adapter: Adapter) -> None:
        super().__init__(inner.dim, inner.place)
        self.inner, self.adapter = inner, adapter

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        x = self.inner(x, ctx)
        return x + self.adapter(x)


def adaptformer(model: Model, *, bottleneck: int = 64, scale: float | str = 0.1, dropout: float = 0.1,
                mode: str = "parallel", layer_norm: str = "none") -> int:
    """Adapters in all layers; all else is frozen but the head. scale: a number or "learned"; returns the layers adapted."""
    if mode not in ("parallel", "sequential"):
        raise unknown("mode of adaptformer", mode, ("parallel", "sequential"))
    if layer_norm not in NORMS:
        raise unknown("layer_norm of adaptformer", layer_norm, NORMS)
    if isinstance(scale, str) and scale != "learned":
        raise unknown("scale of adaptformer, else a number,", scale, ("learned",))
    if bottleneck < 1 or not 0 <= dropout < 1:
        raise DoesNotFit(f"bottleneck is 1 or more and dropout in [0, 1), got {bottleneck} and {dropout}")
    places = [(stack.dim, layer) for stack in model.modules() if isinstance(stack, Stack) for layer in stack.layers
              if "channel" in layer and type(layer["channel"]).enter is Residual.enter]
    if not places:
        return 0
    like = next(p for p in model.parameters() if p.is_floating_point())
    for dim, layer in places:
        adapter = Adapter(dim, bottleneck, None if isinstance(scale, str) else scale, dropout, layer_norm)
        adapter.to(like.device, like.dtype)
        residual = layer["channel"]
        if mode == "parallel":
            layer["channel"] = ParallelAdapter(residual, adapter)
            continue
        while isinstance(residual, ParallelAdapter):
            residual = residual.residual
        residual.inner = SequentialAdapter(residual.inner, adapter)
    model.requires_grad_(False)
    heads = [child for name, child in model.named_children() if name.startswith("head")]
    for trained in [*heads, *(m for m in model.modules() if isinstance(m, Adapter))]:
        for p in trained.parameters():
            p.requires_grad_(p.is_floating_point())
    return len(places)


TRANSFORM = adaptformer

PROBE_EPS = 1e-6  # of the batch norm without weights before the head, in their image recipe
FOLD = Op(lambda t, o: [t[0] * (t[3] + PROBE_EPS).rsqrt(), t[1] - (t[0] * (t[3] + PROBE_EPS).rsqrt()) @ t[2]],
          lambda t, o: [t[0], t[1], t[0].new_zeros(t[0].shape[1]), t[0].new_full((t[0].shape[1],), 1 - PROBE_EPS)])
OURS, THEIRS = "stages.0.layers.{i}", "blocks.{i}"
KEYS = {
    "authors": keymap(
        rule([f"{THEIRS}.attn.{x}_proj.weight" for x in "qkv"], f"{OURS}.mixer.inner.qkv.weight", FUSE),
        rule([f"{THEIRS}.attn.{x}_proj.bias" for x in "qkv"], f"{OURS}.mixer.inner.qkv.bias", FUSE),
        rule(f"{THEIRS}.norm2.*", f"{OURS}.channel.residual.norm.*"),
        *[rule(f"{THEIRS}.{fc}.*", f"{OURS}.channel.residual.inner.{fc}.*") for fc in ("fc1", "fc2")],
        rule(f"{THEIRS}.adaptmlp.down_proj.*", f"{OURS}.channel.adapter.down.*"),
        rule(f"{THEIRS}.adaptmlp.up_proj.*", f"{OURS}.channel.adapter.up.*"),
        rule(f"{THEIRS}.adaptmlp.adapter_layer_norm_before.*", f"{OURS}.channel.adapter.norm.*"),
        rule(f"{THEIRS}.adaptmlp.scale", f"{OURS}.channel.adapter.scale"),
        rule(("head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var"),
             ("head.weight", "head.bias"), FOLD),
        drop("head.0.num_batches_tracked", "a count of training steps"),
        *vit.KEYS["timm"].rules,
        makes="vit",
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """The ViT's settings, and the adapters'."""
    adapter = "stages.0.layers.0.channel.adapter"
    told = {"bottleneck": state[f"{adapter}.down.weight"].shape[0],
            "scale": "learned" if f"{adapter}.scale" in state else Assumed(0.1, "a number leaves no trace in the tensors"),
            "mode": Assumed("parallel", "leaves no trace in the tensors; the authors release no other")}
    if f"{adapter}.norm.weight" in state:
        told["layer_norm"] = Assumed("in", "where the layer norm stands leaves no trace in the tensors")
    return vit.settings({k.replace(".channel.residual.", ".channel."): v for k, v in state.items()}, "timm") | told
