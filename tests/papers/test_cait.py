"""CaiT against its equations; its parts alone and in other hosts; the references' answers and names (timm, authors)."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.backbones.cait import ClassAttention, TalkingHeads
from formarium.parts.attention import Attention
from formarium.parts.position import Rotary, ScorePosition
from formarium.weights.load import load
from formarium.weights.save import in_layout
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "cait__cait_xxs24_224.json.gz"


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def matches(part, naive, x, ctx):
    """Answers and all gradients are those of a function."""
    ours, theirs = part(x, ctx), naive(x)
    assert_close(ours, theirs)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3))
    inputs = [x, *part.parameters()]
    assert_close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), atol=1e-9, rtol=1e-6)


def tokens(n=7, dim=12):
    return torch.randn(2, n, dim, dtype=torch.float64, requires_grad=True)


def heads_of(t, heads):
    return [t[..., i * t.shape[-1] // heads:(i + 1) * t.shape[-1] // heads] for i in range(heads)]


# the parts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_talking_heads(heads, causal):
    """Head by head: scores are mixed, then softmax over the keys that may be seen, then weights are mixed."""
    part = moved(TalkingHeads(12, Place(), heads=heads, causal=causal))
    seen = torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool()

    def naive(x):
        q, k, v = (heads_of(t, heads) for t in (x @ part.qkv.weight.T + part.qkv.bias).chunk(3, -1))
        scores = [q[i] @ k[i].mT / (12 // heads) ** 0.5 for i in range(heads)]
        w, b = part.proj_l.weight, part.proj_l.bias
        mixed = [sum(w[i, j] * scores[j] for j in range(heads)) + b[i] for i in range(heads)]
        weights = [s.masked_fill(~seen, float("-inf")).softmax(-1) for s in mixed]
        w, b = part.proj_w.weight, part.proj_w.bias
        mixed = [(sum(w[i, j] * weights[j] for j in range(heads)) + b[i]) * seen for i in range(heads)]
        return torch.cat([m @ v[i] for i, m in enumerate(mixed)], -1) @ part.proj.weight.T + part.proj.bias

    matches(part, naive, tokens(), Ctx())


@pytest.mark.parametrize("position", [None, spec(Rotary)])
@torch.no_grad()
def test_heads_that_do_not_talk_are_plain_attention(position):
    talking, plain = (kind(12, Place(), heads=3, position=position) for kind in (TalkingHeads, Attention))
    talking.load_state_dict(plain.state_dict(), strict=False)
    for layer in (talking.proj_l, talking.proj_w):
        layer.weight.copy_(torch.eye(3))
    x, mask = torch.randn(2, 7, 12), torch.rand(2, 1, 7, 7) > 0.5
    mask[..., 0] = True
    for ctx in (Ctx(), Ctx(mask=mask)):
        assert_close(talking(x, ctx), plain(x, ctx))
    talking.proj_l.bias.fill_(5.0)  # moves all keys alike
    assert_close(talking(x, Ctx()), plain(x, Ctx()))


def test_positions_that_attend_by_themselves_are_refused():
    class Own(ScorePosition):
        def attend(self, q, k, v, ctx, *, causal, window, scale):
            return v

    with pytest.raises(DoesNotFit, match="Own attends by itself"):
        TalkingHeads(12, Place(), position=spec(Own))


@pytest.mark.parametrize("prefix", [1, 2])
def test_class_attention(prefix):
    """Eqs. 5 to 7: queries of the class token alone, keys and values of all; nothing for the patches."""
    part = moved(ClassAttention(12, Place(), heads=3))

    def naive(x):
        q = heads_of(x[:, :prefix] @ part.q.weight.T + part.q.bias, 3)
        k, v = (heads_of(t, 3) for t in (x @ part.kv.weight.T + part.kv.bias).chunk(2, -1))
        read = torch.cat([(q[i] @ k[i].mT / 2).softmax(-1) @ v[i] for i in range(3)], -1)
        out = read @ part.proj.weight.T + part.proj.bias
        return torch.cat((out, torch.zeros_like(x[:, prefix:])), 1)

    matches(part, naive, tokens(), Ctx(prefix=prefix))
    with pytest.raises(DoesNotFit, match="needs a class token, and here is none"):
        part(tokens(), Ctx())


@pytest.mark.parametrize("name", ["vit/nano:mixer=talking_heads", "vit/nano:mixer=class_attention",
                                  "gpt/nano:mixer=talking_heads", "vit/nano:residual=pre_norm(layer_scale=0.1)"])
def test_parts_serve_other_hosts(name):
    model = create_model(name)
    model(model.example(2)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# the net


def test_two_phases():
    """The first knows no class token; in the second the patches stay as they are, bit by bit."""
    model = create_model("cait/nano").eval()
    with torch.no_grad():
        x, ctx = model.embed(model.example(2))
        assert (x.shape[1], ctx.prefix) == (49, 0)
        patches, ctx = model.stages[0](x, ctx)
        after, ctx = model.class_stage(patches, ctx)
    assert (after.shape[1], ctx.prefix) == (50, 1)
    assert torch.equal(after[:, 1:], patches)
    token = after[:, 0] - model.class_stage.resample.cls[0, 0]
    assert (token.std(0) > 1e-3).any()  # what it read is the image's


@torch.no_grad()
def test_layer_scale_begins_near_the_identity():
    """At factors of zero both phases give back what they get; without factors they do not."""
    for scale, same in ((0.0, True), (None, False)):
        model = create_model("cait/nano", layer_scale=scale).eval()
        x, ctx = model.embed(model.example(2))
        tokens, _ = model.class_stage(*model.stages[0](x, ctx))
        expected = torch.cat((model.class_stage.resample.cls.expand(2, -1, -1), x), 1)
        assert torch.equal(tokens, expected) is same


@torch.no_grad()
def test_drop_path_is_even_and_spares_the_class():
    model = create_model("cait/nano", drop_path=0.3)
    assert {layer.mixer.rate for layer in model.stages[0].layers} == {0.3}
    assert {layer.channel.rate for layer in model.class_stage.layers} == {0.0}


def test_class_token_from_the_start():
    """class_depth=0: the usual place, where every layer is told which image it is of."""
    model = create_model("cait/nano", class_depth=0)
    assert model.class_stage is None
    assert model.embed(model.example(1))[0].shape[1] == 50
    model(model.example(2)).sum().backward()
    assert model.embedding.cls.grad.any()
    again = load(model.state_dict(), "cait")
    assert (again.class_stage, len(again.stages[0].layers)) == (None, 4)


# the references


@torch.no_grad()
def test_golden():
    state, inputs, golden = replay(GOLDEN)
    model = load(state)
    assert (model.recipe["name"], count_parameters(model)) == ("cait/xxs24", golden["parameters"])
    compare(golden, model(*inputs))


@pytest.mark.parametrize("layout", ["timm", "authors"])
@torch.no_grad()
def test_their_files(layout):
    """The authors' have the same names behind "module."; other sizes, without a name said."""
    model = create_model("cait/nano", dim=60, heads=6, depth=2, in_chans=1, num_classes=5, img_size=32).eval()
    batch = model.example(2)
    state = in_layout(model, layout)
    assert {"blocks_token_only.1.attn.k.bias", "blocks.0.gamma_1", "pos_embed"} <= set(state)
    for before in ("", "module."):
        again = load({f"{before}{k}": v for k, v in state.items()})
        assert_close(again(batch), model(batch))
