"""Measuring code of the studies whose errors nobody would see."""

import torch
from torch.testing import assert_close


@torch.no_grad()
def test_padded_windows_are_windows():
    """FlatFormer's control: a token sees those of its window and its set, and no padding, as each window on its own."""
    from formarium.core.ctx import Ctx, Place
    from formarium.papers.points.flatformer import FlattenedWindowAttention
    from formarium.studies.flatformer import PaddedWindowAttention

    lengths, options = (40, 7), {"heads": 2, "grid": (12, 12), "window": (4, 3)}
    coords = torch.cat([torch.randperm(144)[:n] for n in lengths])
    coords = torch.stack((coords % 12, coords // 12), dim=1)
    x, owner = torch.randn(1, sum(lengths), 8), torch.tensor([0, 1]).repeat_interleave(torch.tensor(lengths))
    for shift, begin in ((False, (0, 0)), (True, (2, 1))):
        padded = PaddedWindowAttention(8, Place(), shift=shift, **options)
        alone = FlattenedWindowAttention(8, Place(), group=200, **options)
        alone.load_state_dict(padded.state_dict())
        found = padded(x, Ctx(lengths=lengths, coords=coords[None].float()))
        window = (coords + torch.tensor(begin)) // torch.tensor(options["window"])
        for one in torch.cat((owner[:, None], window), dim=1).unique(dim=0):
            own = (torch.cat((owner[:, None], window), dim=1) == one).all(1)
            expected = alone(x[:, own], Ctx(lengths=(int(own.sum()),), coords=coords[None, own].float()))
            assert_close(found[:, own], expected)


def test_recall_asks_for_values_that_were_told():
    from formarium.studies.deltanet import Recall

    task = Recall(pairs=5, keys=7)
    ids, answers = task.train_batch(3, 8, 40)
    assert ids.shape == answers.shape == (40, 20)
    for row, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        told = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(told) == 5
        assert max(told) < 7 <= min(told.values())
        assert sorted(row[10::2]) == sorted(told)
        assert wanted == [-100] * 10 + [token for key in row[10::2] for token in (told[key], -100)]
    assert not torch.equal(ids, task.train_batch(3, 9, 40)[0])
    assert_close(ids, task.train_batch(3, 8, 40)[0])


def test_copy_asks_for_the_word_again():
    from formarium.studies.reformer import WORD, Copy

    ids, answers = Copy().train_batch(0, 0, 3)
    word = ids[:, 1:WORD + 1]
    assert ids.shape == answers.shape == (3, 2 * WORD + 1)
    assert (ids[:, [0, WORD + 1]] == 0).all()
    assert (word > 0).all()
    assert_close(answers[:, WORD + 1:], word)
    assert (answers[:, :WORD + 1] == -100).all()


@torch.no_grad()
def test_drawn_tasks_count_each_answer_once():
    """A model that always answers right, or always wrong, on two sets of held-out sequences."""
    from formarium.studies.reformer import WORD, Copy

    task = Copy()

    class Copier(torch.nn.Module):
        def forward(self, ids):
            last = ids.roll(WORD, dims=1)
            return torch.nn.functional.one_hot(last if self.right else (last + 1) % 32, 32).float() * 50

    copier = Copier()
    for copier.right, accuracy in ((True, 1.0), (False, 0.0)):
        for split in ("val", "test"):
            found = task.evaluate(copier, split)
            assert found["accuracy"] == accuracy
            assert (found["loss"] < 1e-6) is copier.right
    val, test = (next(task.batches(s, 8))[0] for s in ("val", "test"))
    assert not torch.equal(val, test)


@torch.no_grad()
def test_adding_is_the_delta_rule_without_the_correction():
    """DeltaNet's control, against its recurrence written out; and equal to DeltaNet where keys do not repeat: one token."""
    import torch.nn.functional as F

    from formarium.core.ctx import Ctx, Place
    from formarium.papers.mixers.deltanet import DeltaNet
    from formarium.parts.attention import join_heads, split_heads
    from formarium.studies.deltanet import Adding

    part, x = Adding(8, Place(), heads=2), torch.randn(3, 6, 8)
    delta = DeltaNet(8, Place(), heads=2)
    delta.load_state_dict(part.state_dict())
    q, k, v = (split_heads(t, 1, 2)[0] for t in part.conv(part.qkv(x), None)[0].split(8, dim=-1))
    q, k, v, beta = (*(part.normalise(F.silu(t)) for t in (q, k)), F.silu(v), part.beta(x).sigmoid().transpose(1, 2))
    state, out = torch.zeros(3, 2, 4, 4), []
    for t in range(6):
        state = state + beta[:, :, t, None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0] / 2)
    assert_close(part(x, Ctx()), part.proj(join_heads(part.out_norm(torch.stack(out, dim=2)))))
    assert_close(part(x[:, :1], Ctx()), delta(x[:, :1], Ctx()))
    assert not torch.allclose(part(x, Ctx()), delta(x, Ctx()))


def test_alibi_falls_with_the_distance():
    from formarium.core.ctx import Ctx
    from formarium.studies.fire import Alibi

    bias = Alibi(4, 4).bias(2, 3, Ctx())
    assert bias.shape == (4, 2, 3)
    assert_close(bias[:, 1], -2.0 ** -torch.tensor([2, 4, 6, 8])[:, None] * torch.tensor([2, 1, 0]))
    assert_close(bias[:, 0, :2], bias[:, 1, 1:])


@torch.no_grad()
def test_settled_batch_norms_have_the_statistics_of_the_batches():
    """With one batch a settled model answers it as in training; before, it does not."""
    from formarium.arena.train import build_for
    from formarium.studies.kmax_deeplab import MODEL, rectangles, settle

    task = rectangles()
    model = build_for(MODEL, task).eval()
    images = task.train_batch(0, 0, 4)[0]
    before = model(images).masks
    settle(model, [images])
    after = model(images).masks
    expected = model.train()(images).masks
    assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=0.1)


