"""What a run is, as data: written beside its results, read back to resume it."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..core.checkpoint import write_atomically
from ..core.errors import FormariumError, unknown

DEFAULT_STEPS = 300
RECIPES: dict[str, dict[str, Any]] = {  # name -> fields of Recipe, which those that are given change
    "deit": {"repeats": 3, "rand_augment": 9.0, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
             "drop_path": 0.1, "ema": 0.99996, "weight_decay": 0.05, "warmup": 5 / 300},  # arXiv 2012.12877, table 9
}
AUGMENTATION = ("repeats", "rand_augment", "erasing", "mixup", "cutmix", "smoothing")


class Recipe(BaseModel):
    """How long and how to train; the same for every model of a comparison. recipe="deit": as RECIPES has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(None, gt=0, description="budget: optimiser steps")
    seconds: float | None = Field(None, gt=0, description="budget: seconds of training, evaluation not counted")
    flops: float | None = Field(None, gt=0, description="budget: floating point operations (6 x MACs a sample)")
    batch_size: int = Field(64, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    head_weight_decay: float | None = Field(None, ge=0, description="of the classifier's matrix, unless as weight_decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="part of the budget in which the rate rises; then it falls")
    schedule: Literal["cosine", "rsqrt"] = Field("cosine", description="how it falls: a cosine to zero, 1 / sqrt(time)")
    timescale: float = Field(0.1, gt=0, description="of rsqrt: part of the budget after which the square has halved")
    cooldown: float = Field(0.0, ge=0, le=1, description="part of the budget, its last, in which the rate goes to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    evaluations: int = Field(6, gt=0, description="how often the validation part is evaluated")
    precision: Literal["no", "bf16", "fp16"] = "no"
    grad_checkpointing: bool = False
    compile: bool = False
    drop_path: float | None = Field(None, ge=0, lt=1, description="of the models whose names do not say theirs")
    ema: float | None = Field(None, ge=0, lt=1, description="decay of a moving average of the weights, which is evaluated")
    repeats: int | None = Field(None, ge=1, description="this and the next: see tasks/augment.py")
    rand_augment: float | None = Field(None, ge=0, le=10)
    erasing: float | None = Field(None, ge=0, le=1)
    mixup: float | None = Field(None, ge=0)
    cutmix: float | None = Field(None, ge=0)
    smoothing: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: dict) -> dict:
        name = values.get("recipe")
        if name is not None and name not in RECIPES:
            raise unknown("recipe", str(name), RECIPES)
        return {**RECIPES.get(name, {}), **{k: v for k, v in values.items() if k != "recipe"}}

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, values: dict) -> dict:
        given = [k for k in ("steps", "seconds", "flops") if values.get(k) is not None]
        if len(given) > 1:
            raise ValueError(f"one budget, not {len(given)}: {', '.join(given)}")
        return values if given else {**values, "steps": DEFAULT_STEPS}

    @property
    def augmentation(self) -> dict[str, Any]:
        """Options of the task's augmentation that are given."""
        return {k: v for k in AUGMENTATION if (v := getattr(self, k)) is not None}

    @property
    def budget(self) -> dict[str, float]:
        return {k: v for k in ("steps", "seconds", "flops") if (v := getattr(self, k)) is not None}


class RunConfig(Recipe):
    """One model on one task with one seed and learning rate. init: the file it starts from, and what was in it. objective:
    a supervised one, by name, instead of the task's own loss."""

    model: str
    task: str
    lr: float = Field(1e-3, gt=0)
    seed: int = Field(0, ge=0)
    init: str | None = None
    init_sha256: str | None = None
    objective: str | None = None


class PretrainConfig(RunConfig):
    """One model under one objective, on the inputs of a task."""

    objective: str


class CompareConfig(Recipe):
    """Several models under one recipe. lrs: tried with the first seed; each model keeps the one best on validation data."""

    models: tuple[str, ...] = Field(min_length=1)
    task: str
    lrs: tuple[float, ...] = Field((1e-3, 3e-3, 1e-2), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)

    @model_validator(mode="after")
    def _no_doubles(self) -> Self:
        for field in ("models", "lrs", "seeds"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} names something twice: {', '.join(map(str, values))}")
        return self

    def run(self, model: str, lr: float, seed: int) -> RunConfig:
        recipe = {k: getattr(self, k) for k in Recipe.model_fields}
        return RunConfig(model=model, task=self.task, lr=lr, seed=seed, **recipe)


def checked(kind: type[BaseModel], **values: object) -> BaseModel:
    """An instance of `kind`, its complaints as one FormariumError; unknown names suggest the nearest."""
    for name in sorted(values.keys() - kind.model_fields.keys() - {"recipe"}):
        raise unknown("setting", name, kind.model_fields)
    try:
        return kind(**values)
    except ValueError as error:
        rows = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" if e["loc"] else e["msg"]
                for e in error.errors()]  # type: ignore[attr-defined]
        raise FormariumError("; ".join(rows)) from None


def write_json(path: Path, value: object) -> None:
    """JSON, complete or not at all."""
    text = json.dumps(value, indent=1, default=str, allow_nan=False)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormariumError(f"{path} cannot be read ({error}); remove the folder to start afresh") from None


def claim_folder(folder: Path, name: str, config: BaseModel, extra: dict[str, object]) -> None:
    """Writes the run file `name` into a new folder; an existing one must describe the same run."""
    path, mine = folder / name, json.loads(config.model_dump_json())
    if path.exists():
        theirs = read_json(path).get("config", {})
        told = {k: f.default for k, f in type(config).model_fields.items() if not f.is_required()}
        theirs = told | theirs  # a file of an older version has not every field
        other = [f"{k} is {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in mine if theirs.get(k) != mine.get(k)]
        if other:
            raise FormariumError(f"{folder} belongs to another run: {'; '.join(other[:3])}. Choose another folder (--out)")
        return
    if folder.exists() and any(folder.iterdir()):
        raise FormariumError(f"{folder} is not empty and holds no {name}; choose another folder (--out)")
    write_json(path, {"config": mine, **extra})
