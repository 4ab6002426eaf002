"""AdaptFormer against its equations, on any part of any host; what is trained and saved; the authors' answers and names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.transform import apply
from formarium.papers.transforms.adaptformer import KEYS, Adapter
from formarium.parts.channel import Mlp
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "adaptformer__adaptformer64_vit_s.json.gz"


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def adapted(name="vit/nano", **settings):
    return moved(apply(moved(create_model(name).double()), "adaptformer", bottleneck=5, **settings))


def bottleneck(p, at, x, scale, where="none"):
    """up(ReLU(down(x))) s, from the named tensors of a model."""
    def normed(x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * p[f"{at}.norm.weight"] + p[f"{at}.norm.bias"]

    x = normed(x) if where == "in" else x
    x = scale * (x @ p[f"{at}.down.weight"].T + p[f"{at}.down.bias"]).clamp_min(0) @ p[f"{at}.up.weight"].T
    x = x + scale * p[f"{at}.up.bias"]
    return normed(x) if where == "out" else x


def plain_vit(model, batch, scale, where="none"):
    """A ViT's forward pass with the adapters written out, through functions alone."""
    p, heads = dict(model.named_parameters()), 4
    x, _ = model.embed(batch)

    def norm(x, at, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], p[f"{at}.weight"], p[f"{at}.bias"], eps)

    for i in range(len(model.stages[0].layers)):
        at = f"stages.0.layers.{i}"
        qkv = norm(x, f"{at}.mixer.norm") @ p[f"{at}.mixer.inner.qkv.weight"].T + p[f"{at}.mixer.inner.qkv.bias"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = ((q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ p[f"{at}.mixer.inner.proj.weight"].T + p[f"{at}.mixer.inner.proj.bias"]
        parallel = f"{at}.channel.adapter.down.weight" in p
        mlp = f"{at}.channel.residual" if parallel else f"{at}.channel"
        inner = f"{mlp}.inner" if parallel else f"{mlp}.inner.inner"
        y = norm(x, f"{mlp}.norm") @ p[f"{inner}.fc1.weight"].T + p[f"{inner}.fc1.bias"]
        y = F.gelu(y) @ p[f"{inner}.fc2.weight"].T + p[f"{inner}.fc2.bias"]
        y = y + (bottleneck(p, f"{at}.channel.adapter", x, scale, where) if parallel else
                 bottleneck(p, f"{mlp}.inner.adapter", y, scale, where))
        x = x + y
    return norm(x, "norm")[:, 0] @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("where", ["none", "in", "out"])
def test_by_the_equations(mode, where):
    """Answers, and the gradients of what is trained."""
    model = adapted(mode=mode, layer_norm=where, scale=0.3)
    batch = model.example(2).double()
    ours, naive = model(batch), plain_vit(model, batch, 0.3, where)
    assert_close(ours, naive)
    trained = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn_like(ours)
    assert_close(torch.autograd.grad((ours * weight).sum(), trained), torch.autograd.grad((naive * weight).sum(), trained))


@pytest.mark.parametrize("name", [
    "vit/nano:channel=swiglu", "vit/nano:residual=post_norm", "swin/nano", "poolformer/nano:layer_scale=1e-5", "gpt/nano",
    "gpt/nano:mixer=(deltanet,attention)", "itransformer/nano"])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_any_part_of_any_host(name, mode):
    """Starts as the host; each adapter then changes the answer and learns, and nothing else but the head does."""
    host = moved(create_model(name))
    model = apply(host, "adaptformer", mode=mode, bottleneck=3)
    batch = model.example(2)
    assert_close(model.eval()(batch), host(batch), atol=0, rtol=0)
    start = host(batch).detach()
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(adapters) == sum("channel" in name.split(".")[-1:] for name, _ in host.named_modules())
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up.bias)
        assert not torch.equal(model(batch), start)
        torch.nn.init.normal_(adapter.up.weight)
        torch.nn.init.zeros_(adapter.up.bias)
    model.train()(batch).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".adapter." in n or n.startswith("head.")}


def test_dropout_and_learned_scale():
    model = adapted(scale="learned", dropout=0.5)
    batch = model.example(2).double()
    assert not torch.equal(model.train()(batch), model.eval()(batch))
    scales = [p for n, p in model.named_parameters() if n.endswith("adapter.scale")]
    assert len(scales) == 4
    assert all(p.requires_grad and p.shape == (1,) for p in scales)
    assert {n for n, _ in model.named_parameters() if n.endswith("scale")} <= model.no_weight_decay()
    fresh = apply(create_model("vit/nano"), "adaptformer(scale=learned)")
    assert all((m.scale == 1).all() for m in fresh.modules() if isinstance(m, Adapter))


def test_published_parameters():
    """99,136 a layer of a ViT-B at the published bottleneck of 64."""
    with torch.device("meta"):
        model = apply(create_model("vit/base", num_classes=0), "adaptformer")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 99136


def test_file_of_what_is_trained(tmp_path):
    """A few percent of the whole, and all that a base needs, also one with another head."""
    base = moved(create_model("vit/small:num_classes=10,img_size=32"))
    model = apply(base, "adaptformer(bottleneck=4)")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    save(model, tmp_path / "whole.safetensors")
    save(model, tmp_path / "part.safetensors", only="trained")
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("part", "whole")]
    assert sizes[0] < 0.01 * sizes[1]
    other = create_model("vit/small:num_classes=7,img_size=32")
    kept = {k: v for k, v in base.state_dict().items() if not k.startswith("head")}
    other.load_state_dict(kept, strict=False)
    batch = base.example(2)
    for given in (base, other):
        again = load(tmp_path / "part.safetensors", base=given)
        assert torch.equal(again(batch), model.eval()(batch))


