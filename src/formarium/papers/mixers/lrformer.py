"""Mitigating Transformer Overconfidence via Lipschitz Regularization (Ye, Ma, Cao, Tang, UAI 2023), arXiv 2306.06849.

New: LRSA, attention by distances, A = softmax(-alpha ||q_i - k_j||^2 / (||Q||_F ||X^T||_(inf,2))), with queries and keys
tied (q = k = X W) as L2 attention has them (Kim et al. 2021, arXiv 2006.04710). Dot products of unbounded tokens have no
Lipschitz constant; the distance has one, and the divisor, the Frobenius norm of a head's queries times the longest token,
makes it contract. alpha trades smoothness for expressiveness. So a model is less sure of images unlike its training's.

Decisions: SZCHAI/LRFormer, the authors' repository, holds no code. The formula, alpha = 100, projections of keys and values
without a bias and L2 attention's scale 1 / sqrt(d) are those of a public implementation by others, which has the same three
terms as the paper's supplement. No 1 / sqrt(d) in LRSA. Softmax does not notice ||q_i||^2, so the scores are one product of
width d + 1, [2 s q_i, -s] . [k_j, ||k_j||^2], which any kernel of attention takes. Both norms run over all tokens: there is
no causal form. A hidden key does not count in them. The random-feature head (`lrformer` as a transform) is SNGP's (Liu et
al. 2020, arXiv 2006.10108) without its covariance: one forward pass, sqrt(2 / D) cos(W h + b) of frozen W and b, and a
linear layer. L2 attention's spectral norm is not here. The paper's models have 6 layers (small images) and 12 (DeiT III's
recipe); no text that we could read tells their widths, so the presets have ViT's. The paper's scores, ECE, NLL, AUROC and
AUPR, are in arena/calibration.py.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.part import Part
from ...core.spec import spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import linear
from ...skeletons.backbone import Backbone
from ...weights.keys import Assumed, State
from ..backbones import vit

CARD = Card(
    title="Mitigating Transformer Overconfidence via Lipschitz Regularization",
    authors="Wenqian Ye, Yunsheng Ma, Xu Cao, Kun Tang",
    venue="UAI 2023",
    arxiv="2306.06849",
    year=2023,
    code="https://github.com/SZCHAI/LRFormer",
    licence="not said (the repository holds no code)",
    kind="mixer",
    domain="image",
    tags=("calibration", "out of distribution", "Lipschitz", "L2 attention"),
    claim="Attention by contractive distances gives better accuracy, calibration and detection of strange images than "
          "other methods of a single forward pass.",
    variants={
        "nano": Published(note="ours: vit/nano with this mixer"),
        "tiny": Published(note="ViT-Ti/16 with this mixer; the paper's widths are not known to us"),
        "small": Published(note="ViT-S/16 with this mixer"),
        "base": Published(note="ViT-B/16 with this mixer"),
    },
    hosts=("vit/nano",),
)

PARTS = {
    "mixer": {"l2": "L2Attention"},
}


class L2Attention(Part):
    """softmax(-||q_i - k_j||^2 / sqrt(d)) v with q = k (arXiv 2006.04710). ctx.mask (B, 1, 1, M) hides keys."""

    across_tokens = True  # no causal form

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, kv_bias: bool = False) -> None:
        super().__init__(dim, place)
        self.heads, self.width = heads, head_dim(dim, heads)
        self.kv = linear(dim, 2 * dim, bias=kv_bias)
        self.proj = linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        name = type(self).__name__
        if ctx.cache is not None:
            raise DoesNotFit(f"{name} has no causal form, so nothing can be decoded with a cache")
        if ctx.lengths is not None:
            alone = replace(ctx, lengths=None)
            return torch.cat([self(sequence, alone) for sequence in x.split(ctx.lengths, dim=1)], dim=1)
        if ctx.mask is not None and ctx.mask.shape[-2] != 1:
            raise DoesNotFit(f"a mask of {name} can hide keys (B, 1, 1, M), not single pairs; got {tuple(ctx.mask.shape)}")
        k, v = split_heads(self.kv(x), 2, self.heads)
        seen = None if ctx.mask is None else ctx.mask[:, 0, 0, :, None]
        s = self.sharpness(k, x, seen)
        q = torch.cat((2 * s * k, (-s).expand(*k.shape[:-1], 1)), dim=-1)
        k = torch.cat((k, k.square().sum(-1, keepdim=True)), dim=-1)
        return self.proj(join_heads(attend(q, k, v, mask=ctx.mask, scale=1.0)))

    def sharpness(self, k: Float[Tensor, "b h n d"], x: Float[Tensor, "b n c"], seen: Tensor | None) -> Tensor:
        """What the squared distances are multiplied by, broadcastable to (B, heads, 1, 1). seen: (B, N, 1), or all."""
        return k.new_full((1, 1, 1, 1), self.width**-0.5)


class LRSA(L2Attention):
    """softmax(-alpha ||q_i - k_j||^2 / (||Q||_F max_n ||x_n||)) v with q = k; the norms are of one image each."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, bias: bool = True, kv_bias: bool = False,
                 alpha: float = 100.0) -> None:
        super().__init__(dim, place, heads=heads, bias=bias, kv_bias=kv_bias)
        if alpha <= 0:
            raise DoesNotFit(f"alpha is above zero, got {alpha}")
        self.alpha = alpha

    def sharpness(self, k: Float[Tensor, "b h n d"], x: Float[Tensor, "b n c"], seen: Tensor | None) -> Tensor:
        if seen is not None:
            k, x = k * seen[:, None], x * seen
        queries = torch.linalg.vector_norm(k, dim=(2, 3), keepdim=True)
        longest = torch.linalg.vector_norm(x, dim=-1).amax(1)[:, None, None, None]
        return self.alpha / (queries * longest + 1e-10)


