"""Parameters and multiply-accumulates of every preset against its paper's table: `python benchmarks/macs.py [PATTERN]`."""

import argparse

import torch
from measure import table

import formarium as fm
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters


def apart(ours: float, published: float | None) -> str:
    return "-" if published is None else f"{100 * (ours / published - 1):+.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="a name or glob, e.g. 'restormer*'")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows = []
    for name in fm.list_models(args.pattern):
        system, _, variant = name.partition("/")
        published = fm.card(system).variants.get(variant)
        if published is None or (published.params is None and published.macs is None):
            continue
        with torch.device("meta"):
            model = fm.create_model(name)
            macs = count_macs(model, model.example(1, published.input)) if published.macs else None
        params = count_parameters(model)
        rows.append({"model": name, "params": f"{params / 1e6:.2f} M", "to the paper": apart(params, published.params),
                     "MACs": "-" if macs is None else f"{macs / 1e9:.2f} G",
                     "to the paper's": "-" if macs is None else apart(macs, published.macs)})
    print(table(rows, args.markdown) if rows else f"nothing published of {args.pattern}")


if __name__ == "__main__":
    main()
