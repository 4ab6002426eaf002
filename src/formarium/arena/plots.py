"""The report's figures: learning curves, and what a metric costs, as SVG in the page's own colours."""

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .words import SHARES, called, duration, esc, human, known

# Okabe and Ito's palette without its yellow, which white swallows; the template sets --c0 to --c6 for each theme
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# one for each round of colours: dashes, the plots' marker, the same marker as SVG
ROUNDS = (((1, 0), "o", "M13 1.6a3.4 3.4 0 1 0 .01 0z"), ((5, 2), "s", "M10 2h6v6h-6z"),
          ((1.5, 1.5), "^", "M13 1l4 7.5h-8z"), ((6, 2, 1.5, 2), "D", "M13 .8l4.2 4.2-4.2 4.2-4.2-4.2z"))
GREY = "#b0b0b0"
FONT = 10.0  # of plots, points
NAMED = 6  # up to so many models, points carry names; beyond, the numbers of the legend
# where a label may stand: its left edge in widths of the label and points, its middle in points above the point
SPOTS = [(0, 6, 0), (-1, -6, 0), (-.5, 0, 11), (-.5, 0, -11), (0, 5, 9), (0, 5, -9), (-1, -5, 9), (-1, -5, -9),
         (-.5, 0, 22), (-.5, 0, -22), (0, 14, 18), (-1, -14, -18)]
Point = tuple[float, float, int]  # x, y, model


class Cost(NamedTuple):
    """A column of the table that is measured, not scored. better: 1 where more is better."""

    key: str
    title: str
    form: Callable[[float], str]
    better: int = -1


COSTS = (
    Cost("params", "Parameters", human), Cost("macs", "MACs", human), Cost("train_seconds", "Training", duration),
    Cost("peak_memory", "Memory", lambda v: human(v) + "B"), Cost("latency_ms", "Latency", lambda v: duration(v / 1000)),
    Cost("throughput", "Throughput", lambda v: human(v) + "/s", 1),
)

Found = list[tuple[int, str, dict[str, Any]]]  # number of a model, its name, what its task showed


class Page(NamedTuple):
    """What the sections are made from: the folder, compare.json, the rows of results.json."""

    folder: Path
    plan: dict[str, Any]
    rows: list[dict[str, Any]]
    metric: str
    sign: int  # 1: more is better


def figures(page: Page) -> str:
    """Learning curves and trade-offs as figures; those without data are left out."""
    metric, tall = page.metric, 1.25 if len(page.rows) > NAMED else 1.0
    name, models = called(metric), [r["model"] for r in page.rows]

    def axis(v: float) -> str:
        return f"{100 * v:.4g} %" if metric in SHARES else f"{v:.4g}"

    asked = {"Training loss": lambda ax: _curves(page, ax, lambda e: e["loss"], human),
             f"Validation {name}": lambda ax: _curves(page, ax, lambda e: e["val"][metric], axis)}
    for c in COSTS:
        if c.key in ("macs", "latency_ms"):
            asked[f"Test {name} against {c.title.replace('L', 'l')}"] = lambda ax, c=c: _trade(page, ax, c, axis)
    drawn = {title: svg(title, models, draw, tall) for title, draw in asked.items()}
    return "".join(f"<figure><figcaption>{esc(title)}</figcaption>{d}</figure>" for title, d in drawn.items() if d)