PART = spec(LRSA)

PRESETS = {
    "nano": vit.PRESETS["nano"].but(mixer=PART),
    "tiny": vit.PRESETS["tiny"].but(mixer=PART),
    "small": vit.PRESETS["small"].but(mixer=PART),
    "base": vit.PRESETS["base"].but(mixer=PART),
}


class RandomFeatureHead(nn.Module):
    """h -> beta sqrt(2 / D) cos(W h / length + b): a Gaussian process with an RBF kernel (Rahimi and Recht 2007), W normal
    and b uniform, both frozen; beta is learned. length: of the kernel."""

    weight: Tensor
    shift: Tensor

    def __init__(self, dim: int, classes: int, features: int, length: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features, dim) / length)
        self.register_buffer("shift", torch.rand(features) * 2 * math.pi)
        self.beta = nn.Linear(features, classes)

    def features(self, h: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return torch.cos(h @ self.weight.T + self.shift) * math.sqrt(2 / len(self.shift))

    def forward(self, h: Float[Tensor, "*b c"]) -> Float[Tensor, "*b k"]:
        return self.beta(self.features(h))


def random_feature_head(model: Model, *, features: int = 1024, length: float | None = None) -> int:
    """Gaussian-process heads instead of linear ones; returns how many. length: of the kernel, sqrt(num_features) unless
    given."""
    if features < 1 or (length is not None and length <= 0):
        raise DoesNotFit(f"features are 1 or more and length above zero, got {features} and {length}")
    if not isinstance(model, Backbone):
        return 0
    length = math.sqrt(model.num_features) if length is None else length
    heads = {name: head for name, head in model.named_children() if name.startswith("head") and isinstance(head, nn.Linear)}
    for name, old in heads.items():
        made = RandomFeatureHead(old.in_features, old.out_features, features, length)
        setattr(model, name, made.to(old.weight.device, old.weight.dtype))
    return len(heads)


TRANSFORM = random_feature_head
LOOKS_FOR = "an image backbone with a linear classifier"


def settings(state: State, layout: str) -> dict[str, Any]:
    """The ViT's settings, and biases. Untold by the tensors: alpha, and whether this is plain L2 attention."""
    first = "stages.0.layers.0.mixer.inner"
    usual = {"bias": True, "kv_bias": False}
    told = {"bias": f"{first}.proj.bias" in state, "kv_bias": f"{first}.kv.bias" in state}
    mixer = PART.but(**{k: v for k, v in told.items() if v != usual[k]})
    why = "alpha leaves no trace in the tensors; as published"
    return vit.settings(state, "timm") | {"mixer": Assumed(mixer, why) if told == usual else mixer}
