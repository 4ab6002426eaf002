"""BERT: its layers written out, its options, and the names of its files."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.papers.language.bert import KEYS
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
