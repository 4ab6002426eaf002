"""k-means Mask Transformer (Yu et al., ECCV 2022), arXiv 2207.04044.

New: queries are cluster centres (section 3.2). Where cross-attention takes a softmax over the pixels, each pixel here goes
to one query, the argmax over the queries, and a query is updated by the sum of its pixels: a step of k-means in each
decoder layer. Every layer predicts masks and classes from its centres and is supervised by the matching of the final
prediction. Around it: a pixel decoder of axial attention (arXiv 2003.07853) and bottlenecks, losses in the form of the
panoptic quality (MaX-DeepLab, arXiv 2012.00759), and a semantic head that only training sees.

Decisions: the authors' PyTorch code is followed where their TensorFlow code differs. `assignment="softmax"` changes the
activation alone: a softmax over the pixels of the same logits, with gradients. Attention is written out, as its scores are
batch-normed before the softmax. Trunks are ResNet and ConvNeXt with the authors' padding, or any backbone of the house;
the decoder has a stage for each of its maps, and the semantic head's widths follow `dim`. Batch norms take the statistics
of one process. `nano` starts with mask logits of deviation 1, not 0.1, which short runs cannot make grow.
"""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.card import Card, Published
from ...core.ctx import Place
from ...core.errors import DoesNotFit, unknown
from ...core.model import Feature, FeatureInfo
from ...core.spec import Spec, spec
from ...parts.attention import head_dim
from ...parts.embed import check_images
from ...parts.norm import LayerNorm
from ...parts.residual import drop_path as dropped
from ...skeletons.segmenter import VOID, LinearSegmenter, Regions, Segmenter, Thresholds, build_trunk, resize
from ...weights.keys import SAME, Assumed, Op, Options, Passed, State, count, drop, keymap, rule

CARD = Card(
    title="k-means Mask Transformer",
    authors="Qihang Yu, Huiyu Wang, Siyuan Qiao, Maxwell Collins, Yukun Zhu, Hartwig Adam, Alan Yuille, Liang-Chieh Chen",
    venue="ECCV 2022",
    arxiv="2207.04044",
    year=2022,
    code="https://github.com/bytedance/kmax-deeplab",
    licence="Apache-2.0 (code and weights)",
    kind="dense",
    domain="dense",
    tags=("segmentation", "panoptic", "k-means", "axial attention", "queries"),
    claim="Cross-attention that assigns each pixel to one query, as k-means does, reaches 58.0 PQ on COCO and 68.4 PQ on "
          "Cityscapes (val) without test-time augmentation.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 32 to 96 pixels, on swin/nano"),
        "linear": Published(note="ours, the baseline: swin/nano with a linear head on its maps, no queries"),
        "r50": Published(params=72.44e6, macs=168e9, input=(3, 800, 1200), results={"COCO val PQ": 53.0},
                         note="the paper's 57 M leave out the semantic head of training (15.9 M), so parameters, here and "
                              "below, are counted in the authors' code; trained and tested at 1281x1281"),
        "convnext_tiny": Published(params=67.27e6, macs=172e9, input=(3, 800, 1200), results={"COCO val PQ": 55.3},
                                   note="61 M without the semantic head"),
        "convnext_small": Published(params=88.90e6, macs=251e9, input=(3, 800, 1200), results={"COCO val PQ": 56.3},
                                    note="83 M without the semantic head"),
        "convnext_base": Published(params=129.75e6, macs=380e9, input=(3, 800, 1200), results={"COCO val PQ": 57.2},
                                   note="122 M without the semantic head"),
        "convnext_large": Published(params=243.88e6, macs=744e9, input=(3, 800, 1200), results={"COCO val PQ": 57.9},
                                    note="232 M without the semantic head"),
        "convnext_large_256": Published(input=(3, 1281, 1281), results={"COCO val PQ": 58.0}, note="256 queries"),
        "r50_cityscapes": Published(input=(3, 1025, 2049), results={"Cityscapes val PQ": 63.5, "Cityscapes val mIoU": 79.5},
                                    note="results of the authors' PyTorch code, as all below"),
        "convnext_large_cityscapes": Published(
            input=(3, 1025, 2049), results={"Cityscapes val PQ": 68.4, "Cityscapes val mIoU": 83.0}),
        "r50_ade20k": Published(input=(3, 1281, 1281), results={"ADE20K val PQ": 42.2}),
        "convnext_large_ade20k": Published(input=(3, 1281, 1281), results={"ADE20K val PQ": 50.0}),
    },
    exceptions={"drop_path": "batch norms answer otherwise in training, with and without dropped paths"},
)

EPS, MOMENTUM = 1e-3, 0.01  # of the batch norms
SPAN = 255  # the longest axis that relative positions reach
VOID_PRIOR = 0.9  # probability of "no region" at the start
TEMPERATURE = 0.3  # of the pixels' similarities
FLOOR = 1e-5  # least weight of a matched region


class BatchNorm(nn.Module):
    """Batch norm over axis 1. A channel of one value has no variance: the running statistics serve, and stay."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((dim,), scale)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "b c *d"]) -> Float[Tensor, "b c *d"]:
        learns = self.training and x.numel() > x.shape[1]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, learns, MOMENTUM, EPS)


class ConvNorm(nn.Module):
    """Convolution of maps, or of rows (axes=1), that keeps their size at stride 1; batch norm; GELU if `act`.

    scale: the norm's first; None: no norm. std: of the weights, else sqrt(2 / in_chans); depthwise ones are Xavier's.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: int = 1, *, axes: int = 2, stride: int = 1, dilation: int = 1,
                 groups: int = 1, bias: bool = False, scale: float | None = 1.0, act: bool = False,
                 std: float | None = None) -> None:
        super().__init__()
        make, padding = (nn.Conv1d, nn.Conv2d)[axes - 1], dilation * (kernel // 2)
        self.conv = make(in_chans, out_chans, kernel, stride, padding, dilation, groups, bias)
        self.norm = None if scale is None else BatchNorm(out_chans, scale=scale)
        self.act = act
        if groups > 1:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            _normal(self.conv.weight, std or (2 / in_chans) ** 0.5)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "b c *d"]) -> Float[Tensor, "b o *e"]:
        x = self.conv(x) if self.norm is None else self.norm(self.conv(x))
        return F.gelu(x) if self.act else x


