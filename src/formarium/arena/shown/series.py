"""Forecasts: a figure a window, with history, truth, and the forecast of each model."""

from collections.abc import Sequence
from typing import Any

from ..html import legend
from ..plots import COLOURS, GREY, Found, Page, style, svg
from ..words import esc

HEADING = "The same windows, forecast by every model"
ABOUT = ("Left of the grey line is the history that the models saw, of one variate and in its own units; the broad line is "
         "what followed, the coloured ones are the forecasts, each from the model's first run that finished.")


def draw(page: Page, found: Found) -> str:
    first, figures = found[0][2], []
    for w, (history, truth) in enumerate(zip(first["history"], first["truth"], strict=True)):
        def plot(ax: Any, w: int = w, past: Sequence[float] = history, future: Sequence[float] = truth) -> bool:
            after = range(len(future))
            ax.plot(range(-len(past), 0), past, color=COLOURS[-1], linewidth=1)
            ax.plot(range(-1, len(future)), [past[-1], *future], color=COLOURS[-1], linewidth=3.5, alpha=0.28)
            for i, _, s in found:
                ax.plot(after, s["forecast"][w], **style(i), linewidth=1.5)
            ax.axvline(-0.5, color=GREY, linewidth=1)
            ax.margins(x=0.01)
            ax.set_xlabel("Step from the first that is forecast")
            return True

        title = f"{first['variate']}, window {w + 1} of {len(first['history'])}"
        drawn = svg(title, [r["model"] for r in page.rows], plot, 1.0)
        figures.append(f"<figure><figcaption>{esc(title)}</figcaption>{drawn}</figure>")
    return f'<ul class="legend">{legend(page)}</ul><div class="plots">{"".join(figures)}</div>'
