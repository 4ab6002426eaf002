"""Twins against timm's answers and a naive forward pass: windows one by one, strided keys, positions in each stage."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.model import FeatureInfo, count_parameters
from formarium.core.spec import spec
from formarium.papers.backbones.twins import KEYS, PEG, LocalAttention, NormedMerging, SubsampledAttention
from formarium.parts.position import NoPosition
from formarium.weights.fit import fit
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


@torch.no_grad()
def test_timm_answers():
    """Layout timm, which is the authors' too; polyvit has the same tensors, so the name is asked for."""
    state, inputs, golden = replay(GOLDEN / "twins__twins_svt_small.json.gz")
    model = load(state, "twins")
    assert model.recipe == {"name": "twins/svt_small", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))


def attend_by_hand(part, queries, keys):
    """(n, C), (m, C) -> (n, C): softmax attention by its formula, head by head."""
    q, k, v = queries, *keys
    d = q.shape[1] // part.heads
    heads = [((q[:, i:i + d] @ k[:, i:i + d].T / d**0.5).softmax(-1) @ v[:, i:i + d]) for i in range(0, q.shape[1], d)]
    return part.proj(torch.cat(heads, dim=1))


def local_by_hand(part, x, grid):
    """Window by window of a map with zeros around it."""
    (h, w), (p, q) = grid, part.window
    out = []
    for image in x:
        cells = torch.zeros(h + p, w + q, x.shape[2], dtype=x.dtype)
        cells[:h, :w] = image.unflatten(0, grid)
        rows = torch.zeros_like(cells)
        for i in range(0, h, p):
            for j in range(0, w, q):
                window = cells[i:i + p, j:j + q].flatten(0, 1)
                a, *b = part.qkv(window).chunk(3, dim=1)
                rows[i:i + p, j:j + q] = attend_by_hand(part, a, b).unflatten(0, (p, q))
        out.append(rows[:h, :w].flatten(0, 1))
    return torch.stack(out)


def subsampled_by_hand(part, x, grid):
    if part.sr is None:
        few = x
    else:
        p, q = part.step
        rows, across = grid[0] // p, grid[1] // q
        image = x.unflatten(1, grid)
        squares = [image[:, i * p:(i + 1) * p, j * q:(j + 1) * q] for i in range(rows) for j in range(across)]
        few = torch.stack([torch.einsum("bpqc,dcpq->bd", s, part.sr.weight) + part.sr.bias for s in squares], dim=1)
        few = F.layer_norm(few, few.shape[-1:], part.norm.weight, part.norm.bias, 1e-5)
    return torch.stack([attend_by_hand(part, part.q(a), part.kv(b).chunk(2, dim=1)) for a, b in zip(x, few, strict=True)])


@pytest.mark.parametrize(("part", "naive"), [
    (lambda: LocalAttention(6, Place(), heads=2, window=2), local_by_hand),
    (lambda: LocalAttention(6, Place(), heads=3, window=(3, 4)), local_by_hand),
    (lambda: SubsampledAttention(6, Place(), heads=2, step=2), subsampled_by_hand),
    (lambda: SubsampledAttention(6, Place(), heads=3, step=(1, 3)), subsampled_by_hand),
    (lambda: SubsampledAttention(6, Place(), heads=2, step=1), subsampled_by_hand),
])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_attention_by_hand(part, naive, grid):
    """Forward and backward, also where windows are filled up and strides leave a rest."""
    part = moved(part())
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = part(x, Ctx(grid=grid)), naive(part, x, grid)
    assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    inputs = (x, *part.parameters())
    assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)))


def naive_twins(model, images, norm_at):
    """The whole net: norms by their eps, a PEG after the first layer of each stage."""
    def norm(x, n, eps):
        norm_at.append(n.eps)
        return F.layer_norm(x, x.shape[-1:], n.weight, n.bias, eps)

    x, maps = images, []
    for s, stage in enumerate(model.stages):
        door = stage.resample if s else model.embedding
        x = F.conv2d(x, door.proj.weight, door.proj.bias, stride=door.proj.kernel_size)
        grid = tuple(x.shape[2:])
        x = norm(x.flatten(2).mT, door.norm, 1e-5)
        for i, layer in enumerate(stage.layers):
            inner = layer["mixer"].inner
            mix = local_by_hand if i % 2 == 0 else subsampled_by_hand
            x = x + mix(inner, norm(x, layer["mixer"].norm, 1e-6), grid)
            mlp = layer["channel"].inner
            x = x + mlp.fc2(F.gelu(mlp.fc1(norm(x, layer["channel"].norm, 1e-6))))
            if i == 0:
                conv = stage.position.conv
                image = x.mT.unflatten(2, grid)
                x = x + F.conv2d(image, conv.weight, conv.bias, padding=1, groups=conv.groups).flatten(2).mT
        x = x.mT.unflatten(2, grid)
        maps.append(x)
    return model.head(norm(x.flatten(2).mT, model.norm, 1e-6).mean(1)), maps


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"depths": (1, 3), "window": 3, "steps": (3, 2), "img_size": (28, 20)}])
def test_whole_net_by_hand(changes):
    model = moved(create_model("twins/nano", **changes))
    images, norms = model.example(2).double(), []
    logits, maps = naive_twins(model, images, norms)
    assert_close(model(images), logits)
    for feature, m in zip(model.features(images), maps, strict=True):
        assert_close(feature.map, m)
    assert set(norms) == {1e-5, 1e-6}


