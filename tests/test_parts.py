"""The shelf against definitions: each efficient or vendored form equals a naive twin written here."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.model import count_parameters
from formarium.core.part import Part
from formarium.core.spec import spec
from formarium.papers.backbones.poolformer import Pooling
from formarium.papers.backbones.swin import PatchMerging, WindowAttention
from formarium.papers.mixers.cosformer import CosFormer
from formarium.papers.residuals.denseformer import FLAT, DenseFormer
from formarium.parts import attend as attend_module
from formarium.parts.attend import attend, visible
from formarium.parts.attention import Attention, head_dim, join_heads, split_heads
from formarium.parts.channel import Mlp, SwiGLU
from formarium.parts.embed import ConvEmbed, PatchEmbed, to_map, to_tokens
from formarium.parts.linear import EPS, causal_linear_attention, linear_attention
from formarium.parts.norm import GroupNorm, NoNorm
from formarium.parts.position import LearnedPosition, Rotary
from formarium.parts.residual import PostNorm, PreNorm, drop_path
from formarium.parts.stem import StdConv, same_pad
from formarium.parts.window import RelativeBias, from_windows, pad_to_windows, shift_mask, to_windows
from formarium.skeletons.backbone import Backbone, Stage
from formarium.skeletons.stack import Stack
from formarium.weights.keys import keymap, rule
from golden_replay import compare, replay


def projected_gradients(out, *inputs):
    generator = torch.Generator().manual_seed(3)
    along = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * along).sum(), inputs)


# attend

def naive(q, k, v, *, bias=None, mask=None, causal=False, window=None, lengths=None, scale=None):
    """attend by its definition."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (torch.stack([t[:, h // groups] for h in range(q.shape[1])], dim=1) for t in (k, v))
    sequence = [0] * n if lengths is None else [s for s, length in enumerate(lengths) for _ in range(length)]
    seen = torch.tensor([[(not causal or j <= i + m - n) and (window is None or abs(i + m - n - j) < window)
                          and (lengths is None or sequence[i] == sequence[j]) for j in range(m)] for i in range(n)])
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        seen = seen & mask
    return torch.einsum("bhnm,bhme->bhne", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


BRANCHES = {
    "explicit": "_explicit", "banded": "_banded", "packed": "_packed",
}
ATTEND = [  # branch, b, h, hk, n, m, options; a bias or mask is a shape to draw
    ("explicit", 2, 4, 4, 20, 20, {}),
    ("explicit", 2, 4, 4, 13, 7, {"scale": 0.3}),
    ("explicit", 2, 4, 2, 20, 20, {"bias": (1, 4, 20, 20)}),
    ("explicit", 2, 4, 1, 20, 9, {"mask": (2, 1, 1, 9)}),
    ("explicit", 2, 4, 4, 16, 16, {"bias": (4, 16, 16), "mask": (2, 1, 16, 16)}),
    ("explicit", 2, 4, 4, 5, 17, {"causal": True}),
    ("explicit", 2, 4, 4, 1, 17, {"causal": True}),
    ("explicit", 2, 4, 4, 1, 17, {"causal": True, "window": 4}),
    ("explicit", 2, 4, 4, 17, 17, {"causal": True, "bias": (1, 4, 17, 17), "mask": (2, 1, 1, 17)}),
    ("explicit", 2, 4, 4, 30, 30, {"window": 1}),
    ("explicit", 2, 4, 4, 30, 30, {"window": 4, "causal": True}),
    ("explicit", 2, 4, 2, 12, 30, {"window": 15, "causal": True}),
    ("explicit", 2, 4, 4, 12, 30, {"window": 30}),
    ("sdpa", 2, 4, 4, 20, 20, {"causal": True}),
    ("sdpa", 2, 4, 4, 1, 1, {"causal": True}),
    ("sdpa", 1, 4, 4, 90, 90, {}),
    ("sdpa", 1, 4, 2, 90, 90, {"causal": True, "scale": 0.2}),
    ("sdpa", 1, 4, 4, 70, 99, {"causal": True}),
    ("explicit", 1, 4, 4, 70, 99, {"bias": (1, 4, 70, 99)}),
    ("sdpa", 1, 2, 2, 260, 270, {"bias": (1, 2, 260, 270)}),
    ("sdpa", 2, 4, 4, 70, 99, {"mask": (2, 1, 1, 99)}),
    ("sdpa", 2, 4, 2, 260, 260, {"bias": (1, 4, 260, 260), "mask": (2, 1, 260, 260)}),
    ("sdpa", 2, 2, 2, 260, 260, {"causal": True, "bias": (1, 2, 260, 260)}),
    ("sdpa", 1, 4, 4, 100, 100, {"window": 10}),
    ("sdpa", 1, 4, 2, 100, 120, {"window": 10, "causal": True}),
    ("banded", 2, 2, 2, 1024, 1024, {"window": 256}),
    ("banded", 2, 2, 2, 1100, 1100, {"window": 100, "causal": True}),
    ("banded", 1, 2, 1, 1500, 1500, {"window": 130}),
    ("banded", 1, 2, 2, 1337, 1337, {"window": 333, "causal": True}),
    ("banded", 1, 2, 2, 1031, 1031, {"window": 1}),
    ("banded", 1, 2, 2, 1025, 1025, {"window": 65, "causal": True, "scale": 0.5}),
    ("packed", 1, 4, 4, 24, 24, {"lengths": (7, 1, 7, 9)}),
    ("packed", 1, 4, 2, 24, 24, {"lengths": (7, 1, 7, 9), "causal": True}),
    ("packed", 1, 4, 4, 24, 24, {"lengths": (1,) * 24, "causal": True}),
    ("packed", 1, 4, 4, 24, 24, {"lengths": (24,), "causal": True}),
    ("packed", 1, 4, 4, 130, 130, {"lengths": (90, 40), "causal": True, "window": 5}),
    ("packed", 1, 2, 2, 1060, 1060, {"lengths": (30, 1030), "causal": True, "window": 50}),
]


@pytest.mark.parametrize(("branch", "b", "h", "hk", "n", "m", "options"), ATTEND)
def test_attend(branch, b, h, hk, n, m, options, monkeypatch):
    """Every branch against the definition in double precision, forward and backward; values may be of another width."""
    taken = []
    for name, function in BRANCHES.items():
        original = getattr(attend_module, function)
        monkeypatch.setattr(attend_module, function, lambda *a, _n=name, _f=original, **k: taken.append(_n) or _f(*a, **k))
    q, k, v = torch.randn(b, h, n, 8), torch.randn(b, hk, m, 8), torch.randn(b, hk, m, 6)
    options, inputs = dict(options), [q, k, v]
    if "bias" in options:
        options["bias"] = torch.randn(options["bias"])
        inputs.append(options["bias"])
    if "mask" in options:
        options["mask"] = torch.rand(options["mask"]) < 0.7
        options["mask"][..., 0] = True  # no row may be empty
    for t in inputs:
        t.requires_grad_()
    out = attend(q, k, v, **options)
    assert (taken[0] if taken else "sdpa") == branch
    exact = [t.detach().double().requires_grad_() for t in inputs]
    if "bias" in options:
        options["bias"] = exact[3]
    expected = naive(*exact[:3], **options)
    assert_close(out.double(), expected, atol=2e-6, rtol=1e-4)
    for got, want in zip(projected_gradients(out, *inputs), projected_gradients(expected, *exact), strict=True):
        assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


def test_attend_off_the_cpu_agrees():
    """Other devices never take the explicit form; on the meta device the shapes at least are the same."""
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 6)
    for options in ({}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3}):
        assert attend(*(t.to("meta") for t in (q, k, v)), **options).shape == attend(q, k, v, **options).shape


