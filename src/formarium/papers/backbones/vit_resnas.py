"""Searching for Efficient Multi-Stage Vision Transformers (Liao, Karaman, Sze, 2021), arXiv 2109.00642.

New: residual spatial reduction (section 3.1): between stages a strided convolution halves the grid, and a skip of pooled
tokens, padded with zero channels, keeps the residual stream whole. Every block has its own heads and hidden width. A
weight-sharing supernet is trained with multi-architectural sampling (section 3.2): each group of a batch runs through
another sub-network, made by masking channels, in one pass; layer norms take their statistics over the channels that are
kept. An evolutionary search under a limit of MACs finds the network.

Decisions: a network is the authors' tuple: (4, c) or (5, c, m): patches by convolutions (of m channels, else 24), (0, c):
linear patches; (1, (c, heads, head_dim), (c, hidden), exists): a block; (3, c, d): a reduction; (2, c, k): the classifier,
whose k `num_classes` replaces. A block that does not exist keeps its number. Their head on patches, of training with mixed
patches, is not here, nor is the distillation token, with which nothing was released. `search` draws what does not repeat
and never costs more than the limits; the share of the limit that a candidate must use is an option (theirs is 0.975). The
batch norms of the stem see the whole batch, not each group. Blocks of the supernet may be left out each on its own, as in
the authors' spaces, where no two such blocks are neighbours. Accuracies of supernets were not published.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Feature, FeatureInfo
from ...core.part import Part, Resample
from ...core.spec import spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, restart_linears
from ...parts.embed import PatchEmbed, pair, to_map, to_tokens
from ...parts.norm import BatchNorm, LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...parts.stem import Stem
from ...skeletons.backbone import Backbone, Stage
from ...weights.adapt import Change, refit_kernel
from ...weights.keys import State, defaults, drop, keymap, rule, told_ratio

CARD = Card(
    title="Searching for Efficient Multi-Stage Vision Transformers",
    authors="Yi-Lun Liao, Sertac Karaman, Vivienne Sze",
    venue="arXiv 2021",
    arxiv="2109.00642",
    year=2021,
    code="https://github.com/yilunliao/vit-search",
    licence="CC-BY-NC-4.0 (code); the weights without a statement",
    kind="backbone",
    domain="image",
    tags=("architecture search", "supernet", "pyramid"),
    claim="ViT-ResNAS-Tiny, -Small and -Medium reach 80.8, 81.7 and 82.4 % ImageNet top-1 at 1.8, 2.8 and 4.5 G MACs, "
          "better than DeiT and other networks of their computation.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "tiny": Published(params=40.79e6, macs=1.8e9, input=(3, 224, 224), results={"ImageNet top-1": 80.8},
                          note="41 M in the table, which counts 0.7 M of the head on patches"),
        "small": Published(params=63.70e6, macs=2.8e9, input=(3, 224, 224), results={"ImageNet top-1": 81.7},
                           note="65 M in the table, which counts 0.9 M of the head on patches"),
        "medium": Published(params=96.40e6, macs=4.5e9, input=(3, 224, 224), results={"ImageNet top-1": 82.4},
                            note="97 M in the table, which counts 0.9 M of the head on patches"),
        "reference_tiny": Published(macs=1.8e9, input=(3, 224, 224),
                                    note="ViT-Res-Tiny, not searched, the network that the search starts from"),
        "super_nano": Published(note="ours: a supernet with every kind of choice"),
        "super_tiny": Published(input=(3, 224, 224), note="the supernet of tiny"),
        "super_small": Published(input=(3, 224, 224), note="the supernet of small and medium"),
    },
    exceptions={"drop_path": "the stem's batch norm uses the batch's own statistics in training"},
)

EMBED, BLOCK, HEAD, REDUCTION, CONV_EMBED, WIDE_CONV_EMBED = range(6)
Network = tuple[tuple[Any, ...], ...]
Genome = tuple[Any, ...]


# search


class Found(NamedTuple):
    """A candidate, what it scored and what it costs."""

    genome: Genome
    score: float
    costs: tuple[float, ...]


def search(space: Sequence[Sequence[Any]], score: Callable[[Genome], float],
           limits: Sequence[tuple[Callable[[Genome], float], float]] = (), *, population: int = 500, generations: int = 20,
           parents: int = 75, children: int = 75, mutate: float = 0.3, at_least: float = 0.0, seed: int = 0,
           tries: int = 10_000) -> list[Found]:
    """Evolutionary search; all that were scored, the best first. A genome has one of the values of each gene of `space`.

    limits: (cost, limit) pairs, asked in order; a genome whose cost is above its limit is never scored, nor one that uses
    less than `at_least` of the first limit. population: drawn at random first. In each further generation `children` come
    from mutating one of the best `parents` (each gene with probability `mutate`), as many from crossing two of them.
    generations=1 is random search. tries: draws after which a generation stays smaller; if nothing at all fits, DoesNotFit.
    """
    if not space or not all(space):
        raise DoesNotFit("a search space has one gene or more, and every gene one value or more")
    if min(population, generations, parents, children) < 1 or not 0 < mutate <= 1:
        raise DoesNotFit("population, generations, parents and children are 1 or more and mutate in (0, 1], got "
                         f"{population}, {generations}, {parents}, {children} and {mutate}")
    rng, found, refused = random.Random(seed), {}, {}

    def drawn() -> Genome:
        return tuple(rng.choice(values) for values in space)

    def mutated() -> Genome:
        parent = rng.choice(best)
        return tuple(rng.choice(space[i]) if rng.random() <= mutate else own for i, own in enumerate(parent))

    def crossed() -> Genome:
        return tuple(map(rng.choice, zip(rng.choice(best), rng.choice(best), strict=True)))

    def add(make: Callable[[], Genome], wanted: int) -> None:
        left = wanted
        for _ in range(tries):
            if not left:
                return
            genome = make()
            if genome in found or genome in refused:
                continue
            costs: list[float] = []
            for cost, limit in limits:  # those after the first that is broken may be dear, as a latency
                costs.append(cost(genome))
                if costs[-1] > limit:
                    break
            else:
                if not limits or costs[0] >= at_least * limits[0][1]:
                    found[genome] = Found(genome, score(genome), tuple(costs))
                    left -= 1
                    continue
            refused[genome] = tuple(costs)

    add(drawn, population)
    if not found:
        cheapest = min(refused.values())
        raise DoesNotFit(f"none of {len(refused)} candidates is within the limits {tuple(x for _, x in limits)}; the "
                         f"cheapest costs {cheapest}: raise the limits, lower at_least, or widen the space")
    for _ in range(generations - 1):
        best = [f.genome for f in sorted(found.values(), key=lambda f: -f.score)[:parents]]
        add(mutated, children)
        add(crossed, children)
    return sorted(found.values(), key=lambda f: -f.score)


# networks as tuples


def check_network(network: Network) -> None:
    """Raises, naming the entry, unless the tuple is a network whose widths agree."""
    def need(holds: bool, i: int, why: str) -> None:
        if not holds:
            raise DoesNotFit(f"entry {i} of the network, {network[i]}: {why}")

    if len(network) < 3:
        raise DoesNotFit(f"a network is an embedding, blocks and a classifier, got {network}")
    need(network[0][0] in (EMBED, CONV_EMBED, WIDE_CONV_EMBED), 0, "an embedding (0, c), (4, c) or (5, c, m) comes first")
    need(len(network[0]) == (3 if network[0][0] == WIDE_CONV_EMBED else 2), 0, "expected (0, c), (4, c) or (5, c, m)")
    dim = network[0][1]
    for i, entry in enumerate(network[1:-1], 1):
        if entry[0] == BLOCK:
            need(len(entry) == 4 and len(entry[1]) == 3 and len(entry[2]) == 2, i,
                 "expected (1, (c, heads, head_dim), (c, hidden), exists)")
            need(entry[1][0] == entry[2][0] == dim, i, f"the width before it is {dim}")
            need(min(*entry[1], *entry[2]) >= 1, i, "widths are 1 or more")
        else:
            need(entry[0] == REDUCTION and len(entry) == 3, i, "expected a block (1, ...) or a reduction (3, c, d)")
            need(entry[1] == dim, i, f"the width before it is {dim}")
            need(entry[2] >= dim, i, "the skip is padded with channels, so the width must not fall")
            dim = entry[2]
    need(network[-1][0] == HEAD and network[-1][1] == dim, len(network) - 1, f"expected the classifier (2, {dim}, classes)")


def macs(network: Network, *, img_size: int | Sequence[int] = 224, patch: int = 14, in_chans: int = 3,
         num_classes: int | None = None) -> int:
    """Multiply-accumulates of a network for one image, as `count_macs` counts them, without building it."""
    check_network(network)
    (h, w), kind, dim = pair(img_size), network[0][0], network[0][1]
    grid = (h // patch, w // patch)
    if kind == EMBED:
        total = math.prod(grid) * dim * in_chans * patch**2
    else:
        mid = network[0][2] if kind == WIDE_CONV_EMBED else 24
        total = math.ceil(h / 2) * math.ceil(w / 2) * 9 * mid * (in_chans + 2 * mid)
        total += math.prod(grid) * dim * mid * (patch // 2)**2
    for entry in network[1:-1]:
        tokens = math.prod(grid) + 1
        if entry[0] == BLOCK and entry[3]:
            inner = entry[1][1] * entry[1][2]
            total += tokens * (4 * dim * inner + 2 * dim * entry[2][1]) + 2 * tokens**2 * inner
        elif entry[0] == REDUCTION:
            grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            total += (9 * math.prod(grid) + 1) * dim * entry[2]
            dim = entry[2]
    return total + dim * (network[-1][2] if num_classes is None else num_classes)


class Space(NamedTuple):
    """The sub-networks of a network, `largest`: for every entry what may stand there. A genome is one choice of each gene.

    choices: for an embedding or a reduction the widths; for a block (numbers of heads, hidden widths, may it be left out);
    for the classifier (). The largest come first and are the network's own.
    """

    largest: Network
    choices: tuple[tuple[Any, ...], ...]

    @property
    def genes(self) -> list[tuple[Any, ...]]:
        """Values of every gene: a width, or of a block its heads, its hidden width, whether it exists."""
        genes: list[tuple[Any, ...]] = []
        for entry, choice in zip(self.largest, self.choices, strict=True):
            if entry[0] == BLOCK:
                genes += [choice[0], choice[1], (1, 0) if choice[2] else (1,)]
            elif entry[0] != HEAD:
                genes.append(choice)
        return genes

    def network(self, genome: Genome) -> Network:
        """The network of a genome."""
        values, dim, out = iter(genome), 0, []
        for entry in self.largest:
            if entry[0] == BLOCK:
                heads, hidden, exists = next(values), next(values), next(values)
                out.append((BLOCK, (dim, heads, entry[1][2]), (dim, hidden), exists))
            elif entry[0] == HEAD:
                out.append((HEAD, dim, entry[2]))
            else:
                before, dim = dim, next(values)
                out.append((REDUCTION, before, dim) if entry[0] == REDUCTION else (entry[0], dim, *entry[2:]))
        return tuple(out)

    def check(self) -> None:
        check_network(self.largest)
        if len(self.choices) != len(self.largest):
            raise DoesNotFit(f"a space has choices for each of {len(self.largest)} entries, got {len(self.choices)}")
        own = [v for e in self.largest if e[0] != HEAD
               for v in ((e[1][1], e[2][1], 1) if e[0] == BLOCK else (e[2] if e[0] == REDUCTION else e[1],))]
        for i, (values, most) in enumerate(zip(self.genes, own, strict=True)):
            if not values or max(values) != most:
                raise DoesNotFit(f"the largest value of gene {i}, {values}, must be the network's own, {most}")


# parts that can be cut down by masks: True where a channel of a sample is kept; None: all are


class MaskedLayerNorm(LayerNorm):
    """Layer norm over the channels that are kept; the others give zero."""

    mask: Tensor | None = None  # (B, 1, C)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if self.mask is None:
            return super().forward(x)
        kept = self.mask.to(x.dtype)
        number = kept.sum(-1, keepdim=True)
        away = (x - (x * kept).sum(-1, keepdim=True) / number) * kept
        scaled = away * (away.square().sum(-1, keepdim=True) / number + self.eps).rsqrt()
        return (scaled * self.weight + self.bias) * kept


class MaskedAttention(Attention):
    """Attention of which some heads are left out."""

    mask: Tensor | None = None  # (B, heads, 1, 1)

    def __init__(self, dim: int, place: Place, *, heads: int = 4, inner: int | None = None) -> None:
        super().__init__(dim, place, heads=heads, inner=inner)

    def mix(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"],
            ctx: Ctx) -> Float[Tensor, "b h n d"]:
        out = super().mix(q, k, v, ctx)
        return out if self.mask is None else out * self.mask.to(out.dtype)


class MaskedMlp(Mlp):
    """An Mlp of which some hidden channels are left out."""

    mask: Tensor | None = None  # (B, 1, hidden)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden if self.mask is None else hidden * self.mask.to(hidden.dtype))


class MaskedPreNorm(PreNorm):
    """A pre-norm residual that adds nothing to the channels left out, and nothing at all where the block is."""

    mask: Tensor | None = None  # (B, 1, C)

    def __init__(self, dim: int, place: Place, inner: Part, *, drop_path: float = 0.0) -> None:
        super().__init__(dim, place, inner, norm=spec(MaskedLayerNorm), drop_path=drop_path)

    def branch(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        x = super().branch(x, ctx)
        return x if self.mask is None else x * self.mask.to(x.dtype)


class MaskedPatchEmbed(PatchEmbed):
    mask: Tensor | None = None  # (B, 1, C)

    def forward(self, x: Float[Tensor, "b c h w"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        x, ctx = super().forward(x, ctx)
        return (x if self.mask is None else x * self.mask.to(x.dtype)), ctx


class ConvStem(Stem):
    """Three 3x3 convolutions with batch norm and ReLU, the first of stride 2, whose output is added to the last's."""

    stride = 2
    adapts = ("in_chans",)

    def __init__(self, in_chans: int, *, width: int = 24) -> None:
        super().__init__()
        self.channels = width
        self.convs = nn.ModuleList(nn.Conv2d(width if i else in_chans, width, 3, 1 if i else 2, 1, bias=False)
                                   for i in range(3))
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(3))

    def refit(self, name: str, tensor: Tensor | None, was: "ConvStem") -> Change | None:
        if name != "convs.0.weight" or tensor is None:
            return None
        return refit_kernel(tensor, self.convs[0].weight.shape)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        first, second, third = ((conv, norm) for conv, norm in zip(self.convs, self.norms, strict=True))
        x = F.relu(first[1](first[0](x)))
        y = F.relu(second[1](second[0](x)))
        return x + F.relu(third[1](third[0](y)))


