"""DeltaNet against its definition, token by token; its cache; its hybrids; the authors' answers and names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.papers.mixers.deltanet import KEYS, PRESETS, DeltaNet, delta_rule
from formarium.parts.attention import Attention
from formarium.parts.position import Rotary
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def recurrence(q, k, v, beta, state=None):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T; o_t = S_t^T q_t / sqrt(d)."""
    d = q.shape[-1]
    s = torch.zeros(*q.shape[:2], d, v.shape[-1], dtype=q.dtype) if state is None else state
    out = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, beta_t = q[:, :, t], k[:, :, t], v[:, :, t], beta[:, :, t, None, None]
        keep = torch.eye(d, dtype=q.dtype) - beta_t * torch.einsum("bhi,bhj->bhij", k_t, k_t)
        s = keep @ s + beta_t * torch.einsum("bhi,bhj->bhij", k_t, v_t)
        out.append(torch.einsum("bhij,bhi->bhj", s, q_t) / d**0.5)
    return torch.stack(out, dim=2), s


def sequences(n, d=5, e=7, dtype=torch.float64):
    """Queries, unit keys, values, betas up to 2, and a state."""
    q, k, v = torch.randn(2, 3, n, d), F.normalize(torch.randn(2, 3, n, d), dim=-1), torch.randn(2, 3, n, e)
    return [t.to(dtype).requires_grad_() for t in (q, k, v, 2 * torch.rand(2, 3, n), torch.randn(2, 3, d, e))]


def gradients(outs, inputs):
    """Of fixed random projections of all outputs."""
    generator = torch.Generator().manual_seed(3)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunks_are_the_recurrence(n, chunk):
    """Answers, last state and all gradients, from nothing and from a state."""
    *inputs, state = sequences(n)
    for given in ([], [state]):
        ours = delta_rule(*inputs, state=given[0] if given else None, chunk=chunk)
        naive = recurrence(*inputs, *given)
        assert_close(ours, naive)
        assert_close(gradients(ours, inputs + given), gradients(naive, inputs + given))


def test_pieces_carry_the_state():
    *inputs, _ = sequences(23)
    whole, last = delta_rule(*inputs, chunk=8)
    outs, state = [], None
    for piece in zip(*(t.split([1, 9, 1, 12], dim=2) for t in inputs), strict=True):
        out, state = delta_rule(*piece, state=state, chunk=4)
        outs.append(out)
    assert_close((torch.cat(outs, dim=2), state), (whole, last))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_repeated_keys_do_not_cancel(strength):
    """One key for 256 tokens: the inverse of the system is harmless, the powers of its matrix are not."""
    q, k, v, _, _ = sequences(256, dtype=torch.float32)
    k = k[:, :, :1].expand_as(k)
    beta = torch.full((2, 3, 256), strength)
    naive, _ = recurrence(q.double(), k.double(), v.double(), beta.double())
    allowed = 1e-4 * naive.abs().max().item()
    for chunk in (64, 256):
        assert_close(delta_rule(q, k, v, beta, chunk=chunk)[0].double(), naive, atol=allowed, rtol=0)


def test_a_key_is_overwritten():
    """Orthogonal keys written at full strength are recalled exactly; a key written again gives its last value alone."""
    written = [0, 1, 2, 1, 3, 0]
    k, v = torch.eye(4, dtype=torch.float64)[written][None, None], torch.randn(1, 1, 6, 7, dtype=torch.float64)
    _, state = delta_rule(k, k, v, torch.ones(1, 1, 6, dtype=torch.float64))
    assert_close(state[0, 0], v[0, 0, [5, 3, 2, 4]])


