"""DropPos against the written-out loss, and the authors' answers."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Ctx
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.papers.objectives.droppos import OBJECTIVE_KEYS, DropPos, SinCos, load_objective
from formarium.parts.position import LearnedPosition
from formarium.skeletons.objective import objective
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "droppos__vit_small_patch16_dec512d2b_sigma1.json.gz"


def built(name="vit/nano", **options):
    torch.manual_seed(0)
    made = DropPos(create_model(name), **{"decoder_dim": 32, "decoder_heads": 4, **options})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def noises(made, batch=3):
    return torch.rand(batch, made.grid[0] * made.grid[1]), torch.rand(batch, made.visible)


@pytest.mark.parametrize("name", ["vit/nano", "vit/nano:img_size=(28,40)", "vit/nano:pool=mean", "droppos/nano"])
def test_sees_patch_by_patch(name):
    """The encoder's input: each visible patch with its own position, or the token."""
    made = built(name).eval()
    model = made.model
    images, (noise, pos_noise) = model.example(3), noises(made)
    given = []
    model.stages[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    seen = made.see(images, noise, pos_noise)
    known = int(made.visible * 0.25)
    with_positions, without = model.embedding(images, Ctx())[0], model.embedding.tokens(images, Ctx())[0]
    prefix = int(model.pool == "token")
    for b in range(3):
        chosen = sorted(range(noise.shape[1]), key=lambda i: noise[b, i])[:made.visible]
        assert seen.kept[b].tolist() == chosen
        keeps = sorted(range(made.visible), key=lambda i: pos_noise[b, i])[:known]
        for j, place in enumerate(chosen):
            row = with_positions[b, prefix + place] if j in keeps else without[b, prefix + place] + made.token[0, 0]
            assert_close(given[0][b, prefix + j], row)
            assert seen.dropped[b, j] == (j not in keeps)
        if prefix:
            assert_close(given[0][b, 0], with_positions[b, 0])


def test_wrong_positions_are_those_of_other_dropped_patches():
    made = built(replacement="wrong", pos_ratio=0.5).double()
    images, given = made.model.example(2).double(), []
    made.model.stages[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    seen = made.see(images, *noises(made, 2))
    patches, table = made.model.embedding.tokens(images, Ctx())[0], made.model.embedding.position.table[0]
    for b in range(2):
        added = given[0][b, 1:] - patches[b, 1:][seen.kept[b]]
        which = torch.cdist(added, table[1:])
        assert which.min(1).values.max() < 1e-6
        places, dropped = which.argmin(1), seen.dropped[b]
        assert torch.equal(places[~dropped], seen.kept[b][~dropped])
        assert sorted(places[dropped].tolist()) == sorted(seen.kept[b][dropped].tolist())
        assert not torch.equal(places[dropped], seen.kept[b][dropped])


@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_written_out(sigma, weighted):
    """Loss and gradient by loops over samples, patches and places."""
    made = built("vit/nano:img_size=(12,20)", ratio=0.3).double()
    h, w = made.grid
    seen = made.see(made.model.example(2).double(), *noises(made, 2))
    logits = torch.randn(2, made.visible, h * w, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, made.visible, dtype=torch.float64) if weighted else None
    loss, accuracy = made.position_loss(logits, seen, torch.tensor(sigma, dtype=torch.float64), weights)

    def near(i, j):
        if sigma == 0:
            return float(i == j)
        return math.exp(-((i // w - j // w)**2 + (i % w - j % w)**2) / sigma**2)

    over, under, hits, count = 0.0, 0.0, 0, 0
    for b in range(2):
        for k in range(made.visible):
            if seen.dropped[b, k]:
                place = seen.kept[b, k].item()
                ce = -sum(near(place, j) / sum(near(j, i) for i in range(h * w)) * F.log_softmax(logits[b, k], 0)[j]
                          for j in range(h * w))
                weight = weights[b, k] / weights[b].sum() if weighted else 1.0
                over, under = over + weight * ce, under + weight
                hits, count = hits + int(logits[b, k].argmax() == place), count + 1
    assert_close(loss, over / under)
    assert accuracy == pytest.approx(hits / count)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, over / under)))


def test_attentive_weights():
    made = built().eval()
    images = made.model.example(2)
    tokens = made.model.forward_features(images)
    naive = torch.stack([torch.stack([x[0] @ p / x[0].norm() / p.norm() for p in x[1:]]) for x in tokens])
    assert_close(made.attentive(images), (naive / 0.1).softmax(-1))
    assert not made.attentive(images).requires_grad


def test_smoothing_narrows_with_the_progress():
    """In training the target sharpens until it is one-hot at the end; in eval mode, or without anneal, nothing changes."""
    images = built().model.example(4)

    def losses(train, **options):
        made = built(tau=None, **options).train(train)
        found = []
        for progress in (0.0, 0.5, 1.0):
            made.progress.fill_(progress)
            torch.manual_seed(1)
            found.append(made(images)[0].item())
        return found

    early, middle, late = losses(True)
    assert len({early, middle, late}) == 3
    assert late == losses(True, sigma=0.0)[0] == losses(False)[0] == losses(False)[2]
    assert losses(True, anneal=False) == [early] * 3


def test_pixels_are_reconstructed_as_in_mae():
    """Every hidden patch, brought to mean 0 and variance 1, row by row and channel last."""
    made = built("vit/nano:img_size=(12,20),patch=(4,5)", pixels=True, ratio=0.5)
    images = made.model.example(2)
    seen = made.see(images, *noises(made, 2))
    guess, (h, w) = made.pixels(seen.tokens, seen.kept, made.grid), made.grid
    errors = []
    for b in range(2):
        for i in set(range(h * w)) - set(seen.kept[b].tolist()):
            y, x = i // w * 4, i % w * 5
            patch = images[b, :, y:y + 4, x:x + 5].movedim(0, -1).flatten()
            errors.append((guess[b, i] - (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()).square().mean())
    assert_close(made.pixel_loss(images, seen), torch.stack(errors).mean())
    loss, numbers = made(images)
    assert_close(loss, 0.05 * numbers["positions"] + numbers["pixels"])


def test_everything_learns():
    for options in ({}, {"pixels": True}, {"replacement": "zeros"}, {"tau": None}):
        made = built(**options)
        made(made.example(4))[0].backward()
        idle = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == ["model.head.weight", "model.head.bias"]
        assert ("token" in made.no_weight_decay()) == (made.token is not None)


@pytest.mark.parametrize(("name", "options", "why"), [
    ("swin/nano", {}, "a plain ViT, one stage after a patch embedding; Swin is none"),
    ("vit/nano:position=rotary", {}, "positions that are added to the tokens, and here are none"),
    ("vit/nano", {"ratio": 1.0}, "expected 0 <= ratio < 1"),
    ("vit/nano", {"pos_ratio": 0.0}, "0 < pos_ratio <= 1"),
    ("vit/nano", {"tau": 0.0}, "tau > 0"),
    ("vit/nano", {"ratio": 0.99}, "of 49 patches ratio=0.99 leaves none visible"),
    ("vit/nano:pool=mean,mixer=pooling", {}, "Pooling needs tokens on a full grid"),
    ("vit/nano:dim=66,heads=1", {"decoder_heads": 5}, "5 heads do not divide"),
    ("droppos/nano:dim=66,heads=1", {}, "a width that 4 divides, got 66"),
])
def test_what_does_not_fit(name, options, why):
    def run():
        made = built(name, **options)
        made(made.example(1))

    with pytest.raises(DoesNotFit, match=why):
        run()


def test_wrong_names():
    with pytest.raises(UnknownName, match="'tokens'; did you mean token"):
        built(replacement="tokens")
    with pytest.raises(UnknownName, match="objective 'dropos'; did you mean droppos"):
        objective("dropos")
    with pytest.raises(UnknownName, match="option of DropPos 'pos_ration'; did you mean pos_ratio"):
        objective("droppos(pos_ration=0.5)")


def test_positions():
    """Column first, then row; sines, then cosines; nothing for the class token."""
    table = SinCos(8, 7)(torch.zeros(1, 7, 8), Ctx(grid=(2, 3), prefix=1))[0]
    assert not table[0].any()
    for i in range(6):
        row, column = divmod(i, 3)
        assert_close(table[1 + i], torch.tensor([f(at * rate) for at in (column, row) for f in (math.sin, math.cos)
                                                 for rate in (1, 0.01)]))


# the authors' answers

@torch.no_grad()
def test_golden():
    state, (images, noise, pos_noise), golden = replay(GOLDEN)
    made = load_objective(state)
    seen = made.see(images, noise, pos_noise)
    logits = made.locate(seen)
    loss, accuracy = made.position_loss(logits, seen, torch.tensor(1.0))
    mask = torch.ones_like(noise).scatter(1, seen.kept, 0.0)
    answers = logits, seen.tokens, loss, accuracy, mask, seen.dropped
    shaped = [a.reshape(o["shape"]) for a, o in zip(answers, golden["outputs"], strict=True)]
    assert compare(golden, shaped) < 1e-5
    with pytest.raises(AssertionError, match="output 2 differs"):
        compare(golden, [*shaped[:2], made.position_loss(logits, seen, torch.tensor(0.5))[0].reshape(shaped[2].shape),
                         *shaped[3:]])


def test_reads_the_authors_files(tmp_path):
    """The encoder alone, with fixed or stored positions; and the whole objective with both decoders."""
    state, (images, *_), _ = replay(GOLDEN)
    encoder = load(state, "droppos")
    assert encoder.recipe["name"] == "droppos/small"
    assert (encoder.num_classes, encoder.img_size) == (0, (224, 224))
    save(encoder, tmp_path / "encoder.safetensors")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "encoder.safetensors")(images), encoder(images))
    table = encoder.embedding.position(torch.zeros(1, 197, 384), Ctx(grid=(14, 14), prefix=1))
    stored = load(state | {"pos_embed": table}, "droppos")
    assert isinstance(stored.embedding.position, LearnedPosition)
    with torch.no_grad():
        assert_close(stored(images), encoder(images))
    made = built("droppos/nano:img_size=32", pixels=True, decoder_depth=3)
    theirs = OBJECTIVE_KEYS.convert(made.state_dict(), back=True)
    assert theirs.unmatched == []
    assert {"mask_token", "aux_decoder_pred.weight", "decoder_blocks.2.mlp.fc1.weight"} <= set(theirs.state)
    again = load_objective(theirs.state | {"aux_decoder_pos_embed": torch.zeros(1, 65, 32)}, heads=4, decoder_heads=4)
    assert again.model.img_size == (32, 32)
    torch.manual_seed(3)
    loss = again(again.example(2))[0]
    torch.manual_seed(3)
    assert_close(loss, made.eval()(made.example(2))[0])
    zeros = load_objective(theirs.state, decoder_heads=4, replacement="zeros")
    assert zeros.token is None
    with pytest.raises(BadCheckpoint, match=r"1 of \d+ tensors have no place, e.g. stray"):
        load_objective(theirs.state | {"stray": torch.zeros(1)})
    with pytest.raises(BadCheckpoint, match="no decoder of positions"):
        load_objective({k: v for k, v in theirs.state.items() if not k.startswith("decoder")})
