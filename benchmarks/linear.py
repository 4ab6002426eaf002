"""Do linear mixers grow linearly? cosFormer's attention and the delta rule against causal softmax, forward and backward.

    python benchmarks/linear.py [--rounds N] [--markdown]

The exponent is the slope of log time over log length, fitted over the lengths from 2,048 up, where fixed costs no longer
count. The crossover is the least length of those measured from which on the mixer is faster.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention import HEAD_DIM, HEADS, passes, qkv
from measure import milliseconds, ratio, table, take_turns, write
from torch import Tensor

from formarium.papers.mixers.deltanet import delta_rule
from formarium.parts.attend import attend
from formarium.parts.linear import causal_linear_attention

LENGTHS = (512, 1024, 2048, 4096, 8192)
FITTED = 2048


def functions(n: int) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """What is compared, and the tensors that get gradients."""
    q, k, v = qkv(1, HEADS, n, HEAD_DIM)
    beta = torch.rand(1, HEADS, n)
    angle = torch.pi / 2 * torch.arange(1, n + 1)[:, None] / n

    def cosine(x: Tensor) -> Tensor:
        return torch.cat((x.relu() * angle.sin(), x.relu() * angle.cos()), dim=-1)

    def delta() -> Tensor:
        return delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta)[0]

    return {"cosformer": lambda: causal_linear_attention(cosine(q), cosine(k), v)[0], "deltanet": delta,
            "softmax": lambda: attend(q, k, v, causal=True)}, [q, k, v]


def slope(times: dict[int, float]) -> float:
    """Of log time over log length, by least squares."""
    points = [(math.log(n), math.log(t)) for n, t in times.items() if n >= FITTED]
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns at 1,024 tokens; fewer for long sequences")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    times: dict[tuple[str, str], dict[int, float]] = {}
    rows: list[dict[str, Any]] = []
    raw = []
    for n in LENGTHS:
        torch.manual_seed(0)
        made, wanted = functions(n)
        both = {name: dict(passes(f, wanted)) for name, f in made.items()}
        for what in ("forward", "forward + backward"):
            turns = max(3, args.rounds * 1024 // n)
            seconds = take_turns({name: runs[what] for name, runs in both.items()}, turns, warmup=1)
            for name in made:
                times.setdefault((name, what), {})[n] = milliseconds(seconds, name)
            gains = {f"softmax / {name}": ratio(seconds, "softmax", name) for name in made if name != "softmax"}
            print(n, what, {k: str(g) for k, g in gains.items()}, file=sys.stderr)
            rows.append({"tokens": n, "pass": what, **{f"{m}, ms": times[m, what][n] for m in made}, **gains})
            raw.append({"tokens": n, "pass": what, "seconds": seconds,
                        "ratios": {k: g._asdict() for k, g in gains.items()}})
    print(table(rows, args.markdown))
    summary = []
    for (name, what), t in times.items():
        faster = [n for n in LENGTHS if all(times[name, what][m] < times["softmax", what][m] for m in LENGTHS if m >= n)]
        summary.append({"mixer": name, "pass": what, "exponent": f"{slope(t):.2f}",
                        "faster from": "-" if name == "softmax" else f"{faster[0]} tokens" if faster else "not here"})
    print("\n" + table(summary, args.markdown))
    write("linear", {"rounds": args.rounds, "heads": HEADS, "head_dim": HEAD_DIM}, [*raw, *summary])


if __name__ == "__main__":
    main()
