"""FIRE against its equation written out, what it promises, and a decoder that runs past its training length."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.spec import spec
from formarium.papers.positions.fire import Fire
from formarium.parts.attention import Attention
from formarium.weights.load import load

TRAINED = 32  # tokens


def moved(heads=3, threshold=9.0, **options):
    """In float64, at parameters away from their start."""
    fire = Fire(8, heads, threshold=threshold, **options).double()
    with torch.no_grad():
        for p in fire.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return fire


def one(fire, head, i, j):
    """b(i, j) of one head: the equation, in scalars."""
    def psi(x):
        return torch.log((fire.c * x).abs() + 1)

    limit = (fire.threshold * fire.multiplier).abs()
    t = psi(abs(i - j)) / (psi(limit if limit > i else torch.tensor(float(i))) + 1e-6)
    return sum(fire.w2[head, k] * torch.relu(fire.w1[k, 0] * t + fire.b1[k]) for k in range(len(fire.b1)))


def naive(fire, queries, keys):
    return torch.stack([torch.stack([torch.stack([one(fire, h, i, j) for j in keys]) for i in queries])
                        for h in range(fire.heads)])[None]


@pytest.mark.parametrize("n", [14, 5, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_is_the_double_loop(n, sign):
    """Forward and backward, for the last n of 14 tokens, on both sides of L, and where c and L have become negative."""
    fire = moved(hidden=6)
    with torch.no_grad():
        fire.c *= sign
        fire.multiplier *= sign
    weights = torch.randn(1, 3, n, 14, dtype=torch.float64)
    answers, grads = [], []
    for bias in (fire.bias(n, 14, Ctx()), naive(fire, range(14 - n, 14), range(14))):
        answers.append(bias)
        grads.append(torch.autograd.grad((bias * weights).sum(), list(fire.parameters()), materialize_grads=True))
    assert_close(*answers, atol=1e-12, rtol=1e-12)
    assert_close(*grads, atol=1e-11, rtol=1e-11)


def test_positions_that_are_given():
    """Each sample its own; plain ones are 0, 1, 2, ..."""
    fire, at = moved(hidden=4), torch.tensor([[0, 3, 4, 20], [5, 1, 30, 2]], dtype=torch.float64)
    assert_close(fire.bias(4, 4, Ctx(coords=at[..., None])), torch.cat([naive(fire, a, a) for a in at.int().tolist()]))
    assert torch.equal(fire.bias(6, 6, Ctx(coords=torch.arange(6.0)[None, :, None])), fire.bias(6, 6, Ctx()))


def test_later_tokens_change_nothing():
    """So a cache stays valid: the last tokens' bias is the last rows of the whole, which is a corner of a longer one."""
    fire = moved()
    whole = fire.bias(40, 40, Ctx())
    assert torch.equal(fire.bias(7, 40, Ctx()), whole[:, :, 33:])
    assert torch.equal(fire.bias(25, 25, Ctx()), whole[:, :, :25, :25])


def test_below_the_threshold_only_the_distance_counts():
    fire = moved(threshold=32.0)
    limit = int(32 * fire.multiplier)
    short = fire.bias(limit, limit, Ctx())
    assert_close(short[..., 1:, 1:], short[..., :-1, :-1])
    longer = fire.bias(2 * limit, 2 * limit, Ctx())
    assert not torch.allclose(longer[..., -1, -2], longer[..., 2, 1], atol=1e-3)


@torch.no_grad()
def test_bounded_at_any_length():
    """For a fixed distance the argument falls to 0 as the text grows; over all keys behind it never leaves [0, 1]."""
    fire, bias = moved(), []
    most = (fire.w2.abs() @ (fire.w1[:, 0].abs() + fire.b1.abs())).max()
    steepest = (fire.w2.abs() @ fire.w1.abs()).max()
    at_zero = fire.w2 @ fire.b1.relu()
    for m in (10, 100, 1000, 10_000, 100_000):
        row = fire.bias(1, m, Ctx())[0, :, 0]
        assert row.isfinite().all()
        assert row.abs().max() <= most
        bias.append(row[:, -6])
        t = math.log1p(5 * fire.c.abs()) / math.log1p((m - 1) * fire.c.abs())
        assert (bias[-1] - at_zero).abs().max() <= steepest * t + 1e-6
    assert (bias[-1] - at_zero).norm() < (bias[0] - at_zero).norm()