def _normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def channel_norm(norm: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """A layer norm over the channels of a map."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


# trunks

class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1; ReLU after the sum."""

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = ConvNorm(in_chans, width, std=(2 / width) ** 0.5)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, std=(2 / 9 / width) ** 0.5)
        self.conv3 = ConvNorm(width, out, std=(2 / out) ** 0.5)
        self.shortcut = ConvNorm(in_chans, out, stride=stride, std=(2 / out) ** 0.5) if in_chans != out else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Trunk(nn.Module):
    """Four stages of maps at strides 4, 8, 16, 32. stem: what enters the first is a map too, of stride 4 in fact."""

    stem_is_finest = True

    def __init__(self, channels: Sequence[int], *, stem: bool) -> None:
        super().__init__()
        self.with_stem = stem
        self.feature_info = self._ordered([FeatureInfo(c, max(4, 2 ** (i + 1))) for i, c in enumerate(channels)])

    def _ordered(self, maps: list[Any]) -> list[Any]:
        """From the stem on, the finest first."""
        if not self.with_stem:
            return maps[1:]
        return maps if self.stem_is_finest else [maps[1], maps[0], *maps[2:]]

    def enter(self, x: Tensor, i: int) -> Tensor:
        """What stands before stage i."""
        raise TypeError(f"{type(self).__name__} must define enter")

    def features(self, x: Float[Tensor, "b c h w"]) -> list[Feature]:
        maps = []
        for i, stage in enumerate(self.stages):  # type: ignore[arg-type]
            x = self.enter(x, i)
            if i == 0:
                maps.append(x)
            x = stage(x)
            maps.append(x)
        return [Feature(m, info.stride) for m, info in zip(self._ordered(maps), self.feature_info, strict=True)]


class ResNet(Trunk):
    """ResNet with bottlenecks (He et al. 2015, arXiv 1512.03385), stride in the 3x3 convolution. layers: blocks a stage."""

    stem_is_finest = False  # the authors sort by stride, and here the stem's is rightly known as that of the first stage

    def __init__(self, *, in_chans: int = 3, layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64,
                 stem: bool = False) -> None:
        super().__init__([width, *(4 * width * 2**i for i in range(len(layers)))], stem=stem)
        self.stem = ConvNorm(in_chans, width, 7, stride=2, std=(2 / 49 / width) ** 0.5)
        self.stages = nn.ModuleList()
        before = width
        for i, depth in enumerate(layers):
            own, stride = width * 2**i, 1 if i == 0 else 2
            self.stages.append(nn.Sequential(*(Bottleneck(4 * own if j else before, own, 1 if j else stride)
                                               for j in range(depth))))
            before = 4 * own

    def enter(self, x: Tensor, i: int) -> Tensor:
        return F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1) if i == 0 else x


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, two linear layers, a scale for each channel."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.scale, self.rate = nn.Parameter(torch.full((dim,), 1e-6)), drop_path
        for layer in (self.conv, self.fc1, self.fc2):
            _normal(layer.weight, 0.02)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.fc2(F.gelu(self.fc1(self.norm(self.conv(x).movedim(1, -1))))) * self.scale
        return x + dropped(y, self.rate, self.training).movedim(-1, 1)


class ConvNeXt(Trunk):
    """ConvNeXt (Liu et al. 2022, arXiv 2201.03545), padded so that a side of a multiple of 32 and one keeps its corners."""

    def __init__(self, *, in_chans: int = 3, layers: tuple[int, ...] = (3, 3, 9, 3),
                 dims: tuple[int, ...] = (96, 192, 384, 768), drop_path: float = 0.0, stem: bool = False) -> None:
        super().__init__([dims[0], *dims], stem=stem)
        rates = iter(torch.linspace(0, drop_path, sum(layers), device="cpu").tolist())
        chans = (in_chans, *dims)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 2 if i else 4, 2 if i else 4)
                                   for i, (a, b) in enumerate(zip(chans[:-1], dims, strict=True)))
        self.norms = nn.ModuleList(LayerNorm(d) for d in (dims[0], *dims[:-1]))  # after the first convolution, else before
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(d, next(rates)) for _ in range(n)))
                                    for d, n in zip(dims, layers, strict=True))

    def enter(self, x: Tensor, i: int) -> Tensor:
        if i == 0:
            return channel_norm(self.norms[0], self.convs[0](F.pad(x, (1, 2, 1, 2))))
        return self.convs[i](channel_norm(self.norms[i], F.pad(x, (0, 1, 0, 1))))


# the pixel decoder

class AxialAttention(nn.Module):
    """Attention along one axis, with relative positions in queries, keys and values; scores and answers are normed."""

    def __init__(self, dim: int, *, key: int, value: int, heads: int) -> None:
        super().__init__()
        self.heads, self.split = heads, (key, key, value)
        self.qkv = ConvNorm(dim, sum(self.split), axes=1, std=dim**-0.5)
        self.of_query, self.of_key, self.of_value = (
            nn.Parameter(torch.empty(2 * SPAN - 1, head_dim(d, heads))) for d in self.split)
        for table in (self.of_query, self.of_key, self.of_value):
            _normal(table, 1.0)
        self.score_norm, self.out_norm = BatchNorm(3 * heads), BatchNorm(2 * value)

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b v n"]:
        n = x.shape[2]
        if n > SPAN:
            raise DoesNotFit(f"axial attention has relative positions for {SPAN} cells, got {n}; take smaller images")
        q, k, v = (t.unflatten(1, (self.heads, -1)) for t in self.qkv(x).split(self.split, dim=1))
        along = torch.arange(n, device=x.device)
        at = along - along[:, None] + SPAN - 1  # (query, key)
        scores = torch.cat((torch.einsum("bhdl,bhdm->bhlm", q, k), torch.einsum("bhdl,lmd->bhlm", q, self.of_query[at]),
                            torch.einsum("bhdm,lmd->bhlm", k, self.of_key[at])), dim=1)
        weights = self.score_norm(scores).unflatten(1, (3, self.heads)).sum(1).softmax(-1)
        found = torch.cat((torch.einsum("bhlm,bhdm->bhdl", weights, v),
                           torch.einsum("bhlm,lmd->bhdl", weights, self.of_value[at])), dim=1)
        return self.out_norm(found.flatten(1, 2)).unflatten(1, (2, -1)).sum(1)