def test_low_precision():
    """The rule is computed in float32 and answers in the type of v; mixed precision runs through it."""
    *inputs, _ = sequences(40, dtype=torch.bfloat16)
    out, state = delta_rule(*inputs, chunk=16)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(out, recurrence(*(t.float() for t in inputs))[0].bfloat16())
    part, x = built(), torch.randn(2, 9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = part(x, Ctx())
    exact = part(x, Ctx())
    assert 0 < (mixed - exact).norm() < 0.03 * exact.norm()


# the layer

OPTIONS = [
    {}, {"conv": None}, {"conv": 1}, {"conv": 3, "expand_k": 0.5, "expand_v": 2.0}, {"beta_max": 2.0},
    {"qk_activation": "relu"}, {"qk_activation": "elu", "qk_norm": "l1"}, {"qk_activation": "identity", "qk_norm": "l1"},
]


def built(**options):
    part = DeltaNet(24, Place(), heads=3, chunk=4, **options)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return part


def by_token(part, x, qk_activation="silu", qk_norm="l2", beta_max=1.0, **_):
    """The layer with its convolution as a sum over past tokens and the rule as a recurrence."""
    y = x @ part.qkv.weight.T
    if part.conv is not None:
        taps = part.conv.weight[:, 0].flip(1)
        y = torch.stack([sum(taps[:, j] * y[:, t - j] for j in range(min(t + 1, taps.shape[1])))
                         for t in range(x.shape[1])], dim=1)
    width = y.shape[2] - part.proj.weight.shape[1]
    q, k, v = y[..., :width // 2], y[..., width // 2:width], F.silu(y[..., width:])
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, v))
    act = {"silu": F.silu, "relu": F.relu, "elu": lambda t: F.elu(t) + 1, "identity": lambda t: t}[qk_activation]
    size = {"l2": lambda t: (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt(),
            "l1": lambda t: t.abs().sum(-1, keepdim=True)}[qk_norm]
    q, k = act(q) / size(act(q)), act(k) / size(act(k))
    beta = beta_max * torch.sigmoid(x @ part.beta.weight.T).transpose(1, 2)
    o = recurrence(q, k, v, beta)[0]
    o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * part.out_norm.weight
    return o.transpose(1, 2).flatten(2) @ part.proj.weight.T


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_by_token(options):
    part, x = built(**options).double(), torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    ours, naive = part(x, Ctx()), by_token(part, x, **options)
    assert_close(ours, naive)
    inputs = [x, *part.parameters()]
    assert_close(gradients([ours], inputs), gradients([naive], inputs))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("pieces", [[1] * 11, [2, 1, 8], [10, 1], [6, 5]], ids=str)
def test_cache(options, pieces):
    part, x = built(**options).double(), torch.randn(2, 11, 24, dtype=torch.float64)
    cache, out = Cache(), []
    for piece in x.split(pieces, dim=1):
        out.append(part(piece, Ctx(cache=cache)))
        cache.length += piece.shape[1]
    assert_close(torch.cat(out, dim=1), part(x, Ctx()))


@torch.no_grad()
def test_cache_does_not_grow():
    """The state, and the inputs that the convolution still needs, with no more memory behind them."""
    part, cache = built(), Cache()
    for n in (50, 1, 1):
        part(torch.randn(2, n, 24), Ctx(cache=cache))
        (state, past), = cache.states.values()
        assert (state.shape, past.shape) == ((2, 3, 8, 8), (2, 3, 72))
        assert past.untyped_storage().nbytes() == past.numel() * 4


def test_packed():
    part, x = built().double(), torch.randn(1, 12, 24, dtype=torch.float64)
    alone = torch.cat([part(s, Ctx()) for s in x.split((5, 1, 6), dim=1)], dim=1)
    assert_close(part(x, Ctx(lengths=(5, 1, 6))), alone)


def test_refusals():
    x = torch.randn(1, 6, 24)
    with pytest.raises(DoesNotFit, match="leave padding out, or pack"):
        built()(x, Ctx(mask=torch.ones(1, 1, 1, 6, dtype=torch.bool)))
    with pytest.raises(DoesNotFit, match=r"one state for each row.*decode a batch"):
        built()(x, Ctx(lengths=(2, 4), cache=Cache()))
    with pytest.raises(DoesNotFit, match=r"no form that sees later tokens.*causal=True"):
        built(causal=False)
    for option in ({"chunk": 0}, {"conv": 0}):
        with pytest.raises(DoesNotFit, match="1 or more"):
            DeltaNet(24, Place(), **option)
    with pytest.raises(DoesNotFit, match="5 heads do not divide a width of 24"):
        DeltaNet(24, Place(), heads=5)
    with pytest.raises(DoesNotFit, match="3 heads do not divide a width of 7"):
        DeltaNet(24, Place(), heads=3, expand_v=7 / 24)
    with pytest.raises(UnknownName, match="query and key norm 'l3'; did you mean l"):
        built(qk_norm="l3")
    with pytest.raises(UnknownName, match="query and key activation 'silo'; did you mean silu"):
        built(qk_activation="silo")
    with pytest.raises(DoesNotFit, match="DeltaNet does not fit here: Rotary works on the scores"):
        create_model("gpt/nano:mixer=deltanet,position=rotary")


# hybrids: several mixers that take turns in a GPT

def test_hybrids_take_turns():
    model = create_model("gpt/nano:mixer=(deltanet,attention(window=16),cosformer)")
    assert [type(layer.mixer.inner).__name__ for layer in model.stack.layers] == [
        "DeltaNet", "Attention", "CosFormer", "DeltaNet"]
    assert all(layer.mixer.inner.causal for layer in list(model.stack.layers)[1:3])
    assert from_recipe(model.recipe).recipe == model.recipe
    state = create_model("gpt/nano:mixer=(deltanet,)").state_dict()
    own = create_model("deltanet/nano").state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("mixer", [
    "(deltanet,attention(window=16,position=rotary))", "(deltanet,attention(position=rotary),deltanet,deltanet)"])
def test_hybrids_are_causal_and_cached(mixer):
    model = create_model(f"gpt/nano:mixer={mixer},position=none").double().eval()
    ids = model.example(2, (40,))
    whole, cache = model(ids), Cache()
    assert_close(torch.cat([model(p, cache=cache) for p in ids.split([21, 1, 18], dim=1)], dim=1), whole)
    ids[:, 30] = (ids[:, 30] + 1) % model.vocab
    after = model(ids)
    assert_close(after[:, :30], whole[:, :30])
    assert ((after - whole)[:, 30:].abs().amax(dim=(0, 2)) > 1e-6).all()


@pytest.mark.parametrize(("options", "why"), [
    ({"mixer": ("deltanet", "pooling")}, "Pooling does not fit here: in a language decoder no token may see a later one"),
    ({"mixer": ("attention", "deltanet"), "position": "rotary"}, "DeltaNet does not fit here: Rotary works on the scores"),
    ({"mixer": ()}, "expected one mixer, or several that take turns, got none"),
])
def test_hybrids_that_do_not_fit(options, why):
    with pytest.raises(DoesNotFit, match=why):
        create_model("gpt/nano", **options)


def test_published_hybrids():
    """Attention in every other layer, or in the second of 24 and the one after the middle; it alone has positions."""
    for name, where in (("340m_sliding", range(1, 24, 2)), ("340m_global", (1, 12)), ("340m", ())):
        with torch.device("meta"):
            mixers = [layer.mixer.inner for layer in create_model(f"deltanet/{name}").stack.layers]
        assert [i for i, m in enumerate(mixers) if isinstance(m, Attention)] == list(where)
        assert all(isinstance(mixers[i].position, Rotary) for i in where)
        assert {mixers[i].window for i in where} == {"340m": set(), "340m_sliding": {2048}, "340m_global": {None}}[name]


@pytest.mark.parametrize(("name", "size"), [("340m", 340e6), ("1.3b", 1.3e9)])
def test_sizes_without_the_head(name, size):
    with torch.device("meta"):
        model = create_model(f"deltanet/{name}")
    assert count_parameters(model) - model.head.weight.numel() == pytest.approx(size, rel=0.01)


# the authors' answers and names

@torch.no_grad()
def test_golden_rule():
    """Theirs by recurrence and in chunks of 32: queries and keys are normalised, betas are sigmoids."""
    _, (q, k, v, logits), golden = replay(GOLDEN / "deltanet__ops_h4_l128.json.gz")
    inputs = F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, logits.sigmoid()
    assert compare(golden, (*recurrence(*inputs), *delta_rule(*inputs, chunk=32))) < 1e-5
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, (*delta_rule(q, *inputs[1:]), *delta_rule(*inputs)))


