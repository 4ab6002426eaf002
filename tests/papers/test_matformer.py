"""MatFormer: nested MLPs by hand, drawing, extraction, mix'n'match, joint loss, speculative decoding, what does not fit."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.papers.channels.matformer import (
    NestedMlp,
    SizedMlp,
    choose,
    extract,
    joint_loss,
    mix_n_match,
    nested,
    speculative,
)
from formarium.parts.channel import Mlp, SwiGLU
from formarium.weights.load import load


def model_of(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("product_first", [False, True])
@pytest.mark.parametrize("chosen", [0, 1, 2, 3])
def test_by_hand(gated, product_first, chosen):
    """Against neurons that are masked to zero; answers and gradients, which end where the granularity does."""
    if product_first and not gated:
        with pytest.raises(DoesNotFit, match="needs gated"):
            NestedMlp(12, Place(), product_first=True)
        return
    part = NestedMlp(12, Place(), gated=gated, product_first=product_first).double()
    hidden, part.chosen = part.sizes[-1], chosen
    assert part.sizes == tuple(hidden // 2**k for k in (3, 2, 1, 0))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = (torch.arange(hidden) < part.sizes[chosen]).double()
    h = F.linear(x, part.fc1.weight, part.fc1.bias)
    if gated:
        gate, value = h.chunk(2, dim=-1)
        h = F.silu(gate * value) if product_first else F.silu(gate) * value
    else:
        h = F.gelu(h)
    want, out = F.linear(h * mask, part.fc2.weight, part.fc2.bias), part(x, Ctx())
    assert_close(out, want)
    inputs = [part.fc1.weight, part.fc2.weight]
    assert_close(torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs))


@pytest.mark.parametrize(("gated", "plain"), [(False, Mlp), (True, SwiGLU)])
def test_the_largest_is_the_plain_mlp(gated, plain):
    part, other = NestedMlp(16, Place(), gated=gated), plain(16, Place(), bias=True)
    part.load_state_dict(other.state_dict(), strict=False)
    x = torch.randn(2, 3, 16)
    assert_close(part.eval()(x, Ctx()), other(x, Ctx()))


def test_training_draws_one_for_all_layers():
    model, seen = create_model("matformer/nano").train(), Counter()
    x = model.example(1, (4,))
    ctxs = []
    for p in nested(model):
        p.register_forward_pre_hook(lambda m, args: ctxs.append((m, args[1])))
    for _ in range(200):
        ctxs.clear()
        model(x)
        used = {p.used(c) for p, c in ctxs}
        assert len(used) == 1
        seen[used.pop()] += 1
    assert sorted(seen) == [32, 64, 128, 256]
    assert min(seen.values()) > 25
    choose(model, 2)
    assert {p.used(Ctx()) for p in nested(model)} == {128}


@pytest.mark.parametrize("host", [
    "matformer/nano", "matformer/nano_gated", "matformer/nano_vit", "swin/nano:channel=matformer",
    "gpt/nano:channel=matformer(gated=true,product_first=true,granularities=3,ratio=2),bias=false",
])
@pytest.mark.parametrize("sizes", [0, -1, "mixed"])
@torch.no_grad()
def test_extract(host, sizes, tmp_path):
    """A plain model of equal answers and fewer parameters, which is saved and loaded by itself."""
    model = model_of(host)
    sizes = mix_n_match(len(nested(model)), 0.5) if sizes == "mixed" else sizes
    small, x = extract(model, sizes), model.example(2)
    choose(model, sizes)
    want = model(x)
    assert_close(small(x), want)
    assert not any(isinstance(m, NestedMlp) for m in small.modules())
    count = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert count[0] == count[1] if sizes == -1 else count[0] < count[1]
    save(small, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), small(x))


def test_mix_n_match():
    assert mix_n_match(4, 1.0) == (1, 1, 1, 1)
    assert mix_n_match(4, 1.75) == (1, 2, 2, 2)
    assert mix_n_match(6, 2.5) == (2, 2, 2, 3, 3, 3)


def test_joint_loss():
    """The mean over all granularities, and the sum of their gradients; what was chosen stays."""
    model = model_of("matformer/nano")
    x = model.example(1, (12,))
    choose(model, (0, 1, 2, 3))
    joint_loss(model, lambda: model(x).square().mean()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert [p.chosen for p in nested(model)] == [0, 1, 2, 3]
    model.zero_grad()
    for i in range(4):
        choose(model, i)
        (model(x).square().mean() / 4).backward()
    assert_close(found, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("host", ["matformer/nano", "gpt/nano:channel=matformer(gated=true),position=rotary"])
@pytest.mark.parametrize(("draft", "ahead", "rows"), [(0, 4, 1), (1, 1, 1), (2, 7, 2), ((0, 1, 2, 3), 3, 1)])
def test_speculative(host, draft, ahead, rows):
    """The text of the largest model alone, whatever drafts."""
    model = model_of(host)
    prompt = model.example(rows, (6,))
    want = model.generate(prompt, 50, temperature=0)
    found, share = speculative(model, prompt, 50, draft=draft, ahead=ahead)
    assert torch.equal(found, want)
    assert 0 <= share < 1
    assert [p.chosen for p in nested(model)] == [None] * 4
    assert speculative(model, prompt, 20, draft=-1)[1] == 1


def test_what_does_not_fit():
    model = create_model("matformer/nano")
    for call, why in (
        (lambda: choose(model, 4), "granularities are 0 to 3, got 4"),
        (lambda: choose(model, (0, 1)), "each of 4 layers, got 2"),
        (lambda: choose(create_model("gpt/nano"), 0), "channel='matformer'"),
        (lambda: extract(create_model("gpt/nano+llm_int8"), 0), "without transforms"),
        (lambda: speculative(model, model.example(1, (100,)), 100), "at most 128 tokens"),
        (lambda: speculative(create_model("matformer/nano_vit"), torch.zeros(1, 1).long(), 3), "needs a language decoder"),
        (lambda: speculative(create_model("gpt/nano:mixer=cosformer,channel=matformer"), model.example(1, (3,)), 3),
         "needs a language decoder"),
        (lambda: NestedMlp(4, Place(), ratio=1, granularities=4), "at least a neuron each, of 4"),
        (lambda: SizedMlp(4, Place(depth=2), hidden=(1,)), "1 widths for 2 layers"),
    ):
        with pytest.raises(DoesNotFit, match=why):
            call()
