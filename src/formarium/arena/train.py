"""Train one model on one task: resumable, with every number on disk."""

import contextlib
import copy
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..core.build import create_model, parse_name, split_transforms
from ..core.checkpoint import save
from ..core.errors import DoesNotFit, FormariumError
from ..core.macs import count_macs
from ..core.model import Model, count_parameters
from ..core.registry import split_name
from ..skeletons.objective import Objective, Supervised, loss_of, objective
from ..tasks.base import Task, share
from ..tasks.registry import get_task
from .config import RunConfig, checked, claim_folder, read_json, write_json
from .initial import take_weights, with_fingerprint
from .machine import describe_machine

SAVE_EVERY = 30.0  # seconds between saved states
Watch = Callable[[float, float | None], None]  # part of the budget done, loss


class Diverged(FormariumError):
    """The loss is no longer finite."""


def build_for(name: str, task: Task, **changes: Any) -> Model:
    """A model by name, made to fit a task's classes, channels, image size or vocabulary, that does the task."""
    model = build_on(name, task, **changes)
    task.check_fits(model, name)
    return model


def build_on(name: str, task: Task, **changes: Any) -> Model:
    """A model by name, made to fit a task's data."""
    base, options = parse_name(name)
    entry, _ = split_name(split_transforms(base)[0])
    if entry.card.domain != task.domain and not entry.is_part:
        raise DoesNotFit(f"the task {task.name} needs models of the domain {task.domain!r}; {entry.name} is of "
                         f"{entry.card.domain!r}; see: formarium list --domain {task.domain}")
    return create_model(base, **(task.model_options() | options | changes))


def rate_at(progress: float, lr: float, warmup: float, schedule: str = "cosine", timescale: float = 0.1,
            cooldown: float = 0.0) -> float:
    """The learning rate when this part of the budget is done: a linear rise, then half a cosine down to zero, or
    1 / sqrt(1 + time / timescale) (arXiv 2106.04560, section 3.5). cooldown: times a line to zero over the last part."""
    if progress < warmup:
        rate = lr * (progress / warmup * 0.99 + 0.01)
    elif schedule == "rsqrt":
        rate = lr / math.sqrt(1 + (progress - warmup) / timescale)
    else:
        rate = lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    return rate * min(1.0, max(0.0, 1 - progress) / cooldown) if cooldown else rate


