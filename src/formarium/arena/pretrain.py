"""Pretrain a model under an objective on a task's inputs: a run like any other, which leaves the encoder."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..skeletons.objective import Objective, loss_of
from ..tasks.base import evaluating, share
from .config import PretrainConfig, checked
from .initial import take_weights, with_fingerprint
from .train import Run, Watch, build_on, slug

EVALUATED = 256  # samples in a batch


class Pretraining(Run):
    """A run that only its objective judges, which need not do the task. The test part is not looked at, and the labels by
    supervised objectives alone."""

    config: PretrainConfig
    last = "encoder.safetensors"

    def build(self) -> Any:
        model = build_on(self.config.model, self.task)
        if self.config.init is not None:
            self.init = {"init": take_weights(model, self.config.init)}
        return self.under(model)

    def score(self, model: Objective) -> tuple[dict[str, float], float]:
        """Means over the validation samples, always with the same random choices; of the moving average, where there is
        one."""
        trained = model.model
        model.model = self.weights(model)
        try:
            return self._score(model)
        finally:
            model.model = trained

    def _score(self, model: Objective) -> tuple[dict[str, float], float]:
        totals: Counter[str] = Counter()
        with evaluating(model) as device, torch.random.fork_rng():
            torch.manual_seed(0)
            for batch in self.task.batches("val", EVALUATED):
                inputs, *targets = share(batch, device=device)
                loss, numbers = loss_of(model, model, (inputs, *targets))
                size = len(inputs[0] if isinstance(inputs, tuple) else inputs)
                totals.update({k: v.item() * size for k, v in {"loss": loss, **numbers}.items()})
                totals["samples"] += size
        found = {k: v / totals["samples"] for k, v in totals.items() if k != "samples"}
        return found, -found["loss"]

    def found(self, model: Objective) -> dict[str, Any]:
        return {"val": self.score(model)[0], "does_task": isinstance(self.plain(model), self.task.model_type)}


def pretrain(model: str, objective: str, task: str = "mnist5k", *, out: str | Path | None = None,
             watch: Watch | None = None, **settings: Any) -> dict[str, Any]:
    """Pretrains a model; returns {"val": {...}, "encoder": path, "folder", "steps", "seconds", "does_task", ...}.

    objective: a name with options, "droppos(pos_ratio=0.5)". settings: fields of RunConfig, as for `train`. out: the run's
    folder; the same call again resumes it. encoder.safetensors there is what `load` reads and `train(init=)` starts from.
    does_task: whether the model can be trained for this very task afterwards, or for others only.
    """
    config = checked(PretrainConfig, model=model, objective=objective, task=task, **with_fingerprint(settings))
    assert isinstance(config, PretrainConfig)
    name = f"{slug(model)}-{slug(objective)}-{slug(task)}-seed{config.seed}"
    folder = Path(out) if out else Path("runs") / name
    found = Pretraining(config, folder, watch=watch).train()
    return found | {"folder": str(folder), "encoder": str(folder / Pretraining.last)}
