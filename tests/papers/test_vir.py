"""ViR: one retention in three forms; its cache; the class token that is read last; the hybrid; the authors' names."""

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.papers.backbones.vir import KEYS, Retention, retention, set_mode
from formarium.parts.attention import join_heads, split_heads
from formarium.weights.load import load

DECAY = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)


def moved(model):
    """Parameters away from their start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


# the three forms


def recurrence(q, k, v, state=None):
    """S_n = gamma S_{n-1} + k_n^T v_n; o_n = q_n S_n."""
    s = torch.zeros(2, 3, 4, 5, dtype=torch.float64) if state is None else state
    out = []
    for n in range(q.shape[2]):
        s = DECAY[:, None, None] * s + torch.einsum("bhd,bhe->bhde", k[:, :, n], v[:, :, n])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, n], s))
    return torch.stack(out, dim=2), s


def parallel(q, k, v):
    """(Q K^T * D) V, D_nm = gamma^(n - m) for n >= m, else 0."""
    n = q.shape[2]
    d = torch.tensor([[[g**(i - j) if i >= j else 0.0 for j in range(n)] for i in range(n)] for g in DECAY.tolist()],
                     dtype=torch.float64)
    return torch.einsum("bhnm,hnm,bhme->bhne", torch.einsum("bhnd,bhmd->bhnm", q, k), d, v)


def sequences(n):
    shapes = ((n, 4), (n, 4), (n, 5), (4, 5))  # queries, keys, values, a state
    return [torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def gradients(outs, inputs):
    """Of fixed random projections of all outputs."""
    generator = torch.Generator().manual_seed(3)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    return torch.autograd.grad(total, inputs, retain_graph=True)


@pytest.mark.parametrize("n", [1, 2, 7, 19])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks_are_the_recurrence_and_the_product(n, chunk):
    """Answers, last state and gradients, from nothing and from a state; chunks that divide the tokens, and do not."""
    *inputs, state = sequences(n)
    ours = retention(*inputs, DECAY, chunk=chunk)
    assert_close(ours, recurrence(*inputs))
    assert_close(gradients(ours, inputs), gradients(recurrence(*inputs), inputs))
    assert_close(ours[0], parallel(*inputs))
    assert_close(gradients(ours[:1], inputs), gradients([parallel(*inputs)], inputs))
    ours, naive = retention(*inputs, DECAY, state=state, chunk=chunk), recurrence(*inputs, state)
    assert_close(ours, naive)
    assert_close(gradients(ours, [*inputs, state]), gradients(naive, [*inputs, state]))


def test_long_rows_stay_finite():
    """gamma^-n of a whole row would not be."""
    q = torch.ones(1, 1, 6000, 1)
    out, state = retention(q, q, q, torch.tensor([0.5]), chunk=6000)
    assert_close(out[0, 0, -1], torch.tensor([2.0]))
    assert_close(state, torch.full((1, 1, 1, 1), 2.0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vir/nano", "vir/nano:pool=mean", "vir/hvir_nano", "vit/nano:mixer=retention"])
def test_models_answer_the_same_in_every_mode(name):
    model = moved(create_model(name)).double()
    x = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    usual, layers = model(x), sum(isinstance(m, Retention) for m in model.modules())
    for mode, chunk in (("recurrent", 64), ("chunkwise", 16), ("chunkwise", 1), ("parallel", 64)):
        assert set_mode(model, mode, chunk) == layers > 0
        assert_close(model(x), usual)
        built = create_model(name, **{"mode": mode, "chunk": chunk} if name.startswith("vir") else {}).double().eval()
        built.load_state_dict(model.state_dict())
        assert_close(built(x), usual)


def test_gradients_are_the_same_in_every_mode():
    model = moved(create_model("vir/nano")).double()
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    found = []
    for mode in ("parallel", "chunkwise", "recurrent"):
        set_mode(model, mode, 16)
        model.zero_grad()
        model(x).logsumexp(1).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


# the layer


def test_the_rates_are_the_authors():
    decay = Retention(12, Place(), heads=3).decay()
    assert_close(decay, 1 - torch.tensor([1 / 32, (1 / 32 / 512)**0.5, 1 / 512]))
    assert_close(Retention(12, Place(), heads=1).decay(), torch.tensor([1 - 1 / 32]))


def test_the_layer_by_its_definition():
    layer = moved(Retention(12, Place(), heads=3)).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    q, k, v = split_heads(layer.qkv(x), 3, 3)
    d = torch.stack([layer.decay().double()**(i - j) if i >= j else torch.zeros(3, dtype=torch.float64)
                     for i in range(6) for j in range(6)]).view(6, 6, 3).permute(2, 0, 1)
    expected = layer.out_proj(join_heads((q @ k.transpose(-2, -1) / 2 * d) @ v))
    assert_close(layer(x, Ctx()), expected, atol=1e-6, rtol=1e-6)  # the rates are float32


def test_the_prefix_is_read_last():
    """As if the tokens stood in that order; so the class token sees all patches, and no patch sees it."""
    layer = moved(Retention(8, Place(), heads=2)).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    for prefix in (1, 2):
        ours = layer(x, Ctx(grid=(1, 7 - prefix), prefix=prefix))
        ordered = layer(torch.cat((x[:, prefix:], x[:, :prefix]), dim=1), Ctx())
        assert_close(ours, torch.cat((ordered[:, -prefix:], ordered[:, :-prefix]), dim=1))
    ours = layer(x, Ctx(grid=(1, 6), prefix=1))
    of_class, = torch.autograd.grad(ours[0, 0].sum(), x, retain_graph=True)
    of_last_patch, = torch.autograd.grad(ours[0, -1].sum(), x)
    assert (of_class[0].abs().sum(1) > 0).all()
    assert not of_last_patch[0, 0].any()


def test_the_class_token_reads_from_the_start():
    """A query of zero would read nothing."""
    model = create_model("vir/nano")
    a, b = (model.forward_features(torch.randn(1, 3, 28, 28))[0, 0] for _ in range(2))
    assert (a - b).norm() > 0.1 * a.norm()


@torch.no_grad()
def test_a_cache_goes_on_in_every_mode():
    """Token by token, and in uneven pieces, as all at once; its state does not grow."""
    model = moved(create_model("gpt/nano:mixer=retention,position=none")).double()
    ids = torch.randint(256, (2, 21))
    whole = model(ids)
    for mode in ("parallel", "chunkwise", "recurrent"):
        set_mode(model, mode, 4)
        for pieces in ([1] * 21, [5, 1, 9, 6]):
            cache = Cache()
            assert_close(torch.cat([model(part, cache=cache) for part in ids.split(pieces, dim=1)], dim=1), whole)
            assert {tuple(s.shape) for s in cache.states.values()} == {(2, 4, 16, 16)}


@torch.no_grad()
def test_packed_rows():
    model = moved(create_model("gpt/nano:mixer=retention")).double()
    ids = torch.randint(256, (1, 12))
    alone = torch.cat([model(part) for part in ids.split([5, 7], dim=1)], dim=1)
    assert_close(model(ids, lengths=(5, 7)), alone)


def test_what_does_not_fit():
    for options, error, why in [("causal=False", DoesNotFit, "no form that sees later tokens"),
                                ("chunk=0", DoesNotFit, "1 token or more, got 0"),
                                ("mode=serial", UnknownName, "unknown mode of retention 'serial'"),
                                ("heads=5", DoesNotFit, "5 heads do not divide"),
                                ("span=(1.0,512.0)", DoesNotFit, "more than one token")]:
        with pytest.raises(error, match=why):
            create_model(f"vit/nano:mixer=retention({options})")
    layer, x = Retention(8, Place(), heads=2), torch.randn(1, 3, 8)
    with pytest.raises(DoesNotFit, match="no scores that a mask could hide"):
        layer(x, Ctx(mask=torch.ones(1, 1, 1, 3, dtype=torch.bool)))
    with pytest.raises(DoesNotFit, match="decode a batch"):
        layer(x, Ctx(lengths=(1, 2), cache=Cache()))
    with pytest.raises(DoesNotFit, match="no retention layer"):
        set_mode(create_model("vit/nano"), "recurrent")
    with pytest.raises(DoesNotFit, match="four stages"):
        create_model("vir/hvir_nano", depths=(1, 1, 1))


# the models


def test_the_hybrid():
    """Of any size, rectangular too; convolutions, then retention; as a recipe."""
    model = moved(create_model("vir/hvir_nano", num_classes=7, in_chans=1))
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 7)
    assert [f.map.shape[1:] for f in model.features(torch.randn(1, 1, 64, 96))] == [
        (16, 16, 24), (32, 8, 12), (48, 4, 6), (64, 2, 3)]
    assert [sum(isinstance(m, Retention) for m in s.modules()) for s in model.stages] == [0, 0, 2, 2]
    assert from_recipe(model.recipe).recipe == model.recipe
    colours = load(model.state_dict(), "vir/hvir_nano", in_chans=3)
    grey = torch.randn(1, 1, 32, 32)
    assert_close(colours(grey.expand(-1, 3, -1, -1)), model(grey))
    assert load(model.state_dict(), "vir").state_dict().keys() == model.state_dict().keys()
    model.train()(torch.randn(2, 1, 64, 64)).logsumexp(1).sum().backward()
    assert all(p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_their_names():
    model = moved(create_model("vir/nano"))
    theirs = KEYS["authors"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert theirs.state["pos_embed"].shape == (1, 49, 64)
    assert {k for k in theirs.state if k.startswith("blocks.3.")} == {f"blocks.3.{n}" for n in (
        "norm1.weight", "norm1.bias", "retention.qkv.weight", "retention.qkv.bias", "retention.out_proj.weight",
        "retention.out_proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma")}
    again = load(theirs.state)
    assert again.recipe["name"] == "vir/nano"
    x = model.example(2)
    assert torch.equal(again(x), model(x))