@torch.no_grad()
def test_golden_layer():
    state, (x,), golden = replay(GOLDEN / "deltanet__layer_d256_h4.json.gz")
    part = load(state, "deltanet", layout="fla_layer")
    assert part.heads == 4
    assert count_parameters(part) == golden["parameters"]
    assert compare(golden, part(x, Ctx())) < 1e-5
    state["k_conv1d.weight"] = state["k_conv1d.weight"].flip(2)
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, load(state, "deltanet")(x, Ctx()))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["deltanet", "hybrid"])
def test_their_models(mixer):
    """A small model of their shape, in their names, is recognised whole; all but the window is told by the tensors."""
    options = {"vocab": 50, "dim": 24, "depth": 4, "heads": 3}
    paper = PRESETS["340m_sliding" if mixer == "hybrid" else "340m"].but(**options)
    model = paper().eval()
    theirs = KEYS["fla"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert {k.removeprefix("model.layers.0.") for k in theirs.state if ".layers." not in k or ".layers.0." in k} == {
        "model.embeddings.weight", "model.norm.weight", "lm_head.weight", "attn_norm.weight", "mlp_norm.weight",
        *(f"attn.{x}_proj.weight" for x in "qkvbo"), *(f"attn.{x}_conv1d.weight" for x in "qkv"), "attn.o_norm.weight",
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))}
    loaded = load(theirs.state, "deltanet")
    ids = model.example(2, (70,))
    assert torch.equal(loaded(ids), model(ids))
    made = loaded.recipe["name"].split("/")[1]
    assert made in (("340m_sliding", "1.3b_sliding") if mixer == "hybrid" else ("340m", "1.3b"))


def test_their_unequal_widths():
    state = {f"{x}_proj.weight": torch.randn(12, 24) for x in "qk"} | {
        "v_proj.weight": torch.randn(48, 24), "b_proj.weight": torch.randn(3, 24), "o_norm.weight": torch.randn(16),
        "o_proj.weight": torch.randn(24, 48)}
    part = load(state, "deltanet")
    assert (part.heads, part.widths, part.conv) == (3, (12, 12, 48), None)
    assert torch.equal(part.qkv.weight, torch.cat([state[f"{x}_proj.weight"] for x in "qkv"]))
