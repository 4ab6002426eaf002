"""The pieces of HTML that the report's sections share. Texts are escaped here, the rest is HTML."""

import re
from collections.abc import Iterable

from .plots import COLOURS, ROUNDS, Page
from .words import esc, known


def model_name(i: int, model: str, below: str = "") -> str:
    """A model as it is called everywhere: number, colour with line and marker, name."""
    colour, (dashes, _, shape) = f"var(--c{i % len(COLOURS)})", ROUNDS[i // len(COLOURS) % len(ROUNDS)]
    breakable = re.sub(r"([/:,=(])", r"\1<wbr>", esc(model))
    swatch = (f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5h26" stroke="{colour}" '
              f'stroke-dasharray="{" ".join(map(str, dashes))}"/><path d="{shape}" fill="{colour}"/></svg>')
    return (f'<span class="model" data-pick="{i}"><span class="number">{i + 1}</span>{swatch}'
            f'<span><b class="name">{breakable}</b>{below}</span></span>')


def cell(text: str, value: float | None = None, hint: str = "", kind: str = "") -> str:
    """A td; value: what the column is sorted by; hint: shown where the pointer rests; kind: its class."""
    told = "".join(f' {k}="{esc(v)}"' for k, v in (("title", hint), ("class", kind)) if v)
    return f'<td data-v="{value if known(value) else ""}"{told}>{text}</td>'


def grid(kind: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of heads and cells that bring their own th and td."""
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table>'


def legend(page: Page) -> str:
    """Every model as a list item."""
    return "".join(f"<li>{model_name(i, r['model'])}</li>" for i, r in enumerate(page.rows))
