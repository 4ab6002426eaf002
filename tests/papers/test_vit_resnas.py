"""ViT-ResNAS: networks as tuples, masks against the sub-networks cut out, the search, the authors' answers and names."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.papers.backbones.vit_resnas import (
    KEYS,
    PRESETS,
    TINY,
    MaskedLayerNorm,
    ResidualReduction,
    Space,
    check_network,
    macs,
    search,
)
from formarium.parts.embed import to_map, to_tokens
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def supernet(**changes):
    """With linear patches unless asked: batch norms would see the whole batch."""
    made = PRESETS["super_nano"]
    network = ((0, 32), *made["network"][1:])
    torch.manual_seed(0)
    return moved(create_model("vit_resnas/super_nano", **{"network": network, "patch": 4, "examples": 2} | changes))


# the reduction


def test_reduction_written_out():
    part = moved(ResidualReduction(6, 10, grid=(4, 6)))
    x = torch.randn(2, 25, 6, dtype=torch.float64, requires_grad=True)
    out, ctx = part(x, Ctx(grid=(4, 6), prefix=1))
    assert (ctx.grid, ctx.prefix, out.shape) == ((2, 3), 1, (2, 7, 10))
    y = F.layer_norm(x, (6,), part.norm.weight, part.norm.bias, 1e-6)
    cell = to_map(x, (4, 6), 1).unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    skip = torch.cat((x[:, :1], to_tokens(cell)), 1)
    new = torch.cat((part.token(y[:, :1]), to_tokens(part.conv(to_map(y, (4, 6), 1))) + part.position.table), 1)
    whole = torch.cat((new[..., :6] + skip, new[..., 6:]), 2)
    assert_close(out, whole)
    g = torch.randn_like(out)
    inputs = [x, *part.parameters()]
    assert_close(torch.autograd.grad((out * g).sum(), inputs), torch.autograd.grad((whole * g).sum(), inputs))
    part.skip = False
    assert_close(part(x, Ctx(grid=(4, 6), prefix=1))[0], new)


# networks


@pytest.mark.parametrize("img_size", [28, (28, 42), 22])
@pytest.mark.parametrize("kind", [0, 4, 5])
def test_macs_without_building(img_size, kind):
    embed = {0: (0, 32), 4: (4, 32), 5: (5, 32, 8)}[kind]
    network = (embed, *PRESETS["nano"]["network"][1:])
    with torch.device("meta"):
        model = create_model("vit_resnas/nano", network=network, img_size=img_size, num_classes=10)
    assert macs(network, img_size=img_size, patch=2, num_classes=10) == count_macs(model, model.example())


@torch.no_grad()
def test_a_block_that_does_not_exist_keeps_its_number():
    network = list(PRESETS["nano"]["network"])
    network[1] = (*network[1][:3], 0)
    model = create_model("vit_resnas/nano", network=tuple(network)).eval()
    names = {k.split(".")[1] for k in model.state_dict() if k.startswith("stages.")}
    assert names == {"1", "2", "3", "4"}
    theirs = KEYS["authors"].convert(model.state_dict(), back=True).state
    again, x = load(theirs, "vit_resnas"), model.example(2)
    assert again.network[1][3] == 0
    assert again(x).shape == (2, 1000)
    assert macs(tuple(network), img_size=28, patch=2) < macs(PRESETS["nano"]["network"], img_size=28, patch=2)


@pytest.mark.parametrize(("network", "why"), [
    (((4, 8),), "an embedding, blocks and a classifier"),
    (((1, 8), (1, (8, 1, 8), (8, 8), 1), (2, 8, 3)), "entry 0.*comes first"),
    (((5, 8), (1, (8, 1, 8), (8, 8), 1), (2, 8, 3)), "entry 0"),
    (((4, 8), (1, (9, 1, 8), (9, 8), 1), (2, 8, 3)), "entry 1.*the width before it is 8"),
    (((4, 8), (1, (8, 0, 8), (8, 8), 1), (2, 8, 3)), "entry 1.*1 or more"),
    (((4, 8), (3, 8, 6), (2, 6, 3)), "entry 1.*must not fall"),
    (((4, 8), (7, 8, 6), (2, 6, 3)), "entry 1.*expected a block"),
    (((4, 8), (3, 8, 16), (2, 8, 3)), r"entry 2.*\(2, 16, classes\)"),
])
def test_wrong_networks(network, why):
    with pytest.raises(DoesNotFit, match=why):
        check_network(network)


def test_patches_of_odd_size():
    with pytest.raises(DoesNotFit, match="even side, not 7"):
        create_model("vit_resnas/nano", patch=7)


# the supernet


def test_masked_norm_is_the_norm_of_what_is_kept():
    norm = moved(MaskedLayerNorm(6))
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([2, 6, 5])
    norm.mask = (torch.arange(6) < kept[:, None])[:, None]
    out, g = norm(x * norm.mask), torch.randn(3, 4, 6, dtype=torch.float64)
    rows = [F.layer_norm(r[:, :k], (k,), norm.weight[:k], norm.bias[:k], 1e-6) for r, k in zip(x, kept, strict=True)]
    whole = torch.stack([F.pad(r, (0, 6 - r.shape[1])) for r in rows])
    assert_close(out, whole)
    assert_close(torch.autograd.grad((out * g).sum(), x), torch.autograd.grad((whole * g).sum(), x))


@pytest.mark.parametrize("conv", [False, True])
def test_one_step_is_the_mean_of_the_sub_networks_steps(conv):
    """Answers are those of the networks cut out, gradients the mean of theirs, put back in their places."""
    net = supernet(network=PRESETS["super_nano"]["network"], patch=2) if conv else supernet()
    net.train(not conv)  # with convolutions the batch norms have fixed statistics
    x, labels = torch.randn(6, 3, 28, 28, dtype=torch.float64), torch.randint(10, (6,))
    networks = [net.sample() for _ in range(3)]
    assert len(set(networks)) == 3
    net.zero_grad()
    out = net(x, networks)
    F.cross_entropy(out, labels).backward()
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for i, network in enumerate(networks):
        alone = net.extract(network).double()
        part = slice(2 * i, 2 * i + 2)
        answers = alone(x[part])
        assert_close(answers, out[part])
        F.cross_entropy(answers, labels[part]).backward()
        for name, p in alone.named_parameters():
            whole = total[name].chunk(3) if ".qkv." in name else [total[name]]
            for into, grad in zip(whole, p.grad.chunk(len(whole)), strict=True):
                into[tuple(slice(n) for n in grad.shape)] += grad / 3
    for name, p in net.named_parameters():
        assert_close(torch.zeros_like(p) if p.grad is None else p.grad, total[name], msg=name)


def test_training_draws_and_evaluation_does_not():
    net, x = supernet(), torch.randn(4, 3, 28, 28, dtype=torch.float64)
    net.train()
    torch.manual_seed(1)
    first = [net.sample(), net.sample()]
    torch.manual_seed(1)
    assert_close(net(x), net(x, first))
    net.eval()
    with torch.no_grad():
        assert_close(net(x), net.extract(net.network).double()(x))
    with pytest.raises(DoesNotFit, match=r"groups of 2 samples \(examples=\), got 3"):
        net.train()(x[:3])
    with pytest.raises(DoesNotFit, match="4 samples do not fall into 3 equal groups"):
        net(x, [net.network] * 3)


def test_gradient_checkpointing_keeps_the_masks():
    net, x = supernet(), torch.randn(4, 3, 28, 28, dtype=torch.float64)
    grads = []
    for again in (False, True):
        net.train().set_grad_checkpointing(again)
        net.zero_grad()
        torch.manual_seed(2)
        net(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert_close(*grads)


def test_warm_up():
    net = supernet()
    net.admit(0.0)
    assert {net.sample() for _ in range(5)} == {net.network}
    net.admit(0.5)
    drawn = {net.sample() for _ in range(100)}
    assert {n[0][1] for n in drawn} == {32, 24}
    assert {n[1][2][1] for n in drawn} == {128, 96}
    with pytest.raises(DoesNotFit, match=r"in \[0, 1\]"):
        net.admit(2)


@torch.no_grad()
def test_rewiring_sorts_and_keeps_the_function():
    net, x = supernet().eval(), torch.randn(2, 3, 28, 28, dtype=torch.float64)
    before = net(x)
    net.rewire()
    assert_close(net(x), before)
    hidden = net.stages[0].layers[0]["channel"].inner
    size = hidden.fc1.weight.abs().sum(1) + hidden.fc1.bias.abs() + hidden.fc2.weight.abs().sum(0)
    assert torch.equal(size, size.sort(descending=True).values)


def test_spaces_that_do_not_fit():
    choices = PRESETS["super_nano"]["choices"]
    with pytest.raises(DoesNotFit, match="choices for each of 7 entries, got 6"):
        supernet(choices=choices[:-1])
    with pytest.raises(DoesNotFit, match="largest value of gene 0"):
        supernet(choices=((24, 16), *choices[1:]))


# the search


def test_search_finds_the_best_within_the_limit():
    """A knapsack whose best is known by trying all."""
    rng = random.Random(3)
    worth, weight = [rng.random() for _ in range(10)], [rng.randint(1, 9) for _ in range(10)]
    space = [(0, 1)] * 10

    def score(g):
        return sum(w for w, take in zip(worth, g, strict=True) if take)

    def cost(g):
        return sum(w for w, take in zip(weight, g, strict=True) if take)

    every = [tuple(n >> i & 1 for i in range(10)) for n in range(1024)]
    best = max((g for g in every if cost(g) <= 20), key=score)
    found = search(space, score, [(cost, 20)], population=20, generations=12, parents=10, children=10, seed=1)
    assert found[0].genome == best
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    assert all(f.costs == (cost(f.genome),) and cost(f.genome) <= 20 for f in found)
    assert len({f.genome for f in found}) == len(found) <= 20 + 11 * 20
    again = search(space, score, [(cost, 20)], population=20, generations=12, parents=10, children=10, seed=1)
    assert again == found
    used = search(space, score, [(cost, 20)], population=5, generations=1, at_least=0.9)
    assert len(used) == 5
    assert all(18 <= f.costs[0] <= 20 for f in used)


def test_search_under_several_limits():
    found = search([(1, 2, 3)] * 3, sum, [(sum, 7), (max, 2)], population=50, generations=1, tries=500)
    assert found[0].genome == (2, 2, 2)
    assert len(found) == 8  # all of the space that fits
    with pytest.raises(DoesNotFit, match=r"none of 27 candidates.*the cheapest costs \(3,\)"):
        search([(1, 2, 3)] * 3, sum, [(sum, 2)], population=5, generations=1, tries=2000)
    for options, why in [({"population": 0}, "1 or more"), ({"mutate": 0.0}, "mutate in")]:
        with pytest.raises(DoesNotFit, match=why):
            search([(1, 2)], sum, **options)
    with pytest.raises(DoesNotFit, match="one gene or more"):
        search([], sum)


@torch.no_grad()
def test_search_in_a_supernet():
    """The whole way: sub-networks within a limit of MACs, scored with the supernet's weights."""
    net, x = supernet().float().eval(), torch.randn(4, 3, 28, 28)
    limit = 0.7 * macs(net.network, img_size=28, patch=4)

    def cost(genome):
        return macs(net.space.network(genome), img_size=28, patch=4)

    found = search(net.space.genes, lambda g: float(net(x, [net.space.network(g)]).std()), [(cost, limit)],
                   population=6, generations=2, parents=3, children=2, at_least=0.5)
    model = net.extract(net.space.network(found[0].genome))
    assert 0.5 * limit <= count_macs(model, x[:1]) == found[0].costs[0] <= limit
    assert float(model.eval()(x).std()) == pytest.approx(found[0].score, rel=1e-4)


