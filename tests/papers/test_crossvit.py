"""CrossViT against its equations; two sizes of one image; all published configurations; the reference's answers and names
(timm, authors)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit
from formarium.core.model import count_parameters
from formarium.papers.backbones.crossvit import CARD, PRESETS
from formarium.weights.load import load
from formarium.weights.save import in_layout
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "crossvit__crossvit_tiny_240.json.gz"


def moved(**changes):
    """At parameters away from their start."""
    torch.manual_seed(0)
    model = create_model("crossvit/nano", **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def cross(fusion, token, patches):
    """Section 3.3, head by head, with keys and values of the projected token and the other's patches."""
    inner, norm = fusion.attention.inner, fusion.attention.norm
    token = fusion.there(F.gelu(fusion.norm_there(token)))
    z = norm(torch.cat((token, patches), 1))
    q, (k, v) = inner.q(z[:, 0]), inner.kv(z).chunk(2, -1)
    out, width = [], z.shape[-1] // inner.heads
    for i in range(0, z.shape[-1], width):
        scores = torch.einsum("bc,bnc->bn", q[:, i:i + width], k[..., i:i + width]) / width**0.5
        out.append(torch.einsum("bn,bnc->bc", scores.softmax(1), v[..., i:i + width]))
    token = token + inner.proj(torch.cat(out, -1))[:, None]
    return fusion.back(F.gelu(fusion.norm_back(token)))


def test_against_the_equations():
    """Answers, and gradients of all parameters."""
    model = moved(num_classes=3).double()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)

    def naive():
        small = F.interpolate(images, (24, 24), mode="bicubic", align_corners=False, antialias=False)
        x = [b(i, Ctx())[0] for b, i in zip(model.embedding.branches, (images, small), strict=True)]
        for stage in model.stages:
            x = [branch(t, Ctx())[0] for branch, t in zip(stage.branches, x, strict=True)]
            tokens = [cross(stage.fusion[i], x[i][:, :1], x[1 - i][:, 1:]) for i in (0, 1)]
            x = [torch.cat((c, t[:, 1:]), 1) for c, t in zip(tokens, x, strict=True)]
        logits = [head(norm(t)[:, 0]) for head, norm, t in zip(model.head, model.norm, x, strict=True)]
        return torch.stack(logits).mean(0)

    ours, theirs = model(images), naive()
    assert_close(ours, theirs)
    weight, inputs = torch.randn_like(theirs), list(model.parameters())
    assert_close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), atol=1e-9, rtol=1e-6)


@torch.no_grad()
def test_branches_meet_in_the_class_tokens_alone():
    """Patches of one branch never see the other's pixels; both class tokens do, after the first fusion."""
    model = moved().eval()
    x, ctx = model.embed(model.example(1))
    changed = ctx.memory[0].clone()
    changed[:, 1:] += torch.randn_like(changed[:, 1:])
    told = (ctx, ctx.memory[1])
    one, other = (model.stages[0]((x, large), told) for large in (ctx.memory[0], changed))
    assert torch.equal(one[0][:, 1:], other[0][:, 1:])
    assert not torch.equal(one[0][:, :1], other[0][:, :1])


@torch.no_grad()
def test_two_sizes():
    """240 pixels are resized for large patches, 224 for small ones, other sizes for both; the grids stay."""
    with torch.device("meta"):
        model = create_model("crossvit/tiny")
        assert model.embedding.sizes == ((240, 240), (224, 224))
        assert create_model("crossvit/15_dagger_384").embedding.sizes == ((408, 408), (384, 384))
        for size in ((240, 240), (224, 224), (100, 300)):
            x, ctx = model.embed(torch.empty(1, 3, *size))
            assert (x.shape, ctx.memory[0].shape) == ((1, 401, 96), (1, 197, 192))
    nano = moved(img_size=(28, 56)).eval()
    assert nano.embedding.sizes == ((28, 56), (24, 48))
    assert nano(torch.randn(1, 3, 31, 33)).isfinite().all()


def test_published_configurations():
    """All eleven, of the published parameters; the dagger models differ in the patch embedding alone."""
    names = {"tiny", "small", "base", "9", "15", "18", *(f"{x}_dagger{y}" for x in (9, 15, 18) for y in ("", "_384"))}
    names -= {"9_dagger_384"}
    assert set(PRESETS) == {"nano", *names}
    with torch.device("meta"):
        for name in names:
            assert count_parameters(create_model(f"crossvit/{name}")) == pytest.approx(CARD.variants[name].params, rel=0.01)
        for name in ("9", "15", "18"):
            plain, dagger = (create_model(f"crossvit/{name}{x}").state_dict() for x in ("", "_dagger"))
            apart = plain.keys() ^ dagger.keys()
            assert apart
            assert all(".proj." in k and k.startswith("embedding.") for k in apart)
    with pytest.raises(DoesNotFit, match=r"patches of 6 pixels.*conv_stem=False"):
        create_model("crossvit/nano", patch=(6, 8))
    with pytest.raises(DoesNotFit, match="one stage or more and scales above 0"):
        create_model("crossvit/nano", depths=())
    model = create_model("crossvit/nano", patch=(4, 12), conv_stem=False)
    assert model.embedding.sizes[1] == (24, 24)


@torch.no_grad()
def test_features_hold_both_branches():
    """On the finer grid; those of the coarse one are the nearest cells'."""
    model = moved().eval()
    batch = model.example(2)
    maps = model.features(batch)
    assert [m.map.shape for m in maps] == [(2, 80, 7, 7)] * 2
    x, ctx = model.embed(batch)
    small, large = model.stages[0]((x, ctx.memory[0]), (ctx, ctx.memory[1]))
    assert torch.equal(maps[0].map[:, :32].flatten(2).mT, small[:, 1:])
    for i, j in ((0, 0), (3, 6), (6, 2)):
        assert torch.equal(maps[0].map[:, 32:, i, j], large[:, 1 + 3 * (i * 3 // 7) + j * 3 // 7])


# the references


@torch.no_grad()
def test_golden():
    state, inputs, golden = replay(GOLDEN)  # crossvit_tiny_240
    model = load(state)
    assert (model.recipe["name"], count_parameters(model)) == ("crossvit/tiny", golden["parameters"])
    compare(golden, model(*inputs))


@pytest.mark.parametrize(("layout", "token"), [("timm", "cls_token_1"), ("authors", "cls_token.1")])
@pytest.mark.parametrize("conv_stem", [False, True])
@torch.no_grad()
def test_their_files(layout, token, conv_stem):
    model = moved(conv_stem=conv_stem, in_chans=1, num_classes=5).eval()
    state, batch = in_layout(model, layout), model.example(2)
    assert {token, "blocks.1.fusion.0.attn.wk.bias", "blocks.0.revert_projs.1.2.weight", "head.1.bias"} <= set(state)
    assert_close(load(state)(batch), model(batch))
