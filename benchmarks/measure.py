"""Timing side by side: the runs take turns, so that a busy machine slows all of them alike."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from formarium.core.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results"


class Ratio(NamedTuple):
    """How long one run took, in times another: the median, least and greatest over the rounds."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}..{self.greatest:.2f})"


def take_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each run in each round. Each round runs all of them, every second round in reverse order."""
    for run in list(runs.values()) * warmup:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(runs) if i % 2 == 0 else reversed(runs):
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> Ratio:
    """One run's time in times the other's, round by round."""
    each = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def milliseconds(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """The median time of a run in ms."""
    return statistics.median(seconds[name]) * 1e3


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpu": _cpu(), "cores": os.cpu_count(),
                             "threads": torch.get_num_threads(), "load": [round(x, 2) for x in os.getloadavg()]}
    for package in ("torch", "formarium", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{named[0] if named else platform.processor() or platform.machine()}, {capability}"


def write(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes benchmarks/results/NAME.json: settings, environment and rows."""
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": dict(settings), "rows": list(rows)}
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1) + "\n"))
    return path


def table(rows: Sequence[Mapping[str, Any]], markdown: bool) -> str:
    """Rows of the same columns as a table, aligned or as Markdown."""
    cells = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [[c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
             for row in cells]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float) and not isinstance(value, Ratio):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.1f}"
    return str(value)