@torch.no_grad()
def test_planted_outliers_change_no_answer():
    from formarium.core.build import create_model
    from formarium.core.transform import apply
    from formarium.studies.llm_int8 import DIMENSIONS, SHIFT, plant

    torch.manual_seed(0)
    model = create_model("gpt/nano:depth=2").eval()
    ids, seen = model.example(2), []
    before = model(ids)
    planted = plant(model, 3)
    hook = planted.stack.layers[1]["channel"].inner.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_close(planted(ids), before, atol=2e-4, rtol=2e-4)
    hook.remove()
    assert ((seen[0] > SHIFT / 2).all((0, 1)).sum(), (seen[0] > 6).any(0).any(0).sum()) == (DIMENSIONS, DIMENSIONS)
    errors = [(apply(planted, "llm_int8", threshold=t)(ids) - before).square().mean() for t in (6.0, None)]
    assert errors[0] < errors[1]


def test_soft_labels_are_the_teachers():
    from formarium.core.build import create_model
    from formarium.studies.minilm import SoftLabels
    from formarium.tasks.kinds import answers

    task = SoftLabels(create_model("minilm/nano:context=64"))
    inputs, soft = task.train_batch(0, 1, 2)
    assert_close(soft.sum(-1), torch.ones(2, 64))
    assert_close(soft, answers(task.teacher, inputs).softmax(-1))
    assert task.loss(task.teacher, (inputs, soft)) > 0


def test_halves_share_no_digit():
    from formarium.studies.adaptformer import half
    from formarium.tasks.classify import mnist5k

    whole, parts = mnist5k(), [half(first=first) for first in (0, 5)]
    for split, size in whole.info.sizes.items():
        assert sum(p.info.sizes[split] for p in parts) == size
        assert all(p.data.labels[split].unique().tolist() == [0, 1, 2, 3, 4] for p in parts)
    assert [p.data.classes for p in parts] == [tuple("01234"), tuple("56789")]
