"""Attention as two dynamic 1x1 convolutions; activations of the scores by their definitions; the depth-wise form."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.spec import spec
from formarium.papers.backbones.swin import WindowAttention
from formarium.papers.mixers import vit_as_dynamic_conv as paper
from formarium.papers.mixers.vit_as_dynamic_conv import (
    EPS,
    DynamicConv,
    DynamicConvWindow,
    ScoreActivation,
    convolution_gap,
    two_convolutions,
)
from formarium.parts.attend import attend
from formarium.parts.attention import Attention, watching
from formarium.weights.load import load

NAMES = ("softmax", "relu_ln", "relu_n", "gelu_ln")


def moved(model):
    """Parameters away from their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def heads(n=5, m=7, d=4):
    return [torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True) for shape in ((n, d), (m, d), (m, d))]


def naive(activation, scores, seen):
    """Row by row, over the keys that are seen."""
    out = torch.zeros_like(scores)
    b, h, n, m = scores.shape
    for at in itertools.product(range(b), range(h), range(n)):
        keys = [j for j in range(m) if seen.expand(scores.shape)[*at, j]]
        row = scores[at][keys]
        if activation.name == "softmax":
            row = row.exp() / row.exp().sum()
        else:
            row = row.clamp_min(0) if "relu" in activation.name else row * 0.5 * (1 + torch.erf(row / math.sqrt(2)))
            if activation.gain is not None:
                row = F.layer_norm(row, row.shape, eps=EPS) * activation.gain[at[1]] + activation.shift[at[1]]
            row = row / len(keys)
        out[*at, keys] = row
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [False, True])
def test_activations(name, hidden):
    """Weights, and the outputs with a bias and a mask, forward and backward."""
    activation = moved(ScoreActivation(name, 3)).double()
    q, k, v = heads()
    bias = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    seen = torch.rand(2, 1, 5, 7) < 0.6 if hidden else torch.ones(1, 1, 5, 7, dtype=torch.bool)
    seen[..., 0] = True
    ours = activation.mix(q, k, v, scale=0.3, bias=bias, mask=seen if hidden else None)
    expected = naive(activation, q @ k.transpose(-2, -1) * 0.3 + bias, seen) @ v
    assert_close(ours, expected)
    along, inputs = torch.randn_like(ours), (q, k, v, bias, *activation.parameters())
    assert_close(*(torch.autograd.grad((out * along).sum(), inputs) for out in (ours, expected)))
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert_close(activation(scores, seen), naive(activation, scores, seen))


@pytest.mark.parametrize("name", ["softmax", "relu_ln", "gelu_ln"])
def test_rows_sum_to_one_at_the_start(name):
    weights = ScoreActivation(name, 3).double()(torch.randn(2, 3, 5, 7, dtype=torch.float64))
    assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["relu_ln", "relu_n"])
def test_depthwise_forms_no_map(name):
    """The O(N) form of single channels equals the map, forward and backward; of negative and zero queries too."""
    activation = moved(ScoreActivation(name, 3)).double()
    q, k, v = heads(d=1)
    with torch.no_grad():
        q[:, :, 0] = 0
    ours = activation.mix(q, k, v, scale=0.7)
    expected = activation(q * 0.7 @ k.transpose(-2, -1)) @ v
    assert_close(ours, expected)
    along, inputs = torch.randn_like(ours), (q, k, v, *activation.parameters())
    assert_close(*(torch.autograd.grad((out * along).sum(), inputs) for out in (ours, expected)))


# the reading as convolutions


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_two_dynamic_convolutions(name):
    activation = moved(ScoreActivation(name, 3)).double()
    q, k, v = heads()
    bias = torch.randn(3, 5, 7, dtype=torch.float64)
    for given in (None, bias):
        ours = two_convolutions(q, k, v, activation, scale=0.4, bias=given)
        expected = activation.mix(q, k, v, scale=0.4, bias=given)
        assert_close(ours, expected)
        along = torch.randn_like(ours)
        assert_close(*(torch.autograd.grad((out * along).sum(), (q, k, v)) for out in (ours, expected)))
    assert_close(two_convolutions(q, k, v, lambda s: s.softmax(-1)), attend(q, k, v))


def test_window_attention_is_the_same_on_a_local_map():
    attention, found = WindowAttention(8, Place(), heads=2, window=4).double(), []
    own = attention.mix
    attention.mix = lambda q, k, v, bias, *where: (  # each window is an image of its own
        found.append((two_convolutions(q, k, v, lambda s: s.softmax(-1), bias=bias), own(q, k, v, bias, *where)))
        or found[-1][1])
    attention(torch.randn(2, 64, 8, dtype=torch.float64), Ctx(grid=(8, 8)))
    assert_close(*found[0])


