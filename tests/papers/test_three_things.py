"""Three things: branches against their equation, their count against layers in a row, what fine-tuning trains, and a stem
in which patches do not meet; the answers of timm and the authors' names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.backbones.three_things import KEYS, Parallel, attention_only
from formarium.parts.attention import Attention
from formarium.parts.residual import PreNorm
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "three_things__vit_small_patch16_18x2_224.json.gz"


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@torch.no_grad()
def test_answers_of_the_reference():
    """timm's, whose class token has a position."""
    state, inputs, golden = replay(GOLDEN)
    model = load(state)
    assert model.recipe == {"name": "three_things/small_18x2", "changes": {"position_first": False}}
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))


# branches


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_are_their_equation(branches):
    """Each with its norm and layer scale; forward and backward."""
    part = moved(Parallel(12, Place(), part=spec(Attention, heads=3), residual=spec(PreNorm, layer_scale=0.5),
                          branches=branches)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    naive = 0
    for b in part.branches:
        normed = F.layer_norm(x, (12,), b.norm.weight, b.norm.bias, 1e-6)
        q, k, v = b.inner.qkv(normed).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        heads = (q @ k.mT / 2).softmax(-1) @ v
        naive = naive + b.scale * b.inner.proj(heads.transpose(1, 2).flatten(2))
    out = part(x, Ctx())
    assert_close(out, naive)
    weights = [x, *part.parameters()]
    seed = torch.randn_like(out)
    assert_close(torch.autograd.grad((out * seed).sum(), weights), torch.autograd.grad((naive * seed).sum(), weights))


@pytest.mark.parametrize(("deep", "wide"), [("small_36x1", "small_18x2"), ("small_36x1", "small_12x3"),
                                            ("base_36x1", "base_18x2"), ("huge_p14_52x1", "huge_p14_26x2")])
def test_as_many_parameters_as_layers_in_a_row(deep, wide):
    with torch.device("meta"):
        one, other = (create_model(f"three_things/{name}") for name in (deep, wide))
    assert count_parameters(one) == count_parameters(other)


def test_small_branches_are_layers_in_a_row():
    """What a layer does to the next falls with the square of its scale."""
    far = []
    for scale in (1e-4, 1e-5):
        torch.manual_seed(0)
        options = {"dim": 32, "heads": 2, "stem": "patch", "layer_scale": scale, "num_classes": 0}
        wide = create_model("three_things/nano", **options, depth=1, branches=2).double()
        deep = create_model("three_things/nano", **options, depth=2, branches=1).double()
        state = {}
        for name, tensor in wide.state_dict().items():
            path = name.split(".")
            if "branches" in path:
                at = path.index("branches")
                path = [*path[:3], path[at + 1], path[4], *path[at + 2:]]
            state[".".join(path)] = tensor
        deep.load_state_dict(state)
        x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
        plain = wide.embedding(x, Ctx())[0]
        moves = [m.encode(*m.embed(x))[0] for m in (wide, deep)]
        far.append((moves[0] - moves[1]).norm() / plain.norm())
    assert far[1] < far[0] / 50


def test_all_layers_drop_alike():
    model = create_model("three_things/nano", drop_path=0.3)
    rates = {b.rate for layer in model.stages[0].layers for s in layer.values() for b in s.inner.branches}
    assert rates == {0.3}
    assert {s.rate for layer in model.stages[0].layers for s in layer.values()} == {0.0}


def test_any_part_works_in_branches():
    model = create_model("three_things/nano:mixer=cosformer,channel=swiglu,branches=3")
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 1000)


# fine-tuning


@pytest.mark.parametrize("name", ["vit/nano", "three_things/nano", "deit/nano", "swin/nano", "gpt/nano"])
def test_attention_only(name):
    """Trained are attentions, head and positions; a step leaves all else as it was."""
    model = fm.apply(create_model(name), "three_things")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(("inner" in n and ".mixer." in n and ".norm." not in n.split("inner")[-1]) or n.startswith("head")
               or "position" in n for n in trained), trained
    assert {n for n, _ in model.named_parameters() if n.endswith("qkv.weight")} <= trained
    before = {n: t.clone() for n, t in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameter_groups(0.0), lr=0.1)
    answers = model.train()(model.example(2))
    (answers if isinstance(answers, torch.Tensor) else answers[0] + answers[1]).logsumexp(1).sum().backward()
    optimizer.step()
    changed = {n for n, t in model.named_parameters() if not torch.equal(t, before[n])}
    assert changed <= trained
    assert len(changed) > len(trained) / 2


