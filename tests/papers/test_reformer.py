"""LSH attention against masks written out from the buckets, reversible layers against plain ones, transformers' answers."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.arena.measure import _LiveMemory
from formarium.core.build import create_model
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.part import Part, Residual
from formarium.core.spec import spec
from formarium.papers.mixers.reformer import (
    KEYS,
    PRESETS,
    AxialPosition,
    ChunkedMlp,
    LocalAttention,
    LSHAttention,
    Reversible,
    as_keys,
    bucket_sizes,
    lsh_attention,
)
from formarium.parts.attention import Attention
from formarium.parts.channel import Mlp
from formarium.parts.residual import PreNorm
from formarium.skeletons.stack import Stack
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def gradients(outs, inputs):
    """Of fixed random projections of all outputs."""
    generator = torch.Generator().manual_seed(3)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    return torch.autograd.grad(total, inputs)


# LSH attention

def seen_in_chunks(buckets, chunk, before, after, causal, strict, hidden):
    """(rounds, N, N): how often token i sees token j in a round. buckets (rounds, N) of one head, as Python lists."""
    rounds, n = len(buckets), len(buckets[0])
    seen = torch.zeros(rounds, n, n, dtype=torch.float64)
    if strict:
        for r in range(rounds):
            for i in range(n):
                own = [j for j in range(i) if buckets[r][j] == buckets[r][i]]
                for j in own[-before * chunk:]:
                    seen[r, i, j] = 1
    else:
        ordered = [(r, j) for r in range(rounds) for j in sorted(range(n), key=lambda j, r=r: (buckets[r][j], j))]
        chunks = [ordered[i:i + chunk] for i in range(0, rounds * n, chunk)]
        for c, tokens in enumerate(chunks):
            around = [j for o in range(-before, after + 1) for _, j in chunks[(c + o) % len(chunks)]]
            for r, i in tokens:
                for j in around:
                    if i != j and not (causal and j > i):
                        seen[r, i, j] += 1
    return seen * (~hidden)[None, None, :]


def by_mask(q, v, buckets, hidden=None, chunk=4, before=1, after=0, causal=False, strict=False):
    """Eqs. 2 to 7 with the scores of all pairs: log of the counts is added, a token alone sees itself."""
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            hide = torch.zeros(q.shape[2], dtype=torch.bool) if hidden is None else hidden[b, h]
            seen = seen_in_chunks(buckets[b, h].tolist(), chunk, before, after, causal, strict, hide)
            k = q[b, h] / (q[b, h].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(q.shape[-1])
            scores = (q[b, h] @ k.T) + seen.log() - 1e5 * torch.eye(q.shape[2], dtype=q.dtype)
            scores = torch.where(torch.eye(q.shape[2], dtype=torch.bool), torch.tensor(-1e5, dtype=q.dtype), scores)
            denominators = scores.logsumexp(-1, keepdim=True)
            weights = (scores - denominators).exp() * (denominators - denominators.logsumexp(0)).exp()
            out[b, h] = weights.sum(0) @ v[b, h]
    return out


def tokens(n, rounds=3, buckets=6, dtype=torch.float64):
    q, v = (torch.randn(2, 3, n, 5, dtype=dtype).requires_grad_() for _ in range(2))
    return q, v, torch.randint(buckets, (2, 3, rounds, n))


@pytest.mark.parametrize("options", [
    {"causal": True, "strict": True}, {"causal": True, "strict": True, "before": 2}, {"causal": True}, {},
    {"before": 2}, {"after": 1}, {"before": 0}, {"causal": True, "before": 0},
], ids=str)
@pytest.mark.parametrize(("n", "rounds", "buckets"), [(24, 3, 6), (4, 1, 2), (8, 2, 2), (20, 2, 1), (32, 1, 20)])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_are_masks(options, n, rounds, buckets, masked):
    """Answers and gradients, with many buckets, one, and fewer chunks than are looked at."""
    q, v, found = tokens(n, rounds, buckets)
    hidden = (torch.rand(2, 3, n) < 0.3) if masked else None
    ours = lsh_attention(q, v, found, chunk=4, hidden=hidden, **options)
    naive = by_mask(q, v, found, hidden, **options)
    assert_close(ours, naive)
    assert_close(gradients([ours], [q, v]), gradients([naive], [q, v]))


def built(kind=LSHAttention, **options):
    torch.manual_seed(1)
    part = kind(24, Place(), heads=3, **{"chunk": 4, **options})
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return part.double()


def project(part, x):
    """Queries, values and buckets (B, H, rounds, N) of the layer, with h(x) = argmax [xR; -xR] a factor."""
    q, v = (F.linear(x, w).unflatten(-1, (part.heads, -1)).transpose(1, 2) for w in (part.qk.weight, part.v.weight))
    found = torch.zeros(*q.shape[:2], part.rotations.shape[2], x.shape[1], dtype=torch.long)
    first, factor = 0, 1
    for size in part.sizes:
        for r in range(found.shape[2]):
            turned = q @ part.rotations[:, :, r, first:first + size // 2]
            found[:, :, r] += factor * torch.cat((turned, -turned), dim=-1).argmax(-1)
        first, factor = first + size // 2, factor * size
    return q, v, found


@pytest.mark.parametrize("options", [
    {"causal": True}, {"causal": True, "strict": False}, {}, {"buckets": (2, 4)}, {"after": 1, "rounds": 1, "buckets": 2},
    {"causal": True, "width": 36, "before": 3, "buckets": 4}, {"multiple": 8},
    {"causal": True, "strict": False, "multiple": 6},
], ids=str)
@pytest.mark.parametrize("n", [3, 16, 23])
def test_layer(options, n):
    """Hashing, padding to whole chunks (a bucket of its own, at the end), rounds, projections."""
    part, x = built(**options), torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    q, v, found = project(part, x)
    causal, strict = part.causal, part.strict
    if strict or n > part.chunk:
        step = math.lcm(part.chunk, options.get("multiple", 1))
        more = 0 if strict else -n % step
        q, v, found = F.pad(q, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), F.pad(found, (0, more), value=part.buckets)
        hidden = (torch.arange(n + more) >= n).expand(2, 3, -1)
        out = by_mask(q, v, found, hidden, chunk=part.chunk, before=part.before, after=part.after, causal=causal,
                      strict=strict)[:, :, :n]
    else:  # of a single chunk all is seen
        scores = (q @ as_keys(q).transpose(-2, -1)).masked_fill(torch.eye(n, dtype=torch.bool), -1e5)
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
        out = scores.softmax(-1) @ v
    naive, ours = out.transpose(1, 2).flatten(2) @ part.proj.weight.T, part(x, Ctx())
    assert_close(ours, naive)
    inputs = [x, *part.parameters()]
    assert_close(gradients([ours], inputs), gradients([naive], inputs))


@torch.no_grad()
def test_published_form_tells_of_later_tokens():
    """The borders of its chunks move with later tokens; the strict form does not change before them."""
    x = torch.randn(1, 32, 24, dtype=torch.float64)
    other = x.clone()
    other[:, 20:] = torch.randn(1, 12, 24)
    for strict in (True, False):
        part = built(causal=True, strict=strict)
        assert torch.allclose(part(x, Ctx())[:, :20], part(other, Ctx())[:, :20], atol=1e-12) is strict


@torch.no_grad()
def test_more_rounds_are_nearer_to_full_attention():
    """Of the same weights: rounds can be changed after training."""
    x, errors = torch.randn(2, 64, 24, dtype=torch.float64), []
    weights = built().state_dict()
    full = built(chunk=64)(x, Ctx())
    for rounds in (1, 4, 16):
        part = built(rounds=rounds, chunk=8, buckets=8)
        part.load_state_dict(weights)
        errors.append((part(x, Ctx()) - full).norm() / full.norm())
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [
    (LSHAttention, {"causal": True}), (LSHAttention, {"causal": True, "before": 2, "buckets": 2}), (LocalAttention, {}),
    (LocalAttention, {"before": 0}), (LocalAttention, {"before": 2}), (LocalAttention, {"width": 36})], ids=str)
@pytest.mark.parametrize("pieces", [[1] * 19, [2, 1, 16], [18, 1], [9, 10], [4, 4, 4, 7]], ids=str)
def test_cache(kind, options, pieces):
    part = built(kind, **options)
    x, cache, out = torch.randn(2, 19, 24, dtype=torch.float64), Cache(), []
    for piece in x.split(pieces, dim=1):
        out.append(part(piece, Ctx(cache=cache)))
        cache.length += piece.shape[1]
    assert_close(torch.cat(out, dim=1), part(x, Ctx()))
    if isinstance(part, LocalAttention):  # only what can still be seen is kept
        assert cache.states[part.place][0].shape[2] <= (part.before + 1) * part.chunk


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [
    (LSHAttention, {"causal": True}), (LSHAttention, {}), (LSHAttention, {"causal": True, "strict": False}),
    (LocalAttention, {})], ids=str)
@pytest.mark.parametrize("n", [4, 14])
def test_hidden_keys_change_nothing(kind, options, n):
    """Not even which chunk the others are in; nor with a cache, token by token."""
    part = built(kind, **options)
    x, mask = torch.randn(2, n, 24, dtype=torch.float64), (torch.arange(n) % 3 != torch.tensor([[1], [2]]))[:, None, None]
    mask[1, ..., 0] = False
    other = torch.where(mask[:, 0, 0, :, None], x, torch.randn_like(x))
    real = mask[:, 0, 0]
    one, two = part(x, Ctx(mask=mask)), part(other, Ctx(mask=mask))
    assert one.isfinite().all()
    assert_close(one[real], two[real])
    assert not torch.allclose(part(x, Ctx())[real], part(other, Ctx())[real])
    if getattr(part, "strict", True):
        cache, out = Cache(), []
        for i in range(n):
            out.append(part(x[:, i:i + 1], Ctx(cache=cache, mask=mask[..., :i + 1])))
            cache.length += 1
        assert_close(torch.cat(out, dim=1)[real], one[real])


def test_packed():
    for part in (built(causal=True), built(), built(LocalAttention)):
        part.train()
        x = torch.randn(1, 25, 24, dtype=torch.float64)
        alone = torch.cat([part(s, Ctx()) for s in x.split((7, 1, 17), dim=1)], dim=1)
        assert_close(part(x, Ctx(lengths=(7, 1, 17))), alone)


@pytest.mark.parametrize(("n", "before"), [(3, 1), (16, 1), (19, 0), (19, 1), (19, 2), (7, 3)])
def test_local_attention(n, before):
    part, x = built(LocalAttention, before=before), torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in F.linear(x, part.qkv.weight).chunk(3, dim=-1))
    seen = torch.tensor([[j <= i and j // 4 >= i // 4 - before for j in range(n)] for i in range(n)])
    scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~seen, -math.inf)
    naive, ours = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ part.proj.weight.T, part(x, Ctx())
    assert_close(ours, naive)
    inputs = [x, *part.parameters()]
    assert_close(gradients([ours], inputs), gradients([naive], inputs))


def test_buckets():
    """Powers of 2, twice the chunks; wide hashes are made of two; the same for every layer, other with another seed."""
    assert bucket_sizes(256, 64) == (8,)
    assert bucket_sizes(65536, 64) == (32, 64)
    assert bucket_sizes(16, 64) == (2,)
    one, two, other = LSHAttention(24, Place()), LSHAttention(24, Place(layer=3)), LSHAttention(24, Place(), seed=1)
    assert torch.equal(one.rotations, two.rotations)
    assert not torch.equal(one.rotations, other.rotations)
    assert "rotations" not in one.state_dict()
    with torch.device("meta"):
        assert LSHAttention(24, Place()).rotations.is_meta


def test_fresh_rotations():
    """New in each training pass, those of the seed otherwise; buckets that are there already are taken."""
    part, x = built(fresh=True, rounds=1), torch.randn(2, 32, 24, dtype=torch.float64)
    assert not torch.equal(part(x, Ctx()), part(x, Ctx()))
    ctx = Ctx()
    first = part(x, ctx)
    (buckets,) = ctx.shared.values()
    assert (buckets.dtype, buckets.shape) == (torch.int16, (2, 3, 1, 32))
    assert torch.equal(part(x, ctx), first)
    part.eval()
    ctx = Ctx()
    assert torch.equal(part(x, ctx), part(x, ctx))
    assert ctx.shared == {}


def test_float16_stays_finite():
    part = built(causal=True, strict=False).half()
    for n in (3, 12):
        assert part(torch.randn(1, n, 24).half(), Ctx()).isfinite().all()


@pytest.mark.parametrize(("make", "why"), [
    (lambda: LSHAttention(24, Place(), chunk=0), "rounds, chunk and multiple are 1 or more"),
    (lambda: LSHAttention(24, Place(), buckets=5), "their number is even, got 5"),
    (lambda: LSHAttention(24, Place(), buckets=(4, 3)), "their number is even"),
    (lambda: LSHAttention(24, Place(), causal=True, before=0), "take strict=False for single chunks"),
    (lambda: LSHAttention(24, Place(), heads=5), "5 heads do not divide a width of 24"),
    (lambda: LocalAttention(24, Place(), causal=False), "looks back only"),
    (lambda: LocalAttention(24, Place(), before=-1), "before not negative"),
    (lambda: built()(torch.randn(1, 6, 24).double(), Ctx(mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))), "hides keys"),
    (lambda: built()(torch.randn(1, 6, 24), Ctx(lengths=(2, 4), cache=Cache())), "LSHAttention takes a packed row without"),
    (lambda: ChunkedMlp(24, Place(), chunk=0), "chunk is 1 or more tokens"),
    (lambda: AxialPosition(24, 40, shape=(6, 6)), "36, for 40 tokens"),
    (lambda: AxialPosition(24, 30, shape=(6, 6), dims=(8, 8)), "24 channels in all"),
    (lambda: create_model("reformer/nano", mixer=()), "expected one mixer"),
    (lambda: create_model("reformer/nano", mixer="pooling"), "no token may see a later one"),
])
def test_refusals(make, why):
    with pytest.raises(DoesNotFit, match=why):
        make()


# reversible layers

class Beside(Part):
    """Reads everything that a sublayer can read beside its tokens, and hands values and a choice on to the next."""

    def __init__(self, dim, place):
        super().__init__(dim, place)
        self.w, self.carry = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)

    def forward(self, x, ctx):
        value, (scale, _) = ctx.shared.get("value", x.new_zeros(())), ctx.shared.get("pair", (x.new_ones(()), None))
        out = torch.tanh(self.w(x) * scale + value + ctx.cond[:, None] + ctx.memory[0].mean(1, keepdim=True))
        ctx.shared["value"] = torch.tanh(self.carry(out) + value)  # written anew by each
        ctx.shared["choice"] = torch.zeros((), dtype=torch.long)
        if self.place.layer == 1 and self.place.sub == 0:
            ctx.shared["pair"] = (1 + out.mean().tanh(), "told")  # read by all later ones
        return out


def plainly(monkeypatch):
    """Reversible layers by autograd alone."""
    monkeypatch.setattr(Reversible, "run", Residual.run)


def passes(stack, x, ctx, inputs, taps=()):
    """Answers, taps and gradients of a training pass from one random state; and how often each sublayer was called."""
    calls = []
    handles = [s.register_forward_hook(lambda *_: calls.append(1)) for layer in stack.layers for s in layer.values()]
    torch.manual_seed(5)
    out, _, seen = stack.train().intermediates(x, ctx, taps)
    after = torch.rand(3)
    found = gradients([out, *seen], inputs)
    for handle in handles:
        handle.remove()
    return (out, seen, found, after, torch.rand(3)), len(calls)


MIXERS = {
    "attention": {"mixer": spec(Attention, heads=2), "channel": spec(Mlp)},
    "lsh": {"mixer": spec(LSHAttention, heads=2, chunk=4, causal=True, fresh=True), "channel": spec(ChunkedMlp, chunk=3)},
    "three": {"one": spec(Attention, heads=2), "two": spec(Mlp), "three": spec(Attention, heads=4)},
    "one": {"mixer": spec(Attention, heads=2)},
    "beside": {"mixer": spec(Beside), "channel": spec(Beside)},
}


def reversible(kind, depth=3, **options):
    torch.manual_seed(0)
    stack = Stack(16, depth, MIXERS[kind], spec(Reversible, **options)).double()
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stack


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5, "layer_scale": 0.7}], ids=str)
@pytest.mark.parametrize("taps", [(), (0, 2), (1,)], ids=str)
def test_reversible_is_the_plain_computation(kind, options, taps, monkeypatch):
    """Answers to the bit, gradients to 1e-10, of tokens, parameters and all that stands beside; random numbers too."""
    stack = reversible(kind, **options)
    x, cond, memory = (torch.randn(*size, 16, dtype=torch.float64, requires_grad=True) for size in ((4, 11), (4,), (4, 5)))
    ctx = Ctx(cond=cond, memory=(memory, Ctx()))
    inputs = [x, *stack.parameters()] + ([cond, memory] if kind == "beside" else [])
    if kind == "beside":  # what the last ones hand on is read by nobody
        inputs = [p for n, p in zip([""] + [n for n, _ in stack.named_parameters()] + ["", ""], inputs, strict=True)
                  if n not in ("layers.2.channel.inner.carry.weight", "layers.2.channel.inner.carry.bias")]
    ours, ran = passes(stack, x, ctx, inputs, taps)
    stack.checkpointing = True  # changes nothing: they are run again anyway
    again, ran_again = passes(stack, x, ctx, inputs, taps)
    plainly(monkeypatch)
    stack.checkpointing = False
    naive, ran_once = passes(stack, x, ctx, inputs, taps)
    assert_close((*ours[:2], *ours[3:]), (*naive[:2], *naive[3:]), atol=0, rtol=0)
    for found in (ours[2], again[2]):
        assert_close(found, naive[2], atol=1e-10, rtol=1e-10)
    assert (ran, ran_again) == (2 * ran_once, 2 * ran_once)
    assert all(g.any() for g in naive[2])


@pytest.mark.parametrize("options", [
    {"mixer": "attention"}, {"mixer": "attention", "position": "rotary"},
    {"mixer": "attention", "position": "fire(shared=True)"},
    {"mixer": "cosformer", "channel": "swiglu"}, {"mixer": ("deltanet", "reformer(chunk=8)")}], ids=str)
def test_reversible_with_any_part(options, monkeypatch):
    """In a model in float32, to 1e-5; values that layers share (rotary, one bias for all) get their gradients."""
    model = create_model("gpt/nano", residual="reversible(drop_path=0.2)", **options).train()
    ids = model.example(3, (40,))

    def found():
        torch.manual_seed(2)
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    ours = found()
    plainly(monkeypatch)
    assert_close(ours, found(), atol=1e-5, rtol=1e-5)


def test_reversible_parts_of_the_graph():
    """Frozen parameters stay out; a stack without any, tokens without a gradient, one gradient alone; no second order."""
    stack, x = reversible("attention").train(), torch.randn(2, 5, 16, dtype=torch.float64)
    frozen = stack.layers[1]["mixer"].inner.qkv.weight.requires_grad_(False)
    stack(x, Ctx())[0].sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in stack.parameters() if p is not frozen)
    (only,) = torch.autograd.grad(stack(x, Ctx())[0].sum(), [stack.layers[0]["mixer"].norm.weight])
    assert_close(only, stack.layers[0]["mixer"].norm.weight.grad)
    for p in stack.parameters():
        p.requires_grad_(False)
    assert not stack(x, Ctx())[0].requires_grad
    x.requires_grad_()
    (dx,) = torch.autograd.grad(stack(x, Ctx())[0].square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_reversible_under_autocast(monkeypatch):
    """The branches are run again in the precision of the first time."""
    stack, x = reversible("attention").float(), torch.randn(2, 9, 16, requires_grad=True)
    inputs = [x, *stack.parameters()]

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            out = stack.train()(x, Ctx())[0]
        return gradients([out], inputs)

    ours = found()
    plainly(monkeypatch)
    for a, b in zip(ours, found(), strict=True):
        assert (a - b).norm() < 0.005 * b.norm()


def test_reversible_with_a_cache(monkeypatch):
    """Cached tokens, with a graph: run plainly, once."""
    stack, x = reversible("lsh").eval(), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    cache, out = Cache(), []
    for piece in x.split([5, 1, 3], dim=1):
        out.append(stack(piece, Ctx(cache=cache))[0])
        cache.length += piece.shape[1]
    whole = stack(x, Ctx())[0]
    assert_close(torch.cat(out, dim=1), whole)
    assert_close(gradients([torch.cat(out, dim=1)], [x]), gradients([whole], [x]))


def activations(stack, x, checkpointing=False):
    """Bytes at the highest point of a training pass beyond tokens and weights."""
    stack.checkpointing = checkpointing
    with _LiveMemory([x, *stack.parameters()]) as memory:
        held = memory.now
        stack.train()(x, Ctx())[0].sum().backward()
    return memory.peak - held


def test_reversible_memory_does_not_grow():
    """By the gradients of the weights alone, a fifth of the tokens here, for each layer more."""
    x, sublayers = torch.randn(16, 128, 32), {"mixer": spec(Attention), "channel": spec(Mlp)}
    used = {name: [activations(Stack(32, depth, sublayers, residual), x, again) for depth in (2, 12)]
            for name, residual, again in (("reversible", spec(Reversible), False), ("plain", spec(PreNorm), False),
                                          ("checkpointed", spec(PreNorm), True))}
    tokens = x.numel() * x.element_size()
    growth = {name: (more - less) / tokens for name, (less, more) in used.items()}
    assert growth["reversible"] < 2.5
    assert growth["checkpointed"] > 9
    assert growth["plain"] > 80
    assert used["reversible"][1] < used["checkpointed"][1] < used["plain"][1]


@pytest.mark.parametrize("name", ["vit/nano", "swin/nano"])
def test_reversible_feature_maps(name, monkeypatch):
    """Stages, resampling between them, and maps taken in between."""
    model = create_model(name, residual="reversible").double().train()
    batch = model.example(2).double()

    def found():
        maps = [f.map for f in model.features(batch)]
        return maps, torch.autograd.grad(sum(m.square().mean() for m in maps), list(model.parameters())[:-4])

    ours = found()
    plainly(monkeypatch)
    assert_close(ours, found(), atol=1e-10, rtol=1e-10)


# the rest

@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 50])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_chunked_mlp(chunk, activation):
    part = ChunkedMlp(8, Place(), ratio=2.5, activation=activation, chunk=chunk).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    act = {"relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[activation]
    naive = act(x @ part.fc1.weight.T + part.fc1.bias) @ part.fc2.weight.T + part.fc2.bias
    inputs = [x, *part.parameters()]
    assert_close(part(x, Ctx()), naive)
    assert_close(gradients([part(x, Ctx())], inputs), gradients([naive], inputs))
    with torch.no_grad():
        assert_close(part(x, Ctx()), naive)


def test_chunked_mlp_holds_one_chunk():
    x, used = torch.randn(1, 512, 16, requires_grad=True), []
    for chunk in (None, 32):
        part = ChunkedMlp(16, Place(), ratio=8.0, chunk=chunk)
        with _LiveMemory([x, *part.parameters()]) as memory:
            part(x, Ctx()).sum().backward()
        used.append(memory.peak)
        x.grad = None
    assert used[1] < 0.35 * used[0]
    with pytest.raises(UnknownName, match="activation 'rely'; did you mean relu"):
        ChunkedMlp(16, Place(), activation="rely")


@pytest.mark.parametrize(("tokens", "options", "shape"), [
    (12, {}, (3, 4)), (13, {}, (4, 4)), (1, {}, (1, 1)), (60, {"shape": (4, 5, 3), "dims": (3, 2, 5)}, (4, 5, 3)),
    (10, {"shape": (2, 8)}, (2, 8))])
def test_axial_positions(tokens, options, shape):
    part, x = AxialPosition(10, tokens, **options), torch.randn(2, tokens, 10)
    assert part.shape == shape
    expected = torch.stack([torch.cat([
        getattr(part, f"table{i}").reshape(shape[i], -1)[p // math.prod(shape[i + 1:]) % shape[i]]
        for i in range(len(shape))]) for p in range(tokens)])
    assert_close(part(x, Ctx()), x + expected)
    cache = Cache(length=tokens - 1)
    assert_close(part(x[:, :1], Ctx(cache=cache)), x[:, :1] + expected[-1:])
    cache.length = math.prod(shape)
    with pytest.raises(DoesNotFit, match=f"for {math.prod(shape)} tokens, got {cache.length + 1}"):
        part(x[:, :1], Ctx(cache=cache))


# transformers' answers and names

@torch.no_grad()
def test_golden_attention():
    state, (x,), golden = replay(GOLDEN / "reformer__lsh_attn_d128_h4.json.gz")
    options = {"heads": 4, "causal": True, "chunk": 16, "rounds": 4, "buckets": 8, "seed": 5}
    part = load(state, "reformer", layout="transformers_lsh", **options)
    assert count_parameters(part) == golden["parameters"] + part.proj.weight.numel()  # theirs has no output projection
    assert compare(golden, part(x, Ctx())[:, 4:]) < 1e-5
    for wrong in ({"seed": 4}, {"strict": True}, {"rounds": 3}):
        with pytest.raises(AssertionError, match="differs by"):
            compare(golden, load(state, "reformer", **options | wrong)(x, Ctx())[:, 4:])


@torch.no_grad()
def test_golden_language_model():
    """Logits from the ninth token on, and the second stream after the first layer."""
    state, (ids,), golden = replay(GOLDEN / "reformer__lm_d128_l2.json.gz")
    options = {"heads": 4, "chunk": 16, "rounds": 2, "buckets": 16, "seed": 3}
    model = load(state, "reformer", **options)
    assert (model.context, model.position.shape) == (128, (8, 16))
    assert count_parameters(model) == golden["parameters"] - 320  # the head's bias has two names

    def answers(model):
        second = model.stack.intermediates(*model.embed(ids), [0])[2][0].chunk(2, dim=-1)[1]
        return model(ids)[:, 8:], second

    assert compare(golden, answers(model)) < 1e-5
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, answers(load(state, "reformer", **options | {"buckets": 8})))


@torch.no_grad()
@pytest.mark.parametrize(("preset", "small"), [
    ("enwik8", {"depth": 8, "heads": 3, "buckets": 4}),
    ("crime_and_punishment", {"depth": 4, "heads": 2, "chunk": 8, "buckets": (2, 4)}),
    ("imagenet64", {"depth": 2, "heads": 2, "chunk": 8, "buckets": 4}),
])
def test_their_models(preset, small):
    """A small model of their shape in transformers' names: all but what tensors cannot tell comes back."""
    axial = {"dims": (9, 15), "shape": (5, 12)} if preset != "imagenet64" else {"dims": (9, 9, 6), "shape": (4, 5, 3)}
    mixers = tuple(m.but(fresh=False) if m.takes("fresh") else m for m in PRESETS[preset]["mixer"])
    wanted = PRESETS[preset].but(vocab=30, context=60, dim=24, mixer=mixers, position=spec(AxialPosition, **axial),
                                 channel=spec(ChunkedMlp, activation="relu"), **small)
    model = wanted().eval()
    theirs = KEYS["transformers"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    layer = "reformer.encoder.layers.0"
    names = {f"{layer}.{x}" for x in (
        "attention.layer_norm.weight", "attention.layer_norm.bias", "attention.self_attention.value.weight",
        "attention.output.dense.weight", "feed_forward.layer_norm.weight", "feed_forward.layer_norm.bias",
        "feed_forward.dense.dense.weight", "feed_forward.dense.dense.bias", "feed_forward.output.dense.weight",
        "feed_forward.output.dense.bias")}
    own = {"query_key"} if preset == "imagenet64" else {"query", "key"}
    assert {k for k in theirs.state if k.startswith(layer)} == names | {f"{layer}.attention.self_attention.{x}.weight"
                                                                       for x in own}
    theirs.state |= {f"{layer}.attention.self_attention.mask_value_float16": torch.tensor(-1e4),
                     "lm_head.bias": theirs.state["lm_head.decoder.bias"]}
    told = {k: v for k, v in wanted.options if k in ("heads", "chunk", "rounds", "buckets", "seed", "mixer")}
    loaded = load(theirs.state, "reformer", **told)
    ids = model.example(2, (50,))
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.position.shape == axial["shape"]
    untold = {k: v for k, v in told.items() if k != "mixer"}
    kinds = [type(layer.mixer.inner) for layer in load(theirs.state, "reformer", **untold).stack.layers]
    assert kinds == [type(layer.mixer.inner) for layer in model.stack.layers]
    del theirs.state["lm_head.decoder.bias"]  # older files have the other name alone
    assert torch.equal(load(theirs.state, "reformer", **told)(ids), model(ids))


def test_their_learned_positions_and_other_names():
    model = create_model("reformer/nano", position="learned", strict=False, channel=spec(ChunkedMlp, ratio=22 / 64))
    state = KEYS["transformers"].convert(model.state_dict(), back=True).state
    assert state["reformer.embeddings.position_embeddings.embedding.weight"].shape == (128, 64)
    loaded = load(state, "reformer", heads=4, chunk=16)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(BadCheckpoint, match=r"1 of .* tensors have no place"):
        load(state | {"reformer.pooler.weight": torch.zeros(3)}, "reformer")


def test_rounds_after_training():
    """The option alone changes: the weights are those of any number of rounds."""
    model = create_model("reformer/nano")
    again = create_model("reformer/nano", rounds=8)
    again.load_state_dict(model.state_dict())
    ids = model.example(1)
    assert not torch.allclose(model.eval()(ids), again.eval()(ids))
    assert [p.shape[2] for n, p in again.named_buffers()] == [8, 8]


def test_published_sizes():
    """Layers as in the released configurations."""
    for name, kinds, parameters in (("enwik8", "local local lsh local " * 3, 149e6),
                                    ("crime_and_punishment", "local lsh " * 3, None), ("imagenet64", "lsh " * 6, None)):
        with torch.device("meta"):
            model = create_model(f"reformer/{name}")
        mixers = [layer.mixer.inner for layer in model.stack.layers]
        assert ["lsh" if isinstance(m, LSHAttention) else "local" for m in mixers] == kinds.split()
        assert all(not m.strict and m.fresh for m in mixers if isinstance(m, LSHAttention))
        if parameters:
            assert count_parameters(model) == pytest.approx(parameters, rel=0.01)
