"""SN-Netv2: the authors' answers along ten routes, routes and costs counted, stitches, any two ViTs, what does not fit."""

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import formarium as fm
from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.spec import spec
from formarium.papers.backbones.snnet_v2 import Route, Stitch, enumerate_routes, stitch
from formarium.papers.backbones.vit import ViT
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def test_authors_answers():
    """In the layout "authors", along routes of all four kinds."""
    state, inputs, golden = replay(GOLDEN / "snnet_v2__snnet_v2_d6_d12.json.gz")
    model, answers = load(state), []
    for model.route in (0, 1, 4, 7, 9, 12, 16, 22, 26, 32):
        answers.append(model(*inputs))
    compare(golden, answers)


def test_routes_of_the_golden_file():
    """The configurations that its note lists, with their numbers, as (first, last) layers of each leg."""
    routes = enumerate_routes(6, 12)
    assert len(routes) == 33
    listed = {4: ([0, 1], [[0, 2], [6, 12]], [2]), 7: ([0, 1], [[0, 5], [12, 12]], [5]), 9: ([1, 0], [[0, 3], [2, 6]], [1]),
              12: ([1, 0], [[0, 9], [5, 6]], [4]), 16: ([1, 0, 1], [[0, 1], [1, 4], [10, 12]], [0, 4]),
              22: ([1, 0, 1], [[0, 7], [4, 4], [10, 12]], [3, 4]), 26: ([0, 1, 0], [[0, 0], [2, 9], [5, 6]], [0, 4]),
              32: ([0, 1, 0], [[0, 3], [8, 9], [5, 6]], [3, 4])}
    for number, (anchors, spans, stitches) in listed.items():
        ends = [e + 1 for _, e in spans[:-1]] + [spans[-1][1]]
        assert routes[number] == Route(tuple(anchors), tuple((f, e) for (f, _), e in zip(spans, ends, strict=True)),
                                       tuple(stitches))


@pytest.mark.parametrize(("small", "large"), [(1, 2), (2, 4), (4, 4), (6, 12), (12, 24), (3, 9), (2, 7)])
def test_routes_fit_their_anchors(small, large):
    """Legs go forwards, and every stitch that is asked for exists."""
    routes = enumerate_routes(small, large)
    assert len(set(routes)) == len(routes)
    stitches = Counter(r.anchors for r in routes)
    for r in routes:
        assert all(0 <= first <= end <= (small, large)[a] for a, (first, end) in zip(r.anchors, r.spans, strict=True))
        assert all(first < end for first, end in r.spans[:-1])
        assert r.spans[0][0] == 0
        assert r.spans[-1][1] == (small, large)[r.anchors[-1]]
        assert all(s < stitches[a, 1 - a] for a, s in zip(r.anchors, r.stitches, strict=False))


@torch.no_grad()
def test_a_route_by_hand():
    """From large to small, layer by layer."""
    model = moved(create_model("snnet_v2/nano"))
    model.route = next(i for i, r in enumerate(model.routes) if len(r.anchors) == 2 and r.anchors[0] == 1)
    end, first = model._taken.spans[0][1], model._taken.spans[1][0]
    small, large = model.anchors
    images = model.example(2)
    x, ctx = large.embedding(images, Ctx())
    for layer in list(large.stages[0].layers)[:end]:
        x = layer["channel"](layer["mixer"](x, ctx), ctx)
    s = model.stitches[1][0]
    x = x @ s.weight.t() + s.bias + x @ s.lora_a.t() @ s.lora_b.t() / s.rank
    for layer in list(small.stages[0].layers)[first:]:
        x = layer["channel"](layer["mixer"](x, ctx), ctx)
    assert_close(model(images), small.head(small.norm(x)[:, 0]))


@torch.no_grad()
def test_anchors_alone():
    """Routes 0 and 1 are the anchors; features are maps along any route."""
    model = moved(create_model("snnet_v2/nano"))
    x = model.example(2)
    for number in range(len(model.routes)):
        model.route = number
        if number < 2:
            assert torch.equal(model(x), model.anchors[number](x))
        maps = model.features(x)
        assert [f.map.shape[1] for f in maps] == [i.channels for i in model.feature_info]


