"""Scaling ViT against the authors' operations written out; its sizes, its recipe in training, and the scaling law."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.arena.config import Recipe, RunConfig
from formarium.arena.scaling import ScalingLaw, fit_scaling_law, frontier
from formarium.arena.train import Run, rate_at
from formarium.core.ctx import Ctx
from formarium.core.errors import BadData, DoesNotFit, FormariumError, UnknownName
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters
from formarium.papers.backbones.scaling_vit import CARD, KEYS, PRESETS, MAPHead, variant
from formarium.tasks.registry import get_task
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS = 4


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


# the model

def map_written_out(head, x):
    """Each head's softmax over the tokens for one query, then the residual MLP."""
    c = x.shape[-1]
    attention, d = head.attention, c // HEADS
    q = attention.q(head.probe[0, 0])
    k, v = attention.kv(x).split(c, -1)
    out = []
    for h in range(HEADS):
        at = slice(h * d, (h + 1) * d)
        weights = (k[..., at] @ q[at] / math.sqrt(d)).softmax(-1)
        out.append((weights[..., None] * v[..., at]).sum(1))
    z = attention.proj(torch.cat(out, -1))
    y = F.layer_norm(z, (c,), head.norm.weight, head.norm.bias, 1e-6)
    return z + head.mlp.fc2(F.gelu(head.mlp.fc1(y)))


def test_map_head():
    """Forward and backward; the order of the tokens is nothing to it."""
    head, x = moved(MAPHead(16, heads=HEADS)), torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs, to = head(x, Ctx()), map_written_out(head, x), torch.randn(3, 16, dtype=torch.float64)
    assert_close(ours, theirs)
    inputs = [x, *head.parameters()]
    assert_close(torch.autograd.grad((ours * to).sum(), inputs), torch.autograd.grad((theirs * to).sum(), inputs))
    assert_close(head(x.flip(1), Ctx()), ours)


@pytest.mark.parametrize("pool", ["map", "mean", "token"])
def test_pools(pool):
    model = fm.create_model("scaling_vit/nano", pool=pool).eval()
    x, ctx = model.encode(*model.embed(images := model.example(2)))
    assert (x.shape[1], ctx.prefix) == ((50, 1) if pool == "token" else (49, 0))
    assert model.embedding.position.table.shape[1] == 49  # the class token has none
    vector = {"map": lambda: model.map_head(x, ctx), "mean": lambda: x.mean(1), "token": lambda: x[:, 0]}[pool]()
    assert_close(model(images), model.head(vector))
    with pytest.raises(DoesNotFit, match="'map', 'mean' or 'token', not 'max'"):
        fm.create_model("scaling_vit/nano", pool="max")


def test_sizes_of_table_2():
    """Encoders without MAP head and classifier, to the table's last digit or 1 %; MACs half its FLOPs."""
    for name, told in CARD.variants.items():
        if told.params is not None:
            with torch.device("meta"):
                model = PRESETS[name]()
            encoder = count_parameters(model) - count_parameters(model.map_head) - count_parameters(model.head)
            assert encoder == pytest.approx(told.params, rel=0.01, abs=0.5e6), name
    with torch.device("meta"):
        model = PRESETS["xs_p28"]()
        assert round(2e-9 * count_macs(model, model.example(1)), 1) == 0.7


def test_variant_strings():
    assert variant("G/14") == PRESETS["gigantic_p14"]
    assert variant("B") == variant("B/16")
    with torch.device("meta"):
        model = variant("So400m/14").but(num_classes=0)()
    assert count_parameters(model) == 427_680_704  # as timm counts vit_so400m_patch14_siglip_224
    with pytest.raises(UnknownName, match="unknown size 'gg'"):
        variant("gg/14")
    for wrong in ("g/", "g/0", "g/x", "g/-2"):
        with pytest.raises(DoesNotFit, match="as in 'g/14'"):
            variant(wrong)


# the names of others

@torch.no_grad()
def test_timm():
    state, inputs, golden = replay(GOLDEN / "scaling_vit__timm_map_d64.json.gz")
    model = fm.load(state)
    assert model.recipe["name"].startswith("scaling_vit/")
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))