class Stop:
    """Set by the first Ctrl-C, so that a run ends between two steps with its state saved; the second one kills."""

    asked = False


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within, the first SIGINT only sets `Stop.asked`. Does nothing outside the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """One training run in a folder: run.json, metrics.jsonl, state-N (to resume), best and last weights, result.json.

    `build`, `loss`, `score`, `found` and `weights` say what is trained, and on what: here a model on its task.
    """

    last = "last.safetensors"

    def __init__(self, config: RunConfig, folder: Path, task: Task | None = None, watch: Watch | None = None) -> None:
        self.config, self.folder, self.watch = config, folder, watch
        self.task = task or get_task(config.task)
        if config.augmentation:
            self.task = self.task.augmented(**config.augmentation)
        self.trained: Objective | None = None
        self.average: Model | None = None
        self.accelerator = Accelerator(mixed_precision=config.precision)
        if config.precision == "bf16" and self.accelerator.device.type == "cpu" and not _fast_bf16():
            raise FormariumError("this processor has no bf16 units; bf16 would be several times slower than float32 here")
        world = self.accelerator.num_processes
        if config.batch_size % world:
            raise DoesNotFit(f"a batch of {config.batch_size} does not divide among {world} processes")
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.init: dict[str, Any] = {}

    def result(self) -> dict[str, Any] | None:
        """What a finished run found; None while it is not finished."""
        path = self.folder / "result.json"
        return read_json(path) if path.exists() else None

    def train(self) -> dict[str, Any]:
        """Goes on where the folder's last state was. Ctrl-C leaves a state behind; a run that diverged raises Diverged."""
        done = self.result()
        if done is not None:
            claim_folder(self.folder, "run.json", self.config, {})
            return done
        main = self.accelerator.is_main_process
        torch.manual_seed(self.config.seed)
        model = self.build()  # first, so that a wrong name leaves no folder
        if main:
            claim_folder(self.folder, "run.json", self.config, {"machine": describe_machine(self.accelerator.device)})
        model.set_grad_checkpointing(self.config.grad_checkpointing)
        groups = model.parameter_groups(self.config.weight_decay, self.config.head_weight_decay)
        steps = self._steps(model)
        optimizer = torch.optim.AdamW(groups, lr=self.config.lr, fused=True)
        wrapped = torch.compile(model) if self.config.compile else model
        wrapped, optimizer = self.accelerator.prepare(wrapped, optimizer)
        if self.config.ema is not None:
            self.average = copy.deepcopy(self.plain(model)).requires_grad_(False).eval()
            self.accelerator.register_for_checkpointing(self.average)
        self._resume()
        log = (self.folder / "metrics.jsonl").open("a", encoding="utf-8") if main else None
        try:
            with stoppable() as stop:
                self._loop(model, wrapped, optimizer, steps, log, stop)
            result = {"status": "done", **self.found(model.eval()), "steps": self.step, "seconds": self.seconds,
                      "parameters": count_parameters(self.weights(model))} | self.init
            if main:
                save(self.weights(model), self.folder / self.last)
                write_json(self.folder / "result.json", result)
                self._drop_states()
        finally:
            if log:
                log.close()
            self.accelerator.free_memory()
        return result

    def build(self) -> Any:
        """What is trained: a module that trains like a Model, with an `example`."""
        c, rate = self.config, {} if self.config.drop_path is None else {"drop_path": self.config.drop_path}
        model = build_for(c.model, self.task, **{k: v for k, v in rate.items() if k not in parse_name(c.model)[1]})
        if c.init is not None:
            self.init = {"init": take_weights(model, c.init)}
        if c.objective is not None and not issubclass(objective(c.objective).target, Supervised):  # type: ignore[arg-type]
            raise DoesNotFit(f"{c.objective} trains without the labels of a task: pretrain a model under it")
        return self.under(model)

    def under(self, model: Model) -> Any:
        """The model, within the objective of this run if it has one."""
        if self.config.objective is None:
            return model
        self.trained = objective(self.config.objective)(model)
        return self.trained

    def loss(self, wrapped: Any, batch: Any, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of one batch, with numbers for the log. progress: part of the budget that is done."""
        if self.trained is None:
            return self.task.loss(wrapped, batch), {}
        self.trained.progress.fill_(progress)
        return loss_of(wrapped, self.trained, batch)

    def score(self, model: Any) -> tuple[dict[str, float], float]:
        """What the validation part says, and the one number of it that is to grow."""
        found = self.task.evaluate(self.weights(model), "val")
        return found, found[self.task.metric] * (1 if self.task.higher_is_better else -1)

    def found(self, model: Any) -> dict[str, Any]:
        """What the result of a finished run says."""
        done = self.weights(model)
        return {"test": self.task.evaluate(done, "test"), "shown": self.task.show(done)}

    def plain(self, model: Any) -> Model:
        """The model as it is trained, out of its objective."""
        return model.export() if isinstance(model, Objective) else model

    def weights(self, model: Any) -> Model:
        """The model that is evaluated and saved: the moving average, where there is one."""
        return self.plain(model) if self.average is None else self.average

    @torch.no_grad()
    def follow(self, model: Any) -> None:
        """The moving average goes a step; in the first steps faster, so that it forgets where the weights began."""
        assert self.config.ema is not None
        decay, here = min(self.config.ema, (1 + self.step) / (10 + self.step)), self.plain(model)
        for name in ("parameters", "buffers"):
            for mean, now in zip(getattr(self.average, name)(), getattr(here, name)(), strict=True):
                mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)

    def _steps(self, model: Any) -> float:
        """The budget in steps; infinite where it is in seconds."""
        c = self.config
        if c.flops is not None:
            a_step = 6 * count_macs(model, model.example()) * c.batch_size
            return max(1, int(c.flops / a_step))
        return c.steps if c.steps is not None else math.inf

    def _loop(self, model: Any, wrapped: Any, optimizer: Any, steps: float, log: Any, stop: Stop) -> None:
        c, device = self.config, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        log_every = 10 if steps == math.inf else max(1, int(steps) // 100)
        evaluated = math.floor(self._progress(steps) * c.evaluations)
        saved, params = time.monotonic(), [p for g in optimizer.param_groups for p in g["params"]]
        wrapped.train()
        while (progress := self._progress(steps)) < 1:
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, c.lr, c.warmup, c.schedule, c.timescale, c.cooldown)
            batch = share(self.task.train_batch(c.seed, self.step, c.batch_size), rank, world, device)
            with self.accelerator.autocast():
                loss, numbers = self.loss(wrapped, batch, progress)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(params, c.clip)
            optimizer.step()
            optimizer.zero_grad()
            if self.average is not None:
                self.follow(model)
            value = loss.item() if self.step % log_every == 0 else None
            self.step += 1
            self.seconds += time.perf_counter() - begun
            if value is not None:
                self._write(log, {"seconds": self.seconds, "loss": value, "lr": optimizer.param_groups[0]["lr"]}
                            | {k: v.item() for k, v in numbers.items() if v.isfinite()})
                if not math.isfinite(value):
                    raise Diverged(f"the loss became {value} at step {self.step}")
                if self.watch:
                    self.watch(progress, value)
            progress = self._progress(steps)
            if math.floor(progress * c.evaluations) > evaluated:
                evaluated = math.floor(progress * c.evaluations)
                self._evaluate(model, log)
                wrapped.train()
            if stop.asked or time.monotonic() - saved > SAVE_EVERY:
                self._save_state(log)
                saved = time.monotonic()
            if stop.asked:
                raise KeyboardInterrupt
        if not all(p.isfinite().all() for p in params):
            raise Diverged(f"weights are no longer finite after step {self.step}")
        if self.watch:
            self.watch(1.0, None)

    def _progress(self, steps: float) -> float:
        """The part of the budget that is done; the same on every process."""
        if steps != math.inf:
            return self.step / steps
        progress = [self.seconds / self.config.seconds if self.config.seconds else 1.0]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(progress)
        return min(1.0, progress[0])

    def _evaluate(self, model: Any, log: Any) -> None:
        model.eval()
        found, score = self.score(model)
        self._write(log, {"seconds": self.seconds, "val": found})
        if score > self.best and self.accelerator.is_main_process:
            self.best = score
            save(self.weights(model), self.folder / "best.safetensors")

    def _write(self, log: Any, row: dict[str, Any]) -> None:
        if log:
            row = {"step": self.step, **row}
            if not math.isfinite(row.get("loss", 0.0)):
                row["loss"] = None  # JSON has no NaN
            log.write(json.dumps(row) + "\n")

    def _save_state(self, log: Any) -> None:
        """A folder state-N, made under another name and moved, so that a state is whole or not there."""
        if log:
            log.flush()
        final, half = self.folder / f"state-{self.step:08d}", self.folder / ".state-half"
        if self.accelerator.is_main_process:
            shutil.rmtree(half, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(half))
        if self.accelerator.is_main_process:
            write_json(half / "progress.json", {"step": self.step, "seconds": self.seconds,
                                                "best": self.best if math.isfinite(self.best) else None})
            if not final.exists():
                half.rename(final)
            for old in self._states()[:-1]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*"))

    def _drop_states(self) -> None:
        for state in [*self._states(), self.folder / ".state-half"]:
            shutil.rmtree(state, ignore_errors=True)

    def _resume(self) -> None:
        states = self._states()
        metrics = self.folder / "metrics.jsonl"
        if states:
            self.accelerator.load_state(str(states[-1]))
            saved = read_json(states[-1] / "progress.json")
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.best = -math.inf if saved["best"] is None else saved["best"]
        if metrics.exists() and self.accelerator.is_main_process:  # what was written after the state will come again
            rows = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            metrics.write_text("".join(rows), encoding="utf-8")


def _fast_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def train(model: str, task: str = "mnist5k", *, out: str | Path | None = None, watch: Watch | None = None,
          **settings: Any) -> dict[str, Any]:
    """Trains one model and returns what it found: {"test": {...}, "seconds", "steps", "folder", ...}.

    settings: fields of RunConfig (steps or seconds or flops, lr, seed, batch_size, ...). out: the run's folder; the same
    call again resumes it, or gives the result if it is finished. best.safetensors and last.safetensors lie there.
    init: a file whose tensors the model starts from, where names and shapes agree; its head is not taken.
    """
    config = checked(RunConfig, model=model, task=task, **with_fingerprint(settings))
    assert isinstance(config, RunConfig)
    folder = Path(out) if out else Path("runs") / f"{slug(model)}-{slug(task)}-seed{config.seed}"
    return Run(config, folder, watch=watch).train() | {"folder": str(folder)}


def slug(name: str) -> str:
    """A model's or task's name as a folder name."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name).strip("-")
