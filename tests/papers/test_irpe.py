"""iRPE against the sums over pairs; its buckets; the identity at the start; grids and class tokens; the authors."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.papers.positions.irpe import IRPE, KEYS, METHODS, PRESETS, buckets_of, piecewise_index
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "irpe__deit_tiny_ctx_product_50_shared_k.json.gz"
PLAIN = {"causal": False, "window": None, "scale": None}


def moved(**options):
    """In float64, at tables away from zero."""
    position = IRPE(6, 3, **options).double()
    with torch.no_grad():
        for table in position.tables.values():
            table.normal_()
    return position


def g(x, ratio):
    """Eq. 18 in scalars."""
    if abs(x) <= ratio:
        return round(x)
    far = ratio + math.log(abs(x) / ratio) / math.log(8) * ratio
    return int(math.copysign(min(2 * ratio, round(far)), x))


def bucket(method, ratio, dr, dc):
    """Of one offset, one or two numbers."""
    most = int(2 * ratio)
    if method == "euc":
        return [g(round(math.hypot(dr, dc)), ratio) + most]
    if method == "quant":
        return [g(dr**2 + dc**2, ratio) + most]
    rows, cols = g(dr, ratio) + most, g(dc, ratio) + most
    return [rows, cols] if method == "cross" else [rows * (2 * most + 1) + cols]


def naive(p, q, k, v, grid, prefix, causal):
    """Eqs. 13 to 17, with the vector of each pair written out."""
    cells = [None] * prefix + list(itertools.product(*map(range, grid)))
    n, names = len(cells), {x: p._names(x) for x in "qkv"}

    def pair(x, i, j):
        """Of all heads: the sum over the tables of a bucket's entry for query i and key j."""
        a, b = cells[i], cells[j]
        last = [p.buckets - 1] * len(names[x])
        at = last if a is None or b is None else bucket(p.method, p.ratio, a[0] - b[0], a[1] - b[1])
        tables = [p.tables[name] for name in names[x]]
        return sum(t[:, m] if x == "v" else t[..., m] for t, m in zip(tables, at, strict=True))

    def met(x, vector, i, j):
        """What the pair (i, j) of table x adds to the scores, for a query or key."""
        found = pair(x, i, j)
        return found if p.mode == "bias" else scale * (vector * found).sum(-1)

    scale, rows = 6**-0.5, []
    for i in range(n):
        scores = []
        for j in range(n):
            s = scale * (q[:, :, i] * k[:, :, j]).sum(-1)
            if "k" in p.on:
                s = s + met("k", q[:, :, i], i, j)
            if "q" in p.on:
                s = s + met("q", k[:, :, j], j, i)
            scores.append(s if not causal or j <= i else torch.full_like(s, -math.inf))
        weights = torch.stack(scores, -1).softmax(-1)
        rows.append(sum(weights[:, :, j, None] * (v[:, :, j] + (pair("v", i, j) if "v" in p.on else 0)) for j in range(n)))
    return torch.stack(rows, dim=2)


ONS = [("k", "contextual"), ("q", "contextual"), ("v", "contextual"), ("qkv", "contextual"), ("k", "bias"), ("qk", "bias")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("on", "mode"), ONS)
@pytest.mark.parametrize("shared", [True, False])
def test_is_the_sum_over_pairs(method, on, mode, shared):
    """Forward and backward, on a rectangle, with a class token where heads share."""
    prefix, grid, causal = int(shared), (2, 5), on == "v"
    p = moved(on=on, method=method, mode=mode, shared=shared, ratio=1.9 if method == "product" else 2.5)
    q, k, v = (torch.randn(1, 3, prefix + 10, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = p.attend(q, k, v, Ctx(grid=grid, prefix=prefix), **PLAIN | {"causal": causal})
    theirs = naive(p, q, k, v, grid, prefix, causal)
    assert_close(ours, theirs)
    weights, inputs = torch.randn_like(ours), [q, k, v, *p.parameters()]
    assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)))


@pytest.mark.parametrize("ratio", [0.5, 1.5, 1.9, 2.0, 3.3, 20, 33])
def test_the_index_is_that_of_scalars(ratio):
    x = torch.arange(-300, 301, dtype=torch.float32)
    index = piecewise_index(x, ratio)
    assert index.tolist() == [g(float(i), ratio) for i in x]
    assert torch.equal(index, -index.flip(0))
    assert (index.diff() >= 0).all()  # never back
    assert index.max() == int(2 * ratio)


