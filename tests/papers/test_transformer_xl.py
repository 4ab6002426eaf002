"""Transformer-XL against its definition; its memory against one long pass; the adaptive softmax; the task with a memory."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.core.model import count_parameters
from formarium.data.cache import Origin
from formarium.data.text import Text
from formarium.papers.language.transformer_xl import (
    KEYS,
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    RelativeAttention,
    relative_shift,
    settings,
    sinusoid,
)
from formarium.skeletons.memory import Memory
from formarium.tasks.language import NextByte, with_memory
from formarium.tasks.registry import get_task
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
HERE = Origin("Made up", "this test", "ours")


def gradients(outs, inputs):
    """Of fixed random projections of all outputs."""
    generator = torch.Generator().manual_seed(3)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    return torch.autograd.grad(total, inputs)


def moved(module):
    """Parameters away from their start; double precision."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def built(**options):
    small = {"dim": 24, "heads": 3, "depth": 3, "context": 8, "mem_len": 8}
    return moved(create_model("transformer_xl/nano", **small | options))


# relative positions


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (4, 4), (3, 7)])
def test_shift_by_counting(n, m, ahead):
    x = torch.randn(2, n, (m + n - 1 if ahead else m) + 1)
    shifted = relative_shift(x, m)
    assert shifted.shape == (2, n, m)
    for i in range(n):
        for j in range(m):
            distance = i + m - n - j
            if distance >= 0 or ahead:
                assert torch.equal(shifted[:, i, j], x[:, i, m - 1 - distance])