def test_mixers():
    """They take turns in each stage; PCPVT has but one; the last stage needs no convolution."""
    small = create_model("twins/nano")
    kinds = [[type(layer["mixer"].inner) for layer in stage.layers] for stage in small.stages]
    assert kinds == [[LocalAttention, SubsampledAttention]] * 2
    assert [stage.layers[1]["mixer"].inner.step for stage in small.stages] == [(2, 2), (1, 1)]
    assert "stages.0.layers.1.mixer.inner.sr.weight" in small.state_dict()
    assert "stages.1.layers.1.mixer.inner.sr.weight" not in small.state_dict()
    with torch.device("meta"):
        pcpvt = create_model("twins/pcpvt_small")
    assert {type(layer["mixer"].inner) for stage in pcpvt.stages for layer in stage.layers} == {SubsampledAttention}
    assert [i.channels for i in pcpvt.feature_info] == [64, 128, 320, 512]
    for name, one in (("local", LocalAttention), ("subsampled", SubsampledAttention)):
        model = create_model(f"twins/nano:mixers={name}")
        assert {type(layer["mixer"].inner) for stage in model.stages for layer in stage.layers} == {one}
        assert_close(load(model.state_dict(), "twins")(x := model.example(1)), model(x))


@pytest.mark.parametrize(("mixers", "seen"), [("local", 14), (("local", "subsampled"), 28)])
def test_what_a_corner_sees(mixers, seen):
    """In pixels, in the first stage, of patches of 2 in windows of 7: its window, and all with subsampled attention."""
    model = moved(create_model("twins/nano", mixers=mixers, peg=spec(NoPosition)))
    x = model.example(1).double().requires_grad_()
    model.features(x)[0].map[0, :, 0, 0].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached[:seen, :seen].all()
    assert not reached[seen:].any()
    assert not reached[:, seen:].any()


@pytest.mark.parametrize("size", [(28, 28), (27, 30), (41, 29)])
def test_feature_maps_of_any_size(size):
    model = create_model("twins/nano").eval()
    assert model.feature_info == [FeatureInfo(32, 2), FeatureInfo(64, 4)]
    first, second = (f.map.shape[2:] for f in model.features(torch.randn(1, 3, *size)))
    assert first == (-(-size[0] // 2), -(-size[1] // 2))
    assert second == (first[0] // 2, first[1] // 2)


def test_start():
    """Linear layers at 0.02, convolutions by their fan-out, which for a depthwise one is its nine weights."""
    model = create_model("twins/nano", dims=(128, 256), init_std=0.02)
    assert model.stages[1].layers[0]["channel"].inner.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[1].position.conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert model.stages[1].resample.proj.weight.std().item() == pytest.approx((2 / (4 * 256)) ** 0.5, rel=0.1)
    assert not model.stages[1].position.conv.bias.any()
    assert model.no_weight_decay() == {f"stages.{s}.position.conv.weight" for s in (0, 1)}


def test_peg():
    peg = moved(PEG(5, 0))
    x = torch.zeros(1, 12, 5, dtype=torch.float64)
    x[0, 0] = 1  # the corner
    out = (peg(x, Ctx(grid=(3, 4))) - x - peg.conv.bias).unflatten(1, (3, 4))[0]
    assert_close(out[0, 0], peg.conv.weight[:, 0, 1, 1])
    assert_close(out[1, 1], peg.conv.weight[:, 0, 0, 0])
    assert not out[2].any()
    assert not out[:, 3].any()


def test_settings():
    """Other sizes, from the tensors alone: layers of one stage more, windows alone, other strides and ratios."""
    changes = {"dims": (32, 64, 96), "depths": (1, 2, 3), "heads": (1, 2, 3), "ratios": (2.0, 4.0, 3.0), "steps": (1, 4, 2),
               "in_chans": 1, "patch": 4, "num_classes": 0}
    state = create_model("twins/nano", **changes).state_dict()
    theirs = KEYS["timm"].convert(state, back=True).state
    assert {"patch_embeds.2.norm.bias", "blocks.1.1.attn.sr.weight", "pos_block.0.proj.0.weight"} <= set(theirs)
    found = fit(theirs, "twins", "timm")
    assert found.error is None
    assert {k: found.told[k] for k in changes} == changes
    assert set(found.assumed) == {"heads", "window", "img_size"}


def test_what_does_not_fit():
    with pytest.raises(DoesNotFit, match=r"2 stages \(dims\) need as many depths, heads, ratios and steps"):
        create_model("twins/nano", depths=(2, 2, 2))
    with pytest.raises(DoesNotFit, match="each a layer at least"):
        create_model("twins/nano", depths=(2, 0))
    with pytest.raises(DoesNotFit, match="one token for each 8x8, the grid has 4x14; take a smaller step="):
        create_model("twins/nano", steps=(8, 1))(torch.randn(1, 3, 8, 28))
    with pytest.raises(DoesNotFit, match="7x7, the grid has 3x7; take a smaller step="):
        SubsampledAttention(8, Place())(torch.randn(1, 21, 8), Ctx(grid=(3, 7)))
    with pytest.raises(DoesNotFit, match="heads do not divide"):
        LocalAttention(8, Place(), heads=3)
    with pytest.raises(DoesNotFit, match="at least 2x2 here, got 1x4"):
        NormedMerging(8, 16)(torch.randn(1, 4, 8), Ctx(grid=(1, 4)))