class AxialMixer(nn.Module):
    """Down the columns, along the rows, GELU."""

    def __init__(self, dim: int, *, key: int, heads: int) -> None:
        super().__init__()
        self.height = AxialAttention(dim, key=key, value=2 * key, heads=heads)
        self.width = AxialAttention(2 * key, key=key, value=2 * key, heads=heads)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        for axis, attention in ((3, self.height), (2, self.width)):
            rows = x.movedim(axis, 1)  # (B, other axis, C, axis)
            x = attention(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).movedim(1, axis)
        return F.gelu(x)


class Block(nn.Module):
    """x -> shortcut(g) + drop(expand(mix(reduce(g)))), g = GELU(x): to 4 * base channels. kind: "axial" or "bottleneck"."""

    def __init__(self, dim: int, base: int, kind: str, *, heads: int, drop_path: float) -> None:
        super().__init__()
        if kind not in ("axial", "bottleneck"):
            raise unknown("kind of pixel decoder block", kind, ("axial", "bottleneck"))
        axial = kind == "axial"
        self.rate, wide = drop_path, 2 * base if axial else base
        self.reduce = ConvNorm(dim, wide, act=True)
        self.mix = AxialMixer(wide, key=base, heads=heads) if axial else ConvNorm(base, base, 3, act=True)
        self.expand = ConvNorm(wide, 4 * base, scale=0.0)
        self.shortcut = ConvNorm(dim, 4 * base) if dim != 4 * base else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        x = F.gelu(x)
        y = self.expand(self.mix(self.reduce(x)))
        return dropped(y, self.rate, self.training) + (x if self.shortcut is None else self.shortcut(x))


