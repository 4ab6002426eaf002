"""Interpret Vision Transformers as ConvNets with Dynamic Convolutions (Zhou, Loy, Dai, 2023), arXiv 2309.10713.

New: a reading of attention (Figure 1). The product with the keys is a 1x1 convolution whose N filters are the keys, made of
the image itself; softmax is the activation between; the product with the values is a second such convolution, N channels to
d; heads are groups, and the projections before and after are static 1x1 convolutions. `two_convolutions` is that reading,
`convolution_gap` its check on a model. What follows from it: (1) softmax can be the activation of a ConvNet, ReLU and layer
norm, and then learns faster and better; (2) as many groups as channels, the depth-wise form.

Decisions: no code is public, and of the text we could read the abstract and the introduction alone, so the two studies are
reconstructions. "relu_ln": layer norm over the keys of ReLU(scores), with a learned gain and shift a head instead of one a
key, so that any number of tokens fits, divided by N; both start at one, so a row sums to one as softmax's does. "gelu_ln":
the same with GELU. "relu_n": ReLU(scores) / N, without parameters. Hidden keys weigh nothing and do not count in N and in
the norm. Depth-wise is heads = dim, a map of scores a channel. With ReLU it costs O(N): ReLU(q_i k_j) is |q_i| ReLU(k_j) or
|q_i| ReLU(-k_j), by the sign of q_i, so no map is formed. The names of presets are ours.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import Attention, watching
from ...parts.position import ScorePosition
from ...parts.window import shift_mask
from ...skeletons.backbone import Backbone
from ...weights.keys import Assumed, State
from ..backbones import vit
from ..backbones.swin import WindowAttention

CARD = Card(
    title="Interpret Vision Transformers as ConvNets with Dynamic Convolutions",
    authors="Chong Zhou, Chen Change Loy, Bo Dai",
    venue="arXiv 2023",
    arxiv="2309.10713",
    year=2023,
    kind="mixer",
    domain="image",
    tags=("dynamic convolution", "softmax-free", "depth-wise", "interpretation"),
    claim="Attention is two dynamic 1x1 convolutions with softmax between; ReLU and layer norm in its place learn faster "
          "and better, and a depth-wise form is more efficient at a comparable accuracy.",
    variants={
        "nano": Published(note="ours: vit/nano with ReLU and layer norm for softmax"),
        "tiny": Published(note="ViT-Ti/16 with ReLU and layer norm for softmax"),
        "small": Published(note="ViT-S/16 with ReLU and layer norm for softmax"),
        "tiny_depthwise": Published(note="ViT-Ti/16, as many heads as channels"),
    },
    hosts=("vit/nano",),
)

PARTS = {
    "mixer": {"dynamic_conv_window": "DynamicConvWindow"},
}

EPS = 1e-6  # of the layer norm
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {"softmax": None, "relu_ln": F.relu, "relu_n": F.relu,
                                                             "gelu_ln": F.gelu}


class ScoreActivation(nn.Module):
    """Scores (*B, heads, N, M) -> weights of the same shape. name: "softmax", "relu_ln", "relu_n" or "gelu_ln"."""

    undecayed = ("gain", "shift")

    def __init__(self, name: str, heads: int) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise unknown("score activation", name, ACTIVATIONS)
        self.name = name
        normed = name.endswith("_ln")
        self.gain = nn.Parameter(torch.ones(heads)) if normed else None
        self.shift = nn.Parameter(torch.ones(heads)) if normed else None

    def forward(self, scores: Float[Tensor, "*b h n m"], mask: Bool[Tensor, "..."] | None = None) -> Tensor:
        activation = ACTIVATIONS[self.name]
        if activation is None:
            return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
        seen = scores.new_ones(()).expand(scores.shape[-1]) if mask is None else mask.to(scores.dtype)
        keys, a = seen.sum(-1, keepdim=True), activation(scores) * seen
        if self.gain is None or self.shift is None:
            return a / keys
        centred = (a - a.sum(-1, keepdim=True) / keys) * seen
        variance = centred.square().sum(-1, keepdim=True) / keys
        gain, shift = self.gain[:, None, None], self.shift[:, None, None]
        return (centred * (variance + EPS).rsqrt() * gain + shift * seen) / keys

    def mix(self, q: Float[Tensor, "*b h n d"], k: Float[Tensor, "*b h m d"], v: Float[Tensor, "*b h m d"], *,
            scale: float | None, bias: Tensor | None = None, mask: Tensor | None = None) -> Float[Tensor, "*b h n d"]:
        """activation(q k^T scale + bias) v."""
        if self.name == "softmax":
            return attend(q, k, v, bias=bias, mask=mask, scale=scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if q.shape[-1] == 1 and scale > 0 and bias is None and mask is None and ACTIVATIONS[self.name] is F.relu:
            return self.depthwise(q * scale, k, v)
        scores = q * scale @ k.transpose(-2, -1)
        return self(scores if bias is None else scores + bias, mask) @ v

    def depthwise(self, q: Float[Tensor, "*b h n 1"], k: Float[Tensor, "*b h m 1"],
                  v: Float[Tensor, "*b h m 1"]) -> Float[Tensor, "*b h n 1"]:
        """The weights of one channel without a map: a row is |q_i| ReLU(k) where q_i > 0, |q_i| ReLU(-k) elsewhere."""
        keys = torch.cat((k, -k), dim=-1).relu()  # (*B, heads, M, 2)
        sums, mean = (keys * v).mean(-2, keepdim=True), keys.mean(-2, keepdim=True)
        size = torch.cat((q, -q), dim=-1).relu()  # |q_i| in the column of its sign, 0 in the other
        if self.gain is None or self.shift is None:
            return (size * sums).sum(-1, keepdim=True)
        variance = (keys - mean).square().mean(-2, keepdim=True)
        middle = v.mean(-2, keepdim=True)
        normed = (size * (size.square() * variance + EPS).rsqrt() * (sums - mean * middle)).sum(-1, keepdim=True)
        return normed * self.gain[:, None, None] + self.shift[:, None, None] * middle


class DynamicConv(Attention):
    """Attention with another activation of the scores. depthwise: as many heads as channels, whatever `heads` says."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, score_activation: str = "relu_ln",
                 depthwise: bool = False, position: Spec[ScorePosition] | None = None) -> None:
        super().__init__(dim, place, heads=dim if depthwise else heads, bias=bias, position=position)
        if self.position is not None and type(self.position).attend is not ScorePosition.attend:
            raise DoesNotFit(f"{type(self.position).__name__} attends by itself, with softmax; take another position, or "
                             "the mixer 'attention'")
        self.activation = ScoreActivation(score_activation, self.heads)

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        bias = None if self.position is None else self.position.bias(q.shape[2], k.shape[2], ctx)
        mask = self._visible(q.shape[2], k.shape[2], ctx, q.device)
        return self.activation.mix(q, k, v, scale=self.scale, bias=bias, mask=mask)


