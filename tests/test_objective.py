"""What objectives stand on: watched attention, objectives by name, pretraining runs, runs that start from a file."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from typer.testing import CliRunner

import formarium as fm
from formarium.arena.config import PretrainConfig
from formarium.arena.initial import take_weights
from formarium.arena.pretrain import Pretraining
from formarium.arena.train import train
from formarium.cli import app
from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit, FormariumError, UnknownName
from formarium.core.spec import spec
from formarium.papers.backbones.vit import KEYS
from formarium.parts.attention import Attention, join_heads, watching
from formarium.parts.position import Rotary
from formarium.skeletons.objective import objective
from formarium.weights.load import load

QUICK = "droppos(decoder_dim=16,decoder_heads=2,decoder_depth=1)"
RUN = {"task": "digits", "steps": 6, "batch_size": 8, "evaluations": 2}
MODEL = "vit/nano:patch=2,dim=16,depth=1,heads=2"


# watched attention

@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 2},
                                     {"causal": True, "position": spec(Rotary)}], ids=str)
@pytest.mark.parametrize("ctx", [Ctx(), Ctx(lengths=(4, 1, 6)), Ctx(mask=torch.arange(11) != 4)],
                         ids=["plain", "packed", "mask"])
def test_watched_attention(options, ctx):
    """The answer is the probabilities times the values, with whatever hides keys; watching changes nothing."""
    part, x = Attention(12, Place(), heads=3, **options).double(), torch.randn(1, 11, 12, dtype=torch.float64)
    with watching(part) as seen:
        out = part(x, replace(ctx, shared={}))
    (one,) = seen
    assert_close(one.log_probabilities().exp() @ one.v, one_before_the_projection(part, out))
    assert part.watch is None
    assert torch.equal(part(x, replace(ctx, shared={})), out)
    assert len(seen) == 1


def one_before_the_projection(part, out):
    heads = torch.linalg.solve(part.proj.weight, (out - part.proj.bias).mT).mT
    return heads.unflatten(-1, (part.heads, -1)).transpose(1, 2)


def test_watching_ends_with_an_error():
    part = Attention(12, Place())
    with pytest.raises(RuntimeError), watching(part):
        raise RuntimeError
    assert part.watch is None


def test_watched_with_a_cache():
    """One new token: all keys."""
    part, cache = Attention(12, Place(), causal=True), Cache()
    with torch.no_grad(), watching(part) as seen:
        for n in (4, 1):
            out = part(torch.randn(2, n, 12), Ctx(cache=cache))
            cache.length += n
    assert [s.k.shape[2] for s in seen] == [4, 5]
    assert_close(part.proj(join_heads(seen[1].log_probabilities().exp() @ seen[1].v)), out)


# objectives by name

def test_by_name():
    made = objective("droppos(pos_ratio=0.5, tau=none,replacement=wrong)")
    assert dict(made.options) == {"pos_ratio": 0.5, "tau": None, "replacement": "wrong"}
    assert objective("minilm(teacher=bert/nano:dim=32,relations=(attention,value))")["relations"] == ("attention", "value")
    with pytest.raises(UnknownName, match="objective 'swin'"):
        objective("swin")
    with pytest.raises(FormariumError, match="not closed"):
        objective("droppos(tau=1")


# runs

def rows(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pretrains(tmp_path):
    """The folder holds the encoder, the losses of training and validation and the objective's own numbers."""
    found = fm.pretrain(MODEL, QUICK, out=tmp_path / "p", **RUN)
    assert found["steps"] == 6
    assert set(found["val"]) == {"loss", "position_accuracy"}
    written = rows(tmp_path / "p")
    assert [r["step"] for r in written if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all("position_accuracy" in r for r in written if "loss" in r)
    assert [r["step"] for r in written if "val" in r] == [3, 6]
    assert written[-1]["val"] == found["val"]
    encoder = load(found["encoder"])
    assert encoder.recipe["name"] == "vit/nano"
    assert load(tmp_path / "p" / "best.safetensors").recipe == encoder.recipe
    assert found["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert fm.pretrain(MODEL, QUICK, out=tmp_path / "p", **RUN) == found  # finished: nothing runs again
    with pytest.raises(FormariumError, match="belongs to another run: objective is"):
        fm.pretrain(MODEL, "droppos", out=tmp_path / "p", **RUN)


def test_resumes_bit_by_bit(tmp_path):
    """Ctrl-C in the middle, and the same call again: the weights and the log of an uninterrupted run."""
    whole = fm.pretrain(MODEL, QUICK, out=tmp_path / "whole", **RUN)
    stopped = []

    def stop(progress, loss):
        if progress > 0.3 and not stopped:
            stopped.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fm.pretrain(MODEL, QUICK, out=tmp_path / "halved", watch=stop, **RUN)
    assert not (tmp_path / "halved" / "result.json").exists()
    halved = fm.pretrain(MODEL, QUICK, out=tmp_path / "halved", **RUN)
    assert rows(tmp_path / "halved") == rows(tmp_path / "whole")
    a, b = (load(r["encoder"]).state_dict() for r in (whole, halved))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_objective_hears_of_the_progress(tmp_path, monkeypatch):
    heard, plain = [], Pretraining.loss

    def loss(self, wrapped, batch, progress):
        out = plain(self, wrapped, batch, progress)
        heard.append(self.trained.progress.item())
        return out

    monkeypatch.setattr(Pretraining, "loss", loss)
    fm.pretrain(MODEL, QUICK, out=tmp_path / "p", **RUN)
    assert heard == pytest.approx([i / 6 for i in range(6)])


def test_pretrains_on_text(tmp_path):
    """An encoder, which no text task could train, under a teacher of a file; budgets in operations count its work too."""
    save(create_model("bert/nano:depth=1,context=16"), tmp_path / "teacher.safetensors")
    given = {"task": "stdlib", "steps": 2, "batch_size": 4, "evaluations": 1}
    text = f"minilm(teacher={tmp_path / 'teacher.safetensors'})"
    small = fm.get_task("stdlib", context=16)
    for budget in ({"steps": 2}, {"flops": 1e8}):
        config = PretrainConfig(model="minilm/nano", objective=text, task="stdlib", batch_size=4, evaluations=1, **budget)
        found = Pretraining(config, tmp_path / next(iter(budget)), task=SmallVal(small)).train()
        assert found["steps"] >= 1
        assert set(found["val"]) == {"loss", "attention", "value"}
    with pytest.raises(DoesNotFit, match="needs a model of the domain"):
        train("minilm/nano", out=tmp_path / "t", **given)
    with pytest.raises(DoesNotFit, match="needs models of the domain 'image'"):
        fm.pretrain("bert/nano", text, task="digits", out=tmp_path / "d")


class SmallVal:
    """A task whose validation part is a few batches."""

    def __init__(self, task):
        self.task = task

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batches(self, split, batch_size):
        for i, batch in enumerate(self.task.batches(split, 8)):
            if i == 3:
                return
            yield batch


# runs that start from a file

def test_starts_from_a_file(tmp_path):
    found = fm.pretrain(MODEL, QUICK, out=tmp_path / "p", **RUN)
    started = train(MODEL, out=tmp_path / "t", init=found["encoder"], **RUN)
    told = started["init"]
    assert told["left"] == ["head.weight", "head.bias"]
    assert told["taken"] == told["of"] - 2
    run = json.loads((tmp_path / "t" / "run.json").read_text())["config"]
    assert run["init"] == found["encoder"]
    assert len(run["init_sha256"]) == 64
    fresh = train(MODEL, out=tmp_path / "fresh", **RUN)
    assert "init" not in fresh
    assert fresh["test"] != started["test"]


def test_takes_what_has_the_same_name_and_shape(tmp_path):
    save(create_model("vit/nano:dim=16,heads=2,depth=3"), tmp_path / "a.safetensors")
    model = create_model("vit/nano:dim=16,heads=2,depth=2,img_size=32,num_classes=1000")
    before, theirs = {k: v.clone() for k, v in model.state_dict().items()}, load(tmp_path / "a.safetensors").state_dict()
    told = take_weights(model, tmp_path / "a.safetensors")
    assert told["left"] == ["embedding.position.table", "head.weight", "head.bias"]
    for name, now in model.state_dict().items():
        assert torch.equal(now, (before if name in told["left"] else theirs)[name])


def test_foreign_files_are_read_by_the_models_keys(tmp_path):
    model = create_model("vit/nano")
    save_file({k: v.contiguous() for k, v in KEYS["timm"].convert(model.state_dict(), back=True).state.items()},
              tmp_path / "timm.safetensors")
    other = create_model("vit/nano:num_classes=3")
    assert take_weights(other, tmp_path / "timm.safetensors")["left"] == ["head.weight", "head.bias"]
    assert torch.equal(other.embedding.cls, model.embedding.cls)


def test_refuses_files_that_do_not_fit(tmp_path):
    save(create_model("gpt/nano"), tmp_path / "gpt.safetensors")
    with pytest.raises(BadCheckpoint, match=r"gpt/nano: none of its \d+ tensors has the name and shape of one of vit/nano"):
        train("vit/nano:dim=16,heads=2", out=tmp_path / "t", init=tmp_path / "gpt.safetensors", **RUN)
    assert not (tmp_path / "t").exists()
    with pytest.raises(BadCheckpoint, match=r"no file .*nothing\.safetensors to start from"):
        train("vit/nano", out=tmp_path / "t", init=tmp_path / "nothing.safetensors", **RUN)


def test_a_started_run_resumes(tmp_path):
    """It goes on from its own state, not from the file; with another file in its place it is another run."""
    file = tmp_path / "start.safetensors"
    save(create_model(MODEL), file)
    whole = train(MODEL, out=tmp_path / "whole", init=file, **RUN)
    stopped = []

    def stop(progress, loss):
        if progress > 0.3 and not stopped:
            stopped.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(MODEL, out=tmp_path / "halved", init=file, watch=stop, **RUN)
    halved = train(MODEL, out=tmp_path / "halved", init=file, **RUN)
    assert halved["test"] == whole["test"]
    assert halved["init"] == whole["init"]
    assert rows(tmp_path / "halved") == rows(tmp_path / "whole")
    torch.manual_seed(5)
    save(create_model(MODEL), file)
    with pytest.raises(FormariumError, match="belongs to another run: init_sha256 is"):
        train(MODEL, out=tmp_path / "halved", init=file, **RUN)


def test_command_line(tmp_path):
    run = CliRunner()
    shared = ["--task", "digits", "--steps", "2", "--batch-size", "8"]
    made = run.invoke(app, ["pretrain", MODEL, QUICK, *shared, "--out", str(tmp_path / "p")])
    assert made.exit_code == 0, made.output
    assert "position accuracy" in made.output
    encoder = str(tmp_path / "p" / "encoder.safetensors")
    assert f"--init {encoder}" in made.output
    tuned = run.invoke(app, ["train", MODEL, *shared, "--init", encoder, "--out", str(tmp_path / "t")])
    assert tuned.exit_code == 0, tuned.output
    assert f"started from {encoder}: " in tuned.output
    assert "new: head.weight, head.bias" in tuned.output
    told = run.invoke(app, ["show", "droppos/nano"])
    assert "fm.pretrain('vit/nano', 'droppos', task=...)" in told.output


def test_a_moving_average_is_judged(tmp_path):
    """It is what is saved: one that forgets at once is the model itself, one that remembers is another."""
    def loss(name, **ema):
        return fm.pretrain("vit/nano:depth=1", "droppos(decoder_depth=1)", "digits", steps=3, batch_size=4, evaluations=1,
                           out=tmp_path / name, **ema)["val"]["loss"]

    assert loss("at_once", ema=0.0) == loss("none")
    assert loss("slowly", ema=0.5) != loss("none")
