"""Transformer Interpretability Beyond Attention Visualization (Chefer, Gur, Wolf, CVPR 2021), arXiv 2012.09838.

New: the relevance of a class is passed back through the whole net by rules that keep its sum: deep Taylor's z+ rule in
linear layers (Eq. 4), gradient times input in products of two activations and in skip connections (Eqs. 7, 8), which are
then normalised so that what leaves is what came in (Eqs. 9, 10). Each layer's attention map gets relevance R and a
gradient; I + mean over heads of relu(grad A * R) (Eq. 13), multiplied over the layers (Eq. 14), says how much each token of
the input counts for the class.

Decisions, after the authors' code: norms, GELU and softmax let relevance through; a product's relevance is halved between
its factors, that of two uses of a tensor is x * sum R_i / x; biases take none; relevance at the scores is that at their
softmax.
Where the image's pixels are asked ("full"), the first layer has the z^B rule, with the image's least and greatest value as
bounds. All sums are per image, so a batch is as each image alone; theirs takes one image. The mean over patches is a linear
layer. Rollout is Abnar and Zuidema's (arXiv 2005.00928) of attention; "lrp_rollout" theirs, of relevances.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.part import Residual
from ...parts.attention import Attention, check_plain, join_heads, split_heads, watching
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition
from ...parts.residual import PostNorm, PreNorm
from ...skeletons.backbone import Backbone
from ...skeletons.stack import Stack

CARD = Card(
    title="Transformer Interpretability Beyond Attention Visualization",
    authors="Hila Chefer, Shir Gur, Lior Wolf",
    venue="CVPR 2021",
    arxiv="2012.09838",
    year=2021,
    code="https://github.com/hila-chefer/Transformer-Explainability",
    licence="MIT",
    kind="explanation",
    domain="image",
    tags=("relevance", "attribution", "rollout", "LRP"),
    claim="Relevance that is passed back through attention and skips is specific to the class, and finds what matters "
          "better than raw attention, rollout, Grad-CAM and LRP (perturbation, segmentation, rationales).",
    hosts=("vit/nano",),
)

Rule = Callable[[Tensor], Tensor]
EPS = 1e-9


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, zero where b is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == -EPS, EPS, b + EPS))


def through_linear(r: Float[Tensor, "... o"], x: Float[Tensor, "... i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "... i"]:
    """The z+ rule: only contributions x_i w_ji above zero take relevance, in proportion."""
    xp, xn, wp, wn = x.clamp(min=0), x.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
    s = ratio(r, F.linear(xp, wp) + F.linear(xn, wn))
    return xp * (s @ wp) + xn * (s @ wn)


def through_sum(r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of a + b: in proportion, then each part scaled so that the sums over an image add up to that of r (Eqs. 9, 10)."""
    axes = tuple(range(1, r.ndim))
    s = ratio(r, a + b)
    parts = [a * s, b * s.expand_as(a)]
    totals = [p.sum(axes, keepdim=True) for p in parts]
    whole = sum(t.abs() for t in totals)
    scaled = [p * ratio(ratio(t.abs(), whole) * r.sum(axes, keepdim=True), t) for p, t in zip(parts, totals, strict=True)]
    return scaled[0], scaled[1]


