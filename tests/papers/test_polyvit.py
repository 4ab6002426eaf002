"""PolyViT and PolyTwins: the same answers under all circular shifts; anchoring by its definition; authors' answers."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.papers.backbones.polyvit import KEYS, CircularPEG, Poly, PolyOrder, anchor
from formarium.papers.backbones.swin import WindowAttention
from formarium.papers.backbones.twins import LocalAttention, SubsampledAttention
from formarium.parts.attention import Attention
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(model):
    """At parameters away from their start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def by_hand(x, step):
    """Each image rolled so that its strongest component begins at the origin."""
    out = []
    for image in x:
        norms = {(i, j): image[:, i::step[0], j::step[1]].norm() for i in range(step[0]) for j in range(step[1])}
        i, j = max(norms, key=norms.get)
        out.append(image.roll((-i, -j), (1, 2)))
    return torch.stack(out)


@pytest.mark.parametrize(("size", "step"), [((8, 8), (4, 4)), ((6, 15), (3, 5)), ((7, 14), (7, 7)), ((4, 6), (1, 2))])
def test_poly_order_by_its_definition(size, step):
    """Forward and backward."""
    x = torch.randn(5, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = PolyOrder(3, step=step)(x), by_hand(x, step)
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    assert_close(*(torch.autograd.grad((out * weights).sum(), x) for out in (ours, theirs)))


def test_poly_order_of_a_shifted_image():
    """Is that of the image, rolled by whole steps."""
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    order = PolyOrder(3, step=(4, 3))
    anchored = order(x)
    for shift in itertools.product(range(8), range(12)):
        again = order(x.roll(shift, (2, 3)))
        whole = [anchored.roll((4 * i, 3 * j), (2, 3)) for i in range(2) for j in range(4)]
        for n in range(2):
            assert any(torch.equal(again[n], w[n]) for w in whole)


@pytest.mark.parametrize("step", [(4, 3), (1, 1), (8, 12)])
def test_invariant_poly_order(step):
    """All shifts of an image become the same: its strongest component at the origin, its strongest cell first."""
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    order = PolyOrder(3, step=step, invariant=True)
    anchored = order(x)
    for shift in itertools.product(range(8), range(12)):
        assert torch.equal(order(x.roll(shift, (2, 3))), anchored)
    by_component = by_hand(x, step)
    for image, plain in zip(anchored, by_component, strict=True):
        first = plain[:, ::step[0], ::step[1]].norm(dim=0)
        i, j = divmod(first.argmax().item(), first.shape[1])
        assert torch.equal(image, plain.roll((-i * step[0], -j * step[1]), (1, 2)))


def consistent(model, size, every=1):
    """The largest change of a logit over the shifts, and the share of shifts that keep all classes."""
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        changes, same = [], []
        for shift in itertools.product(range(0, size[0], every), range(0, size[1], every)):
            moved = model(x.roll(shift, (2, 3)))
            changes.append((moved - plain).abs().max().item())
            same.append(torch.equal(moved.argmax(1), plain.argmax(1)))
    return max(changes), sum(same) / len(same)


@pytest.mark.parametrize(("options", "size"), [
    ({"pool": "token", "patch": 4}, (12, 12)), ({"pool": "mean", "patch": 4}, (8, 16)),
    ({"pool": "token", "patch": (3, 4)}, (9, 12)),
    ({"pool": "mean", "patch": 2, "mixer": "window(window=2)", "residual": "poly(step=2)"}, (8, 8)),
    ({"pool": "mean", "patch": 2, "mixer": "subsampled(step=2)", "residual": "poly(step=2)"}, (8, 12)),
])
def test_every_circular_shift(options, size):
    """100 % consistency, logits within rounding: for patches, windows and strided keys, on rectangles too."""
    model = moved(create_model("polyvit/nano", depth=2, img_size=size, num_classes=7, **options))
    change, share = consistent(model, size)
    assert change < 1e-9
    assert share == 1


def test_invariant_maps():
    """Then the feature maps do not change either; else they are rolled."""
    for invariant in (True, False):
        model = moved(create_model("polyvit/nano", depth=2, img_size=12, patch=4, invariant=invariant))
        x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
        ours, shifted = (model.features(t)[-1].map for t in (x, x.roll((4, 8), (2, 3))))
        assert_close(ours if invariant else ours.roll((1, 2), (2, 3)), shifted)


TWINS = {"dims": (8, 16), "depths": (2, 3), "heads": (1, 2), "ratios": (2.0, 2.0), "patch": 2, "num_classes": 7}


@pytest.mark.parametrize(("options", "size"), [
    ({"window": 2, "steps": (2, 1)}, (8, 8)), ({"window": 3, "steps": (2, 1)}, (12, 24)),
    ({"window": 2, "steps": (4, 2)}, (16, 8)),
])
def test_every_circular_shift_of_twins(options, size):
    model = moved(create_model("polyvit/nano_twins", **TWINS, **options, img_size=size))
    change, share = consistent(model, size)
    assert change < 1e-9
    assert share == 1
    plain = moved(create_model("twins/nano", **TWINS, **options, img_size=size))
    plain.load_state_dict(model.state_dict())
    assert consistent(plain, size, every=3)[0] > 1e-3


@torch.no_grad()
def test_poly_twins_authors_answers():
    """Layout authors_twins, by name: the tensors are those of Twins, whose answers are others."""
    state, inputs, golden = replay(GOLDEN / "polyvit__polytwins_svt_small.json.gz")
    model = load(state, "polyvit")
    assert model.recipe == {"name": "polyvit/twins_s", "changes": {}}
    compare(golden, model(*inputs))
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, load(state, "twins")(*inputs))


