"""The main job: training, comparing, resuming, failing, and the command line around them. Real data, tiny models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import formarium as fm
from formarium.arena.compare import _Job, compare, differences, paired_interval, verdict_of
from formarium.arena.config import CompareConfig, RunConfig
from formarium.arena.measure import peak_memory, speeds
from formarium.arena.train import SAVE_EVERY, Diverged, Run, build_for, rate_at, slug, train
from formarium.cli import app
from formarium.core.errors import DoesNotFit, FormariumError, UnknownName
from formarium.tasks.registry import get_task

VIT = "vit/nano:depth=2,dim=16,heads=2,patch=2,drop_path=0.3"
POOL = "poolformer/nano:dims=(8,16),depths=(1,1)"
FAST = {"steps": 6, "batch_size": 16, "evaluations": 2}


@pytest.fixture(scope="module")
def digits():
    return get_task("digits")


def config(**changes):
    return RunConfig(**({"model": VIT, "task": "digits", **FAST} | changes))


def rows(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Interrupting:
    """Watches a run and sends SIGINT to this process at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, progress: float, loss: float | None) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGINT)


# one run


def test_a_run_leaves_its_files_and_its_result(tmp_path, digits):
    found = Run(config(), tmp_path / "run", digits).train()
    assert found["steps"] == 6
    assert set(found["test"]) == {"loss", "accuracy", "macro_f1"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "run.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "result.json"}
    model = fm.load(tmp_path / "run" / "last.safetensors")
    assert digits.evaluate(model, "test") == found["test"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"] == VIT


def test_best_weights_are_those_that_validated_best(tmp_path, digits):
    Run(config(steps=30, evaluations=5), tmp_path / "run", digits).train()
    found = [r["val"]["accuracy"] for r in rows(tmp_path / "run") if "val" in r]
    assert len(found) == 5
    best = digits.evaluate(fm.load(tmp_path / "run" / "best.safetensors"), "val")
    assert best["accuracy"] == max(found)


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, digits):
    whole = Run(config(steps=12), tmp_path / "whole", digits).train()
    with pytest.raises(KeyboardInterrupt):
        Run(config(steps=12), tmp_path / "cut", digits, Interrupting(5)).train()
    assert [p.name for p in (tmp_path / "cut").glob("state-*")] == ["state-00000005"]
    assert Run(config(steps=12), tmp_path / "cut", digits).result() is None
    resumed = Run(config(steps=12), tmp_path / "cut", digits).train()
    assert resumed["test"] == whole["test"]
    one, other = (fm.load(tmp_path / n / "last.safetensors").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(one[k], other[k]) for k in one)

    def curve(name):
        return [(r["step"], r.get("loss"), r.get("val")) for r in rows(tmp_path / name)]

    assert curve("cut") == curve("whole")


def test_a_killed_process_resumes(tmp_path):
    """SIGKILL leaves no chance to save: the run starts from its last state, here none, with the same numbers."""
    script = (f"from formarium.arena.train import train; train({VIT!r}, 'digits', out={str(tmp_path / 'run')!r}, "
              "steps=400, batch_size=16, evaluations=2)")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    killed = train(VIT, "digits", out=tmp_path / "run", steps=400, batch_size=16, evaluations=2)
    whole = train(VIT, "digits", out=tmp_path / "whole", steps=400, batch_size=16, evaluations=2)
    assert killed["test"] == whole["test"]
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1


def test_states_are_saved_as_time_passes(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("formarium.arena.train.SAVE_EVERY", 0.0)
    seen = []

    def watch(progress, loss):
        seen.append(sorted(p.name for p in (tmp_path / "run").glob("state-*")))

    Run(config(), tmp_path / "run", digits, watch).train()
    assert SAVE_EVERY == 30
    assert seen[3] == ["state-00000003"]  # the last one only, before the fourth step's is written
    assert not list((tmp_path / "run").glob("*state*"))


def test_a_finished_run_is_read_not_run_again(tmp_path, digits):
    first = Run(config(), tmp_path / "run", digits).train()
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert Run(config(), tmp_path / "run", digits).train() == first
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(tmp_path, digits):
    with pytest.raises(KeyboardInterrupt):
        Run(config(), tmp_path / "run", digits, Interrupting(2)).train()
    with pytest.raises(FormariumError, match=r"another run: lr is 0.001 there, 0.01 here"):
        Run(config(lr=0.01), tmp_path / "run", digits).train()


def test_a_folder_with_other_things_is_refused(tmp_path, digits):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FormariumError, match="not empty"):
        Run(config(), tmp_path, digits).train()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_divergence_is_said_with_its_step(tmp_path, digits):
    with pytest.raises(Diverged, match="loss became"):
        Run(config(lr=1e30, steps=20, clip=1e30), tmp_path / "run", digits).train()
    assert rows(tmp_path / "run")[-1]["loss"] is None
    assert not (tmp_path / "run" / "result.json").exists()


def test_budgets(tmp_path, digits):
    seconds = Run(config(steps=None, seconds=1.0), tmp_path / "s", digits).train()
    assert seconds["steps"] > 1
    assert seconds["seconds"] >= 1.0
    macs = 6 * fm.core.macs.count_macs(m := build_for(VIT, digits), m.example()) * 16
    flops = Run(config(steps=None, flops=3.5 * macs), tmp_path / "f", digits).train()
    assert flops["steps"] == 3


def test_rate_rises_then_falls_to_zero():
    rates = [rate_at(p / 100, 1.0, 0.1) for p in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert rate_at(0.0, 1.0, 0.0) == 1


def test_learning_is_learning(tmp_path):
    """The default ViT of the tests gets well above chance on the digits in some seconds."""
    found = train("vit/nano:patch=2,depth=2", "digits", out=tmp_path / "run", steps=150, lr=3e-3)
    assert found["test"]["accuracy"] > 0.6


def test_gradient_checkpointing_gives_the_same_run(tmp_path, digits):
    plain = Run(config(), tmp_path / "a", digits).train()
    checkpointed = Run(config(grad_checkpointing=True), tmp_path / "b", digits).train()
    assert checkpointed["test"]["loss"] == pytest.approx(plain["test"]["loss"], abs=1e-5)


def test_language_model_trains(tmp_path):
    found = train("gpt/nano:depth=1,dim=16,heads=2", "stdlib", out=tmp_path / "run", steps=4, batch_size=4, evaluations=1)
    assert 4 < found["test"]["bits_per_byte"] < 9
    assert found["shown"]["kind"] == "text"


def test_wrong_settings_are_said_at_once(tmp_path, digits):
    for changes, words in [({"steps": -1}, "steps"), ({"lr": 0}, "lr"), ({"steps": 3, "seconds": 2}, "one budget"),
                           ({"precision": "fp8"}, "precision"), ({"stepz": 3}, "stepz")]:
        with pytest.raises(FormariumError, match=words):
            train(VIT, "digits", out=tmp_path / "run", **changes)
    with pytest.raises(UnknownName, match="digits"):
        train(VIT, "digit")
    with pytest.raises(DoesNotFit, match="image"):
        Run(config(model="gpt/nano"), tmp_path / "run", digits).train()
    assert not list((tmp_path / "run").glob("*.safetensors"))


DISTRIBUTED = """
import sys
from pathlib import Path
from formarium.arena.config import RunConfig
from formarium.arena.train import Run
run = Run(RunConfig(model={model!r}, task="digits", steps=6, batch_size=16, evaluations=2), Path(sys.argv[1]))
assert run.accelerator.num_processes == 2
run.train()
"""


def test_two_processes_train_as_one(tmp_path, digits):
    """Data-parallel over gloo: half a batch each, averaged gradients, the same losses and weights as one process."""
    model = VIT.replace("drop_path=0.3", "drop_path=0.0")  # processes draw different paths
    alone = Run(config(model=model), tmp_path / "one", digits).train()
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED.format(model=model))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29577",
                           str(script), str(tmp_path / "two")], env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads((tmp_path / "two" / "result.json").read_text())
    assert together["test"]["loss"] == pytest.approx(alone["test"]["loss"], abs=1e-4)
    one, two = (fm.load(tmp_path / n / "last.safetensors").state_dict() for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


# comparisons


class Seen:
    def __init__(self) -> None:
        self.cells, self.planned = [], 0

    def plan(self, cells):
        self.planned = cells

    def begin(self, model, lr, seed):
        self.cells.append((model, lr, seed))

    def step(self, progress, loss): ...

    def end(self, model, found): ...


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "c"
    seen = Seen()
    return compare([VIT, POOL], "digits", seeds=2, lrs=(1e-3, 3e-2), out=folder, watcher=seen, **FAST), seen


def test_a_comparison_has_a_row_for_each_model_and_a_report(compared):
    found, seen = compared
    assert [r["model"] for r in found.rows] == [VIT, POOL]
    assert seen.planned == len(seen.cells) == 2 * (2 + 1)
    for row in found.rows:
        assert row["status"] == "done"
        values = row["test"]["accuracy"]["values"]
        assert len(values) == 2
        assert row["test"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert set(row["lr_tried"]) == {"0.001", "0.03"}
        assert row["lr"] == max((0.001, 0.03), key=lambda lr: row["lr_tried"][f"{lr:g}"])
        for key in ("params", "macs", "train_seconds", "peak_memory", "latency_ms", "throughput"):
            assert row[key] > 0, key
    assert found.rows[0]["difference"] is None
    pairs = zip(found.rows[1]["test"]["accuracy"]["values"], found.rows[0]["test"]["accuracy"]["values"], strict=True)
    assert found.rows[1]["difference"]["values"] == pytest.approx([a - b for a, b in pairs])
    assert "<svg" in found.report.read_text()
    assert found.verdict in found.report.read_text()


def test_every_model_sees_the_same_data(digits):
    first = {step: digits.train_batch(3, step, 16)[0] for step in (0, 1, 200)}
    other = get_task("digits")
    assert all(torch.equal(other.train_batch(3, step, 16)[0], x) for step, x in first.items())
    assert not torch.equal(first[0], first[1])


def test_the_same_call_again_is_read_from_disk(compared):
    found, _ = compared
    marks = {p: p.stat().st_mtime_ns for p in found.folder.rglob("result.json")}
    again = compare([VIT, POOL], "digits", seeds=2, lrs=(1e-3, 3e-2), out=found.folder, **FAST)
    assert {p: p.stat().st_mtime_ns for p in found.folder.rglob("result.json")} == marks
    assert again.verdict == found.verdict


def test_a_folder_of_another_comparison_is_refused(compared):
    with pytest.raises(FormariumError, match=r"another run: .*seeds"):
        compare([VIT, POOL], "digits", seeds=3, lrs=(1e-3, 3e-2), out=compared[0].folder, **FAST)


def test_an_interrupted_comparison_goes_on(tmp_path, digits):
    class Stopping(Seen):
        def step(self, progress, loss):
            if len(self.cells) == 2 and progress > 0.5:
                os.kill(os.getpid(), signal.SIGINT)

    asked = dict(models=(VIT, POOL), task="digits", seeds=(0,), lrs=(1e-3,), **FAST)
    with pytest.raises(KeyboardInterrupt):
        _Job(CompareConfig(**asked), tmp_path / "c", digits, Stopping()).do()
    assert len(list((tmp_path / "c").rglob("result.json"))) == 1
    assert len(list((tmp_path / "c").rglob("state-*"))) == 1
    resumed = compare([VIT, POOL], "digits", lr=1e-3, out=tmp_path / "c", **FAST)
    fresh = compare([VIT, POOL], "digits", lr=1e-3, out=tmp_path / "d", **FAST)
    assert [r["test"] for r in resumed.rows] == [r["test"] for r in fresh.rows]


def test_a_failed_cell_stays_in_the_table_with_its_reason(tmp_path):
    found = compare([VIT, POOL], "digits", lr=1e30, clip=1e30, out=tmp_path / "c", **FAST)
    assert [r["status"] for r in found.rows] == ["failed", "failed"]
    assert "loss became" in found.rows[0]["reason"]
    assert "Every run failed" in found.verdict
    assert "loss became" in found.report.read_text()


def test_one_model_of_several_fails(tmp_path, monkeypatch):
    class Broken(nn.Module):
        def forward(self, x, ctx):
            raise RuntimeError("out of luck\nsecond line")

    import formarium.arena.train as arena
    real = arena.build_for

    def build(name, task, **changes):
        model = real(name, task, **changes)
        if name == POOL and next(model.parameters()).device.type != "meta":
            model.stages[0].layers[0]["mixer"].inner = Broken()
        return model

    monkeypatch.setattr(arena, "build_for", build)  # the cells build through it; costs are measured on a sound one
    found = compare([VIT, POOL], "digits", lr=1e-3, out=tmp_path / "c", **FAST)
    assert [r["status"] for r in found.rows] == ["done", "failed"]
    assert found.rows[1]["reason"] == "1 of 1 runs failed: out of luck"
    assert f"{POOL} failed" in found.verdict


def test_misspelt_names_cost_nothing(tmp_path):
    for models, task, words in [(["vit/nano", "swim/nano"], "digits", "swin"), (["vit/nanoo"], "digits", "nano"),
                                (["vit/nano:mixer=cosfromer"], "digits", "cosformer"), (["vit/nano"], "mnist", "mnist5k"),
                                (["vit/nano:dept=3"], "digits", "depth")]:
        with pytest.raises(UnknownName, match=words):
            compare(models, task, out=tmp_path / "c")
    with pytest.raises(DoesNotFit, match="language"):
        compare(["vit/nano"], "stdlib", out=tmp_path / "c")
    with pytest.raises(FormariumError, match="twice"):
        compare(["vit/nano", "vit/nano"], "digits", out=tmp_path / "c")
    with pytest.raises(FormariumError, match="not both"):
        compare(["vit/nano"], "digits", lr=1.0, lrs=(1.0,), out=tmp_path / "c")
    with pytest.raises(FormariumError):
        compare([], "digits", out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def row(name, *values, status="done"):
    cells = [{"seed": i, "status": "done", "test": {"accuracy": v}} for i, v in enumerate(values)]
    mean = sum(values) / len(values) if values else None
    return {"model": name, "status": status, "cells": cells, "test": {"accuracy": {"mean": mean}} if values else {}}


def test_verdicts():
    clear = verdict_of([row("a", 0.5, 0.51, 0.49), row("b", 0.9, 0.91, 0.9)], "accuracy", True)
    assert "b reaches 90.3 % accuracy" in clear
    assert "above a over 3 paired seeds" in clear
    open_ = verdict_of([row("a", 0.5, 0.6, 0.4), row("b", 0.6, 0.5, 0.45)], "accuracy", True)
    assert "cannot be told apart" in open_
    assert "with one seed" in verdict_of([row("a", 0.5), row("b", 0.6)], "accuracy", True)
    lower = verdict_of([row("a", 0.5, 0.51, 0.49), row("b", 0.9, 0.91, 0.9)], "accuracy", False)
    assert lower.startswith("a reaches")
    assert "failed" in verdict_of([row("a", 0.5), row("b", status="failed")], "accuracy", True)


def test_paired_interval_is_students():
    low, high = paired_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert paired_interval([1.0]) is None
    table = [row("a", 1.0, 2.0), row("b", 2.0, 5.0)]
    differences(table, "accuracy")
    assert table[1]["difference"]["mean"] == 2.0


# costs


def test_peak_memory_counts_what_lives_together(digits):
    small, large = (peak_memory(build_for(VIT, digits), digits, n) for n in (8, 64))
    model = build_for(VIT, digits)
    weights = sum(p.nbytes for p in model.parameters())
    assert small > 4 * weights  # weights, gradients, two moments
    assert large > 3 * small
    model.set_grad_checkpointing()
    assert peak_memory(model, digits, 64) < large


def test_speeds_measures_every_model():
    class Slow(nn.Identity):
        def forward(self, x):
            time.sleep(0.02)
            return x

    found = speeds({"slow": Slow(), "fast": nn.Identity()}, torch.zeros(1), rounds=3, seconds=0.01)
    assert found["slow"] > 0.02 > found["fast"]


# the command line


def formarium(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "formarium.cli", *arguments], capture_output=True, text=True, timeout=300,
                          check=False, **options)


def test_list_and_show():
    listed = formarium("list", "--domain", "image")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ("vit", "swin", "poolformer"))
    assert "gpt" not in listed.stdout
    assert json.loads(formarium("list", "swin*", "--json").stdout)[0]["presets"][0] == "nano"
    assert "imagefolder" in formarium("list", "--tasks").stdout
    assert "cosformer" in formarium("list", "--parts", "mixer").stdout
    shown = json.loads(formarium("show", "swin/tiny", "--json").stdout)
    assert shown["measured"][0]["params"] == pytest.approx(28.29e6, rel=0.01)
    assert "28.3 M" in formarium("show", "swin/tiny").stdout
    assert "fm.pretrain('bert/nano', 'bert', task=...)" in formarium("show", "bert").stdout  # an objective beside models
    assert "fm.apply(model, 'hvt')" in formarium("show", "hvt").stdout


def test_compare_and_train_on_the_command_line(tmp_path):
    asked = ["compare", VIT, POOL, "--task", "digits", "--steps", "3", "--lr", "0.001", "--batch-size", "8",
             "--out", str(tmp_path / "c")]
    done = formarium(*asked)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert (tmp_path / "c" / "report.html").exists()
    assert json.loads(formarium(*asked, "--json").stdout)["rows"][0]["model"] == VIT
    done = formarium("train", VIT, "--task", "digits", "--steps", "3", "--out", str(tmp_path / "t"))
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["compare", "vit/nan", "--task", "digits"], "nano"),
    (["compare", "vit/nano", "--task", "digit"], "digits"),
    (["compare", "vit/nano:patch=3", "--task", "digits"], "6x6 or 9x9"),
    (["train", "gpt/nano:mixer=pooling", "--task", "stdlib"], "no token may see a later one"),
    (["train", "vit/nano", "--task", "imagefolder:/nowhere/at/all"], "/nowhere/at/all"),
    (["list", "swim"], "swin"),
    (["show", "nothing_like_it"], "system"),
    (["list", "--module", "none.py"], "none.py"),
])
def test_what_a_user_gets_wrong_is_one_clear_line(tmp_path, arguments, words):
    done = formarium(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "file"), [
    (["train", VIT], "run.json"), (["compare", VIT], "compare.json"),
    (["pretrain", VIT, "droppos(decoder_dim=16,decoder_heads=2,decoder_depth=1)"], "run.json"),
])
def test_any_field_of_the_recipe_on_the_command_line(tmp_path, command, file):
    fields = {"schedule": "rsqrt", "cooldown": 0.5, "ema": 0.9, "repeats": 2, "mixup": 0.4, "head_weight_decay": 0.1}
    given = [word for name, value in fields.items() for word in ("--set", f"{name}={str(value).lower()}")]
    found = CliRunner().invoke(app, [*command, "--task", "digits", "--steps", "2", "--batch-size", "8", *given,
                                     "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    config = json.loads((tmp_path / "out" / file).read_text())["config"]
    assert fields.items() <= config.items()


def test_a_recipe_by_name_and_a_field_of_it(tmp_path):
    asked = ["train", VIT, "--task", "digits", "--steps", "1", "--recipe", "deit", "--set", "ema=0.5", "--set",
             "cutmix=none"]
    assert CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")]).exit_code == 0
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert (config["ema"], config["cutmix"], config["mixup"]) == (0.5, None, 0.8)


@pytest.mark.parametrize(("given", "words"), [
    (["smothing=0.1"], "unknown field of the recipe 'smothing'; did you mean smoothing"),
    (["ema=2"], "ema: Input should be less than 1, got '2'"),
    (["mixup=nan"], "mixup: Input should be a finite number, got 'nan'"),
    (["repeats=2.5"], "repeats: Input should be a valid integer"),
    (["schedule=cosin"], "schedule: Input should be 'cosine' or 'rsqrt', got 'cosin'"),
    (["ema"], "as ema=VALUE; got ema"),
    (["ema=0.5", "ema=0.6"], "once, as ema=VALUE; got ema=0.5, ema=0.6"),
    (["batch_size=4"], "batch_size has an option of its own: --batch-size"),
    (["model=vit/nano"], "unknown field of the recipe 'model'"),
])
def test_wrong_fields_of_the_recipe(tmp_path, given, words):
    given = [word for text in given for word in ("--set", text)]
    for command in (["train", VIT], ["compare", VIT], ["pretrain", VIT, "droppos"]):
        found = CliRunner().invoke(app, [*command, "--task", "digits", *given, "--out", str(tmp_path / "out")])
        assert isinstance(found.exception, FormariumError)
        assert words in str(found.exception)
        assert not (tmp_path / "out").exists()


def test_settings_in_python_suggest_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match="unknown setting 'warmpu'; did you mean warmup"):
        train(VIT, "digits", out=tmp_path / "out", warmpu=0.2)


def test_ctrl_c_on_the_command_line_keeps_the_state(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "formarium.cli", "train", VIT, "--task", "digits", "--steps",
                                "100000", "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not metrics.exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert list((tmp_path / "run").glob("state-*"))


def test_a_users_own_file_trains(tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "CARD = Card(" in block).split("```")[0]
    (tmp_path / "my_mixer.py").write_text(code)
    done = formarium("train", "gpt/nano:mixer=my_mixer,depth=1,dim=16,heads=2", "--task", "stdlib", "--steps", "2",
                     "--batch-size", "2", "--module", "my_mixer.py", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout


def test_the_measures_of_the_readme():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    lines = text.split("## Measures\n\n```python\n")[1].split("```")[0].splitlines()
    names = {"fm": fm}
    exec(lines[0], names)
    uncertain, cosine, compute, best = (eval(line, names) for line in lines[1:])
    assert uncertain.keys() == {"accuracy", "nll", "ece", "auroc", "aupr"}
    assert len(cosine) == 5
    assert compute > 1e15
    assert (best.genome, best.costs) == ((48, 8), (18432,))
    assert fm.frontier([(1, 0.5), (2, 0.6), (3, 0.4)]) == [(1, 0.5), (3, 0.4)]
    assert (512, 27, 8) in fm.iso_parameter(768, 12, 12)


def test_folder_names_are_safe():
    assert slug("gpt/nano:residual=denseformer(dilation=4,period=5)") == "gpt-nano-residual-denseformer-dilation-4-period-5"
