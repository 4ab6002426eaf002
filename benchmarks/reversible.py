"""Memory of a training step by depth: reversible layers against plain ones, and against those with gradient checkpointing.

    python benchmarks/reversible.py [--dim 64] [--tokens 256] [--batch 8] [--mixer attention] [--markdown]

Bytes at the highest point of forward and backward pass beyond weights and input, counted through every operation: they are
the same on every run. The gradients of the weights are among them, and are given alone for comparison.
"""

import argparse

import torch
from measure import table, write

from formarium.arena.measure import _LiveMemory
from formarium.core.build import part
from formarium.core.ctx import Ctx
from formarium.skeletons.stack import Stack

DEPTHS = (4, 8, 16, 32)
FORMS = {"plain": ("pre_norm", False), "checkpointed": ("pre_norm", True), "reversible": ("reversible", False)}


def peak(residual: str, checkpointing: bool, depth: int, x: torch.Tensor, mixer: str) -> tuple[int, int]:
    """Bytes beyond weights and input: at the highest point, and of the gradients of the weights."""
    torch.manual_seed(0)
    sublayers = {"mixer": part("mixer", mixer), "channel": part("channel", "mlp")}
    stack = Stack(x.shape[-1], depth, sublayers, part("residual", residual)).train()
    stack.checkpointing = checkpointing
    with _LiveMemory([x, *stack.parameters()]) as memory:
        held = memory.now
        stack(x, Ctx())[0].sum().backward()
    return memory.peak - held, sum(p.numel() * p.element_size() for p in stack.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mixer", default="attention", help="a part by name, with options as in 'reformer(chunk=32)'")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    x, shown, raw = torch.randn(args.batch, args.tokens, args.dim), [], []
    for depth in DEPTHS:
        found = {name: peak(*form, depth, x, args.mixer) for name, form in FORMS.items()}
        gradients = found["plain"][1]
        shown.append({"depth": depth, **{f"{name}, MiB": used / 2**20 for name, (used, _) in found.items()},
                      "gradients, MiB": gradients / 2**20})
        raw.append({"depth": depth, "gradients": gradients, **{name: used for name, (used, _) in found.items()}})
    print(table(shown, args.markdown))
    write("reversible", {"dim": args.dim, "tokens": args.tokens, "batch": args.batch, "mixer": args.mixer}, raw)


if __name__ == "__main__":
    main()
