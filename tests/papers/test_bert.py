"""BERT: its layers and masked words written out, its options, and the names of its files."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.core.build import create_model
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.papers.language.bert import KEYS, MLM
from formarium.skeletons.objective import objective
from formarium.weights.load import load


def moved(name="bert/nano", **options):
    model = create_model(name, **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def by_token(p, ids, segments, mask, depth, heads):
    """Sums and norms in the order of the paper, attention query by query."""
    def norm(x, at):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()
        return x * p[f"{at}.weight"] + p[f"{at}.bias"]

    def dense(x, at):
        return x @ p[f"{at}.weight"].T + p[f"{at}.bias"]

    out = []
    for row, kinds, real in zip(ids, segments, mask, strict=True):
        x = p["token.weight"][row] + p["position.table"][0, :len(row)] + p["segment.weight"][kinds]
        x = norm(x, "embed_norm")
        for i in range(depth):
            at = f"stack.layers.{i}"
            q, k, v = dense(x, f"{at}.mixer.inner.qkv").chunk(3, dim=-1)
            d, rows = q.shape[-1] // heads, []
            for n in range(len(row)):
                parts = []
                for h in range(heads):
                    s = slice(h * d, (h + 1) * d)
                    weights = (k[real][:, s] @ q[n, s] / d**0.5).softmax(0)
                    parts.append(weights @ v[real][:, s])
                rows.append(torch.cat(parts))
            x = norm(x + dense(torch.stack(rows), f"{at}.mixer.inner.proj"), f"{at}.mixer.norm")
            hidden = F.gelu(dense(x, f"{at}.channel.inner.fc1"))
            x = norm(x + dense(hidden, f"{at}.channel.inner.fc2"), f"{at}.channel.norm")
        out.append(x)
    return torch.stack(out)


def test_layers_written_out():
    """Forward and backward, with segments and padding."""
    model = moved(depth=2)
    ids = model.example(2, (9,))
    segments, mask = (torch.arange(9) > 4).long().expand(2, -1), torch.arange(9) < torch.tensor([9, 6])[:, None]
    named = dict(model.named_parameters())
    ours, naive = model(ids, mask=mask, segments=segments), by_token(named, ids, segments, mask, 2, 4)
    assert_close(ours, naive)
    weight = torch.randn_like(ours)
    assert_close(*(torch.autograd.grad((x * weight).sum(), list(named.values())) for x in (ours, naive)))


def test_options():
    """Positions that work on scores, several segments, other parts by name."""
    rotary = moved(position="rotary", segments=3)
    ids = rotary.example(2)
    assert rotary(ids, segments=torch.full_like(ids, 2)).isfinite().all()
    assert not any("position.table" in k for k in rotary.state_dict())
    assert moved(mixer="cosformer")(ids).shape == (*ids.shape, 64)
    with pytest.raises(DoesNotFit, match="5 heads do not divide a width of 64"):
        create_model("bert/nano:heads=5")


@torch.no_grad()
def test_the_sentence_is_the_mean_of_its_tokens():
    model = moved()
    ids, mask = model.example(2, (7,)), torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    tokens = model(ids, mask=mask)
    for i, n in enumerate((7, 3)):
        mean = sum(tokens[i, j] for j in range(n)) / n
        assert_close(model.sentence(ids, mask=mask)[i], mean / mean.norm())


def test_their_names():
    """A small model in the names of the transformers library, old and new, with heads and without, is read whole."""
    model = create_model("bert/nano:dim=128,heads=2,depth=2,context=20").eval()
    theirs = KEYS["transformers"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert {k.removeprefix("encoder.layer.0.") for k in theirs.state if ".layer.1." not in k} == {
        *(f"embeddings.{x}.weight" for x in ("word_embeddings", "position_embeddings", "token_type_embeddings")),
        *(f"{x}.{y}" for y in ("weight", "bias") for x in (
            "embeddings.LayerNorm", "attention.self.query", "attention.self.key", "attention.self.value",
            "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
            "output.LayerNorm"))}
    heads = {"bert.pooler.dense.weight": torch.zeros(2, 2), "cls.predictions.bias": torch.zeros(2),
             "bert.embeddings.position_ids": torch.arange(20)[None]}
    old = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in theirs.state.items()}
    ids = model.example(2)
    for state in (theirs.state, old | heads):
        assert torch.equal(load(state, "bert")(ids), model(ids))
    with pytest.raises(BadCheckpoint, match=r"1 of .* have no place"):
        load(old | {"stray": torch.zeros(1)}, "bert")


# masked words

@pytest.mark.parametrize("host", ["bert/nano:depth=1", "albert/nano:depth=1,embed_dim=24"])
def test_masked_words_written_out(host):
    """Loss and gradients token by token, with padding; the output matrix is the embedding."""
    made = MLM(moved(host), ratio=0.4).double()
    ids, mask = made.model.example(2, (10,)), torch.arange(10) < torch.tensor([10, 5])[:, None]
    torch.manual_seed(3)
    loss, numbers = made((ids, mask))
    torch.manual_seed(3)
    noise, fate, drawn = torch.rand(2, 10), torch.rand(2, 10), torch.randint(256, (2, 10))
    seen, chosen = ids.clone(), []
    for i, real in enumerate((10, 5)):
        for j in sorted(range(real), key=lambda j, i=i: noise[i, j])[:round(0.4 * real)]:
            chosen.append((i, j))
            seen[i, j] = 0 if fate[i, j] < 0.8 else drawn[i, j] if fate[i, j] < 0.9 else ids[i, j]
    p, x, naive, hits = dict(made.named_parameters()), made.model(seen, mask=mask), 0, 0
    for i, j in chosen:
        h = F.gelu(p["dense.weight"] @ x[i, j] + p["dense.bias"])
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-12).sqrt() * p["norm.weight"] + p["norm.bias"]
        logits = p["model.token.weight"] @ h + p["bias"]
        naive, hits = naive - logits.log_softmax(0)[ids[i, j]], hits + (logits.argmax() == ids[i, j])
    assert len(chosen) == 6
    assert_close(loss, naive / 6)
    assert_close(numbers["masked_accuracy"], hits / 6)
    assert_close(*(torch.autograd.grad(t, list(p.values())) for t in (loss, naive / 6)))


def test_what_becomes_of_words():
    """15 % of every row, one at least; of those 80 % hidden, 10 % any token, 10 % left; never padding."""
    made = MLM(create_model("bert/nano"))
    mask = torch.arange(100) < torch.tensor([100, 40, 1])[:, None]
    assert made.choose(torch.rand(3, 100), mask).sum(1).tolist() == [15, 6, 1]
    assert not made.choose(torch.rand(3, 100), mask)[~mask].any()
    ids, fate = torch.full((1, 1000), 7), torch.arange(1000.0)[None] / 1000
    chosen = torch.arange(1000)[None] % 2 == 0
    given = made.disguise(ids, chosen, fate, torch.full_like(ids, 9))
    assert (given[~chosen] == 7).all()
    assert [(given[chosen] == token).sum().item() for token in (0, 9, 7)] == [400, 50, 50]
    assert MLM(create_model("bert/nano:vocab=300"), mask_id=103).disguise(ids, ids > 0, fate, ids)[0, 0] == 103


@pytest.mark.parametrize("host", ["bert/nano", "albert/nano", "minilm/nano"])
def test_it_learns_and_leaves_the_encoder(tmp_path, host):
    """By name, on text, with checkpointing too; a file of the encoder alone, which other objectives take."""
    host = f"{host}:dim=16,depth=2,heads=2"
    found = fm.pretrain(host, "bert(ratio=0.3)", "shakespeare", out=tmp_path / "pre", steps=3, batch_size=4, evaluations=1)
    assert {"loss", "masked_accuracy"} <= found["val"].keys()
    encoder = fm.load(found["encoder"])
    assert type(encoder) is type(create_model(host))
    made, losses = objective("bert")(encoder).train(), []
    ids = torch.arange(64).repeat(8, 1)
    for checkpointing in (False, True):
        made.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        losses.append(made(ids)[0])
    assert_close(*(torch.autograd.grad(loss, list(made.parameters())) for loss in losses))
    optimizer = torch.optim.AdamW(made.parameter_groups(0.05), lr=1e-2)
    for _ in range(20):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = made(ids)[0]
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * losses[0]


def test_what_masked_words_cannot_take():
    for host, options, why in (("gpt/nano", {}, "text encoder such as bert/nano; GPT is none"),
                               ("bert/nano", {"ratio": 0.0}, "got ratio=0.0"),
                               ("bert/nano", {"hidden": 0.95}, "hidden=0.95, other=0.1"),
                               ("bert/nano", {"mask_id": 256}, "mask_id=256 is none of 256 tokens"),
                               ("bert/nano:vocab=257", {}, "257 tokens are more than bytes")):
        with pytest.raises(DoesNotFit, match=why):
            MLM(create_model(host), **options)
