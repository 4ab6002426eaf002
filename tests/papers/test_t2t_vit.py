"""T2T-ViT against the authors' answers and naive twins: soft splits by hand, random features as a full matrix."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.papers.backbones.t2t_vit import KEYS, Sinusoids, TokenPerformer, TokensToToken, TokenTransformer
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double().eval()


def same_with_gradients(ours, theirs, inputs):
    assert_close(ours, theirs)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3))
    assert_close(*[torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in (ours, theirs)])


@pytest.mark.parametrize(("variant", "changes"), [("t2t_vit_7", {}), ("t2t_vit_7_token16", {"token_dim": 16})])
@torch.no_grad()
def test_authors_answers(variant, changes):
    """Found without a name, their sinusoids and random features as they stand in the file; written again."""
    state, inputs, golden = replay(GOLDEN / f"t2t_vit__{variant}.json.gz")
    model = load(state)
    assert model.recipe == {"name": "t2t_vit/7", "changes": changes}
    compare(golden, model(*inputs))
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert not theirs.unmatched
    assert all(torch.equal(theirs.state[k], t) for k, t in state.items())


@pytest.mark.parametrize("kind", [TokenPerformer, TokenTransformer])
def test_token_layers(kind):
    """Each as the full matrix of its weights, forward and backward."""
    torch.manual_seed(0)
    layer = moved(kind(27, 16))
    x = torch.randn(2, 9, 27, dtype=torch.float64, requires_grad=True)
    y = F.layer_norm(x, (27,), layer.norm1.weight, layer.norm1.bias)
    if kind is TokenPerformer:
        k, q, v = (y @ layer.kqv.weight.T + layer.kqv.bias).split(16, dim=-1)

        def phi(z):
            return torch.exp(torch.einsum("md,bnd->bnm", layer.w, z) - (z * z).sum(-1, keepdim=True) / 2) / 8**0.5

        weights = phi(q) @ phi(k).transpose(1, 2)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    else:
        q, k, v = (y @ layer.qkv.weight.T).split(16, dim=-1)
        weights = (q @ k.transpose(1, 2) / 27**0.5).softmax(-1)
    out = v + weights @ v @ layer.proj.weight.T + layer.proj.bias
    out = out + layer.mlp(F.layer_norm(out, (16,), layer.norm2.weight, layer.norm2.bias), Ctx())
    same_with_gradients(layer(x), out, [x, *layer.parameters()])


def test_random_features_are_of_the_softmax_kernel():
    """The mean over many features of phi(x) phi(y) is exp(x.y)."""
    torch.manual_seed(0)
    layer = TokenPerformer(8, 8)
    layer.w = torch.randn(200_000, 8)
    x, y = (0.5 * torch.randn(1, 4, 8) for _ in range(2))
    assert_close(layer.features(x) @ layer.features(y).transpose(1, 2), (x @ y.transpose(1, 2)).exp(), rtol=0.05, atol=0.02)
    rows = TokenPerformer(8, 8).w
    assert_close(rows @ rows.T, 4 * torch.eye(4))


def by_hand(x, k, s):
    """Soft split: a token for each window, its channels one after the other."""
    x = F.pad(x, (s // 2,) * 4)
    rows, columns = range(0, x.shape[2] - k + 1, s), range(0, x.shape[3] - k + 1, s)
    return torch.stack([x[:, :, r:r + k, c:c + k].flatten(1) for r in rows for c in columns], dim=1)


@pytest.mark.parametrize(("tokens", "strides"), [
    ("performer", (4, 2, 2)), ("transformer", (2, 2)), ("performer", (3, 1, 2)), ("convolution", (4, 2, 2))])
def test_tokens_to_token(tokens, strides):
    """Any number of splits, images that are not square; a split and a linear layer are a convolution."""
    torch.manual_seed(0)
    stem = moved(TokensToToken(2, 12, img_size=(48, 96), tokens=tokens, token_dim=8, strides=strides))
    x = images = torch.randn(2, 2, 48, 96, dtype=torch.float64)
    for layer, s in zip((*stem.layers, stem.project), strides, strict=True):
        grid = (x.shape[2] // s, x.shape[3] // s)
        y = by_hand(x, 2 * s - 1, s)
        y = y @ layer.weight.flatten(1).T + layer.bias if tokens == "convolution" else layer(y)
        x = y.transpose(1, 2).unflatten(2, grid)
    out, ctx = stem(images, Ctx())
    assert (ctx.grid, ctx.prefix) == (tuple(x.shape[2:]), 1)
    assert_close(out[:, 1:], x.flatten(2).transpose(1, 2) + stem.position.table[:, 1:])
    assert_close(out[:, :1], (stem.cls + stem.position.table[:, :1]).expand(2, 1, -1))


def test_sinusoids():
    """sin and cos of n / 10000^(2i/d) in turn, stored and not trained."""
    position = Sinusoids(6, 5)
    for n in range(5):
        for i in range(3):
            angle = torch.tensor(n / 10000 ** (2 * i / 6))
            assert_close(position.table[0, n, 2 * i:2 * i + 2], torch.stack((angle.sin(), angle.cos())))
    assert not list(position.parameters())


@pytest.mark.parametrize("tokens", ["performer", "transformer", "convolution"])
def test_files_of_each_kind(tokens):
    """What relates the tokens is told from the file, the scale of the scores is not: it is an option."""
    torch.manual_seed(0)
    model = moved(create_model("t2t_vit/nano", tokens=tokens, qk_scale=64**-0.5)).float()
    theirs = KEYS["authors"].convert(model.state_dict(), back=True).state
    named = {"performer": "attention1.mlp.0", "transformer": "attention1.attn.proj", "convolution": "soft_split0"}
    assert f"tokens_to_token.{named[tokens]}.bias" in theirs
    batch = model.example(2)
    assert torch.equal(load(theirs, qk_scale=64**-0.5)(batch), model(batch))
    assert not torch.allclose(load(theirs)(batch), model(batch), atol=1e-3)
    assert load(theirs, in_chans=1, img_size=(32, 40), num_classes=3).eval()(torch.randn(1, 1, 32, 40)).shape == (1, 3)


def test_dropped_tokens():
    """The authors' dropout of the token layers acts in training alone."""
    torch.manual_seed(0)
    model = create_model("t2t_vit/nano", token_drop=0.5)
    batch = model.example(2)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


def test_bad_inputs():
    with pytest.raises(UnknownName, match=r"performers.*did you mean performer"):
        create_model("t2t_vit/nano", tokens="performers")
    with pytest.raises(DoesNotFit, match=r"soft splits needs image sides .* 16x16, got 230x224; the nearest: 224x224"):
        create_model("t2t_vit/7", img_size=(230, 224))
    with pytest.raises(DoesNotFit, match=r"28x28, got 32x32.*img_size="):
        create_model("t2t_vit/nano")(torch.randn(1, 3, 32, 32))
    with pytest.raises(DoesNotFit, match="one whole number for each soft split"):
        create_model("t2t_vit/nano", strides=())
    with pytest.raises(DoesNotFit, match="qk_scale= is a factor on its scores"):
        create_model("t2t_vit/nano", mixer="identity", qk_scale=1.0)