def by_definition(part, x, past=None):
    """Score by score: ((q + u) . k + (q + v) . W_R R_{i-j}) / sqrt(d), R made here."""
    (b, n, dim), h = x.shape, part.heads
    keys = x if past is None else torch.cat((past, x), dim=1)
    m = keys.shape[1]
    wq, wk, wv = part.qkv.weight.chunk(3)
    q, k, v = ((t @ w.T).unflatten(-1, (h, -1)) for t, w in ((x, wq), (keys, wk), (keys, wv)))
    d = q.shape[-1]
    scores = torch.full((b, h, n, m), -math.inf, dtype=x.dtype)
    frequencies = torch.tensor([10000 ** (-2 * c / dim) for c in range(dim // 2)])
    for i in range(n):
        for j in range(m):
            distance = i + m - n - j
            if (part.causal and distance < 0) or (part.window is not None and abs(distance) >= part.window):
                continue
            limit = part.clamp or m
            angle = max(-limit, min(limit, distance)) * frequencies
            r = torch.cat((angle.sin(), angle.cos())).to(x.dtype) @ part.relative.weight.T
            content = ((q[:, i] + part.u) * k[:, j]).sum(-1)
            scores[:, :, i, j] = (content + ((q[:, i] + part.v) * r.unflatten(0, (h, -1))).sum(-1)) / d**0.5
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2) @ part.proj.weight.T


OPTIONS = [{}, {"causal": True}, {"causal": True, "window": 3}, {"window": 4}, {"clamp": 2}, {"causal": True, "clamp": 3},
           {"causal": True, "width": 36}]


@pytest.mark.parametrize("n", [1, 5, 11])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_by_definition(options, n):
    """With fewer tokens than a head has channels, and with more; forward and backward."""
    part = moved(RelativeAttention(24, Place(), heads=3, **options))
    x = torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    ours, naive = part(x, Ctx()), by_definition(part, x)
    assert_close(ours, naive, atol=1e-6, rtol=1e-6)  # the sinusoids of the definition are of single precision
    inputs = [x, *part.parameters()]
    assert_close(gradients([ours], inputs), gradients([naive], inputs), atol=1e-5, rtol=1e-5)


def test_both_orders_of_the_position_scores():
    """Few queries times W_R, or the sinusoids times W_R: the same numbers and gradients."""
    part = moved(RelativeAttention(24, Place(), heads=3, causal=True))
    q = torch.randn(2, 3, 11, 8, dtype=torch.float64, requires_grad=True)
    many = part._position_scores(q, 11, Ctx())
    rows = [part._position_scores(q[:, :, i:i + 1], 11, Ctx()) for i in range(11)]
    few, inputs = torch.cat(rows, dim=2), [q, part.relative.weight]
    assert_close(few, many)
    assert_close(gradients([few], inputs), gradients([many], inputs))


def test_sinusoid_tells_before_from_behind():
    near = sinusoid(torch.tensor([-1.0, 0.0, 1.0]), 8)
    assert_close(near[0], torch.cat((-near[2, :4], near[2, 4:])))
    assert_close(near[1], torch.tensor([0.0] * 4 + [1.0] * 4))


@torch.no_grad()
def test_distances_alone_count():
    """Tokens repeated after an unseen past of any length get the same answers: no absolute position is known."""
    part = moved(RelativeAttention(24, Place(), heads=3, causal=True, window=4))
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    late = torch.cat((torch.randn(1, 20, 24, dtype=torch.float64), x), dim=1)
    assert_close(part(late, Ctx())[:, 23:], part(x, Ctx())[:, 3:])


def test_as_a_part_of_other_models():
    for host in ("gpt/nano", "vit/nano"):
        model = create_model(f"{host}:mixer=transformer_xl,position=none" if "gpt" in host else
                             f"{host}:mixer=transformer_xl")
        mixers = [m for m in model.modules() if isinstance(m, RelativeAttention)]
        assert len(mixers) == 4
        assert {m.causal for m in mixers} == {host == "gpt/nano"}
    model = create_model("gpt/nano:mixer=transformer_xl(shared=True)")
    biases = [name for name, _ in model.named_parameters() if name.endswith(("inner.u", "inner.v"))]
    assert biases == ["stack.layers.0.mixer.inner.u", "stack.layers.0.mixer.inner.v"]
    assert {"stack.layers.0.mixer.inner.u", "stack.layers.0.mixer.inner.v"} <= model.no_weight_decay()
    late = create_model("gpt/nano:mixer=(attention,transformer_xl(shared=True))")
    with pytest.raises(DoesNotFit, match="takes u and v from the first layer"):
        late(late.example(1))


def test_packed_rows():
    part = moved(RelativeAttention(24, Place(), heads=3, causal=True))
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    alone = torch.cat([part(s, Ctx()) for s in x.split((5, 1, 6), dim=1)], dim=1)
    assert_close(part(x, Ctx(lengths=(5, 1, 6))), alone)


def test_refusals():
    x = torch.randn(1, 6, 24)
    part = RelativeAttention(24, Place(), heads=3)
    with pytest.raises(DoesNotFit, match="counts distances in tokens"):
        part(x, Ctx(coords=torch.zeros(1, 6, 2)))
    with pytest.raises(DoesNotFit, match="decode a batch"):
        part(x, Ctx(lengths=(2, 4), cache=Cache()))
    with pytest.raises(DoesNotFit, match="must be even, got 9"):
        RelativeAttention(9, Place(), heads=3)
    with pytest.raises(DoesNotFit, match="clamp is a distance of 1 or more"):
        RelativeAttention(24, Place(), clamp=0)
    with pytest.raises(DoesNotFit, match="5 heads do not divide a width of 24"):
        RelativeAttention(24, Place(), heads=5)
    for options in ({"mem_len": -1}, {"mem_len": 0, "same_length": True}):
        with pytest.raises(DoesNotFit, match="mem_len is 0 or more"):
            built(**options)
    for options in ({"cutoffs": (5, 5)}, {"cutoffs": (0,)}, {"cutoffs": (256,)}, {"cutoffs": (9, 99), "div": 8}):
        with pytest.raises(DoesNotFit, match="cutoffs rise from 1 to below the vocabulary"):
            built(**options)
    model = built()
    with pytest.raises(DoesNotFit, match="a memory belongs to one text a row"):
        model(model.example(1), cache=model.memory(), lengths=(4, 4))
    with pytest.raises(DoesNotFit, match="built for 8 tokens, got 9"):
        model(model.example(1, (9,)), cache=model.memory())


# memory


def segments(model, ids, memory, size=None):
    return torch.cat([model.hidden(s, cache=memory) for s in ids.split(size or model.context, dim=1)], dim=1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"width": 36}, {"clamp": 5}], ids=str)
