"""A study: a claim of a paper, and the experiment that decides at our scale whether it holds. One file in `studies/` each.

    from formarium.arena.study import Decides, Study

    STUDY = Study(system="denseformer", claim=..., source=..., arms={"denseformer": ..., "plain": ...}, ...)
"""

import copy
import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import DoesNotFit, FormariumError, unknown
from .verdict import Decides

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

__all__ = ["Cell", "Decides", "Seed", "Study", "find_study", "studies", "train_on_task"]

ROOM = Path(__file__).resolve().parent.parent / "studies"
MATCHED = ("parameters", "macs", "steps", "tokens")
QUICK = {"steps": 2, "batch_size": 4, "evaluations": 1}
Arm = str | Callable[["Task"], "Model"]  # a model's name, or a function that builds it for a task


@lru_cache(maxsize=8)
def _task(make: str | Callable[..., "Task"], options: tuple[tuple[str, Any], ...], quick: bool) -> "Task":
    from ..tasks.registry import get_task

    task = get_task(make, **dict(options)) if isinstance(make, str) else make(**dict(options))
    return shortened(task) if quick else task


def shortened(task: "Task", batches: int = 1, batch_size: int = 16) -> "Task":
    """The task, evaluated on its first few samples only: to see that a study runs, never to judge."""
    short = copy.copy(task)

    def first(read: Callable[..., Any]) -> Callable[..., Any]:
        return lambda split, *size: islice(read(split, *(min(s, batch_size) for s in size)), batches)

    for name in ("batches", "streams", "pairs"):
        if callable(getattr(task, name, None)):
            setattr(short, name, first(getattr(task, name)))
    short.check_counted = lambda counted, split: None  # type: ignore[method-assign]
    return short


