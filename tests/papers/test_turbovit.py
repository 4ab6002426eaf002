"""TurboViT: units and Q-pooling written out, sizes by formula, the constrained search, Hiera's names."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters
from formarium.papers.backbones.turbovit import (
    KEYS,
    PRESETS,
    SPACE,
    MaskUnitAttention,
    QPooling,
    SearchSpace,
    attend_in_units,
    generate,
    latency,
    size,
)
from formarium.weights.fit import fit
from formarium.weights.load import load


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def naive(q, k, v, grid, unit, pool):
    """One masked attention: a query sees the keys of its unit."""
    rows, cols = (torch.arange(n) for n in grid)
    cell = (rows // unit)[:, None] * 1000 + (cols // unit)
    coarse = (torch.arange(math.ceil(grid[0] / pool)) // (unit // pool))[:, None] * 1000
    coarse = coarse + torch.arange(math.ceil(grid[1] / pool)) // (unit // pool)
    seen = coarse.flatten()[:, None] == cell.flatten()
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("grid", "unit", "pool"), [((4, 8), 4, 1), ((4, 8), 4, 2), ((5, 7), 4, 1), ((5, 7), 4, 2),
                                                    ((3, 3), 8, 2), ((6, 6), 2, 2), ((1, 1), 2, 1)])
def test_units_are_blocks_of_a_mask(grid, unit, pool):
    n, m = math.prod(grid), math.ceil(grid[0] / pool) * math.ceil(grid[1] / pool)
    q, k, v = (torch.randn(2, 3, t, 4, dtype=torch.float64, requires_grad=True) for t in (m, n, n))
    ours, theirs = attend_in_units(q, k, v, grid, unit, pool), naive(q, k, v, grid, unit, pool)
    assert_close(ours, theirs)
    g = torch.randn_like(ours)
    assert_close(torch.autograd.grad((ours * g).sum(), (q, k, v)), torch.autograd.grad((theirs * g).sum(), (q, k, v)))


def test_pooling_of_a_block_written_out():
    """Eqs. of a Hiera block: the residual is the pooled projection of the normed tokens."""
    part = moved(QPooling(0, 12, in_dim=8, heads=3, unit=4, pool=2, ratio=2.0, drop_path=0.0))
    x, grid = torch.randn(2, 32, 8, dtype=torch.float64, requires_grad=True), (4, 8)
    out, ctx = part(x, Ctx(grid=grid))
    assert ctx.grid == (2, 4)

    def pooled(t):
        return t.unflatten(1, (2, 2, 4, 2)).amax((2, 4)).flatten(1, 2)

    y = part.norm(x)
    q, k, v = part.qkv(y).chunk(3, -1)
    q, k, v = (t.unflatten(2, (3, 4)).transpose(1, 2) for t in (pooled(q), k, v))
    z = pooled(part.skip(y)) + part.proj(naive(q, k, v, grid, 4, 2).transpose(1, 2).flatten(2))
    z = z + part.channel.inner.fc2(F.gelu(part.channel.inner.fc1(part.channel.norm(z))))
    assert_close(out, z)
    g = torch.randn_like(z)
    inputs = [x, *part.parameters()]
    assert_close(torch.autograd.grad((out * g).sum(), inputs), torch.autograd.grad((z * g).sum(), inputs))


@torch.no_grad()
def test_units_do_not_see_each_other():
    part, x = moved(MaskUnitAttention(8, Place(), heads=2, unit=2)), torch.randn(1, 16, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 0] += 1  # the first token, of the unit 0, 1, 4, 5
    changed = (part(x, Ctx(grid=(4, 4))) != part(other, Ctx(grid=(4, 4)))).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [0, 1, 4, 5]
    part.unit = None
    assert (part(x, Ctx(grid=(4, 4))) != part(other, Ctx(grid=(4, 4)))).any(-1).all()


def test_units_and_stages_as_hiera_has_them():
    """The first block of a stage attends as the stage before it; units halve with each pooling."""
    with torch.device("meta"):
        model = create_model("turbovit/hiera_tiny")
    units = [s.resample.unit if s.resample else s.layers[0]["mixer"].inner.unit for s in model.stages]
    assert units == [8, 8, 4, 4, *[None] * 6, None, None]
    assert [s.resample.pool for s in model.stages if s.resample] == [2, 2, 2]
    assert [(i.channels, i.stride) for i in model.feature_info] == [(96, 4), (192, 8), (384, 16), (768, 32)]


@pytest.mark.parametrize("options", [
    {}, {"img_size": (28, 44)}, {"img_size": 30, "local": 2}, {"stem_dim": 48}, {"pools": 2, "local": 0},
    {"unit": 4, "pools": 2, "local": 3, "num_classes": 10, "ratio": 2.5}, {"in_chans": 1, "depths": (2, 1, 3)},
], ids=str)
def test_size_without_building(options):
    made = dict(PRESETS["nano"].options) | options
    with torch.device("meta"):
        model = create_model("turbovit/nano", **options)
    assert size(made) == (count_parameters(model), count_macs(model.eval(), model.example()))


@torch.no_grad()
def test_grids_that_units_do_not_fill():
    model = moved(create_model("turbovit/nano", img_size=(26, 34), unit=4)).eval()
    x = model.example(2).double()
    assert [f.map.shape[2:] for f in model.features(x)] == [(13, 17), (7, 9), (7, 9)]
    assert model(x).isfinite().all()


def test_what_does_not_fit():
    for options, why in [({"heads": (1, 2)}, "of the same stages"), ({"pools": 3}, "0 to 2 Q-poolings"),
                         ({"dims": (32, 32, 64)}, "another width than the one before"), ({"unit": 3}, "even, not 3"),
                         ({"unit": 0}, "a side of 1 token or more"),
                         ({"heads": (1, 5, 3)}, "5 heads do not divide a width of 64")]:
        with pytest.raises(DoesNotFit, match=why):
            create_model("turbovit/nano", **options)


# the search


def test_generate_under_every_bound():
    space = SearchSpace(dims=((16, 32), (48, 64)), depths=((1, 2), (1, 2, 3)), head_dims=((16,), (16, 32)))
    base = {"img_size": 28, "patch": 2, "kernel": 3, "unit": 2, "local": 1, "pools": 1, "init_std": None, "num_classes": 10}
    found = generate(lambda o: sum(o["depths"]) + o["dims"][1] / 100, space=space, base=base, parameters=150e3, macs=12e6,
                     seconds=60.0, population=6, generations=3, parents=3, children=2, seed=1)
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    for design in found:
        assert list(design.costs) == ["parameters", "macs", "seconds"]
        assert size(design.options) == (design.costs["parameters"], design.costs["macs"])
        assert design.costs["parameters"] <= 150e3
        assert design.costs["macs"] <= 12e6
        assert 0 < design.costs["seconds"] <= 60
    model = create_model("turbovit/nano", **found[0].options)
    assert count_parameters(model) == found[0].costs["parameters"]
    assert model(model.example(1)).shape == (1, 10)
    with pytest.raises(DoesNotFit, match=r"none of .* candidates is within the limits"):
        generate(lambda o: 0.0, space=space, base=base, parameters=10.0, population=2)
    with pytest.raises(DoesNotFit, match="none of"):
        generate(lambda o: 0.0, space=space, base=base, seconds=1e-9, population=1, generations=1)
    assert latency(found[0].options, repeats=1) > 0


def test_search_beats_the_median_of_the_candidates():
    """In the published bounds; more blocks after the second pooling are scored higher."""
    found = generate(lambda o: o["depths"][2] - o["depths"][0], parameters=12.7e6, macs=2.2e9, population=20, generations=3,
                     parents=5, children=5, seed=0)
    assert found[0].score > found[len(found) // 2].score
    assert found[0].costs["macs"] <= 2.2e9
    assert all(d in c for d, c in zip(found[0].options["depths"], SPACE.depths, strict=True))


def test_the_reconstruction_is_within_the_bounds():
    parameters, macs = size(dict(PRESETS["turbovit"].options))
    assert 0.95 * 12.7e6 < parameters < 12.7e6
    assert 0.95 * 2.2e9 < macs < 2.2e9
    assert all(a > b for a, b in zip(size(dict(PRESETS["genvit_2427"].options)), (12.71e6, 2.21e9), strict=True))


# Hiera's names


@torch.no_grad()
def test_their_names():
    model = moved(create_model("turbovit/nano")).float().eval()
    theirs = KEYS["hiera"].convert(model.state_dict(), back=True).state
    assert {k for k in theirs if k.startswith("blocks.1.")} == {f"blocks.1.{n}.{x}" for n in (
        "proj", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for x in ("weight", "bias")}
    assert not any(k.startswith("blocks.0.proj") for k in theirs)
    x = model.example(2)
    assert torch.equal(load(theirs)(x), model(x))


@pytest.mark.parametrize("name", ["turbovit", "genvit_2427", "hiera_small", "hiera_base_plus"])
def test_sizes_are_told(name):
    with torch.device("meta"):
        theirs = KEYS["hiera"].convert(create_model(f"turbovit/{name}").state_dict(), back=True).state
    found = fit(theirs, "turbovit", "hiera")
    assert found.error is None
    assert (found.plan.name, found.plan.changes) == (f"turbovit/{name}", {})