def test_memory_of_a_layer_is_its_former_inputs(options, training):
    """Answers and gradients of a segment are those of attention over the layer's kept inputs, which get no gradient."""
    part = moved(RelativeAttention(24, Place(), heads=3, causal=True, **options)).train(training)
    x = torch.randn(2, 12, 24, dtype=torch.float64, requires_grad=True)
    memory, inputs = Memory(limit=6), list(part.parameters())
    for start in (0, 4, 8):
        memory = Memory(states=memory.kept, limit=6)
        segment, past = x[:, start:start + 4], x[:, max(0, start - 6):start].detach()
        ours, naive = part(segment, Ctx(cache=memory)), by_definition(part, segment, past)
        assert_close(ours, naive, atol=1e-6, rtol=1e-6)
        assert_close(gradients([ours], [x, *inputs]), gradients([naive], [x, *inputs]), atol=1e-5, rtol=1e-5)
    assert memory.kept[Place()].shape == (2, 6, 24)
    assert torch.equal(memory.kept[Place()], x[:, 6:])
    assert not memory.kept[Place()].requires_grad


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"shared": False}, {"width": 36}, {"residual": "pre_norm"}], ids=str)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_memory_of_all_is_one_long_pass(options, size):
    model = built(**options).eval()
    ids = torch.randint(256, (2, 22))
    long = built(**options, context=22).eval()
    long.load_state_dict(model.state_dict())
    memory = model.memory(22)
    assert_close(segments(model, ids, memory, size), long.hidden(ids))
    assert memory.length == 22


@torch.no_grad()
@pytest.mark.parametrize(("depth", "mem_len", "first"), [
    (1, 0, 16), (1, 1, 15), (1, 3, 13), (1, 8, 8), (2, 0, 16), (2, 1, 7), (2, 3, 5), (2, 8, 0), (3, 1, 0)])
def test_reach_of_a_memory(depth, mem_len, first):
    """What the first token of the third segment sees begins at `first`: each layer reaches back mem_len from a segment's
    start, and the next one what the tokens there have seen."""
    model, ids = built(depth=depth).eval(), torch.randint(256, (1, 17))
    moved_by = []
    for t in range(17):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 256
        a, b = (segments(model, text, model.memory(mem_len))[:, 16] for text in (ids, other))
        moved_by.append((a - b).abs().max() > 1e-9)
    assert moved_by == [t >= first for t in range(17)]


@torch.no_grad()
def test_limits():
    model = built(mem_len=5).eval()
    for mem_len, held in ((None, 5), (0, 0), (3, 3), (20, 16)):
        memory = model.memory(mem_len)
        segments(model, model.example(2, (16,)), memory)
        assert {k.shape[2] for k, _ in memory.states.values()} == ({held} if held else set())


def test_memory_in_training_and_in_evaluation_agree():
    """Inputs of the layers, or keys and values: the same answers. What holds keys and values cannot be learned from."""
    model, ids = built(), torch.randint(256, (2, 24))
    learned = model.memory()
    training = segments(model.train(), ids, learned)
    asked = model.memory()
    with torch.no_grad():
        evaluation = segments(model.eval(), ids, asked)
        assert_close(evaluation, training.detach())
        model.train()
        again = model.memory()
        assert_close(segments(model, ids, again), training.detach())  # still inputs: a training step comes next
        assert_close(model.eval().hidden(ids[:, :8], cache=learned), model.hidden(ids[:, :8], cache=asked))
    with pytest.raises(DoesNotFit, match="nothing can be learned"):
        model.hidden(ids[:, :8], cache=asked)
    state = next(iter(again.states.values()))
    assert state.shape == (2, 8, 24)


def test_no_gradient_enters_the_memory():
    """Only the words of the last segment are learned; without a memory, the same words."""
    model = built(tie=False).train()
    first, second = torch.arange(8)[None], torch.arange(8, 16)[None]
    memory = model.memory()
    model.hidden(first, cache=memory)
    gradient, = torch.autograd.grad(model.hidden(second, cache=memory).square().sum(), model.token.tables[0].weight)
    assert gradient.abs().sum(1).nonzero()[:, 0].tolist() == list(range(8, 16))


def test_gradient_checkpointing_with_a_memory():
    def learn(checkpointing):
        torch.manual_seed(0)
        model = built().train()
        model.set_grad_checkpointing(checkpointing)
        ids, memory = torch.randint(256, (2, 24)), model.memory()
        with torch.no_grad():
            segments(model, ids[:, :16], memory)
        out = model(ids[:, 16:], cache=memory)
        return gradients([out], list(model.parameters())), memory

    (plain, first), (again, second) = learn(False), learn(True)
    assert_close(again, plain)
    assert_close(list(second.states.values()), list(first.states.values()))