@pytest.mark.parametrize("n", [7, 80])
def test_attend_with_more_axes(n):
    """Axes before the heads are as one, with a bias or mask that does not have them all: windows of a batch."""
    q, k, v = (torch.randn(2, 3, 4, n, 8) for _ in range(3))
    bias, mask = torch.randn(3, 4, n, n), (torch.rand(3, 1, n, n) < 0.7) | torch.eye(n, dtype=torch.bool)
    for options in ({}, {"bias": bias}, {"mask": mask}, {"bias": bias, "mask": mask}, {"causal": True, "bias": bias}):
        expected = torch.stack([attend(q[i], k[i], v[i], **options) for i in range(2)])
        assert_close(attend(q, k, v, **options), expected)
    assert_close(attend(q, k[:, :, :2], v[:, :, :2])[1], attend(q[1], k[1, :, :2], v[1, :, :2]))


def test_packed_refuses_what_it_cannot_do():
    q = torch.randn(1, 2, 10, 4)
    for wrong in ({"lengths": (4, 4)}, {"lengths": (5, 5), "mask": torch.ones(10, 10, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="one row"):
            attend(q, q, q, **wrong)


def test_visible():
    assert visible(3, 5, True, None).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(3, 5, True, 2).tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 3, False, 2).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


def test_attention_part():
    """The part is projections around the definition: with a window, causal, masked."""
    part = Attention(12, Place(), heads=3, causal=True, window=4).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = (torch.rand(2, 1, 1, 9) < 0.8) | torch.eye(9, dtype=torch.bool)
    q, k, v = part.qkv(x).view(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = part.proj(naive(q, k, v, causal=True, window=4, mask=mask).transpose(1, 2).reshape(2, 9, 12))
    assert_close(part(x, Ctx(mask=mask)), expected)


def test_heads():
    x = torch.randn(2, 5, 3 * 4 * 6)
    q, k, v = split_heads(x, 3, 4)
    assert_close(q[:, 1], x[..., 6:12])
    assert_close(torch.cat([join_heads(t) for t in (q, k, v)], dim=-1), x)
    with pytest.raises(DoesNotFit, match="7 heads do not divide a width of 64; the nearest number that does is 8"):
        head_dim(64, 7)


# linear attention

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_causal_linear_attention(n, chunk):
    """In chunks == step by step == sums over prefixes, with what came before carried over."""
    q, k = (torch.rand(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True)
    past_k, past_v = torch.rand(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    empty = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    state = causal_linear_attention(empty, past_k, past_v, chunk=chunk)[1]
    for before, start in ((None, 0), (state, 6)):
        all_k, all_v = (k, v) if before is None else (torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2))
        prefixes = torch.cat([linear_attention(q[:, :, i:i + 1], all_k[:, :, :start + i + 1], all_v[:, :, :start + i + 1])
                              for i in range(n)], dim=2)
        out, after = causal_linear_attention(q, k, v, state=before, chunk=chunk)
        assert_close(out, prefixes)
        assert_close(projected_gradients(out, q, k, v), projected_gradients(prefixes, q, k, v))
        steps, carried = [], before
        for i in range(n):
            step, carried = causal_linear_attention(*(t[:, :, i:i + 1] for t in (q, k, v)), state=carried)
            steps.append(step)
        assert_close(torch.cat(steps, dim=2), prefixes)
        assert_close(carried, after)


def quadratic_cosformer(part, x, source=None, mask=None):
    """cosFormer with its N x M weights written out: relu(q_i) . relu(k_j) cos(pi/2 (i - j)/length), Eq. 9."""
    source = x if source is None else source
    b, n, c = x.shape
    m, d = source.shape[1], c // part.heads
    q = part.q(x).relu().view(b, n, part.heads, d)
    k, v = part.kv(source).view(b, m, 2, part.heads, d).unbind(2)
    away = torch.arange(n)[:, None] - torch.arange(m)
    length = max(n, m) if part.length is None else part.length
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k.relu())
    if part.reweight:
        weights = weights * torch.cos(math.pi / 2 * away / length).double()
    if part.causal and source is x:
        weights = weights * (away >= 0)
    if mask is not None:
        weights = weights * mask
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(EPS)  # ReLU may leave a query nothing
    return part.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, c))


