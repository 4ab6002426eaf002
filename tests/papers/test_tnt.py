"""TNT against its equations word by word; sizes, features; the reference's answers and names (timm, authors)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.errors import DoesNotFit
from formarium.core.model import count_parameters
from formarium.weights.load import load
from formarium.weights.save import in_layout
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "tnt__tnt_s_legacy_patch16_224.json.gz"
SMALL = {"dim": 16, "word_dim": 8, "depth": 2, "heads": 2, "img_size": 12, "num_classes": 3}


def moved(**changes):
    """In float64, at parameters away from their start."""
    torch.manual_seed(0)
    model = create_model("tnt/nano", **SMALL | changes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def attention(x, part):
    """One token after the other."""
    dim = x.shape[-1]
    q, k, v = (F.linear(x, w) for w in part.qkv.weight.split(dim))
    out = []
    for i in range(0, dim, dim // part.heads):
        head = slice(i, i + dim // part.heads)
        weights = (q[..., head] @ k[..., head].mT / (dim // part.heads) ** 0.5).softmax(-1)
        out.append(weights @ v[..., head])
    return part.proj(torch.cat(out, -1))


def branch(x, residual):
    """What a pre-norm branch adds."""
    inner, x = residual.inner, residual.norm(x)
    return attention(x, inner) if hasattr(inner, "qkv") else inner.fc2(F.gelu(inner.fc1(x)))


def naive(model, images, legacy):
    """Sentence by sentence; the class token apart."""
    embed, side = model.embedding, model.embedding.patch[0]
    whole, cells = embed.proj(images), side // embed.stride
    words = []
    for y in range(0, images.shape[2], side):
        for x in range(0, images.shape[3], side):
            if legacy:
                top, left = y // embed.stride, x // embed.stride
                patch = whole[:, :, top:top + cells, left:left + cells]
            else:
                patch = embed.proj(images[:, :, y:y + side, x:x + side])
            words.append(patch.flatten(2).mT + embed.word_position.table[0])

    def gather(w, by):
        w = w.flatten(1) if by.norm2 is not None else by.norm1(w).flatten(1)
        return by.proj(w) if by.norm2 is None else by.norm2(by.proj(by.norm1(w)))

    z = torch.stack([gather(w, embed.gather) for w in words], 1)
    z = torch.cat((embed.cls.expand(len(images), -1, -1), z), 1) + embed.position.table
    for layer in model.stages[0].layers:
        inner = layer.words.inner
        for i, w in enumerate(words):
            w = w + branch(w, inner.mixer)  # Eq. 5
            words[i] = w + branch(w, inner.channel)  # Eq. 6
        z = z + torch.stack([torch.zeros_like(z[:, 0])] + [gather(w, inner.gather) for w in words], 1)  # Eq. 7
        z = z + branch(z, layer.mixer)  # Eq. 8
        z = z + branch(z, layer.channel)  # Eq. 9
    return model.head(model.norm(z[:, 0])), words


@pytest.mark.parametrize("size", [(12, 12), (8, 12)])
@pytest.mark.parametrize("legacy", [False, True])
def test_against_the_equations(legacy, size):
    """Answers, and gradients of all parameters; the words are those that `word_features` gives."""
    model = moved(legacy=legacy, img_size=size)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    theirs, words = naive(model, images, legacy)
    ours = model(images)
    assert_close(ours, theirs)
    weight, inputs = torch.randn_like(theirs), list(model.parameters())
    assert_close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), atol=1e-9, rtol=1e-6)
    found = model.word_features(images)
    assert (found.stride, found.map.shape) == (2, (2, 8, size[0] // 2, size[1] // 2))
    for i, w in enumerate(words):
        y, x = i // (size[1] // 4) * 2, i % (size[1] // 4) * 2
        assert_close(found.map[:, :, y:y + 2, x:x + 2].flatten(2).mT, w)


@torch.no_grad()
def test_words_see_their_own_sentence_alone():
    """A changed pixel changes the words of its patch; with a convolution over the whole image also those nearby."""
    for legacy, far in ((False, False), (True, True)):
        model = moved(legacy=legacy).eval()
        images = torch.randn(1, 3, 12, 12, dtype=torch.float64)
        other = images.clone()
        other[..., 3, 3] += 1
        changed = (model.word_features(images).map != model.word_features(other).map).any(1)[0]
        assert changed[:2, :2].any()
        assert changed[:2, 2:4].any().item() is far
        assert not changed[4:].any()


def test_words_in_one_call():
    """All sentences of all images are one batch of each inner attention."""
    model, seen = moved().eval(), []
    model.stages[0].layers[0].words.inner.mixer.inner.qkv.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    model(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    assert seen == [(2 * 9, 4, 8)]


def test_other_resolutions():
    """Files of one size load at any other that is a multiple of the patch, with resized positions."""
    state = create_model("tnt/nano").state_dict()
    model = load(state, img_size=(32, 20))
    assert model(torch.randn(1, 3, 32, 20)).shape == (1, 1000)
    assert model.embedding.position.table.shape[1] == 1 + 8 * 5
    assert torch.equal(model.embedding.word_position.table, state["embedding.word_position.table"])
    with pytest.raises(DoesNotFit, match="the nearest: 32x20 or 32x24"):
        create_model("tnt/nano", img_size=(32, 22))
    with pytest.raises(DoesNotFit, match="no whole number of words that are 3 apart"):
        create_model("tnt/nano", stride=3)


# the references


@torch.no_grad()
def test_golden():
    state, inputs, golden = replay(GOLDEN)  # tnt_s_legacy_patch16_224
    model = load(state)
    assert (model.recipe["name"], count_parameters(model)) == ("tnt/small_legacy", golden["parameters"])
    compare(golden, model(*inputs))


@pytest.mark.parametrize("layout", ["timm", "authors"])
@torch.no_grad()
def test_their_files(layout):
    """Queries, keys and values in the right order; without a name said, with the sizes that the tensors cannot tell."""
    model = create_model("tnt/nano", in_chans=1, num_classes=5, qkv_bias=True).eval()
    state, batch = in_layout(model, layout), model.example(2)
    qkv = model.stages[0].layers[1]["mixer"].inner.qkv
    theirs = {"timm": "blocks.1.attn_out", "authors": "blocks.1.outer_attn"}[layout]
    for kind in ("weight", "bias"):
        assert torch.equal(state[f"{theirs}.qk.{kind}"], getattr(qkv, kind)[:96])
        assert torch.equal(state[f"{theirs}.v.{kind}"], getattr(qkv, kind)[96:])
    if layout == "timm":
        assert torch.equal(state["pixel_pos"].flatten(2).mT, model.embedding.word_position.table)
    else:
        assert state["outer_tokens"].shape == (1, 49, 48)
    assert_close(load(state)(batch), model(batch))
