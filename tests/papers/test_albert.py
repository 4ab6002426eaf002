"""ALBERT: shared layers, the names of its files, and real weights: RXNMapper's, which map the atoms of reactions."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.core.model import count_parameters
from formarium.papers.language.albert import KEYS
from formarium.parts.attention import watching
from formarium.weights.load import load


def moved(name="albert/nano", **options):
    model = create_model(name, **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_shared_layers_are_equal_layers():
    """Six layers in two groups answer as six of their own with equal weights, whose gradients add up."""
    shared, alone = moved(depth=6, groups=2), moved(depth=6, groups=6)
    state = shared.state_dict()
    alone.load_state_dict({k: state[k if k in state and "layers" not in k else
                                    k.replace(f"layers.{k.split('.')[2]}", f"layers.{int(k.split('.')[2]) // 3}")]
                           for k in alone.state_dict()})
    ids = shared.example(2)
    ours, theirs = shared(ids), alone(ids)
    assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for out in (ours, theirs):
        (out * weight).sum().backward()
    grads = {k: p.grad for k, p in alone.named_parameters()}
    for k, p in shared.named_parameters():
        if k.startswith("stack.layers"):
            _, _, group, rest = k.split(".", 3)
            assert_close(p.grad, sum(grads[f"stack.layers.{i}.{rest}"] for i in range(6) if i // 3 == int(group)))
        else:
            assert_close(p.grad, grads[k])


def test_sizes():
    """Depth costs nothing, groups do; the embedding costs V E + E H."""
    def sizes(**options):
        return count_parameters(create_model("albert/nano", **options))

    assert sizes(depth=12) == sizes()
    layer = sizes(depth=12, groups=2) - sizes()
    assert sizes(depth=12, groups=12) - sizes() == 11 * layer
    assert sizes(vocab=257) - sizes() == 32
    for groups in (0, 5):
        with pytest.raises(DoesNotFit, match=f"4 layers fall into 1 to 4 groups, not {groups}"):
            create_model("albert/nano", groups=groups)


@torch.no_grad()
def test_their_names():
    """A small model in the names of the transformers library, with heads and without, is read whole."""
    model = create_model("albert/nano:groups=2,context=20").eval()
    theirs = KEYS["transformers"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    heads = {"albert.pooler.weight": torch.zeros(2, 2), "predictions.bias": torch.zeros(2),
             "sop_classifier.classifier.weight": torch.zeros(2, 2),
             "albert.embeddings.position_ids": torch.arange(20)[None]}
    ids = model.example(2)
    for state in (theirs.state, {f"albert.{k}": v for k, v in theirs.state.items()} | heads):
        assert torch.equal(load(state, "albert")(ids), model(ids))
    inner = {k.replace("albert_layers.0", "albert_layers.1"): v for k, v in theirs.state.items()}
    with pytest.raises(BadCheckpoint, match="have no place"):
        load(theirs.state | inner, "albert")


# real weights: the package rxnmapper

FOLDER = Path(importlib.util.find_spec("rxnmapper").submodule_search_locations[0],
              "models", "transformers", "albert_heads_8_uspto_all_1310k")
LAYER, HEAD = 10, 5  # whose attention RXNMapper reads
REACTION = "CC(=O)O.OCCN>>CC(=O)OCCN"  # an ester of acetic acid


@pytest.fixture(scope="module")
def read():
    """Ids (2, N) and mask of the reaction and of its products alone, padded; its characters with the two around them."""
    vocab = {token: i for i, token in enumerate((FOLDER / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
    first, products = REACTION.split(">>")
    tokens = ["[CLS]", *first, ">>", *products, "[SEP]"]
    ids = torch.full((2, len(tokens)), vocab["[PAD]"])
    ids[0] = torch.tensor([vocab[t] for t in tokens])
    short = ["[CLS]", *products, "[SEP]"]
    ids[1, :len(short)] = torch.tensor([vocab[t] for t in short])
    return ids, torch.arange(len(tokens)) < torch.tensor([[len(tokens)], [len(short)]]), tokens


@torch.no_grad()
def test_rxnmapper(read):
    """Tokens and the attention of all heads in all layers, as in the transformers library."""
    ids, mask, _ = read
    theirs = transformers.AlbertModel.from_pretrained(FOLDER, attn_implementation="eager").eval()
    told = theirs(input_ids=ids, attention_mask=mask.long(), output_attentions=True)
    model = load(FOLDER / "pytorch_model.bin")
    assert model.recipe == {"name": "albert/rxnmapper", "changes": {}}
    with watching(model.stack.layers[0].mixer.inner) as seen:
        out = model(ids, mask=mask)
    assert len(seen) == len(told.attentions) == 12
    assert_close(out[mask], told.last_hidden_state[mask], atol=1e-4, rtol=0)
    for ours, attention in zip(seen, told.attentions, strict=True):
        assert_close(ours.log_probabilities().exp(), attention, atol=1e-4, rtol=0)
    other = load(FOLDER / "pytorch_model.bin", "albert", heads=4)
    assert (other(ids, mask=mask)[mask] - told.last_hidden_state[mask]).abs().max() > 0.1


@torch.no_grad()
def test_atoms_are_mapped(read):
    """What the weights are for: pairs of atoms, the surest first, are those that a chemist would name."""
    ids, mask, tokens = read
    model = load(FOLDER / "pytorch_model.bin")
    with watching(model.stack.layers[0].mixer.inner) as seen:
        model(ids[:1], mask=mask[:1])
    attention = seen[LAYER].log_probabilities().exp()[0, HEAD]
    middle = tokens.index(">>")
    atoms = [i for i, t in enumerate(tokens) if t in "CNO"]
    pairs = [(after, before) for after in atoms for before in atoms if before < middle < after]
    found = {}
    for after, before in sorted(pairs, key=lambda p: attention[p] + attention[p[::-1]], reverse=True):
        if after not in found and before not in found.values():
            found[after] = before
    assert [atoms.index(found[after]) for after in sorted(found)] == [0, 1, 2, 4, 5, 6, 7]