@torch.no_grad()
def test_a_memory_of_zeros():
    """As TensorFlow's and transformers' models start: tokens of zeros in every layer, which are attended to."""
    model = built().eval()
    ids = model.example(2)
    places = [layer["mixer"].place for layer in model.stack.layers]
    ours = model.hidden(ids, cache=model.memory(5, zeros=2))
    x = model.embed(ids)[0]
    for layer, place in zip(model.stack.layers, places, strict=True):
        memory = Memory(limit=5, states={place: torch.zeros(2, 5, 24, dtype=torch.float64)})
        shared = {"transformer_xl biases 3 24": (model.stack.layers[0]["mixer"].inner.u,
                                                 model.stack.layers[0]["mixer"].inner.v)}
        for sublayer in layer.values():
            x = sublayer(x, Ctx(cache=memory, shared=dict(shared)))
    assert_close(ours, x)
    assert (ours - model.hidden(ids, cache=model.memory(5))).abs().max() > 1e-3


@torch.no_grad()
def test_same_length():
    """Every token sees as many as the memory holds, itself included, however the text is cut into segments."""
    model = built(mem_len=5, same_length=True).eval()
    ids = torch.randint(256, (2, 24))
    whole = segments(model, ids, model.memory())
    assert_close(segments(model, ids, model.memory(), 3), whole)
    long = built(context=24, mem_len=5, same_length=True).eval()
    long.load_state_dict(model.state_dict())
    assert_close(long.hidden(ids), whole)
    assert_close(long.stack.layers[0]["mixer"].inner.window, 5)
    assert (segments(model, ids, model.memory(7)) - whole).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mem_len", [0, 3, 20])
def test_generation_goes_on_with_the_memory(mem_len):
    """Within the context as without a cache; past it as token by token with the layers' inputs as memory."""
    model = built(mem_len=mem_len).eval()
    prompt = torch.randint(256, (2, 5))
    seen = prompt
    for _ in range(3):
        seen = torch.cat((seen, model(seen)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 3, temperature=0), seen)
    for length in (5, 8, 9, 21):
        prompt = torch.randint(256, (2, length))
        memory, out = model.memory(max(mem_len, 7)), prompt
        with torch.enable_grad():  # so that inputs are kept, not keys and values
            *before, new = prompt.split(8, dim=1)
            for segment in before:
                model(segment, cache=memory)
            for _ in range(20):
                new = model(new, cache=memory)[:, -1].argmax(-1, keepdim=True)
                out = torch.cat((out, new), dim=1)
        assert torch.equal(model.generate(prompt, 20, temperature=0), out)
        assert torch.equal(model.generate(prompt, 20, top_k=1), out)
    with pytest.raises(DoesNotFit, match="at least one token"):
        model.generate(prompt[:, :0], 1)


# adaptive embedding and softmax

ADAPTIVE = [{"cutoffs": (20, 90)}, {"cutoffs": (20, 90), "div": 2}, {"cutoffs": (20, 90), "div": 4, "embed": 16},
            {"cutoffs": (20, 90), "embed": 12}, {"embed": 12}, {"div": 2}]


def log_chances(x, token, head, edges, div):
    """log p of every word for one token x, cluster by cluster."""
    tables = [t.weight for t in token.tables] if head.tables is None else head.tables
    weight = torch.cat(list(tables)) if div == 1 else None
    found, clusters = [], len(edges) - 1
    for c in range(clusters):
        words = weight[edges[c]:edges[c + 1]] if div == 1 else tables[c]
        bias = torch.cat(list(head.biases))[edges[c]:edges[c + 1]]
        y = x
        if len(token.projections):
            own = head.projections.get(str(c))
            y = x @ (token.projections[c if div > 1 else 0] if own is None else own)
        scores = words @ y + bias
        if c == 0 and clusters > 1:
            first = torch.cat((scores, head.cluster_weight @ y + head.cluster_bias)).log_softmax(0)
            found.append(first[:edges[1]])
        else:
            found.append(scores.log_softmax(0) + (first[edges[1] + c - 1] if c else 0))
    return torch.cat(found)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("options", ADAPTIVE, ids=str)
