"""HVT against the authors' answers and a naive forward pass; the schedule in any plain ViT; sizes, files, bad inputs."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters
from formarium.core.transform import apply
from formarium.papers.backbones.hvt import KEYS, PRESETS, pooled_lengths
from formarium.papers.backbones.vit import ViT
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def test_authors_answers():
    """Layout authors, found without a name, and written again."""
    state, inputs, golden = replay(GOLDEN / "hvt__hvt_ti_1.json.gz")
    model = load(state)
    assert model.recipe == {"name": "hvt/ti_1", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert not theirs.unmatched
    assert all(torch.equal(theirs.state[k], t) for k, t in state.items())


def naive(model, images, pools, kernel, stride):
    """Layer by layer; a window is the greatest of its tokens, one after the other."""
    x, ctx = model.embed(images)
    stack = model.stages[0]
    for i, layer in enumerate(stack.layers):
        for sublayer in layer.values():
            x = x + sublayer.inner(sublayer.norm(x), Ctx(prefix=ctx.prefix))
        if i in pools:
            before, tokens = x[:, :ctx.prefix], x[:, ctx.prefix:]
            pooled = []
            for first in range(0, tokens.shape[1] - kernel + 1, stride):
                pooled.append(tokens[:, first])
                for j in range(1, kernel):
                    pooled[-1] = torch.maximum(pooled[-1], tokens[:, first + j])
            x = torch.cat((before, torch.stack(pooled, dim=1) + stack.pools[str(i)].table), dim=1)
    x = model.norm(x)
    return model.head(x[:, 0] if model.pool == "token" else x[:, ctx.prefix:].mean(1))


@pytest.mark.parametrize(("size", "options"), [
    ((28, 28), {}), ((28, 40), {"pools": (1,), "kernel": 2}), ((16, 28), {"pools": (0, 1, 3), "kernel": 4, "stride": 1}),
    ((28, 28), {"pool": "token"})])
def test_naive_twin(size, options):
    """Forward and backward, other schedules, images that are not square, with a class token that is not pooled."""
    torch.manual_seed(0)
    told = {"pools": (0, 2), "kernel": 3, "stride": 2} | {k: v for k, v in options.items() if k != "pool"}
    model = moved(create_model("hvt/nano", img_size=size, num_classes=5, **options)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = [images, *model.parameters()]
    ours, theirs = model(images), naive(model, images, **told)
    assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    assert_close(*[torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)])


def test_published_lengths():
    """196 tokens become 97, 48, 23, 11 (section 4.1)."""
    assert pooled_lengths(196, 4, 3, 2) == [196, 97, 48, 23, 11]
    with torch.device("meta"):
        model = create_model("hvt/s_4")
    assert [p.table.shape[1] for p in model.stages[0].pools.values()] == [97, 48, 23, 11]


def test_without_pooling_it_is_a_vit():
    """HVT-S-0, and a schedule of no pooling: the same class, the same function."""
    assert PRESETS["s_0"].target is ViT
    torch.manual_seed(0)
    plain = create_model("vit/nano", pool="mean").eval()
    none = create_model("hvt/nano", pools=()).eval()
    none.load_state_dict(plain.state_dict())
    batch = plain.example(2)
    assert torch.equal(none(batch), plain(batch))


@pytest.mark.parametrize("host", ["vit/nano", "vit/nano:residual=post_norm", "vit/nano:position=rotary"])
def test_in_any_plain_vit(host, tmp_path):
    """Where, kernel and stride as a transform; the recipe tells of it, so a file is loaded again."""
    torch.manual_seed(0)
    model = moved(create_model(f"{host}+hvt(pools=(0,2),kernel=2,stride=2)"))
    batch = model.example(2)
    assert [p.table.shape[1] for p in model.stages[0].pools.values()] == [24, 12]
    assert count_macs(model, batch) < 0.6 * count_macs(create_model(host), batch)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(batch), model(batch))


@torch.no_grad()
def test_a_pooling_of_one_token_is_none():
    """Windows of one token, one apart, and positions of zero leave the answer as it was."""
    torch.manual_seed(0)
    model = moved(create_model("vit/nano"))
    same = apply(model, "hvt(pools=(0,3),kernel=1,stride=1)")
    for pooling in same.stages[0].pools.values():
        pooling.table.zero_()
    batch = model.example(2)
    assert_close(same(batch), model(batch))


def test_other_schedules_are_told():
    """From the names which layers, from the lengths a kernel and stride that leave as many tokens."""
    torch.manual_seed(0)
    model = moved(create_model("hvt/nano", pools=(1, 2), kernel=2, stride=3))
    batch = model.example(2)
    again = load(KEYS["authors"].convert(model.state_dict(), back=True).state, kernel=2)
    assert torch.equal(again(batch), model(batch))


def test_positions_of_another_size():
    """Each pooled token takes the position of one than which none is nearer in the image."""
    model = create_model("hvt/nano")
    with torch.no_grad():
        for pooling in model.stages[0].pools.values():
            pooling.table.copy_(torch.arange(pooling.table.shape[1])[:, None].expand_as(pooling.table[0]))
    again = load(model.state_dict(), "hvt", img_size=56)
    for was, pooling in zip(model.stages[0].pools.values(), again.stages[0].pools.values(), strict=True):
        for here, took in zip(pooling.where, pooling.table[0, :, 0].int().tolist(), strict=True):
            assert math.dist(here, was.where[took]) < min(math.dist(here, there) for there in was.where) + 1e-6


def test_bad_inputs():
    for pools in ((4,), (2, 0), (1, 1), (-1,)):
        with pytest.raises(DoesNotFit, match="pools are layers in order, 0 to 3 here"):
            create_model("hvt/nano", pools=pools)
    with pytest.raises(DoesNotFit, match="windows of 3 tokens with stride 2 do not fit 1 tokens"):
        create_model("hvt/nano", img_size=16, pools=(0, 1, 2, 3))
    with pytest.raises(DoesNotFit, match="windows of 3 tokens with stride 0"):
        create_model("hvt/nano", stride=0)
    with pytest.raises(DoesNotFit, match="Pooling needs tokens on a full grid"):
        create_model("hvt/nano", mixer="pooling")(torch.randn(1, 3, 28, 28))
    with pytest.raises(DoesNotFit, match="full grid"):
        create_model("hvt/nano").features(torch.randn(1, 3, 28, 28))
    with pytest.raises(DoesNotFit, match="DenseFormer keeps more than the tokens from layer to layer"):
        create_model("hvt/nano", residual="denseformer")
    for name in ("swin/nano", "gpt/nano", "hvt/nano"):
        with pytest.raises(DoesNotFit, match="a plain ViT: an image backbone of one stage"):
            create_model(f"{name}+hvt")
