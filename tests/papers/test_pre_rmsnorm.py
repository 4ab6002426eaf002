"""Pre-RMSNorm and Pre-CRMSNorm: equal answers and gradients, norms by hand, what is refused, the authors' answers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.transform import apply
from formarium.papers.transforms.pre_rmsnorm import CRMSNorm, PlainRMSNorm, ZeroMeanLinear
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTS = ("vit/nano", "vit/nano:pool=mean,num_classes=0", "vit/nano:mixer=window(window=4),pool=mean", "gpt/nano",
         "vit/nano:residual=pre_norm(layer_scale=0.1)", "gpt/nano:channel=swiglu,tie=false,bias=false,position=rotary",
         "swin/nano:depths=(2),heads=(2)")


def exact(name):
    """In float64, at parameters away from their start; a batch."""
    torch.manual_seed(0)
    name, _, rest = name.partition(":depths")
    model = create_model(name, **({"depths": (2,), "heads": (2,)} if rest else {})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = model.example(2)
    return model, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("form", ["rms", "crms", "training"])
@torch.no_grad()
def test_equal_answers(host, form):
    """Directly, and from the training form; twice is once."""
    model, x = exact(host)
    want = model(x)
    straight = apply(model, "pre_rmsnorm", form=form)
    around = apply(apply(model, "pre_rmsnorm", form="training"), "pre_rmsnorm", form=form)
    twice = apply(straight, "pre_rmsnorm", form=form)
    for other in (straight, around, twice):
        assert (other(x) - want).abs().max() < 1e-9
    norms = [m for stage in (*getattr(straight, "stages", ()), straight.norm) for m in stage.modules()]
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in norms)


@pytest.mark.parametrize("host", HOSTS)
def test_equal_gradients(host):
    model, x = exact(host)
    trained = apply(model, "pre_rmsnorm", form="training")
    found = {}
    for one in (model, trained):
        one(x).square().sum().backward()
        found[one] = {id(p): p.grad for p in one.parameters()}
    ours, theirs = [list(found[m].values()) for m in (trained, model)]
    if "layer_scale" in host:  # the scale has moved into the layer that it scales
        key = lambda g: (g.shape, float(g.sum()))  # noqa: E731
        ours, theirs = sorted(ours, key=key), sorted(theirs, key=key)
    assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_norms_by_hand():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    want = F.layer_norm(x, (8,))
    assert_close(PlainRMSNorm(8)(x), want)
    assert_close(CRMSNorm(7)(x[..., :-1]), want[..., :-1])
    assert_close(CRMSNorm(7, expand=True)(x[..., :-1]), want)


def test_the_stream_has_mean_zero():
    """What each form writes; the compressed one has a channel less, and fewer parameters."""
    model, x = exact("vit/nano")
    for form, width in (("rms", 64), ("training", 64), ("crms", 63)):
        changed = apply(model, "pre_rmsnorm", form=form)
        seen, _ = changed.stages[0](*changed.embed(x))
        assert seen.shape[-1] == width
        if form != "crms":
            assert seen.mean(-1).abs().max() < 1e-12
            writer = changed.stages[0].layers[0]["mixer"].inner.proj
            assert (writer.weight.mean(0).abs().max() < 1e-12) == (form == "rms")
            assert isinstance(writer, ZeroMeanLinear) == (form == "training")


@torch.no_grad()
def test_tied_head_and_cache():
    model, x = exact("gpt/nano")
    small = apply(model, "pre_rmsnorm", form="crms")
    cache, steps = Cache(), []
    for token in x[:, :20].split(1, dim=1):
        steps.append(small(token, cache=cache))
    assert_close(torch.cat(steps, dim=1), model(x[:, :20]), atol=1e-9, rtol=0)
    assert small.head is None


def test_saves_and_loads(tmp_path):
    model = create_model("gpt/nano:depth=2+pre_rmsnorm(form=crms)").eval()
    save(model, tmp_path / "m.safetensors")
    again, x = load(tmp_path / "m.safetensors"), model.example(2)
    assert torch.equal(again(x), model(x))
    assert again.recipe == model.recipe


@pytest.mark.parametrize(("host", "why"), [
    ("swin/nano", "PatchMerging, which reads tokens otherwise"),
    ("poolformer/nano", "does not know which linear layer of Pooling"),
    ("denseformer/nano", "DenseFormer"), ("transformer/nano", "Transformer may read its stream"),
    ("gpt/nano:norm=rms_norm", "RMSNorm"), ("vit/nano:residual=post_norm", "PostNorm"),
    ("gpt/nano:mixer=deltanet", "DeltaNet"), ("vit/nano+adaptformer", "ParallelAdapter"),
    ("hvt/nano", "PooledStack does to the tokens"),
])
def test_refuses_by_name(host, why):
    with pytest.raises(DoesNotFit, match=why):
        apply(create_model(host), "pre_rmsnorm")


def test_bad_settings():
    model = create_model("vit/nano")
    with pytest.raises(UnknownName, match="did you mean crms"):
        apply(model, "pre_rmsnorm", form="crm")
    with pytest.raises(DoesNotFit, match="compressed already"):
        apply(apply(model, "pre_rmsnorm", form="crms"), "pre_rmsnorm")


@pytest.mark.parametrize(("name", "options"), [
    ("vit_d192_l4_ln", {"heads": 4, "pool": "mean"}), ("vit_tiny_rms_training", {}),
])
@torch.no_grad()
def test_authors_answers(name, options):
    """In the layout "authors": the model as it is read, and each form of it."""
    state, inputs, golden = replay(GOLDEN / f"pre_rmsnorm__{name}.json.gz")
    model = load(state, **options)
    compare(golden, model(*inputs))
    for form in ("rms", "crms"):
        compare(golden, apply(model, "pre_rmsnorm", form=form)(*inputs))
