"""Augmented shortcuts: the circulant product in both forms, the sum, diversity, the authors' answers and names."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.residuals import augvit
from formarium.papers.residuals.augvit import (
    FOURIER_BLOCK,
    KEYS,
    AugmentedShortcut,
    CirculantLinear,
    block_circulant,
    circulant_matrix,
    feature_diversity,
)
from formarium.parts.attention import Attention
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "augvit__augvit_small_circulant2.json.gz"


def moved(model):
    """Parameters away from their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


# the circulant product


def test_the_matrix_is_made_of_circulant_blocks():
    w = torch.randn(3, 2, 5)
    blocks = [[scipy.linalg.circulant(w[r, c].numpy()) for c in range(2)] for r in range(3)]
    assert_close(circulant_matrix(w), torch.from_numpy(np.block(blocks)))


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_fourier_form_is_the_matrix(size):
    """Answers and gradients, of odd and even blocks, of any leading axes."""
    w = torch.randn(4, 3, size, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 3 * size, dtype=torch.float64, requires_grad=True)
    along = torch.randn(2, 5, 4 * size, dtype=torch.float64)
    ours, naive = augvit._fourier(x, w), F.linear(x, circulant_matrix(w))
    assert_close(ours, naive)
    assert_close(torch.autograd.grad((ours * along).sum(), (x, w)), torch.autograd.grad((naive * along).sum(), (x, w)))
    assert_close(augvit._dense(x, w), naive)


def test_size_decides_the_form(monkeypatch):
    taken = []
    for form in ("_fourier", "_dense"):
        own = getattr(augvit, form)
        monkeypatch.setattr(augvit, form, lambda x, w, own=own, form=form: (taken.append(form), own(x, w))[1])
    for size in (FOURIER_BLOCK - 1, FOURIER_BLOCK):
        block_circulant(torch.randn(1, 2 * size), torch.randn(2, 2, size))
    assert taken == ["_dense", "_fourier"]


def test_large_blocks_in_bfloat16():
    layer = CirculantLinear(4 * FOURIER_BLOCK)
    x = torch.randn(2, 3, 4 * FOURIER_BLOCK)
    exact, rounded = layer(x), layer.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_a_layer_has_blocks_times_its_width():
    assert count_parameters(CirculantLinear(96, 4)) == 4 * 96 + 96
    with pytest.raises(DoesNotFit, match="96 does not divide into 5 blocks"):
        CirculantLinear(96, 5)


# the sum


@pytest.mark.parametrize(("paths", "scale"), [(0, 1.0), (1, 1.0), (2, 0.75), (3, 0.6)])
@pytest.mark.parametrize("mode", ["linear", "circulant"])
def test_the_sum(paths, scale, mode):
    residual = moved(AugmentedShortcut(8, Place(), Attention(8, Place()), paths=paths, mode=mode, blocks=2))
    x = torch.randn(2, 5, 8)
    n = residual.norm(x)
    out = x + residual.inner(n, Ctx())
    for path in residual.paths:
        theta = path.weight if mode == "linear" else circulant_matrix(path.weight)
        y = n @ theta.T + path.bias
        out = out + (F.gelu(y) if paths > 1 else y)
    assert_close(residual(x, Ctx()), out * scale)


def test_gelu_can_be_chosen():
    for paths, gelu in ((1, True), (2, False)):
        given = AugmentedShortcut(8, Place(), Attention(8, Place()), paths=paths, gelu=gelu)
        usual = AugmentedShortcut(8, Place(), Attention(8, Place()), paths=paths)
        usual.load_state_dict(given.state_dict())
        x = torch.randn(1, 3, 8)
        assert not torch.allclose(given(x, Ctx()), usual(x, Ctx()))


