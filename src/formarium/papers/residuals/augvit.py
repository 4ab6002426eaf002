"""Augmented Shortcuts for Vision Transformers (Tang, Han, Xu, Xiao, Deng, Xu, Wang, NeurIPS 2021), arXiv 2106.15941.

New: beside the identity, T learned paths go around each sublayer, Z' = MSA(Z) + Z + sum_i sigma(Z Theta_i), and so around
the MLP. Without shortcuts the tokens of a deep Transformer become alike: the diversity r(Z) = ||Z - 1 z^T|| falls doubly
exponentially with depth; each path raises the bound. Theta is block-circulant: C/4 numbers instead of (C/4)^2 in each of
4 x 4 blocks, and a product costs a Fourier transform.

Decisions, after the authors' code, which their files need: the paths read the normed tokens, as the sublayer does,
where the paper writes Z; with T = 2 the sum of four terms is scaled by 3/4, which the paper has not, with T = 1 it is not:
we take 3 / (T + 2) for any T, their values for both. With T = 1 a path has no GELU. Drop path concerns the sublayer alone.
The norm in r(Z) is Frobenius', for which z is the mean token. Their code multiplies by the whole circulant matrix; here the
block's size decides between that and the Fourier domain, which is what the paper's cost counts. Aug-PVT and Aug-T2T are
this scheme in other hosts (residual="augvit"). No weights were released.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.part import Part
from ...core.spec import Spec, spec
from ...parts.channel import linear
from ...parts.norm import LayerNorm
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone
from ...weights.keys import Make, Op, Options, Passed, Rule, State, count, drop, keymap, rule
from ..backbones import vit

CARD = Card(
    title="Augmented Shortcuts for Vision Transformers",
    authors="Yehui Tang, Kai Han, Chang Xu, An Xiao, Yiping Deng, Chao Xu, Yunhe Wang",
    venue="NeurIPS 2021",
    arxiv="2106.15941",
    year=2021,
    code="https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/augvit_pytorch",
    licence="Apache-2.0 (code; no weights)",
    kind="residual",
    domain="image",
    tags=("skip connections", "depth", "circulant", "feature diversity"),
    claim="Augmented shortcuts raise DeiT, PVT and T2T by about one point on ImageNet at nearly the same parameters and "
          "FLOPs (DeiT-S 79.8 to 80.9 %).",
    variants={
        "nano": Published(note="ours: vit/nano with this residual scheme"),
        "small_circulant2": Published(params=22.2e6, macs=4.7e9, input=(3, 224, 224), results={"ImageNet top-1": 80.9},
                                      note="Aug-ViT-S of table 2; the names are those of the authors' code"),
        "base_circulant2": Published(params=86.5e6, macs=17.7e9, input=(3, 224, 224), results={"ImageNet top-1": 82.4},
                                     note="Aug-ViT-B"),
        "base_circulant2_384": Published(params=86.5e6, macs=55.8e9, input=(3, 384, 384), results={"ImageNet top-1": 84.2},
                                         note="Aug-ViT-B fine-tuned at 384 pixels"),
        "small_linear": Published(note="one path with a whole matrix and no GELU, as the authors' code has it"),
        "small_linear2": Published(note="two paths with whole matrices"),
    },
    hosts=("vit/nano", "gpt/nano"),
)

FOURIER_BLOCK = 64  # circulant blocks of at least this size are multiplied in the Fourier domain


def block_circulant(x: Float[Tensor, "*b n"], weight: Float[Tensor, "r c s"]) -> Float[Tensor, "*b m"]:
    """x W^T, where W is made of r x c circulant blocks, W_rc[i, j] = weight[r, c, (i - j) mod s]."""
    return (_fourier if weight.shape[2] >= FOURIER_BLOCK else _dense)(x, weight)


def circulant_matrix(weight: Float[Tensor, "r c s"]) -> Float[Tensor, "m n"]:
    """The whole of W."""
    i = torch.arange(weight.shape[2], device=weight.device)
    return weight[:, :, (i[:, None] - i) % len(i)].transpose(1, 2).flatten(2).flatten(0, 1)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, circulant_matrix(weight))


def _fourier(x: Tensor, weight: Tensor) -> Tensor:
    """A circulant product is a circular convolution: a product of frequencies. Half precision has no transform."""
    _, c, s = weight.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.fft.rfft(x.to(exact).unflatten(-1, (c, s))), torch.fft.rfft(weight.to(exact))
    product = torch.einsum("...cf,rcf->...rf", *frequencies)
    return torch.fft.irfft(product, n=s).flatten(-2).to(x.dtype)


class CirculantLinear(nn.Module):
    """A linear layer dim -> dim of blocks x blocks circulant matrices: blocks * dim weights, and a bias."""

    undecayed = ("weight",)  # the authors' are one vector

    def __init__(self, dim: int, blocks: int = 4) -> None:
        super().__init__()
        if blocks < 1 or dim % blocks:
            raise DoesNotFit(f"a width of {dim} does not divide into {blocks} blocks; take another blocks=")
        self.weight = nn.Parameter(torch.empty(blocks, blocks, dim // blocks).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return block_circulant(x, self.weight) + self.bias


class AugmentedShortcut(PreNorm):
    """(x + drop(inner(n)) + sum of sigma(path(n))) * 3 / (paths + 2), n = norm(x).

    paths: T; 0 is plain pre-norm. mode: "circulant" (of blocks x blocks) or "linear". gelu: sigma is GELU, else the
    identity; None: where there are several paths.
    """

    def __init__(self, dim: int, place: Place, inner: Part, *, paths: int = 2, mode: str = "circulant", blocks: int = 4,
                 gelu: bool | None = None, norm: Spec[nn.Module] = spec(LayerNorm), drop_path: float = 0.0,
                 layer_scale: float | None = None) -> None:
        super().__init__(dim, place, inner, norm=norm, drop_path=drop_path, layer_scale=layer_scale)
        if mode not in ("circulant", "linear"):
            raise unknown("mode of augmented shortcuts", mode, ("circulant", "linear"))
        if paths < 0:
            raise DoesNotFit(f"paths, beside the identity, are 0 or more, got {paths}")
        self.gelu = paths > 1 if gelu is None else gelu
        self.paths = nn.ModuleList(CirculantLinear(dim, blocks) if mode == "circulant" else linear(dim, dim)
                                   for _ in range(paths))

    def forward(self, state: Any, ctx: Ctx) -> Any:
        n = self.norm(state)
        x = state + self.branch(n, ctx)
        for path in self.paths:
            x = x + (F.gelu(path(n)) if self.gelu else path(n))
        return x * (3 / (len(self.paths) + 2)) if len(self.paths) > 1 else x


PART = spec(AugmentedShortcut)


@torch.no_grad()
def feature_diversity(model: Backbone, images: Float[Tensor, "b c h w"], *, relative: bool = False) -> list[float]:
    """r(Z) = ||Z - 1 z^T|| after each layer, shallow to deep: how far its tokens are from one and the same token z.

    The norm is Frobenius', the mean over the images is given. relative: as a share of ||Z||, from 0 (all alike) to 1.
    """
    training = model.training
    model.eval()
    try:
        (x, ctx), found = model.embed(images), []
        for stage in model.stages:
            x, ctx, seen = stage.intermediates(x, ctx, range(stage.depth))  # type: ignore[operator]
            for z in (t.double() for t in seen):
                r = torch.linalg.matrix_norm(z - z.mean(1, keepdim=True))
                found.append((r / torch.linalg.matrix_norm(z) if relative else r).mean().item())
    finally:
        model.train(training)
    return found


PRESETS = {
    "nano": vit.PRESETS["nano"].but(residual=PART),
    "small_circulant2": vit.PRESETS["small"].but(residual=PART),
    "base_circulant2": vit.PRESETS["base"].but(residual=PART),
    "base_circulant2_384": vit.PRESETS["base"].but(residual=PART, img_size=384),
    "small_linear": vit.PRESETS["small"].but(residual=PART.but(mode="linear", paths=1)),
    "small_linear2": vit.PRESETS["small"].but(residual=PART.but(mode="linear")),
}


def _flat(tensors: list[Tensor], options: Options) -> list[Tensor]:
    """Vectors of all blocks in a row, and biases, in turn."""
    if any(t.ndim != 3 for t in tensors[::2]):
        raise Passed
    return [t.flatten() for t in tensors]


def _blocks(tensors: list[Tensor], options: Options) -> list[Tensor]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [t for w, b in pairs for t in (w.view(len(w) // len(b), len(w) // len(b), -1), b)]


def _whole(tensors: list[Tensor], options: Options) -> list[Tensor]:
    if any(t.ndim != 2 for t in tensors[::2]):
        raise Passed
    return tensors


CIRCULANT, WHOLE = Op(_blocks, _flat), Op(_whole, _whole)


def _index(several: bool, ours: str) -> Make:
    def make(weight: Tensor, state: State, options: Options) -> Tensor | None:
        """Where in their vector each element of the matrix is."""
        if weight.ndim != 3 or (f"{ours}.paths.1.weight" in state) is not several:
            return None
        return circulant_matrix(torch.arange(weight.numel()).view(weight.shape))

    return make


def _shortcuts() -> list[Rule]:
    """Of two paths, each followed by a GELU, or of one alone; and their indices into the vectors."""
    rules = []
    for theirs, name in (("augs_attn", "mixer"), ("augs", "channel")):
        theirs, ours = f"blocks.{{i}}.{theirs}", f"{vit.OURS}.{name}"
        for form, weight in ((CIRCULANT, "weight_list"), (WHOLE, "weight")):
            for names in ((f"{theirs}.0", f"{theirs}2.0"), (theirs,)):
                rules.append(rule([f"{n}.{kind}" for n in names for kind in (weight, "bias")],
                                  [f"{ours}.paths.{j}.{kind}" for j in range(len(names)) for kind in ("weight", "bias")],
                                  form))
        for j, n, several in ((0, f"{theirs}.0", True), (1, f"{theirs}2.0", True), (0, theirs, False)):
            made = (f"{ours}.paths.{j}.weight", _index(several, f"stages.0.layers.0.{name}"))
            rules.append(drop(f"{n}.index_matrix", "rebuilt from the number of blocks", made))
    return rules


KEYS = {"authors": keymap(*_shortcuts(), *vit.KEYS["timm"].rules)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """The ViT's settings, and the shortcuts'."""
    first = f"{vit.OURS}.mixer".replace("{i}", "0")
    weight, options = state[f"{first}.paths.0.weight"], {"paths": count(state, f"{first}.paths.{{i}}.weight")}
    told: dict[str, Any] = {k: v for k, v in options.items() if v != 2}
    if weight.ndim == 2:
        told["mode"] = "linear"
    elif len(weight) != 4:
        told["blocks"] = len(weight)
    return vit.settings(state, "timm") | {"residual": PART.but(**told)}
