"""Zero-TPrune: its stages token by token; planted graphs; pruning as masking; schedules and what they cost."""

import math

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.macs import count_macs
from formarium.core.transform import apply
from formarium.papers.transforms.zero_tprune import CHOICES, GRAPH, SCHEDULES, Pruning


def pruning(keep=0.6, similar=0.2, iterations=4, variance=(0.01, 0.7), uniform=False):
    return Pruning(keep, similar, iterations, variance, uniform)


def graphs(b=3, h=4, n=11, d=5, sharp=2.0):
    return (sharp * torch.randn(b, h, n, n, dtype=torch.float64)).softmax(-1), torch.randn(b, h, n, d, dtype=torch.float64)


# one sample, one token, one head at a time

def page_rank(graph, tokens, prefix, votes, variance, uniform):
    """graph[h][i][j] among `tokens` (the first `prefix` are class tokens) -> the score of each token."""
    heads = []
    for a in graph:
        rows = {i: {j: a[i][j] / sum(a[i][k] for k in tokens) for j in tokens} for i in tokens}
        scores = {t: math.sqrt(len(tokens)) if t < prefix and not uniform else 1.0 for t in tokens}
        mean = sum(scores.values()) / len(tokens)
        scores = {t: s / mean for t, s in scores.items()}
        for _ in range(votes):
            scores = {j: sum(scores[i] * rows[i][j] for i in tokens) for j in tokens}
        patches = {t: s for t, s in scores.items() if t >= prefix}
        mean = sum(patches.values()) / len(patches)
        spread = sum((s / mean - 1)**2 for s in patches.values()) / len(patches)
        heads.append((variance[0] <= spread <= variance[1], patches))
    counting = [p for fits, p in heads if fits] or [p for _, p in heads]
    return {t: math.sqrt(sum(p[t]**2 for p in counting) / len(counting)) for t in counting[0]}


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * len(a)) / math.dist(b, [0] * len(b))


