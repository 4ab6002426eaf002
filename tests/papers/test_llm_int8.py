"""LLM.int8() against whole numbers counted one by one; planted outliers; what is stored; the authors' answers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache
from formarium.core.errors import DoesNotFit
from formarium.core.transform import apply, size
from formarium.papers.transforms import llm_int8 as int8
from formarium.papers.transforms.llm_int8 import Int8Linear, int8_matmul, kernel, quantise
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "llm_int8__matmul8bit_thr6_d96.json.gz"


def by_hand(x, weight, bias, threshold):
    """One answer at a time, in Python's whole numbers: Eqs. 7 and 8 as the authors' code has them."""
    x16, w16 = x.half().double().tolist(), weight.half().double().tolist()
    columns = range(weight.shape[1])
    outliers = {h for row in x16 for h in columns if threshold is not None and abs(row[h]) >= threshold}
    out = []
    for row, exact in zip(x16, x.double().tolist(), strict=True):
        top = max((abs(v) for v in row if threshold is None or abs(v) < threshold), default=0.0)
        q = [0 if h in outliers or not top else round(row[h] * 127 / top) for h in columns]
        answers = []
        for w, b in zip(w16, bias.double().tolist(), strict=True):
            scale = max(map(abs, w))
            w8 = [round(v * 127 / scale) for v in w]
            answer = sum(i * j for i, j in zip(q, w8, strict=True)) * top * scale / 127**2 + b
            answers.append(answer + sum(exact[h] * w8[h] * scale / 127 for h in outliers))
        out.append(answers)
    return torch.tensor(out, dtype=torch.float64)


def layer(k, n, threshold):
    linear = nn.Linear(k, n)
    return linear, Int8Linear(linear, threshold)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [6.0, 1.5, None, 0.0, 1e-3])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 3, 5), (7, 33, 8), (4, 64, 16)])
def test_by_hand(threshold, rows, k, n):
    linear, quantised = layer(k, n, threshold)
    x = 3 * torch.randn(rows, k)
    x[0] = 0
    assert_close(quantised(x).double(), by_hand(x, linear.weight, linear.bias, threshold), atol=1e-5, rtol=1e-5)
    assert_close(quantised(x[0]), quantised(x)[0])  # an axis less, and a row of zeros


def whole_numbers(m, k):
    return torch.randint(-127, 128, (m, k), dtype=torch.int8)


@pytest.mark.parametrize("k", [1, 7, int8.EXACT_TERMS, int8.EXACT_TERMS + 1, 4096])
def test_sums_are_exact(k):
    """Also where all terms are as great as can be, and odd; torch._int_mm, which other machines take, gives the same."""
    great = torch.full((3, k), 127, dtype=torch.int8)
    great[1] = -127
    great[2, 0] = 126
    for a, b in ((whole_numbers(3, k), whole_numbers(5, k)), (great, great)):
        exact = a.long() @ b.long().t()
        assert torch.equal(int8_matmul(a, b).long(), exact)
        assert torch.equal(int8._int_mm(a, b).long(), exact)
    assert 127**2 * int8.EXACT_TERMS <= 2**24 < 127**2 * (int8.EXACT_TERMS + 1)


def test_kernel(monkeypatch):
    """It is named, and both give a layer the same answer."""
    assert kernel("cuda") == "int_mm"
    assert kernel("meta") == "float32"
    _, quantised = layer(2000, 8, 2.0)
    x, answers = torch.randn(5, 2000), []
    for units, name in ((False, "float32"), (True, "int_mm")):
        monkeypatch.setattr(int8, "INT8_UNITS", units)
        assert kernel() == name
        answers.append(quantised(x))
    assert_close(answers[0], answers[1], atol=0, rtol=0)


def test_rounding():
    """Nearest whole number to x 127 / max |x|, never more than half a step away; a row of zeros stays."""
    x = torch.randn(6, 50).half().float()
    x[3] = 0
    q, scale = quantise(x)
    assert q.dtype == torch.int8
    assert (q.abs().amax(1) == torch.tensor([127, 127, 127, 0, 127, 127])).all()
    assert ((q * scale[:, None] / 127 - x).abs() <= scale[:, None] / 254 * 1.0001).all()


def on_the_grid(weight, columns, gain=1):
    """Makes the weights of these columns -1, 0 or 1 steps of int8, times `gain`: rounding them is not at issue."""
    weight[:, columns] = 0
    step = weight.abs().amax(1, keepdim=True) / 127
    weight[:, columns] = step * torch.randint(-1, 2, (len(weight), len(columns))) * gain


@torch.no_grad()
def test_planted_outliers():
    """Three great dimensions: one scale a row destroys the others; taken out, the answer is as without them."""
    linear, columns = nn.Linear(256, 64), [3, 77, 200]
    on_the_grid(linear.weight, columns)
    plain, split = Int8Linear(linear, None), Int8Linear(linear, 6.0)
    x = torch.randn(200, 256).clamp(-5.9, 5.9)

    def error(of, x):
        return float((of(x) - linear(x)).norm() / linear(x.clamp(-5.9, 5.9)).norm())

    assert error(plain, x) == pytest.approx(error(split, x))
    quiet = error(plain, x)
    assert quiet < 0.015
    x[:, columns] *= 300
    assert error(split, x) < 1.5 * quiet
    assert error(plain, x) > 20 * quiet


@torch.no_grad()
def test_planted_outliers_in_a_model():
    """Norms scaled up a channel, and the layers after them down by as much: the same function, with outliers."""
    model = create_model("gpt/nano").eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    batch = model.example(4)
    places = [(block[sub].norm, getattr(block[sub].inner, first).weight) for block in model.stack.layers
              for sub, first in (("mixer", "qkv"), ("channel", "fc1"))]
    for _, weight in places:
        on_the_grid(weight, [5], gain=64)
    exact = model(batch)
    for norm, weight in places:
        norm.weight[5] *= 64
        norm.bias[5] *= 64
        weight[:, 5] /= 64
    assert_close(model(batch), exact, atol=1e-4, rtol=1e-4)
    errors = {t: float((apply(model, "llm_int8", threshold=t)(batch) - exact).norm() / exact.norm()) for t in (None, 6.0)}
    assert errors[6.0] < 0.05
    assert errors[None] > 5 * errors[6.0]


@pytest.mark.parametrize("threshold", [2.0, None])
def test_backward(threshold):
    """The gradient of x is that of a float layer with the dequantised weights; weights have none, the bias its own."""
    linear, quantised = layer(40, 12, threshold)
    x = torch.randn(3, 7, 40, requires_grad=True)
    weight = quantised.weight.float() * quantised.scale[:, None] / 127
    grad = torch.randn(3, 7, 12)
    quantised(x).backward(grad)
    assert_close(x.grad, grad @ weight)
    assert_close(linear.bias.grad, grad.sum((0, 1)))
    assert quantised.weight.grad is None


def test_no_rows():
    assert layer(8, 4, 6.0)[1](torch.randn(2, 0, 8)).shape == (2, 0, 4)


# models

@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt/nano", "vit/nano", "swin/nano", "poolformer/nano"])
def test_models(name):
    """Near the float model, at a quarter of the bytes of its layers, also in half precision and when decoding."""
    model = create_model(name).eval()
    batch = model.example(2)
    quantised = apply(model, "llm_int8")
    exact = model(batch)
    assert 0 < (quantised(batch) - exact).norm() < 0.03 * exact.norm()
    layers = [m for m in quantised.modules() if isinstance(m, Int8Linear)]
    weights = sum(m.weight.numel() for m in layers)
    assert size(model)["bytes"] - size(quantised)["bytes"] == 3 * weights - 4 * sum(m.out_features for m in layers)
    assert size(model)["parameters"] == size(quantised)["parameters"]
    assert weights > 0.4 * size(model)["parameters"]
    half = quantised.bfloat16()
    assert {m.weight.dtype for m in layers} == {torch.int8}
    batch = batch.bfloat16() if batch.is_floating_point() else batch
    assert (half(batch).float() - exact).norm() < 0.06 * exact.norm()


@torch.no_grad()
def test_decodes():
    """With a cache, a token at a time; outliers are looked for in each call, so equal but for rounding."""
    model = apply(create_model("gpt/nano"), "llm_int8").eval()
    ids, cache = model.example(1, (12,)), Cache()
    steps = torch.cat([model(ids[:, i:i + 1], cache=cache) for i in range(12)], dim=1)
    whole = model(ids)
    assert (steps - whole).norm() < 0.01 * whole.norm()


@torch.no_grad()
def test_mixed_precision_and_graphs():
    """Sums stay exact under autocast; exported and compiled, where the outlying dimensions are not known beforehand."""
    _, quantised = layer(1024, 16, 2.0)
    x = torch.randn(9, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantised(x), quantised.forward(x))
        mixed = quantised(x)
    assert torch.equal(mixed, quantised(x))
    exported = torch.export.export(quantised, (x,), strict=False).module()
    torch._dynamo.reset()
    for form in (exported, torch.compile(quantised, fullgraph=True, backend="eager")):
        assert_close(form(x), quantised(x))


def test_saved_as_int8(tmp_path):
    model = apply(create_model("gpt/nano"), "llm_int8(threshold=4.0)").eval()
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    state = again.state_dict()
    assert {t.dtype for n, t in state.items() if n.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight"))} == {
        torch.int8}
    assert all(m.threshold == 4.0 for m in again.modules() if isinstance(m, Int8Linear))
    assert (tmp_path / "m.safetensors").stat().st_size < 1.1 * size(model)["bytes"]
    batch = model.example(2)
    assert torch.equal(again(batch), model(batch))


def test_another_threshold():
    model = create_model("gpt/nano")
    twice = apply(apply(model, "llm_int8"), "llm_int8(threshold=2)").eval()
    batch = model.example(2)
    assert torch.equal(twice(batch), apply(model, "llm_int8(threshold=2)").eval()(batch))
    for wrong in (-1.0, float("inf")):
        with pytest.raises(DoesNotFit, match="0 or more, or None for no decomposition"):
            apply(model, "llm_int8", threshold=wrong)


@torch.no_grad()
def test_golden(monkeypatch):
    """Theirs: the product, int8 inputs and their scales, outlying dimensions, int8 weights, the product without
    decomposition. Whole numbers and scales are the same; products differ by their number for 1 / 127^2."""
    state, (x,), golden = replay(GOLDEN)
    x[..., [3, 17, 40]] *= 4
    x = x.half().float()
    linear = nn.Linear(96, 64)
    linear.load_state_dict({k.removeprefix("linear."): v for k, v in state.items()})
    split, plain = Int8Linear(linear, 6.0), Int8Linear(linear, None)
    seen = []
    monkeypatch.setattr(int8, "int8_matmul", lambda a, b: seen.append(a) or int8_matmul(a, b))
    product = split(x)
    outliers = x.flatten(0, 1).abs() >= 6
    _, scale = quantise(x.flatten(0, 1).masked_fill(outliers, 0))
    columns = outliers.any(0).nonzero()[:, 0].float()
    answers = (product, seen[0].float(), scale, columns, split.weight.float(), split.scale, plain(x))
    assert compare(golden, answers) < 1e-4
    assert compare({"outputs": golden["outputs"][1:6]}, answers[1:6]) == 0
    where, theirs = columns.long(), 6.200124e-05 * 127**2
    rest = linear.bias + x[..., where] @ int8.dequantise(split.weight, split.scale, x.dtype)[:, where].t()
    scaled = [(product - rest) * theirs + rest, (plain(x) - linear.bias) * theirs + linear.bias]
    assert compare({"outputs": [golden["outputs"][0], golden["outputs"][6]]}, scaled) < 1e-5
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, (plain(x), *answers[1:]))