def svg(label: str, models: Sequence[str], draw: Callable[[Any], bool], tall: float) -> str:
    """The plot of draw(axes) in the page's colours, "" where it drew nothing; artists with gid "model-N" are model N's."""
    import matplotlib.style
    from matplotlib.figure import Figure

    look = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": FONT, "axes.spines.top": False, "grid.color": GREY,
            "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "axes.linewidth": 0.6,
            "grid.linewidth": 0.6, "text.parse_math": False}
    with matplotlib.style.context(["default", look]), io.StringIO() as file:
        figure = Figure((5.6, 3.6 * tall), dpi=72)  # a pixel is a point
        if not draw(figure.add_axes((0.135, 0.145 / tall, 0.795, 1 - 0.18 / tall))):
            return ""
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
    start = f'<svg class="plot" viewBox="0 0 {5.6 * 72:g} {3.6 * 72 * tall:g}" role="img" aria-label="{esc(label)}">'
    inner = re.split(r"<svg.*?>", text, flags=re.S)[1]
    text = start + re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", inner, flags=re.S)
    text = text.replace('<style type="text/css">*{', '<style type="text/css">.plot *{')  # or it would rule the whole page
    text = re.sub(r'<g id="model-(\d+)(-band)?">', lambda m: f'<g data-model="{m[1]}"{" class=band" if m[2] else ""}>'
                 f"<title>{esc(models[int(m[1])])}</title>", text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text).replace("xlink:href", "href")  # such ids repeat from plot to plot
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{i})")
    return text.replace(GREY, "var(--line)").replace("#ffffff", "var(--bg)")


def style(i: int, line: bool = True) -> dict[str, Any]:
    dashes, marker, _ = ROUNDS[i // len(COLOURS) % len(ROUNDS)]
    look = {"linestyle": (0, dashes)} if line else {"marker": marker, "markersize": 6.5, "markeredgewidth": 1.5}
    return {"color": COLOURS[i % len(COLOURS)], "gid": f"model-{i}", **look}


def _read_curve(path: Path, x: str, pick: Callable[[dict[str, Any]], float | None]) -> np.ndarray:
    """(2, points): x and value from metrics.jsonl, up to the first value that is not finite."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            value = pick(entry)
        except (ValueError, KeyError):  # the other sort of line, or one torn by a kill
            continue
        if not known(value):
            break
        points.append((entry[x], value))
    return np.array(points, dtype=float).reshape(-1, 2).T


def _curves(page: Page, ax: Any, pick: Callable[[dict[str, Any]], float | None], form: Callable[[float], str]) -> bool:
    """A line a model, with a band from the lowest to the highest seed; a failed run is a thin line up to a cross."""
    x, ends, stops, seen = "seconds" if "seconds" in page.plan["budget"] else "step", [], [], []
    for i, row in enumerate(page.rows):
        curves = [(c["status"], _read_curve(page.folder / c["path"] / "metrics.jsonl", x, pick)) for c in row["cells"]]
        done = [curve for status, curve in curves if status == "done" and curve.size]
        for curve in (curve for status, curve in curves if status != "done" and curve.size):
            ax.plot(*curve, **style(i), linewidth=0.9)
            stops.append((*curve[:, -1], i))
        if done:  # where every seed has a value; between steps it is interpolated
            xs = np.unique(np.concatenate([c[0] for c in done]))
            xs = xs[(xs >= max(c[0, 0] for c in done)) & (xs <= min(c[0, -1] for c in done))]
            ys = np.stack([np.interp(xs, *c) for c in done])
            ax.plot(xs, ys.mean(0), **style(i), linewidth=1.5)
            if len(done) > 1:
                ax.fill_between(xs, ys.min(0), ys.max(0), color=COLOURS[i % len(COLOURS)], alpha=0.16, linewidth=0,
                                gid=f"model-{i}-band")
            seen += [ys.min(), ys.max()]
            ends.append((xs[-1], ys.mean(0)[-1], i))
    if seen:  # a loss that exploded leaves the picture; its cross is at the edge
        margin = 0.05 * (max(seen) - min(seen)) or 0.05
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    for at, y, i in stops:
        ax.plot([at], [np.clip(y, *ax.get_ylim())], **style(i, line=False) | {"marker": "x"}, clip_on=False, zorder=4)
    ax.margins(x=0.01)
    ax.set_xlabel("Training time, s" if x == "seconds" else "Step")
    ax.xaxis.set_major_formatter(lambda v, _: human(v))
    ax.yaxis.set_major_formatter(lambda v, _: form(v))
    if len(page.rows) > 1:
        _number_ends(ax, sorted(ends, key=lambda end: end[1]))
    return bool(ends or stops)


def _number_ends(ax: Any, ends: Sequence[Point]) -> None:
    """Writes the models' numbers right of the ends of their curves, in the order of the ends and none on another."""
    at, gap, n = _pixels(ax, ends), 1.05 * FONT, len(ends)
    steps = gap * np.arange(n)
    flat = np.array([at[i][1] for _, _, i in ends]) - steps  # in order where this rises nowhere less than before
    flat = (np.maximum.accumulate(flat) + np.minimum.accumulate(flat[::-1])[::-1]) / 2
    frame = ax.get_window_extent()
    flat = np.clip(flat, frame.y0, max(frame.y0, frame.y1 - gap * (n - 1)))
    for point, height in zip(ends, flat + steps, strict=True):
        _write(ax, str(point[2] + 1), point, (10, height - at[point[2]][1]))


def _pixels(ax: Any, points: Sequence[Point]) -> dict[int, np.ndarray]:
    ax.get_xlim()  # brings the limits, and so transData, up to date
    return {i: ax.transData.transform((x, y)) for x, y, i in points}


def _write(ax: Any, text: str, point: Point, offset: Sequence[float]) -> None:
    """Text whose left edge is so many points from a model's point, joined to it by a thin line."""
    ax.annotate(text, point[:2], offset, textcoords="offset points", va="center", annotation_clip=False,
                gid=f"model-{point[2]}",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3})


