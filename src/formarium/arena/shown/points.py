"""Classified sets of points: columns are the sets, rows the models."""

from collections.abc import Sequence

from ..plots import Found, Page
from ..words import esc
from .images import answers

HEADING = "The same sets of points, seen by every model"
ABOUT = ("The truth is under each set, the answer of each model below it, from its first run that finished. A wrong "
         "answer has a &times; and a tinted ground. The bar is the model's confidence. Stronger points are nearer, or "
         "have more ink.")
SIZE = 72  # pixels
SHADES = (0.3, 0.6, 1.0)  # of far, middle, near


def cloud(points: Sequence[Sequence[float]], title: str) -> str:
    """Points (right, up, nearness) as SVG, the nearest on top."""
    paths = []
    for i, shade in enumerate(SHADES):
        dots = "".join(f"M{x:.2f} {-y:.2f}h0" for x, y, near in points if i == min(int(3 * near), 2))
        if dots:
            paths.append(f'<path d="{dots}" stroke-opacity="{shade}"/>')
    return (f'<svg viewBox="-1.1 -1.1 2.2 2.2" width="{SIZE}" height="{SIZE}" role="img" aria-label="{esc(title)}" '
            f'fill="none" stroke="currentColor" stroke-width="0.07" stroke-linecap="round">{"".join(paths)}</svg>')


def draw(page: Page, found: Found) -> str:
    first = found[0][2]
    sets = zip(first["sets"], first["truth"], strict=True)
    return answers(found, [f"{cloud(points, truth)}<br>" for points, truth in sets])
