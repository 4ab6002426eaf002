"""ViT-22B: the parallel block against its equations, its counts, any of its changes, and a matrix on several processes."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.backbones import scaling_vit
from formarium.papers.backbones.vit_22b import PRESETS, ParallelBlock, ShardedLinear
from formarium.parts.position import Rotary

DIM, HEADS, HIDDEN = 16, 4, 48


def written_out(part, x):
    """MLP(x) + Attention(x) with the matrices taken apart, head by head, softmax(LN(q) LN(k)^T / sqrt(d)) v."""
    w_q, w_k, w_v, w_1 = part.weight_in.split((DIM, DIM, DIM, HIDDEN))
    w_o, w_2 = part.weight_out.split((DIM, HIDDEN), dim=1)
    b_q, b_k, b_v = (0, 0, 0) if part.qkv_bias is None else part.qkv_bias.chunk(3)
    d, out = DIM // HEADS, 0
    for h in range(HEADS):
        at = slice(h * d, (h + 1) * d)
        q, k, v = ((x @ w.T + b)[..., at] for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        if part.q_norm is not None:
            q = F.layer_norm(q, (d,), part.q_norm.weight, eps=1e-6)
            k = F.layer_norm(k, (d,), part.k_norm.weight, eps=1e-6)
        out = out + (q @ k.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v @ w_o[:, at].T
    hidden = x @ w_1.T if part.hidden_bias is None else x @ w_1.T + part.hidden_bias
    return out + F.gelu(hidden) @ w_2.T + (0 if part.bias is None else part.bias)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": None, "bias": False}])
def test_parallel_block(options):
    """Forward and backward, in float64, at parameters away from their start."""
    part = ParallelBlock(DIM, Place(), heads=HEADS, ratio=3.0, **options).double()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, to = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True), torch.randn(2, 9, DIM, dtype=torch.float64)
    ours, theirs, inputs = part(x, Ctx()), written_out(part, x), [x, *part.parameters()]
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad((ours * to).sum(), inputs), torch.autograd.grad((theirs * to).sum(), inputs))


def test_normed_scores_are_bounded():
    """However large queries and keys get, a score is at most sqrt(d) times the norms' scales."""
    part = ParallelBlock(DIM, Place(), heads=HEADS)
    with torch.no_grad():
        part.weight_in.mul_(1e4)
    seen = []
    part.watch = seen.append
    part(torch.randn(2, 9, DIM), Ctx())
    scores = seen[0].q @ seen[0].k.transpose(2, 3) / 2
    assert 1 < scores.abs().max() <= 2.001


def test_counts():
    """Table 1: 21,743 M; ViT-e with MAP head and JFT's classes 3,926 M; ViT-G without 1,843 M."""
    with torch.device("meta"):
        assert count_parameters(PRESETS["22b"].but(num_classes=0)()) == pytest.approx(21_743e6, rel=1e-3)
        whole = PRESETS["22b_map"].but(num_classes=0)()
        assert count_parameters(whole) - count_parameters(whole.map_head) == pytest.approx(21_743e6, rel=1e-3)
        assert count_parameters(PRESETS["e"].but(num_classes=29_593)()) == pytest.approx(3_926e6, rel=1e-3)
        gigantic = PRESETS["g"].but(num_classes=0)()
        assert count_parameters(gigantic) - count_parameters(gigantic.map_head) == pytest.approx(1_843e6, rel=1e-3)
    assert PRESETS["g"] == scaling_vit.PRESETS["gigantic_p14"]
    layers = [n for n, _ in whole.named_parameters() if n.startswith("stages.0.layers.0.")]
    assert len(layers) == 7  # the norm, two matrices, two biases, norms of queries and keys


@pytest.mark.parametrize("block", ["parallel", "sequential"])
@pytest.mark.parametrize(("flags", "pool"), [((True, False, False), "token"), ((False, True, True), "map"),
                                             ((True, True, False), "mean"), ((False, False, True), "map")])
