"""Stitched ViTs are Flexible Vision Backbones (Pan, Liu, He, Cai, Zhuang, arXiv 2307.00154, 2023), SN-Netv2.

New: two trained plain ViTs, a small and a large one, and linear layers between their hidden tokens make one network of many
routes, chosen at run time by a number. Against SN-Net (arXiv 2302.06586) stitches go both ways: small to large, large to
small, and there and back (section 3.2). A stitch starts at the least-squares map between the tokens of both anchors, which
is frozen, and learns an update of low rank, W x + b + B A x / r (section 3.3). Training draws one route a step: first a
group of routes of near cost, then one of the group, so that all costs are trained alike (section 3.3).

Decisions, from the authors' code: routes are numbered as there (small, large, small to large, large to small, there and
back from the large anchor, then from the small one); the large anchor is left after every second layer, unless both are
equally deep; the route that leaves the small anchor after its last layer can be chosen, but is not drawn in training (their
code says "not 11", the last of 12); a group ends where a cost is more than `gap` above the group's first; their "FLOPs" are
multiply-accumulates. Embedding and positions are the first anchor's, norm and head the last one's. Ours: costs are counted
from the model instead of read from a file, and with the low-rank update apart, as it is computed here. Anchors may be any
ViTs of the toolkit on the same tokens, the larger as deep as the small one or at least twice as deep: in between, their
numbering of stitches has gaps.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.build import create_model, preset
from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit
from ...core.macs import count_macs
from ...core.model import Feature, FeatureInfo
from ...core.spec import Spec, from_json, spec
from ...parts.embed import pair, to_map
from ...skeletons.backbone import Backbone
from ...weights.adapt import Change
from ...weights.keys import Assumed, State, as_preset, defaults, keymap, rule
from . import vit
from .vit import ViT

CARD = Card(
    title="Stitched ViTs are Flexible Vision Backbones",
    authors="Zizheng Pan, Jing Liu, Haoyu He, Jianfei Cai, Bohan Zhuang",
    venue="arXiv 2023",
    arxiv="2307.00154",
    year=2023,
    code="https://github.com/ziplab/SN-Netv2",
    licence="Apache-2.0 (code), released weights without a licence of their own",
    kind="backbone",
    domain="image",
    tags=("plain", "stitching", "elastic", "adaptation"),
    claim="One network stitched from two ViTs offers about ten times more sub-networks than SN-Net, with better accuracy "
          "at equal cost, for a fraction of the cost of training each.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "s_l": Published(note="DeiT III S and L; accuracies are published as curves, as of all"),
        "s_b": Published(note="DeiT III S and B"),
        "b_l": Published(note="DeiT III B and L"),
    },
    exceptions={
        "every_parameter_learns": "a training step takes one route, and the stitches' least-squares maps are frozen",
        "weight_decay": "the frozen maps are no parameters to optimize",
        "drop_path": "training draws its route, so it answers otherwise than the route that is chosen, without any drop",
        "gradient_checkpointing": "the route that training draws need not begin in the layer that is watched",
    },
)


class Route(NamedTuple):
    """Layers first to end - 1 of each anchor in turn, with the stitch behind each leg but the last.

    anchors: 0 the small one, 1 the large one; spans: (first, end) of each leg; stitches: number of each stitch among those
    that leave its anchor.
    """

    anchors: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    stitches: tuple[int, ...] = ()


@cache
def enumerate_routes(small: int, large: int) -> tuple[Route, ...]:
    """All routes of two anchors of these depths, in the order of the authors' numbers."""
    times = large // small
    up = [Route((0, 1), ((0, i + 1), ((i + 1) * times, large)), (i,)) for i in range(small)]
    leaves = [i for i in range(large - 1) if large == small or i % 2]
    down = [Route((1, 0), ((0, i + 1), (i * small // large + 1, small)), (i // times,)) for i in leaves]

    def join(a: Route, b: Route) -> Route:
        return Route((*a.anchors, b.anchors[1]), (a.spans[0], (a.spans[1][0], b.spans[0][1]), b.spans[1]),
                     a.stitches + b.stitches)

    back_up = [join(d, u) for d in down for u in up[:-1] if u.spans[0][1] > d.spans[1][0]]
    back_down = [join(u, d) for u in up for d in down if d.spans[0][1] > u.spans[1][0]]
    return (Route((0,), ((0, small),)), Route((1,), ((0, large),)), *up, *down, *back_up, *back_down)


class Stitch(nn.Module):
    """W x + b + B A x / r: W is frozen once it is found, B starts at zero. rank: r; 0: W and b alone, trained."""

    def __init__(self, dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        linear = nn.Linear(dim, out_dim)
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(rank == 0)
        self.rank = rank
        self.lora_a = nn.Parameter(nn.Linear(dim, rank, bias=False).weight.detach()) if rank else None
        self.lora_b = nn.Parameter(torch.zeros(out_dim, rank)) if rank else None

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        out = F.linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return out
        return out + F.linear(F.linear(x, self.lora_a), self.lora_b) / self.rank

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b n d"]) -> None:
        """The W and b nearest to y from x, by least squares."""
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        solved = torch.linalg.pinv(torch.cat((x, x.new_ones(len(x), 1)), dim=1)) @ y
        self.weight.copy_(solved[:-1].t())
        self.bias.copy_(solved[-1])


def _through(anchor: ViT, x: Float[Tensor, "b n c"], ctx: Ctx, first: int, end: int) -> Float[Tensor, "b n c"]:
    """Through layers `first` to `end - 1`."""
    return anchor.stages[0].span(x, ctx, (), range(first, end))[0]


class _Piece(nn.Module):
    """A part of a model, called by `run(module, x)`, to count what it costs."""

    def __init__(self, module: nn.Module, run: Any) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)


class SNNetV2(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes), along `self.route`; in training along one that is drawn.

    anchors: a small and a large ViT; heads: theirs, unless they have their own; drop_path: of both, or of each.
    rank: of the stitches' update. gap: multiply-accumulates between the cheapest and the dearest route of a group.
    route: number of the route that is taken outside of training; to be set at any time.
    """

    def __init__(self, *, anchors: tuple[Spec[ViT], Spec[ViT]], img_size: int | Sequence[int] = 224, in_chans: int = 3,
                 num_classes: int = 1000, heads: tuple[int, int] | None = None,
                 drop_path: float | tuple[float, float] = 0.0, rank: int = 64, gap: float = 1e9, route: int = 1) -> None:
        super(Backbone, self).__init__()
        if len(anchors) != 2 or not all(isinstance(a, Spec) and isinstance(a.target, type) and issubclass(a.target, ViT)
                                        for a in anchors):
            raise DoesNotFit(f"anchors are Specs of two ViTs, a small and a large one, got {anchors}")
        if rank < 0 or gap < 0:
            raise DoesNotFit(f"rank and gap are 0 or more, got {rank} and {gap:g}")
        self.img_size, self.gap = pair(img_size), gap
        drops = (drop_path, drop_path) if isinstance(drop_path, int | float) else drop_path
        doors, made = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}, []
        for i, anchor in enumerate(anchors):
            own = {} if heads is None else {"heads": heads[i]}
            made.append(anchor.but(drop_path=drops[i], **doors, **own)())
        self.anchors = nn.ModuleList(made)
        small, large = self.depths
        if not small or (large != small and large < 2 * small):
            raise DoesNotFit(f"the second anchor must be as deep as the first or at least twice as deep, got {small} and "
                             f"{large} layers")
        places = [(a.embedding.step, *(0 if t is None else t.shape[1] for t in (a.embedding.cls, a.embedding.registers)))
                  for a in made]
        if places[0] != places[1]:
            raise DoesNotFit("anchors must have the same tokens; their patches, class tokens and registers are "
                             f"{places[0]} and {places[1]}")
        dims = [a.num_features for a in made]
        self.routes = enumerate_routes(small, large)
        leaving = [sum(r.anchors == way for r in self.routes) for way in ((0, 1), (1, 0))]
        self.stitches = nn.ModuleList(nn.ModuleList(Stitch(dims[i], dims[1 - i], rank) for _ in range(leaving[i]))
                                      for i in (0, 1))
        self.route = route
        self.num_classes = num_classes
        self._groups: list[list[int]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "route" and not 0 <= value < len(self.routes):
            raise DoesNotFit(f"routes have the numbers 0 to {len(self.routes) - 1}, got {value}")
        super().__setattr__(name, value)

    @property
    def depths(self) -> tuple[int, int]:
        small, large = (a.stages[0].depth for a in self.anchors)
        return small, large

    @property
    def _taken(self) -> Route:
        return self.routes[self.route]

    @property
    def _last(self) -> ViT:
        return self.anchors[self._taken.anchors[-1]]

    stages = property(lambda self: [a.stages[0] for a in self.anchors])  # of both anchors, whatever the route
    embedding = property(lambda self: self.anchors[self._taken.anchors[0]].embedding)
    norm = property(lambda self: self._last.norm)
    head = property(lambda self: self._last.head)
    pool = property(lambda self: self._last.pool)
    pool_first = property(lambda self: self._last.pool_first)
    num_features = property(lambda self: self._last.num_features)

    def reset_classifier(self, num_classes: int) -> None:
        for anchor in self.anchors:
            anchor.reset_classifier(num_classes)
        self.num_classes = num_classes
        self._groups = None

    def refit(self, name: str, tensor: Tensor | None, was: Backbone) -> Change | None:
        return None  # the anchors do

    def _legs(self, route: Route) -> list[tuple[ViT, tuple[int, int], nn.Module]]:
        """Anchor, layers and what is behind them, of each leg."""
        stitches = [self.stitches[a][s] for a, s in zip(route.anchors, route.stitches, strict=False)]
        return [(self.anchors[a], span, stitch) for a, span, stitch in
                zip(route.anchors, route.spans, [*stitches, nn.Identity()], strict=True)]

    def along(self, x: Float[Tensor, "b n c"], ctx: Ctx, route: Route) -> Float[Tensor, "b n d"]:
        """Embedded tokens through the layers and stitches of a route, before the last norm."""
        for anchor, span, stitch in self._legs(route):
            x = stitch(_through(anchor, x, ctx, *span))
        return x

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n d"], Ctx]:
        x = self.along(x, ctx, self._taken)
        return (x if self.pool_first else self.norm(x)), ctx

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        route = self.routes[self.draw()] if self.training else self._taken
        last: ViT = self.anchors[route.anchors[-1]]
        x, ctx = self.anchors[route.anchors[0]].embedding(batch, Ctx())
        x = self.along(x, ctx, route)
        x = last.pooled(x if last.pool_first else last.norm(x), ctx)
        return last.head(last.norm(x) if last.pool_first else x)

    def pooled(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        return self._last.pooled(x, ctx)

    def _tapped(self) -> list[tuple[int, int]]:
        """(leg, layer) of the four layers, evenly spaced along the route, whose maps are given."""
        layers = [(leg, i) for leg, span in enumerate(self._taken.spans) for i in range(*span)]
        return [layers[i] for i in sorted({max(0, round(len(layers) * k / 4) - 1) for k in (1, 2, 3, 4)})]

    @property
    def feature_info(self) -> list[FeatureInfo]:
        legs, tapped = self._legs(self._taken), self._tapped()
        dims = [legs[leg][0].num_features for leg, _ in tapped[:-1]] + [self.num_features]
        return [FeatureInfo(dim, self.embedding.step[0]) for dim in dims]

    def features(self, batch: Float[Tensor, "b c h w"]) -> list[Feature]:
        """Four maps along the route; of as many channels as the anchor has, in which they are."""
        (x, ctx), maps, tapped = self.embed(batch), [], self._tapped()
        for leg, (anchor, (first, end), stitch) in enumerate(self._legs(self._taken)):
            for at in [i + 1 for n, i in tapped[:-1] if n == leg]:
                x, first = _through(anchor, x, ctx, first, at), at
                maps.append(x)
            x = stitch(_through(anchor, x, ctx, first, end))
        return [Feature(to_map(m, ctx.need_grid(self, prefix=True), ctx.prefix), info.stride)
                for m, info in zip([*maps, x], self.feature_info, strict=True)]

    @torch.no_grad()
    def init_stitches(self, images: Float[Tensor, "b c h w"]) -> None:
        """Every stitch as the least-squares map between the anchors' tokens of these images, where it joins them."""
        tokens = []
        for anchor in self.anchors:
            x, ctx = anchor.embedding(images, Ctx())
            after = []
            for i in range(anchor.stages[0].depth):
                x = _through(anchor, x, ctx, i, i + 1)
                after.append(x)
            tokens.append(after)
        for route in (r for r in self.routes if len(r.anchors) == 2):
            (a, b), ((_, end), (first, _)), (number,) = route
            self.stitches[a][number].fit(tokens[a][end - 1], tokens[b][first - 1])

    @property
    def drawn(self) -> list[int]:
        """Numbers of the routes that training draws from."""
        last = Route((0, 1), ((0, self.depths[0]), (self.depths[1] // self.depths[0] * self.depths[0], self.depths[1])),
                     (self.depths[0] - 1,))
        return [i for i, r in enumerate(self.routes) if r != last]

    def costs(self) -> list[int]:
        """Multiply-accumulates of each route, for one image."""
        image = torch.zeros(1, self.embedding.in_chans, *self.img_size, device="meta")  # no random numbers
        embeds, layers, heads, joins = [], [], [], []
        for anchor, stitches in zip(self.anchors, self.stitches, strict=True):
            embed = copy.deepcopy(anchor.embedding).to("meta")
            x, ctx = embed(image, Ctx())
            embeds.append(count_macs(_Piece(embed, lambda m, x: m(x, Ctx())[0]), image))
            layers.append([count_macs(_Piece(anchor, lambda m, x, i=i, ctx=ctx: _through(m, x, ctx, i, i + 1)), x)
                           for i in range(anchor.stages[0].depth)])
            heads.append(anchor.num_features * anchor.num_classes)
            joins.append(count_macs(stitches[0], x) if len(stitches) else 0)
        return [embeds[r.anchors[0]] + sum(sum(layers[a][slice(*s)]) for a, s in zip(r.anchors, r.spans, strict=True))
                + sum(joins[a] for a in r.anchors[:-1]) + heads[r.anchors[-1]] for r in self.routes]

    def groups(self) -> list[list[int]]:
        """The routes that training draws from, by cost, cut where one costs more than `gap` over the first of its group."""
        costs, groups, first = self.costs(), [], 0.0
        for i in sorted(self.drawn, key=costs.__getitem__):
            if not groups or costs[i] - first > self.gap:
                groups.append([])
                first = costs[i]
            groups[-1].append(i)
        return groups

    def draw(self) -> int:
        """The number of a route: first a group, then one of it, each alike."""
        if self._groups is None:
            self._groups = self.groups()
        group = self._groups[int(torch.randint(len(self._groups), ()))]
        return group[int(torch.randint(len(group), ()))]


def stitch(small: ViT, large: ViT, *, rank: int = 64, gap: float = 1e9) -> SNNetV2:
    """Two ViTs made by name, trained or not, as one network with their weights; `init_stitches` is the next step."""
    told = []
    for model in (small, large):
        recipe = getattr(model, "recipe", None)
        if not isinstance(model, ViT) or recipe is None or recipe.get("transforms"):
            raise DoesNotFit("stitch takes two ViTs that were made or loaded by name, without transforms; got "
                             f"{type(model).__name__}")
        made = preset(recipe["name"]).but(**{k: from_json(v) for k, v in recipe["changes"].items()})
        own = defaults(made)
        told.append((made, {k: own[k] for k in ("img_size", "in_chans")} | {"num_classes": model.num_classes}))
    if told[0][1] != told[1][1]:
        raise DoesNotFit(f"the two ViTs take other images or give other classes: {told[0][1]} and {told[1][1]}")
    net = create_model("snnet_v2/nano", anchors=(told[0][0], told[1][0]), rank=rank, gap=gap, **told[0][1])
    for anchor, model in zip(net.anchors, (small, large), strict=True):
        anchor.load_state_dict(model.state_dict())
    return net


def _deit(dim: int, depth: int, heads: int, **more: Any) -> Spec[ViT]:
    """DeiT III (arXiv 2204.07118): layer scale, and positions of the patches alone."""
    return spec(ViT, **({"layer_scale": 1e-4, "position_first": True} | _apart(dim=dim, depth=depth, heads=heads, **more)))


def _apart(**options: Any) -> dict[str, Any]:
    """Those options that a ViT has not by itself."""
    own = defaults(spec(ViT))
    return {k: v for k, v in options.items() if own[k] != v}


SMALL, BASE, LARGE = _deit(384, 12, 6), _deit(768, 12, 12), _deit(1024, 24, 16)
PRESETS = {
    "nano": spec(SNNetV2, anchors=(_deit(32, 2, 2, patch=4), _deit(64, 4, 4, patch=4)), img_size=28, rank=4, gap=1e6),
    "s_l": spec(SNNetV2, anchors=(SMALL, LARGE)),
    "s_b": spec(SNNetV2, anchors=(SMALL, BASE)),
    "b_l": spec(SNNetV2, anchors=(BASE, LARGE)),
}


OURS, THEIRS = "anchors.{a}.stages.0.layers.{i}", "anchors.{a}.blocks.{i}"
KEYS = {
    "authors": keymap(
        rule("anchors.{a}.cls_token", "anchors.{a}.embedding.cls"),
        rule("anchors.{a}.pos_embed", "anchors.{a}.embedding.position.table"),
        rule("anchors.{a}.patch_embed.proj.*", "anchors.{a}.embedding.proj.*"),
        rule(f"{THEIRS}.gamma_1", f"{OURS}.mixer.scale"),
        rule(f"{THEIRS}.gamma_2", f"{OURS}.channel.scale"),
        rule(f"{THEIRS}.norm1.*", f"{OURS}.mixer.norm.*"),
        rule(f"{THEIRS}.norm2.*", f"{OURS}.channel.norm.*"),
        rule(f"{THEIRS}.attn.*", f"{OURS}.mixer.inner.*"),
        rule(f"{THEIRS}.mlp.*", f"{OURS}.channel.inner.*"),
        rule("anchors.{a}.norm.*", "anchors.{a}.norm.*"),
        rule("anchors.{a}.head.*", "anchors.{a}.head.*"),
        rule("stitch_layers.{a}.{i}.transform.lora_A", "stitches.{a}.{i}.lora_a"),
        rule("stitch_layers.{a}.{i}.transform.lora_B", "stitches.{a}.{i}.lora_b"),
        rule("stitch_layers.{a}.{i}.transform.*", "stitches.{a}.{i}.*"),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Both anchors as ViTs. Heads are those of a preset's anchor of this width, else as a ViT's."""
    anchors, doors = [], {}
    known = {a["dim"]: dict(a.options).get("heads") for p in PRESETS.values() for a in p["anchors"]}
    for i in ("0", "1"):
        own = {k.removeprefix(f"anchors.{i}."): t for k, t in state.items() if k.startswith(f"anchors.{i}.")}
        told = {k: v.value if isinstance(v, Assumed) else v for k, v in vit.settings(own, "timm").items()}
        doors = {k: told.pop(k) for k in ("img_size", "in_chans", "num_classes")}
        told["heads"] = known.get(told["dim"]) or told["heads"]
        anchors.append(spec(ViT, **_apart(**told)))
    rank = state["stitches.0.0.lora_a"].shape[0] if "stitches.0.0.lora_a" in state else 0
    return doors | {"anchors": tuple(anchors), "rank": rank, "gap": as_preset(PRESETS, "gap", 1e9, anchors=tuple(anchors))}
