"""What token pruning without training costs in accuracy and gains in time: Zero-TPrune against simpler choices of tokens.

    python benchmarks/zero_tprune.py [--task mnist5k] [--model vit/nano] [--steps 1500] [--weights FILE]
                                     [--keep 0.9 0.8 0.7 0.5] [--similar 0.05] [--rounds 15] [--markdown]

A model is trained on the task (or read from --weights), then pruned at each rate in each way, with the same numbers of
tokens in every layer: by Zero-TPrune; by its votes alone (no stage S); by its likeness alone (no votes but the ranking); by
the attention of the class token; at random. Accuracy is on the whole test set, time is of a forward pass of 64 images, with
the unpruned model in turns. Tokens are those that each layer sees, the class token included; their mean says what is left.
"""

import argparse
import statistics
import sys
from functools import partial
from typing import Any

import torch
from measure import milliseconds, ratio, table, take_turns, write
from torch import Tensor

from formarium.arena.train import build_for, rate_at
from formarium.core.macs import count_macs
from formarium.core.model import Model
from formarium.core.transform import apply
from formarium.skeletons.backbone import Backbone
from formarium.tasks.base import Task
from formarium.tasks.registry import get_task
from formarium.weights.load import load

WAYS = {"Zero-TPrune": "graph", "votes alone": "votes", "likeness alone": "likeness", "class attention": "class",
        "random": "random"}
BATCH = 64  # images of a timed forward pass


def trained(name: str, task: Task, steps: int) -> Model:
    torch.manual_seed(0)
    model = build_for(name, task).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-3, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step / steps, 1e-3, 0.1)
        task.loss(model, task.train_batch(0, step, BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def accuracies(model: Model, task: Task, by: str) -> list[float]:
    """On the whole test set; several where chance decides."""
    found = []
    for seed in range(3 if by == "random" else 1):
        torch.manual_seed(seed)
        found.append(task.evaluate(model, "test")["accuracy"])
    return found


@torch.no_grad()
def tokens(model: Model, example: Tensor) -> list[int]:
    """How many tokens each layer sees."""
    assert isinstance(model, Backbone)
    seen: list[int] = []
    hooks = [layer["mixer"].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
             for stage in model.stages for layer in stage.layers]
    model(example)
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--model", default="vit/nano")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--weights", help="a file of ours that fits the task, instead of training")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--similar", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    task = get_task(options.task)
    loaded = load(options.weights) if options.weights else trained(options.model, task, options.steps)
    assert isinstance(loaded, Model)
    whole, example = loaded, torch.randn(BATCH, *loaded.example(1).shape[1:])
    accuracy = task.evaluate(whole, "test")["accuracy"]
    macs = count_macs(whole, example) / BATCH
    shown: list[dict[str, Any]] = [{"keep": "all", "way": "unpruned", "accuracy %": 100 * accuracy,
                                    "tokens": statistics.mean(tokens(whole, example)), "M MACs": macs / 1e6, "ms": "",
                                    "unpruned / it": ""}]
    raw: list[dict[str, Any]] = [{"way": "unpruned", "accuracy": [accuracy], "tokens": tokens(whole, example),
                                  "macs": macs}]
    for keep in options.keep:
        models = {name: apply(whole, "zero_tprune", keep=keep, similar=options.similar, by=by) for name, by in WAYS.items()}
        runs = {name: partial(m, example) for name, m in models.items()} | {"unpruned": partial(whole, example)}
        with torch.no_grad():
            seconds = take_turns(runs, options.rounds)
        for name, model in models.items():
            found = accuracies(model, task, WAYS[name])
            count, macs = tokens(model, example), None
            if name == "Zero-TPrune":  # the votes and likenesses of the others are not of use to compare
                macs = count_macs(model, example) / BATCH
            gain = ratio(seconds, "unpruned", name)
            shown.append({"keep": keep, "way": name, "accuracy %": 100 * statistics.mean(found),
                          "tokens": statistics.mean(count), "M MACs": macs / 1e6 if macs else "",
                          "ms": milliseconds(seconds, name), "unpruned / it": gain})
            raw.append({"keep": keep, "way": name, "accuracy": found, "tokens": count, "seconds": seconds[name],
                        "macs": macs, "ratio": gain._asdict()})
            print(shown[-1], file=sys.stderr)
    write(f"zero_tprune_{options.task.partition(':')[0]}", vars(options), raw)
    print(table(shown, options.markdown))


if __name__ == "__main__":
    main()
