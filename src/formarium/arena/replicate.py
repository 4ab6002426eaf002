"""Does a paper's claim hold? `replicate("denseformer")` runs its study, judges by the rule of `verdict`, keeps the result.

Every run has one thread, so that the numbers do not depend on how many are side by side. A study's folder is named after a
hash of everything that its numbers come from: the same call goes on where it stopped, and a change starts afresh.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ..core.errors import DoesNotFit, FormariumError
from ..core.registry import find
from .jobs import Job, Record, Workers, full_disk, one_thread, processors, run_job
from .results import RUNS, data_print, engine, machine, results_folders, sources, versions, write_record
from .study import ROOM, Arm, Seed, Study, find_study
from .verdict import INCONCLUSIVE, Decides, Verdict, judge

CLOSE = 0.03  # by which parameters or MACs of matched arms may differ


@dataclass
class Replication:
    """What a study found. verdict and sentence are empty after a quick run. record: what the result's file holds."""

    study: str
    verdict: str
    sentence: str
    record: Record
    file: Path | None

    def __repr__(self) -> str:
        if not self.verdict:
            return f"{self.study}: ran; a quick run gives no verdict"
        return f"{self.study}: {self.verdict}. {self.sentence}"


def replicate(name: str, *, quick: bool = False, jobs: int | None = None, out: str | Path | None = None,
              watcher: Any = None) -> Replication:
    """Runs a study: "denseformer", or the path of a file of yours that ends in .py.

    quick: a few steps with one seed and one rate, no verdict, nothing is kept. jobs: runs side by side, each with one
    thread; the number of processors if None. out: the folder of runs and result; else runs lie in runs/replicate, and the
    result with the package where it can be written. The same call goes on where it stopped.
    """
    study, path = find_study(name)
    if jobs is not None and jobs < 1:
        raise DoesNotFit(f"jobs is the number of runs side by side, 1 or more, not {jobs}")
    jobs = jobs or processors()
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            return _Laboratory(study, path, True, jobs, Path(folder), Path(folder), watcher).do()
    base = Path(out) if out else RUNS
    results = Path(out) if out else results_folders()[0] if path.parent == ROOM else RUNS / "results"
    return _Laboratory(study, path, False, jobs, base, results, watcher).do()


