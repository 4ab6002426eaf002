"""Hyena N-D against convolutions and filters written out, in every mode; grids; flips; hybrids; what does not fit."""

import math

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.papers.mixers.hyena_nd import DIRECTIONS, Filter, HyenaND, features, long_convolution
from formarium.parts.attention import Attention
from formarium.weights.load import load


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def mixer(grid=None, **options):
    return moved(HyenaND(6, Place(), width=5, grid=grid, **options))


def direct(x, k):
    """Every cell: the sum over all above and to the left."""
    h, w = x.shape[2:]
    rows = [[sum(k[:, a, b] * x[:, :, i - a, j - b] for a in range(i + 1) for b in range(j + 1)) for j in range(w)]
            for i in range(h)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_fft_is_the_direct_convolution(grid):
    """But for 1/(2L), on rectangles 1/sqrt(2H 2W); forward and backward."""
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, *grid, dtype=torch.float64, requires_grad=True)
    ours, theirs = long_convolution(x, k), direct(x, k) / (2 * math.sqrt(grid[0] * grid[1]))
    assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    assert_close(*(torch.autograd.grad((out * weights).sum(), [x, k]) for out in (ours, theirs)))


def test_features_of_places():
    z, t = features(5, 5, torch.zeros((), dtype=torch.float64))
    for i in range(5):
        assert t[i] == i / 4
        angles = [2 * math.pi * i / 5 * f for f in (1e-4, 1.0)]
        expected = [i / 4, *map(math.cos, angles), *(-math.sin(a) for a in angles)]
        assert_close(z[i], torch.tensor(expected, dtype=torch.float64))


def entry(f, grid, i, j, c):
    """One number of a filter, from its definition."""
    def net(n, z):
        for layer in n.layers:
            z = (f.frequency * (layer.weight @ z + layer.bias)).sin()
        return (n.out.weight @ z)[c]

    (zh, _), (zw, _) = (features(n, f.features, f.frequency) for n in grid)
    ti, tj = i / max(1, grid[0] - 1), j / max(1, grid[1] - 1)
    channels = f.nets[0].out.out_features
    slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
    fixed = slow + (fast - slow) * c / (channels - 1)

    def window(axis, t):
        return math.exp(-t * (fixed if f.decay == "standard" else abs(f.deltas[axis, c].item())))

    shift = [0.0, 0.0] if f.decay == "standard" else f.shift[:, c].tolist() * 2 if f.decay != "none" else None
    if f.kind == "product":
        rows, cols = net(f.nets[0], zh[i]), net(f.nets[1], zw[j])
        return rows * cols if f.decay == "none" else rows * (window(0, ti) + shift[0]) * cols * (window(1, tj) + shift[1])
    found = net(f.nets[0], torch.cat((zh[i], zw[j])))
    if f.decay == "none":
        return found
    both = math.exp(-(i + j) * abs(f.deltas[0, c].item())) if f.decay == "symmetric" else window(0, ti) * window(1, tj)
    return found * ((math.sqrt(both) if f.root else both) + shift[0])


@pytest.mark.parametrize(("kind", "decay", "root"), [
    ("product", "standard", False), ("product", "learn", False), ("product", "none", False), ("2d", "standard", False),
    ("2d", "learn", True), ("2d", "symmetric", False), ("2d", "none", False), ("2d", "symmetric", True)])
@torch.no_grad()
def test_filters_by_their_definition(kind, decay, root):
    f = moved(Filter(4, kind=kind, decay=decay, width=5, inner=1, features=3, root=root, grid=None))
    for grid in ((3, 4), (1, 2)):
        made = f(grid)
        assert made.shape == (4, *grid)
        for c in range(4):
            for i in range(grid[0]):
                for j in range(grid[1]):
                    assert_close(made[c, i, j], entry(f, grid, i, j, c), rtol=1e-6, atol=1e-8)


def naive(m, x, grid):
    """The layer on maps, with direct convolutions."""
    x = torch.nn.functional.conv2d((x @ m.project.weight.T + m.project.bias).mT.unflatten(2, grid), m.short.weight,
                                   m.short.bias, padding=1, groups=len(m.project.weight))
    k = m.filter(grid).unflatten(0, (m.order - 1, -1))

    def conv(v, o):
        return direct(v, k[o]) / (2 * math.sqrt(grid[0] * grid[1])) + v * m.bias[o][:, None, None]

    def run(parts, turned=False):
        v = parts[-1]
        for o, gate in enumerate(parts[-2:0:-1]):
            v = v * gate
            v = conv(v.flip(2, 3), o).flip(2, 3) if turned and o == 0 else conv(v, o)
        return v * parts[0]

    if m.directions in ("one", "seq"):
        y = run(x.split(6, 1), m.directions == "seq")
    elif m.directions == "parallel":
        y = torch.cat([run(part.split(6, 1)) for part in x.chunk(4, 1)], 1)
    else:
        four = [run([t.flip(f) for t in x.split(6, 1)]).flip(f) for f in ((), (2, 3), (3,), (2,))]
        if m.directions == "4dir":
            y = sum(w * t for w, t in zip(m.mix.weight[0], four, strict=True)) + m.mix.bias
        else:
            y = sum(torch.einsum("bchw,dc->bdhw", t, m.mix.weight[:, i::4]) for i, t in enumerate(four))
            y = y + m.mix.bias[:, None, None]
    return y.flatten(2).mT @ m.out.weight.T + m.out.bias


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize(("order", "kind"), [(2, "product"), (3, "2d"), (3, "direct")])
def test_the_layer_by_its_equations(directions, order, kind):
    """Forward and backward, on a rectangle."""
    grid = (3, 4)
    m = mixer(grid, directions=directions, order=order, filter=kind)
    x = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = m(x, Ctx(grid=grid)), naive(m, x, grid)
    assert_close(ours, theirs)
    weights, inputs = torch.randn_like(ours), [x, *m.parameters()]
    assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)))


