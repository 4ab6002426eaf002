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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import milliseconds, ratio, table, take_turns, write
from torch import Tensor

from formarium.arena.train import build_for, rate_at
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import Model
from formarium.core.transform import apply
from formarium.papers.transforms.zero_tprune import Pruning
from formarium.skeletons.backbone import Backbone
from formarium.tasks.base import Task
from formarium.tasks.registry import get_task
from formarium.weights.load import load

Choose = Callable[[Pruning, Tensor, Tensor, int], Tensor]
BATCH = 64  # images of a timed forward pass


def best(scores: Tensor, pruning: Pruning) -> Tensor:
    """The tokens of the highest scores, in order, as many as Zero-TPrune would keep."""
    return scores.topk(pruning.counts(scores.shape[1])[1], dim=1).indices.sort(dim=1).values


def by_votes(pruning: Pruning, attention: Tensor, keys: Tensor, prefix: int) -> Tensor:
    return best(pruning.importance(attention, prefix, pruning.iterations), pruning)


def by_likeness(pruning: Pruning, attention: Tensor, keys: Tensor, prefix: int) -> Tensor:
    """Stage S alone, again and again where more than half of the tokens are to go."""
    n = attention.shape[-1] - prefix
    wanted, kept = pruning.counts(n)[1], torch.arange(n).expand(len(attention), n)
    while kept.shape[1] > wanted:
        m = kept.shape[1]
        alone = Pruning(1.0, min(m - wanted, m // 2), 1, pruning.variance, pruning.uniform)
        full = torch.cat((torch.arange(prefix).expand(len(kept), prefix), kept + prefix), dim=1)
        graph = torch.stack([a[:, i][:, :, i] for a, i in zip(attention, full, strict=True)])
        vectors = torch.stack([k[:, i] for k, i in zip(keys, full, strict=True)])
        kept = kept.gather(1, alone.choose(graph / graph.sum(-1, keepdim=True), vectors, prefix))
    return kept


def by_class(pruning: Pruning, attention: Tensor, keys: Tensor, prefix: int) -> Tensor:
    if not prefix:
        raise DoesNotFit("this model has no class token whose attention could choose (pool='mean')")
    return best(attention[:, :, 0, prefix:].mean(1), pruning)


def at_random(generator: torch.Generator, pruning: Pruning, attention: Tensor, keys: Tensor, prefix: int) -> Tensor:
    return best(torch.rand(len(attention), attention.shape[-1] - prefix, generator=generator), pruning)


def ways() -> dict[str, list[Choose]]:
    """Name -> how tokens are chosen; several where chance decides."""
    return {"Zero-TPrune": [Pruning.choose], "votes alone": [by_votes], "likeness alone": [by_likeness],
            "class attention": [by_class],
            "random": [partial(at_random, torch.Generator().manual_seed(seed)) for seed in range(3)]}


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


def pruned(model: Model, keep: float, similar: float, choose: Choose) -> Model:
    model = apply(model, "zero_tprune", keep=keep, similar=similar)
    for module in model.modules():
        if isinstance(module, Pruning):
            module.choose = partial(choose, module)  # type: ignore[method-assign]
    return model


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
        models = {name: [pruned(whole, keep, options.similar, c) for c in each] for name, each in ways().items()}
        runs = {name: partial(each[0], example) for name, each in models.items()} | {"unpruned": partial(whole, example)}
        with torch.no_grad():
            seconds = take_turns(runs, options.rounds)
        for name, each in models.items():
            found = [task.evaluate(m, "test")["accuracy"] for m in each]
            count, macs = tokens(each[0], example), None
            if name == "Zero-TPrune":  # the votes and likenesses of the others are not of use to compare
                macs = count_macs(each[0], example) / BATCH
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
