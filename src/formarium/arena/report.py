"""report.html: one page that holds a comparison, made from the files of its folder. It loads nothing from outside."""

import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from string import Template
from typing import Any

from ..core.checkpoint import write_atomically
from ..core.errors import FormariumError
from .config import CompareConfig, read_json
from .html import cell as _cell
from .html import grid, legend, model_name
from .plots import COSTS, NAMED, Page, figures
from .words import SHARES, called, capital, duration, esc, human, known, number


def write_report(folder: Path) -> Path:
    """Writes report.html into the folder of a comparison that has come to its end (results.json); returns its path."""
    folder = Path(folder)
    for name in ("compare.json", "results.json"):
        if not (folder / name).is_file():
            raise FormariumError(f"{folder} has no {name}, so no comparison has come to its end there; the same formarium "
                                 "compare call again goes on where it stopped and writes the report")
    plan, results = read_json(folder / "compare.json"), read_json(folder / "results.json")
    page = Page(folder, plan, results["rows"], plan["metric"], 1 if plan["higher_is_better"] else -1)
    facts = [f"Formarium {plan['formarium']}", *(f"{k} {v}" for k, v in plan["machine"].items())]
    optional = {"plots": figures(page), "rates": _rates(page)}
    fields = optional | {f"no_{k}": "" if v else "hidden" for k, v in optional.items()} | _about(page) | {
        "title": esc(f"{plan['task_info']['title']}: {len(page.rows)} model{'s' * (len(page.rows) != 1)}"),
        "task": esc(plan["task"]), "version": esc(plan["formarium"]), "verdict": esc(results["verdict"]),
        "notes": "".join(f"<li>{esc(note)}</li>" for note in results["notes"]),
        "body_class": "many" * (len(page.rows) > NAMED),
        "legend": legend(page), "table": _table(page), "shown": _shown(page),
        "command": esc(command(plan)), "footer": esc(", ".join(facts)),
    }
    text = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(fields)
    write_atomically(folder / "report.html", lambda name: Path(name).write_text(text, encoding="utf-8"))
    return folder / "report.html"


def _about(page: Page) -> dict[str, str]:
    """What was compared and how, in words."""
    plan, info = page.plan, page.plan["task_info"]
    seeds, lrs, source = plan["seeds"], [f"{lr:g}" for lr in plan["lrs"]], esc(info["source"])
    kind, amount = next(iter(plan["budget"].items()))
    budget, unequal = {
        "steps": (f"{amount:,} steps a run", "Steps cost more in some models than in others: see training time and MACs."),
        "seconds": (f"{duration(amount)} of training a run, evaluation not counted",
                    "A slower model takes fewer steps, so the result depends on the machine."),
        "flops": (f"{human(amount)} floating point operations a run, counted as 6 × MACs a sample",
                  "A model with more MACs takes fewer steps."),
    }[kind]
    sizes = ", ".join(f"{n:,} {esc(split)}".replace(" val", " validation") for split, n in info["sizes"].items())
    unit = "predicted bytes" if "byte" in page.metric else "samples"
    note = capital(esc(info["note"]).rstrip("."))
    return {
        "data": ". ".join(filter(None, (f"{esc(info['title'])}: {sizes} ({unit})", note))) + ".",
        "source": f'<a href="{source}" rel="noreferrer">{source}</a>' if re.match("https?://", source) else source,
        "licence": esc(info["licence"]), "budget": f"{budget}, in batches of {plan['batch_size']}", "unequal": unequal,
        "seeds": f"{len(seeds)} ({', '.join(map(str, seeds))}); every model is trained once with each" if len(seeds) > 1
                 else f"One ({seeds[0]}), so nothing is known of the spread between runs",
        "rate": f"{lrs[0]} for every model" if len(lrs) == 1 else
                f"Each model has its own best of {', '.join(lrs)}, by validation data, tried with seed {seeds[0]}",
        "decay": _decay(plan.get("config", plan)), "falls": _falls(plan.get("config", plan)),
        "warmup": f"{plan['warmup']:.0%}".replace("%", " %"),
        "metric": esc(called(page.metric)), "better": "higher" if page.sign > 0 else "lower",
        "corner": "upper" if page.sign > 0 else "lower",
        "started": esc(f", {plan['started'][:16].replace('T', ' ')}" if plan.get("started") else ""),
    }


def _decay(config: dict[str, Any]) -> str:
    head = config.get("head_weight_decay")
    return f"{config['weight_decay']:g}" + (f" ({head:g} in the classifier)" if head is not None else "")


def _falls(config: dict[str, Any]) -> str:
    """What the learning rate does after its rise."""
    cooldown = config.get("cooldown", 0.0)
    if config.get("schedule", "cosine") == "cosine":
        said = "a cosine to zero"
    else:
        said = f"1 / sqrt(1 + t), t in units of {config['timescale']:.0%} of it".replace("%", " %")
    return said + (f", and linearly to zero over the last {cooldown:.0%}".replace("%", " %") if cooldown else "")


def command(plan: dict[str, Any]) -> str:
    """The call that makes this comparison again: for the shell, or for Python where the shell has no option for it."""
    models, seeds, config = plan["models"], plan["seeds"], plan.get("config", plan)
    flags = {"models", "task", "seeds", "lrs", "batch_size", "steps", "seconds", "flops"}
    more = {k: config[k] for k, field in CompareConfig.model_fields.items()
            if k in config and k not in flags and config[k] != field.default}
    if more or seeds != list(range(len(seeds))):
        given = {**plan["budget"], "seeds": seeds, "lrs": plan["lrs"], "batch_size": plan["batch_size"], **more}
        return "\n".join(["import formarium as fm", "", f"fm.compare({models!r}, {plan['task']!r},",
                          f"           {', '.join(f'{k}={v!r}' for k, v in given.items())})"])
    options = [("task", plan["task"]), *plan["budget"].items(), ("seeds", len(seeds)), ("batch-size", plan["batch_size"]),
               *(("lr", lr) for lr in plan["lrs"])]
    return shlex.join(["formarium", "compare", *models, *(word for k, v in options for word in (f"--{k}", str(v)))])