class Fuse(nn.Module):
    """A coarse map, brought to the size of a finer one, and that one, at `dim` channels, summed."""

    def __init__(self, coarse: int, fine: int, dim: int) -> None:
        super().__init__()
        self.coarse = ConvNorm(coarse, dim) if coarse != dim else None
        self.fine = ConvNorm(fine, dim) if fine != dim else None

    def forward(self, coarse: Float[Tensor, "b c h w"], fine: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b e h2 w2"]:
        if self.coarse is not None:
            coarse = self.coarse(F.gelu(coarse))
        if self.fine is not None:
            fine = self.fine(F.gelu(fine))
        return resize(coarse, fine.shape[2:]) + fine


class PixelDecoder(nn.Module):
    """Maps of a trunk, the coarsest first -> as many refined ones, of 4 * base channels."""

    def __init__(self, channels: Sequence[int], bases: Sequence[int], depths: Sequence[int], kinds: Sequence[str], *,
                 heads: int, drop_path: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(c) for c in channels)
        self.stages, self.fuses, self.checkpointing = nn.ModuleList(), nn.ModuleList(), False
        for i, (base, depth, kind) in enumerate(zip(bases, depths, kinds, strict=True)):
            if i:
                self.fuses.append(Fuse(4 * bases[i - 1], channels[i], base))
            entry = base if i else channels[0]
            self.stages.append(nn.Sequential(*(Block(4 * base if j else entry, base, kind, heads=heads, drop_path=drop_path)
                                               for j in range(depth))))

    def forward(self, maps: Sequence[Float[Tensor, "b c h w"]]) -> list[Float[Tensor, "b d h w"]]:
        out: list[Tensor] = []
        for i, (x, norm) in enumerate(zip(maps, self.norms, strict=True)):
            x = channel_norm(norm, x)
            x = self.fuses[i - 1](out[-1], x) if i else x
            for block in self.stages[i]:  # type: ignore[attr-defined]
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
            out.append(x)
        return out


# the transformer decoder

class Prediction(NamedTuple):
    """What a layer sees: `Regions`, and the unit vectors of the pixels from which the masks are read."""

    classes: Float[Tensor, "b q k+1"]
    masks: Float[Tensor, "b q h w"]
    pixels: Float[Tensor, "b e h w"]


class Predictor(nn.Module):
    """Mask logits: kernels of the queries times unit vectors of the pixels, batch-normed as one channel; class logits."""

    def __init__(self, pixels: int, dim: int, embed: int, num_classes: int, mask_scale: float) -> None:
        super().__init__()
        self.depthwise = ConvNorm(pixels, pixels, 5, groups=pixels, act=True)
        self.pointwise = ConvNorm(pixels, dim, act=True)
        self.embed = ConvNorm(dim, embed, bias=True, std=0.01)
        self.kernel = ConvNorm(dim, embed, axes=1)
        self.classify = ConvNorm(dim, num_classes + 1, axes=1, bias=True, scale=None, std=0.01)
        self.mask_norm = BatchNorm(1, scale=mask_scale)
        self.void = math.log(num_classes * VOID_PRIOR / (1 - VOID_PRIOR))

    def forward(self, masks: Float[Tensor, "b c q"], classes: Float[Tensor, "b c q"],
                pixels: Float[Tensor, "b d h w"]) -> Prediction:
        pixels = F.normalize(self.embed(self.pointwise(self.depthwise(pixels))), dim=1)
        logits = torch.einsum("bchw,bcq->bqhw", pixels, self.kernel(masks))
        logits = self.mask_norm(logits[:, None])[:, 0]
        labels = self.classify(classes).mT
        return Prediction(labels + F.pad(labels.new_full((1,), self.void), (labels.shape[-1] - 1, 0)), logits, pixels)


class QueryAttention(nn.Module):
    """Self-attention of the queries; scores and answers are batch-normed, the answers go through GELU."""

    def __init__(self, value: int, heads: int) -> None:
        super().__init__()
        head_dim(value, heads)
        self.heads, self.score_norm, self.out_norm = heads, BatchNorm(heads), BatchNorm(value)

    def forward(self, q: Float[Tensor, "b c n"], k: Float[Tensor, "b c n"],
                v: Float[Tensor, "b d n"]) -> Float[Tensor, "b d n"]:
        q, k, v = (t.unflatten(1, (self.heads, -1)) for t in (q, k, v))
        weights = self.score_norm(torch.einsum("bhdl,bhdm->bhlm", q, k)).softmax(-1)
        return F.gelu(self.out_norm(torch.einsum("bhlm,bhdm->bhdl", weights, v).flatten(1, 2)))


def assign(logits: Float[Tensor, "b q n"], how: str) -> Float[Tensor, "b q n"]:
    """Weights of N pixels in the update of Q queries: 1 for a pixel's likeliest query, or a softmax over the pixels."""
    if how == "softmax":
        return logits.softmax(-1)
    return torch.zeros_like(logits).scatter_(1, logits.detach().argmax(1, keepdim=True), 1.0)


def _exact_product(a: Float[Tensor, "b d n"], b: Float[Tensor, "b n q"]) -> Float[Tensor, "b d q"]:
    """In float32, also where mixed precision is on."""
    if a.is_meta:  # it knows no mixed precision
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class KMeansLayer(nn.Module):
    """Queries (B, Q, dim) and a map (B, pixels, H, W) -> queries, Prediction: assign, update, attend, MLP.

    width: of both inside the layer, the queries' unless given; key: of all heads, half of it; value: as width.
    assignment: "kmeans", or "softmax" over the pixels, the ablation. mask_scale: deviation of the mask logits at the start;
    the authors' 0.1 takes many thousands of steps to grow.
    """

    def __init__(self, dim: int, place: Place, *, pixels: int = 2048, num_classes: int = 133, width: int | None = None,
                 key: int | None = None, value: int | None = None, hidden: int = 2048, embed: int = 128, heads: int = 8,
                 mask_scale: float = 0.1, assignment: str = "kmeans", drop_path: float = 0.0) -> None:
        super().__init__()
        if assignment not in ("kmeans", "softmax"):
            raise unknown("assignment", assignment, ("kmeans", "softmax"))
        width = width or dim
        key, value = key or width // 2, value or width
        head_dim(key, heads)
        self.assignment, self.rate, self.split = assignment, drop_path, (key, key, value)
        self.query_in = ConvNorm(dim, width, axes=1, act=True)
        self.pixel_in = ConvNorm(pixels, width, act=True)
        self.predictor = Predictor(width, width, embed, num_classes, mask_scale)
        self.pixel_value = ConvNorm(width, value, std=width**-0.5)
        self.update_norm = BatchNorm(value)
        self.update = ConvNorm(value, dim, axes=1, scale=0.0)
        self.qkv = ConvNorm(width, sum(self.split), axes=1, std=width**-0.5)
        self.attention = QueryAttention(value, heads)
        self.proj = ConvNorm(value, dim, axes=1, scale=0.0)
        self.fc1 = ConvNorm(dim, hidden, axes=1, act=True)
        self.fc2 = ConvNorm(hidden, dim, axes=1, scale=0.0)

    def forward(self, queries: Float[Tensor, "b q c"],
                pixels: Float[Tensor, "b d h w"]) -> tuple[Float[Tensor, "b q c"], Prediction]:
        x, p = queries.mT, self.pixel_in(F.gelu(pixels))
        c = self.query_in(x)
        seen = self.predictor(c, c, p)
        v = self.pixel_value(p).flatten(2)
        weights = assign(seen.masks.flatten(2).float(), self.assignment)
        sums = _exact_product(v.float(), weights.mT).to(v.dtype)  # over thousands of pixels, not their mean
        x = x + self.drop(self.update(self.update_norm(sums)))
        x = F.gelu(x + self.drop(self.proj(self.attention(*self.qkv(c).split(self.split, dim=1)))))
        return F.gelu(x + self.drop(self.fc2(self.fc1(x)))).mT, seen

    def drop(self, x: Tensor) -> Tensor:
        return dropped(x, self.rate, self.training)


class Aspp(nn.Module):
    """1x1, dilated 3x3 and pooled features, projected to `dim` channels (DeepLab v3, arXiv 1706.05587)."""

    def __init__(self, in_chans: int, dim: int, rates: tuple[int, ...] = (6, 12, 18)) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvNorm(in_chans, dim, act=True)])
        self.branches.extend(ConvNorm(in_chans, dim, 3, dilation=rate, act=True) for rate in rates)
        self.pooled = ConvNorm(in_chans, dim, act=True)
        self.proj = ConvNorm((len(rates) + 2) * dim, dim, act=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.proj(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))
        return F.dropout(x, 0.1, self.training)