def shaken(module):
    """In double precision, parameters moved away from a start that hides what they do."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


@pytest.mark.parametrize("n", [1, 7, 64, 100])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"length": 120}, {"causal": True, "length": 120},
                                     {"reweight": False}, {"reweight": False, "causal": True}])
def test_cosformer_is_its_quadratic_form(n, options):
    part = shaken(CosFormer(12, Place(), heads=2, **options))
    x = torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True)
    out, expected = part(x, Ctx()), quadratic_cosformer(part, x)
    assert_close(out, expected, atol=1e-5, rtol=1e-5)
    inputs = (x, *part.parameters())
    for got, want in zip(projected_gradients(out, *inputs), projected_gradients(expected, *inputs), strict=True):
        assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_cosformer_crosses(n, m, causal):
    """With a memory of another length the weights go to its tokens, whichever is longer; decoding sees all of it."""
    part = shaken(CosFormer(12, Place(), heads=2, causal=causal, length=10))
    x, memory = torch.randn(2, n, 12, dtype=torch.float64), torch.randn(2, m, 12, dtype=torch.float64)
    expected = quadratic_cosformer(part, x, memory)
    assert_close(part(x, Ctx(memory=(memory, Ctx()))), expected, atol=1e-5, rtol=1e-5)
    cache, steps = Cache(), []
    for i in range(n):
        steps.append(part(x[:, i:i + 1], Ctx(memory=(memory, Ctx()), cache=cache)))
        cache.length += 1
    assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)
    part.length = None
    assert_close(part(x, Ctx(memory=(memory, Ctx()))), quadratic_cosformer(part, x, memory), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_cosformer_hides_keys(causal):
    part = shaken(CosFormer(12, Place(), heads=2, causal=causal))
    x, mask = torch.randn(2, 9, 12, dtype=torch.float64), torch.rand(2, 1, 1, 9) < 0.6
    mask[..., :1] = True
    assert_close(part(x, Ctx(mask=mask)), quadratic_cosformer(part, x, mask=mask), atol=1e-5, rtol=1e-5)
    with pytest.raises(DoesNotFit, match="not single pairs"):
        part(x, Ctx(mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)))


def test_cosformer_refuses():
    x = torch.randn(1, 9, 12)
    with pytest.raises(DoesNotFit, match="packed"):
        CosFormer(12, Place())(x, Ctx(lengths=(4, 5)))
    with pytest.raises(DoesNotFit, match="length= to decode"):
        CosFormer(12, Place(), causal=True)(x, Ctx(cache=Cache()))
    with pytest.raises(DoesNotFit, match=r"at most 8 tokens .* got 9"):
        CosFormer(12, Place(), length=8)(x, Ctx())


# positions

def turned(rotary, x, at):
    """x (B, H, N, D) turned as at positions `at` (N)."""
    return rotary.rotate(x, x, Ctx(coords=torch.as_tensor(at, dtype=torch.float64)[None, :, None]))[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_relative(interleaved):
    """Scores depend on the difference of positions alone, lengths do not change, position 0 is not turned."""
    rotary = Rotary(8, 2, interleaved=interleaved)
    q, k = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    at = torch.arange(6)
    scores = turned(rotary, q, at) @ turned(rotary, k, at).transpose(-2, -1)
    shifted = turned(rotary, q, at + 31) @ turned(rotary, k, at + 31).transpose(-2, -1)
    assert_close(scores, shifted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores, q @ k.transpose(-2, -1), atol=1e-2)
    assert_close(turned(rotary, q, at).norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=1e-6)
    assert_close(turned(rotary, q, [0] * 6), q)


def test_rotary_layouts_are_permutations():
    x = torch.randn(1, 2, 6, 8)
    pairs = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the half-split order of interleaved channels
    interleaved = turned(Rotary(8, 2, interleaved=True), x, range(6))
    assert_close(interleaved[..., pairs], turned(Rotary(8, 2), x[..., pairs], range(6)))


def test_rotary_by_definition():
    """Pair i at position p is turned by the angle p / base^(2i/d)."""
    x, d = torch.randn(1, 1, 5, 8, dtype=torch.float64), 8
    as_complex = torch.view_as_complex(x.view(1, 1, 5, 4, 2))
    angle = torch.arange(5.0, dtype=torch.float64)[:, None] / 100 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    expected = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    got = Rotary(8, 1, base=100.0, interleaved=True).rotate(x, x, Ctx())[1]
    assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_rotary_counts_on_from_the_cache_and_afresh_in_packed_sequences():
    rotary, x = Rotary(8, 2), torch.randn(1, 2, 10, 8)
    whole = rotary.rotate(x, x, Ctx())[0]
    assert_close(rotary.rotate(x[:, :, 6:], x[:, :, 6:], Ctx(cache=Cache(length=6)))[0], whole[:, :, 6:])
    packed = rotary.rotate(x, x, Ctx(lengths=(6, 4)))[0]
    assert_close(packed[:, :, :6], whole[:, :, :6])
    assert_close(packed[:, :, 6:], rotary.rotate(x[:, :, 6:], x[:, :, 6:], Ctx())[0])


def test_rotary_keeps_its_angles_in_half_precision():
    x = torch.randn(1, 1, 1, 64)
    exact = turned(Rotary(64, 1), x, [3001])
    half = turned(Rotary(64, 1).bfloat16(), x.bfloat16(), [3001])
    assert_close(half.float(), exact, atol=0.05, rtol=0.02)


def test_rotary_in_a_decoder():
    """Cached, packed and in chunks, as the contract has it for learned positions."""
    model = create_model("gpt/nano", position="rotary", context=40).double().eval()
    ids = model.example(1, (30,))
    cache = Cache()
    with torch.no_grad():
        whole = model(ids)
        assert_close(torch.cat([model(t, cache=cache) for t in ids.split([1, 20, 9], dim=1)], dim=1), whole)
        packed = model(ids, lengths=(13, 17))
        assert_close(packed, torch.cat((model(ids[:, :13]), model(ids[:, 13:])), dim=1))


def test_learned_positions():
    position = LearnedPosition(4, 6)
    x = torch.zeros(1, 3, 4)
    assert_close(position(x, Ctx()), position.table[:, :3])
    assert_close(position(x, Ctx(cache=Cache(length=2))), position.table[:, 2:5])
    assert_close(position(x, Ctx(lengths=(2, 1))), position.table[:, [0, 1, 0]])
    with pytest.raises(DoesNotFit, match="for 6 tokens, got 7"):
        position(x, Ctx(cache=Cache(length=4)))


# windows

def test_windows_are_the_blocks_of_the_grid():
    x = torch.arange(2 * 6 * 8).view(2, 6, 8, 1)
    windows = to_windows(x, (3, 4))
    assert windows.shape == (8, 12, 1)
    assert windows[6, :, 0].tolist() == x[1, 3:6, 0:4, 0].flatten().tolist()
    assert torch.equal(from_windows(windows, (3, 4), (6, 8)), x)
    padded = pad_to_windows(x[:, :5, :7], (3, 4))
    assert padded.shape == x.shape
    assert torch.equal(padded[:, :5, :7], x[:, :5, :7])
    assert not padded[:, 5:].any()
    assert not padded[:, :, 7:].any()


@pytest.mark.parametrize("shift", [(1, 2), (0, 2), (1, 0)])
def test_shifted_windows(shift):
    """Windows further down and right are the grid rolled up and left, and go back to where they were."""
    x = torch.randn(2, 6, 8, 5)
    windows = to_windows(x, (3, 4), shift)
    assert torch.equal(windows, to_windows(x.roll((-shift[0], -shift[1]), (1, 2)), (3, 4)))
    assert torch.equal(from_windows(windows, (3, 4), (6, 8), shift), x)


@pytest.mark.parametrize(("grid", "window", "shift"), [
    ((8, 8), (4, 4), (2, 2)), ((6, 9), (3, 3), (1, 1)), ((14, 7), (7, 7), (3, 0)), ((4, 10), (4, 5), (0, 2)),
])
def test_shift_mask(grid, window, shift):
    """Two tokens of a window of the shifted grid see each other if the shift wrapped both or neither, on each axis."""
    def wrapped(place):
        return tuple(p + s >= size for p, s, size in zip(place, shift, grid, strict=True))

    mask, k = shift_mask(grid, window, shift), 0
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            places = [(top + i, left + j) for i in range(window[0]) for j in range(window[1])]
            assert mask[k].tolist() == [[wrapped(a) == wrapped(b) for b in places] for a in places]
            k += 1
    assert k == len(mask)


def test_relative_bias():
    """One number for each head and offset."""
    bias = RelativeBias((2, 3), 4)
    places = [(i, j) for i in range(2) for j in range(3)]
    expected = torch.stack([torch.stack([bias.table[(a[0] - b[0] + 1) * 5 + a[1] - b[1] + 2] for b in places])
                            for a in places]).permute(2, 0, 1)
    assert torch.equal(bias(), expected)
    assert bias.table.shape == (15, 4)


@pytest.mark.parametrize("shifted", [False, True])
def test_window_over_the_grid_is_global_attention(shifted):
    part = shaken(WindowAttention(12, Place(), heads=3, window=7, grid=(3, 5), shifted=shifted))
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    q, k, v = part.qkv(x).view(2, 15, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = part.proj(naive(q, k, v, bias=part.bias()).transpose(1, 2).reshape(2, 15, 12))
    assert part.window == (3, 5)
    assert_close(part(x, Ctx(grid=(3, 5))), expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_by_token(shifted):
    """On a grid of several windows: a token sees those of its window, which lies half a window further if shifted."""
    part = shaken(WindowAttention(8, Place(), heads=2, window=4, shifted=shifted))
    x, by = torch.randn(1, 64, 8, dtype=torch.float64), 2 if shifted else 0
    places = [(i, j) for i in range(8) for j in range(8)]

    def window(place):
        return tuple((p - by) // 4 for p in place)

    seen = torch.tensor([[window(a) == window(b) for b in places] for a in places])
    index = torch.tensor([[max(0, min(48, (a[0] - b[0] + 3) * 7 + a[1] - b[1] + 3)) for b in places] for a in places])
    q, k, v = part.qkv(x).view(1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = naive(q, k, v, bias=part.bias.table[index].permute(2, 0, 1), mask=seen)
    assert_close(part(x, Ctx(grid=(8, 8))), part.proj(out.transpose(1, 2).reshape(1, 64, 8)))


def test_patch_merging_takes_odd_sides():
    merging = PatchMerging(4, 8)
    x = torch.randn(1, 15, 4)
    padded = F.pad(x.view(1, 3, 5, 4), (0, 0, 0, 1, 0, 1)).flatten(1, 2)
    out, ctx = merging(x, Ctx(grid=(3, 5)))
    assert ctx.grid == (2, 3)
    assert_close(out, merging(padded, Ctx(grid=(4, 6)))[0])


# the rest of the shelf

def test_pooling_is_average_pooling_less_the_input():
    x = torch.randn(2, 6, 5, 7)
    for size in (3, 5):
        expected = nn.AvgPool2d(size, 1, size // 2, count_include_pad=False)(x) - x
        assert_close(Pooling(6, Place(), size=size)(to_tokens(x), Ctx(grid=(5, 7))), to_tokens(expected))


def test_maps_and_tokens():
    x = torch.randn(2, 6, 5, 7)
    tokens = to_tokens(x)
    assert_close(tokens[:, 7 * 2 + 3], x[:, :, 2, 3])
    assert torch.equal(to_map(tokens, (5, 7)), x)
    assert torch.equal(to_map(torch.cat((tokens[:, :1], tokens), dim=1), (5, 7), prefix=1), x)


def test_grid_is_needed():
    for ctx, why in ((Ctx(), "needs tokens on a full grid"), (Ctx(grid=(3, 3), prefix=1), "nothing before it")):
        with pytest.raises(DoesNotFit, match=f"Pooling {why}" if ctx.grid is None else why):
            Pooling(6, Place())(torch.randn(1, 10, 6), ctx)
    with pytest.raises(DoesNotFit, match="at least 3x3 here, got 9x2"):
        ConvEmbed(3, 8, kernel=7, stride=4, padding=2)(torch.randn(1, 3, 9, 2), Ctx())


def test_group_norm():
    ours, theirs = shaken(GroupNorm(6)), nn.GroupNorm(1, 6).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    assert_close(ours(x.transpose(1, 2)), theirs(x).transpose(1, 2))


def test_patch_embedding_is_linear_on_patches():
    embed = PatchEmbed(3, 8, patch=(2, 4), img_size=(4, 12), class_token=True, position=spec(LearnedPosition))
    x = torch.randn(1, 3, 4, 12)
    out, ctx = embed(x, Ctx())
    assert (ctx.grid, ctx.prefix, out.shape[1]) == ((2, 3), 1, 7)
    patch = embed.proj.weight.flatten(1) @ x[0, :, 2:4, 4:8].flatten() + embed.proj.bias  # row 1, column 1
    assert_close(out[0, 1 + 4], patch + embed.position.table[0, 5])
    assert_close(out[0, 0], embed.cls[0, 0] + embed.position.table[0, 0])


def test_standardised_convolution():
    conv = StdConv(3, 5, 3, 2)
    w = conv.weight.flatten(1)
    w = ((w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True, correction=0) + conv.eps).sqrt()).view_as(conv.weight)
    x = torch.randn(1, 3, 8, 8)
    assert_close(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2))


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2)])
def test_same_padding(size, kernel, stride):
    x = torch.ones(1, 1, size, size)
    out = F.avg_pool2d(same_pad(x, kernel, stride), kernel, stride)
    assert out.shape[-1] == math.ceil(size / stride)


def test_swiglu():
    """By its definition, and at the parameters of an Mlp of the same ratio."""
    part, mlp = SwiGLU(64, Place(), ratio=3), Mlp(64, Place(), ratio=3, bias=False)
    assert count_parameters(part) == pytest.approx(count_parameters(mlp), rel=0.01)
    x = torch.randn(2, 5, 64)
    w, v = part.fc1.weight.chunk(2)
    assert_close(part(x, Ctx()), (F.silu(x @ w.T) * (x @ v.T)) @ part.fc2.weight.T)


def test_drop_path():
    """A sample's branch is dropped with the rate, else scaled up, so that the mean stays."""
    x = torch.ones(20_000, 3, 2)
    out = drop_path(x, 0.3, training=True)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert drop_path(x, 0.3, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_drop_rates_grow_with_depth():
    model = create_model("gpt/nano", depth=5, drop_path=0.4)
    rates = [layer["channel"].rate for layer in model.stack.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


class Doubling(Part):
    """A part whose answer is easy to tell."""

    def forward(self, x, ctx):
        return 2 * x


def test_residual_schemes():
    x = torch.randn(2, 3, 4)
    norm = nn.LayerNorm(4, eps=1e-6)
    pre, post = (cls(4, Place(), Doubling(4, Place()), layer_scale=0.5) for cls in (PreNorm, PostNorm))
    assert_close(pre(x, Ctx()), x + norm(x))
    assert_close(post(x, Ctx()), norm(x + x))


class Remembers(Part):
    """Adds what the first layer of the stage saw."""

    def forward(self, x, ctx):
        return ctx.shared.setdefault("first", x)


def test_shared_values_last_one_stage():
    """From layer to layer, not into the next stage, and not into the next batch."""
    residual = spec(PreNorm, norm=spec(NoNorm))
    one, two = (Stack(dim, 2, {"mixer": spec(Remembers)}, residual) for dim in (4, 6))
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    out, ctx = one(x, Ctx())
    assert_close(out, 3 * x)
    assert_close(two(y, ctx)[0], 3 * y)
    assert_close(one(x + 1, ctx)[0], 3 * (x + 1))


def test_sublayers_take_turns():
    """Layer i gets number i modulo their count; a place says where in the whole net a part stands."""
    stack = Stack(4, 5, {"mixer": [spec(Doubling), spec(Remembers)], "channel": spec(Mlp)}, spec(PreNorm),
                  place=Place(layer=3, depth=8, stage=1, stages=2))
    assert [type(layer["mixer"].inner) for layer in stack.layers] == [Doubling, Remembers] * 2 + [Doubling]
    assert stack.layers[4]["channel"].place == Place(layer=7, depth=8, nth=4, stage=1, stages=2, sub=1, subs=2)
    assert [layer[s].place.ends_layer for layer in stack.layers for s in layer] == [False, True] * 5


def test_the_mean_is_over_the_grid():
    """A class token, where there is one, is not in it."""
    embed = PatchEmbed(3, 8, patch=4, img_size=8, class_token=True)
    model = Backbone(embed, [Stage(8, 1, {"channel": spec(Mlp)}, spec(PreNorm))], img_size=8, num_classes=5)
    x = model.example(2)
    assert_close(model(x), model.head(model.forward_features(x)[:, 1:].mean(1)))
    assert [f.map.shape for f in model.features(x)] == [(2, 8, 2, 2)]


# DenseFormer

def test_denseformer_starts_as_pre_norm():
    """Bit for bit; it adds depth (depth + 3) / 2 weights, for dilation 1 and period 1."""
    plain, dense = create_model("gpt/nano", depth=6), create_model("gpt/nano", depth=6, residual="denseformer")
    assert count_parameters(dense) - count_parameters(plain) == 6 * 9 // 2
    dense.load_state_dict(dense.state_dict() | plain.state_dict())
    ids = plain.example(2)
    assert torch.equal(dense(ids), plain(ids))


class Tanh(Part):
    """The toy block of the reference, tanh(Linear(x)); the residual adds x."""

    def __init__(self, dim, place):
        super().__init__(dim, place)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, ctx):
        return self.linear(x).tanh()


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (3, 2), (4, 5), (1, 7)])
def test_denseformer_by_definition(dilation, period):
    """Y_i = sum of alpha_ij X_j over j = i, i - k, i - 2k, ..., for every p-th i."""
    residual = spec(DenseFormer, dilation=dilation, period=period, norm=spec(NoNorm))
    stack = shaken(Stack(8, 7, {"mixer": spec(Tanh)}, residual))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    outputs, y = [x], x
    for i, layer in enumerate(stack.layers, 1):
        outputs.append(y + layer["mixer"].inner(y, Ctx()))
        y = outputs[-1]
        if i % period == 0:
            chosen = [outputs[j] for j in range(i, -1, -dilation)][::-1]
            y = sum(a * o for a, o in zip(layer["mixer"].alpha, chosen, strict=True))
    assert_close(stack(x, Ctx())[0], y)


