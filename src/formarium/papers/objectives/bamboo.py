"""A Study on Transformer Configuration and Training Objective (Xue et al., ICML 2023), arXiv 2205.10505.

New, no layer: at equal parameters a deeper and narrower Transformer ("bamboo") is better when it is pre-trained as a masked
autoencoder, while under a classification loss alone it is worse. Attention is a low-pass filter, so depth makes tokens
alike; reconstructing hidden patches rewards what tells them apart. Here: `iso_parameter`, the configurations of equal size;
`smoothness`, how alike the tokens of each layer are, of any image backbone or text encoder; and MAE, the objective of
Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv 2111.06377): a quarter of the patches is encoded, a small
decoder draws the rest.

Decisions: the published depths and widths could not be found; the presets follow the paper's rule from the usual sizes:
heads as wide as there, depth x width^2 as near as whole layers allow. MAE is as in its authors' code: positions are added
before patches are hidden, targets are normed patch by patch, the loss is over hidden patches, the decoder has 8 layers of
512 channels at most. Any ViT whose positions are added to its tokens can be wrapped. Smoothness is over the patches,
without class token; high frequencies are all but the mean, as the paper has them. The paper's other half is BERT with
masked words, the objective of that file, in configurations of the same helper:

    for c in iso_parameter(64, 4, 4):
        fm.pretrain(f"bert/nano:dim={c.dim},depth={c.depth},heads={c.heads}", "bert", task="stdlib")
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...core.card import Card, Published
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.spec import spec
from ...parts.position import NoPosition
from ...skeletons.backbone import Backbone
from ...skeletons.encoder import Encoder
from ...skeletons.objective import Objective
from ...weights.keys import State, as_preset
from ..backbones import vit
from . import droppos
from .droppos import PixelDecoder, SinCos, hidden_error, normed, patches_of, take, takes_any_patches

CARD = Card(
    title="A Study on Transformer Configuration and Training Objective",
    authors="Fuzhao Xue, Jianghai Chen, Aixin Sun, Xiaozhe Ren, Zangwei Zheng, Xiaoxin He, Yongming Chen, "
            "Xin Jiang, Yang You",
    venue="ICML 2023",
    arxiv="2205.10505",
    year=2022,
    kind="objective",
    domain="image",
    tags=("self_supervised", "masking", "depth"),
    claim="With masked autoencoding a deeper and narrower ViT of the Base size reaches 84.2 % ImageNet top-1, 0.9 points "
          "more than the usual configuration.",
    variants={
        "nano": Published(note="ours: vit/nano made deeper and narrower"),
        "base": Published(input=(3, 224, 224), results={"ImageNet top-1": 84.2},
                          note="Bamboo-B; 27 layers of 512 by the rule, the published ones are not known here"),
        "large": Published(input=(3, 224, 224), results={"ImageNet top-1": 86.3},
                           note="Bamboo-L; 43 layers of 768 by the rule"),
        "huge_p14": Published(input=(3, 224, 224), results={"ImageNet top-1": 87.1},
                              note="Bamboo-H; 57 layers of 960 by the rule"),
    },
    hosts=("vit/nano", "bamboo/nano"),
)


class Configuration(NamedTuple):
    """Options of a Transformer: `vit.PRESETS["base"].but(**configuration._asdict())`, or `bert.PRESETS`."""

    dim: int
    depth: int
    heads: int


def iso_parameter(dim: int, depth: int, heads: int, *, within: float = 0.03) -> list[Configuration]:
    """Configurations with as many parameters in their layers, wide to narrow, with heads of the same width.

    A layer has 12 dim^2 parameters at an MLP ratio of 4, so depth x dim^2 stays; within: by this share of it, as depths are
    whole numbers.
    """
    if min(dim, depth, heads) < 1 or dim % heads or within < 0:
        raise DoesNotFit("expected a width that is heads times a whole number, and depth and within not below 1 and 0; "
                         f"got dim={dim}, depth={depth}, heads={heads}, within={within}")
    found, budget = [], depth * dim**2
    for h in range(int(heads * depth**0.5), 0, -1):
        width = dim // heads * h
        layers = max(1, round(budget / width**2))
        if abs(layers * width**2 / budget - 1) <= within:
            found.append(Configuration(width, layers, h))
    return found


class Smoothness(NamedTuple):
    """cosine: mean over all pairs of tokens, 1 where they all point the same way. high_to_low: energy of what differs
    from the mean token over that of the mean: of all frequencies over the tokens but zero, and of zero."""

    cosine: Float[Tensor, "layers"]
    high_to_low: Float[Tensor, "layers"]


@torch.no_grad()
def smoothness(model: Backbone | Encoder, batch: Float[Tensor, "b c h w"] | Int[Tensor, "b n"]) -> Smoothness:
    """How alike the tokens of images, or of texts of equal length, are: when embedded and after each layer of all stages,
    the mean over the batch, without class tokens."""
    if not isinstance(model, Backbone | Encoder):
        raise DoesNotFit("smoothness is measured on the tokens of an image backbone or a text encoder, "
                         f"{type(model).__name__} is none")
    was = model.training
    model.eval()
    try:
        x, ctx = model.embed(batch)
        rows = [_smoothness(x[:, ctx.prefix:])]
        for stage in model.stages if isinstance(model, Backbone) else [model.stack]:
            x, ctx, seen = stage.intermediates(x, ctx, range(stage.depth))  # type: ignore[operator, arg-type]
            rows += [_smoothness(tokens[:, ctx.prefix:]) for tokens in seen]
    finally:
        model.train(was)
    return Smoothness(*(torch.stack(values) for values in zip(*rows, strict=True)))


def _smoothness(x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    n, x = x.shape[1], x.double()
    if n < 2:
        raise DoesNotFit("smoothness compares tokens, and here is one; take a larger image or smaller patches")
    summed = F.normalize(x, dim=-1).sum(1).square().sum(-1)  # of the cosines of all pairs, each token with itself as well
    low = n * x.mean(1).square().sum(-1)
    return ((summed - n) / (n * (n - 1))).mean(), ((x.square().sum((1, 2)) - low) / low).mean()


class MAE(Objective):
    """Masked autoencoding of images (arXiv 2111.06377): images without labels -> mean squared error of hidden patches.

    ratio: part of the patches that is hidden. norm_pixels: targets are normed patch by patch. decoder_dim: twice the
    encoder's width, 512 at most, unless given.
    """

    def __init__(self, model: Model, *, ratio: float = 0.75, norm_pixels: bool = True, decoder_dim: int | None = None,
                 decoder_depth: int = 8, decoder_heads: int = 16) -> None:
        super().__init__(model)
        if not takes_any_patches(model) or isinstance(model.embedding.position, NoPosition):
            raise DoesNotFit("masked autoencoding needs a plain ViT, one stage after a patch embedding with positions that "
                             f"are added to the tokens (position='learned'); {type(model).__name__} has none here")
        (h, w), (step_h, step_w) = model.embedding.img_size, model.embedding.step
        self.grid, self.ratio, self.norm_pixels = (h // step_h, w // step_w), ratio, norm_pixels
        places = self.grid[0] * self.grid[1]
        self.visible = int(places * (1 - ratio))
        if not 0 < self.visible < places:
            raise DoesNotFit(f"of {places} patches ratio={ratio} leaves {self.visible} visible; some must be, and some not")
        width = decoder_dim or min(512, 2 * model.num_features)
        values = model.embedding.in_chans * step_h * step_w
        self.decoder = PixelDecoder(model.num_features, width, decoder_depth, decoder_heads, values)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        noise = torch.rand(images.shape[0], self.grid[0] * self.grid[1], device=images.device)
        return self.error(images, noise), {}

    def error(self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
        """The loss where the patches of least noise are seen."""
        x, ctx = self.model.embed(images)
        kept = noise.argsort(1)[:, :self.visible]
        x = torch.cat((x[:, :ctx.prefix], take(x[:, ctx.prefix:], kept)), dim=1)
        ctx.grid = None
        x, _ = self.model.encode(x, ctx)
        x = self.model.norm(x) if self.model.pool_first else x  # type: ignore[operator]
        target = patches_of(images, self.model.embedding.step)  # type: ignore[union-attr, arg-type]
        return hidden_error(self.decoder(x, kept, self.grid), normed(target) if self.norm_pixels else target, kept)


OBJECTIVE = spec(MAE)


def _bamboo(host: str, dim: int) -> Any:
    """The configuration of this width that has the parameters of a preset of ViT, with fixed positions as MAE has them."""
    usual = vit.PRESETS[host]
    found = {c.dim: c for c in iso_parameter(usual["dim"], usual["depth"], usual["heads"])}
    return usual.but(position=spec(SinCos), **found[dim]._asdict())


PRESETS = {
    "nano": _bamboo("nano", 48),
    "base": _bamboo("base", 512),
    "large": _bamboo("large", 768),
    "huge_p14": _bamboo("huge_p14", 960),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As DropPos's, whose encoders have the same positions."""
    found = droppos.settings(state, layout)
    dim = found["dim"]
    return found | {"heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim)}