class Separable(nn.Sequential):
    """Depthwise 5x5, then 1x1, each with norm and GELU."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(ConvNorm(in_chans, in_chans, 5, groups=in_chans, act=True), ConvNorm(in_chans, dim, act=True))


class SemanticHead(nn.Module):
    """Dense logits from the trunk's own maps, the coarsest first, for an auxiliary loss.

    aspp: the finer maps of strides 8 and 4 join one after the other, and void has a logit too; else the coarsest is all.
    """

    def __init__(self, channels: Sequence[int], dim: int, num_classes: int, *, aspp: bool) -> None:
        super().__init__()
        self.joined = (2, 3)[:len(channels) - 2] if len(channels) > 2 else (1,)[:len(channels) - 1]
        if not aspp:
            self.joined = ()
        widths = [dim // 4 // 2**i for i in range(len(self.joined))]
        self.aspp = Aspp(channels[0], dim) if aspp else None
        self.finer = nn.ModuleList(ConvNorm(channels[i], w, act=True) for i, w in zip(self.joined, widths, strict=True))
        self.joins = nn.ModuleList(Separable(dim + w, dim) for w in widths)
        self.last = Separable(dim if aspp else channels[0], dim)
        self.classify = ConvNorm(dim, num_classes + int(aspp), bias=True, scale=None, std=0.01)

    def forward(self, maps: Sequence[Float[Tensor, "b c h w"]]) -> Float[Tensor, "b k h w"]:
        x = maps[0] if self.aspp is None else self.aspp(maps[0])
        for i, finer, join in zip(self.joined, self.finer, self.joins, strict=True):
            fine = finer(maps[i])
            x = join(torch.cat((resize(x, fine.shape[2:], maps[0].shape[-1]), fine), dim=1))
        return self.classify(self.last(x))


class Supervised(NamedTuple):
    """What the criterion takes: a prediction of each layer, the final one last, at its size; dense logits, or nothing."""

    layers: tuple[Prediction, ...]
    semantic: tuple[Float[Tensor, "b k h w"], ...]


class KMaXDeepLab(Segmenter):
    """images (B, in_chans, H, W) -> Regions: `queries` masks and their classes.

    backbone: a trunk here, a Spec of any backbone, or a preset's name ("poolformer/nano"). From its coarsest map to its
    finest: bases (4 * base channels), depths and kinds of the pixel decoder's stages, and layers: KMeansLayers on each,
    none on those left over. semantic: training's extra head, "aspp", "plain" or None. samples: pixels an image that are
    compared with one another, and that the semantic loss takes (0: all); powers: small segments are drawn by area**-power.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 1281, in_chans: int = 3, num_classes: int = 133,
                 things: tuple[int, ...] = (), thresholds: tuple[float, ...] = Thresholds(),
                 backbone: Spec[Any] | str = spec(ResNet), queries: int = 128, dim: int = 256,
                 layers: tuple[int, ...] = (2, 2, 2), bases: tuple[int, ...] = (512, 256, 128, 64),
                 depths: tuple[int, ...] = (1, 5, 1, 1),
                 kinds: tuple[str, ...] = ("axial", "axial", "bottleneck", "bottleneck"), heads: int = 8,
                 hidden: int = 2048, embed: int = 128, mask_scale: float = 0.1, assignment: str = "kmeans",
                 semantic: str | None = "aspp", drop_path: float = 0.0, samples: tuple[int, int] = (4096, 4096),
                 powers: tuple[float, float] = (1.5, 2.0)) -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, num_classes=num_classes, things=things,
                         thresholds=thresholds)
        self.trunk = build_trunk(backbone, self.img_size, in_chans)
        channels = [info.channels for info in self.trunk.feature_info][::-1]
        if not len(channels) == len(bases) == len(depths) == len(kinds) >= len(layers):
            raise DoesNotFit(f"the backbone gives {len(channels)} maps: bases, depths and kinds need as many entries, "
                             f"layers as many or fewer; got {len(bases)}, {len(depths)}, {len(kinds)} and {len(layers)}")
        if semantic not in ("aspp", "plain", None):
            raise unknown("semantic head", str(semantic), ("aspp", "plain", "none"))
        self.stride, self.queries, self.samples, self.powers = self.trunk.feature_info[0].stride, queries, samples, powers
        self.checkpointing = False
        self.pixel_decoder = PixelDecoder(channels, bases, depths, kinds, heads=heads, drop_path=drop_path)
        self.centers = nn.Parameter(torch.empty(dim, queries))
        _normal(self.centers, 1.0)
        self.levels = [level for level, n in enumerate(layers) for _ in range(n)]
        self.layers = nn.ModuleList(
            KMeansLayer(dim, Place(i, len(self.levels)), pixels=4 * bases[level], num_classes=num_classes, hidden=hidden,
                        embed=embed, heads=heads, mask_scale=mask_scale, assignment=assignment, drop_path=drop_path)
            for i, level in enumerate(self.levels))
        self.class_in, self.mask_in = ConvNorm(dim, dim, axes=1, act=True), ConvNorm(dim, dim, axes=1, act=True)
        self.predictor = Predictor(4 * bases[-1], dim, embed, num_classes, mask_scale)
        self.auxiliary = None if semantic is None else SemanticHead(channels, dim, num_classes, aspp=semantic == "aspp")

    def forward(self, batch: Float[Tensor, "b c h w"], *, supervised: bool = False) -> Any:
        check_images(batch, self.in_chans)
        maps = [feature.map for feature in self.trunk.features(batch)][::-1]
        refined = self.pixel_decoder(maps)
        x, seen = self.centers.mT.expand(len(batch), -1, -1), []
        for layer, level in zip(self.layers, self.levels, strict=True):
            if self.checkpointing and self.training:
                x, prediction = checkpoint(layer, x, refined[level], use_reentrant=False)
            else:
                x, prediction = layer(x, refined[level])
            seen.append(prediction)
        final = self.predictor(self.mask_in(x.mT), self.class_in(x.mT), refined[-1])
        if not supervised:
            return Regions(final.classes, final.masks)
        size = final.masks.shape[2:]
        earlier = (Prediction(p.classes, resize(p.masks, size, size[0]), resize(p.pixels, size, size[0])) for p in seen)
        return Supervised((*earlier, final), () if self.auxiliary is None else (self.auxiliary(maps),))

    def criterion(self, answer: Supervised, truth: Int[Tensor, "b 2 h w"]) -> Tensor:
        """The authors' losses with their weights: 3 classes + 0.3 pixels' regions + 3 masks + 1 pixels' likeness, summed
        over the layers, + 1 semantic. The final layer's matching serves them all."""
        final = answer.layers[-1]
        truth = shrink(truth, final.masks.shape[2:])
        target = match(final, truth)
        total = final.masks.new_zeros(())
        for p in answer.layers:
            p = Prediction(*(t.float() for t in p))
            masks, pixels = p.masks.flatten(2), p.pixels.flatten(2)
            total = (total + 3 * class_loss(p.classes, target) + 0.3 * region_loss(masks, target)
                     + 3 * mask_loss(masks, target) + likeness_loss(pixels, target, self.samples[0], self.powers[0]))
        for logits in answer.semantic:
            total = total + semantic_loss(logits.float(), truth, target, self.samples[1], self.powers[1])
        return total


# the criterion