class _Laboratory:
    def __init__(self, study: Study, path: Path, quick: bool, jobs: int, base: Path, results: Path, watcher: Any) -> None:
        from .compare import Watcher

        self.study, self.path, self.quick, self.jobs = study, path, quick, jobs
        self.watcher = watcher or Watcher()
        self.results = results
        self.seeds = study.seed_list[:1] if quick else study.seed_list
        lrs: tuple[float | None, ...] = study.lrs or (None,)
        self.lrs = lrs[len(lrs) // 2:][:1] if quick else lrs
        self.counts = costs(study)
        check_recipe(study)
        self.hashes = sources(study, path) | {"data": data_print(study)}
        digest = hashlib.sha256(json.dumps([self.hashes, engine()], sort_keys=True).encode()).hexdigest()
        self.folder = base / f"{study.name}-{digest[:8]}"

    def do(self) -> Replication:
        s = self.study
        first, *rest = self.seeds
        tuned = len(self.lrs) > 1
        total = len(s.arms) * (len(self.lrs) + len(rest)) + (len(self.seeds) if s.prepare else 0)
        self.watcher.plan(total)
        with one_thread(), self._runner() as run:
            if s.prepare:
                run([self._job("prepare", seed) for seed in self.seeds])
            tried = run([self._job("cell", first, arm, lr) for lr in self.lrs for arm in s.arms])
            best = {arm: self._best([c for c in tried if c["arm"] == arm]) if tuned else self.lrs[0] for arm in s.arms}
            cells = tried + run([self._job("cell", seed, arm, best[arm]) for seed in rest for arm in s.arms])
        if self.quick:
            bad = [c for c in cells if c["status"] != "done" and not (c["status"] == "diverged" and
                                                                      s.decides.diverged is not None)]
            if bad:
                raise FormariumError(f"the study {s.name}, arm {bad[0]['arm']!r}: {bad[0]['reason']}")
            return Replication(s.name, "", "", {"cells": cells}, None)
        record = self._record(cells, best)
        file = self.results / f"{s.name}.json"
        with full_disk(file.parent):
            write_record(file, record)
        return Replication(s.name, record["verdict"], record["sentence"], record, file)

    def _job(self, kind: str, seed: int, arm: str = "", lr: float | None = None) -> Job:
        rate = "" if lr is None else f"lr{lr:g}-"
        place = f"prepared/seed{seed}" if kind == "prepare" else f"cells/{_slug(arm)}/{rate}seed{seed}"
        return {"kind": kind, "study": str(self.path), "name": self.study.name, "arm": arm, "seed": seed, "lr": lr,
                "quick": self.quick, "folder": str(self.folder / place),
                "prepared": str(self.folder / f"prepared/seed{seed}") if self.study.prepare else None}

    @contextlib.contextmanager
    def _runner(self) -> Iterator[Callable[[Sequence[Job]], list[Record]]]:
        """What does jobs and gives their records in order: here, or in worker processes."""

        def told(job: Job, found: Record) -> Record:
            self.watcher.begin(" ".join(filter(None, (self.study.name, job["arm"] or "prepares"))), job["lr"], job["seed"])
            value = found.get("values", {}).get(self.study.decides.number)
            self.watcher.end(job["arm"], {"status": "done" if found["status"] == "done" else "failed",
                                          "reason": found.get("reason", ""),
                                          "test": {} if value is None else {self.study.decides.number: value}})
            return found

        if self.jobs == 1 or self.quick:
            yield lambda jobs: [told(job, run_job(job)) for job in jobs]
            return
        most = len(self.study.arms) * max(len(self.lrs), len(self.seeds) - 1)  # jobs that can be side by side
        with Workers(min(self.jobs, most)) as workers:
            yield lambda jobs: workers.do(jobs, told)

    def _best(self, cells: Sequence[Record]) -> float | None:
        """The rate that validates best; the first where no run came to its end."""
        done = {c["lr"]: c["values"]["val"] for c in cells if c["status"] == "done"}
        sign = 1 if val_better(self.study) == "higher" else -1
        return max(done, key=lambda lr: sign * done[lr]) if done else cells[0]["lr"]

    def _record(self, cells: list[Record], best: Mapping[str, float | None]) -> Record:
        from .. import __version__

        s, d = self.study, self.study.decides
        effects, verdict = judged(s, cells, best)
        ends = (min(s.lrs), max(s.lrs)) if len(s.lrs) > 2 else ()
        return {
            "study": s.name, "system": s.system, "claim": s.claim, "source": s.source,
            "arms": {a: _said(m) for a, m in s.arms.items()}, "deciding": list(s.deciding), "matched": s.matched,
            "task": task_name(s), "task_options": dict(s.task_options), "recipe": dict(s.recipe), "lrs": list(s.lrs),
            "seeds": list(s.seed_list), "decides": {k: v for k, v in vars(d).items() if v not in (None, "")},
            "published": s.published, "scale": s.scale, "cannot": s.cannot,
            "verdict": verdict.word, "sentence": sentence(s, cells, best, verdict), "reason": verdict.reason,
            "effects": effects, "mean": verdict.mean, "low": verdict.low, "high": verdict.high,
            "rates": dict(best), "rates_at_an_end": [a for a, lr in best.items() if lr in ends],
            "costs": self.counts, "cells": cells, "hashes": self.hashes,
            "versions": {"formarium": __version__, **versions()}, "machine": machine(),
            "seconds": round(sum(c["seconds"] for c in cells), 1),
            "cpu_seconds": round(sum(c["cpu_seconds"] for c in cells), 1), "date": date.today().isoformat(),
        }


# judging


def chosen(cells: Sequence[Record], arm: str, lr: float | None) -> dict[int, Record]:
    """The runs of an arm at its rate, by seed."""
    return {c["seed"]: c for c in cells if c["arm"] == arm and c["lr"] == lr}


def per_seed(d: Decides, cells: Sequence[Record], arm: str, lr: float | None) -> dict[int, float]:
    """The deciding number of an arm at its rate, of every seed that has one."""
    found = {}
    for seed, cell in sorted(chosen(cells, arm, lr).items()):
        if cell["status"] == "done" and d.number in cell["values"]:
            found[seed] = d.counted(cell["values"][d.number])
        elif cell["status"] == "diverged" and d.diverged is not None:
            found[seed] = d.diverged
    return found


def judged(study: Study, cells: Sequence[Record], best: Mapping[str, float | None]) -> tuple[dict[str, float], Verdict]:
    """The effect of every seed that has one, and the verdict, which needs every planned seed."""
    d, missing = study.decides, []
    values = {arm: per_seed(d, cells, arm, best[arm]) for arm in study.deciding}
    for arm in study.deciding:
        mine = chosen(cells, arm, best[arm])
        missing += [f"{arm}, seed {s}: {mine[s]['reason'] if s in mine else 'was not run'}"
                    for s in study.seed_list if s not in values[arm]]
    effects = {s: d.effect(*(of[s] for of in values.values())) for s in study.seed_list
               if all(s in of for of in values.values())}
    verdict = judge(list(effects.values()), d) if not missing else \
        Verdict(INCONCLUSIVE, reason=f"{len(missing)} of the runs that decide gave no number ({'; '.join(missing[:2])})")
    return {str(k): v for k, v in effects.items()}, verdict


def shown_effect(d: Decides, value: float | None, sign: str = "") -> str:
    """An effect with its unit, as people read it."""
    from .words import SHARES, known

    if not known(value):
        return "–"
    assert value is not None
    if d.relative:
        text = f"{100 * value:{sign}.1f}~%" if abs(value) < 10 else f"{100 * value:{sign}.0f}~%"
    elif d.number in SHARES:
        text = f"{100 * value:{sign}.1f}~points"
    else:
        text = f"{value:{sign}.3g}~{d.unit}".rstrip("~")
    return text.replace("-", "\u2212").replace("~", "\u00a0")  # a number and its unit stay on one line


def shown_number(d: Decides, value: float | None) -> str:
    """A value of the deciding number, as people read it."""
    from .words import SHARES, known, number

    if d.number not in SHARES and known(value) and value and not 0.01 <= abs(value) < 1000:
        return f"{value:.3g}".replace("-", "\u2212")
    return number(d.number, value, unit="\u00a0%")


def sentence(study: Study, cells: Sequence[Record], best: Mapping[str, float | None], verdict: Verdict) -> str:
    """What came out, in one sentence, whatever it is."""
    import statistics

    from .words import called

    d, n, name = study.decides, len(study.seed_list), called(study.decides.number)
    if verdict.mean is None:
        return f"No verdict on {name}: {verdict.reason}."
    means = [statistics.fmean(per_seed(d, cells, arm, best[arm]).values()) for arm in study.deciding]
    texts = [shown_number(d, m) for m in means]
    over = f"95 % interval {shown_effect(d, verdict.low, '+')} to {shown_effect(d, verdict.high, '+')}, {n} paired seeds"
    if d.kind == "target":
        said = f"{study.idea} reaches {name} {texts[0]}, {shown_effect(d, verdict.mean, '+')} from the published " \
               f"{d.target:g} ({over.replace('paired ', '')}); {shown_effect(d, d.bar)} was allowed"
    else:
        asked = f"{shown_effect(d, d.bar)} or more in its favour was asked for" if d.kind == "better" else \
            f"up to {shown_effect(d, d.bar)} worse was allowed"
        said = f"{study.idea} reaches {name} {texts[0]} against {texts[1]} of {study.deciding[1]}, an effect of " \
               f"{shown_effect(d, verdict.mean, '+')} ({over}); {asked}"
    return f"{said}."


# what is checked before anything is run


def costs(study: Study) -> dict[str, dict[str, float | None]]:
    """Parameters and MACs of every arm; raises where those that are said to be matched are not."""
    import torch

    from ..core.build import create_model
    from ..core.macs import count_macs
    from ..core.model import count_parameters
    from .train import build_on

    find(study.system)
    found: dict[str, dict[str, float | None]] = {}
    task = None if study.task is None else Seed(study, 0, Path()).task
    for arm, model in study.arms.items():
        if not isinstance(model, str):
            if task is None:
                raise DoesNotFit(f"arm {arm!r} is built for a task, and the study {study.name} has none")
            with torch.device("meta"):
                built = model(task)
        else:
            with torch.device("meta"):
                built = create_model(model) if task is None or card_domain(model) != task.domain else build_on(model, task)
        try:
            macs = float(count_macs(built, built.example(1)))
        except (RuntimeError, NotImplementedError, TypeError):  # what depends on values cannot be counted without them
            macs = None
        found[arm] = {"parameters": float(count_parameters(built)), "macs": macs}
    if study.matched in ("parameters", "macs") and len(study.deciding) == 2:
        a, b = (found[arm][study.matched] for arm in study.deciding)
        if a is None or b is None:
            raise DoesNotFit(f"{study.name}: the MACs of its arms cannot be counted, so they cannot be matched in them")
        if abs(a - b) > CLOSE * min(a, b):
            idea, control = study.deciding
            raise DoesNotFit(f"{study.name}: arms matched in {study.matched} differ by {abs(a - b) / min(a, b):.1%} "
                             f"({idea} {a:,.0f}, {control} {b:,.0f}); at most {CLOSE:.0%} is allowed")
    return found


def card_domain(model: str) -> str:
    return find(re.split(r"[/:+]", model)[0].strip()).card.domain


def check_recipe(study: Study) -> None:
    """Misspelt fields of the recipe cost nothing."""
    from .config import RunConfig, checked

    checked(RunConfig, model="model", task="task", lr=study.lrs[0] if study.lrs else 1e-3, **study.recipe)


def task_name(study: Study) -> str:
    return "" if study.task is None else study.task if isinstance(study.task, str) else Seed(study, 0, Path()).task.name


def val_better(study: Study) -> str:
    if study.val_better is not None:
        return study.val_better
    if study.task is not None:
        return "higher" if Seed(study, 0, Path()).task.higher_is_better else "lower"
    return study.decides.better


def _said(model: Arm) -> str:
    return model if isinstance(model, str) else f"{getattr(model, '__name__', 'a model')} of the study's file"


def _slug(text: str) -> str:
    from .train import slug

    return slug(text)