def test_the_check_on_a_model(monkeypatch):
    model = moved(create_model("vit/nano")).eval()
    gaps = convolution_gap(model, model.example(2))
    assert len(gaps) == 4
    assert max(gaps) < 1e-4
    double = model.double()
    assert max(convolution_gap(double, double.example(2).double())) < 1e-12
    monkeypatch.setattr(paper, "two_convolutions", lambda q, *rest, **told: torch.zeros_like(q))
    assert min(convolution_gap(double, double.example(2).double())) > 0.01
    with pytest.raises(DoesNotFit, match="no global softmax attention"):
        convolution_gap(create_model("swin/nano"), torch.randn(1, 3, 28, 28))


# by name


@torch.no_grad()
def test_softmax_is_attention():
    """With softmax the layer is the shelf's, and Swin's."""
    ours = DynamicConv(8, Place(), heads=2, score_activation="softmax")
    theirs = Attention(8, Place(), heads=2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 8)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    for ctx in (Ctx(), Ctx(mask=mask)):
        assert_close(ours(x, ctx), theirs(x, ctx))
    for shifted in (False, True):
        ours = moved(DynamicConvWindow(8, Place(), heads=2, window=3, shifted=shifted, score_activation="softmax"))
        theirs = WindowAttention(8, Place(), heads=2, window=3, shifted=shifted)
        theirs.load_state_dict(ours.state_dict())
        assert_close(ours(x[:, :9].repeat(1, 4, 1), Ctx(grid=(6, 6))), theirs(x.repeat(1, 4, 1), Ctx(grid=(6, 6))))


@torch.no_grad()
def test_what_a_shifted_window_hides_weighs_nothing():
    for name in NAMES:
        layer = moved(DynamicConvWindow(8, Place(), heads=2, window=4, shifted=True, score_activation=name))
        x = torch.randn(1, 64, 8)
        far = x.clone().view(8, 8, 8)
        far[0, 0] += 5  # the upper left corner, wrapped into the window of the lower right one
        out, changed = layer(x, Ctx(grid=(8, 8))), layer(far.view(1, 64, 8), Ctx(grid=(8, 8)))
        assert_close(out[0, -1], changed[0, -1])
        assert not torch.allclose(out[0, 1], changed[0, 1])


@torch.no_grad()
def test_hidden_and_packed_tokens():
    for name in NAMES:
        layer = moved(DynamicConv(8, Place(), heads=2, score_activation=name)).double()
        x = torch.randn(1, 7, 8, dtype=torch.float64)
        mask = torch.tensor([True] * 4 + [False] * 3)[None, None, None]
        assert_close(layer(x, Ctx(mask=mask))[:, :4], layer(x[:, :4], Ctx()))
        assert_close(layer(x, Ctx(lengths=(3, 4))), torch.cat([layer(part, Ctx()) for part in x.split([3, 4], 1)], dim=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("host", "part"), [("vit", "vit_as_dynamic_conv"), ("swin", "dynamic_conv_window")])
def test_any_vit_and_swin(name, depthwise, host, part):
    model = create_model(f"{host}/nano:mixer={part}(score_activation={name},depthwise={depthwise})")
    model(model.example(1)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    mixers = [m for m in model.modules() if isinstance(m, DynamicConv | DynamicConvWindow)]
    assert [m.heads == m.dim for m in mixers] == [depthwise] * 4
    assert from_recipe(model.recipe).recipe == model.recipe


def test_positions_on_scores():
    model = create_model("vit/nano:mixer=vit_as_dynamic_conv,position=fire").eval()
    assert model(model.example(1)).isfinite().all()
    turned = create_model("vit/nano:mixer=vit_as_dynamic_conv,position=rotary").eval()
    assert turned(turned.example(1)).isfinite().all()


def test_what_does_not_fit():
    with pytest.raises(UnknownName, match="unknown score activation 'relu'; did you mean relu_n"):
        create_model("vit/nano", mixer=spec(DynamicConv, score_activation="relu"))
    with pytest.raises(DoesNotFit, match="no token may see a later one, and it has no option 'causal'"):
        create_model("gpt/nano:mixer=vit_as_dynamic_conv")
    with pytest.raises(DoesNotFit, match="changes the scores in a way of its own"), watching(DynamicConv(8, Place())):
        pass


@torch.no_grad()
@pytest.mark.parametrize("options", ["", "depthwise=True"])
def test_loads_by_its_tensors(options):
    model = moved(create_model(f"vit/nano:mixer=vit_as_dynamic_conv({options})")).eval()
    again = load(model.state_dict(), "vit_as_dynamic_conv")
    x = model.example(2)
    assert torch.equal(again(x), model(x))