class Target(NamedTuple):
    """The truth in the order of the queries, as the matching pairs them: N pixels at the masks' size.

    masks: 1 inside the matched segment; labels: its class, or K where none is; class_weight: how well the mask is met, of
    unmatched ones how far it lies in void; mask_weight: how well the class is met, 0 of unmatched ones; void: pixels in no
    matched segment; rarity: pixels of the image in one of their segment.
    """

    masks: Float[Tensor, "b q n"]
    labels: Int[Tensor, "b q"]
    class_weight: Float[Tensor, "b q"]
    mask_weight: Float[Tensor, "b q"]
    void: Float[Tensor, "b n"]
    rarity: Float[Tensor, "b n"]


def shrink(truth: Int[Tensor, "b 2 h w"], size: Sequence[int]) -> Int[Tensor, "b 2 h2 w2"]:
    """The truth at the cells of a smaller map; where a width is odd, the first and the last pixels are among them."""
    (h, w), odd = truth.shape[2:], truth.shape[3] % 2 == 1
    rows, columns = (torch.arange(n, device=truth.device) for n in size)
    rows = rows * (h - 1) // max(1, size[0] - 1) if odd else (2 * rows + 1) * h // (2 * size[0])
    columns = columns * (w - 1) // max(1, size[1] - 1) if odd else (2 * columns + 1) * w // (2 * size[1])
    return truth[:, :, rows[:, None], columns]


@torch.no_grad()
def match(final: Prediction, truth: Int[Tensor, "b 2 h w"]) -> Target:
    """Each segment to one query, so that the sum of mask similarity (Dice) times class probability is largest."""
    from scipy.optimize import linear_sum_assignment

    probability, regions = final.classes.float().softmax(-1), final.masks.flatten(2).float().softmax(1)
    masks, mask_weight = torch.zeros_like(regions), regions.new_zeros(regions.shape[:2])
    labels = torch.full(regions.shape[:2], probability.shape[-1] - 1, device=regions.device)
    class_weight = torch.zeros_like(mask_weight)
    for i, (classes, numbers) in enumerate(truth.flatten(2)):
        own = numbers.unique()
        own = own[own != VOID]
        inside = own[:, None] == numbers
        label = classes[inside.int().argmax(1)]  # of a pixel of the segment: all have one class
        inside = inside.float()
        overlap = regions[i] * inside.sum(0)
        dice = overlap @ inside.T / ((overlap.sum(1)[:, None] + inside.sum(1)) / 2 + 1e-5)
        likely = probability[i][:, label]
        query, segment = map(torch.from_numpy, linear_sum_assignment((dice * likely).cpu().numpy(), maximize=True))
        masks[i, query], labels[i, query] = inside[segment], label[segment]
        mask_weight[i, query] = likely[query, segment].clamp_min(FLOOR)
        void = 1 - masks[i].sum(0)
        class_weight[i] = regions[i] @ void / (regions[i].sum(1) + 1e-5)
        class_weight[i, query] = dice[query, segment]
    void = 1 - masks.sum(1)
    area = torch.einsum("bqn,bq->bn", masks, masks.sum(2))
    return Target(masks, labels, class_weight.clamp_min(FLOOR), mask_weight, void, masks.shape[2] / area.clamp_min(1))


def _mean_of_nonzero(loss: Float[Tensor, "b n"]) -> Tensor:
    """Over those of an image that count, then over the images."""
    return (loss.sum(1) / (loss != 0).sum(1).clamp_min(1)).mean()


def class_loss(logits: Float[Tensor, "b q k+1"], target: Target) -> Tensor:
    """Cross-entropy, 0.75 for classes and 0.25 for void, weighted by the masks' quality."""
    void = target.labels == logits.shape[-1] - 1
    loss = F.cross_entropy(logits.mT, target.labels, reduction="none")
    return _mean_of_nonzero(loss * torch.where(void, 0.25, 0.75) * target.class_weight)


def region_loss(masks: Float[Tensor, "b q n"], target: Target) -> Tensor:
    """Cross-entropy of the query that each pixel belongs to."""
    return _mean_of_nonzero(F.cross_entropy(masks, target.masks, reduction="none") * (1 - target.void))


def mask_loss(masks: Float[Tensor, "b q n"], target: Target) -> Tensor:
    """1 - Dice, weighted by the classes' quality; over all queries, matched or not, times the authors' 0.75."""
    regions = masks.softmax(1) * (1 - target.void)[:, None]
    dice = (2 * (regions * target.masks).sum(2) + 1) / (regions.sum(2) + target.masks.sum(2) + 1)
    return 0.75 * ((1 - dice) * target.mask_weight).mean(1).mean()


def draw(target: Target, samples: int, power: float) -> Int[Tensor, "b s"]:
    """Pixels without replacement, likelier where their segment is small (Gumbel top-k); void ones last."""
    logits = power * target.rarity.log() - 99999 * target.void
    noise = -(-torch.rand_like(logits).log()).log()
    return (logits + noise).topk(min(samples, logits.shape[1])).indices


def likeness_loss(pixels: Float[Tensor, "b e n"], target: Target, samples: int, power: float) -> Tensor:
    """Each drawn pixel must be alike to those of its segment, and to no other."""
    index = draw(target, samples, power)[:, None]
    masks, pixels = (t.gather(2, index.expand(-1, t.shape[1], -1)) for t in (target.masks, pixels))
    same = masks.mT @ masks
    same = same / same.sum(1, keepdim=True).clamp_min(1)
    return _mean_of_nonzero(F.cross_entropy(pixels.mT @ pixels / TEMPERATURE, same, reduction="none"))


def semantic_loss(logits: Float[Tensor, "b k h w"], truth: Int[Tensor, "b 2 h w"], target: Target, samples: int,
                  power: float) -> Tensor:
    """Cross-entropy of the classes of drawn pixels, or of all."""
    size, full = logits.shape[2:], truth.shape[2:]
    small, logits = shrink(truth, size)[:, 0].flatten(1), logits.flatten(2)
    if samples:
        void, rarity = (shrink(t.unflatten(1, full)[:, None], size).flatten(1) for t in (target.void, target.rarity))
        index = draw(target._replace(void=void, rarity=rarity), samples, power)
        small, logits = small.gather(1, index), logits.gather(2, index[:, None].expand(-1, logits.shape[1], -1))
    return _mean_of_nonzero(F.cross_entropy(logits, small, ignore_index=VOID, reduction="none"))


