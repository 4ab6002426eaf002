"""Forward and training-step time of image backbones against timm's, with the same weights, in one process.

Run in an environment with timm and formarium: `python benchmarks/timm_ratio.py --markdown`.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import milliseconds, ratio, table, take_turns, write
from peer_shim import import_timm
from torch import Tensor, nn

import formarium as fm

PAIRS = {
    "vit/small": "vit_small_patch16_224",
    "swin/tiny": "swin_tiny_patch4_window7_224",
    "poolformer/s12": "poolformer_s12",
    "deit/small_distilled": "deit_small_distilled_patch16_224",
    "three_things/small_18x2": "vit_small_patch16_18x2_224",
    "pit/small": "pit_s_224",
    "cait/xxs24": "cait_xxs24_224",
    "tnt/small": "tnt_s_patch16_224",
    "crossvit/small": "crossvit_small_240",
}
HEADS = {"vit/small": {"heads": 6}, "three_things/small_18x2": {"heads": 6}}
TOLERANCE = 1e-4  # the greatest difference of two logits


def build(name: str, peer: str) -> dict[str, nn.Module]:
    """Our model and timm's, with the same random weights."""
    torch.manual_seed(0)
    theirs = import_timm().create_model(peer, drop_path_rate=0.0)
    ours = fm.load(theirs.state_dict(), name=name, layout="timm", **HEADS.get(name, {}))
    return {"ours": ours, "timm": theirs}


def forward(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        answers = model(images)
        if isinstance(answers, tuple):  # two classifiers, which timm averages in training too unless told otherwise
            answers = (answers[0] + answers[1]) / 2
        F.cross_entropy(answers, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forward", action="store_true", help="no training steps")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    images, labels = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))
    rows, raw = [], []
    for name in args.models:
        models = build(name, PAIRS[name])
        answers = [forward(m, images)() for m in models.values()]
        difference = (answers[0] - answers[1]).abs().max().item()
        if difference > TOLERANCE:
            raise SystemExit(f"{name} and {PAIRS[name]} differ by {difference:.1e}: nothing to compare")
        for what in ("forward", *["training step"] * (not args.forward)):  # each sets the mode of the models
            runs = {k: forward(m, images) if what == "forward" else training_step(m, images, labels)
                    for k, m in models.items()}
            seconds = take_turns(runs, args.rounds)
            found = ratio(seconds, "ours", "timm")
            rows.append({"model": name, "what": what, "ours, ms": milliseconds(seconds, "ours"),
                         "timm, ms": milliseconds(seconds, "timm"), "ours / timm": found, "difference": difference})
            print(f"{name} {what}: {found}", file=sys.stderr)
            raw.append({"model": name, "peer": PAIRS[name], "what": what, "ratio": found._asdict(), "seconds": seconds,
                        "difference": difference})
    print(table(rows, args.markdown))
    write("timm_ratio", {"batch": args.batch, "size": 224, "rounds": args.rounds}, raw)


if __name__ == "__main__":
    main()