class DynamicConvWindow(WindowAttention):
    """Swin's attention with another activation of the scores; its relative bias is that of the first convolution."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, window: int = 7, shifted: bool = False,
                 grid: tuple[int, int] | None = None, score_activation: str = "relu_ln", depthwise: bool = False) -> None:
        super().__init__(dim, place, heads=dim if depthwise else heads, window=window, shifted=shifted, grid=grid)
        self.activation = ScoreActivation(score_activation, self.heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        mask = shift_mask(grid, self.window, shift, q.device)[:, None] if any(shift) else None
        return self.activation.mix(q, k, v, scale=None, bias=self.bias(), mask=mask)


def two_convolutions(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"],
                     activation: Callable[[Tensor], Tensor], *, scale: float | None = None,
                     bias: Float[Tensor, "..."] | None = None) -> Float[Tensor, "b h n d"]:
    """The heads' outputs as two dynamic 1x1 convolutions, a group for each head of each image.

    q is a map of h * d channels; the first convolution's filters are the keys, the second's the values. activation: of the
    scores (B, heads, N, M) over their last axis.
    """
    b, h, n, d = q.shape
    scale = d**-0.5 if scale is None else scale
    maps = q.transpose(-2, -1).reshape(1, b * h * d, n, 1)
    scores = F.conv2d(maps, scale * k.reshape(-1, d, 1, 1), groups=b * h)  # (1, B h M, N, 1): a channel for each key
    scores = scores.view(b, h, -1, n).transpose(-2, -1)
    weights = activation(scores if bias is None else scores + bias)
    filters = v.transpose(-2, -1).reshape(b * h * v.shape[-1], -1, 1, 1)
    out = F.conv2d(weights.transpose(-2, -1).reshape(1, -1, n, 1), filters, groups=b * h)
    return out.view(b, h, -1, n).transpose(-2, -1)


@torch.no_grad()
def convolution_gap(model: Backbone, images: Float[Tensor, "b c h w"]) -> list[float]:
    """For each softmax attention, the largest difference of its heads' outputs from those of two dynamic convolutions."""
    layers = [m for m in model.modules() if type(m) is Attention]
    if not layers:
        raise DoesNotFit(f"{type(model).__name__} has no global softmax attention; compare `two_convolutions` with its "
                         "mixer")
    gaps = []
    for layer in layers:
        with watching(layer) as seen:
            model(images)
        for q, k, v, bias, mask, scale in seen:
            if mask is not None:
                raise DoesNotFit("a mask hides keys, which convolutions have no word for")
            found = two_convolutions(q, k, v, lambda s: s.softmax(-1), scale=scale, bias=bias)
            gaps.append((found - attend(q, k, v, bias=bias, scale=scale)).abs().max().item())
    return gaps


PART = spec(DynamicConv)

PRESETS = {
    "nano": vit.PRESETS["nano"].but(mixer=PART),
    "tiny": vit.PRESETS["tiny"].but(mixer=PART),
    "small": vit.PRESETS["small"].but(mixer=PART),
    "tiny_depthwise": vit.PRESETS["tiny"].but(mixer=PART.but(depthwise=True)),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """The ViT's settings; the heads from the gains. Which activation is normed leaves no trace."""
    told, gain = vit.settings(state, "timm"), state["stages.0.layers.0.mixer.inner.activation.gain"]
    if len(gain) == told["dim"]:
        return told | {"mixer": PART.but(depthwise=True)}
    why = "whether it was ReLU or GELU leaves no trace in the tensors; ReLU, as published"
    return told | {"heads": len(gain), "mixer": Assumed(PART, why)}
