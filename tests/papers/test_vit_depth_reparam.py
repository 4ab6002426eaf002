"""Depth by reparameterisation: branches one by one, the merge and its gradients, the schedule, a plain ViT in the end."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.papers.backbones.vit import ViT
from formarium.papers.backbones.vit_depth_reparam import BranchedAttention, BranchedMlp
from formarium.parts.attention import Attention
from formarium.parts.channel import Mlp
from formarium.weights.load import load


def apart(x, linear, shape, axis, part):
    """(1 - a) of each branch's values and a of their mean, one branch after the other."""
    each = F.linear(x, linear.weight, linear.bias).unflatten(-1, shape).unbind(axis)
    mean = sum(each) / len(each)
    return [(1 - part.joined) * one + part.joined * mean for one in each]


@pytest.mark.parametrize("joined", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_one_by_one(joined, branches):
    """Both parts against their sums over branches, forward and backward."""
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    attention = BranchedAttention(12, Place(), heads=2, branches=branches).double()
    mlp = BranchedMlp(12, Place(), branches=branches).double()
    for part in (attention, mlp):
        part.joined = torch.full_like(part.joined, joined)
    out = 0
    for i, qkv in enumerate(apart(x, attention.qkv, (3, branches, 2, 6), -3, attention)):  # (B, N, 3, heads, d) each
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = out + heads @ attention.proj.weight.unflatten(1, (branches, -1))[:, i].t()
    naive = {attention: out + attention.proj.bias}
    out = 0
    for i, h in enumerate(apart(x, mlp.fc1, (branches, -1), -2, mlp)):
        out = out + F.gelu(h) @ mlp.fc2.weight.unflatten(1, (branches, -1))[:, i].t()
    naive[mlp] = out + mlp.fc2.bias
    for part, want in naive.items():
        found, inputs = part(x, Ctx()), [x, *part.parameters()]
        assert_close(found, want)
        assert_close(torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs))


def test_parts_merge():
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for branched, plain in ((BranchedAttention(12, Place(), heads=2, branches=3), Attention(12, Place(), heads=2)),
                            (BranchedMlp(12, Place(), branches=3), Mlp(12, Place()))):
        branched, plain = branched.double(), plain.double()
        branched.joined = torch.ones_like(branched.joined)
        plain.load_state_dict(branched.merged())
        assert_close(plain(x, Ctx()), branched(x, Ctx()))


def trained(**options):
    torch.manual_seed(0)
    model = create_model("vit_depth_reparam/nano", num_classes=5, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shares = []
    for _ in range(6):
        loss = F.cross_entropy(model(model.example(8)), torch.arange(8) % 5)
        shares.append(round(float(model.stages[0].layers[0]["channel"].inner.joined), 6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), shares


@torch.no_grad()
def test_schedule_and_reparameterize(tmp_path):
    """Trained through the schedule, the merged model is a plain ViT with the same answers and its tensors."""
    model, shares = torch.enable_grad()(trained)(merge_steps=(1, 5), branches=3)
    assert shares == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    plain, x = model.reparameterize(), model.example(3)
    assert type(plain) is ViT
    like = create_model("vit/nano", depth=2, num_classes=5).state_dict()
    assert {k: t.shape for k, t in plain.state_dict().items()} == {k: t.shape for k, t in like.items()}
    assert (plain(x) - model(x)).abs().max() < 1e-5
    assert (model.double().reparameterize()(x.double()) - model(x.double())).abs().max() < 1e-9
    save(plain, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), plain(x))


def test_a_callback_instead_of_a_schedule():
    model, shares = trained()
    assert shares == [0.0] * 6
    with pytest.raises(DoesNotFit, match="not one yet"):
        model.reparameterize()
    model.merge_to(0.5)
    with pytest.raises(DoesNotFit, match="not one yet"):
        model.reparameterize()
    model.merge_to(1)
    x = model.example(2)
    assert_close(model.reparameterize()(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_apart_it_is_a_wider_block(tmp_path):
    """At the start n branches are one block of n times the heads and neurons; how far they are joined is saved."""
    model = create_model("vit_depth_reparam/nano").eval()
    wide = Attention(64, Place(), heads=8, inner=128)
    part = model.stages[0].layers[0]["mixer"].inner
    wide.load_state_dict(part.state_dict(), strict=False)
    x = torch.randn(2, 7, 64)
    assert_close(part(x, Ctx()), wide(x, Ctx()))
    model.merge_to(0.25)
    save(model, tmp_path / "m.safetensors")
    again, batch = load(tmp_path / "m.safetensors"), model.example(2)
    assert torch.equal(again(batch), model(batch))


def test_what_does_not_fit():
    for options, why in (({"branches": 0}, "1 or more, got 0"), ({"merge_steps": (5, 5)}, "begin, end")):
        with pytest.raises(DoesNotFit, match=why):
            create_model("vit_depth_reparam/nano", **options)
    with pytest.raises(DoesNotFit, match=r"0 to 1, got 1\.5"):
        create_model("vit_depth_reparam/nano").merge_to(1.5)