def set_function(fire, knots, values):
    """f on [0, 1] through `values` (heads, K) at `knots` (K), straight between them, less its value at 0."""
    slopes = (values[:, 1:] - values[:, :-1]) / (knots[1:] - knots[:-1])
    with torch.no_grad():
        fire.w1.fill_(1)
        fire.b1.copy_(-knots[:-1])
        fire.w2.copy_(torch.cat((slopes[:, :1], slopes[:, 1:] - slopes[:, :-1]), dim=1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["any table, so T5's", "ALiBi"])
def test_holds_any_table_of_distances(kind):
    """32 units hold 33 distances for every head, up to a number a head that softmax does not see."""
    fire, distance = Fire(8, 4).double(), torch.arange(33, dtype=torch.float64)
    table = torch.randn(4, 33, dtype=torch.float64)
    if kind == "ALiBi":
        table = -(2.0 ** -torch.arange(1, 5, dtype=torch.float64))[:, None] * distance
    knots = (fire.c * distance).log1p() / ((fire.c * 512).log1p() + 1e-6)
    set_function(fire, knots, table)
    away = (torch.arange(33)[:, None] - torch.arange(33)).abs()
    assert_close(fire.bias(33, 33, Ctx())[0], table[:, away] - table[:, :1, None], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_holds_kerples_logarithm():
    """-a log(1 + b d) with one unit."""
    fire = Fire(8, 1, hidden=1, c=0.7).double()
    fire.w1.fill_(1)
    fire.b1.zero_()
    fire.w2.fill_(-1.3 * ((fire.c * 512).log1p() + 1e-6))
    d = (torch.arange(50.0)[:, None] - torch.arange(50.0)).abs().double()
    assert_close(fire.bias(50, 50, Ctx())[0, 0], -1.3 * (1 + fire.c * d).log())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [20, 100])
def test_attention_adds_it_to_the_scores(causal, n):
    """Written-out and fused kernels, without and with a causal mask, against softmax written out."""
    attention = Attention(24, Place(), heads=3, causal=causal, position=spec(Fire, threshold=8.0)).double()
    x = torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8) + attention.position.bias(n, n, Ctx())
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    answers = attention(x, Ctx()), attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_close(*answers)
    weights, learned = torch.randn_like(x), [x, *attention.parameters()]
    assert_close(*(torch.autograd.grad((a * weights).sum(), learned, retain_graph=True) for a in answers))


@torch.no_grad()
def test_bfloat16_tells_late_positions_apart():
    """The numbers 1999 and 2000 are one in bfloat16; the distances of these keys from the last query are not."""
    fire = Fire(8, 2, c=1.0)
    set_function(fire, torch.linspace(0, 1, 33), torch.linspace(0, 9, 33).expand(2, -1))
    exact = fire.bias(4, 2001, Ctx())
    half = fire.bfloat16().bias(4, 2001, Ctx())
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), exact, atol=0.05, rtol=0.02)
    assert (half[..., -1, -2] - half[..., -1, -1]).min() > 0.3


def test_shared_by_the_layers():
    """FIRE-S: the first layer alone has the parameters; all layers use its bias; checkpointing gives the same gradients."""
    model = create_model("gpt/nano:position=fire(shared=true,threshold=16)").double()
    owners = [n for n, _ in model.named_parameters() if "position." in n]
    assert owners == [f"stack.layers.0.mixer.inner.position.{n}" for n in ("c", "multiplier", "w1", "b1", "w2")]
    alone = create_model("gpt/nano:position=fire(threshold=16)").double()
    state = {n: model.state_dict()[n if "position." not in n else owners[0].rsplit(".", 1)[0] + "." + n.rsplit(".", 1)[1]]
             for n in alone.state_dict()}
    alone.load_state_dict(state)
    batch = model.example(2)
    assert_close(model(batch), alone(batch))
    grads = []
    for net in (alone, model, model):
        net.zero_grad()
        F.cross_entropy(net.train()(batch).flatten(0, 1), batch.flatten()).backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters()})
        if len(grads) == 2:
            model.set_grad_checkpointing()
    assert all(g.any() for g in grads[1].values())
    assert_close(grads[1], grads[2])
    for owner in owners:  # the gradient is the sum over the layers
        name = owner.split("position.")[1]
        assert_close(grads[1][owner], sum(g for n, g in grads[0].items() if n.endswith(f"position.{name}")))
    with torch.no_grad():
        cache = Cache()
        pieces = [model.eval()(piece, cache=cache) for piece in batch.split([40, 1, 87], dim=1)]
        assert_close(torch.cat(pieces, dim=1), model(batch))