def reach(m, at, grid):
    """Which cells the answer at one cell depends on."""
    x = torch.randn(1, grid[0] * grid[1], 6, dtype=torch.float64, requires_grad=True)
    m(x, Ctx(grid=grid)).unflatten(1, grid)[0, at[0], at[1]].sum().backward()
    return x.grad.abs().sum(-1).unflatten(1, grid)[0] > 1e-12  # the FFT rounds


def test_one_direction_sees_a_quadrant_and_four_see_all():
    """Besides the neighbours, which the short convolution reaches."""
    grid, at = (7, 7), (3, 3)
    quadrant = torch.zeros(grid, dtype=torch.bool)
    quadrant[:5, :5] = True
    assert torch.equal(reach(mixer(), at, grid), quadrant)
    assert torch.equal(reach(mixer(directions="seq"), at, grid), quadrant.flip(0, 1))
    for directions in ("4dir", "4dirp"):
        assert reach(mixer(directions=directions), at, grid).all()
    assert reach(mixer(directions="seq", order=3), at, grid).all()


def test_any_grid():
    m = mixer(decay="learn", directions="4dir")
    for grid in ((1, 1), (1, 5), (8, 3)):
        out = m(torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64), Ctx(grid=grid))
        assert out.isfinite().all()


def test_hybrids():
    """Hyena first, attention last; none and all are allowed."""
    for last in (0, 1, 3):
        model = create_model("hyena_nd/nano", depth=3, attention=last)
        kinds = [type(layer["mixer"].inner) for layer in model.stages[0].layers]
        assert kinds == [HyenaND] * (3 - last) + [Attention] * last
        model(model.example(2)).logsumexp(1).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["swin/nano:mixer=hyena_nd", "vit/nano:pool=mean,mixer=hyena_nd(directions=4dirp)",
                                  "poolformer/nano:mixers=(hyena_nd(filter=2d,decay=symmetric),attention)",
                                  "hyena_nd/nano:mixer=hyena_nd(filter=direct)", "swin/nano:mixer=hyena_nd(filter=direct)"])
def test_by_name_in_grid_hosts(name):
    model = create_model(name)
    assert any(isinstance(m, HyenaND) for m in model.modules())
    model(model.example(2)).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", ["order=3", "directions=parallel", "filter=2d,decay=symmetric", "filter=direct",
                                     "decay=learn,width=8,inner=1,features=5", "directions=4dirp"])
def test_read_without_a_name(options):
    model = create_model(f"hyena_nd/nano:depth=2,mixer=hyena_nd({options})").eval()
    again = load(dict(model.state_dict()))
    x = model.example(2)
    assert_close(again(x), model(x))


def test_weight_decay_spares_the_filters():
    model = create_model("hyena_nd/nano")
    spared = model.no_weight_decay()
    inside = {n for n, p in model.named_parameters() if ".filter." in n and p.ndim > 1}
    assert inside
    assert inside <= spared


def test_what_does_not_fit():
    for options, why in [({"order": 1}, "order is 2 or more.*got 1"), ({"features": 4}, "odd, 3 or more; got 4"),
                         ({"decay": "symmetric"}, "take filter='2d'"), ({"root": True}, "take filter='2d'"),
                         ({"filter": "direct"}, r"give grid=\(H, W\)")]:
        with pytest.raises(DoesNotFit, match=why):
            HyenaND(6, Place(), **options)
    for options, near in [({"filter": "produkt"}, "product"), ({"directions": "4d"}, "4dir"), ({"decay": "lern"}, "learn")]:
        with pytest.raises(UnknownName, match=near):
            HyenaND(6, Place(), **options)
    m = HyenaND(6, Place(), filter="direct", grid=(2, 3))
    with pytest.raises(DoesNotFit, match="for a grid of 2x3, got 3x2"):
        m(torch.randn(1, 6, 6), Ctx(grid=(3, 2)))
    with pytest.raises(DoesNotFit, match="attention= is how many of the 4 layers"):
        create_model("hyena_nd/nano", attention=5)