PART = spec(KMeansLayer)

ADE_STUFF = (0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77,
             79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145)
_COCO: dict[str, Any] = {"things": tuple(range(80))}
_ADE: dict[str, Any] = {"num_classes": 150, "things": tuple(k for k in range(150) if k not in ADE_STUFF),
                        "thresholds": Thresholds(0.4, 0.4)}
_CITYSCAPES: dict[str, Any] = {
    "num_classes": 19, "things": tuple(range(11, 19)), "img_size": (1025, 2049), "queries": 256, "semantic": "plain",
    "bases": (512, 256, 128, 64, 32), "depths": (1, 5, 1, 1, 1), "kinds": ("axial",) * 2 + ("bottleneck",) * 3,
    "thresholds": Thresholds(0.5, 0.3, 0.4, 0.9, 0.0), "samples": (4096, 0), "powers": (0.6, 1.0),
}
SMALL = spec(ConvNeXt, layers=(3, 3, 27, 3))
BASE, LARGE = SMALL.but(dims=(128, 256, 512, 1024)), SMALL.but(dims=(192, 384, 768, 1536))
PRESETS = {
    "nano": spec(KMaXDeepLab, img_size=32, num_classes=11, backbone="swin/nano", queries=16, dim=32, layers=(2,),
                 bases=(16, 16), depths=(1, 1), kinds=("axial", "bottleneck"), heads=4, hidden=128, embed=16,
                 mask_scale=1.0, samples=(128, 128)),
    "linear": spec(LinearSegmenter),
    "r50": spec(KMaXDeepLab, **_COCO),
    "convnext_tiny": spec(KMaXDeepLab, backbone=spec(ConvNeXt), **_COCO),
    "convnext_small": spec(KMaXDeepLab, backbone=SMALL, **_COCO),
    "convnext_base": spec(KMaXDeepLab, backbone=BASE, **_COCO),
    "convnext_large": spec(KMaXDeepLab, backbone=LARGE, **_COCO),
    "convnext_large_256": spec(KMaXDeepLab, backbone=LARGE, queries=256, **_COCO),
    "r50_cityscapes": spec(KMaXDeepLab, backbone=spec(ResNet, stem=True), **_CITYSCAPES),
    "convnext_large_cityscapes": spec(KMaXDeepLab, backbone=LARGE.but(stem=True), **_CITYSCAPES),
    "r50_ade20k": spec(KMaXDeepLab, **_ADE),
    "convnext_large_ade20k": spec(KMaXDeepLab, backbone=LARGE, **_ADE),
}


def _under(theirs: str, ours: str, names: dict[str, str], op: Op = SAME) -> list[Any]:
    """The same tensors, under other names: {theirs: ours}, each with all that lies below it."""
    return [rule(f"{theirs}{a}.*", f"{ours}{b}.*", op) for a, b in names.items()]


def _plainly(tensors: list[Tensor], options: Options) -> list[Tensor]:
    """Only of a plain semantic head."""
    if options.get("semantic") != "plain":
        raise Passed
    return tensors


_PREDICTOR = {
    "_pixel_space_head_conv0bnact": "depthwise", "_pixel_space_head_conv1bnact": "pointwise",
    "_pixel_space_head_last_convbn": "embed", "_transformer_mask_head": "kernel", "_transformer_class_head": "classify",
    "_pixel_space_mask_batch_norm": "mask_norm",
}
_LAYER = {
    "_query_conv1_bn_act": "query_in", "_pixel_conv1_bn_act": "pixel_in", "_pixel_v_conv_bn": "pixel_value",
    "_kmeans_query_batch_norm_retrieved_value": "update_norm", "_kmeans_query_conv3_bn": "update",
    "_query_qkv_conv_bn": "qkv", "_query_self_attention._batch_norm_similarity": "attention.score_norm",
    "_query_self_attention._batch_norm_retrieved_value": "attention.out_norm", "_query_conv3_bn": "proj",
    "_query_ffn_conv1_bn_act": "fc1", "_query_ffn_conv2_bn": "fc2",
} | {f"_predcitor.{a}": f"predictor.{b}" for a, b in _PREDICTOR.items()}
_AXIS = {"qkv_transform.conv": "qkv.conv", "_batch_norm_qkv": "qkv.norm", "_batch_norm_similarity": "score_norm",
         "_batch_norm_retrieved_output": "out_norm"}
_BLOCK = {f"_attention._{axis}_axis.{a}": f"mix.{axis}.{b}" for axis in ("height", "width") for a, b in _AXIS.items()} | {
    "_conv1_bn_act": "reduce", "_conv2_bn_act": "mix", "_conv3_bn": "expand", "_shortcut": "shortcut"}  # mix last
_SEMANTIC = {
    **{f"_aspp._aspp_conv{i}": f"aspp.branches.{i}" for i in range(4)}, "_aspp._aspp_pool": "aspp.pooled",
    "_aspp._proj_conv_bn_act": "aspp.proj", "conv_block_0": "last.0", "conv_block_1": "last.1", "final_conv": "classify",
    **{f"_low_level_projection_os{s}": f"finer.{i}" for i, s in enumerate((8, 4))},
    **{f"_low_level_fusion_os{s}_conv{j}_bn_act": f"joins.{i}.{j}" for i, s in enumerate((8, 4)) for j in (0, 1)},
}
_PLAIN = {"0": "last.0", "1": "last.1", "2": "classify"}
_PIXELS, _QUERIES, _TRACKED = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.", drop(
    "*.num_batches_tracked", "the norms keep a running mean of fixed momentum")
_STAGE, _OURS = f"{_PIXELS}_stages.{{s}}._blocks.{{i}}.", "pixel_decoder.stages.{s}.{i}."