def test_adaptive_by_definition(options, tie):
    """Vectors and probabilities word by word; nll and its gradients are those of forward."""
    token = moved(AdaptiveEmbedding(256, 24, **options))
    head = moved(AdaptiveSoftmax(token, tie=tie, tie_projections=tie))
    edges, div = [0, *options.get("cutoffs", ()), 256], options.get("div", 1)
    projected = div > 1 or "embed" in options
    assert set(head.projections) == {str(c) for c in range(1 if tie else len(edges) - 1) if projected}
    for word in (0, 19, 20, 89, 90, 255):
        c = sum(word >= e for e in edges[1:])
        vector = token.tables[0].weight[word] if div == 1 else token.tables[c].weight[word - edges[c]]
        if projected:
            vector = token.projections[c if div > 1 else 0] @ vector
        assert_close(token(torch.tensor([[word]]))[0, 0], 24**0.5 * vector)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    ours = head(x, token)
    naive = torch.stack([log_chances(t, token, head, edges, div) for t in x.flatten(0, 1)]).view(2, 3, 256)
    assert_close(ours.log_softmax(-1), naive)
    if len(edges) > 2:
        assert_close(ours, naive)  # log-probabilities already
    targets = torch.tensor([[0, 19, 20], [89, 90, 255]])
    nll, full = head.nll(x, targets, token), -naive.gather(-1, targets[..., None])[..., 0]
    assert_close(nll, full)
    inputs = [x, *head.parameters(), *token.tables.parameters()]
    found, wanted = (torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
                     for loss in (nll, full))
    assert_close(found, wanted)


@pytest.mark.parametrize("options", ADAPTIVE[:3], ids=str)
def test_a_whole_adaptive_model(options, tmp_path):
    model = built(depth=2, context=128, **options)
    ids = torch.arange(256).view(2, 128)  # every word
    targets = ids.roll(1, 1)
    for chosen, p in model.named_parameters():
        gradient, = torch.autograd.grad(model.nll(ids, targets).sum(), p)
        assert gradient.any(), chosen
    assert_close(model.nll(ids, targets).mean(), F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))
    model = model.float()
    save(model, tmp_path / "m.safetensors")
    assert_close(load(tmp_path / "m.safetensors")(ids), model.eval()(ids))
    exported = torch.export.export(model, (ids,), strict=False).module()
    assert_close(exported(ids), model(ids))


# the authors' answers and names


@torch.no_grad()
def test_golden():
    """Two segments with a memory: the last tokens, and the negative log-likelihood of every next character."""
    state, (ids,), golden = replay(GOLDEN / "transformer_xl__enwik8_base.json.gz")
    model = load(state, "transformer_xl")
    assert count_parameters(model) == golden["parameters"]
    assert model.recipe == {"name": "transformer_xl/enwik8_12l", "changes": {"tie": False}}

    def answers():
        memory, out = model.memory(64), []
        for start in (0, 64):
            x = model.hidden(ids[:, start:start + 64], cache=memory)
            out += [x, model.head.nll(x, ids[:, start + 1:start + 65], model.token)]
        return out

    assert compare(golden, answers()) < 1e-5
    first = model.stack.layers[0]["mixer"].inner
    first.u, first.v = first.v, first.u
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, answers())


LAYER = {"dec_attn.qkv_net.weight", "dec_attn.r_net.weight", "dec_attn.o_net.weight", "dec_attn.layer_norm.weight",
         "dec_attn.layer_norm.bias", "pos_ff.CoreNet.0.weight", "pos_ff.CoreNet.0.bias", "pos_ff.CoreNet.3.weight",
         "pos_ff.CoreNet.3.bias", "pos_ff.layer_norm.weight", "pos_ff.layer_norm.bias"}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["authors", "transformers"])
@pytest.mark.parametrize("options", [
    {}, {"width": 36}, {"tie": False}, *ADAPTIVE, {"cutoffs": (20, 90), "div": 2, "tie": False},
    {"cutoffs": (20, 90), "div": 2, "tie_projections": False}], ids=str)