def test_poly_takes_its_mixers_step():
    """Windows, strides, or said; of a channel mixer none; the authors' form leaves the tokens rolled."""
    for mixer, step in ((LocalAttention(4, Place(), heads=2, window=3), (3, 3)),
                        (SubsampledAttention(4, Place(), heads=2, step=(2, 4)), (2, 4)),
                        (WindowAttention(4, Place(), heads=2, window=2), (2, 2))):
        assert Poly(4, Place(), mixer, step=None).step == step
        assert Poly(4, Place(sub=1, subs=2), mixer, step=None).step == (1, 1)
    with pytest.raises(DoesNotFit, match=r"name that of Attention, e.g. residual='poly\(step=7\)'"):
        Poly(4, Place(), Attention(4, Place(), heads=2), step=None)
    stays = moved(Poly(6, Place(), LocalAttention(6, Place(), heads=2, window=2), step=None))
    rolled = Poly(6, Place(), stays.inner, step=None, back=False).double()
    rolled.load_state_dict(stays.state_dict())
    x, ctx = torch.randn(2, 24, 6, dtype=torch.float64), Ctx(grid=(4, 6))
    place = anchor(x.mT.unflatten(2, (4, 6)), (2, 2))[..., None].expand(x.shape)
    assert_close(rolled(x, ctx), stays(x, ctx).gather(1, place))
    assert not torch.equal(rolled(x, ctx), stays(x, ctx))


@pytest.mark.parametrize("name", ["vit/nano:depth=2", "polyvit/nano:pool=mean,patch=2,depth=2,mixer=window(window=2)",
                                  "polyvit/nano:pool=mean,patch=2,depth=2,mixer=subsampled(step=2)"])
def test_without_anchoring_shifts_change_the_answer(name):
    model = moved(create_model(name, img_size=8))
    assert consistent(model, (8, 8))[0] > 1e-3


@pytest.mark.parametrize("inner", [lambda p: WindowAttention(6, p, heads=2, window=2),
                                   lambda p: SubsampledAttention(6, p, heads=2, step=2)])
def test_poly_is_equivariant(inner):
    """Rolled tokens give rolled answers; where the map is anchored already it is plain pre-norm."""
    poly = moved(Poly(6, Place(), inner(Place()), step=2))
    x, ctx = torch.randn(2, 24, 6, dtype=torch.float64), Ctx(grid=(4, 6))

    def rolled(t, by):
        return t.unflatten(1, (4, 6)).roll(by, (1, 2)).flatten(1, 2)

    out = poly(x, ctx)
    for by in itertools.product(range(4), range(6)):
        assert_close(poly(rolled(x, by), ctx), rolled(out, by))
    place = anchor(x.mT.unflatten(2, (4, 6)), (2, 2))
    at = x.gather(1, place[..., None].expand(x.shape))
    assert_close(poly(at, ctx), at + poly.inner(poly.norm(at), ctx))


def test_positions_go_around_the_edges():
    peg = moved(CircularPEG(5, 12))
    x = torch.randn(1, 12, 5, dtype=torch.float64)
    image = x.unflatten(1, (3, 4))
    expected = image + peg.conv.bias
    for i, j in itertools.product(range(3), range(3)):
        expected = expected + image.roll((1 - i, 1 - j), (1, 2)) * peg.conv.weight[:, 0, i, j]
    assert_close(peg(x, Ctx(grid=(3, 4))), expected.flatten(1, 2))


def test_authors_names():
    """The layout "authors": timm's ViT with `pos_conv` and a norm after the patches, and without a table."""
    model = create_model("polyvit/nano", num_classes=5).eval()
    theirs = KEYS["authors"].convert(model.state_dict(), {}, back=True).state
    assert theirs["pos_conv.proj.weight"].shape == (64, 1, 3, 3)
    assert {"cls_token", "patch_embed.proj.weight", "patch_embed.norm.bias", "blocks.3.attn.qkv.weight"} <= set(theirs)
    assert "pos_embed" not in theirs
    again = load(theirs)
    x = model.example(2)
    assert_close(again(x), model(x))


def test_what_does_not_fit():
    with pytest.raises(DoesNotFit, match="multiples of its step, 3x3; got 7x7"):
        create_model("polyvit/nano:pool=mean,residual=poly(step=3)")(torch.randn(1, 3, 28, 28))
    with pytest.raises(DoesNotFit, match="multiples of 28x28, got 28x30; the nearest: 28x28 or 28x56"):
        create_model("polyvit/nano_twins", img_size=(28, 30))
    with pytest.raises(DoesNotFit, match="PolyTwins needs image sides that are multiples of 28x28, got 27x28"):
        create_model("polyvit/nano_twins")(torch.randn(1, 3, 27, 28))
    for wrong in ({"depths": (3, 2)}, {"steps": (1, 1)}):
        with pytest.raises(DoesNotFit, match="even depths and steps in all stages but the last"):
            create_model("polyvit/nano_twins", **wrong)
    with pytest.raises(DoesNotFit, match="Poly needs tokens on a grid and nothing before it"):
        create_model("polyvit/nano:residual=poly")(torch.randn(1, 3, 28, 28))