def test_any_combination(block, flags, pool):
    """Builds, has the biases that were asked for and no other, learns, and is told from its tensors."""
    qk_norm, qkv_bias, norm_bias = flags
    changes = {"block": block, "pool": pool, "qk_norm": qk_norm, "qkv_bias": qkv_bias, "norm_bias": norm_bias, "depth": 1}
    model = fm.create_model("vit_22b/nano", **changes)
    names = dict(model.named_parameters())
    assert any("q_norm.weight" in n for n in names) == qk_norm
    assert any("qkv" in n and "bias" in n for n in names if "map_head" not in n) == qkv_bias
    assert any("norm.bias" in n for n in names) == ("norm.bias" in names) == norm_bias
    model(model.example(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names.values())
    plain = block == "sequential" and flags == (False, True, True)
    if not plain:
        found = fm.load(model.state_dict(), "vit_22b")
        assert_close(found.eval()(x := model.example(2)), model.eval()(x))
    elif pool == "map":
        assert fm.load(model.state_dict()).recipe["name"] == "scaling_vit/nano"


def test_in_other_vits():
    """The block as the whole layer of a ViT with a MAP head, with rotary positions and group norm; alone as a mixer."""
    model = fm.create_model("scaling_vit/nano:mixer=parallel(ratio=2,position=rotary),norm=group_norm", position="none",
                            residual="post_norm")
    assert isinstance(model.stages[0].layers[0]["mixer"].inner.position, Rotary)
    assert fm.create_model("vit/nano:mixer=parallel(qkv_bias=true),pool=mean")(torch.randn(2, 3, 28, 28)).shape == (2, 1000)
    whole = scaling_vit.PRESETS["nano"].but(mixer=spec(ParallelBlock), channel=None)()
    assert list(whole.stages[0].layers[0]) == ["mixer"]
    assert whole(whole.example(2)).shape == (2, 1000)
    with pytest.raises(DoesNotFit, match="no option 'causal'"):
        fm.create_model("gpt/nano:mixer=parallel")
    with pytest.raises(DoesNotFit, match="'parallel' or 'sequential', not 'both'"):
        fm.create_model("vit_22b/nano", block="both")


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from formarium.core.errors import DoesNotFit
from formarium.papers.backbones.vit_22b import ShardedLinear
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=3)
two = dist.new_group([0, 2])
for group in (None, two):
    if dist.get_rank(group) < 0:
        continue
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for by, bias in (("rows", True), ("rows", False), ("columns", True), ("columns", False)):
        torch.manual_seed(0)
        plain = nn.Linear(12, 24, bias=bias).double()
        whole, to = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
        layer = ShardedLinear(plain, by=by, group=group)
        assert layer.weight.numel() == plain.weight.numel() // world
        x = whole.chunk(world, -1)[rank].clone().requires_grad_()
        y = layer(x)
        (y * to.chunk(world, -1)[rank]).sum().backward()
        whole.requires_grad_()
        want = plain(whole)
        (want * to).sum().backward()
        torch.testing.assert_close(y, want.chunk(world, -1)[rank])
        torch.testing.assert_close(x.grad, whole.grad.chunk(world, -1)[rank])
        cut = plain.weight.grad.chunk(world, 0 if by == "rows" else 1)[rank]
        torch.testing.assert_close(layer.weight.grad, cut)
        if bias:
            torch.testing.assert_close(layer.bias.grad, plain.bias.grad.chunk(world)[rank])
try:
    ShardedLinear(nn.Linear(12, 25))
except DoesNotFit as error:
    assert "25x12 cannot be cut evenly" in str(error)
else:
    raise AssertionError
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_linear(tmp_path):
    """The answer and all gradients of the plain layer, cut, over gloo: on three processes, and on two of them."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    started = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE,
                                text=True) for rank in range(3)]
    said = [p.communicate(timeout=300)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0, 0], said


def test_sharded_linear_alone():
    with pytest.raises(DoesNotFit, match="init_process_group"):
        ShardedLinear(torch.nn.Linear(4, 4))
    with pytest.raises(UnknownName, match="'diagonals'"):
        ShardedLinear(torch.nn.Linear(4, 4), by="diagonals")
