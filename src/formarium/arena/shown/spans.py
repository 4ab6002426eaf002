"""A text whose characters have kinds: the truth, and what each model says of the same text."""

from itertools import groupby

from ..html import model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same text, read by every model"
ABOUT = ("Kinds have the colours of the legend; they are the right ones first, then the model's, from its first run that "
         "finished. What a model says wrongly is underlined.")
COLOURS = ("transparent", "#cfe3f7", "#f7d9c4", "#d5ecd0", "#e4e4e4", "#f3e3a6", "#e3d3f0", "#f7cfd8", "#cdeeee", "#e8dccb")


def draw(page: Page, found: Found) -> str:
    first = found[0][2]
    legend = " ".join(f'<span style="background:{colour(i)};color:#111">{esc(name)}</span>'
                      for i, name in enumerate(first["names"]) if colour(i) != COLOURS[0])
    blocks = [f"<div>Right<pre>{painted(first['text'], first['truth'], first['truth'])}</pre></div>"]
    for i, model, s in found:
        right = sum(a == t for a, t in zip(s["answer"], s["truth"], strict=True)) / len(s["truth"])
        blocks.append(f"<div>{model_name(i, model)}<small>{right:.1%} of these</small>"
                      f"<pre>{painted(s['text'], s['answer'], s['truth'])}</pre></div>")
    return f'<p>{legend}</p><div class="texts">{"".join(blocks)}</div>'


def colour(kind: int) -> str:
    return COLOURS[kind % len(COLOURS)]


def painted(text: str, kinds: list[int], truth: list[int]) -> str:
    """Runs of characters with one kind and one judgement each a span."""
    parts = []
    for (kind, wrong), run in groupby(zip(text, kinds, truth, strict=True), key=lambda c: (c[1], c[1] != c[2])):
        inner = esc("".join(c for c, _, _ in run))
        ground = f"background:{colour(kind)};color:#111" if kind else ""
        parts.append(f'<span style="{ground}{";" * bool(ground)}{"text-decoration:underline 2px #c00" if wrong else ""}">'
                     f"{inner}</span>" if ground or wrong else inner)
    return "".join(parts)