def test_fine_tune_is_a_switch():
    one, other = create_model("three_things/nano", fine_tune="attention"), create_model("three_things/nano")
    assert attention_only(other) == 4
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]
    share = sum(p.numel() for n, p in one.named_parameters() if p.requires_grad and "head" not in n) / count_parameters(one)
    assert share < 0.5


# the stem


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_patches_do_not_meet_in_the_stem(patch):
    """Zeros put into some patches before the stem change the tokens of these alone: masking before or after is the same."""
    model = moved(create_model("three_things/nano", patch=patch, img_size=(2 * patch, 3 * patch))).eval()
    x = torch.randn(2, 3, 2 * patch, 3 * patch)
    hidden = torch.tensor([True, False, False, True, True, False])
    masked = x.masked_fill(hidden.view(2, 3).repeat_interleave(patch, 0).repeat_interleave(patch, 1), 0.0)
    stem = lambda images: model.embedding.proj(images).flatten(2)  # noqa: E731
    assert torch.equal(stem(masked)[..., ~hidden], stem(x)[..., ~hidden])
    assert (stem(masked) - stem(x))[..., hidden].abs().amin(1).max() > 0
    token = torch.randn(1, 64, 1)
    assert_close(torch.where(hidden, token, stem(masked)), torch.where(hidden, token, stem(x)))


def test_stem_is_three_convolutions():
    model = moved(create_model("three_things/nano", patch=16, img_size=32)).eval()
    p, x = model.embedding.proj, torch.randn(2, 3, 32, 32)
    out = x
    for i, stride in ((0, 4), (3, 2), (6, 2)):
        out = F.conv2d(out, p[i].weight, p[i].bias, stride=stride)
        mean, var = (t.view(1, -1, 1, 1) for t in (p[i + 1].running_mean, p[i + 1].running_var))
        out = (out - mean) / (var + 1e-5).sqrt() * p[i + 1].weight.view(1, -1, 1, 1) + p[i + 1].bias.view(1, -1, 1, 1)
        out = out if i == 6 else F.gelu(out)
    assert_close(p(x), out, atol=1e-5, rtol=1e-5)


def test_bad_options():
    for options, error, why in [({"stem": "hmpl"}, UnknownName, "stem of ThreeThings 'hmpl'; did you mean hmlp"),
                                ({"fine_tune": "attn"}, UnknownName, "fine_tune of ThreeThings 'attn'"),
                                ({"branches": 0}, DoesNotFit, "1 branch or more"),
                                ({"patch": 14}, DoesNotFit, "a patch that 4 divides, got 64 and 14"),
                                ({"residual": "denseformer"}, DoesNotFit, "each a pre-norm residual, got 2 and")]:
        with pytest.raises(error, match=why):
            create_model("three_things/nano", **options)


# names


@pytest.mark.parametrize("layout", KEYS)
def test_layouts(layout, tmp_path):
    """timm's, the authors' of pairs, the authors' of layers in a row."""
    changes = {"timm": "stem=patch", "authors": "stem=hmlp", "authors_x1": "branches=1"}[layout]
    model, x = moved(create_model(f"three_things/nano:num_classes=3,{changes}")).eval(), torch.randn(2, 3, 28, 28)
    fm.save(model, tmp_path / "m.pth", layout=layout)
    again = load(tmp_path / "m.pth", num_classes=3)
    assert_close(again(x), model(x))
    names = torch.load(tmp_path / "m.pth")
    some = {"timm": "blocks.1.attns.1.ls.gamma", "authors": "blocks.1.gamma_1_1", "authors_x1": "blocks.1.gamma_1"}[layout]
    assert some in names
    assert ("patch_embed.proj.4.num_batches_tracked" in names) == (layout != "timm")