class ResidualReduction(Resample):
    """Residual spatial reduction: the grid is halved by a 3x3 convolution of stride 2, with new positions, beside a skip of
    pooled tokens whose new channels are zero. The class token goes through a linear layer, with the same skip.

    grid: of the tokens it is built for. skip: False is the paper's ablation.
    """

    step = (2, 2)
    mask: Tensor | None = None  # (B, 1, out_dim)

    def __init__(self, dim: int, out_dim: int, *, grid: tuple[int, int], skip: bool = True) -> None:
        super().__init__()
        half = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
        self.more, self.skip = out_dim - dim, skip
        self.norm = MaskedLayerNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.token = nn.Linear(dim, out_dim)
        self.position = LearnedPosition(out_dim, math.prod(half), grid=half)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b m d"], Ctx]:
        grid, before = ctx.need_grid(self, prefix=True), ctx.prefix
        y = self.norm(x)
        patches = self.conv(to_map(y, grid, before))
        ctx = replace(ctx, grid=(patches.shape[2], patches.shape[3]))
        y = torch.cat((self.token(y[:, :before]), self.position(to_tokens(patches), ctx)), dim=1)
        if self.skip:
            pooled = to_tokens(F.avg_pool2d(to_map(x, grid, before), 2, ceil_mode=True))
            y = y + F.pad(torch.cat((x[:, :before], pooled), dim=1), (0, self.more))
        return (y if self.mask is None else y * self.mask.to(y.dtype)), ctx