def through_uses(rs: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of a tensor that was used several times."""
    return sum((x * ratio(r, x) for r in rs), torch.zeros_like(x))


def _plain(model: Model) -> TypeGuard[Backbone]:
    """Is it one stack of layers, with nothing between them?"""
    return isinstance(model, Backbone) and len(model.stages) == 1 and type(model.stages[0]) is Stack


class Trace:
    """A forward pass of a plain ViT, written out, and what relevance and gradients need of it.

    maps: the attention of each layer, (B, heads, N, N), in the graph of `logits`.
    """

    def __init__(self, model: Model, images: Float[Tensor, "b c h w"]) -> None:
        if not _plain(model) or not isinstance(model.embedding, PatchEmbed):
            raise DoesNotFit(f"transformer_attribution explains plain ViTs, a stack of attention and MLP over patches; "
                             f"{type(model).__name__} is none")
        if type(model).pooled is not Backbone.pooled or type(model).forward is not Backbone.forward:
            raise DoesNotFit(f"there are no relevance rules for the classifier of {type(model).__name__}, only for a "
                             "linear head on the class token or on the mean")
        if model.embedding.position_first:
            raise DoesNotFit("there are no relevance rules for positions that are added before the class token comes")
        self.images, self.maps, self.relevances, self.rules = images, list[Tensor](), dict[int, Tensor](), list[Rule]()
        self.embedding = model.embedding
        with torch.no_grad():
            x, self.ctx = model.embed(images)
            patches, _ = model.embedding.tokens(images, Ctx())
        self.patches, self.added = patches, x - patches
        x = x.requires_grad_()
        for layer in model.stages[0].layers:  # type: ignore[union-attr]
            for sublayer in layer.values():
                x = self._sublayer(sublayer, x)
        self.logits = self._head(model, x)

    def gradients(self, target: Int[Tensor, "b"]) -> tuple[Tensor, ...]:
        """Of the target's logit by each attention map."""
        return torch.autograd.grad(self.logits.gather(1, target[:, None]).sum(), self.maps, retain_graph=True)

    def relevance(self, target: Int[Tensor, "b"]) -> Float[Tensor, "b n c"]:
        """Of the embedded tokens; that of the attention maps is in `relevances`, by layer, afterwards."""
        r = F.one_hot(target, self.logits.shape[1]).to(self.logits.dtype)
        for rule in reversed(self.rules):
            r = rule(r)
        return r

    def _sublayer(self, sublayer: Residual, x: Tensor) -> Tensor:
        if type(sublayer) not in (PreNorm, PostNorm) or not isinstance(sublayer.norm, LayerNorm | nn.Identity):
            norm = type(getattr(sublayer, "norm", None)).__name__
            raise DoesNotFit(f"there are no relevance rules for the residual {type(sublayer).__name__} with {norm}, only "
                             "for pre_norm and post_norm with layer_norm")
        assert isinstance(sublayer, PreNorm)
        post = isinstance(sublayer, PostNorm)
        inner = x if post else sublayer.norm(x)
        if type(sublayer.inner) is Attention:
            y, back = self._attention(sublayer.inner, inner)
        elif type(sublayer.inner) is Mlp:
            y, back = self._mlp(sublayer.inner, inner)
        else:
            raise DoesNotFit(f"there are no relevance rules for {type(sublayer.inner).__name__}, only for attention and "
                             "mlp")
        y = y if sublayer.scale is None else y * sublayer.scale

        def rule(r: Tensor) -> Tensor:
            skip, branch = through_sum(r, x, y)
            return through_uses((skip, back(branch)), x)

        self.rules.append(rule)
        return sublayer.norm(x + y) if post else x + y

    def _attention(self, part: Attention, x: Tensor) -> tuple[Tensor, Rule]:
        check_plain(part)
        if part.q_norm is not None or part.scale is not None:
            raise DoesNotFit("there are no relevance rules for attention with qk_norm or a scale of its own")
        q0, k0, v = split_heads(part.qkv(x), 3, part.heads)
        q, k = (q0, k0) if part.position is None else part.position.rotate(q0, k0, self.ctx)
        bias = None if part.position is None else part.position.bias(q.shape[2], k.shape[2], self.ctx)
        products = q @ k.transpose(-2, -1)
        scores = products * q.shape[-1] ** -0.5
        attention = (scores if bias is None else scores + bias).softmax(-1)
        mixed = attention @ v
        joined, layer = join_heads(mixed), len(self.maps)
        self.maps.append(attention)

        def rule(r: Tensor) -> Tensor:
            s = ratio(split_heads(through_linear(r, joined, part.proj.weight), 1, part.heads)[0], mixed)
            self.relevances[layer] = attention * (s @ v.transpose(-2, -1)) / 2
            of_v = v * (attention.transpose(-2, -1) @ s) / 2
            s = ratio(self.relevances[layer], products)
            slopes = torch.autograd.grad(products, (q0, k0), s, retain_graph=True)
            of_q, of_k = (t * slope / 2 for t, slope in zip((q0, k0), slopes, strict=True))
            return through_linear(torch.cat([join_heads(t) for t in (of_q, of_k, of_v)], dim=-1), x, part.qkv.weight)

        return part.proj(joined), rule

    def _mlp(self, part: Mlp, x: Tensor) -> tuple[Tensor, Rule]:
        hidden = F.gelu(part.fc1(x), approximate=part.approximate)
        return part.fc2(hidden), lambda r: through_linear(through_linear(r, hidden, part.fc2.weight), x, part.fc1.weight)

    def _head(self, model: Backbone, x: Tensor) -> Tensor:
        normed = x if model.pool_first else model.norm(x)
        patches = normed[:, self.ctx.prefix:]
        pooled = normed[:, 0] if model.pool == "token" else patches.mean(1)
        features = model.norm(pooled) if model.pool_first else pooled

        def rule(r: Tensor) -> Tensor:
            s = ratio(through_linear(r, features, model.head.weight), pooled)[:, None]  # type: ignore[arg-type]
            share, start = (1.0, 0) if model.pool == "token" else (1 / patches.shape[1], self.ctx.prefix)
            out = torch.zeros_like(normed)
            used = slice(start, 1 if model.pool == "token" else None)
            out[:, used] = normed[:, used] * s * share
            return out

        self.rules.append(rule)
        return model.head(features)

    def of_patches(self, tokens: Float[Tensor, "b n"], model: Model) -> Float[Tensor, "b h w"]:
        """Without the tokens before the grid."""
        return tokens[:, self.ctx.prefix:].unflatten(1, self.ctx.need_grid(model, prefix=True))


def rolled(maps: Sequence[Float[Tensor, "b n n"]], pool: str) -> Float[Tensor, "b n"]:
    """What the last tokens are made from, through all layers with their skips; of the class token, or of the mean patch."""
    joint = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for one in maps:
        joint = joint + one @ joint
    return joint[:, 0] if pool == "token" else joint.mean(1)


def transformer_attribution(model: Model, images: Tensor, target: Tensor, *, start_layer: int = 0) -> Tensor:
    """Relevance times gradient, rolled out from `start_layer` on (Eqs. 13, 14)."""
    trace = Trace(model, images)
    if not 0 <= start_layer < len(trace.maps):
        raise DoesNotFit(f"start_layer is from 0 to {len(trace.maps) - 1} here, got {start_layer}")
    grads = trace.gradients(target)
    trace.relevance(target)
    maps = [(g * trace.relevances[i]).clamp(min=0).mean(1) for i, g in enumerate(grads)]
    return trace.of_patches(rolled(maps[start_layer:], model.pool), model)  # type: ignore[arg-type]


def lrp_rollout(model: Model, images: Tensor, target: Tensor) -> Tensor:
    """Rollout of the relevance of the attention maps, without gradients."""
    trace = Trace(model, images)
    trace.relevance(target)
    maps = [trace.relevances[i].clamp(min=0).mean(1) for i in range(len(trace.maps))]
    return trace.of_patches(rolled(maps, model.pool), model)  # type: ignore[arg-type]


def lrp_layer(model: Model, images: Tensor, target: Tensor, *, layer: int = -1) -> Tensor:
    """Partial LRP: the relevance of one layer's attention map, its mean over heads."""
    trace = Trace(model, images)
    trace.relevance(target)
    one = trace.relevances[_layer(layer, len(trace.maps))].clamp(min=0).mean(1)
    return trace.of_patches(one[:, 0] if model.pool == "token" else one.mean(1), model)  # type: ignore[arg-type]


def full(model: Model, images: Tensor, target: Tensor) -> Tensor:
    """LRP down to the pixels, (B, H, W): the z^B rule in the patch embedding."""
    trace = Trace(model, images)
    if trace.embedding.stem is not None or not isinstance(trace.embedding.norm, nn.Identity):
        raise DoesNotFit("method 'full' has rules for a patch embedding that is one convolution, without a stem")
    r = trace.relevance(target)
    if isinstance(trace.embedding.position, AbsolutePosition) and trace.added.any():
        r, _ = through_sum(r, trace.patches, trace.added)
    conv = trace.embedding.proj
    r = r[:, trace.ctx.prefix:].transpose(1, 2).unflatten(2, trace.ctx.need_grid(model, prefix=True))
    low, high = (f(images, (1, 2, 3)).view(-1, 1, 1, 1).expand_as(images) for f in (torch.amin, torch.amax))
    terms = ((1, images, conv.weight), (-1, low, conv.weight.clamp(min=0)), (-1, high, conv.weight.clamp(max=0)))
    s = r / (torch.stack([sign * F.conv2d(t, w, stride=conv.stride) for sign, t, w in terms]).sum(0) + EPS)
    return torch.stack([sign * t * F.conv_transpose2d(s, w, stride=conv.stride) for sign, t, w in terms]).sum((0, 2))


def attention_maps(model: Model, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Ctx]:
    """softmax of the scores of these layers, (B, heads, N, N); only they are computed beside the fused kernels."""
    parts = [m for m in model.modules() if type(m) is Attention]
    if not _plain(model) or len(parts) != model.stages[0].depth:
        raise DoesNotFit(f"attention is shown of plain ViTs, whose layers all have it; {type(model).__name__} has it in "
                         f"{len(parts)} places")
    with ExitStack() as stack, torch.no_grad():
        seen = [stack.enter_context(watching(parts[_layer(i, len(parts))])) for i in layers]
        x, ctx = model.embed(images)
        model.encode(x, ctx)
        return [one[0].log_probabilities().exp() for one in seen], ctx


def _layer(i: int, depth: int) -> int:
    if not -depth <= i < depth:
        raise DoesNotFit(f"layer is from {-depth} to {depth - 1} here, got {i}")
    return i % depth


def _read(tokens: Float[Tensor, "b n n"], ctx: Ctx, model: Model) -> Float[Tensor, "b h w"]:
    row = tokens[:, 0] if model.pool == "token" else tokens.mean(1)
    return row[:, ctx.prefix:].unflatten(1, ctx.need_grid(model, prefix=True))


def raw_attention(model: Model, images: Tensor, target: Tensor, *, layer: int = -1) -> Tensor:
    """What the class token attends to in one layer, the mean over heads; the same for every class."""
    (one,), ctx = attention_maps(model, images, [layer])
    return _read(one.mean(1), ctx, model)


def rollout(model: Model, images: Tensor, target: Tensor) -> Tensor:
    """Attention rolled out, half of each layer the skip (Abnar and Zuidema 2020); the same for every class."""
    parts = sum(type(m) is Attention for m in model.modules())
    maps, ctx = attention_maps(model, images, range(parts))
    joint = torch.eye(maps[0].shape[-1], dtype=images.dtype, device=images.device)
    for one in maps:
        joint = 0.5 * (joint + one.mean(1) @ joint)
    return _read(joint, ctx, model)


def grad_cam(model: Model, images: Tensor, target: Tensor) -> Tensor:
    """Grad-CAM with the heads of the last layer's attention as channels."""
    trace = Trace(model, images)
    row = 0 if model.pool == "token" else slice(None)
    one, grad = trace.maps[-1], trace.gradients(target)[-1]
    if model.pool == "token":
        one, grad = one[:, :, row], grad[:, :, row]
    else:
        one, grad = one.mean(2), grad.mean(2)
    patches = slice(trace.ctx.prefix, None)
    weight = grad[..., patches].mean(-1, keepdim=True)
    heat = (one[..., patches] * weight).mean(1).clamp(min=0)
    return heat.unflatten(1, trace.ctx.need_grid(model, prefix=True))


def gradient(model: Model, images: Tensor, target: Tensor) -> Tensor:
    """Input times gradient of the target's logit, summed over channels, (B, H, W) of pixels. Fits every image model."""
    images = images.requires_grad_()
    logit = model(images).gather(1, target[:, None]).sum()
    return (images * torch.autograd.grad(logit, images)[0]).sum(1)


METHODS = {
    "transformer_attribution": transformer_attribution, "lrp_rollout": lrp_rollout, "lrp_layer": lrp_layer, "full": full,
    "raw_attention": raw_attention, "rollout": rollout, "grad_cam": grad_cam, "gradient": gradient,
}