def test_any_host_by_name():
    for name in ("vit/nano:residual=augvit(paths=1,mode=linear)", "swin/nano:residual=augvit(paths=3,blocks=8)",
                 "poolformer/nano:residual=augvit", "gpt/nano:residual=augvit(blocks=2)"):
        model = create_model(name)
        model(model.example(1)).logsumexp(1).sum().backward()
        shortcuts = [m for m in model.modules() if isinstance(m, AugmentedShortcut)]
        assert shortcuts
        assert all(p.grad.any() for m in shortcuts for p in m.paths.parameters())
        assert from_recipe(model.recipe).recipe == model.recipe


def test_drop_path_leaves_the_paths():
    """Of a deepest layer that is always dropped, the identity and the paths remain."""
    residual = AugmentedShortcut(8, Place(1, 2), Attention(8, Place()), drop_path=1 - 1e-6).train()
    x = torch.randn(4, 3, 8)
    n = residual.norm(x)
    assert_close(residual(x, Ctx()), 0.75 * (x + sum(F.gelu(p(n)) for p in residual.paths)))


def test_what_does_not_fit():
    with pytest.raises(UnknownName, match="did you mean circulant"):
        create_model("augvit/nano", residual=spec(AugmentedShortcut, mode="circular"))
    with pytest.raises(DoesNotFit, match="0 or more, got -1"):
        create_model("augvit/nano", residual=spec(AugmentedShortcut, paths=-1))


def test_vectors_are_not_decayed():
    model = create_model("augvit/nano")
    assert {n for n in model.no_weight_decay() if "paths" in n} == {
        n for n, p in model.named_parameters() if "paths" in n and p.ndim == 3}


# diversity


@pytest.mark.parametrize("name", ["augvit/nano", "vit/nano:pool=mean", "swin/nano"])
def test_diversity_of_each_layer(name):
    model = moved(create_model(name)).train()
    x = model.example(3)
    found, shares = feature_diversity(model, x), feature_diversity(model, x, relative=True)
    assert len(found) == len(shares) == sum(s.depth for s in model.stages)
    assert model.training
    model.eval()
    (tokens, ctx), expected = model.embed(x), []
    for stage in model.stages:
        for i in range(stage.depth):
            z = stage.intermediates(tokens, ctx, [i])[2][0].detach()
            expected.append([(one - one.mean(0)).square().sum().sqrt().item() for one in z])
        tokens, ctx = stage(tokens, ctx)
    assert_close(torch.tensor(found), torch.tensor(expected).mean(1), rtol=1e-4, atol=1e-5)
    assert all(0 < s <= 1 for s in shares)


def test_tokens_that_are_alike_have_no_diversity():
    model = create_model("vit/nano:pool=mean,position=none").double()
    assert max(feature_diversity(model, torch.ones(2, 3, 28, 28, dtype=torch.float64), relative=True)) < 1e-7


# the authors' answers and names


@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN)
    model = load(state)
    assert model.recipe == {"name": "augvit/small_circulant2", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    assert compare(golden, model(x)) < 3e-5


@torch.no_grad()
@pytest.mark.parametrize("options", ["", "mode=linear", "paths=1", "paths=1,mode=linear", "blocks=8"])
def test_their_models(options):
    """In their names and with the indices that their loader asks for, and without those."""
    model = moved(create_model(f"augvit/nano:residual=augvit({options})"))
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    indices = {k: v for k, v in theirs.state.items() if k.endswith("index_matrix")}
    assert len(indices) == (0 if "linear" in options else 8 if "paths=1" in options else 16)
    for name, index in indices.items():
        n = name.removesuffix("index_matrix")
        i, kind = int(n.split(".")[1]), "mixer" if "attn" in n else "channel"
        path = model.stages[0].layers[i].__getitem__(kind).paths[1 if "2." in n.replace(f".{i}.", ".", 1) else 0]
        assert torch.equal(theirs.state[f"{n}weight_list"][index], circulant_matrix(path.weight))
    x = model.example(2)
    for state in (theirs.state, {k: v for k, v in theirs.state.items() if k not in indices}):
        again = load(state, "augvit")
        assert torch.equal(again(x), model(x))