def by_hand(p, attention, keys, prefix):
    out = []
    for graph, key in zip(attention.tolist(), keys.transpose(1, 2).flatten(2).tolist(), strict=True):
        every = list(range(len(key)))
        patches = every[prefix:]
        dropped = min(len(patches) // 2, int(p.similar if p.similar >= 1 else p.similar * len(patches)))
        if dropped:
            first = page_rank(graph, every, prefix, 1, p.variance, p.uniform)
            order = sorted(patches, key=lambda t: -first[t])
            worse, better = order[len(order) - len(order) // 2:], order[:len(order) - len(order) // 2]
            likeness = {t: max(cosine(key[t], key[other]) for other in better) for t in worse}
            gone = sorted(worse, key=lambda t: -likeness[t])[:dropped]
            patches = [t for t in patches if t not in gone]
        kept = max(1, round(p.keep * len(patches)))
        if kept < len(patches):
            last = page_rank(graph, every[:prefix] + patches, prefix, p.iterations, p.variance, p.uniform)
            patches = sorted(sorted(patches, key=lambda t: -last[t])[:kept])
        out.append([t - prefix for t in patches])
    return torch.tensor(out)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("options", [
    {}, {"keep": 1.0}, {"similar": 0}, {"similar": 3, "keep": 0.9}, {"uniform": True, "iterations": 1},
    {"variance": (0.2, 0.6)}, {"variance": (5.0, 6.0)}, {"similar": 100, "keep": 1e-9}, {"iterations": 30}])
def test_stages_by_hand(prefix, options):
    p, (attention, keys) = pruning(**options), graphs()
    chosen = p.choose(attention, keys, prefix)
    assert torch.equal(chosen, by_hand(p, attention, keys, prefix))
    assert chosen.shape == (3, p.counts(11 - prefix)[1])


def test_variance_decides_which_heads_count():
    """One head votes evenly, one for a single token, one between: only the last is within the bounds."""
    n, likes = 20, torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    even, single = torch.full((n, n), 1 / n, dtype=torch.float64), torch.full((n, n), 1e-3, dtype=torch.float64)
    single[:, 7] = 1
    between = likes.expand(n, n)
    graph = torch.stack([t / t.sum(-1, keepdim=True) for t in (even, single, between)])[None]
    assert_close(pruning().importance(graph, 0, 3)[0], likes)
    assert pruning(variance=(0, 100)).importance(graph, 0, 3)[0].argmax() == 7


def test_important_tokens_stay():
    """Tokens that the others attend to; many votes find those whom important tokens attend to, one vote does not."""
    n = 30
    graph = torch.full((1, 1, n, n), 0.01, dtype=torch.float64)
    graph[..., [4, 17, 22]] = 1.0
    _, keys = graphs(1, 1, n)
    kept = pruning(keep=0.1, similar=0, variance=(0, 1e9)).choose(graph / graph.sum(-1, keepdim=True), keys, 0)
    assert kept.tolist() == [[4, 17, 22]]
    graph = torch.full((1, 1, n, n), 0.01, dtype=torch.float64)
    graph[..., 4] = 1.0  # all attend to 4, which attends to 9; a few attend to 12
    graph[..., 4, :] = 0.01
    graph[..., 4, 9] = 5.0
    graph[..., 13:18, 12] = 2.0
    graph = graph / graph.sum(-1, keepdim=True)
    once, often = (pruning(variance=(0, 1e9)).importance(graph, 0, votes)[0] for votes in (1, 30))
    assert once[12] > once[9]
    assert often[9] > often[12]


def test_likeness_is_dropped():
    """Of tokens with the same key the less important goes, the more important stays."""
    n = 12
    graph = torch.linspace(1, 2, n, dtype=torch.float64).expand(1, 2, n, n)
    keys = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n).clone()
    keys[..., [0, 3], :] = 3 * keys[..., [9, 10], :]
    kept = pruning(keep=1.0, similar=2).choose(graph / graph.sum(-1, keepdim=True), keys, 0)
    assert sorted(set(range(n)) - set(kept[0].tolist())) == [0, 3]


def test_class_token_has_more_votes():
    """At one vote its favourite wins, unless all start alike."""
    n = 26
    graph = torch.full((1, 1, n, n), 1.0, dtype=torch.float64)
    graph[..., 0, 5] = 20
    graph[..., 1:5, 9] = 5
    graph = graph / graph.sum(-1, keepdim=True)
    for uniform, best in ((False, 5), (True, 9)):
        assert pruning(uniform=uniform, variance=(0, 1e9)).importance(graph, 1, 1)[0].argmax() == best - 1


# in models

def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def masked(model, chosen, batch):
    """The whole model with all its tokens, those pruned hidden from the others: what is left of it, and the answer."""
    x, ctx = model.embed(batch)
    b, n, p = len(x), x.shape[1], ctx.prefix
    places = torch.arange(n).expand(b, n)
    seen = torch.ones(b, n, dtype=torch.bool)
    for i, layer in enumerate(model.stages[0].layers, start=1):
        for sub in layer.values():
            x = sub(x, Ctx(prefix=p, mask=seen[:, None, None]))
        if i in chosen:
            kept = torch.cat((places[:, :p], places[:, p:].gather(1, chosen[i])), dim=1)
            seen = torch.zeros_like(seen).scatter(1, kept, True)
            places = kept
    x = model.norm(x[seen].unflatten(0, (b, -1)))
    return model.head(x[:, 0] if p else x.mean(1))


@pytest.mark.parametrize("name", ["vit/nano", "vit/nano:pool=mean", "vit/nano:position=rotary", "vit/nano:channel=swiglu"])
def test_pruning_is_masking(name):
    """Answers and gradients are those of a model from whose later layers the pruned tokens are hidden."""
    host = moved(create_model(name))
    model, chosen = apply(host, "zero_tprune(keep=0.8)"), {}
    for i, stage in enumerate(list(model.stages)[1:], start=1):
        def choose(*args, stage=stage, i=i, whole=stage.resample.choose):
            chosen[i] = whole(*args)
            return chosen[i]
        stage.resample.choose = choose
    batch = model.example(3).double()
    ours = model(batch)
    naive = masked(host, chosen, batch)
    assert [c.shape[1] for c in chosen.values()] == [38, 30, 23]
    assert_close(ours, naive)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * weight).sum(), list(m.parameters())) for out, m in ((ours, model), (naive, host))]
    assert_close(*grads)


