"""iTransformer: the authors' answers and names, and what its tokens promise."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.model import count_parameters
from formarium.papers.series.itransformer import KEYS
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer__etth1_96_96.json.gz"


def moved(**changes):
    """A model in float64, away from its start."""
    model = create_model("itransformer/nano", **changes).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def test_golden():
    state, inputs, golden = replay(GOLDEN)
    model = load(state, "itransformer")
    assert count_parameters(model) == golden["parameters"]
    assert compare(golden, model(*inputs)) < 1e-5
    model.normalise = False
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, model(*inputs))


@torch.no_grad()
def test_authors_layout_there_and_back():
    model = create_model("itransformer/nano", heads=8, context=40, horizon=11, depth=3, ratio=2.0).eval()
    state = KEYS["authors"].convert(model.state_dict(), back=True)
    assert state.unmatched == []
    assert {n for n in state.state if "encoder.attn_layers.2.conv" in n} == {
        f"encoder.attn_layers.2.conv{i}.{w}" for i in (1, 2) for w in ("weight", "bias")}
    again = load(state.state, "itransformer")
    batch = model.example(2)
    assert torch.equal(again(batch), model(batch))
    assert again(torch.randn(2, 40, 3)).shape == (2, 11, 3)


@torch.no_grad()
def test_variates_have_no_order():
    model = moved(variates=None)
    batch, order = torch.randn(2, model.context, 9).double(), torch.randperm(9)
    assert_close(model(batch[..., order]), model(batch)[..., order])


@torch.no_grad()
def test_is_attention_over_variates_written_out():
    """One layer, by hand: embed each series, attend over series, MLP, post-norms, project; undo the normalisation."""
    model = moved(depth=1, heads=1)
    batch = model.example(2).double()
    mean, std = batch.mean(1, keepdim=True), (batch.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = model.embedding(((batch - mean) / std).mT)
    mixer, channel = model.stack.layers[0].mixer, model.stack.layers[0].channel
    q, k, v = mixer.inner.qkv(x).chunk(3, dim=-1)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = mixer.norm(x + mixer.inner.proj(weights @ v))
    x = channel.norm(x + channel.inner.fc2(torch.nn.functional.gelu(channel.inner.fc1(x))))
    expected = model.head(model.norm(x)).mT * std + mean
    assert_close(model(batch), expected)


@torch.no_grad()
def test_marks_are_tokens():
    """Known features change the forecast, and are not forecast themselves."""
    model = moved()
    batch, marks = model.example(2).double(), torch.randn(2, model.context, 4).double()
    out = model(batch, marks)
    assert out.shape == model(batch).shape
    assert not torch.allclose(out, model(batch))
    assert_close(model(batch, marks.flip(-1)), out)


def test_linear_layers_start_as_the_authors():
    """PyTorch's start, uniform up to 1 / sqrt(inputs); Xavier's reaches further. The residual scheme has the last word."""
    model = create_model("itransformer/nano")
    for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound
    deep = create_model("itransformer/nano", residual="deepnet")
    assert not deep.stack.layers[0].mixer.inner.proj.bias.any()