def test_their_models(layout, options):
    """Small models of their shapes, in their names, are recognised whole; cutoffs alone must be given with one table."""
    shared = layout == "authors"
    model = moved(create_model("transformer_xl/nano", dim=24, heads=3, depth=3, shared=shared, **options)).eval()
    theirs = KEYS[layout].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    body = "" if shared else "transformer."
    names = set(theirs.state)
    assert {n.removeprefix(f"{body}layers.1.") for n in names if ".1." in n and "layers.1." in n and "emb" not in n
            and "crit" not in n} == LAYER | (set() if shared else {"dec_attn.r_w_bias", "dec_attn.r_r_bias"})
    assert ({"r_w_bias", "r_r_bias"} <= names) == shared
    assert f"{body}word_emb.emb_layers.0.weight" in names
    assert "crit.out_layers.0.bias" in names
    if "cutoffs" in options:
        rows = theirs.state["crit.cluster_weight"]
        assert torch.equal(rows.flip(0) if shared else rows, model.head.cluster_weight)
    state = theirs.state | {f"{body}pos_emb.inv_freq": torch.ones(12)}
    if options.get("tie", True):  # files hold tied weights twice
        for i, table in enumerate(model.token.tables):
            state[f"crit.out_layers.{i}.weight"] = table.weight.clone()
    given = {"layout": layout, "context": 128}
    if "cutoffs" in options and "div" not in options:
        with pytest.raises(BadCheckpoint, match=r"crit\.cluster_weight"):
            load(state, "transformer_xl", **given)
        given["cutoffs"] = options["cutoffs"]
    loaded = load(state, "transformer_xl", **given).double()
    ids = model.example(2)
    assert count_parameters(loaded) == count_parameters(model)
    assert_close(loaded(ids), model(ids))


@torch.no_grad()
def test_shared_biases_in_every_layer():
    """transformers' files with one u and v for all layers hold them under every layer's name as well."""
    model = moved(create_model("transformer_xl/nano", dim=24, heads=3, depth=3)).eval()
    state = KEYS["transformers"].convert(model.state_dict(), back=True).state
    for b, value in (("w", model.stack.layers[0]["mixer"].inner.u), ("r", model.stack.layers[0]["mixer"].inner.v)):
        state[f"transformer.r_{b}_bias"] = value.clone()
        for i in range(3):
            state[f"transformer.layers.{i}.dec_attn.r_{b}_bias"] = value.clone()
    loaded = load(state, "transformer_xl", context=128).double()
    assert count_parameters(loaded) == count_parameters(model)
    assert_close(loaded(ids := model.example(2)), model(ids))


@torch.no_grad()
def test_published_vocabularies_tell_the_cutoffs():
    """WikiText-103 in one table (div=1): the vocabulary is known, on the meta device for its size."""
    with torch.device("meta"):
        state = {k: torch.empty_like(v) for k, v in create_model("transformer_xl/wt103_base", depth=1).state_dict().items()}
    told = settings(state, "authors")
    assert told["cutoffs"].value == (20000, 40000, 200000)
    assert (told["div"], told["heads"], round(24 * told["ratio"])) == (1, 10, 123)


def test_sizes_that_the_paper_does_not_give():
    for name, millions in (("wt103_large", 285.2), ("lm1b_base", 357.8), ("lm1b_large", 841.3)):
        with torch.device("meta"):
            assert count_parameters(create_model(f"transformer_xl/{name}")) / 1e6 == pytest.approx(millions, abs=0.1)


# the task


def text(*lengths):
    random = torch.Generator().manual_seed(0)
    splits = {s: torch.randint(256, (n,), generator=random, dtype=torch.uint8)
              for s, n in zip(("train", "val", "test"), lengths, strict=True)}
    return Text(splits, HERE)


@pytest.mark.parametrize("length", [9, 10, 17, 26, 81, 100, 400])
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_streams_hold_each_byte_but_the_first_once(length, rows):
    data = text(20, 20, length).splits["test"].long()
    windows = list(NextByte("made up", text(20, 20, length), context=8).streams("test", rows))
    inputs, targets = (torch.cat([w[i] for w in windows], dim=1) for i in (0, 1))
    assert all(x.shape == y.shape == (len(inputs), 8) for x, y in windows)
    assert len(inputs) <= rows
    assert torch.equal(inputs.flatten()[:length - 1], data[:-1])
    assert torch.equal(targets.flatten()[:length - 1], data[1:])
    assert (targets.flatten()[length - 1:] == -100).all()
    assert (targets >= 0).any(1).all()  # no row is empty


@torch.no_grad()
@pytest.mark.parametrize("mem_len", [None, 0, 3, 40])
def test_evaluation_carries_the_memory(mem_len):
    """As all bytes of a row in one go with a memory of the given length, by hand."""
    task = NextByte("made up", text(20, 20, 100), context=8, mem_len=mem_len)
    model = built().eval()
    found = task.evaluate(model, "test")
    data = task.text.splits["test"].long()
    total = hits = 0.0
    for row in range(0, 99, 16):  # 99 bytes in 10 rows of whole windows: 16 each
        memory = model.memory(mem_len)
        x, y = data[row:min(99, row + 16)], data[row + 1:row + 17]
        chances = torch.cat([model(s[None], cache=memory)[0] for s in x.split(8)]).log_softmax(-1)
        total -= chances[torch.arange(len(y)), y].sum().item()
        hits += (chances.argmax(-1) == y).sum().item()
    assert found["loss"] == pytest.approx(total / 99)
    assert found["accuracy"] == pytest.approx(hits / 99)
    plain = -sum(model(x)[0].log_softmax(-1)[torch.arange(y.shape[1]), y[0]].sum().item()
                 for x, y in task.batches("test", 1)) / 99
    assert (found["loss"] == pytest.approx(plain)) == (mem_len == 0)