@dataclass(frozen=True)
class Bench:
    """Where a part of a study is done. quick: nothing is judged, so budgets are cut to the least that runs every path."""

    study: "Study"
    seed: int
    folder: Path
    quick: bool = False

    @property
    def task(self) -> "Task":
        """The study's task."""
        return self.get_task()

    def get_task(self, task: "str | Callable[..., Task] | None" = None, **options: Any) -> "Task":
        """A task by name or by the function that makes it, the study's own without; in quick mode evaluated in small."""
        if task is None:
            if self.study.task is None:
                raise FormariumError("this study has no task: name one")
            task, options = self.study.task, {**self.study.task_options, **options}
        return _task(task, tuple(sorted(options.items())), self.quick)

    def train(self, model: Arm | None = None, *, task: "Task | str | None" = None, into: str = "run",
              **recipe: Any) -> "tuple[Model, dict[str, float]]":
        """Trains a model and returns it with its numbers; what is finished is read, what was begun goes on.

        model: a name, or a function (task) -> Model. recipe: fields of RunConfig over the study's recipe, `lr` and `init`
        among them. into: the folder of this run in self.folder, where last.safetensors lies. The numbers: the test
        metrics; val, the task's own metric on validation data; train_loss, the mean of the last tenth of those logged.
        """
        import torch
        from safetensors.torch import load_file

        from .compare import last_validation
        from .config import RunConfig, checked
        from .initial import with_fingerprint
        from .train import Run

        made = self._make(model)
        doing, quick = self._known(task), self.quick

        class CellRun(Run):
            def build(self) -> Any:
                if isinstance(made, str):
                    return super().build()
                built = made(self.task)
                built.recipe = {"name": f"studies/{getattr(made, '__name__', 'arm')}", "changes": {}}
                return self.under(built)

            def found(self, model: Any) -> dict[str, Any]:
                return {"test": self.task.evaluate(self.weights(model), "val" if quick else "test")}

        name = made if isinstance(made, str) else getattr(made, "__name__", "arm")
        settings = with_fingerprint(self._recipe(recipe))
        config = checked(RunConfig, model=name, task=doing.name, **settings)
        assert isinstance(config, RunConfig)
        folder = self.folder / into
        run = CellRun(config, folder, doing)
        found = run.train()
        torch.manual_seed(config.seed)
        built = run.plain(run.build())
        built.load_state_dict(load_file(folder / run.last))
        numbers = {k: float(v) for k, v in found["test"].items()}
        numbers["val"] = last_validation(folder)[doing.metric]
        return built.eval(), numbers | {"train_loss": _last_losses(folder / "metrics.jsonl")}

    def pretrain(self, objective: str, model: str | None = None, *, task: "Task | str | None" = None,
                 into: str = "pretrained", **recipe: Any) -> Path:
        """Pretrains a model under an objective; the file of the encoder, for `train(init=...)`."""
        from .config import PretrainConfig, checked
        from .initial import with_fingerprint
        from .pretrain import Pretraining

        made = self._make(model)
        if not isinstance(made, str):
            raise DoesNotFit("a model that is pretrained has a name")
        doing, settings = self._known(task), with_fingerprint(self._recipe(recipe))
        config = checked(PretrainConfig, model=made, objective=objective, task=doing.name, **settings)
        assert isinstance(config, PretrainConfig)
        Pretraining(config, self.folder / into, doing).train()
        return self.folder / into / Pretraining.last

    def _make(self, model: Arm | None) -> Arm:
        if model is None:
            raise FormariumError("name the model to train: train('vit/nano')")
        return model

    def _known(self, task: "Task | str | None") -> "Task":
        if task is None or isinstance(task, str):
            return self.get_task(task)
        return shortened(task) if self.quick else task

    def _recipe(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """The study's recipe with `more` over it; in quick mode a few steps of a few samples."""
        budgets = ("steps", "seconds", "flops")
        base = {"evaluations": 1, "seed": self.seed, **self.study.recipe}
        if any(k in more for k in budgets):
            base = {k: v for k, v in base.items() if k not in budgets}
        found = base | {k: v for k, v in more.items() if v is not None}
        if self.quick:
            found = {k: v for k, v in found.items() if k not in budgets} | QUICK
        return found


@dataclass(frozen=True)
class Seed(Bench):
    """What `prepare` gets, once a seed; the arms find self.folder as `cell.prepared`."""


@dataclass(frozen=True)
class Cell(Bench):
    """One measurement. arm: its label; model: what it stands for; lr: None where the study has no grid of rates;
    prepared: the folder of what was made for this seed."""

    arm: str = ""
    model: Arm = ""
    lr: float | None = None
    prepared: Path | None = None

    def _make(self, model: Arm | None) -> Arm:
        return self.model if model is None else model

    def _recipe(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return super()._recipe({"lr": self.lr, **more})


def train_on_task(cell: Cell) -> dict[str, float]:
    """What is measured where a study says nothing else: the arm's model, trained on the task, on test data."""
    return cell.train()[1]


def _last_losses(path: Path) -> float:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [r["loss"] for r in rows if r.get("loss") is not None]
    return statistics.fmean(losses[-max(1, len(losses) // 10):]) if losses else math.nan


@dataclass(frozen=True, kw_only=True)
class Study:
    """The protocol of an experiment, fixed before it is run.

    system: whose claim; a file may be called otherwise where a system has several. source: where it is claimed, with table
    or figure. arms: label -> model; the first is the idea, the second decides against it, further ones are shown.
    matched: what is equal between the two; with "parameters" and "macs" a difference over 3 % is an error. recipe: fields
    of Recipe, the same for all arms. lrs: each arm takes its best by validation with the first seed; () if nothing is
    trained. seeds: how many (3 or more), or which. published: their numbers. scale: how ours differs, in words. cannot:
    what cannot be tested here. prepare: run once a seed before its cells. measure: a cell -> numbers, the deciding one
    among them, and "val" where there are several rates. val_better: the direction of "val"; else the task's, else the
    deciding number's. data: further tasks whose data is used.
    """

    system: str
    claim: str
    source: str
    arms: Mapping[str, Arm]
    matched: Literal["parameters", "macs", "steps", "tokens"]
    decides: Decides
    published: str
    scale: str
    cannot: str = ""
    task: "str | Callable[..., Task] | None" = None
    task_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int | tuple[int, ...] = 3
    prepare: Callable[[Seed], Any] | None = None
    measure: Callable[[Cell], Mapping[str, float]] = train_on_task
    val_better: Literal["lower", "higher"] | None = None
    data: tuple[str, ...] = ()
    name: str = ""  # the file's; whoever loads the study writes it

    def __post_init__(self) -> None:
        if self.matched not in MATCHED:
            raise unknown("way to match arms", str(self.matched), MATCHED)
        if len(self.arms) < (1 if self.decides.kind == "target" else 2):
            raise DoesNotFit(f"a study needs the idea and what decides against it; it has {len(self.arms)} arm")
        if len(self.seed_list) < 3:
            raise DoesNotFit(f"a study needs 3 seeds or more, it has {len(self.seed_list)}")
        if len(set(self.seed_list)) < len(self.seed_list) or len(set(self.lrs)) < len(self.lrs):
            raise DoesNotFit("seeds and rates name each value once")
        for what in ("claim", "source", "published", "scale"):
            if not getattr(self, what).strip():
                raise DoesNotFit(f"a study says its {what}")

    @property
    def seed_list(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @property
    def idea(self) -> str:
        return next(iter(self.arms))

    @property
    def deciding(self) -> tuple[str, ...]:
        """The arms that decide: the idea and the control; the idea alone against a published number."""
        return tuple(self.arms)[:1 if self.decides.kind == "target" else 2]


def studies() -> dict[str, Path]:
    """Every study of the package: name -> file."""
    return {p.stem: p for p in sorted(ROOM.glob("*.py")) if not p.stem.startswith("_")}


def find_study(name: str) -> tuple[Study, Path]:
    """The study of this name, or in the file of this path (it ends in .py). Unknown names raise with the nearest ones."""
    import dataclasses

    known = studies()
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise FormariumError(f"no file {path}: give the name of a study or the path of a file with a STUDY")
    elif name in known:
        path = known[name]
    else:
        raise unknown("study", name, known)
    module = f"formarium.studies.{path.stem}" if path == known.get(path.stem) else f"formarium_study.{path.stem}"
    loaded = sys.modules.get(module)
    if loaded is None or loaded.__file__ != str(path):
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module]
            raise
    found = getattr(loaded, "STUDY", None)
    if not isinstance(found, Study):
        raise FormariumError(f"{path} has no STUDY = Study(...)")
    return dataclasses.replace(found, name=path.stem), path


def system_of(path: Path) -> str:
    """The system whose claim a study's file tests, read from its text."""
    said = re.search(r"""\bsystem\s*=\s*["'](\w+)["']""", path.read_text(encoding="utf-8"))
    return said[1] if said else ""