def test_the_published_are_in_the_published_spaces():
    space = Space(PRESETS["super_tiny"]["network"], PRESETS["super_tiny"]["choices"])
    blocks = [e for e in TINY if e[0] == 1]
    genome, taken = [], iter(blocks)
    for i, entry in enumerate(space.largest[:-1]):
        if entry[0] != 1:
            genome.append({0: 176, 7: 352, 14: 704}[i])
        elif i in (6, 20):  # blocks that tiny has not
            genome += [entry[1][1], entry[2][1], 0]
        else:
            block = next(taken)
            genome += [block[1][1], block[2][1], 1]
    assert all(v in values for v, values in zip(genome, space.genes, strict=True))
    assert [e for e in space.network(tuple(genome)) if e[0] != 1 or e[3]] == list(TINY)


# the authors' answers and names


@torch.no_grad()
def test_golden():
    state, (x,), golden = replay(GOLDEN / "vit_resnas__vit_resnas_tiny.json.gz")
    model, report = load(state, report=True)
    assert model.recipe == {"name": "vit_resnas/tiny", "changes": {}}
    assert {n for r in report.rows if r.kind == "ignored" for n in r.theirs} == {"patch_head.weight", "patch_head.bias"}
    assert compare(golden, model(x)) < 3e-5
    model.stages[5].resample.skip = False
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, model(x))
