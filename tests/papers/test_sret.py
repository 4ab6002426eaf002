"""SReT: runs that share weights, slices against masks, shuffling, soft labels, the authors' answers and names."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.papers.backbones.deit import Distillation
from formarium.papers.backbones.sret import KEYS, LearnableResidual, SlicedAttention
from formarium.parts.attend import attend
from formarium.parts.attention import join_heads
from formarium.weights.fit import fit
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


# sliced attention


@pytest.mark.parametrize(("n", "groups"), [(12, 3), (12, 1), (13, 4), (4, 3), (5, 9)])
@pytest.mark.parametrize("run", [0, 1])
def test_slices_are_blocks_of_a_mask(n, groups, run):
    """Tokens of a slice see each other; answers and gradients are those of one masked attention."""
    options = {"groups": groups, "regroups": 1} if run == 0 else {"groups": 1, "regroups": groups}
    part = moved(SlicedAttention(8, Place(), heads=2, shuffle="never", **options))
    x = torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True)
    slice_of = torch.arange(n) // -(-n // groups)
    whole = part.proj(join_heads(attend(*part.project(x), mask=slice_of[:, None] == slice_of)))
    ours, g = part(x, Ctx(shared={"run": run})), torch.randn(2, n, 8, dtype=torch.float64)
    assert_close(ours, whole)
    inputs = [x, *part.parameters()]
    assert_close(torch.autograd.grad((ours * g).sum(), inputs), torch.autograd.grad((whole * g).sum(), inputs))


def test_later_runs_are_shuffled():
    """The slices are those of a random order; the tokens come back in their own."""
    part = moved(SlicedAttention(8, Place(), heads=2, groups=3, regroups=2, shuffle="always")).eval()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    torch.manual_seed(5)
    order = torch.randperm(12)
    torch.manual_seed(5)
    out = part(x, Ctx(shared={"run": 1}))
    part.shuffle = "training"  # in evaluation: in order
    assert_close(out[:, order], part(x[:, order], Ctx(shared={"run": 1})))
    assert torch.equal(part(x, Ctx(shared={"run": 0})), part(x, Ctx(shared={})))
    part.train()
    assert not torch.allclose(part(x, Ctx(shared={"run": 1})), part(x, Ctx(shared={"run": 1})))
    assert torch.equal(part(x, Ctx(shared={"run": 0})), part(x, Ctx(shared={"run": 0})))  # the first run is not


# recursion


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("projection_ratio", [None, 1.0])
def test_runs_written_out(loops, projection_ratio):
    model = moved(create_model("sret/nano", loops=loops, projection_ratio=projection_ratio)).eval()
    x = model.example(2).double()
    tokens, ctx = model.embed(x)
    for stage in model.stages:
        if stage.resample is not None:
            tokens, ctx = stage.resample(tokens, ctx)
        assert stage.depth == loops * len(stage.layers)
        for i, layer in enumerate(stage.layers):
            for run in range(loops):
                told = Ctx(grid=ctx.grid, shared={"run": run})
                a = layer["mixer"]
                tokens = a.keep * tokens + a.add * a.inner(a.norm(tokens), told)
                b = layer["channel"]
                tokens = b.keep * tokens + b.add * b.inner(b.norm(tokens), told)
                if projection_ratio is not None:
                    c = stage.projections[i * loops + run]
                    tokens = c.keep * tokens + c.add * c.inner(c.norm(tokens), told)
    assert_close(model(x), model.head(model.norm(tokens.mean(1))))


def test_loops_cost_no_parameters():
    sizes = {n: count_parameters(create_model("sret/nano", projection_ratio=None, loops=n)) for n in (1, 2, 5)}
    assert len(set(sizes.values())) == 1


def test_a_thousand_runs():
    """Of three blocks; the scalars keep the deep recursion finite, forward and backward."""
    model = create_model("sret/nano", loops=333, projection_ratio=None, dims=(8, 16), heads=(1, 2), img_size=8)
    for stage in model.stages:
        for residual in (r for r in stage.modules() if isinstance(r, LearnableResidual)):
            torch.nn.init.constant_(residual.add, 1e-2)
    assert sum(stage.depth for stage in model.stages) == 999
    model(model.example(2)).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_soft_labels():
    """Distillation as theirs, the cross entropy with the teacher's probabilities: the same gradients."""
    torch.manual_seed(0)
    teacher, student = create_model("sret/nano").eval(), create_model("sret/nano", unique=(1, 1)).eval()
    distil = Distillation(student, teacher=teacher, kind="soft", alpha=1.0, by_image=True).eval()
    x, labels = teacher.example(4), torch.zeros(4, dtype=torch.long)
    parameters = list(student.parameters())
    ours = torch.autograd.grad(distil(x, labels)[0], parameters)
    with torch.no_grad():
        told = teacher(x).softmax(1)
    theirs = torch.autograd.grad(-(told * student(x).log_softmax(1)).sum(1).mean(), parameters)
    assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_what_does_not_fit():
    for options, why in [({"heads": (1,)}, "of the same stages"), ({"loops": 0}, "run once or more"),
                         ({"unique": (0, 1)}, "a block or more"), ({"groups": (0, 1)}, "1 slice or more"),
                         ({"patch": 16, "img_size": 32}, "1, 2, 4 or 8 pixels, not 16"),
                         ({"dims": (32, 48)}, "48 must be a multiple of 32")]:
        with pytest.raises(DoesNotFit, match=why):
            create_model("sret/nano", **options)
    with pytest.raises(UnknownName, match="did you mean training"):
        create_model("sret/nano", shuffle="trainig")


# the authors' answers and names


@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN / "sret__sret_t.json.gz")
    model = load(state)
    assert model.recipe == {"name": "sret/t", "changes": {}}
    assert compare(golden, model(x)) < 3e-5
    model.stages[0].layers[0]["mixer"].keep += 1
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, model(x))


@torch.no_grad()
def test_their_names():
    """A shared block stands under the names of both runs."""
    model = moved(create_model("sret/nano")).float().eval()
    theirs = KEYS["authors"].convert(model.state_dict(), {"img_size": 28, "patch": 2}, back=True).state
    assert theirs["pos_embed"].shape == (1, 32, 14, 14)
    for a, b in ((0, 2), (4, 6)):
        assert torch.equal(theirs[f"transformers.1.blocks.{a}.attn.qkv.weight"],
                           theirs[f"transformers.1.blocks.{b}.attn.qkv.weight"])
    assert "transformers.1.blocks.1.norm2.weight" not in theirs
    counted = theirs | {f"patch_embed.bn{i}.num_batches_tracked": torch.tensor(7) for i in (1, 2, 3)}
    x = model.example(2)
    assert torch.equal(load(counted)(x), model(x))


@pytest.mark.parametrize("name", ["t_unsliced", "lt", "s", "s_unsliced_512"])
def test_sizes_are_told(name):
    """Slices leave no trace, so the first of a size is taken; other pixels are told by the positions."""
    with torch.device("meta"):
        model = create_model(f"sret/{name}")
        theirs = KEYS["authors"].convert(model.state_dict(), {"img_size": model.img_size, "patch": 8}, back=True).state
    found = fit(theirs, "sret", "authors")
    assert found.error is None
    taken = "t" if name == "t_unsliced" else "s" if name == "s_unsliced" else name
    assert (found.plan.name, found.plan.changes) == (f"sret/{taken}", {})
    assert {"heads", "groups", "regroups"} <= set(found.assumed)
