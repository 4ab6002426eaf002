"""How softmax attention is best computed: where `attend` chooses, this measures whether it chooses well.

    python benchmarks/attention.py [window] [packed] [explicit] [--rounds N] [--markdown]

window: a sliding window of 256 tokens in bands, against full attention and against the window as a mask.
packed: sequences of unequal length in one packed row, against a padded batch with a key mask, in a stack of BERT-base's
width. explicit: small windows with the product written out, against fused SDPA.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from measure import milliseconds, ratio, table, take_turns, write
from torch import Tensor

from formarium.core.ctx import Ctx
from formarium.core.spec import spec
from formarium.parts import attend as choices
from formarium.parts.attend import attend, visible
from formarium.parts.attention import Attention
from formarium.parts.channel import Mlp
from formarium.parts.residual import PreNorm
from formarium.skeletons.stack import Stack

Row = dict[str, Any]
HEADS, HEAD_DIM, WINDOW = 8, 64, 256
TOLERANCE = 1e-4  # the greatest difference of two answers that ought to be equal


def qkv(batch: int, heads: int, n: int, d: int) -> list[Tensor]:
    """Queries, keys and values as a projection gives them: strided, one tensor."""
    x = torch.randn(batch, n, 3, heads, d).requires_grad_()
    return list(x.permute(2, 0, 3, 1, 4).unbind(0))


def passes(f: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The function without gradients, and with its backward pass to the tensors `wanted`."""
    grad = torch.randn_like(f())

    def forward() -> None:
        with torch.no_grad():
            f()

    def backward() -> None:
        torch.autograd.grad(f(), wanted, grad)

    return iter((("forward", forward), ("forward + backward", backward)))


def compare(case: Row, functions: dict[str, Callable[[], Tensor]], wanted: Sequence[Tensor], rounds: int,
            ours: str, difference: float) -> Iterator[tuple[Row, Row]]:
    """One row for people and one for the file, for each pass. The functions take turns."""
    if difference > TOLERANCE:
        raise SystemExit(f"{case}: the answers differ by {difference:.1e}, nothing to compare")
    both = {name: dict(passes(f, wanted)) for name, f in functions.items()}
    for what in ("forward", "forward + backward"):
        seconds = take_turns({name: runs[what] for name, runs in both.items()}, rounds, warmup=1)
        times = {f"{name}, ms": milliseconds(seconds, name) for name in functions}
        gains = {f"{name} / {ours}": ratio(seconds, name, ours) for name in functions if name != ours}
        print(case, what, {k: str(v) for k, v in gains.items()}, file=sys.stderr)
        yield ({**case, "pass": what, **times, **gains, "difference": difference},
               {**case, "pass": what, "seconds": seconds, "difference": difference,
                "ratios": {k: v._asdict() for k, v in gains.items()}})


def window(rounds: int) -> Iterator[tuple[Row, Row]]:
    for causal in (True, False):
        for n in (1024, 2048, 4096, 8192):
            q, k, v = qkv(1, HEADS, n, HEAD_DIM)
            mask = visible(n, n, causal, WINDOW)
            functions = {
                "banded": lambda q=q, k=k, v=v, c=causal: attend(q, k, v, causal=c, window=WINDOW),
                "full": lambda q=q, k=k, v=v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),
                "masked": lambda q=q, k=k, v=v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
            }
            with torch.no_grad():
                difference = (functions["banded"]() - functions["masked"]()).abs().max().item()
            case = {"window": f"{WINDOW}, {'causal' if causal else 'both sides'}", "tokens": n}
            yield from compare(case, functions, (q, k, v), max(3, rounds * 1024 // n), "banded", difference)


def packed(rounds: int, width: int = 768, heads: int = 12, layers: int = 2) -> Iterator[tuple[Row, Row]]:
    torch.manual_seed(0)
    stack = Stack(width, layers, {"mixer": spec(Attention, heads=heads), "channel": spec(Mlp)}, spec(PreNorm))
    for batch in (0, 1, 11):  # seeds: fills of 0.69, 0.52 and 0.48
        lengths = tuple(torch.randint(16, 513, (8,), generator=torch.Generator().manual_seed(batch)).tolist())
        row = torch.randn(1, sum(lengths), width)
        longest = max(lengths)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        padded = torch.zeros(len(lengths), longest, width)
        padded[real] = row[0]
        functions = {
            "packed": lambda x=row, n=lengths: stack(x, Ctx(lengths=n))[0],
            "padded": lambda x=padded, m=real: stack(x, Ctx(mask=m[:, None, None]))[0],
        }
        with torch.no_grad():
            difference = (functions["packed"]()[0] - functions["padded"]()[real]).abs().max().item()
        case = {"batch": batch, "tokens": sum(lengths), "fill": round(sum(lengths) / (len(lengths) * longest), 2)}
        yield from compare(case, functions, list(stack.parameters()), rounds, "packed", difference)


def explicit(rounds: int) -> Iterator[tuple[Row, Row]]:
    for n in (16, 36, 49, 64, 100, 144, 196, 256):
        for with_bias in (False, True):
            q, k, v = qkv(max(1, 8192 // n), 6, n, 32)
            bias = torch.randn(6, n, n).requires_grad_() if with_bias else None
            functions = {
                "explicit": lambda q=q, k=k, v=v, b=bias: choices._explicit(q, k, v, b, None, None),
                "SDPA": lambda q=q, k=k, v=v, b=bias: F.scaled_dot_product_attention(q, k, v, attn_mask=b),
            }
            with torch.no_grad():
                difference = (functions["explicit"]() - functions["SDPA"]()).abs().max().item()
            wanted = (q, k, v) if bias is None else (q, k, v, bias)
            yield from compare({"tokens": n, "bias": "yes" if with_bias else "no"}, functions, wanted, rounds, "explicit",
                               difference)


PARTS = {"window": window, "packed": packed, "explicit": explicit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each run takes; fewer for long sequences")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are: {', '.join(PARTS)}")
    for name in args.parts:
        torch.manual_seed(0)
        shown, raw = zip(*PARTS[name](args.rounds), strict=True)
        write(f"attention_{name}", {"rounds": args.rounds}, raw)
        print(f"\n{name}\n\n{table(shown, args.markdown)}")


if __name__ == "__main__":
    main()
