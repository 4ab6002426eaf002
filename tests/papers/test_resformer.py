"""ResFormer: positions against their equations on any grid, the loss against Eq. 3 and 4, any size, the authors."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.arena.train import train
from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.papers.backbones.resformer import KEYS, GlobalPosition, LocalAttention, MultiResolution, sines
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "resformer__resformer_tiny_224.json.gz"
SMALL = {"dim": 16, "depth": 1, "heads": 2, "num_classes": 5}


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@torch.no_grad()
def test_answers_of_the_reference():
    state, inputs, golden = replay(GOLDEN)
    model = load(state)
    assert model.recipe == {"name": "resformer/tiny", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))
    assert list(KEYS) == ["authors"]


# positions


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (7, 7)])
def test_global_position(grid):
    """Channel by channel: the row, then the column, as shares of their sides; then the convolution; no prefix."""
    part, (h, w) = moved(GlobalPosition(8, 0)).double(), grid
    table = torch.zeros(8, h, w, dtype=torch.float64)
    for c in range(8):
        for i in range(h):
            for j in range(w):
                place = ((i + 1) / (h + 1e-6) if c < 4 else (j + 1) / (w + 1e-6)) * 2 * math.pi
                angle = place / 10000 ** (2 * (c % 4 // 2) / 4)
                table[c, i, j] = math.sin(angle) if c % 2 == 0 else math.cos(angle)
    assert_close(sines(8, grid, table)[0], table, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 1 + h * w, 8, dtype=torch.float64)
    out = part(x, Ctx(grid=grid, prefix=1)) - x
    conv = F.conv2d(table[None], part.conv.weight, part.conv.bias, padding=1, groups=8)
    assert_close(out[:, 1:], conv.flatten(2).mT.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert not out[:, 0].any()


@pytest.mark.parametrize(("grid", "prefix"), [((2, 3), 1), ((4, 1), 0), ((3, 3), 2)])
def test_local_attention(grid, prefix):
    """Head by head, forward and backward."""
    part, n = moved(LocalAttention(6, Place(), heads=2)).double(), grid[0] * grid[1] + prefix
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    heads = []
    q, k, v = part.qkv(x).view(2, n, 3, 2, 3).unbind(2)
    for h in range(2):
        own = (q[:, :, h] @ k[:, :, h].mT / 3**0.5).softmax(-1) @ v[:, :, h]
        maps = v[:, prefix:, h].mT.reshape(2, 3, *grid)
        local = F.conv2d(maps, part.local.weight, part.local.bias, padding=1, groups=3).flatten(2).mT
        heads.append(own + torch.cat((own.new_zeros(2, prefix, 3), local), dim=1))
    naive, out = part.proj(torch.cat(heads, dim=2)), part(x, Ctx(grid=grid, prefix=prefix))
    assert_close(out, naive)
    seed, weights = torch.randn_like(out), [x, *part.parameters()]
    assert_close(torch.autograd.grad((out * seed).sum(), weights), torch.autograd.grad((naive * seed).sum(), weights))


def test_the_local_position_is_nothing_at_the_start():
    model = create_model("resformer/nano")
    x = model.example(1)
    assert torch.equal(model(x), create_like_plain(model)(x))
    assert {n for n in model.no_weight_decay() if "local" in n or "conv" in n} == {
        "embedding.position.conv.weight", *(f"stages.0.layers.{i}.mixer.inner.local.weight" for i in range(4))}


def create_like_plain(model):
    plain = create_model("resformer/nano", mixer="attention")
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if "local" not in k})
    return plain


def test_any_size_without_surgery():
    model = moved(create_model("resformer/nano")).eval()
    for size in ((12, 12), (28, 28), (48, 20), (29, 31)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 1000)
    assert model.features(torch.randn(1, 3, 40, 24))[-1].map.shape == (1, 64, 10, 6)


# the loss


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "cosine", "soft"])
@pytest.mark.parametrize("target", ["features", "mean", "logits"])
def test_loss(kind, target):
    """By hand, resolution by resolution, with the gradient of every weight; no gradient goes to the larger one."""
    model = moved(create_model("resformer/nano", **SMALL)).double()
    made = MultiResolution(model, scales=(1.0, 0.7, 0.4), kind=kind, target=target, alpha=0.3)
    x, y = torch.randn(3, 3, 20, 28, dtype=torch.float64), torch.tensor([0, 4, 2])
    total, before = 0.0, None
    for size in ((20, 28), (16, 20), (8, 12)):
        small = F.interpolate(x, size, mode="bicubic", antialias=True) if size != (20, 28) else x
        tokens = model.forward_features(small)
        logits = model.head(tokens[:, 0])
        seen = {"features": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "logits": logits}[target]
        total = total + F.cross_entropy(logits, y)
        if before is not None:
            t = before
            white = (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            gap = (seen - white).abs()
            p = t.softmax(1)
            total = total + 0.3 * {
                "smooth_l1": torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(), "l2": (seen - t).square().mean(),
                "cosine": 1 - (seen * t).sum(1).div(seen.norm(dim=1) * t.norm(dim=1)).mean(),
                "soft": (p * (p.log() - seen.log_softmax(1))).sum(1).mean()}[kind]
        before = seen.detach()
    loss, numbers = made(x, y)
    assert_close(loss, total / 3)
    weights = [p for n, p in model.named_parameters()]
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(total / 3, weights))
    assert set(numbers) == {"loss_20", "loss_16", "loss_8", "consistency"}


def test_default_resolutions_are_the_papers():
    assert MultiResolution(create_model("resformer/tiny")).sides((224, 224)) == [(224, 224), (160, 160), (128, 128)]


def test_what_does_not_fit():
    model = create_model("resformer/nano", **SMALL)
    for options, error, why in [({"target": "cls"}, UnknownName, "target of resformer 'cls'"),
                                ({"kind": "l1"}, UnknownName, "kind of resformer 'l1'"),
                                ({"scales": (0.5, 1.0)}, DoesNotFit, "the largest first"),
                                ({"alpha": -1}, DoesNotFit, "alpha >= 0")]:
        with pytest.raises(error, match=why):
            MultiResolution(model, **options)
    with pytest.raises(DoesNotFit, match="this ViT takes images of one size"):
        MultiResolution(create_model("vit/nano"))
    with pytest.raises(DoesNotFit, match="one classifier; DeiT is none"):
        MultiResolution(create_model("deit/nano"))


@pytest.mark.parametrize("name", ["resformer/nano:patch=2,dim=16,depth=1,heads=2", "poolformer/nano"])
def test_trains(name, tmp_path):
    """Under the objective by name, on mixed labels too; the file is the plain model, and takes other sizes."""
    train(name, out=tmp_path / "r", objective="resformer(scales=(1.0,0.5))", task="digits", steps=2, batch_size=4,
          evaluations=1, mixup=0.8)
    model = fm.load(tmp_path / "r" / "last.safetensors")
    assert model(torch.randn(1, 1, 16, 12)).shape == (1, 10)
