"""Progress bars of the command line; plain lines where the output is no terminal."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .core.errors import Stopped


class Bars:
    """Hears a comparison: a bar over the runs with the time left, and one over the steps of the current run."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.quiet = quiet
        self.progress = Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
                                 TextColumn("{task.fields[say]}", markup=False), TimeRemainingColumn(),
                                 console=self.console, disable=not self.live)
        self.cells = self.total = 0
        self.begun = time.monotonic()

    def __enter__(self) -> "Bars":
        self.progress.__enter__()
        self.all = self.progress.add_task("runs", say="", total=1, visible=False)
        self.one = self.progress.add_task("", say="", total=1, visible=False)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.progress.__exit__(kind, error, trace)
        if kind is KeyboardInterrupt:
            raise Stopped("stopped; what is finished and the last state are kept: the same command goes on") from None

    def plan(self, cells: int) -> None:
        self.total = cells
        self.progress.update(self.all, total=cells, visible=cells > 1)

    def begin(self, model: str, lr: float | None, seed: int) -> None:
        self.said = f"{model}{'' if lr is None else f'  lr {lr:g}'}  seed {seed}"
        self.progress.reset(self.one, description=self.said, visible=True)

    def step(self, progress: float, loss: float | None) -> None:
        self.progress.update(self.one, completed=progress, say="" if loss is None else f"loss {loss:.3f}")
        self.progress.update(self.all, completed=self.cells + progress, say=f"{self.cells}/{self.total}")

    def end(self, model: str, found: dict[str, Any]) -> None:
        self.cells += 1
        self.progress.update(self.all, completed=self.cells, say=f"{self.cells}/{self.total}")
        if not self.live and not self.quiet:
            result = "failed: " + found["reason"] if found["status"] == "failed" else \
                ", ".join(f"{k} {v:.4f}" for k, v in found["test"].items())
            elapsed = time.monotonic() - self.begun
            print(f"[{self.cells}/{self.total}, {elapsed:.0f} s] {self.said}: {result}", file=sys.stderr, flush=True)