def test_denseformer_averages_as_the_authors():
    state, (x,), golden = replay(Path(__file__).with_name("golden") / "denseformer__dwa_n7_dil2_period1.json.gz")
    keys = keymap(rule("blocks.{i}.*", "layers.{i}.mixer.inner.linear.*"),
                  rule("dwa.alphas.{i}.weight", "layers.{i}.mixer.alpha", FLAT))
    stack = Stack(64, 7, {"mixer": spec(Tanh)}, spec(DenseFormer, dilation=2, norm=spec(NoNorm)))
    stack.load_state_dict(keys.convert(state).state)
    final, _, (third,) = stack.intermediates(x, Ctx(), [3])
    compare(golden, (final, third))


def test_packed_rows_with_empty_slots():
    """A mask of keys hides slots of a packed row, as it does in each sequence alone."""
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., [2, 9, 11]] = False
    out = attend(q, k, v, lengths=(5, 2, 5), mask=mask)
    for start, stop in ((0, 5), (5, 7), (7, 12)):
        alone = attend(*(t[:, :, start:stop] for t in (q, k, v)), mask=mask[..., start:stop])
        assert_close(out[:, :, start:stop], alone)
    with pytest.raises(DoesNotFit, match=r"mask of keys \(1, 1, 1, 12\) or none"):
        attend(q, k, v, lengths=(5, 2, 5), mask=mask[..., :5])