def _marked(texts: Sequence[str], values: Sequence[float | None], better: int) -> list[str]:
    """The texts, those that read as the best value marked. One value alone is not the best of anything."""
    ranked = sorted((better * v, t) for v, t in zip(values, texts, strict=True) if known(v))
    return [f'<span class="best">{t}</span>' if len(ranked) > 1 and t == ranked[-1][1] else t for t in texts]


def _table(page: Page) -> str:
    metric, rows, several, share = page.metric, page.rows, len(page.rows) > 1, page.metric in SHARES
    columns = [("Model", -1), (esc(capital(called(metric))) + ", %" * share, page.sign)]
    columns += [("Difference to 1" + "<br>in points" * share, page.sign)] * several
    columns += [(c.title + f"<br>in batches of {rows[0]['throughput_batch']}" * (c.better > 0), c.better) for c in COSTS]
    heads = (f'<th data-first="{"down" if better > 0 else "up"}"><button type="button">{title}</button></th>'
             for title, better in columns)
    scores = [r["test"].get(metric) or {"mean": None, "sd": None} for r in rows]
    means = [s["mean"] for s in scores]
    scored = _marked([number(metric, m) for m in means], means, page.sign)
    costs = []
    for c in COSTS:
        values = [r.get(c.key) for r in rows]
        texts = _marked([c.form(v) if known(v) else "–" for v in values],
                        [v if r["test"] else None for r, v in zip(rows, values, strict=True)], c.better)
        costs.append([*map(_cell, texts, values)])
    reach = max((abs(v) for r in rows for k, v in (r["difference"] or {}).items() if k != "values" and known(v)), default=0)
    lines = []
    for i, r in enumerate(rows):
        below = f'<small title="{esc(r["title"])}">{esc(r["title"])}</small>'
        if r["test"]:
            below += f'<span class="sub failed">{esc(r["reason"])}</span>' if r["status"] == "failed" else ""
            spread = f' <span class="soft">± {number(metric, scores[i]["sd"])}</span>' if known(scores[i]["sd"]) else ""
            each = ", ".join(f"seed {c['seed']}: {number(metric, c['test'].get(metric))}" for c in r["cells"])
            found = [_cell(scored[i] + spread, means[i], each), *[_difference(metric, r["difference"], reach)] * several]
        else:
            found = [f'<td class="reason" colspan="{1 + several}" data-v="">failed: {esc(r["reason"])}</td>',
                     *["<td hidden></td>"] * several]  # keeps the numbers of the columns, for sorting
        lines.append([_cell(model_name(i, r["model"], below), i), *found, *(c[i] for c in costs)])
    return grid("wide sortable", heads, lines)


def _difference(metric: str, d: dict[str, Any] | None, reach: float) -> str:
    """A paired difference in words, and as a mark on a line whose middle is zero and whose half is `reach`."""
    if d is None:
        return _cell("–")
    text, x = number(metric, d["mean"], "+"), [50 + 46 * (d[k] or 0) / (reach or 1) for k in ("mean", "low", "high")]
    mark = f'<circle cx="{x[0]:.1f}" cy="6" r="2.6" fill="currentColor"/>'
    if known(d["low"]):
        text += f'<span class="sub">{number(metric, d["low"], "+")} to {number(metric, d["high"], "+")}</span>'
        mark += f'<path d="M{x[1]:.1f} 6H{x[2]:.1f}" stroke="currentColor" stroke-width="1.4"/>'
    soft = "" if known(d["low"]) and d["low"] * d["high"] > 0 else " soft"
    return _cell(f'<span class="difference{soft}"><svg viewBox="0 0 100 12" aria-hidden="true"><path d="M50 0v12" '
                 f'stroke="var(--soft)" stroke-width=".6"/>{mark}</svg><span>{text}</span></span>', d["mean"])


def _rates(page: Page) -> str:
    """What each learning rate gave on validation data, the chosen one marked; empty where one was tried."""
    rates, lines = page.plan["lrs"], []
    for i, r in enumerate(page.rows if len(rates) > 1 else ()):
        lines.append([_cell(model_name(i, r["model"]))])
        for lr in rates:
            value = r["lr_tried"].get(f"{lr:g}")
            text = number(page.metric, value, unit=" %") if known(value) else '<span class="failed">failed</span>'
            if known(value) and lr == r["lr"]:
                text = f'<span class="best">{text}</span>' + "†" * (len(rates) > 2 and lr in (min(rates), max(rates)))
            lines[-1].append(_cell(text))
    return grid("", (f"<th>{h}</th>" for h in ("Model", *(f"{lr:g}" for lr in rates))), lines) if lines else ""


def _shown(page: Page) -> str:
    """What the models showed, a section a kind; `shown/KIND.py` draws it: HEADING, ABOUT (HTML) and draw(page, found)."""
    kinds = dict.fromkeys(r["shown"]["kind"] for r in page.rows if r.get("shown"))
    sections = []
    for kind in kinds:
        found = [(i, r["model"], r["shown"]) for i, r in enumerate(page.rows) if (r.get("shown") or {}).get("kind") == kind]
        room = import_module(f".shown.{kind}", __package__)
        sections.append(f'<section class="shown">\n<h2>{room.HEADING}</h2>\n<p class="soft">{room.ABOUT}</p>\n'
                        f"{room.draw(page, found)}\n</section>\n")
    return "\n".join(sections)