class Wrapped(nn.Module):
    """As DistributedDataParallel wraps a model: its methods are out of reach."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_the_loss_of_a_window_with_what_comes_before():
    task = NextByte("made up", text(200, 20, 20), context=8, mem_len=13)
    model = built(mem_len=64).train()
    inputs, targets, before = batch = task.train_batch(0, 0, 4)
    assert before.shape == (4, 13)
    memory = model.memory(13)
    for segment in (before[:, :8], before[:, 8:]):
        model.hidden(segment, cache=memory)  # with gradient: none may pass
    naive = F.cross_entropy(model(inputs, cache=memory).flatten(0, 1), targets.flatten())
    for wrapped in (model, Wrapped(model)):
        assert with_memory(wrapped) is model
        loss = task.loss(wrapped, batch)
        assert_close(loss, naive)
        parameters = list(model.parameters())
        assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(naive, parameters, retain_graph=True))
    alone = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert (loss - alone).abs() > 1e-6
    assert_close(task.loss(model, (inputs, targets)), alone)
    without = NextByte("made up", text(200, 20, 20), context=8, mem_len=0)
    assert_close(without.loss(model, without.train_batch(0, 0, 4)), alone)


def test_mixed_precision_learns_with_a_memory():
    """Weights that were cast without gradient, for the bytes before, must not be used for the window."""
    task, model = NextByte("made up", text(200, 20, 20), context=8), built().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(model, task.train_batch(0, 0, 4))
    gradient, = torch.autograd.grad(loss, model.stack.layers[0]["channel"].inner.fc1.weight)
    assert gradient.any()


def test_a_gpt_is_trained_and_evaluated_as_before():
    task, model = NextByte("made up", text(200, 20, 60), context=8), create_model("gpt/nano", depth=1, context=8)
    assert with_memory(model) is None
    inputs, targets, before = batch = task.train_batch(0, 0, 4)
    assert_close(task.loss(model, batch), F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
    torch.manual_seed(1)
    assert torch.equal(task.train_batch(0, 0, 4)[2], before)
    assert task.evaluate(model, "test", 3) == NextByte("again", task.text, context=8, mem_len=50).evaluate(model, "test", 3)


@pytest.mark.parametrize("mem_len", [-1, 2.5, "8"])
def test_mem_len_is_a_number_of_bytes(mem_len):
    with pytest.raises(DoesNotFit, match="mem_len is a number of bytes"):
        NextByte("made up", text(20, 20, 20), context=8, mem_len=mem_len)


def test_get_task_takes_mem_len(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 40)
    assert get_task(f"text:{tmp_path}/a.txt", context=8, mem_len=24).mem_len == 24
    assert get_task(f"text:{tmp_path}/a.txt", context=8).mem_len is None


def test_a_longer_memory_tells_what_the_window_does_not():
    """Texts of 12 random letters of four, repeated: a window of 8 sees no letter again, so it costs two bits a letter.
    Trained with a memory of 8, the model finds the letters of a whole window one period back; a memory of 16 holds all."""
    random = torch.Generator().manual_seed(0)
    def texts(n):
        return torch.randint(97, 101, (n, 1, 12), generator=random, dtype=torch.uint8).expand(n, 6, 12).flatten()
    data = Text({"train": texts(600), "val": texts(4), "test": texts(40)}, HERE)
    task = NextByte("made up", data, context=8, mem_len=16)
    model = create_model("transformer_xl/nano", dim=32, depth=2, heads=2, context=8, mem_len=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        task.loss(model, task.train_batch(0, step, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    bits = {m: NextByte("made up", data, context=8, mem_len=m).evaluate(model, "test")["bits_per_byte"] for m in (0, 4, 16)}
    assert bits[16] < bits[4] - 0.2 < bits[0] - 0.4
    assert bits[16] < 1
