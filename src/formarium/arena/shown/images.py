"""Classified images: columns are the samples, rows the models."""

from collections.abc import Sequence

from ..html import grid, model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same images, seen by every model"
ABOUT = ("The truth is under each image, the answer of each model below it, from its first run that finished. A wrong "
         "answer has a &times; and a tinted ground. The bar is the model's confidence.")


def answers(found: Found, pictures: Sequence[str]) -> str:
    """The table of what each model says of samples, whose pictures (HTML) stand above."""
    lines = []
    for i, model, s in found:
        asked = [*zip(s["predicted"], s["truth"], s["confidence"], strict=True)]
        cells = [f'<td class="guess{" miss" * (p != t)}" title="{esc(f"says {p}, is {t}, {c:.0%} sure")}">{"× " * (p != t)}'
                 f'{esc(p)}<span class="sure"><i style="width:{c:.0%}"></i></span></td>' for p, t, c in asked]
        right = sum(p == t for p, t, _ in asked)
        lines.append([f"<td>{model_name(i, model)}</td>", *cells, f'<td class="soft">{right} of {len(asked)}</td>'])
    heads = [f"<th>{picture}{esc(truth)}</th>" for picture, truth in zip(pictures, found[0][2]["truth"], strict=True)]
    table = grid("sample", ["<th>Truth</th>", *heads, "<th>Right</th>"], lines)
    return f'<div class="scroll" tabindex="0">{table}</div>'


def draw(page: Page, found: Found) -> str:
    return answers(found, [f'<img alt="" src="data:image/png;base64,{esc(png)}">' for png in found[0][2]["images"]])
