"""DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions (Wang et al., NeurIPS 2023),
arXiv 2309.03576.

New: a ViT sees a quarter of the patches, and of those three quarters without their positions: a learned token stands for
them. A small decoder without positions says, for each, which of all places it is from. Two relaxations: position
smoothing, where near places count as partly right, with a width that falls to zero over the training; and attentive
reconstruction, where patches like the class token weigh more.

Decisions, from the authors' code: the smoothed target is divided by the sums of its columns, not of its rows, so that
targets near the border do not sum to one. The class token keeps its position. Attentive weights come from the encoder that
is trained, without gradient, all patches visible. Their training script does not ask for the auxiliary pixels of MAE
(`multi_task`), although it sets their weight; here they are the option `pixels`. Ours: sigma falls with every step, not
every epoch; in eval mode the target is sharp; the accuracy is over the dropped positions alike, not weighted; without a
class token the mean of the patches stands for it. Any ViT whose positions are added to its tokens can be wrapped.

The presets are the authors' encoders: ViTs with fixed positions of sines and cosines, as MAE has them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import BadCheckpoint, DoesNotFit, unknown
from ...core.model import Model
from ...core.spec import spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear
from ...parts.embed import PatchEmbed
from ...parts.norm import LayerNorm
from ...parts.position import AbsolutePosition, LearnedPosition, NoPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone
from ...skeletons.objective import Objective
from ...skeletons.stack import Stack
from ...weights.files import read
from ...weights.keys import Rule, State, as_preset, count, drop, keymap, rule
from ...weights.load import load
from ..backbones import vit

CARD = Card(
    title="DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions",
    authors="Haochen Wang, Junsong Fan, Yuxi Wang, Kaiyou Song, Tong Wang, Zhaoxiang Zhang",
    venue="NeurIPS 2023",
    arxiv="2309.03576",
    year=2023,
    code="https://github.com/Haochen-Wang409/DropPos",
    licence="Apache-2.0 (code)",
    kind="objective",
    domain="image",
    tags=("self_supervised", "positions", "masking"),
    claim="Classifying dropped positions of visible patches pre-trains ViTs that beat supervised pre-training and compete "
          "with masked image modelling (ViT-B/16 84.2 % ImageNet top-1).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels"),
        "small": Published(params=22.05e6, macs=4.61e9, input=(3, 224, 224), note="of the code, without published results"),
        "base": Published(params=86.57e6, macs=17.58e9, input=(3, 224, 224),
                          results={"ImageNet top-1 (200 epochs)": 83.0, "ImageNet top-1 (800 epochs)": 84.2},
                          note="ViT-B/16, 0.2M of them fixed positions in the published count"),
        "base_p32": Published(params=88.22e6, macs=4.41e9, input=(3, 224, 224),
                              note="of the code, without published results"),
        "large": Published(params=304.33e6, macs=61.60e9, input=(3, 224, 224),
                           results={"ImageNet top-1 (800 epochs)": 85.8}, note="ViT-L/16"),
        "huge_p14": Published(params=632.05e6, macs=167.40e9, input=(3, 224, 224),
                              note="of the code, without published results"),
    },
    hosts=("vit/nano", "droppos/nano"),
)


class SinCos(AbsolutePosition):
    """Fixed positions on the grid: sines, then cosines of the column, then of the row; zero for tokens before the grid."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__(dim, tokens)
        if dim % 4:
            raise DoesNotFit(f"sines and cosines of two axes need a width that 4 divides, got {dim}")

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h, w = ctx.need_grid(self, prefix=True)
        rates = 10000 ** (-torch.arange(self.dim // 4, device=x.device) / (self.dim / 4))
        rows, columns = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
        angles = [t.flatten()[:, None] * rates for t in (columns, rows)]
        table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
        return x + F.pad(table, (0, 0, ctx.prefix, 0)).to(x.dtype)


class Visible(NamedTuple):
    """What the encoder made of the visible patches, K of N, each in a random order."""

    tokens: Float[Tensor, "b m c"]  # of the encoder, normed, after its class token
    kept: Int[Tensor, "b k"]  # their places
    dropped: Bool[Tensor, "b k"]  # whose position was


class DropPos(Objective):
    """images (B, C, H, W) -> the cross-entropy of the dropped positions; numbers: position_accuracy.

    ratio: part of the patches that is hidden (gamma); pos_ratio: part of the visible whose position is dropped (gamma_pos).
    sigma: width of the smoothed target, in patches; anneal: it falls linearly to zero. tau: temperature of the attentive
    weights; None: all weigh alike. replacement: what stands for a dropped position: a learned "token", "zeros", or the
    "wrong" position of another one. decoder_dim: 512 unless given, or twice the encoder's width if that is less. pixels:
    a second decoder also reconstructs the hidden patches, as MAE does, and the loss is pos_weight * positions + pixels.
    """

    undecayed = ("token",)

    def __init__(self, model: Model, *, ratio: float = 0.75, pos_ratio: float = 0.75, sigma: float = 1.0,
                 anneal: bool = True, tau: float | None = 0.1, replacement: str = "token", decoder_dim: int | None = None,
                 decoder_depth: int = 2, decoder_heads: int = 16, pixels: bool = False, pos_weight: float = 0.05) -> None:
        super().__init__(model)
        if not takes_any_patches(model):
            raise DoesNotFit("droppos needs a plain ViT, one stage after a patch embedding; "
                             f"{type(model).__name__} is none")
        if isinstance(model.embedding.position, NoPosition) or model.embedding.position_first:
            raise DoesNotFit("droppos drops positions that are added to the tokens, and here are none, or "
                             "before the class token is put there; build the model with position='learned'")
        if not (0 <= ratio < 1 and 0 < pos_ratio <= 1 and sigma >= 0 and (tau is None or tau > 0)):
            raise DoesNotFit("expected 0 <= ratio < 1, 0 < pos_ratio <= 1, sigma >= 0 and tau > 0, got "
                             f"ratio={ratio}, pos_ratio={pos_ratio}, sigma={sigma}, tau={tau}")
        if replacement not in ("token", "zeros", "wrong"):
            raise unknown("replacement", replacement, ("token", "zeros", "wrong"))
        (h, w), (step_h, step_w) = model.embedding.img_size, model.embedding.step
        self.grid = (h // step_h, w // step_w)
        places = self.grid[0] * self.grid[1]
        self.visible = int(places * (1 - ratio))
        if self.visible < 1:
            raise DoesNotFit(f"of {places} patches ratio={ratio} leaves none visible; take a smaller one")
        self.ratio, self.pos_ratio, self.sigma, self.anneal, self.tau = ratio, pos_ratio, sigma, anneal, tau
        self.replacement, self.pos_weight = replacement, pos_weight
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, model.num_features)) if replacement == "token" else None
        decoder_dim = decoder_dim or min(512, 2 * model.num_features)
        self.decoder = Decoder(model.num_features, decoder_dim, decoder_depth, decoder_heads, places)
        self.pixels = None
        if pixels:
            values = model.embedding.in_chans * step_h * step_w
            self.pixels = PixelDecoder(model.num_features, decoder_dim, decoder_depth, decoder_heads, values)
        at = torch.cartesian_prod(*(torch.arange(float(side)) for side in self.grid)).view(places, 2)
        self.register_buffer("distance", torch.cdist(at, at).square(), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        noise = [torch.rand(images.shape[0], n, device=images.device) for n in (self.distance.shape[0], self.visible)]
        seen = self.see(images, *noise)
        sigma = self.sigma * (1 - self.progress * self.anneal) if self.training else torch.zeros_like(self.progress)
        weights = None if self.tau is None else self.attentive(images).gather(1, seen.kept)
        loss, accuracy = self.position_loss(self.locate(seen), seen, sigma, weights)
        if self.pixels is None:
            return loss, {"position_accuracy": accuracy}
        drawn = self.pixel_loss(images, seen)
        return self.pos_weight * loss + drawn, {"position_accuracy": accuracy, "positions": loss.detach(),
                                                "pixels": drawn.detach()}

    def see(self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"],
            pos_noise: Float[Tensor, "b k"]) -> Visible:
        """The encoder on the patches of least noise; those of least pos_noise keep their positions."""
        x, ctx = self.model.embedding.tokens(images, Ctx())  # type: ignore[operator, union-attr]
        position = self.model.embedding.position(x.new_zeros(1, *x.shape[1:]), ctx)  # type: ignore[operator, union-attr]
        kept = noise.argsort(1)[:, :self.visible]
        order = pos_noise.argsort(1)
        known = int(self.visible * (1 - self.pos_ratio))
        dropped = order.argsort(1) >= known
        visible = take(x[:, ctx.prefix:], kept)
        own = take(position[:, ctx.prefix:].expand(len(x), -1, -1), kept)
        if self.replacement == "wrong":
            lost = order[:, known:]
            mixed = lost[:, torch.randperm(lost.shape[1], device=x.device)]
            given = take(own, torch.arange(self.visible, device=x.device).expand_as(kept).scatter(1, lost, mixed))
        else:
            given = torch.where(dropped[..., None], 0 if self.token is None else self.token, own)
        x = torch.cat((x[:, :ctx.prefix] + position[:, :ctx.prefix], visible + given), dim=1)
        x, _ = self.model.encode(x, replace(ctx, grid=None))
        return Visible(self.model.norm(x) if self.model.pool_first else x, kept, dropped)  # type: ignore[operator]

    def locate(self, seen: Visible) -> Float[Tensor, "b k n"]:
        """The logits of every place, for each visible patch."""
        return self.decoder(seen.tokens)[:, -self.visible:]

    def smoothing(self, sigma: Float[Tensor, ""]) -> Float[Tensor, "n n"]:
        """Row i: the target of a patch at place i; at sigma 0 one-hot."""
        weight = (-self.distance / sigma.clamp_min(1e-6).square()).exp()  # type: ignore[operator]
        return weight / weight.sum(-1)  # columns, as the code has it

    @torch.no_grad()
    def attentive(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """How much each patch is like the class token, summing to one."""
        x, ctx = self.model.encode(*self.model.embed(images))
        x = self.model.norm(x) if self.model.pool_first else x  # type: ignore[operator]
        patches = x[:, ctx.prefix:]
        whole = x[:, :1] if ctx.prefix else patches.mean(1, keepdim=True)
        return (F.cosine_similarity(whole, patches, dim=-1) / self.tau).softmax(-1)

    def position_loss(self, logits: Float[Tensor, "b k n"], seen: Visible, sigma: Float[Tensor, ""],
                      weights: Float[Tensor, "b k"] | None = None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Loss and accuracy over the dropped positions. weights: of the visible patches, of any scale."""
        target = self.smoothing(sigma)[seen.kept]
        each = -(target * logits.log_softmax(-1)).sum(-1)
        share = seen.dropped.to(each.dtype)
        hits = ((logits.argmax(-1) == seen.kept) * share).sum() / share.sum()
        if weights is not None:
            share = share * weights / weights.sum(-1, keepdim=True)
        return (each * share).sum() / share.sum(), hits.detach()

    def pixel_loss(self, images: Float[Tensor, "b c h w"], seen: Visible) -> Float[Tensor, ""]:
        """Mean squared error of the hidden patches, each brought to mean 0 and variance 1 (MAE, arXiv 2111.06377)."""
        assert self.pixels is not None
        target = patches_of(images, self.model.embedding.step)  # type: ignore[union-attr, arg-type]
        return hidden_error(self.pixels(seen.tokens, seen.kept, self.grid), normed(target), seen.kept)


def takes_any_patches(model: Model) -> bool:
    """Is it a plain ViT, one stage that any of the tokens of its patches can go through?"""
    return (isinstance(model, Backbone) and len(model.stages) == 1 and type(model.stages[0]) is Stack
            and isinstance(model.embedding, PatchEmbed) and type(model.embedding).tokens is PatchEmbed.tokens
            and model.embedding.img_size is not None)


def patches_of(images: Float[Tensor, "b c h w"], step: tuple[int, int]) -> Float[Tensor, "b n p"]:
    """The values of each patch of these sides, row by row, the channels last."""
    patches = images.unflatten(3, (-1, step[1])).unflatten(2, (-1, step[0]))  # B C h p w q
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normed(patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
    """Each patch brought to mean 0 and variance 1."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def hidden_error(drawn: Float[Tensor, "b n p"], target: Float[Tensor, "b n p"],
                 kept: Int[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean squared error of the patches that were not kept."""
    hidden = torch.ones_like(target[..., 0]).scatter(1, kept, 0.0)
    return ((drawn - target).square().mean(-1) * hidden).sum() / hidden.sum()


def take(x: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Decoder(nn.Module):
    """Tokens of the encoder -> `out` numbers a token: a narrow ViT without positions."""

    def __init__(self, dim: int, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        self.embed = linear(dim, width)
        self.stack = Stack(width, depth, {"mixer": spec(Attention, heads=heads), "channel": spec(Mlp)}, spec(PreNorm))
        self.norm = LayerNorm(width)
        self.head = linear(width, out)

    def forward(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m n"]:
        return self.decode(self.embed(x))

    def decode(self, x: Float[Tensor, "b m w"]) -> Float[Tensor, "b m n"]:
        return self.head(self.norm(self.stack(x, Ctx())[0]))


class PixelDecoder(Decoder):
    """As Decoder, with a learned token at the hidden places, and positions; the values of every patch."""

    undecayed = ("hidden",)

    def __init__(self, dim: int, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__(dim, width, depth, heads, out)
        self.hidden = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = SinCos(width, 0)

    def forward(self, x: Float[Tensor, "b m c"], kept: Int[Tensor, "b k"],  # type: ignore[override]
                grid: tuple[int, int]) -> Float[Tensor, "b n p"]:
        x, prefix = self.embed(x), x.shape[1] - kept.shape[1]
        places = self.hidden.expand(len(x), grid[0] * grid[1], -1).to(x.dtype)
        places = places.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), x[:, prefix:])
        x = self.position(torch.cat((x[:, :prefix], places), dim=1), Ctx(grid=grid, prefix=prefix))
        return self.decode(x)[:, prefix:]


OBJECTIVE = spec(DropPos)

PRESETS = {name: vit.PRESETS[name].but(position=spec(SinCos)) for name in (
    "nano", "small", "base", "base_p32", "large", "huge_p14")}

KEYS = {
    "authors": keymap(
        drop("decoder_*", "the decoder of positions; `load_objective` reads it"),
        drop("aux_decoder_*", "the decoder of pixels; `load_objective` reads it"),
        drop("mask_pos_token", "stands for dropped positions; `load_objective` reads it"),
        drop("mask_token", "stands for hidden patches; `load_objective` reads it"),
        *vit.KEYS["timm"].rules,
    ),
}


def _decoder(theirs: str, ours: str) -> list[Rule]:
    block, layer = f"{theirs}_blocks.{{i}}", f"{ours}.stack.layers.{{i}}"
    return [rule(f"{theirs}_embed.*", f"{ours}.embed.*"), rule(f"{theirs}_norm.*", f"{ours}.norm.*"),
            rule(f"{theirs}_pred.*", f"{ours}.head.*"),
            rule(f"{block}.norm1.*", f"{layer}.mixer.norm.*"), rule(f"{block}.attn.*", f"{layer}.mixer.inner.*"),
            rule(f"{block}.norm2.*", f"{layer}.channel.norm.*"), rule(f"{block}.mlp.*", f"{layer}.channel.inner.*")]


OBJECTIVE_KEYS = keymap(
    rule("mask_pos_token", "token"),
    rule("mask_token", "pixels.hidden"),
    drop("aux_decoder_pos_embed", "fixed, computed"),
    *_decoder("decoder", "decoder"),
    *_decoder("aux_decoder", "pixels"),
    *(Rule(r.theirs, tuple(f"model.{name}" for name in r.ours), r.op, r.why) for r in vit.KEYS["timm"].rules),
)


def settings(state: State, layout: str) -> dict[str, Any]:
    """As a ViT's. Without a table of positions they are the fixed ones, for an image of the preset's size, else of 224
    pixels, unless you say img_size."""
    if "embedding.position.table" in state:
        return vit.settings(state, "timm") | {"position": spec(LearnedPosition)}
    dim, _, *patch = state["embedding.proj.weight"].shape
    size = as_preset(PRESETS, "img_size", 224 // patch[0] * patch[0], dim=dim, patch=patch[0])
    table = torch.empty(1, (size.value // patch[0]) ** 2 + int("embedding.cls" in state), 1, device="meta")
    return vit.settings(state | {"embedding.position.table": table}, "timm") | {"img_size": size, "position": spec(SinCos)}


def load_objective(source: str | Path | Mapping[str, Tensor], *, heads: int | None = None, **options: Any) -> DropPos:
    """The objective, encoder and decoders, from the authors' pre-training file or state dict: to go on with, or to look at.

    heads: of the encoder, options: of DropPos; heads leave no trace: 64 channels each in the encoder, 16 heads in the
    decoder, unless you say so. In eval mode.
    """
    state = dict(source) if isinstance(source, Mapping) else read(source).state
    converted = OBJECTIVE_KEYS.convert(state)
    whole = converted.state
    if converted.unmatched or "decoder.head.weight" not in whole:
        raise BadCheckpoint("not a pre-training file of droppos: " + (
            f"{len(converted.unmatched)} of {len(state)} tensors have no place, e.g. {', '.join(converted.unmatched[:3])}"
            if converted.unmatched else "it holds no decoder of positions; load(..., name='droppos') reads the encoder"))
    side, patch = round(len(whole["decoder.head.weight"])**0.5), whole["model.embedding.proj.weight"].shape[-1]
    encoder = load(state, "droppos", img_size=side * patch, **({} if heads is None else {"heads": heads}))
    found = {"decoder_dim": len(whole["decoder.embed.weight"]), "pixels": "pixels.embed.weight" in whole,
             "decoder_depth": count(whole, "decoder.stack.layers.{i}.mixer.norm.weight")}
    objective = DropPos(encoder, **(found | options))  # type: ignore[arg-type]
    if objective.token is None:
        whole.pop("token", None)  # their files hold one that is not used
    objective.load_state_dict(whole)
    return objective.eval()
