"""What the arena's loop costs over a bare training loop: the same model, data, optimiser and evaluations, in turns.

    python benchmarks/loop.py [--steps 200] [--rounds 5] [--markdown]

The arena's time is of the whole run: configuration, logging, learning rate, finiteness, files and all.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from measure import milliseconds, ratio, table, take_turns, write

from formarium.arena.config import RunConfig
from formarium.arena.train import Run, build_for, rate_at
from formarium.tasks.base import Task
from formarium.tasks.registry import get_task

CASES = (("vit/nano", "mnist5k"), ("swin/nano", "mnist5k"), ("gpt/nano", "stdlib"))


def bare(model_name: str, task: Task, steps: int) -> None:
    """The loop that anyone would write by hand."""
    torch.manual_seed(0)
    model = build_for(model_name, task).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-3, fused=True)
    params = list(model.parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step / steps, 1e-3, 0.1)
        loss = task.loss(model, task.train_batch(0, step, 64))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    task.evaluate(model, "val")
    task.evaluate(model, "test")
    task.show(model)


def arena(model_name: str, task: Task, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(model=model_name, task=task.name, steps=steps, evaluations=1)
        Run(config, Path(folder) / "run", task).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    rows, raw = [], []
    for model, task_name in CASES:
        task = get_task(task_name)
        seconds = take_turns({"arena": lambda m=model, t=task: arena(m, t, options.steps),
                              "bare": lambda m=model, t=task: bare(m, t, options.steps)}, options.rounds, warmup=1)
        found = ratio(seconds, "arena", "bare")
        print(f"{model} on {task_name}: {found}", file=sys.stderr)
        rows.append({"model": model, "task": task_name, "arena, ms": milliseconds(seconds, "arena"),
                     "bare, ms": milliseconds(seconds, "bare"), "arena / bare": found})
        raw.append({"model": model, "task": task_name, "ratio": found._asdict(), "seconds": seconds})
    print(table(rows, options.markdown))
    write("loop", {"steps": options.steps, "rounds": options.rounds, "batch": 64}, raw)


if __name__ == "__main__":
    main()
