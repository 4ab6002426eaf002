"""Patch scaling: the chunked state space against the recurrence, the order of tokens, sweeps, transfer, their names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.papers.backbones.patch_scaling import KEYS, AdventurerMixer, Mamba2, state_space, sweep, table
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def recurrence(x, dt, a, b, c):
    """Token by token."""
    state, out = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[2]), []
    for t in range(x.shape[1]):
        state = (dt[:, t] * a).exp()[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None]
        out.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(("n", "chunk"), [(1, 64), (7, 64), (12, 4), (13, 5), (9, 1)])
def test_chunks_are_the_recurrence(n, chunk):
    torch.manual_seed(n)
    x, b, c = (torch.randn(2, n, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5,), (5,)))
    dt = torch.rand(2, n, 3, dtype=torch.float64, requires_grad=True)
    a = (-torch.rand(3, dtype=torch.float64) * 8).requires_grad_()
    inputs = (x, dt, a, b, c)
    ours, theirs, g = state_space(*inputs, chunk=chunk), recurrence(*inputs), torch.randn_like(x)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad((ours * g).sum(), inputs), torch.autograd.grad((theirs * g).sum(), inputs))


def test_long_and_fast_decay_stays_finite():
    """The running sums reach thousands; no exponential of a positive number is taken."""
    x = torch.randn(1, 300, 2, 4, requires_grad=True)
    dt, a = torch.full((1, 300, 2), 5.0), torch.tensor([-16.0, -1e-4])
    b, c = torch.randn(1, 300, 3), torch.randn(1, 300, 3)
    out = state_space(x, dt, a, b, c)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert_close(out, recurrence(x, dt, a, b, c), atol=1e-2, rtol=1e-4)


def test_mamba_written_out():
    part = moved(Mamba2(8, Place(), state=3, width=4))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    gate, mixed, dt = part.qkv(x).split((16, 22, 4), -1)
    padded = F.pad(mixed, (0, 0, 3, 0))
    rows = [(padded[:, t:t + 4] * part.conv.weight[:, 0].t()).sum(1) + part.conv.bias for t in range(6)]
    inner, b, c = F.silu(torch.stack(rows, 1)).split((16, 3, 3), -1)
    inner = inner.unflatten(2, (4, 4))
    y = recurrence(inner, F.softplus(dt + part.dt), -part.decay.exp(), b, c) + part.through[:, None] * inner
    y = y.flatten(2) * F.silu(gate)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * part.norm.weight
    assert_close(part(x, Ctx()), part.proj(y))


@torch.no_grad()
def test_no_token_sees_a_later_one():
    part, x = moved(Mamba2(8, Place(), state=3, width=4)), torch.randn(1, 9, 8, dtype=torch.float64)
    other = torch.cat((x[:, :5], torch.randn_like(x[:, 5:])), 1)
    assert torch.equal(part(x, Ctx())[:, :5], part(other, Ctx())[:, :5])


@torch.no_grad()
def test_order_of_the_tokens():
    """Mean first, class token last; flipped layers read the patches backwards and put them back."""
    part, x = moved(AdventurerMixer(8, Place(), state=3, width=4)), torch.randn(1, 7, 8, dtype=torch.float64)
    row = torch.cat((x.mean(1, keepdim=True), x[:, 1:], x[:, :1]), 1)
    y = Mamba2.forward(part, row, Ctx())
    assert_close(part(x, Ctx(prefix=1)), torch.cat((y[:, -1:], y[:, 1:-1]), 1))
    backwards = torch.cat((x[:, :1], x[:, 1:].flip(1)), 1)
    part.flip = True
    flipped = part(x, Ctx(prefix=1))
    part.flip = False
    straight = part(backwards, Ctx(prefix=1))
    assert_close(flipped, torch.cat((straight[:, :1], straight[:, 1:].flip(1)), 1))


def test_which_layers_are_flipped():
    def flips(**options):
        with torch.device("meta"):
            model = create_model("patch_scaling/tiny_p16", **options)
        return [i for i, layer in enumerate(model.stages[0].layers) if layer["mixer"].inner.flip]

    assert flips() == [2, 3]
    assert flips(alternate=True) == [2, 3, 6, 7, 10, 11]


# patch sizes


@pytest.mark.parametrize("name", ["patch_scaling/nano", "vit/nano", "swin/nano:dim=16,window=4"])
def test_sweep_down_to_a_pixel(name):
    seen = []

    def measure(model):
        seen.append(model(model.example(1)).shape)
        return 0.5 + 0.1 * len(seen)

    rows = sweep(name, (4, 2, 1), measure, {"img_size": 16, "num_classes": 10})
    assert [(r.patch, r.tokens) for r in rows if "swin" not in name] in ([], [(4, 16), (2, 64), (1, 256)])
    assert seen == [(1, 10)] * 3
    assert [r.measured for r in rows] == pytest.approx([0.6, 0.7, 0.8])
    assert rows[0].macs < rows[1].macs < rows[2].macs
    text = table(rows).splitlines()
    assert text[0].split() == ["patch", "tokens", "parameters", "MACs", "accuracy"]
    assert text[3].split()[0] == "1"
    assert table(sweep("vit/nano", (7,))).splitlines()[1].split()[-1] == "-"


@torch.no_grad()
def test_weights_go_over_to_other_sizes(tmp_path):
    """To another patch at the same grid: an enlarged image gives the same answer; to more tokens: resized positions."""
    torch.manual_seed(0)
    model = create_model("patch_scaling/nano", patch=2, img_size=8).eval()
    save(model, tmp_path / "m.safetensors")
    larger = load(tmp_path / "m.safetensors", patch=4, img_size=16)
    x = torch.randn(2, 3, 8, 8)
    big = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    assert larger(big).shape == model(x).shape
    pixels = load(tmp_path / "m.safetensors", patch=1)
    assert pixels.embedding.position.table.shape == (1, 65, 64)
    assert torch.equal(pixels.embedding.position.table[:, 0], model.embedding.position.table[:, 0])
    assert pixels(x).isfinite().all()


def test_what_does_not_fit():
    with pytest.raises(DoesNotFit, match="1 or more, got 0, 16 and 4"):
        create_model("patch_scaling/nano", state=0)
    with pytest.raises(DoesNotFit, match="the nearest: 28x28"):
        create_model("patch_scaling/nano", img_size=29)


# the authors' answers and names


@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN / "patch_scaling__adventurer_tiny_patch16_224.json.gz")
    model = load(state)
    assert model.recipe == {"name": "patch_scaling/tiny_p16", "changes": {}}
    assert compare(golden, (model(x), model.forward_features(x)[:, 0])) < 1e-4
    model.stages[0].layers[4]["mixer"].inner.flip = True
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, (model(x), model.forward_features(x)[:, 0]))


@torch.no_grad()
def test_their_class_token_is_the_last():
    model = moved(create_model("patch_scaling/nano")).float().eval()
    theirs = KEYS["authors"].convert(model.state_dict(), back=True).state
    assert torch.equal(theirs["pos_embed"][:, -1], model.embedding.position.table[:, 0])
    assert torch.equal(theirs["pos_embed"][:, 0], model.embedding.position.table[:, 1])
    x = model.example(2)
    assert torch.equal(load(theirs)(x), model(x))
