"""Restormer against its equations in the authors' layout of images; padding, variants, the authors' answers and names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.restoration.restormer import (
    GDFN,
    KEYS,
    MDTA,
    PRESETS,
    BiasFreeNorm,
    Downsample,
    Upsample,
    shortest_ratio,
)
from formarium.parts.embed import to_map, to_tokens
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"dim": 8, "depths": (1, 2, 1, 2), "heads": (1, 2, 2, 4), "refinement": 2}


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def gradients(out, inputs):
    generator = torch.Generator().manual_seed(3)
    return torch.autograd.grad((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum(), inputs)


def matches(part, naive, x, grid):
    """Answers and all gradients of a part on tokens are those of a function of maps."""
    inputs = [x, *part.parameters()]
    ours = part(x, Ctx(grid=grid)) if isinstance(part, MDTA | GDFN) else part(x)
    theirs = to_tokens(naive(to_map(x, grid)))
    assert_close(ours, theirs)
    assert_close(gradients(ours, inputs), gradients(theirs, inputs))


def tokens(grid, dim):
    return torch.randn(2, grid[0] * grid[1], dim, dtype=torch.float64, requires_grad=True)


def pointwise(x, layer):
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def by_channel(x, layer):
    return F.conv2d(x, layer.weight, layer.bias, padding=1, groups=len(layer.weight))


# the parts


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (12, 12)])
def test_mdta_is_attention_between_channels(heads, bias, grid):
    """Eq. 1 with every channel and every head on its own."""
    part = moved(MDTA(12, Place(), heads=heads, bias=bias))

    def naive(x):
        qkv = by_channel(pointwise(x, part.qkv), part.conv)
        q, k, v = (t.flatten(2) for t in qkv.split(12, dim=1))
        rows, size = [], 12 // heads
        for i in range(12):
            head = slice(i // size * size, (i // size + 1) * size)
            unit_q = q[:, i] / q[:, i].norm(dim=1, keepdim=True)
            unit_k = k[:, head] / k[:, head].norm(dim=2, keepdim=True)
            scores = torch.einsum("bn,bcn->bc", unit_q, unit_k) * part.temperature[i // size, 0, 0]
            rows.append(torch.einsum("bc,bcn->bn", scores.softmax(1), v[:, head]))
        return pointwise(torch.stack(rows, dim=1).unflatten(2, grid), part.proj)

    matches(part, naive, tokens(grid, 12), grid)


@pytest.mark.parametrize("bias", [False, True])
def test_gdfn_is_gated(bias):
    """Eq. 2; the hidden width is rounded down, as the authors have it."""
    part, grid = moved(GDFN(10, Place(), bias=bias)), (4, 6)
    assert part.fc2.weight.shape == (10, 26)

    def naive(x):
        gate, value = by_channel(pointwise(x, part.fc1), part.conv).split(26, dim=1)
        return pointwise(0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * value, part.fc2)

    matches(part, naive, tokens(grid, 10), grid)


def test_bias_free_norm():
    """Divides by the deviation and keeps the mean; so the answer does not follow the size of what comes in."""
    norm, grid = moved(BiasFreeNorm(9)), (3, 4)
    deviation = lambda x: (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True)  # noqa: E731
    matches(norm, lambda x: x / (deviation(x) + 1e-5).sqrt() * norm.weight[:, None, None], tokens(grid, 9), grid)
    x = tokens(grid, 9).detach()
    assert_close(norm(1000 * x), norm(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(norm(x + 1), norm(x), atol=0.1)


@torch.no_grad()
def test_the_grid_halves_and_doubles():
    """Pixel-unshuffle puts the four pixels of a square into neighbouring channels; pixel-shuffle takes them back."""
    x, down, up = torch.randn(2, 24, 8), Downsample(8), Upsample(8)
    y, ctx = down(x, Ctx(grid=(4, 6)))
    assert (y.shape, ctx.grid) == ((2, 6, 16), (2, 3))
    image, small = down.conv(to_map(x, (4, 6))), to_map(y, (2, 3))
    for c in range(4):
        for i in range(2):
            for j in range(2):
                assert torch.equal(small[:, 4 * c + 2 * i + j], image[:, c, i::2, j::2])
    y, ctx = up(x, Ctx(grid=(4, 6)))
    assert (y.shape, ctx.grid) == ((2, 96, 4), (8, 12))
    large, image = to_map(y, (8, 12)), up.conv(to_map(x, (4, 6)))
    for c in range(4):
        for i in range(2):
            for j in range(2):
                assert torch.equal(large[:, c, i::2, j::2], image[:, 4 * c + 2 * i + j])


def test_reused_in_another_net():
    """The blocks are parts of the shelf; where there is no grid, or no order of tokens, they say so."""
    model = create_model("poolformer/nano:mixers=(mdta,pooling),channel=gdfn,norm=bias_free")
    model(model.example(2)).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert sum(isinstance(m, MDTA) for m in model.modules()) > 0
    with pytest.raises(DoesNotFit, match="5 heads do not divide a width of 12"):
        MDTA(12, Place(), heads=5)


# the net


def test_without_its_last_layer_it_gives_the_image_back():
    """Of any size, and enlarged by the scale; with dual pixels nothing is added."""
    for scale in (1, 3):
        model = create_model("restormer/nano", scale=scale)
        torch.nn.init.zeros_(model.head.weight)
        x = torch.rand(2, 3, 13, 22)
        large = F.interpolate(model.pad(x), scale_factor=scale, mode="bicubic", antialias=True)
        assert_close(model(x), large[..., :13 * scale, :22 * scale] if scale > 1 else x)
    model = create_model("restormer/nano", in_chans=6, dual_pixel=True)
    torch.nn.init.zeros_(model.head.weight)
    out = model(torch.rand(2, 6, 13, 22))
    assert out.shape == (2, 3, 13, 22)
    assert not out.any()


def test_dual_pixels_add_the_embedding():
    model = moved(create_model("restormer/nano", in_chans=6, dual_pixel=True))
    x = torch.rand(1, 6, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        embedded, ctx = model.embed(x)
        skip = model.skip
        with_it, model.skip = model.encode(embedded, ctx)[0], None
        without, model.skip = model.encode(embedded, ctx)[0], skip
    assert_close(with_it - without, skip(embedded))


@torch.no_grad()
def test_levels():
    """Any number of levels; the sides are padded to multiples of two to the number of halvings."""
    for levels in (1, 2, 3, 5):
        model = create_model("restormer/nano", depths=(1,) * levels, heads=(1,) * levels, dim=4)
        assert model.multiple == 2 ** (levels - 1)
        assert model(torch.rand(1, 3, 33, 40)).shape == (1, 3, 33, 40)
        depth = [m.place.layer for m in model.modules() if isinstance(m, MDTA)]
        assert sorted(depth) == list(range(2 * levels))  # each layer has its own place


def test_what_does_not_fit():
    for options, why in [({"heads": (1, 2)}, "of the same levels"), ({"depths": ()}, "of the same levels"),
                         ({"depths": (1, 0, 1)}, "1 layer or more each"), ({"dim": 7}, "dim is even.*got 7"),
                         ({"in_chans": 6}, "as many channels; got in_chans=6 and out_chans=3"),
                         ({"heads": (1, 3, 4)}, "3 heads do not divide a width of 32")]:
        with pytest.raises(DoesNotFit, match=why):
            create_model("restormer/nano", **options)


# published counts


def test_macs_but_for_the_products_of_attention_are_the_authors():
    """Theirs, 140.99 G, were counted by layer, so the two products of attention are missing."""
    with torch.device("meta"):
        model = create_model("restormer/deraining")
        x = model.example(1, (3, 256, 256))
        products = 0
        for module in (m for m in model.modules() if isinstance(m, MDTA)):
            pixels = {48: 256**2, 96: 128**2 if module.heads == 2 else 256**2, 192: 64**2, 384: 32**2}[module.dim]
            products += 2 * module.dim // module.heads * module.dim * pixels
    assert count_macs(model, x) - products == pytest.approx(140.99e9, rel=1e-3)
    assert products == pytest.approx(13.9e9, rel=0.01)


@pytest.mark.parametrize(("name", "count"), [("deraining", 26126644), ("real_denoising", 26111668)])
def test_parameters(name, count):
    with torch.device("meta"):
        assert count_parameters(create_model(f"restormer/{name}")) == count


# the authors' answers and names


@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN / "restormer__deraining.json.gz")
    model = load({"params": state}["params"], "restormer")
    assert model.recipe == {"name": "restormer/deraining", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    assert compare(golden, model(x)) < 3e-5
    model.encoder[0].layers[0].mixer.inner.temperature += 1
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, model(x))


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, {"norm": "layer_norm(eps=1e-5)"}, {"in_chans": 1, "out_chans": 1}, {"in_chans": 6, "dual_pixel": True},
    {"bias": True}, {"ratio": 2.0}, {"ratio": 1.3, "dim": 12}, {"bias": True, "in_chans": 6, "dual_pixel": True},
], ids=str)
def test_their_models(options, tmp_path):
    """A small model of their shape, in their names, is recognised whole, from a file of theirs too."""
    model = moved(create_model("restormer/color_blind", **(SMALL | options))).float().eval()
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert len(theirs.state) == len(model.state_dict())
    loaded = load(theirs.state, "restormer")
    x = model.example(2, (model.in_chans, 19, 24))
    assert torch.equal(loaded(x), model(x))
    torch.save({"params": theirs.state}, tmp_path / "theirs.pth")
    assert torch.equal(load(tmp_path / "theirs.pth", "restormer")(x), model(x))
    save(loaded, tmp_path / "ours.safetensors")
    assert torch.equal(load(tmp_path / "ours.safetensors")(x), model(x))
    assert from_recipe(loaded.recipe).recipe == loaded.recipe


def test_their_names():
    with torch.device("meta"):
        theirs = KEYS["authors"].convert(create_model("restormer/defocus_dual").state_dict(), back=True).state
    assert {k for k in theirs if "encoder_level3.5." in k} == {f"encoder_level3.5.{n}" for n in (
        "norm1.body.weight", "norm1.body.bias", "attn.temperature", "attn.qkv.weight", "attn.qkv_dwconv.weight",
        "attn.project_out.weight", "norm2.body.weight", "norm2.body.bias", "ffn.project_in.weight", "ffn.dwconv.weight",
        "ffn.project_out.weight")}
    assert {k for k in theirs if not any(c.isdigit() and f".{c}." in k for c in k)} == {
        "patch_embed.proj.weight", "reduce_chan_level3.weight", "reduce_chan_level2.weight", "skip_conv.weight",
        "output.weight"}
    assert {k: tuple(theirs[k].shape) for k in theirs if k.startswith(("up", "down"))} == {
        "down1_2.body.0.weight": (24, 48, 3, 3), "down2_3.body.0.weight": (48, 96, 3, 3),
        "down3_4.body.0.weight": (96, 192, 3, 3), "up4_3.body.0.weight": (768, 384, 3, 3),
        "up3_2.body.0.weight": (384, 192, 3, 3), "up2_1.body.0.weight": (192, 96, 3, 3)}


def test_presets_differ_as_published():
    denoisers = [n for n, s in PRESETS.items() if dict(s.options).get("norm") == spec(BiasFreeNorm)]
    levels = ("blind", "sigma15", "sigma25", "sigma50")
    assert denoisers == ["nano", *(f"{c}_{t}" for c in ("color", "gray") for t in levels), "real_denoising"]


def test_ratios():
    assert shortest_ratio({48: 127, 96: 255, 192: 510, 384: 1021}) == 2.66
    assert shortest_ratio({48: 96, 96: 192}) == 2.0
    for ratio in (1.0, 1.37, 2.7, 3.999):
        widths = {d: int(d * ratio) for d in (16, 32, 64, 128)}
        assert {d: int(d * shortest_ratio(widths)) for d in widths} == widths
    with pytest.raises(ValueError, match="no ratio"):
        shortest_ratio({48: 127, 96: 300})


def test_wrong_files():
    state, _, _ = replay(GOLDEN / "restormer__deraining.json.gz")
    with pytest.raises(BadCheckpoint, match=r"missing|of another shape"):
        load({k: v for k, v in state.items() if k != "output.weight"}, "restormer")
    with pytest.raises(BadCheckpoint, match="no place"):
        load(state | {"extra.weight": torch.zeros(3)}, "restormer")