def test_costs_and_groups():
    model = create_model("snnet_v2/nano:gap=2e6").eval()
    costs = model.costs()
    for number, cost in enumerate(costs):
        model.route = number
        assert count_macs(model, model.example(1)) == cost
    groups = model.groups()
    assert sorted(chain(*groups)) == model.drawn == [0, 1, 2, 4]  # 3 leaves the small anchor at its end
    assert all(costs[g[-1]] - costs[g[0]] <= 2e6 for g in groups)
    assert all(costs[b[0]] - costs[a[0]] > 2e6 for a, b in pairwise(groups))


def test_training_draws_groups_alike():
    """As many draws of each group, whatever its size; the route that is chosen stays."""
    model = create_model("snnet_v2/nano:gap=6e6").train()
    torch.manual_seed(0)
    drawn = Counter(model.draw() for _ in range(1500))
    groups = model.groups()
    assert len(groups) > 1
    for g in groups:
        assert sum(drawn[i] for i in g) == pytest.approx(1500 / len(groups), abs=80)
        assert all(drawn[i] == pytest.approx(1500 / len(groups) / len(g), abs=80) for i in g)
    model(model.example(2))
    assert model.route == 1


def test_stitch():
    """Least squares against the normal equations; W is frozen and the update starts at nothing."""
    x, y = torch.randn(2, 50, 6, dtype=torch.float64), torch.randn(2, 50, 9, dtype=torch.float64)
    s = Stitch(6, 9, 3).double()
    s.fit(x, y)
    whole = torch.cat((x.flatten(0, 1), torch.ones(100, 1, dtype=torch.float64)), dim=1)
    want = torch.linalg.solve(whole.t() @ whole, whole.t() @ y.flatten(0, 1))
    assert_close(torch.cat((s.weight.t(), s.bias[None])), want)
    assert_close(s(x), (whole @ want).unflatten(0, (2, 50)))
    assert [n for n, p in s.named_parameters() if not p.requires_grad] == ["weight"]
    assert all(p.requires_grad for p in Stitch(6, 9, 0).parameters())


def test_stitch_any_two(tmp_path):
    """Two models of the toolkit: their answers stay, stitches that are fitted join them better, files remember both."""
    options = {"img_size": 28, "patch": 4, "num_classes": 10, "pool": "mean"}
    small, large = (fm.create_model("vit/nano", depth=d, dim=w, **options).eval() for d, w in ((2, 32), (2, 64)))
    model = stitch(small, large, rank=2).eval()
    x = model.example(16)
    for model.route, anchor in ((0, small), (1, large)):
        assert torch.equal(model(x), anchor(x))
    route = next(i for i, r in enumerate(model.routes) if r.anchors == (0, 1) and r.spans[1][0] < 2)

    def gap():
        model.route = route
        return (model(x) - large(x)).norm()

    before = gap()
    model.init_stitches(x)
    assert gap() < before / 2
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    again.route = route
    assert torch.equal(again(x), model(x))


def test_what_does_not_fit():
    a = spec(ViT, dim=32, depth=2, heads=2, patch=4)
    for other, why in ((a.but(depth=3), "at least twice as deep, got 2 and 3"), (a.but(patch=7), "the same tokens"),
                       (a.but(pool="mean"), "the same tokens"), ("vit/nano", "Specs of two ViTs")):
        with pytest.raises(DoesNotFit, match=why):
            create_model("snnet_v2/nano", anchors=(a, other))
    with pytest.raises(DoesNotFit, match="numbers 0 to 4, got 9"):
        create_model("snnet_v2/nano").route = 9
    with pytest.raises(DoesNotFit, match="take other images"):
        stitch(create_model("vit/nano"), create_model("vit/nano:num_classes=3"))
    with pytest.raises(DoesNotFit, match="got Swin"):
        stitch(create_model("vit/nano"), create_model("swin/nano"))
