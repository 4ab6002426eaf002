"""How int8 products are best computed, and what LLM.int8() costs: is `kernel()` of papers/transforms/llm_int8.py right?

    python benchmarks/int8.py [products] [layers] [models] [--rounds N] [--markdown]

products: int8 times int8 to whole numbers: as exact float32 products (block by block), by torch._int_mm; beside them, the
float32 product of the same size, and the weight-only form _weight_int8pack_mm, which rounds no inputs and so is another
function. layers: a linear layer in float32, in int8 without and with outliers. models: whole models in float32 and in int8,
time of a forward pass, bytes, and how far the answers move.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import milliseconds, ratio, table, take_turns, write
from torch import nn

from formarium.core.build import create_model
from formarium.core.transform import apply, size
from formarium.papers.transforms import llm_int8 as int8

Row = dict[str, Any]
SIZES = ((1, 768, 768), (64, 768, 3072), (512, 768, 3072), (512, 3072, 768), (256, 4096, 4096))  # rows, inputs, outputs
MODELS = ("gpt/micro", "gpt/small", "vit/small", "swin/tiny")


def rows(case: Row, runs: dict[str, Callable[[], Any]], rounds: int, base: str, more: Row) -> tuple[Row, Row]:
    """One row for people and one for the file; ratios above one: faster than `base`."""
    with torch.no_grad():
        seconds = take_turns(runs, rounds)
    gains = {f"{base} / {name}": ratio(seconds, base, name) for name in runs if name != base}
    times = {f"{name}, ms": milliseconds(seconds, name) for name in runs}
    print(case, more, {k: str(v) for k, v in gains.items()}, file=sys.stderr)
    return ({**case, **times, **gains, **more},
            {**case, **more, "seconds": seconds, "ratios": {k: v._asdict() for k, v in gains.items()}})


def float_products(a: torch.Tensor, b: torch.Tensor, forced: str) -> torch.Tensor:
    """`int8_matmul` with the kernel that is asked for."""
    before, int8.INT8_UNITS = int8.INT8_UNITS, forced == "int_mm"
    try:
        return int8.int8_matmul(a, b)
    finally:
        int8.INT8_UNITS = before


def products(rounds: int) -> Iterator[tuple[Row, Row]]:
    for m, k, n in SIZES:
        a, b = (torch.randint(-127, 128, (i, k), dtype=torch.int8) for i in (m, n))
        x, w, scale = a.float(), b.float(), torch.ones(n)
        exact = float_products(a, b, "float32").long()
        if not torch.equal(exact, float_products(a, b, "int_mm").long()):
            raise SystemExit(f"{m}x{k}x{n}: the two int8 products differ, nothing to compare")
        runs = {"float32": lambda a=a, b=b: float_products(a, b, "float32"),
                "int_mm": lambda a=a, b=b: float_products(a, b, "int_mm"),
                "plain float": lambda x=x, w=w: x @ w.t(),
                "weight only": lambda x=x, b=b, s=scale: torch.ops.aten._weight_int8pack_mm(x, b, s)}
        yield rows({"rows x inputs x outputs": f"{m}x{k}x{n}"}, runs, rounds, "plain float", {"kernel": int8.kernel()})


def layers(rounds: int) -> Iterator[tuple[Row, Row]]:
    for m, k, n in SIZES:
        linear = nn.Linear(k, n)
        quantised = int8.Int8Linear(linear, 6.0)
        quiet = torch.randn(m, k).clamp(-5.9, 5.9)
        loud = quiet.clone()
        loud[:, :7] = 20
        runs = {"float": partial(linear, quiet), "int8": partial(quantised, quiet), "7 outliers": partial(quantised, loud)}
        yield rows({"rows x inputs x outputs": f"{m}x{k}x{n}"}, runs, rounds, "float", {})


def models(rounds: int) -> Iterator[tuple[Row, Row]]:
    for name in MODELS:
        model = create_model(name).eval()
        quantised = apply(model, "llm_int8")
        batch = model.example(1)
        with torch.no_grad():
            moved = float((quantised(batch) - model(batch)).norm() / model(batch).norm())
        share = size(quantised)["bytes"] / size(model)["bytes"]
        yield rows({"model": name}, {"float": partial(model, batch), "int8": partial(quantised, batch)}, rounds, "float",
                   {"answers moved by": moved, "bytes left": round(share, 3)})


PARTS = {"products": products, "layers": layers, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are: {', '.join(PARTS)}")
    for name in args.parts:
        torch.manual_seed(0)
        shown, raw = zip(*PARTS[name](args.rounds), strict=True)
        write(f"int8_{name}", {"rounds": args.rounds, "kernel": int8.kernel()}, raw)
        print(f"\n{name}\n\n{table(shown, args.markdown)}")


if __name__ == "__main__":
    main()