def test_shared_in_a_vit():
    model = create_model("vit/nano:position=fire(shared=true)")
    model(model.example(2)).logsumexp(1).sum().backward()
    learns = {n: p.grad.any() for n, p in model.named_parameters() if ".position." in n}
    assert list(learns) == [f"stages.0.layers.0.mixer.inner.position.{n}" for n in ("c", "multiplier", "w1", "b1", "w2")]
    assert all(learns.values())


def test_no_direction_without_a_mask():
    """Keys ahead count as keys behind, as in the appendix; below L the bias is symmetric."""
    bias = moved(threshold=64.0).bias(30, 30, Ctx())
    assert_close(bias, bias.transpose(-2, -1))


def periodic(samples, length, generator):
    """Four random symbols, repeated: the fifth and later can be told from the one four places before."""
    return torch.randint(16, (samples, 4), generator=generator).repeat(1, length // 4)


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1])[:, 3:].flatten(0, 1), ids[:, 4:].flatten())


def trained():
    model = create_model("gpt/nano:position=fire(threshold=8)", vocab=16, depth=2, context=TRAINED)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss_of(model, periodic(32, TRAINED, generator)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_runs_past_the_training_length(tmp_path):
    """Train on 32 tokens, read 128 with the same weights in a model of a longer context: token by token as at once."""
    with torch.enable_grad():
        model = trained()
    generator = torch.Generator().manual_seed(1)
    assert loss_of(model, periodic(64, TRAINED, generator)) < 0.5 * math.log(16)  # it has learned
    ids = periodic(8, 4 * TRAINED, generator)
    with pytest.raises(DoesNotFit, match="built for 32 tokens, got 128; shorten the text or build with context="):
        model(ids)
    save(model, tmp_path / "short.safetensors")
    longer = load(tmp_path / "short.safetensors", context=4 * TRAINED)
    assert {n: p.shape for n, p in longer.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    logits = longer(ids)
    assert logits.isfinite().all()
    assert_close(logits[:, :TRAINED], model(ids[:, :TRAINED]))
    for pieces in ([1] * 128, [50, 78], [127, 1]):
        cache = Cache()
        assert_close(torch.cat([longer(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1), logits,
                     atol=1e-4, rtol=1e-4)
    assert longer.generate(ids[:, :30], 98, temperature=0).shape == (8, 128)


@pytest.mark.parametrize(("name", "why"), [
    ("gpt/nano:mixer=cosformer,position=fire", "CosFormer does not fit here: Fire works on the scores of attention"),
    ("vit/nano:mixer=pooling,position=fire", "Pooling does not fit here: Fire works on the scores of attention"),
    ("gpt/nano:position=fire(threshold=0)", "threshold and c are positive, hidden is 1 or more; got 0, 0.1 and 32"),
    ("gpt/nano:position=fire(c=-1)", "got 512.0, -1 and 32"),
    ("gpt/nano:position=fire(hidden=0)", "got 512.0, 0.1 and 0"),
])
def test_what_does_not_fit(name, why):
    with pytest.raises(DoesNotFit, match=why):
        create_model(name)


def test_what_does_not_fit_at_run_time():
    with pytest.raises(DoesNotFit, match="does not take packed batches"):
        create_model("gpt/nano:position=fire")(torch.zeros(1, 6, dtype=torch.long), lengths=(4, 2))
    with pytest.raises(DoesNotFit, match="must know its layer, and this mixer does not offer its place"):
        Fire(8, 2, shared=True)
    with pytest.raises(DoesNotFit, match="takes the bias of its stage's first layer"):
        Fire(8, 2, shared=True, place=Place(layer=1, nth=1)).bias(3, 3, Ctx())
    with pytest.raises(DoesNotFit, match=r"the positions of all 5 keys, .* has those of 2 new tokens"):
        Fire(8, 2).bias(2, 5, Ctx(coords=torch.zeros(1, 2, 1)))
