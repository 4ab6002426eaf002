"""Does a paper's claim hold? `replicate("denseformer")` runs its study, judges by the rule of `verdict`, keeps the result.

Every run has one thread, so that the numbers do not depend on how many are side by side. A study's folder is named after a
hash of everything that its numbers come from: the same call goes on where it stopped, and a change starts afresh.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import BadData, DoesNotFit, FormariumError, UnknownName
from ..core.registry import _CARD, PACKAGE, PART_KINDS, find, named_parts, systems
from .study import ROOM, Arm, Cell, Seed, Study, find_study, studies, system_of
from .verdict import INCONCLUSIVE, Decides, Verdict, judge

CLOSE = 0.03  # by which parameters or MACs of matched arms may differ
RUNS = Path("runs") / "replicate"
FREE = 1 << 20  # bytes; less is a full disk
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
Job = dict[str, Any]
Record = dict[str, Any]


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


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


# one job


@cache
def _loaded(path: str) -> Study:
    return find_study(path)[0]


def run_job(job: Job) -> Record:
    """Does one job in its folder and gives its record; a finished one is read. What a user can mend raises."""
    import numpy as np
    import torch

    from .config import read_json, write_json
    from .train import Diverged

    folder = Path(job["folder"])
    file = folder / "cell.json"
    about = {"arm": job["arm"], "lr": job["lr"], "seed": job["seed"]}
    if file.exists():
        return read_json(file)
    study = _loaded(job["study"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])
    random.seed(job["seed"])
    begun, worked, values, reason, status = time.perf_counter(), time.process_time(), {}, "", "done"
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if job["kind"] == "prepare":
                assert study.prepare is not None
                study.prepare(Seed(study, job["seed"], folder, job["quick"]))
            else:
                prepared = Path(job["prepared"]) if job["prepared"] else None
                arm = job["arm"]
                cell = Cell(study, job["seed"], folder, job["quick"], arm, study.arms[arm], job["lr"], prepared)
                values, status, reason = _numbers(study, study.measure(cell))
        except Diverged as error:
            status, reason = "diverged", str(error)
        except Exception as error:
            if _is_full(error, folder):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            if not isinstance(error, RuntimeError | ArithmeticError | MemoryError):
                raise  # a mistake in the study, or one that a user can mend
            status, reason = "failed", (str(error).splitlines() or [type(error).__name__])[0]
        if status != "done" and job["kind"] == "prepare":
            raise FormariumError(f"the study {study.name} cannot be prepared for seed {job['seed']}: {reason}")
        found = about | {"status": status, "reason": reason, "values": values,
                         "seconds": round(time.perf_counter() - begun, 3),
                         "cpu_seconds": round(time.process_time() - worked, 3)}
        write_json(file, found)
    return found


def _numbers(study: Study, found: Mapping[str, float]) -> tuple[dict[str, float], str, str]:
    """What was measured, checked: the deciding number is there, and so is "val" where it chooses; all that is finite."""
    needed = [study.decides.number, *["val"] * (len(study.lrs) > 1)]
    for name in needed:
        if name not in found:
            raise FormariumError(f"the study {study.name} measures {', '.join(found)}, but no {name!r}, which "
                                 f"{'chooses the rate' if name == 'val' else 'decides'}")
    values = {k: float(v) for k, v in found.items()}
    lost = [k for k in needed if not math.isfinite(values[k])]
    kept = {k: v for k, v in values.items() if math.isfinite(v)}
    return (kept, "diverged", f"{lost[0]} is {values[lost[0]]}") if lost else (kept, "done", "")


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Within, a file that cannot be written is an error that a user can mend, since what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FormariumError(f"{folder} cannot be written ({error.strerror or error}). Finished runs are kept"
                             f"{'; make room on the disk' if full else ''}, and the same command goes on") from error


def _is_full(error: BaseException, folder: Path) -> bool:
    return "No space left" in str(error) or shutil.disk_usage(folder).free < FREE


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# several jobs side by side


class Workers:
    """Processes with one thread each that do jobs, which come and go as lines of JSON. They end when their input does."""

    def __init__(self, count: int) -> None:
        self.count, self.idle = count, queue.SimpleQueue[subprocess.Popen[str]]()

    def __enter__(self) -> "Workers":
        alone = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.all: list[subprocess.Popen[str]] = []
        modules = json.dumps([str(e.path) for e in systems().values() if e.module_name.startswith("formarium_user.")])
        for _ in range(self.count):
            self.all.append(subprocess.Popen([sys.executable, "-m", __name__, modules], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, text=True, env=os.environ | alone))
            self.idle.put(self.all[-1])
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is KeyboardInterrupt:  # they have heard it too and save their states
            deadline = time.monotonic() + 10
            while any(w.poll() is None for w in self.all) and time.monotonic() < deadline:
                time.sleep(0.05)
        for worker in self.all:
            assert worker.stdin is not None
            with contextlib.suppress(OSError):
                worker.stdin.close()
        for worker in self.all:
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()

    def do(self, jobs: Sequence[Job], told: Callable[[Job, Record], Record]) -> list[Record]:
        lock, stop = threading.Lock(), threading.Event()

        def one(job: Job) -> Record | None:
            if stop.is_set():
                return None
            worker = self.idle.get()
            try:
                found = self._ask(worker, job)
            except BaseException:
                stop.set()  # what is not begun stays undone
                raise
            finally:
                self.idle.put(worker)
            with lock:
                return told(job, found)

        pool = ThreadPoolExecutor(self.count)
        try:
            waiting = [pool.submit(one, job) for job in jobs]
            return [r for r in (f.result() for f in waiting) if r is not None]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _ask(worker: "subprocess.Popen[str]", job: Job) -> Record:
        assert worker.stdin is not None
        assert worker.stdout is not None
        where = f"study {job['name']}, arm {job['arm']!r}, seed {job['seed']}"
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise FormariumError(f"{where}: the process that ran it ended (status {worker.poll()}), perhaps for want of "
                                 "memory. Finished runs are kept; try again with --jobs 1")
        answer = json.loads(line)
        if "error" in answer:
            raise FormariumError(answer["error"]) if answer["mendable"] else RuntimeError(f"{where}\n{answer['error']}")
        return answer["found"]


def _work() -> None:
    """The life of a worker: jobs come on the standard input, answers leave on the standard output."""
    from ..core.registry import add_module

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a study prints must not stand among the answers
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(1)  # who asked is gone

    threading.Thread(target=listen, daemon=True).start()
    for path in json.loads(sys.argv[1]):
        add_module(path)
    with one_thread():
        while True:
            try:
                answer: dict[str, Any] = {"found": run_job(json.loads(jobs.get()))}
            except FormariumError as error:
                answer = {"error": str(error), "mendable": True}
            except KeyboardInterrupt:
                os._exit(130)  # the listener waits for input, and a usual end would wait for it
            except Exception:
                answer = {"error": traceback.format_exc(), "mendable": False}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


# where the numbers come from


def _essence(path: Path) -> str:
    """The text of a Python file without its card, its docstring, comments that fill a line, and empty lines."""
    text = _CARD.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r'\A\s*(""".*?"""|"[^"\n]*")', "", text, flags=re.DOTALL)
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def files_of(study: Study) -> list[Path]:
    """The files of the systems and parts that a study names, and of the papers that those import."""
    words = {study.system}
    for model in study.arms.values():
        if isinstance(model, str):
            words |= set(re.findall(r"[A-Za-z_]\w*", model))
    parts = {name: module for kind in PART_KINDS for name, (module, _) in named_parts()[kind].items()}
    queue = [e.path for name, e in systems().items() if name in words]
    queue += [PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py") for name, module in parts.items()
              if name in words and name not in systems()]
    found: dict[Path, None] = {}
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found[path] = None
        for dots, module in re.findall(r"^from (\.+)([\w.]+) import", path.read_text(encoding="utf-8"), re.MULTILINE):
            other = path.parents[len(dots) - 1].joinpath(*module.split(".")).with_suffix(".py")
            if other.is_relative_to(PACKAGE / "papers") and other.is_file():
                queue.append(other)
    return sorted(found)


def sources(study: Study, path: Path) -> dict[str, str]:
    """What a result depends on, file by file: name -> hash. Comments, docstrings and cards do not count."""
    return {_label(p): _digest(_essence(p)) for p in (path, *files_of(study))}


def data_print(study: Study) -> str:
    """A hash of the data of all tasks of a study: what they say of it, sizes among that, and a batch of it."""
    from torch.utils._pytree import tree_leaves

    digest, bench = hashlib.sha256(), Seed(study, 0, Path())
    for make in ([] if study.task is None else [None]) + list(study.data):
        task = bench.get_task(make)
        digest.update(json.dumps([task.name, vars(task.info)], sort_keys=True).encode())
        for leaf in tree_leaves(task.train_batch(0, 0, 4)):
            digest.update(leaf.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def engine() -> str:
    """A hash of all that trains and measures: finished runs of another one are not taken up again."""
    rooms = [p for room in ("core", "parts", "skeletons", "data", "tasks") for p in sorted((PACKAGE / room).rglob("*.py"))]
    mine = [Path(__file__).with_name(f"{name}.py") for name in ("study", "train", "config", "pretrain", "initial")]
    return _digest("\n".join(_essence(p) for p in (*rooms, *mine)))


def stale(record: Record, *, data: bool = False) -> str:
    """What has changed since the result was found, in words; "" where nothing has. data: look at the data too, which
    reads it; where it cannot be had nothing is said of it."""
    try:
        study, path = find_study(record["study"])
    except UnknownName:
        return "the study is gone"
    except Exception as error:  # a file in the making must not hide the results of others
        return f"the study cannot be read: {error}"
    try:
        now = sources(study, path)
        if data:
            now["data"] = data_print(study)
    except BadData:
        pass
    except FormariumError as error:
        return str(error)
    then = {k: v for k, v in record["hashes"].items() if k != "data" or "data" in now}
    changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
    return f"changed since: {', '.join(changed)}" if changed else ""


# results


def results_folders() -> list[Path]:
    """Where results are written, and then everywhere that they are read: with the package, or in runs/replicate."""
    inside = ROOM / "results"
    own = RUNS / "results"
    return [inside, own] if os.access(inside if inside.is_dir() else ROOM, os.W_OK) else [own, inside]


def read_results() -> dict[str, Record]:
    """The results of all studies, by name; of two of the same study the later."""
    found: dict[str, Record] = {}
    for folder in results_folders():
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if file.stem not in found or record["date"] > found[file.stem]["date"]:
                found[file.stem] = record
    return dict(sorted(found.items()))


def summaries(system: str = "") -> list[dict[str, str]]:
    """A row a study (of one system): study, system, verdict, stale or not, and what came out in words."""
    results, rows = read_results(), []
    for name in sorted({*studies(), *results}):
        record = results.get(name)
        of = record["system"] if record else system_of(studies()[name])
        if system not in ("", of):
            continue
        if record is None:
            rows.append({"study": name, "system": of, "verdict": "not run", "what": f"formarium replicate {name}"})
            continue
        old = stale(record)
        said = f"{record['sentence']} Published: {record['published']}"
        rows.append({"study": name, "system": of, "verdict": record["verdict"] + ", STALE" * bool(old),
                     "what": f"{said} ({old})" if old else said})
    return rows


def changed() -> dict[str, str]:
    """The studies of the package that have no result or a stale one -> why."""
    results = read_results()
    why = {name: stale(results[name], data=True) if name in results else "was never run" for name in studies()}
    return {name: reason for name, reason in why.items() if reason}


def write_record(file: Path, record: Record) -> None:
    from .config import write_json

    write_json(file, record)


def versions() -> dict[str, str]:
    import numpy
    import torch

    return {"torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()}


def machine() -> str:
    """The machine in words."""
    import torch

    from .machine import describe_machine

    told = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = "" if told["device"] == "cpu" else f", {told['device']}"
    return f"{told['cpu']}{device}, {processors()} processors, one thread a run, {platform.system()}"


def _said(model: Arm) -> str:
    return model if isinstance(model, str) else f"{getattr(model, '__name__', 'a model')} of the study's file"


def _slug(text: str) -> str:
    from .train import slug

    return slug(text)


if __name__ == "__main__":
    _work()
