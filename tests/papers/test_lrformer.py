"""LRSA and L2 attention against their definitions; what the contraction means; the random-feature head; swapped by name."""

import math

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.transform import apply
from formarium.papers.mixers.lrformer import LRSA, L2Attention, RandomFeatureHead
from formarium.weights.load import load


def moved(model):
    """Parameters away from their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def weights(layer, x, seen=None):
    """(B, heads, N, N) by the definition, token by token."""
    b, n, _ = x.shape
    k = layer.kv(x)[..., :layer.dim].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    seen = torch.ones(b, n, dtype=torch.bool) if seen is None else seen
    rows = []
    for i in range(b):
        real = [t for t in range(n) if seen[i, t]]
        for h in range(layer.heads):
            if isinstance(layer, LRSA):
                frobenius = sum(k[i, h, t].square().sum() for t in real).sqrt()
                s = layer.alpha / (frobenius * max(x[i, t].norm() for t in real))
            else:
                s = 1 / math.sqrt(layer.dim / layer.heads)
            scores = torch.stack([torch.stack([-s * (k[i, h, p] - k[i, h, t]).square().sum() if seen[i, t]
                                               else torch.tensor(-math.inf, dtype=x.dtype) for t in range(n)])
                                  for p in range(n)])
            rows.append(scores.softmax(-1))
    return torch.stack(rows).unflatten(0, (b, layer.heads))


def naive(layer, x, seen=None):
    v = layer.kv(x)[..., layer.dim:].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    return layer.proj((weights(layer, x, seen) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("make", [L2Attention, LRSA])
@pytest.mark.parametrize("bias", [False, True])
def test_by_definition(make, bias):
    """Answers and gradients, with keys hidden and without."""
    layer = moved(make(12, Place(), heads=3, kv_bias=bias)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([[True] * 5, [True, True, True, False, False]])
    along = torch.randn(2, 5, 12, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    for given, ctx in ((None, Ctx()), (seen, Ctx(mask=seen[:, None, None]))):
        ours, expected = layer(x, ctx), naive(layer, x, given)
        assert_close(ours, expected)
        grads = [torch.autograd.grad((out * along).sum(), inputs) for out in (ours, expected)]
        assert_close(*grads)


def test_hidden_keys_change_nothing():
    layer = moved(LRSA(8, Place(), heads=2)).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    padded = torch.cat((x, 50 * torch.randn(1, 3, 8, dtype=torch.float64)), dim=1)
    mask = torch.tensor([True] * 4 + [False] * 3)[None, None, None]
    assert_close(layer(padded, Ctx(mask=mask))[:, :4], layer(x, Ctx()))


def test_packed_rows():
    layer = moved(LRSA(8, Place(), heads=2)).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    alone = torch.cat([layer(part, Ctx()) for part in x.split([3, 4], dim=1)], dim=1)
    assert_close(layer(x, Ctx(lengths=(3, 4))), alone)


# what the contraction means


def test_scaled_tokens_weigh_the_same():
    """The divisor grows as the distances do, where those of L2 attention grow without bound."""
    lipschitz, plain = LRSA(8, Place(), heads=2).double(), L2Attention(8, Place(), heads=2).double()
    plain.load_state_dict(lipschitz.state_dict())
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    assert_close(weights(lipschitz, 100 * x), weights(lipschitz, x))
    assert weights(plain, 100 * x).amax(-1).min() > 0.99
    assert_close(lipschitz(100 * x, Ctx()) - lipschitz.proj.bias, 100 * (lipschitz(x, Ctx()) - lipschitz.proj.bias))


def test_a_token_weighs_itself_most():
    """Its distance to itself is zero: as queries are keys."""
    for layer in (LRSA(8, Place(), heads=2), L2Attention(8, Place(), heads=2)):
        found = weights(layer, torch.randn(2, 6, 8))
        assert (found.argmax(-1) == torch.arange(6)).all()


def test_the_bound_on_the_scores():
    """No score is below -4 alpha ||W||, whatever the image: ||q_i - k_j|| <= 2 max ||q||, ||q|| <= ||W|| ||x||."""
    layer = LRSA(8, Place(), heads=2, alpha=5.0)
    for size in (0.1, 1, 1000):
        x = size * torch.randn(1, 6, 8)
        logs = weights(layer, x).log()
        for h, w in enumerate(layer.kv.weight[:8].unflatten(0, (2, 4))):
            lowest = (logs[0, h] - logs[0, h].diagonal()[:, None]).min()
            assert -4 * 5.0 * torch.linalg.matrix_norm(w, 2) <= lowest < 0


def test_small_alpha_is_the_mean():
    layer = LRSA(8, Place(), heads=2, alpha=1e-6)
    assert_close(weights(layer, torch.randn(1, 5, 8)), torch.full((1, 2, 5, 5), 0.2), atol=1e-5, rtol=0)


# by name


@pytest.mark.parametrize("name", ["vit/nano:mixer=lrformer(alpha=10)", "vit/nano:mixer=l2,pool=mean",
                                  "poolformer/nano:mixers=(pooling,lrformer)", "itransformer/nano:mixer=lrformer"])
def test_swapped_by_name(name):
    model = create_model(name)
    model(model.example(2)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(isinstance(m, L2Attention) for m in model.modules()) > 0
    assert from_recipe(model.recipe).recipe == model.recipe


def test_what_does_not_fit():
    for name in ("lrformer", "l2"):
        with pytest.raises(DoesNotFit, match="no token may see a later one, and it has no option 'causal'"):
            create_model(f"gpt/nano:mixer={name}")
        with pytest.raises(DoesNotFit, match="Rotary works on the scores"):
            create_model(f"vit/nano:mixer={name},position=rotary")
    with pytest.raises(DoesNotFit, match="alpha is above zero, got 0"):
        LRSA(8, Place(), alpha=0)
    layer, x = LRSA(8, Place()), torch.randn(1, 3, 8)
    with pytest.raises(DoesNotFit, match="not single pairs"):
        layer(x, Ctx(mask=torch.ones(1, 1, 3, 3, dtype=torch.bool)))
    with pytest.raises(DoesNotFit, match="no causal form"):
        layer(x, Ctx(cache=Cache()))


def test_zeros_are_taken():
    layer = LRSA(8, Place())
    x = torch.zeros(1, 3, 8, requires_grad=True)
    layer(x, Ctx()).sum().backward()
    assert x.grad.isfinite().all()


# the head


def test_random_features_are_the_kernel():
    """Products of features tend to exp(-||a - b||^2 / 2 length^2)."""
    head = RandomFeatureHead(6, 3, 40000, 1.7)
    a, b = torch.randn(2, 5, 6)
    expected = (-(a - b).square().sum(-1) / 2 / 1.7**2).exp()
    assert_close((head.features(a) * head.features(b)).sum(-1), expected, atol=0.03, rtol=0)


def test_the_head_takes_the_place_of_the_linear_one(tmp_path):
    model = create_model("lrformer/nano+lrformer(features=32)", num_classes=5).eval()
    assert isinstance(model.head, RandomFeatureHead)
    assert [n for n, _ in model.head.named_parameters()] == ["beta.weight", "beta.bias"]  # the features are frozen
    x = model.example(2)
    assert model(x).shape == (2, 5)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.recipe == model.recipe
    assert_close(again(x), model(x), atol=0, rtol=0)
    for host in ("vit/nano", "swin/nano", "poolformer/nano"):
        assert isinstance(apply(create_model(host), "lrformer").head, RandomFeatureHead)
    two = apply(create_model("deit/nano"), "lrformer")  # both of its classifiers
    assert isinstance(two.head, RandomFeatureHead)
    assert isinstance(two.head_dist, RandomFeatureHead)
    with pytest.raises(DoesNotFit, match="an image backbone with a linear classifier"):
        apply(create_model("gpt/nano"), "lrformer")
    with pytest.raises(DoesNotFit, match="features are 1 or more"):
        apply(create_model("vit/nano"), "lrformer", features=0)


@torch.no_grad()
def test_loads_by_its_tensors():
    model = moved(create_model("lrformer/nano")).eval()
    again = load(model.state_dict())
    assert again.recipe["name"] == "lrformer/nano"
    x = model.example(2)
    assert torch.equal(again(x), model(x))
    biased = moved(create_model("vit/nano:mixer=lrformer(kv_bias=True,bias=False)")).eval()
    assert torch.equal(load(biased.state_dict(), "lrformer")(x), biased(x))