def of_jax(p, x, heads):
    """The authors' model on parameters in their names and shapes: kernels (D, heads, d), GELU in the tanh form."""
    def norm(at, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{at}/scale"], p[f"{at}/bias"], 1e-6)

    def dense(at, x):
        return x @ p[f"{at}/kernel"] + p[f"{at}/bias"]

    def mlp(at, x):
        return dense(f"{at}/Dense_1", F.gelu(dense(f"{at}/Dense_0", x), approximate="tanh"))

    def attention(at, x, y):
        q, k, v = (torch.einsum("bnc,chd->bhnd", t, p[f"{at}/{n}/kernel"]) + p[f"{at}/{n}/bias"][:, None]
                   for t, n in ((x, "query"), (y, "key"), (y, "value")))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("bhnd,hdc->bnc", weights @ v, p[f"{at}/out/kernel"]) + p[f"{at}/out/bias"]

    kernel = p["embedding/kernel"]
    x = F.conv2d(x, kernel.permute(3, 2, 0, 1), p["embedding/bias"], kernel.shape[0]).flatten(2).transpose(1, 2)
    x = x + p["pos_embedding"]
    for i in range(4):
        at = f"Transformer/encoderblock_{i}"
        y = norm(f"{at}/LayerNorm_0", x)
        x = x + attention(f"{at}/MultiHeadDotProductAttention_0", y, y)
        x = x + mlp(f"{at}/MlpBlock_0", norm(f"{at}/LayerNorm_1", x))
    x, at = norm("Transformer/encoder_norm", x), "MAPHead_0"
    z = attention(f"{at}/MultiHeadDotProductAttention_0", p[f"{at}/probe"].expand(len(x), -1, -1), x)
    z = z + mlp(f"{at}/MlpBlock_0", norm(f"{at}/LayerNorm_0", z))
    return dense("head", z[:, 0])


@torch.no_grad()
def test_authors(tmp_path):
    """A .npz of big_vision: bare, under "params/", as SigLIP's image encoder, and with the MAP head's names of old."""
    torch.manual_seed(0)
    model = moved(fm.create_model("scaling_vit/nano", num_classes=5)).float().eval()
    theirs = KEYS["authors"].convert(model.state_dict(), {"heads": HEADS}, back=True).state
    bare = {k.removeprefix("params/"): v for k, v in theirs.items()}
    assert len(bare) == len(theirs) > 50
    assert theirs.keys() == {f"params/{k}" for k in bare}
    assert bare["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape == (64, 4, 16)
    images = torch.randn(2, 3, 28, 28)
    want = of_jax(bare, images, HEADS)
    other = {"params/t": torch.ones(()), "params/txt/head/kernel": torch.ones(3, 3)}
    old = {k.replace("MAPHead_0/", "").replace("pos_e", "Transformer/pos_e"): v for k, v in bare.items()}
    for state in (theirs, bare, {f"params/img/{k}": v for k, v in bare.items()} | other, old):
        np.savez(tmp_path / "theirs.npz", **{k: v.numpy() for k, v in state.items()})
        found = fm.load(tmp_path / "theirs.npz")
        assert found.recipe["name"] == "scaling_vit/nano"
        assert_close(found(images), want, atol=1e-4, rtol=1e-4)


def test_a_model_without_the_head_is_a_vit():
    state = fm.create_model("vit/nano", pool="mean").state_dict()
    with pytest.raises(FormariumError, match="name='vit'"):
        fm.load(state, "scaling_vit")
    assert fm.load(state).recipe["name"] == "vit/nano"


# training

def test_head_weight_decay():
    """The classifier's matrix decays a hundred times faster; tables, probe and vectors do not; it is off unless given."""
    model = fm.create_model("scaling_vit/nano")
    body, spared, head = model.parameter_groups(0.03, 3.0)
    assert [g["weight_decay"] for g in (body, spared, head)] == [0.03, 0.0, 3.0]
    assert [id(p) for p in head["params"]] == [id(model.head.weight)]
    plain = model.parameter_groups(0.03)
    assert {*map(id, plain[0]["params"])} == {id(p) for g in (body, head) for p in g["params"]}
    assert [*map(id, plain[1]["params"])] == [*map(id, spared["params"])]
    assert {id(model.map_head.probe), id(model.embedding.position.table)} <= set(map(id, spared["params"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameter_groups(0.03, 3.0), lr=0.01)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {"head.weight": 0.97, "stages.0.layers.0.channel.inner.fc1.weight": 0.9997, "map_head.probe": 1.0}
    for name, factor in shrunk.items():
        assert_close(model.get_parameter(name).detach(), factor * before[name])
    with pytest.raises(DoesNotFit, match="no classifier"):
        fm.create_model("scaling_vit/nano", num_classes=0).parameter_groups(0.03, 3.0)


def test_rsqrt():
    """The authors' schedule in steps: 10,000 of warm-up, timescale 10,000, a cooldown of 50,000 of a million."""
    for step in (10_000, 20_000, 300_000, 950_000, 975_000, 1_000_000):
        theirs = 8e-4 / math.sqrt(1 + (step - 10_000) / 10_000) * min(1, (1_000_000 - step) / 50_000)
        assert rate_at(step / 1e6, 8e-4, 0.01, "rsqrt", 0.01, 0.05) == pytest.approx(theirs)
    assert rate_at(0.005, 1.0, 0.01, "rsqrt", 0.01, 0.05) == pytest.approx(0.505)
    assert rate_at(1.0, 1.0, 0.1, "rsqrt", 0.1) == pytest.approx(10**-0.5)  # it can go on: no horizon is in it
    assert rate_at(1.0, 1.0, 0.1, "rsqrt", 0.1, 0.5) == 0
    with pytest.raises(ValueError, match="schedule"):
        Recipe(schedule="sqrt")


def test_a_run(tmp_path):
    """With all of it on; and a folder whose run.json was written before there were these options."""
    task, name = get_task("digits"), "scaling_vit/nano:depth=1,dim=16,heads=2,patch=4"
    on = {"schedule": "rsqrt", "timescale": 0.2, "cooldown": 0.5, "head_weight_decay": 3.0, "weight_decay": 0.03}
    for folder, more in (("on", on), ("off", {})):
        config = RunConfig(model=name, task="digits", steps=4, batch_size=8, evaluations=1, **more)
        Run(config, tmp_path / folder, task).train()
        rates = [json.loads(r).get("lr") for r in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        c = config
        want = [rate_at(i / 4, c.lr, c.warmup, c.schedule, c.timescale, c.cooldown) for i in range(4)]
        assert [r for r in rates if r is not None] == pytest.approx(want)
    path = tmp_path / "off" / "run.json"
    told = json.loads(path.read_text())
    told["config"] = {k: v for k, v in told["config"].items() if k not in on or k == "weight_decay"}
    path.write_text(json.dumps(told))
    assert Run(config, tmp_path / "off", task).train()["steps"] == 4
    with pytest.raises(FormariumError, match="schedule is 'cosine' there, 'rsqrt' here"):
        Run(config.model_copy(update={"schedule": "rsqrt"}), tmp_path / "off", task).train()


# the law

LAW = ScalingLaw(a=0.26, b=0.35, c=0.09, d=0.01)  # of ImageNet fine-tuning, figure 1 of the paper
COMPUTES = np.geomspace(1e-3, 1e4, 15)


@pytest.mark.parametrize("unit", [1.0, 1e15, 1e-6])
def test_the_law_is_found_again(unit):
    found = fit_scaling_law([(c * unit, LAW(c)) for c in COMPUTES])
    assert (found.b, found.c, found.d / unit) == pytest.approx((LAW.b, LAW.c, LAW.d), rel=1e-3)
    assert found.a / unit**found.b == pytest.approx(LAW.a, rel=1e-3)
    assert found.spread < 1e-5
    assert found(1e5 * unit) == pytest.approx(LAW(1e5), rel=1e-4)


def test_points_far_off_move_it_little():
    points = [(c, LAW(c)) for c in COMPUTES]
    points[4] = (points[4][0], 2 * points[4][1])
    found = fit_scaling_law(points)
    assert (found.b, found.c) == pytest.approx((LAW.b, LAW.c), rel=0.1)
    noisy = np.random.default_rng(0).normal(0, 0.02, len(COMPUTES))
    found = fit_scaling_law([(c, LAW(c) * math.exp(e)) for c, e in zip(COMPUTES, noisy, strict=True)])
    assert found(100) == pytest.approx(LAW(100), rel=0.03)
    assert 0.01 < found.spread < 0.03


def test_there_and_back():
    assert LAW(LAW.compute_for(0.2)) == pytest.approx(0.2)
    assert LAW.compute_for(100.0) == 0
    with pytest.raises(DoesNotFit, match="never reached"):
        LAW.compute_for(0.09)


def test_frontier():
    points = [(4, 0.3), (1, 0.9), (2, 0.5), (2, 0.7), (3, 0.6), (5, 0.3), (6, 0.1)]
    assert frontier(points) == [(1, 0.9), (2, 0.5), (4, 0.3), (6, 0.1)]
    assert frontier(reversed(points)) == frontier(points)
    assert frontier([]) == []


@pytest.mark.parametrize(("points", "why"), [
    ([], "or more, got 0"),
    ([(1, 0.5), (2, 0.4), (3, 0.3)], "4 points of different compute or more, got 3"),
    ([(1, 0.5), (1, 0.4), (2, 0.3), (3, 0.2)], "got 3"),
    ([(1, 0.5), (2, 0.4), (3, 0.3), (4, float("nan"))], "finite and above zero"),
    ([(0, 0.5), (2, 0.4), (3, 0.3), (4, 0.1)], r"above zero, got \(0, 0.5\)"),
    ([(1, 0.5), (2, -0.4), (3, 0.3), (4, 0.1)], "above zero"),
    ([(1, 0.5), (2, 0.4), (3, 0.3), 4], "expected points"),
    ([(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)], "does not fall"),
    ([(1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5)], "does not fall"),
])
def test_bad_points(points, why):
    with pytest.raises(BadData, match=why):
        fit_scaling_law(points)