def front(points: Iterable[Point], sign: int) -> list[Point]:
    """Of (cost, score, model), those that no cheaper one equals or beats, by rising cost."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not found or sign * p[1] > sign * found[-1][1]:
            found.append(p)
    return found


def _trade(page: Page, ax: Any, cost: Cost, form: Callable[[float], str]) -> bool:
    """Test score against a cost, with the Pareto front; its models are filled, the others hollow."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    scores = [r["test"].get(page.metric) for r in page.rows]
    points = [(r[cost.key], s["mean"], i) for i, (r, s) in enumerate(zip(page.rows, scores, strict=True))
              if s and known(r.get(cost.key))]
    best = front(points, page.sign)
    for x, y, i in points:
        look, sd = style(i, line=False), scores[i]["sd"] or 0
        ax.plot([x, x], [y - sd, y + sd], linewidth=1, color=look["color"], gid=look["gid"])
        ax.plot([x], [y], **look, markerfacecolor=look["color"] if (x, y, i) in best else "#ffffff")
    ax.plot([p[0] for p in best], [p[1] for p in best], drawstyle="steps-post", color=GREY, linewidth=1.3, zorder=1)
    wide = bool(points) and max(points)[0] > 4 * min(points)[0] > 0
    ax.set_xscale("log" if wide else "linear")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(0.14)
    ax.set_xlabel(cost.title)
    ax.xaxis.set_major_formatter(lambda v, _: cost.form(v))
    ax.yaxis.set_major_formatter(lambda v, _: form(v))
    _label(ax, points, [r["model"] if len(page.rows) <= NAMED else str(i + 1) for i, r in enumerate(page.rows)])
    return bool(points)


def _label(ax: Any, points: Sequence[Point], texts: Sequence[str]) -> None:
    """Writes the text of each model at the spot about its point where it covers least of the points, texts and edge."""
    at = _pixels(ax, points)
    taken = [np.array([x - 4, y - 4, x + 4, y + 4]) for x, y in at.values()]
    edge = ax.get_window_extent().extents

    def covered(box: np.ndarray) -> float:
        shared = (np.clip(np.minimum(box[2:], t[2:]) - np.maximum(box[:2], t[:2]), 0, None).prod() for t in taken)
        return sum(shared) + 9 * np.clip([*(edge[:2] - box[:2]), *(box[2:] - edge[2:])], 0, None).sum()

    for point in points:
        x, y = at[point[2]]
        w, h = 0.56 * FONT * len(texts[point[2]]), 1.05 * FONT
        boxes = [np.array([x + part * w + right, y + up - h / 2, x + part * w + right + w, y + up + h / 2])
                 for part, right, up in SPOTS]
        taken.append(min(boxes, key=covered))
        _write(ax, texts[point[2]], point, (taken[-1][0] - x, taken[-1][1] + h / 2 - y))
