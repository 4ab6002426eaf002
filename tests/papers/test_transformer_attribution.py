"""Relevance: the authors' maps, what the rules keep, and that capturing attention touches nothing else."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.arena.explanations import explain
from formarium.core.build import create_model
from formarium.core.errors import DoesNotFit
from formarium.papers.explanations import transformer_attribution as paper
from formarium.parts.attention import Attention, Seen
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_attribution__vit_96_d192_l4_class3.json.gz"


def moved(name="vit/nano", **changes):
    model = create_model(name, **changes).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_golden():
    """Logits, and the maps of six methods of the authors' code, for class 3."""
    state, (images,), golden = replay(GOLDEN)
    model = load(state, "vit", heads=3).double()
    model.norm.eps = 1e-5  # their last norm has PyTorch's default
    images, three = images.double(), torch.tensor([3])
    maps = [model(images)]
    for method, settings in (("transformer_attribution", {}), ("lrp_rollout", {}), ("lrp_layer", {"layer": -1}),
                             ("lrp_layer", {"layer": 1}), ("raw_attention", {}), ("full", {})):
        out = paper.METHODS[method](model, images.clone(), three, **settings)
        out = out if method == "full" else out.flatten(1)
        maps.append(out if method in ("transformer_attribution", "lrp_rollout", "full") else out[0])
    assert compare(golden, maps) < 1e-5
    maps[1] = paper.transformer_attribution(model, images, torch.tensor([4])).flatten(1)
    with pytest.raises(AssertionError, match="output 1 differs"):
        compare(golden, maps)


def test_linear_rule_is_the_loop():
    """z+: each input's share of an output is its positive contribution over all of them."""
    x, w, r = torch.randn(2, 5).double(), torch.randn(3, 5).double(), torch.randn(2, 3).double()
    expected = torch.zeros(2, 5).double()
    for b in range(2):
        for o in range(3):
            shares = [max(0.0, (x[b, i] * w[o, i]).item()) for i in range(5)]
            for i in range(5):
                expected[b, i] += shares[i] / sum(shares) * r[b, o]
    assert_close(paper.through_linear(r, x, w), expected, atol=1e-7, rtol=1e-6)
    assert_close(paper.through_linear(r, x, w).sum(1), r.sum(1), atol=1e-7, rtol=1e-6)


def test_sums_are_kept_by_skips():
    """In proportion within an image; nothing leaks from one image of a batch to another."""
    a, b, r = (torch.randn(3, 4, 5).double() for _ in range(3))
    one, other = paper.through_sum(r, a, b)
    assert_close((one + other).sum((1, 2)), r.sum((1, 2)), atol=1e-7, rtol=1e-6)
    alone = paper.through_sum(r[1:2], a[1:2], b[1:2])
    assert_close((one[1:2], other[1:2]), alone)
    assert_close(paper.through_uses((a, b), r), a + b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["vit/nano", "vit/nano:pool=mean", "vit/nano:residual=post_norm"])
def test_relevance_is_conserved(name):
    """From the class to the tokens, within 0.1 %, for every image of a batch."""
    model = moved(name)
    with torch.no_grad():
        images = model.example(3).double()
    trace = paper.Trace(model.requires_grad_(False), images)
    assert_close(trace.logits, model(images))
    total = trace.relevance(torch.tensor([0, 1, 2])).sum((1, 2))
    assert_close(total, torch.ones(3).double(), atol=1e-3, rtol=0)


def test_only_the_layers_asked_leave_the_fused_kernel(monkeypatch):
    """Raw attention writes out one layer's map, rollout all four; afterwards nothing watches, also after an error."""
    model, written = create_model("vit/nano").eval(), []
    original = Seen.log_probabilities
    monkeypatch.setattr(Seen, "log_probabilities", lambda self: written.append(1) or original(self))
    for method, count in (("raw_attention", 1), ("rollout", 4)):
        written.clear()
        explain(model, model.example(2), 3, method=method)
        assert len(written) == count
    with pytest.raises(Exception, match="built for images"):
        paper.rollout(model, torch.randn(1, 3, 8, 8), torch.tensor([0]))
    assert all(m.watch is None for m in model.modules() if isinstance(m, Attention))


def test_rollout_is_the_product_written_out():
    model = moved()
    images = model.example(2).double()
    maps, _ = paper.attention_maps(model, images, range(4))
    joint = torch.eye(50).double()
    for one in maps:
        joint = ((one.mean(1) + torch.eye(50)) / 2) @ joint
    assert_close(paper.rollout(model, images, torch.tensor([0, 0])).flatten(1), joint[:, 0, 1:])
    assert_close(maps[0].sum(-1), torch.ones(2, 4, 50).double())


def test_full_keeps_the_sum_of_the_patches():
    model = moved().requires_grad_(False)
    images = model.example(2).double()
    pixels = paper.full(model, images, torch.tensor([1, 2]))
    assert pixels.shape == (2, 28, 28)
    assert pixels.isfinite().all()


def test_refuses_what_is_no_plain_vit():
    """Poolings between layers are not in the pass that is written out."""
    model = create_model("hvt/nano")
    with pytest.raises(DoesNotFit, match="explains plain ViTs"):
        paper.Trace(model, model.example(1))
    with pytest.raises(DoesNotFit, match="is shown of plain ViTs"):
        paper.attention_maps(model, model.example(1), [0])
