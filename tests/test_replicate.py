"""The replication laboratory: its rule on planted cases, its runs on tiny real ones, and every study once in small."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("scipy")

import formarium as fm
from formarium.arena import replicate as lab
from formarium.arena.replicate import judged, replicate, sentence
from formarium.arena.replication_page import Row, _place, markdown, page, write_replication
from formarium.arena.results import changed, read_results, sources, stale, summaries
from formarium.arena.study import Cell, Study, find_study, shortened, studies
from formarium.arena.verdict import DOES_NOT_HOLD, HOLDS, INCONCLUSIVE, RULE, Decides, interval, judge
from formarium.core.errors import BadData, DoesNotFit, FormariumError, UnknownName
from formarium.core.registry import PACKAGE
from formarium.tasks.registry import get_task

VIT = "vit/nano:depth=1,dim=16,heads=2,patch=4"
TINY = f'''
"""A tiny study, written for a test."""
from formarium.arena.study import Decides, Study

STUDY = Study(
    system="vit", claim="It is better.", source="nowhere", arms={{"idea": "{VIT}", "control": "{VIT},pool=mean"}},
    matched="parameters", task="digits", recipe={{"steps": 4, "batch_size": 8}}, lrs=(1e-3, 3e-3), seeds=3,
    decides=Decides("accuracy", better="higher", at_least=0.01), published="none", scale="tiny", cannot="anything",
)
'''
# a study whose numbers are planted, so that it costs nothing
PLANTED = '''
from pathlib import Path
from formarium.arena.study import Decides, Study
from formarium.arena.train import Diverged

def prepare(seed):
    (seed.folder / "made.txt").write_text(str(seed.seed))

def measure(cell):
    assert (cell.prepared / "made.txt").read_text() == str(cell.seed)
    if cell.arm == "control" and MODE == "diverges" or cell.arm == "idea" and MODE == "idea diverges" and cell.seed == 2:
        raise Diverged("the loss became nan at step 7")
    if cell.arm == "shown":
        raise RuntimeError("broken on purpose")
    if cell.arm == "idea" and MODE == "nan":
        return {"loss": float("nan"), "val": 1.0}
    if MODE == "keyless":
        return {"other": 1.0}
    if MODE == "bug":
        return {}["loss"]
    loss = {"idea": 1.0, "control": 2.0}[cell.arm] + 0.01 * cell.seed
    return {"loss": loss, "val": loss + (cell.lr - 0.01) ** 2}

STUDY = Study(
    system="vit", claim="c", source="s", arms={"idea": "vit/nano", "control": "vit/nano", "shown": "vit/nano"},
    matched="steps", lrs=(0.001, 0.01, 0.1), seeds=3, published="p", scale="s", prepare=prepare, measure=measure,
    decides=Decides("loss", at_least=0.1, diverged=WORST),
)
'''


def planted(folder: Path, mode: str = "", worst: float | None = None) -> str:
    file = folder / f"planted_{mode.replace(' ', '_') or 'plain'}{'' if worst is None else '_worst'}.py"
    file.write_text(PLANTED.replace("MODE", repr(mode)).replace("WORST", repr(worst)))
    return str(file)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny study, run once with one process."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(TINY)
    return folder, replicate(str(folder / "tiny.py"), jobs=1, out=folder / "one")


def numbers(record):
    """A record without what a clock says."""
    clock = ("seconds", "cpu_seconds", "date")
    cells = [{k: v for k, v in c.items() if k not in clock} for c in record["cells"]]
    return {k: v for k, v in record.items() if k not in clock} | {"cells": cells}


# the rule


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", [0.001, 0.02, 1.0])
def test_identical_arms_hold_in_fewer_than_one_of_twenty_draws(seeds, noise, monkeypatch):
    monkeypatch.setattr("formarium.arena.verdict.DRAWS", 500)
    dice, decides = np.random.default_rng(seeds), Decides("x", at_least=0.01)
    words = []
    for _ in range(2000):
        idea, control = dice.normal(0, noise, (2, seeds))
        words.append(judge([decides.effect(a, b) for a, b in zip(idea, control, strict=True)], decides).word)
    assert words.count(HOLDS) < 0.05 * len(words)
    assert words.count(HOLDS) > 0 or noise < 0.01  # where the noise could pass for the effect, chance sometimes does
    if noise == 0.001:
        assert words.count(DOES_NOT_HOLD) > 0.9 * len(words)  # tight around zero
    if noise == 1.0:
        assert words.count(INCONCLUSIVE) > 0.9 * len(words)


@pytest.mark.parametrize(("effects", "word"), [
    ([0.30, 0.32, 0.31], HOLDS),
    ([0.001, -0.001, 0.0], DOES_NOT_HOLD),
    ([-0.30, -0.32, -0.31], DOES_NOT_HOLD),
    ([0.5, -0.4, 0.1], INCONCLUSIVE),
    ([0.009, 0.0091, 0.0089], DOES_NOT_HOLD),  # surely there, and surely too small
    ([0.0099, 0.0105, 0.0090], INCONCLUSIVE),  # above zero, its mean just below what counts
    ([0.2, 0.2, 0.2], HOLDS),  # no noise at all
])
def test_rule_on_planted_effects(effects, word):
    assert judge(effects, Decides("x", at_least=0.01)).word == word


@pytest.mark.parametrize(("effects", "word"), [
    ([0.0, 0.001, -0.001], HOLDS), ([-0.3, -0.31, -0.3], DOES_NOT_HOLD), ([0.3, -0.5, 0.1], INCONCLUSIVE)])
def test_rule_of_claims_to_be_as_good(effects, word):
    assert judge(effects, Decides("x", no_worse_by=0.01)).word == word


@pytest.mark.parametrize(("values", "word"), [
    ([0.386, 0.388, 0.387], HOLDS), ([0.42, 0.421, 0.42], DOES_NOT_HOLD), ([0.35, 0.351, 0.35], DOES_NOT_HOLD),
    ([0.37, 0.40, 0.41], INCONCLUSIVE)])
def test_rule_against_a_published_number(values, word):
    decides = Decides("mse", target=0.386, within=0.03)
    assert judge([decides.effect(v) for v in values], decides).word == word


def test_effects_are_positive_where_the_idea_is_better():
    assert Decides("loss", better="lower", at_least=1).effect(2.0, 3.0) == 1
    assert Decides("accuracy", better="higher", at_least=1).effect(2.0, 3.0) == -1
    assert Decides("loss", better="lower", by="ratio", at_least=0.1).effect(3.0, 4.0) == 0.25
    assert Decides("gain", better="higher", by="ratio", at_least=0.1).effect(-1.0, -2.0) == 0.5
    with pytest.raises(DoesNotFit, match="no ratio"):
        Decides("loss", by="ratio", at_least=0.1).effect(1.0, 0.0)


def test_interval_is_never_narrower_than_either_kind():
    from scipy.stats import t

    dice = np.random.default_rng(0)
    for values in (dice.normal(size=3), dice.normal(size=5), dice.exponential(size=12) ** 3):
        low, high = interval(list(values))
        mean, half = values.mean(), t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        draws = values[np.random.default_rng(5).integers(len(values), size=(20_000, len(values)))].mean(1)
        slack = 0.05 * (high - low)  # another sample of draws
        assert low <= mean - half + 1e-12
        assert high >= mean + half - 1e-12
        assert low <= np.quantile(draws, 0.025) + slack
        assert high >= np.quantile(draws, 0.975) - slack
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])
    with pytest.raises(DoesNotFit, match="two seeds"):
        interval([1.0])


@pytest.mark.parametrize(("given", "says"), [
    ({}, "exactly one"), ({"at_least": 0.1, "no_worse_by": 0.1}, "exactly one"), ({"at_least": 0.0}, "above zero"),
    ({"target": 1.0}, "within"), ({"at_least": 0.1, "within": 0.1}, "needs a target"),
    ({"at_least": 0.1, "better": "smaller"}, "lower, higher"), ({"at_least": 0.1, "by": "factor"}, "ratio, difference")])
def test_deciding_numbers_that_decide_nothing(given, says):
    with pytest.raises(DoesNotFit, match=says):
        Decides("x", **given)


# what a study must say

FINE = {"system": "vit", "claim": "c", "source": "s", "arms": {"a": VIT, "b": VIT}, "matched": "steps",
        "decides": Decides("accuracy", better="higher", at_least=0.1), "published": "p", "scale": "s", "task": "digits"}


@pytest.mark.parametrize(("change", "says"), [
    ({"seeds": 2}, "3 seeds"), ({"seeds": (1, 1, 2)}, "once"), ({"arms": {"a": VIT}}, "1 arm"),
    ({"matched": "parameter"}, "did you mean parameters"), ({"claim": " "}, "claim"), ({"lrs": (0.1, 0.1)}, "once")])
def test_studies_that_are_none(change, says):
    with pytest.raises(FormariumError, match=says):
        Study(**FINE | change)


def test_arms_that_are_said_to_be_matched_and_are_not():
    with pytest.raises(DoesNotFit, match=r"matched in parameters differ by .*at most 3%"):
        lab.costs(Study(**FINE | {"matched": "parameters", "arms": {"a": VIT, "b": VIT.replace("depth=1", "depth=2")}}))
    with pytest.raises(DoesNotFit, match="matched in macs differ"):
        lab.costs(Study(**FINE | {"matched": "macs", "arms": {"a": VIT, "b": VIT.replace("patch=4", "patch=2")}}))
    found = lab.costs(Study(**FINE | {"matched": "parameters", "arms": {"a": VIT, "b": VIT, "shown": "vit/nano"}}))
    assert found["a"] == found["b"] != found["shown"]  # further arms are counted, not matched
    assert all(v > 0 for row in found.values() for v in row.values())


def test_an_arm_may_be_a_function(tmp_path):
    def control(task):
        return fm.create_model(VIT, **task.model_options(), pool="mean")

    study = Study(**FINE | {"arms": {"a": VIT, "b": control}, "matched": "parameters", "recipe": {"steps": 3}})
    assert lab.costs(study)["b"]["parameters"] > 0
    named = Cell(study, 0, tmp_path / "named", arm="a", model=f"{VIT},pool=mean", lr=1e-3).train()[1]
    model, built = Cell(study, 0, tmp_path / "built", arm="b", model=control, lr=1e-3).train()
    assert built == named
    again, read = Cell(study, 0, tmp_path / "built", arm="b", model=control, lr=1e-3).train()
    assert read == built
    task = get_task("digits")
    assert task.evaluate(again, "test") == task.evaluate(model, "test")


@pytest.mark.parametrize("change", [{"step": 3}, {"steps": 0}, {"steps": 3, "seconds": 1.0}])
def test_a_wrong_recipe_costs_nothing(change):
    with pytest.raises(FormariumError):
        lab.check_recipe(Study(**FINE | {"recipe": change}))


def test_names_that_are_unknown(tmp_path):
    with pytest.raises(UnknownName, match="did you mean denseformer"):
        replicate("densformer")
    with pytest.raises(FormariumError, match="no file"):
        replicate(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(FormariumError, match="has no STUDY"):
        replicate(str(tmp_path / "empty.py"))
    for old, new, near in (("vit/nano:depth=1", "vti/nano:depth=1", "vit"), ('"digits"', '"digit"', "digits"),
                           ('system="vit"', 'system="vitt"', "vit"), ("pool=mean", "pol=mean", "pool")):
        file = tmp_path / f"wrong_{near}_{len(new)}.py"
        file.write_text(TINY.replace(old, new))
        with pytest.raises(UnknownName, match=f"did you mean {near}"):
            replicate(str(file), jobs=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DoesNotFit, match="1 or more"):
        replicate("denseformer", jobs=0)


def test_no_data_and_no_network(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def down(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.delenv("FORMARIUM_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", down)
    (tmp_path / "far.py").write_text(TINY.replace(VIT, "gpt/nano:depth=1,dim=16").replace(",pool=mean", ",bias=False")
                                     .replace('"digits"', '"shakespeare"'))
    with pytest.raises(BadData, match=r"could not be had .*FORMARIUM_DATA"):
        replicate(str(tmp_path / "far.py"), jobs=1, out=tmp_path / "out")


# running


def test_result_holds_all_that_was_done(tiny):
    folder, found = tiny
    record = json.loads((folder / "one" / "tiny.json").read_text())
    assert record == json.loads(json.dumps(found.record))
    assert found.verdict in (HOLDS, DOES_NOT_HOLD, INCONCLUSIVE)
    assert {(c["arm"], c["seed"]) for c in record["cells"]} == {(a, s) for a in ("idea", "control") for s in (0, 1, 2)}
    assert len(record["cells"]) == 2 * (2 + 2)
    for arm, rate in record["rates"].items():
        tried = {c["lr"]: c["values"]["val"] for c in record["cells"] if c["arm"] == arm and c["seed"] == 0}
        assert tried[rate] == max(tried.values())
        assert {c["lr"] for c in record["cells"] if c["arm"] == arm and c["seed"]} == {rate}
    by = {(c["arm"], c["seed"], c["lr"]): c["values"]["accuracy"] for c in record["cells"]}
    for seed in (0, 1, 2):
        idea, control = (by[a, seed, record["rates"][a]] for a in ("idea", "control"))
        assert record["effects"][str(seed)] == pytest.approx(idea - control)
    assert record["mean"] == pytest.approx(sum(record["effects"].values()) / 3)
    assert record["low"] <= record["mean"] <= record["high"]
    assert record["costs"]["idea"]["parameters"] == pytest.approx(record["costs"]["control"]["parameters"], rel=0.03)
    assert set(record["versions"]) >= {"formarium", "torch", "python"}
    assert record["seconds"] == pytest.approx(sum(c["seconds"] for c in record["cells"]), abs=0.1)
    assert "one thread" in record["machine"]
    assert "3 paired seeds" in record["sentence"]


def test_two_runs_and_two_processes_give_the_same_numbers(tiny):
    folder, found = tiny
    other = replicate(str(folder / "tiny.py"), jobs=2, out=folder / "two")
    assert numbers(other.record) == numbers(found.record)
    assert len({c["values"]["loss"] for c in found.record["cells"]}) == len(found.record["cells"])  # so equality says much


def test_finished_runs_are_read(tiny, monkeypatch):
    folder, found = tiny
    monkeypatch.setattr("formarium.arena.study.Cell.train", lambda *args, **kwargs: pytest.fail("a finished run ran again"))
    assert numbers(replicate(str(folder / "tiny.py"), jobs=1, out=folder / "one").record) == numbers(found.record)


def test_a_killed_run_goes_on(tiny):
    folder, found = tiny
    (folder / "killed").mkdir()
    file = folder / "killed" / "tiny.py"
    file.write_text(TINY)
    command = [sys.executable, "-m", "formarium.cli", "replicate", str(file), "--jobs", "2", "--out", str(file.parent)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (done := list(folder.glob("killed/tiny-*/cells/*/*/cell.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert done
    assert not (folder / "killed" / "tiny.json").exists()
    when = {p: p.stat().st_mtime_ns for p in done}
    again = replicate(str(file), jobs=1, out=folder / "killed")
    assert numbers(again.record) == numbers(found.record)
    assert {p: p.stat().st_mtime_ns for p in done} == when


def test_a_changed_study_starts_afresh(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(TINY)
    before = sources(*find_study(str(file)))
    file.write_text(TINY.replace('"""A tiny study, written for a test."""', "# nothing\n\n# else"))
    assert sources(*find_study(str(file))) == before  # comments and docstrings do not count
    file.write_text(TINY.replace('"steps": 4', '"steps": 5'))
    assert {k for k, v in sources(*find_study(str(file))).items() if v != before[k]} == {"tiny.py"}
    assert set(before) == {"tiny.py", "papers/backbones/vit.py"}


def test_own_measure_prepare_and_choice_of_rates(tmp_path):
    found = replicate(planted(tmp_path), jobs=1, out=tmp_path / "out")
    assert found.verdict == HOLDS
    assert found.record["rates"]["idea"] == found.record["rates"]["control"] == 0.01
    assert found.record["rates_at_an_end"] == ["shown"]  # it failed at every rate and keeps the first
    assert found.record["effects"] == pytest.approx({"0": 1.0, "1": 1.0, "2": 1.0})
    broken = [c for c in found.record["cells"] if c["arm"] == "shown"]
    assert len(broken) == 5
    assert {(c["status"], c["reason"]) for c in broken} == {("failed", "broken on purpose")}


@pytest.mark.parametrize("mode", ["diverges", "idea diverges", "nan"])
def test_what_diverged_gives_no_verdict(tmp_path, mode):
    found = replicate(planted(tmp_path, mode), jobs=1, out=tmp_path / "out")
    assert found.verdict == INCONCLUSIVE
    assert found.record["mean"] is None
    assert "nan" in found.record["reason"]
    assert {c["status"] for c in found.record["cells"] if c["arm"] == ("control" if mode == "diverges" else "idea")} \
        >= {"diverged"}


def test_what_diverged_counts_as_the_worst_value_where_the_study_says_so(tmp_path):
    found = replicate(planted(tmp_path, "diverges", worst=5.0), jobs=1, out=tmp_path / "out")
    assert found.verdict == HOLDS
    assert found.record["effects"] == pytest.approx({"0": 4.0, "1": 3.99, "2": 3.98})
    found = replicate(planted(tmp_path, "idea diverges", worst=1.5), jobs=1, out=tmp_path / "out")
    assert found.record["effects"] == pytest.approx({"0": 0.5, "1": 0.49, "2": 0.0})  # the control is cut off


@pytest.mark.parametrize(("mode", "error", "says"), [
    ("keyless", FormariumError, "measures other, but no 'loss'"), ("bug", KeyError, "loss")])
def test_mistakes_of_a_study_are_told(tmp_path, mode, error, says):
    with pytest.raises(error, match=says):
        replicate(planted(tmp_path, mode), jobs=1, out=tmp_path / "out")


def test_mistakes_in_a_worker_are_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)arm 'idea', seed 0.*KeyError"):
        replicate(planted(tmp_path, "bug"), jobs=2, out=tmp_path / "out")


def test_a_seed_that_is_missing_gives_no_verdict():
    study = Study(**FINE)
    cells = [{"arm": a, "lr": 0.1, "seed": s, "status": "done", "reason": "", "values": {"accuracy": v}}
             for s in (0, 1, 2) for a, v in (("a", 0.9), ("b", 0.1))]
    best = {"a": 0.1, "b": 0.1}
    assert judged(study, cells, best)[1].word == HOLDS
    effects, verdict = judged(study, cells[:-1], best)
    assert verdict.word == INCONCLUSIVE
    assert "b, seed 2: was not run" in verdict.reason
    assert set(effects) == {"0", "1"}
    assert sentence(study, cells[:-1], best, verdict).startswith("No verdict on accuracy")


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    from formarium.arena import config

    file, written, real = planted(tmp_path), [], config.write_json

    def full(path, value):
        written.append(path)
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(config, "write_json", full)
    with pytest.raises(FormariumError, match=r"cannot be written .*Finished runs are kept; make room"):
        replicate(file, jobs=1, out=tmp_path / "out")
    monkeypatch.setattr(config, "write_json", lambda path, value: (written.append(path), real(path, value)))
    before = len(written)
    assert replicate(file, jobs=1, out=tmp_path / "out").verdict == HOLDS
    assert len(written) - before == 3 + 9 + 6 + 1 - 5  # prepared, tried, more seeds, the result; less what was finished


def test_a_disk_that_fills_while_weights_are_saved(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)

    def save(*args):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("formarium.arena.train.save", save)
    with pytest.raises(FormariumError, match="make room"):
        replicate(str(tmp_path / "tiny.py"), jobs=1, out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("cell.json"))


# quick


@pytest.mark.parametrize("name", studies())
def test_study_runs(name, monkeypatch, tmp_path):
    """Every path of every study, in small. Data that is not here is not downloaded for a test."""
    pooch = pytest.importorskip("pooch")

    def down(*args, **kwargs):
        raise OSError("not downloaded for a test")

    monkeypatch.setattr(pooch, "retrieve", down)
    monkeypatch.chdir(tmp_path)
    try:
        found = replicate(name, quick=True)
    except BadData as error:
        if "not downloaded" in str(error) or "FORMARIUM_DATA" in str(error):
            pytest.skip(str(error))
        raise
    assert (found.verdict, found.file) == ("", None)
    assert {c["arm"] for c in found.record["cells"]} == set(find_study(name)[0].arms)
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_fails_where_an_arm_does(tmp_path):
    with pytest.raises(FormariumError, match="arm 'shown': broken on purpose"):
        replicate(planted(tmp_path), quick=True)


def test_shortened_tasks_look_at_little():
    task, model = get_task("digits"), fm.create_model(VIT, num_classes=10, in_chans=1, img_size=8)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    shortened(task).evaluate(model, "val")
    assert seen == [16]
    task.evaluate(model, "val")
    assert sum(seen) == 16 + task.info.sizes["val"]  # the task itself is as it was


# results


def test_results_are_known_and_stale_ones_told(tiny, tmp_path, monkeypatch):
    _, found = tiny
    room = tmp_path / "studies"
    (room / "results").mkdir(parents=True)
    (room / "tiny.py").write_text(TINY)
    (room / "other.py").write_text(TINY)
    for module in (sys.modules["formarium.arena.results"], sys.modules["formarium.arena.study"]):
        monkeypatch.setattr(module, "ROOM", room)
    monkeypatch.chdir(tmp_path)
    (room / "results" / "tiny.json").write_text(json.dumps(found.record))
    assert set(read_results()) == {"tiny"}
    assert stale(found.record, data=True) == ""
    assert changed() == {"other": "was never run"}
    rows = {r["study"]: r for r in summaries("vit")}
    assert rows["tiny"]["verdict"] == found.verdict
    assert rows["other"]["verdict"] == "not run"
    assert summaries("swin") == []
    (room / "tiny.py").write_text(TINY.replace('"steps": 4', '"steps": 5'))
    assert stale(found.record) == "changed since: tiny.py"
    assert set(changed()) == {"tiny", "other"}
    assert next(r for r in summaries() if r["study"] == "tiny")["verdict"].endswith(", STALE")
    other_data = found.record | {"hashes": found.record["hashes"] | {"data": "0" * 16}}
    (room / "tiny.py").write_text(TINY)
    assert stale(other_data) == ""  # looking at data takes time: only where it is asked for
    assert stale(other_data, data=True) == "changed since: data"
    assert stale(found.record | {"study": "gone"}) == "the study is gone"


def test_results_that_stand_are_of_studies_and_whole():
    for file in sorted((PACKAGE / "studies" / "results").glob("*.json")):
        record = json.loads(file.read_text())
        study, _ = find_study(file.stem)
        assert record["study"] == file.stem
        assert record["verdict"] in (HOLDS, DOES_NOT_HOLD, INCONCLUSIVE)
        if not stale(record):  # then its verdict follows from its cells by the rule of today
            effects, verdict = judged(study, record["cells"], record["rates"])
            assert (effects, verdict.word) == (record["effects"], record["verdict"])
            assert len(effects) == len(study.seed_list) or verdict.word == INCONCLUSIVE


# the report


class Read(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.said = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture
def found(tiny, tmp_path):
    """Results of every kind: plain, with broken runs, stale, against a target, without a verdict, none at all."""
    _, one = tiny
    broken = replicate(planted(tmp_path), jobs=1, out=tmp_path / "out").record
    none = replicate(planted(tmp_path, "diverges"), jobs=1, out=tmp_path / "out").record
    target = {k: v for k, v in one.record.items() if k != "decides"} | {
        "deciding": ["idea"], "decides": {"number": "accuracy", "better": "higher", "target": 0.9, "within": 0.05},
        "claim": "a | b <script>alert(1)</script>", "lrs": [], "task": ""}
    return [Row("a_tiny", one.record), Row("b_broken", broken), Row("c_stale", one.record, "changed since: <x>.py"),
            Row("d_target", target), Row("e_none", none), Row("denseformer", None)]


def test_page_shows_every_study_and_loads_nothing(found):
    text = page(found)
    read = Read(text)
    said = " ".join("".join(read.said).split())
    assert not [a for _, a in read.tags if a.get("src") or re.match("https?:", a.get("href") or "")]
    assert not re.search(r"@import|url\(", text)
    assert "<script>alert" not in text
    assert "changed since: <x>.py" in said
    assert "$" not in said.replace("${", "")
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    run = {r.name for r in found if r.record}
    assert {a["href"][1:] for _, a in read.tags if (a.get("href") or "").startswith("#")} == run <= set(ids)
    drawn = [a for t, a in read.tags if t == "svg" and a.get("viewbox") == "0 0 100 26"]
    assert len(drawn) == 2 * 4  # e_none has no effect
    for row in found:
        assert row.verdict in said
        if row.record:
            assert " ".join(row.record["sentence"].split()) in said
    assert "shown, seed 0, rate 0.001: failed, broken on purpose" in said
    for word in ("None", "nan ", "inf "):
        assert word not in said.replace("became nan at", "")


def test_table_sorts_by_numbers(found):
    read = Read(page(found))
    cells = [a for t, a in read.tags if t == "td" and "data-v" in a]
    assert all(re.fullmatch(r"-?[\d.e+-]*", a["data-v"]) for a in cells)
    assert len([1 for t, a in read.tags if t == "th" and "data-first" in a]) == 9


def test_markdown_has_a_line_a_study(found):
    text = markdown(found)
    table = [line for line in text.splitlines() if line.startswith("|") and line.count(" | ") == 8]
    assert len(table) == 2 + len(found)
    assert all(len(re.split(r"(?<!\\)\|", line)) == 11 for line in table)  # bars in texts are escaped
    assert "**HOLDS**" in next(line for line in table if "b_broken" in line)
    assert "(stale)" in next(line for line in table if "c_stale" in line)
    assert "not run" in next(line for line in table if "denseformer" in line)
    assert "- shown, seed 0, rate 0.001: failed, broken on purpose" in text
    assert RULE in text
    assert "anything" in text.partition("## What cannot be tested here")[2]


def test_effects_stand_in_order_on_the_axis():
    places = [_place(x) for x in (-1e9, -10, -1, -0.1, 0, 0.1, 1, 10, 1e9)]
    assert places == sorted(set(places))
    assert (places[0], places[4], places[-1]) == (0, 50, 100)


def test_report_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("formarium.arena.replication_page.read_results", dict)
    files = write_replication(tmp_path)
    assert [f.name for f in files] == ["replication.md", "replication.html"]
    assert f"{len(studies())} studies: {len(studies())} not run." in files[0].read_text()
    assert "<section hidden>" in files[1].read_text()


# the command line


def formarium(*words, **more):
    return subprocess.run([sys.executable, "-m", "formarium.cli", *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


def test_command(tmp_path):
    done = formarium("replicate", planted(tmp_path), "--jobs", 2, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["verdict"] == HOLDS
    both = formarium("replicate", planted(tmp_path, "keyless"), planted(tmp_path), "--jobs", 1, "--out", tmp_path / "out")
    assert both.returncode == 2  # one cannot be run, the other is
    assert "planted_plain: HOLDS" in both.stdout
    assert "1 of 2 studies did not run" in both.stderr
    wrong = formarium("replicate", "densformer")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("formarium: unknown study 'densformer'; did you mean denseformer")


def test_command_lists_studies():
    listed = formarium("replicate", "--json")
    assert {r["study"] for r in json.loads(listed.stdout)} >= {"denseformer"}
    shown = formarium("show", "denseformer", "--json")
    assert [r["study"] for r in json.loads(shown.stdout)["replicated"]] == ["denseformer"]


def test_importing_studies_is_light():
    code = "import sys, formarium, formarium.studies, formarium.arena.study; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