@torch.no_grad()
def test_context():
    """Nothing pruned: the grid stays. Pruned: no grid, places in order, the class token first; no feature maps."""
    model = apply(create_model("vit/nano"), "zero_tprune(layers=(2,),keep=0.5,similar=0)").eval()
    batch = model.example(2)
    x, ctx = model.encode(*model.embed(batch))
    assert (x.shape[1], ctx.grid, ctx.prefix) == (1 + 24, None, 1)
    assert (ctx.coords[:, 0] == 0).all()
    assert (ctx.coords.diff(dim=1) > 0).all()
    with pytest.raises(DoesNotFit, match="full grid; these are a sequence, or were dropped"):
        model.features(batch)
    same = apply(create_model("vit/nano"), "zero_tprune(keep=1.0,similar=0)").eval()
    _, ctx = same.encode(*same.embed(batch))
    assert (ctx.grid, ctx.coords) == ((7, 7), None)


@torch.no_grad()
def test_leaves_the_fused_kernel_only_where_it_prunes(monkeypatch):
    calls = []
    from formarium.parts import attention

    fused = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model = apply(create_model("vit/nano:depth=6"), "zero_tprune(layers=(2,4))").eval()
    model(model.example(1))
    assert len(calls) == 4


@torch.no_grad()
def test_in_training_and_checkpointing():
    model = apply(create_model("vit/nano"), "zero_tprune(keep=0.7)")
    batch = model.example(2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        with torch.enable_grad():
            grads.append(torch.autograd.grad(model.train()(batch).square().sum(), list(model.parameters())))
    assert_close(*grads)


@torch.no_grad()
def test_exports():
    model = apply(create_model("vit/nano"), "zero_tprune(keep=0.7)").eval()
    batch = model.example(2)
    assert_close(torch.export.export(model, (batch,), strict=False).module()(batch), model(batch))


def test_another_configuration():
    """Pruned again, a model is as if pruned so at first; in place too, and back to none."""
    host = create_model("vit/nano:depth=6").eval()
    batch = host.example(2)
    fresh = apply(host, "zero_tprune(layers=(2,5),keep=(0.5,0.9),similar=4)")
    model = apply(host, "zero_tprune(keep=0.7)")
    again = apply(model, "zero_tprune(layers=(2,5),keep=(0.5,0.9),similar=4)", copy=False)
    assert again is model
    assert torch.equal(again(batch), fresh(batch))
    assert [s.depth for s in again.stages] == [2, 3, 1]
    assert list(again.state_dict()) == list(fresh.state_dict())
    before = model(batch)
    with pytest.raises(DoesNotFit, match=r"keep is in \(0, 1\]"):
        apply(model, "zero_tprune(keep=2.0)", copy=False)
    assert torch.equal(model(batch), before)


def test_published_cost():
    """DeiT-S at 3.08 of 4.55 GFLOPs; the votes and likenesses are counted too. 5 pruning layers, 66 patches left."""
    with torch.device("meta"):
        model = create_model("vit/small")
        pruned = apply(model, "zero_tprune", **SCHEDULES["deit_s_3g"])
        batch = model.example(1)
        assert pruned.forward_features(batch).shape[1] == 1 + 66
    assert count_macs(model, batch) == pytest.approx(4.55e9, rel=0.02)
    assert count_macs(pruned, batch) == pytest.approx(3.08e9, rel=0.03)
    assert [s.resample.iterations for s in list(pruned.stages)[1:]] == [30, 30, 5, 5, 1]


def test_depths():
    """Where layers 1, 3, 6, 9 and 11 of 12 stand in nets of other depths."""
    for depth, layers in ((2, [1]), (4, [1, 2, 3]), (12, [1, 3, 6, 9, 11]), (24, [2, 6, 12, 18, 22])):
        model = apply(create_model("vit/nano", depth=depth), "zero_tprune")
        ends = [sum(s.depth for s in list(model.stages)[:i]) for i in range(1, len(model.stages))]
        assert ends == layers
        assert sum(s.depth for s in model.stages) == depth


@pytest.mark.parametrize("name", ["swin/nano", "poolformer/nano", "gpt/nano", "vit/nano:residual=denseformer",
                                  "vit/nano:mixer=attention(window=3)", "vit/nano:mixer=cosformer", "hvt/nano"])
def test_does_not_fit(name):
    with pytest.raises(DoesNotFit, match=r"finds nothing to change in this .*: it looks for a plain ViT"):
        apply(create_model(name), "zero_tprune")


@pytest.mark.parametrize(("settings", "why"), [
    ({"layers": (0, 2)}, "increasing numbers from 1 to 3, those after which tokens are pruned, got"),
    ({"layers": (2, 1)}, "increasing numbers"), ({"layers": (4,)}, "increasing numbers"), ({"layers": ()}, "one or more"),
    ({"keep": (0.5, 0.5)}, r"one for each of the layers \(1, 2, 3\)"), ({"keep": 0.0}, r"keep is in \(0, 1\]"),
    ({"similar": -1}, "similar 0 or more"), ({"iterations": (1, 1)}, "three numbers from 1 on"),
])
def test_wrong_settings(settings, why):
    with pytest.raises(DoesNotFit, match=why):
        apply(create_model("vit/nano"), "zero_tprune", **settings)


def test_graph_is_of_the_layer_before():
    """What a pruning reads is the attention of the last layer before it, rows summing to one, keys of all heads."""
    model = apply(create_model("vit/nano"), "zero_tprune(layers=(2,))").eval()
    seen = []
    model.stages[1].resample.register_forward_pre_hook(lambda m, args: seen.append(args[1].shared[GRAPH]))
    model(model.example(2))
    (attention, keys), = seen
    assert (attention.shape, keys.shape) == ((2, 4, 50, 50), (2, 4, 50, 16))
    assert_close(attention.sum(-1), torch.ones(2, 4, 50))


@torch.no_grad()
def test_other_choices_keep_as_many_tokens():
    """Votes alone: stage I of all tokens. Class: what it attends to most. Random: another choice in each call."""
    attention, keys = graphs(n=12)
    made = {name: kind(0.5, 0.2, 4, (0.01, 0.7), False) for name, kind in CHOICES.items()}
    chosen = {name: one.choose(attention, keys, 1) for name, one in made.items()}
    for kept in chosen.values():
        assert kept.shape == chosen["graph"].shape == (3, 4)
        assert (kept.diff(dim=1) > 0).all()
    scores = {"votes": made["graph"].importance(attention, 1, 4), "class": attention[:, :, 0, 1:].mean(1)}
    for name, score in scores.items():
        left_out = score.scatter(1, chosen[name], -1.0)
        assert (score.gather(1, chosen[name]).amin(1) > left_out.amax(1)).all()
    assert any(not torch.equal(made["random"].choose(attention, keys, 1), chosen["random"]) for _ in range(5))
    alone = Pruning(1.0, 5, 4, (0.01, 0.7), False).choose(attention, keys, 1)
    assert_close(CHOICES["likeness"](1.0, 5, 4, (0.01, 0.7), False).choose(attention, keys, 1), alone)


@torch.no_grad()
def test_other_choices_by_name():
    for by in CHOICES:
        model = apply(create_model("vit/nano"), f"zero_tprune(keep=0.7,by={by})").eval()
        x, _ = model.encode(*model.embed(model.example(2)))
        assert x.shape[1] == 1 + 15
    with pytest.raises(UnknownName, match="random"):
        apply(create_model("vit/nano"), "zero_tprune(by=randon)")
    model = apply(create_model("vit/nano:pool=mean"), "zero_tprune(by=class)").eval()
    with pytest.raises(DoesNotFit, match="no class token"):
        model(model.example(1))