class ViTResNAS(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    network: the tuple described above; every entry but the first and the last is a stage of the model. patch: even,
    unless patches are linear. skip: see `ResidualReduction`. init_std: of the linear layers, the authors' 0.02; None:
    Xavier, which small widths need.
    """

    def __init__(self, *, network: Network, img_size: int | Sequence[int] = 224, patch: int = 14, in_chans: int = 3,
                 num_classes: int = 1000, skip: bool = True, drop_path: float = 0.0, init_std: float | None = 0.02) -> None:
        check_network(network)
        kind = network[0][0]
        if kind != EMBED and patch % 2:
            raise DoesNotFit(f"the convolutions halve the image, so patches have an even side, not {patch}")
        stem = None if kind == EMBED else spec(ConvStem, width=network[0][2] if kind == WIDE_CONV_EMBED else 24)
        embed = MaskedPatchEmbed(in_chans, network[0][1], patch=patch if kind == EMBED else patch // 2, img_size=img_size,
                                 class_token=True, position=spec(LearnedPosition), stem=stem)
        size, stages = pair(img_size), []
        grid, residual = (size[0] // patch, size[1] // patch), spec(MaskedPreNorm, drop_path=drop_path)
        for entry in network[1:-1]:
            if entry[0] == REDUCTION:
                stages.append(Stage(entry[2], 0, {}, residual, spec(ResidualReduction, grid=grid, skip=skip)))
                grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
                continue
            _, (dim, heads, width), (_, hidden), exists = entry
            block = {"mixer": spec(MaskedAttention, heads=heads, inner=heads * width),
                     "channel": spec(MaskedMlp, ratio=told_ratio(hidden, dim))}
            stages.append(Stage(dim, int(bool(exists)), block, residual))
        super().__init__(embed, stages, img_size=img_size, norm=spec(MaskedLayerNorm), num_classes=num_classes,
                         pool="token")
        self.network = network
        nn.init.trunc_normal_(embed.cls, std=0.02)  # type: ignore[arg-type]
        restart_linears(self, init_std)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        stride, dim, found = self.embedding.step[0], self.network[0][1], []  # type: ignore[index]
        for entry in self.network[1:]:
            if entry[0] in (REDUCTION, HEAD):
                found.append(FeatureInfo(dim, stride))
                stride, dim = 2 * stride, entry[2]
        return found

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        """The maps before each reduction, and the last."""
        x, ctx = self.embed(batch)
        maps = []
        for stage in self.stages:
            if stage.resample is not None:
                maps.append(to_map(x, ctx.need_grid(self, prefix=True), ctx.prefix))
            x, ctx = stage(x, ctx)
        maps.append(to_map(x, ctx.need_grid(self, prefix=True), ctx.prefix))
        return [Feature(m, info.stride) for m, info in zip(maps, self.feature_info, strict=True)]


class Supernet(ViTResNAS):
    """A network that is trained with many of its sub-networks at once: `choices` as in `Space`.

    In training every `examples` samples of a batch run through a sub-network drawn from torch's random numbers; None: all
    through one. In evaluation the whole network answers. `admit` says which share of each gene's values, the largest first,
    is drawn from. `extract` gives a sub-network with its weights.
    """

    def __init__(self, *, network: Network, choices: tuple[tuple[Any, ...], ...], examples: int | None = 64,
                 img_size: int | Sequence[int] = 224, patch: int = 14, in_chans: int = 3, num_classes: int = 1000,
                 skip: bool = True, drop_path: float = 0.0, init_std: float | None = 0.02) -> None:
        super().__init__(network=network, img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes,
                         skip=skip, drop_path=drop_path, init_std=init_std)
        self.space = Space(network, choices)
        self.space.check()
        self.examples, self.admitted = examples, 1.0
        self.options = {"img_size": img_size, "patch": patch, "in_chans": in_chans, "skip": skip, "drop_path": drop_path,
                        "init_std": init_std}

    def admit(self, share: float) -> None:
        """From now on the largest 1 + floor(share * (n - 1)) of n values are drawn; the authors raise it over 15 epochs."""
        if not 0 <= share <= 1:
            raise DoesNotFit(f"a share of the values is in [0, 1], got {share}")
        self.admitted = share

    def sample(self) -> Network:
        """A sub-network from torch's random numbers."""
        genome = []
        for gene in self.space.genes:
            values = sorted(gene, reverse=True)[:1 + int(self.admitted * (len(gene) - 1))]
            genome.append(values[int(torch.randint(len(values), ()))])
        return self.space.network(tuple(genome))

    def forward(self, batch: Float[Tensor, "b c h w"], networks: Sequence[Network] | None = None) -> Float[Tensor, "b k"]:
        """networks: of equal groups of the batch, in order; else drawn in training, the whole network in evaluation."""
        if networks is None and self.training:
            groups = 1 if self.examples is None else len(batch) // self.examples
            if self.examples is not None and (groups < 1 or len(batch) % self.examples):
                raise DoesNotFit(f"a batch has groups of {self.examples} samples (examples=), got {len(batch)}")
            networks = [self.sample() for _ in range(groups)]
        self._mask(networks, batch)
        return super().forward(batch)

    def _mask(self, networks: Sequence[Network] | None, batch: Tensor) -> None:
        """Writes the masks of the networks into the parts, where a second pass under gradient checkpointing finds them."""
        if networks is not None and (not networks or len(batch) % len(networks)):
            raise DoesNotFit(f"{len(batch)} samples do not fall into {len(networks)} equal groups")

        def keep(numbers: list[int], most: int) -> Tensor | None:
            if networks is None:
                return None
            each = torch.tensor(numbers, device=batch.device).repeat_interleave(len(batch) // len(networks))
            return (torch.arange(most, device=batch.device) < each[:, None])[:, None]

        def entries(i: int) -> list[Any]:
            return [] if networks is None else [n[i] for n in networks]

        self.embedding.mask = width = keep([e[1] for e in entries(0)], self.network[0][1])  # type: ignore[assignment]
        for i, (entry, stage) in enumerate(zip(self.network[1:-1], self.stages, strict=True), 1):
            if entry[0] == REDUCTION:
                stage.resample.norm.mask = width  # type: ignore[union-attr]
                stage.resample.mask = width = keep([e[2] for e in entries(i)], entry[2])  # type: ignore[union-attr]
                continue
            for layer in stage.layers:  # type: ignore[union-attr]
                mixer, channel = layer["mixer"], layer["channel"]
                alive = keep([entry[1][0] * bool(e[3]) for e in entries(i)], entry[1][0])
                heads = keep([e[1][1] for e in entries(i)], entry[1][1])
                mixer.norm.mask = channel.norm.mask = width
                mixer.mask = channel.mask = None if width is None else width & alive
                mixer.inner.mask = None if heads is None else heads.transpose(1, 2)[..., None]
                channel.inner.mask = keep([e[2][1] for e in entries(i)], entry[2][1])
        self.norm.mask = width  # type: ignore[assignment]

    def extract(self, network: Network) -> ViTResNAS:
        """The sub-network as a model of its own, with copies of the supernet's weights."""
        model = ViTResNAS(network=network, num_classes=self.num_classes, **self.options)
        own = self.state_dict()
        with torch.no_grad():
            for name, t in model.state_dict().items():
                whole = own[name]
                if ".qkv." in name:  # the first heads of each of q, k, v
                    whole = torch.cat([part[:len(t) // 3] for part in whole.chunk(3)])
                t.copy_(whole[tuple(slice(n) for n in t.shape)])
        return model.train(self.training).to(next(self.parameters()).device)

    @torch.no_grad()
    def rewire(self) -> None:
        """Sorts heads and hidden channels by the sum of their weights' sizes, the largest first; the function stays."""
        for layer in (layer for stage in self.stages for layer in stage.layers):  # type: ignore[union-attr]
            mixer, channel = layer["mixer"].inner, layer["channel"].inner
            heads = mixer.heads
            qkv, bias = mixer.qkv.weight.unflatten(0, (3, heads, -1)), mixer.qkv.bias.unflatten(0, (3, heads, -1))
            proj = mixer.proj.weight.unflatten(1, (heads, -1))
            order = (qkv.abs().sum((0, 2, 3)) + bias.abs().sum((0, 2)) + proj.abs().sum((0, 2))).argsort(descending=True)
            mixer.qkv.weight.copy_(qkv[:, order].flatten(0, 2))
            mixer.qkv.bias.copy_(bias[:, order].flatten())
            mixer.proj.weight.copy_(proj[:, order].flatten(1))
            size = channel.fc1.weight.abs().sum(1) + channel.fc1.bias.abs() + channel.fc2.weight.abs().sum(0)
            order = size.argsort(descending=True)
            channel.fc1.weight.copy_(channel.fc1.weight[order])
            channel.fc1.bias.copy_(channel.fc1.bias[order])
            channel.fc2.weight.copy_(channel.fc2.weight[:, order])


def _network(embed: tuple[int, ...], *stages: tuple[int, int, Sequence[tuple[int, int]]], classes: int = 1000) -> Network:
    """stages: (width, width of a head, (heads, hidden width) of each block)."""
    out: list[tuple[Any, ...]] = [embed]
    for i, (dim, width, blocks) in enumerate(stages):
        if i:
            out.append((REDUCTION, stages[i - 1][0], dim))
        out += [(BLOCK, (dim, heads, width), (dim, hidden), 1) for heads, hidden in blocks]
    return (*out, (HEAD, stages[-1][0], classes))


def _choices(*stages: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]) -> Network:
    """stages: (widths, heads, hidden widths, which blocks may be left out)."""
    out: list[tuple[Any, ...]] = []
    for widths, heads, hidden, skips in stages:
        out += [widths, *((heads, hidden, skip) for skip in skips)]
    return (*out, ())


TINY = _network((4, 176), (176, 32, [(3, 704), (3, 576), (3, 640), (4, 576), (4, 704)]),
                (352, 48, [(10, 1408), (8, 1408), (8, 1280), (8, 1408), (10, 1280), (10, 1024)]),
                (704, 64, [(10, 2560), (10, 1792), (10, 2816), (8, 2816), (8, 2560)]))
SMALL = _network((4, 220), (220, 32, [(5, 880), (5, 880), (7, 800), (5, 720), (5, 720), (5, 720)]),
                 (440, 48, [(10, 1760), (10, 1440), (10, 1920), (10, 1600), (12, 1600), (12, 1440)]),
                 (880, 64, [(16, 3200), (12, 3200), (16, 2880), (12, 2240), (14, 2560)]))
MEDIUM = _network((4, 240), (240, 32, [(7, 960), (6, 960), (7, 800), (8, 960), (7, 880), (8, 880), (6, 800)]),
                  (640, 48, [(10, 1120), (14, 1760), (14, 1920), (16, 1760), (14, 1440), (16, 1760), (16, 1920)]),
                  (880, 64, [(16, 3200), (10, 3840), (16, 3840), (12, 3200), (16, 3520), (14, 3520)]))
REFERENCE = _network((4, 192), (192, 64, [(3, 768)] * 4), (384, 64, [(6, 1536)] * 4), (768, 64, [(12, 3072)] * 4))
TURNS = (False, True) * 3
SUPER_TINY = _network((4, 256), (256, 32, [(6, 768)] * 6), (512, 48, [(12, 1536)] * 6), (1024, 64, [(12, 3072)] * 6))
SUPER_SMALL = _network((4, 320), (320, 32, [(8, 960)] * 7), (640, 48, [(16, 1920)] * 7), (1280, 64, [(16, 3840)] * 7))
NANO = {"img_size": 28, "patch": 2, "init_std": None}
PRESETS = {
    "nano": spec(ViTResNAS, **NANO,
                 network=_network((5, 32, 8), (32, 8, [(3, 96), (4, 128)]), (64, 16, [(4, 192), (3, 256)]))),
    "tiny": spec(ViTResNAS, network=TINY),
    "small": spec(ViTResNAS, network=SMALL),
    "medium": spec(ViTResNAS, network=MEDIUM),
    "reference_tiny": spec(ViTResNAS, network=REFERENCE),
    "super_nano": spec(Supernet, network=_network((5, 32, 8), (32, 8, [(4, 128)] * 2), (64, 16, [(4, 256)] * 2)),
                       choices=_choices(((32, 24, 16), (4, 3, 2), (128, 96, 64), (False, True)),
                                        ((64, 48, 32), (4, 3, 2), (256, 192, 128), (False, True))), examples=4, **NANO),
    "super_tiny": spec(Supernet, network=SUPER_TINY, choices=_choices(
        ((256, 224, 192, 176, 160), (6, 5, 4, 3), tuple(range(768, 383, -64)), TURNS),
        ((512, 448, 384, 352, 320), (12, 10, 8, 6), tuple(range(1536, 767, -128)), TURNS),
        ((1024, 896, 768, 704, 640), (12, 10, 8, 6), tuple(range(3072, 1535, -256)), TURNS))),
    "super_small": spec(Supernet, network=SUPER_SMALL, choices=_choices(
        ((320, 280, 240, 220, 200), (8, 7, 6, 5), tuple(range(960, 479, -80)), (*TURNS, False)),
        ((640, 560, 480, 440, 400), (16, 14, 12, 10), tuple(range(1920, 959, -160)), (*TURNS, False)),
        ((1280, 1120, 960, 880, 800), (16, 14, 12, 10), tuple(range(3840, 1919, -320)), (*TURNS, False)))),
}

OURS = "stages.{i}.layers.0"
KEYS = {"authors": keymap(
    rule("tokens", "embedding.cls"),
    rule("pos_embed", "embedding.position.table"),
    *[rule(f"patch_embed.conv{i + 1}.conv.*", f"embedding.stem.convs.{i}.*") for i in range(3)],
    drop("patch_embed.conv{i}.bn.num_batches_tracked", "a count of training steps"),
    *[rule(f"patch_embed.conv{i + 1}.bn.*", f"embedding.stem.norms.{i}.*") for i in range(3)],
    rule("patch_embed.conv_proj.*", "embedding.proj.*"),
    rule("patch_embed.proj.*", "embedding.proj.*"),  # linear patches
    rule("blocks.{i}.norm1.*", f"{OURS}.mixer.norm.*"),
    rule("blocks.{i}.attn.*", f"{OURS}.mixer.inner.*"),
    rule("blocks.{i}.norm2.*", f"{OURS}.channel.norm.*"),
    rule("blocks.{i}.mlp.*", f"{OURS}.channel.inner.*"),
    rule("blocks.{i}.norm.*", "stages.{i}.resample.norm.*"),
    rule("blocks.{i}.patch_reduce.*", "stages.{i}.resample.conv.*"),
    rule("blocks.{i}.token_transform.*", "stages.{i}.resample.token.*"),
    rule("blocks.{i}.pos_embed", "stages.{i}.resample.position.table"),
    rule("norm.*", "norm.*"),
    rule("cls_head.*", "head.*"),
    drop("patch_head.*", "the head on patches, which training with mixed patches alone uses"),
)}


def _told(state: State) -> Iterator[tuple[Any, ...]]:
    """The entries of the network as the shapes tell them, (1, (c, all heads' width), (c, hidden), exists) for a block."""
    proj, stem = state["embedding.proj.weight"], state.get("embedding.stem.convs.0.weight")
    dim = len(proj)
    yield (EMBED, dim) if stem is None else (CONV_EMBED, dim) if len(stem) == 24 else (WIDE_CONV_EMBED, dim, len(stem))
    numbers = {int(k.split(".")[1]) for k in state if k.startswith("stages.")}
    for i in range(max(numbers) + 1):
        qkv, conv = (state.get(f"stages.{i}.{k}.weight") for k in ("layers.0.mixer.inner.qkv", "resample.conv"))
        if conv is not None:
            yield (REDUCTION, dim, len(conv))
            dim = len(conv)
        elif qkv is not None:
            yield (BLOCK, (dim, len(qkv) // 3), (dim, len(state[f"stages.{i}.layers.0.channel.inner.fc1.weight"])), 1)
        else:
            yield (BLOCK, (dim, 1), (dim, 1), 0)
    yield (HEAD, dim, len(state["head.weight"]) if "head.weight" in state else 0)


def settings(state: State, layout: str) -> dict[str, Any]:
    """Everything but the heads: those of a published network of these shapes, else 32, 48 and 64 channels a head in the
    stages, where they divide the width, or 64, or one head. Square images."""
    told = list(_told(state))

    def shape(network: Network) -> list[Any]:
        widths = [(BLOCK, (e[1][0], e[1][1] * e[1][2]), e[2], e[3]) if e[0] == BLOCK else e for e in network[:-1]]
        return [(CONV_EMBED, e[1]) if e[0] == WIDE_CONV_EMBED and e[2] == 24 else e for e in widths]

    known = [defaults(p)["network"] for p in PRESETS.values()]
    found = next((n for n in known if shape(n) == told[:-1]), None)
    if found is None:
        stage, out = 0, []
        for e in told:
            stage += e[0] == REDUCTION
            if e[0] == BLOCK:
                width = next((w for w in ((32, 48, 64)[min(stage, 2)], 64) if e[1][1] % w == 0), e[1][1])
                e = (BLOCK, (e[1][0], e[1][1] // width, width), e[2], e[3])
            out.append(e)
        found = tuple(out)
    stem = state.get("embedding.stem.convs.0.weight")
    kernel = state["embedding.proj.weight"]
    patch = kernel.shape[2] * (1 if stem is None else 2)
    return {"network": found, "patch": patch, "in_chans": (kernel if stem is None else stem).shape[1],
            "num_classes": told[-1][2],
            "img_size": round((state["embedding.position.table"].shape[1] - 1) ** 0.5) * patch}