KEYS = {
    "authors": keymap(
        _TRACKED,
        rule("backbone.stem.conv1.norm.*", "trunk.stem.norm.*"),
        rule("backbone.stem.conv1.*", "trunk.stem.conv.*"),
        *[rule(f"backbone.res{s + 2}.{{i}}.{c}.{a}*", f"trunk.stages.{s}.{{i}}.{c}.{b}*") for s in range(4)
          for c in ("conv1", "conv2", "conv3", "shortcut") for a, b in (("norm.", "norm."), ("", "conv."))],
        *_under("backbone.downsample_layers.", "trunk.", {
            f"{i}.{j}": f"{'norms' if (i == 0) == (j == 1) else 'convs'}.{i}" for i in range(4) for j in (0, 1)}),
        *_under("backbone.stages.{s}.{i}.", "trunk.stages.{s}.{i}.",
                {"dwconv": "conv", "norm": "norm", "pwconv1": "fc1", "pwconv2": "fc2"}),
        rule("backbone.stages.{s}.{i}.gamma", "trunk.stages.{s}.{i}.scale"),
        *[rule(f"{_STAGE}_attention._{axis}_axis._{t}_rpe._embeddings.weight", f"{_OURS}mix.{axis}.of_{t}")
          for axis in ("height", "width") for t in ("query", "key", "value")],
        *_under(_STAGE, _OURS, _BLOCK),
        *_under(_PIXELS, "pixel_decoder.", {
            "_in_norms.{i}": "norms.{i}", "_resized_fuses.{i}._conv_bn_low": "fuses.{i}.coarse",
            "_resized_fuses.{i}._conv_bn_high": "fuses.{i}.fine"}),
        *_under(f"{_QUERIES}_kmax_transformer_layers.{{i}}.", "layers.{i}.", _LAYER),
        rule(f"{_QUERIES}_cluster_centers.weight", "centers"),
        *_under(_QUERIES, "", {"_class_embedding_projection": "class_in", "_mask_embedding_projection": "mask_in"}),
        *_under(f"{_QUERIES}_predcitor.", "predictor.", _PREDICTOR),
        *_under(f"{_QUERIES}_auxiliary_semantic_predictor.", "auxiliary.", _PLAIN, Op(SAME.there, _plainly)),
        *_under(f"{_QUERIES}_auxiliary_semantic_predictor.", "auxiliary.", _SEMANTIC),
        without={"nano": "a Swin trunk, where theirs are ResNet and ConvNeXt", "linear": "a baseline without queries"},
        example=("r50", {"img_size": 65, "backbone": spec(ResNet, layers=(1, 1, 1, 1), width=8), "queries": 8, "dim": 32,
                         "bases": (32, 16, 8, 4), "depths": (1, 1, 1, 1), "layers": (1, 1, 1), "hidden": 64,
                         "embed": 16}),
    ),
    "layer": keymap(_TRACKED, *_under("", "", _LAYER), makes="part"),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the image size and the thresholds. things: those of COCO, ADE20K, Cityscapes, told by the number of
    classes. A trunk that is no ResNet or ConvNeXt of this file is taken for nano's, and its image size too. Where maps of
    equal widths follow one another, layers count to the first."""
    if "query_in.conv.weight" in state:
        return _layer_settings(state, "")
    if "centers" not in state:
        return _trunk_settings(state, 0) | {"num_classes": state["heads.0.weight"].shape[0]}
    own = _layer_settings(state, "layers.0.")
    stages = range(count(state, "pixel_decoder.norms.{i}.weight"))
    bases = tuple(state[f"pixel_decoder.stages.{s}.0.expand.conv.weight"].shape[0] // 4 for s in stages)
    layers, level = [0] * len(bases), 0
    for i in range(count(state, "layers.{i}.fc1.conv.weight")):
        while state[f"layers.{i}.pixel_in.conv.weight"].shape[1] != 4 * bases[level]:
            level += 1
        layers[level] += 1
    known = {133: _COCO, 150: _ADE, 19: _CITYSCAPES}.get(own["num_classes"], {"things": ()})
    return {k: own[k] for k in ("num_classes", "hidden", "embed", "heads")} | _trunk_settings(state, len(bases)) | {
        "dim": own["dim"], "queries": state["centers"].shape[1], "bases": bases, "things": known["things"],
        "layers": tuple(layers[:level + 1]),
        "depths": tuple(count(state, f"pixel_decoder.stages.{s}.{{i}}.expand.conv.weight") for s in stages),
        "kinds": tuple("axial" if f"pixel_decoder.stages.{s}.0.mix.height.of_key" in state else "bottleneck"
                       for s in stages),
        "semantic": "aspp" if "auxiliary.aspp.proj.conv.weight" in state else
                    "plain" if "auxiliary.classify.conv.weight" in state else None,
    }


def _trunk_settings(state: State, maps: int) -> dict[str, Any]:
    backbone: Spec[Trunk]
    if "trunk.stem.conv.weight" in state:
        first, last, backbone = state["trunk.stem.conv.weight"], "conv3.conv.weight", spec(ResNet)
        sizes: dict[str, Any] = {"width": first.shape[0]}
    elif "trunk.convs.0.weight" in state:
        first, last, backbone = state["trunk.convs.0.weight"], "fc2.weight", spec(ConvNeXt)
        sizes = {"dims": tuple(state[f"trunk.convs.{s}.weight"].shape[0] for s in range(4))}
    else:
        return {"backbone": Assumed("swin/nano", "as the presets have it"), "img_size": Assumed(32, "as theirs"),
                "in_chans": state["trunk.embedding.proj.weight"].shape[1]}
    sizes |= {"stem": maps > 4, "layers": tuple(count(state, f"trunk.stages.{s}.{{i}}.{last}") for s in range(4))}
    usual = signature(backbone.target).parameters
    return {"backbone": backbone.but(**{k: v for k, v in sizes.items() if usual[k].default != v}),
            "in_chans": first.shape[1]}


def _layer_settings(state: State, at: str) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(state[f"{at}{name}.weight"].shape)

    width, dim, _ = shape("query_in.conv")
    value = shape("pixel_value.conv")[0]
    return {
        "dim": dim, "width": width, "pixels": shape("pixel_in.conv")[1],
        "num_classes": shape("predictor.classify.conv")[0] - 1,
        "key": (shape("qkv.conv")[0] - value) // 2, "value": value, "hidden": shape("fc1.conv")[0],
        "embed": shape("predictor.embed.conv")[0], "heads": shape("attention.score_norm")[0],
    }