@pytest.mark.parametrize(("name", "settings", "error", "why"), [
    ("gpt/nano:residual=denseformer", {}, DoesNotFit, "it looks for layers with a sublayer 'channel' whose residual keeps"),
    ("vit/nano", {"mode": "serial"}, UnknownName, "unknown mode of adaptformer 'serial'"),
    ("vit/nano", {"layer_norm": "inn"}, UnknownName, "did you mean in"),
    ("vit/nano", {"scale": "learnt"}, UnknownName, "did you mean learned"),
    ("vit/nano", {"bottleneck": 0}, DoesNotFit, "bottleneck is 1 or more .* got 0"),
    ("vit/nano", {"dropout": 1.0}, DoesNotFit, r"dropout in \[0, 1\), got 64 and 1.0"),
])
def test_refusals(name, settings, error, why):
    with pytest.raises(error, match=why):
        apply(create_model(name), "adaptformer", **settings)


# the authors' answers and names

@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN)
    model = load(state, "adaptformer")
    assert model.recipe == {"name": "vit/small", "changes": {"num_classes": 100},
                            "transforms": [{"name": "adaptformer",
                                            "settings": {"bottleneck": 64, "scale": 0.1, "mode": "parallel"}}]}
    assert count_parameters(model) == golden["parameters"]
    assert compare(golden, model(x)) < 1e-5
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, load(state, "adaptformer", scale=1.0)(x))


@pytest.mark.parametrize("options", [{}, {"scale": "learned"}, {"layer_norm": "in"}])
def test_their_names(options):
    """A small model in their names comes back whole, with the linear probe's batch norm folded into the head."""
    model = moved(apply(create_model("vit/nano:num_classes=3,heads=1"), "adaptformer", bottleneck=6, **options))
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert {"blocks.3.adaptmlp.down_proj.weight", "blocks.0.attn.v_proj.bias", "blocks.2.fc1.weight", "norm.weight",
            "head.1.weight", "head.0.running_var"} <= set(theirs.state)
    batch = model.example(2)
    assert_close(load(theirs.state, "adaptformer", heads=1)(batch), model(batch))
    state = {k: v.clone() for k, v in theirs.state.items()} | {"head.0.num_batches_tracked": torch.tensor(5)}
    mean, var = torch.randn(64), torch.rand(64) + 0.5
    state |= {"head.0.running_mean": mean, "head.0.running_var": var}
    pooled = model.forward_features(batch)[:, 0]
    probed = F.batch_norm(pooled, mean, var, eps=1e-6) @ state["head.1.weight"].T + state["head.1.bias"]
    assert_close(load(state, "adaptformer", heads=1)(batch), probed)
    assert isinstance(model.stages[0].layers[0]["channel"].residual.inner, Mlp)
