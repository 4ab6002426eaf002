"""The task of token kinds: what is right, who can do it, what is counted and shown."""

import math

import pytest
import torch

import formarium as fm
from formarium.arena.shown import spans
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.skeletons.encoder import Encoder
from formarium.tasks.kinds import NAMES, TokenKinds, answers, kinds_of


@pytest.fixture(scope="module")
def task():
    return fm.get_task("token_kinds", context=32)


def test_kinds_of_tokens():
    source = 'if  a:  # b\n    x = """c\nd""" + f"e"*12\n'
    kinds = "66001500444" + "0" + "00001" + "050" + "33333" + "3333" + "050" + "3333" + "522" + "0"
    assert "".join(map(str, kinds_of(source.encode()).tolist())) == kinds


def test_windows_are_the_library_in_order(task):
    read, told = (torch.cat([b[i].flatten() for b in task.batches("val", 100)]) for i in (0, 1))
    assert torch.equal(read, task.text["val"][:len(read)].long())
    assert torch.equal(told, task.kinds["val"][:len(told)])
    assert len(read) == task.info.sizes["val"] > 10_000
    assert set(told.tolist()) == set(range(len(NAMES)))
    inputs, kinds = task.train_batch(3, 5, 4)
    assert inputs.shape == kinds.shape == (4, 32)
    assert torch.equal(inputs, task.train_batch(3, 5, 4)[0])
    assert not torch.equal(inputs, task.train_batch(3, 6, 4)[0])
    with pytest.raises(UnknownName, match="validation"):
        task.batches("validation", 4)


@pytest.mark.parametrize("name", ["bert/nano", "albert/nano"])
def test_encoders_learn_it(task, name):
    model = fm.create_model(name, **task.model_options())
    task.check_fits(model, name)
    batch = task.train_batch(0, 0, 8)
    assert answers(model, batch[0]).shape == (8, 32, 256)
    before = task.loss(model, batch)
    assert before.item() == pytest.approx(math.log(256), abs=1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimiser.step()
    assert loss < before / 2


class Knows(Encoder):
    """Answers with the kinds themselves, but for one byte in ten."""

    def __init__(self, kinds):
        torch.nn.Module.__init__(self)
        self.token, self.project = torch.nn.Embedding(256, 256), torch.nn.Identity()
        self.token.weight.data = torch.eye(256)
        self.kinds = kinds

    def forward(self, batch):
        kinds, self.kinds = self.kinds[:batch.numel()], self.kinds[batch.numel():]
        wrong = torch.arange(len(kinds)) % 10 == 0
        return torch.eye(256)[torch.where(wrong, (kinds + 1) % 7, kinds)].view(*batch.shape, 256) * 50


def test_accuracy_is_the_share_of_bytes(task):
    n = task.info.sizes["val"]
    found = task.evaluate(Knows(task.kinds["val"][:n]), "val", batch_size=n // 32)
    assert found["accuracy"] == pytest.approx(0.9, abs=1e-4)
    assert found["loss"] == pytest.approx(5.0, abs=0.01)


def test_what_is_shown(task):
    model = fm.create_model("bert/nano", **task.model_options())
    shown = task.show(model)
    assert len(shown["text"]) == len(shown["truth"]) == len(shown["answer"]) == 384
    assert max(shown["answer"]) < len(NAMES)
    page = spans.draw(None, [(0, "a/nano", shown | {"answer": shown["truth"]}), (1, "b/nano", shown)])
    right = sum(a == t for a, t in zip(shown["answer"], shown["truth"], strict=True)) / 384
    assert "100.0% of these" in page
    assert f"{right:.1%} of these" in page
    assert "<script" not in spans.painted("<script>", [1] * 8, [2] * 8)
    assert spans.painted("ab c", [1, 1, 0, 2], [1, 1, 0, 3]).count("underline") == 1


def test_wrong_inputs():
    with pytest.raises(DoesNotFit, match="context is a number of bytes"):
        TokenKinds(context=0)
    with pytest.raises(fm.FormariumError, match="smaller context"):
        TokenKinds(context=10**6)
    with pytest.raises(DoesNotFit, match="text encoder such as bert/nano; gpt/nano is none"):
        fm.train("gpt/nano", "token_kinds", steps=1)


def test_pretraining_says_who_goes_on(tmp_path):
    found = fm.pretrain("bert/nano", "bert", "stdlib", steps=1, batch_size=2, out=tmp_path / "a")
    assert found["does_task"] is False
    found = fm.pretrain("bert/nano", "bert", "token_kinds", steps=1, batch_size=2, out=tmp_path / "b")
    assert found["does_task"] is True
