"""The main job: several models on one task under equal conditions, side by side."""

import hashlib
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.errors import FormariumError
from ..core.macs import count_macs
from ..core.model import count_parameters
from ..core.registry import card
from ..tasks.base import Task, share
from ..tasks.registry import get_task
from .config import CompareConfig, checked, claim_folder, read_json, write_json
from .machine import describe_machine
from .measure import peak_memory, speeds
from .report import write_report
from .train import Diverged, Run, build_for, slug
from .words import called, number

THROUGHPUT_BATCH = 64


class Watcher:
    """Hears how a comparison goes; the command line draws it. These do nothing."""

    def plan(self, cells: int) -> None: ...
    def begin(self, model: str, lr: float | None, seed: int) -> None: ...
    def step(self, progress: float, loss: float | None) -> None: ...
    def end(self, model: str, found: dict[str, Any]) -> None: ...


@dataclass
class Comparison:
    """What came out. rows: one a model, in the order asked; verdict: one sentence; report: the page to open."""

    folder: Path
    metric: str
    higher_is_better: bool
    rows: list[dict[str, Any]]
    verdict: str
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def __repr__(self) -> str:
        shown = [f"{r['model']:40} {r['test'][self.metric]['mean']:.4f}" if r["test"] else f"{r['model']:40} {r['reason']}"
                 for r in self.rows]
        return "\n".join([self.verdict, *shown, f"report: {self.report}"])


def compare(models: Sequence[str], task: str = "mnist5k", *, seeds: int | Sequence[int] = 1, lr: float | None = None,
            lrs: Sequence[float] | None = None, out: str | Path | None = None, watcher: Watcher | None = None,
            **recipe: Any) -> Comparison:
    """Trains every model with every seed under one recipe and writes table, files and report.html.

    seeds: how many, or which. lr: one learning rate for all; else each of `lrs` is tried with the first seed and each
    model keeps its best by validation. out: the folder; the same call again goes on where it stopped. recipe: fields of
    Recipe (steps | seconds | flops, batch_size, weight_decay, warmup, ...). A model that fails stays in the table.
    """
    if lr is not None and lrs is not None:
        raise FormariumError("give lr (one rate for all) or lrs (rates to choose from), not both")
    rates = {"lrs": (lr,)} if lr is not None else {"lrs": tuple(lrs)} if lrs is not None else {}
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    config = checked(CompareConfig, models=tuple(models), task=task, seeds=chosen, **rates, **recipe)
    assert isinstance(config, CompareConfig)
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:6]
    folder = Path(out) if out else Path("runs") / f"compare-{slug(task)}-{digest}"
    return _Job(config, folder, get_task(task), watcher or Watcher()).do()