def test_published_numbers_of_buckets():
    """50 with the class token's; DETR has 9x9 at a ratio of 2."""
    assert buckets_of("product", 1.9) + 1 == 50
    assert buckets_of("product", 2.0) == 81
    assert {IRPE(8, 2, method=m, ratio=r).buckets for m, r in (("euc", 20), ("cross", 20))} == {82}


def test_tokens_before_the_grid_share_a_bucket():
    index = moved().index(Ctx(grid=(3, 4), prefix=2))[0]
    assert (index[:2] == 49).all()
    assert (index[:, :2] == 49).all()
    assert torch.equal(index[2:, 2:], moved().index(Ctx(grid=(3, 4)))[0])
    assert index[2:, 2:].max() < 49


def test_only_the_offset_counts():
    """A window of a larger grid has its pairs in the same buckets, whatever its place."""
    for method in METHODS:
        large = moved(method=method).index(Ctx(grid=(6, 9)))
        at = (torch.arange(2, 5)[:, None] * 9 + torch.arange(4, 8)).flatten()
        assert all(torch.equal(a[at][:, at], b)
                   for a, b in zip(large, moved(method=method).index(Ctx(grid=(3, 4))), strict=True))


def test_starts_as_the_model_without_it():
    host = create_model("vit/nano").eval()
    for options in ("on=qkv", "on=qk,mode=bias", "on=qkv,method=cross,shared=false", "on=k,method=euc"):
        model = create_model(f"vit/nano:mixer=attention(position=irpe({options}))").eval()
        model.load_state_dict(host.state_dict(), strict=False)
        x = model.example(2)
        assert_close(model(x), host(x))


def test_with_the_hosts_positions_or_alone():
    beside, alone = create_model("irpe/nano"), create_model("vit/nano", position="irpe(on=qkv)")
    assert beside.embedding.position.table.shape == (1, 50, 64)
    assert not list(alone.embedding.position.parameters())
    assert sum(isinstance(m, IRPE) for m in alone.modules()) == 4


def test_authors_answers():
    state, inputs, golden = replay(GOLDEN)
    model = load(state)
    assert model.recipe == {"name": "irpe/tiny_k", "changes": {}}
    with torch.no_grad():
        compare(golden, model(*inputs))


TOLD = ["on=q", "on=qkv,method=cross,ratio=20", "on=k,shared=false", "on=v,ratio=3.0", "on=qk,mode=bias,shared=false"]
UNTOLD_HEADS = ["on=qk,mode=bias,shared=true", "on=k,method=cross,mode=bias,shared=true,ratio=20"]


@pytest.mark.parametrize("options", TOLD + UNTOLD_HEADS)
def test_authors_names_tell_the_positions(options):
    """The layout "authors", without a name."""
    model = create_model("vit/nano", mixer=f"attention(position=irpe({options}))", heads=2)
    theirs = KEYS["authors"].convert(model.state_dict(), {}, back=True)
    assert not theirs.unmatched
    again = load(theirs.state, **{"heads": 2} if options in UNTOLD_HEADS else {})
    x = model.example(2)
    assert_close(again(x), model.eval()(x))
    assert vars(again.stages[0].layers[0].mixer.inner.position)["on"] == options[3:].split(",")[0]


def test_what_does_not_fit():
    for options, why in [({"on": "x"}, "letters q, k and v.*'x'"), ({"on": ""}, "letters"), ({"on": "kk"}, "letters"),
                         ({"on": "kv", "mode": "bias"}, "none on values"), ({"ratio": 0.1}, "0.5 or more.*0.1")]:
        with pytest.raises(DoesNotFit, match=why):
            IRPE(8, 2, **options)
    with pytest.raises(UnknownName, match="product"):
        IRPE(8, 2, method="prodct")
    with pytest.raises(UnknownName, match="contextual"):
        IRPE(8, 2, mode="context")
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(DoesNotFit, match="IRPE needs tokens on a full grid"):
        IRPE(8, 2).attend(q, q, q, Ctx(), **PLAIN)


def test_every_published_model():
    assert next(iter(PRESETS)) == "nano"
    assert PRESETS["base_qkv"]["mixer"]["position"]["on"] == "qkv"