class _Job:
    def __init__(self, config: CompareConfig, folder: Path, task: Task, watcher: Watcher) -> None:
        self.config, self.folder, self.task, self.watcher = config, folder, task, watcher
        for name in config.models:  # a misspelt name must cost nothing
            with torch.device("meta"):
                build_for(name, task)

    def do(self) -> Comparison:
        c = self.config
        self._claim()
        tuned = len(c.lrs) > 1
        self.watcher.plan(len(c.models) * ((len(c.lrs) if tuned else 1) + len(c.seeds) - 1))
        first = c.seeds[0]
        tried = {m: {} for m in c.models}
        for lr in c.lrs:
            for model in c.models:
                tried[model][lr] = self._cell(model, lr, first)
        best = {m: self._best_rate(tried[m]) for m in c.models}
        cells = {m: [tried[m][best[m]]] for m in c.models}
        for seed in c.seeds[1:]:
            for model in c.models:
                cells[model].append(self._cell(model, best[model], seed))
        rows = [self._row(m, best[m], cells[m], tried[m] if tuned else {}) for m in c.models]
        self._costs(rows)
        differences(rows, self.task.metric)
        verdict = verdict_of(rows, self.task.metric, self.task.higher_is_better)
        notes = self._notes()
        write_json(self.folder / "results.json", {"rows": rows, "verdict": verdict, "notes": notes})
        write_report(self.folder)
        return Comparison(self.folder, self.task.metric, self.task.higher_is_better, rows, verdict, notes)

    def _claim(self) -> None:
        t, c = self.task, self.config
        about = {"formarium": __version__, "task": t.name, "task_info": vars(t.info), "metric": t.metric,
                 "higher_is_better": t.higher_is_better, "models": c.models, "seeds": c.seeds, "budget": c.budget,
                 "batch_size": c.batch_size, "lrs": c.lrs, "weight_decay": c.weight_decay, "warmup": c.warmup,
                 "started": datetime.now().isoformat(timespec="seconds"),
                 "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
        claim_folder(self.folder, "compare.json", c, about)

    def _cell(self, model: str, lr: float, seed: int) -> dict[str, Any]:
        """One training run; a failure is a result too. A finished cell is read, not run again."""
        folder = self.folder / "cells" / slug(model) / f"lr{lr:g}-seed{seed}"
        failed = folder / "failed.json"
        self.watcher.begin(model, lr, seed)
        if failed.exists():
            found = read_json(failed)
        else:
            run = Run(self.config.run(model, lr, seed), folder, self.task, self.watcher.step)
            try:
                found = run.train() | {"val": last_validation(folder)}
            except (Diverged, RuntimeError, torch.OutOfMemoryError) as error:
                found = {"status": "failed", "reason": str(error).splitlines()[0], "test": {}, "seconds": run.seconds}
                write_json(failed, found)
        self.watcher.end(model, found)
        return found | {"seed": seed, "path": str(folder.relative_to(self.folder))}

    def _best_rate(self, tried: dict[float, dict[str, Any]]) -> float:
        """The rate whose run validates best; the first where all failed."""
        sign = 1 if self.task.higher_is_better else -1
        done = {lr: sign * cell["val"][self.task.metric] for lr, cell in tried.items() if cell["status"] == "done"}
        return max(done, key=done.__getitem__) if done else next(iter(tried))

    def _row(self, model: str, lr: float, cells: list[dict[str, Any]], tried: dict[float, dict]) -> dict[str, Any]:
        done = [c for c in cells if c["status"] == "done"]
        failed = [c for c in cells if c["status"] == "failed"]
        reason = f"{len(failed)} of {len(cells)} runs failed: {failed[0]['reason']}" if failed else ""
        names = done[0]["test"] if done else {}
        values = {name: [c["test"][name] for c in done] for name in names}
        return {
            "model": model, "slug": slug(model), "title": card(model.split(":")[0]).title,
            "status": "failed" if failed else "done", "reason": reason, "lr": lr,
            "lr_tried": {f"{r:g}": c["val"][self.task.metric] if c["status"] == "done" else None for r, c in tried.items()},
            "cells": [{k: c.get(k) for k in ("seed", "status", "reason", "path", "test", "seconds")} for c in cells],
            "test": {n: {"mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "values": v}
                     for n, v in values.items()},
            "train_seconds": statistics.fmean(c["seconds"] for c in done) if done else None,
            "shown": done[0]["shown"] if done else None,
        }

    def _costs(self, rows: list[dict[str, Any]]) -> None:
        """Parameters, MACs, memory, latency and throughput of every model, measured now, the models taking turns."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        models = {r["model"]: build_for(r["model"], self.task).to(device) for r in rows}
        first = models[rows[0]["model"]]
        one, many = (share(first.example(n), device=device) for n in (1, THROUGHPUT_BATCH))
        latency, batch = speeds(models, one), speeds(models, many)
        for row in rows:
            model = models[row["model"]]
            row["params"] = count_parameters(model)
            row["macs"] = count_macs(model, one)
            row["latency_ms"] = 1000 * latency[row["model"]]
            row["throughput"], row["throughput_batch"] = THROUGHPUT_BATCH / batch[row["model"]], THROUGHPUT_BATCH
            row["peak_memory"] = peak_memory(model, self.task, self.config.batch_size)

    def _notes(self) -> list[str]:
        """What a reader must know before trusting the table."""
        n, notes = len(self.config.seeds), []
        if n < 3:
            notes.append(f"{n} seed{'s' if n > 1 else ''}: small differences may be luck; take three or more (--seeds 3).")
        if n > 1:
            notes.append("Intervals are over seeds (paired, 95 %); they do not cover the choice of the test set.")
        if len(self.config.lrs) > 1:
            notes.append("Each model has the learning rate that validated best with the first seed.")
        return notes


def last_validation(folder: Path) -> dict[str, float]:
    """The last row of metrics.jsonl that holds validation metrics."""
    import json

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [r["val"] for r in rows if "val" in r]
    if not found:
        raise FormariumError(f"{folder} has no validation metrics")
    return found[-1]


def paired_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """The 95 % Student interval of the mean of paired differences; None below two pairs."""
    from scipy.stats import t

    values = list(values)
    n = len(values)
    if n < 2:
        return None
    mean, half = statistics.fmean(values), t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def paired(row: dict[str, Any], base: dict[str, Any], metric: str) -> list[float]:
    """Differences over the seeds that both finished."""
    mine, other = ({c["seed"]: c["test"][metric] for c in r["cells"] if c["status"] == "done"} for r in (row, base))
    return [mine[s] - other[s] for s in mine if s in other]


def differences(rows: list[dict[str, Any]], metric: str) -> None:
    """Writes into each row its paired difference to the first: {"mean", "low", "high", "values"} or None."""
    for i, row in enumerate(rows):
        values = paired(row, rows[0], metric) if i else []
        low, high = paired_interval(values) or (None, None)
        found = {"low": low, "high": high, "values": values}
        row["difference"] = {"mean": statistics.fmean(values), **found} if values else None


def verdict_of(rows: list[dict[str, Any]], metric: str, higher_is_better: bool) -> str:
    """One sentence: who is best, by how much over the next, and whether the seeds bear it out."""
    sign = 1 if higher_is_better else -1
    ranked = sorted((r for r in rows if r["test"]), key=lambda r: -sign * r["test"][metric]["mean"])
    if not ranked:
        return "Every run failed; the table says why."
    best, name = ranked[0], called(metric)
    failed = [r["model"] for r in rows if r["status"] == "failed"]
    tail = f" {' and '.join(failed)} failed at least once." if failed else ""
    said = f"{best['model']} reaches {number(metric, best['test'][metric]['mean'], unit=' %')} {name}"
    if len(ranked) == 1:
        return f"{said}.{tail}"
    values = paired(best, ranked[1], metric)
    interval = paired_interval(values)
    if not values:
        return f"{said}; no seed finished for both it and {ranked[1]['model']}.{tail}"
    side = "above" if higher_is_better else "below"
    gap = f"{_points(metric, abs(statistics.fmean(values)))} {side} {ranked[1]['model']}"
    if interval is None:
        return f"{said}, {gap} with one seed, which cannot tell skill from luck.{tail}"
    low, high = sorted(sign * v for v in interval)
    over = f"over {len(values)} paired seeds (95 % interval {_points(metric, low)} to {_points(metric, high)})"
    if low > 0:
        return f"{said}, {gap} {over}.{tail}"
    return f"{said}, {gap}, but {over} the two cannot be told apart.{tail}"


def _points(metric: str, value: float) -> str:
    return number(metric, value, unit=" points")
