"""All verdicts in one place: docs/replication.md, and a page with plots. Both are made from the results' files alone."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from .. import __version__
from ..core.checkpoint import write_atomically
from ..core.registry import PACKAGE
from .html import cell, grid
from .replicate import per_seed, shown_effect, shown_number
from .results import RUNS, read_results, stale
from .study import find_study, studies
from .verdict import DOES_NOT_HOLD, HOLDS, INCONCLUSIVE, RULE, Decides
from .words import called, duration, esc, human, known

ORDER = (HOLDS, INCONCLUSIVE, DOES_NOT_HOLD, "not run")
COLOUR = {HOLDS: "var(--c2)", DOES_NOT_HOLD: "var(--wrong-fg)", INCONCLUSIVE: "var(--soft)", "not run": "var(--line)"}
TICKS = (-10, -1, 0, 1, 10)  # of the effects' axis, in units of the effect that counts
REACH = 100.0  # what lies beyond stands at the edge
INTRO = ("Each row is the claim of a paper and an experiment, fixed before it was run, that tests it at a scale of minutes "
         "on a processor. A claim that does not hold here may well hold at the scale of its paper: the last columns say "
         "what was published and how the scales differ.")


class Row(NamedTuple):
    """A study and what came of it; record: None where it was not run; old: what changed since."""

    name: str
    record: dict[str, Any] | None
    old: str = ""

    @property
    def verdict(self) -> str:
        return self.record["verdict"] if self.record else "not run"

    @property
    def decides(self) -> Decides:
        assert self.record is not None
        return Decides(**self.record["decides"])

    def arm(self, arm: str) -> dict[int, float]:
        """The deciding number of an arm, by seed."""
        assert self.record is not None
        return per_seed(self.decides, self.record["cells"], arm, self.record["rates"][arm])

    def text(self, value: float | None) -> str:
        return shown_number(self.decides, value)


def rows() -> list[Row]:
    """Every study of the package and every result, by name."""
    results = read_results()
    return [Row(name, results.get(name), stale(results[name], data=True) if name in results else "")
            for name in sorted({*studies(), *results})]


def write_replication(folder: str | Path | None = None) -> list[Path]:
    """Writes replication.md and replication.html: into docs/ of a checkout, else into runs/replicate, or into `folder`."""
    root = PACKAGE.parent.parent
    docs = root / "docs" if (root / "pyproject.toml").is_file() and (root / "docs").is_dir() else RUNS
    found, into = rows(), Path(folder) if folder else docs
    texts = {into / "replication.md": markdown(found), into / "replication.html": page(found)}
    for path, text in texts.items():
        write_atomically(path, lambda name, text=text: Path(name).write_text(text, encoding="utf-8"))
    return list(texts)


def summary(found: Sequence[Row]) -> str:
    """One or two sentences over all studies."""
    said = Counter(r.verdict for r in found)
    parts = ", ".join(f"{said[v]} {v}" for v in (HOLDS, DOES_NOT_HOLD, INCONCLUSIVE, "not run") if said[v])
    old = sum(bool(r.old) for r in found)
    return f"{len(found)} studies: {parts}." + f" Stale results: {old}." * bool(old)


# what a cell of the table says, as plain text


def compared(row: Row) -> str:
    r = row.record
    assert r is not None
    idea, *control = r["deciding"]
    against = f"{control[0]} ({r['arms'][control[0]]})" if control else f"the published {row.decides.target:g}"
    more = [a for a in r["arms"] if a not in r["deciding"]]
    return (f"{idea} ({r['arms'][idea]}) against {against}; equal {r['matched']}" + f"; {r['task']}" * bool(r["task"])
            + (f"; shown: {', '.join(more)}" if more else ""))


def ours(row: Row) -> str:
    assert row.record is not None
    means = [f"{arm} {row.text(statistics.fmean(v)) if (v := row.arm(arm).values()) else 'failed'}"
             for arm in row.record["deciding"]]
    return f"{called(row.decides.number)}: {', '.join(means)}"


def effect(row: Row) -> str:
    r, d = row.record, row.decides
    assert r is not None
    if r["mean"] is None:
        return r["reason"]
    return f"{shown_effect(d, r['mean'], '+')} ({shown_effect(d, r['low'], '+')} to {shown_effect(d, r['high'], '+')})"


def bar(row: Row) -> str:
    """The effect that counts."""
    d = row.decides
    return {"better": "≥\u00a0", "no worse": ">\u00a0−", "target": "±\u00a0"}[d.kind] + shown_effect(d, d.bar)


def word(row: Row) -> str:
    return row.verdict + (" (stale)" if row.old else "")


def how(row: Row) -> str:
    """Budget, seeds, rates, cost and place of the runs."""
    r = row.record
    assert r is not None
    recipe = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in (r["task_options"] | r["recipe"]).items())
    rates = "nothing is trained"
    if r["lrs"]:
        rates = f"learning rate {r['lrs'][0]:g}"
    if len(r["lrs"]) > 1:
        grid = ", ".join(f"{lr:g}" for lr in r["lrs"])
        rates = f"learning rate of each arm the best of {grid} on validation data with seed {r['seeds'][0]}"
    edge = f" (the best is at an end of the grid: {', '.join(r['rates_at_an_end'])})" if r["rates_at_an_end"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    what, seeds = ", ".join(filter(None, (r["task"], recipe))), ", ".join(map(str, r["seeds"]))
    cost = f"{len(r['cells'])} runs, {duration(r['cpu_seconds'])} of one processor"
    return f"{what}; seeds {seeds}; {rates}{edge}. {cost}, {r['date']}, on {r['machine']}; {versions}."


def broken(row: Row) -> list[str]:
    """The runs that failed or diverged."""
    assert row.record is not None
    return [f"{c['arm']}, seed {c['seed']}" + (f", rate {c['lr']:g}" if c["lr"] is not None else "") +
            f": {c['status']}, {c['reason']}" for c in row.record["cells"] if c["status"] != "done"]


def arm_table(row: Row) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: every arm with what it costs, its rate, and its number of each seed."""
    r = row.record
    assert r is not None
    heads = ["arm", "model", "parameters", "MACs", "rate", *(f"seed {s}" for s in r["seeds"])]
    lines = []
    for arm, model in r["arms"].items():
        cost, lr, values = r["costs"][arm], r["rates"][arm], row.arm(arm)
        counts = [human(v) if known(v) else "–" for v in (cost["parameters"], cost["macs"])]
        lines.append([arm, model, *counts, "–" if lr is None else f"{lr:g}",
                      *(row.text(values[s]) if s in values else "failed" for s in r["seeds"])])
    return heads, lines


# Markdown


def _md(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _md_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_md, line))} |" for line in (heads, ["---"] * len(heads), *lines))


def markdown(found: Sequence[Row]) -> str:
    """docs/replication.md."""
    lines, parts = [], []
    for row in found:
        if row.record is None:
            lines.append([f"`{row.name}`", find_study(row.name)[0].claim, "", "", "", "", "not run", "", ""])
            continue
        r = row.record
        lines.append([f"[`{row.name}`](#{row.name})", f"{r['claim']} ({r['source']})", compared(row), ours(row),
                      effect(row), bar(row), f"**{word(row)}**", r["published"], r["scale"]])
        said = f"**{word(row)}.** {_md(r['sentence'])}" + f" Stale, {_md(row.old)}." * bool(row.old)
        more = "\n".join(["Runs without a number:\n", *(f"- {_md(b)}" for b in broken(row))]) if broken(row) else ""
        paragraphs = (f"### {row.name}", said, _md_table(*arm_table(row)), _md(how(row)), more)
        parts.append("\n\n".join(filter(None, paragraphs)) + "\n")
    heads = ("study", "claim", "compared", "ours", "effect (95 %)", "counts", "verdict", "published", "difference of scale")
    cannot = [f"- **{r.name}**: {_md(r.record['cannot'])}\n" for r in found if r.record and r.record["cannot"]]
    return "\n".join([
        "# Do the claims hold?", "", "Written by `formarium replicate --report` from the results in "
        "`src/formarium/studies/results`; `formarium replicate NAME` runs a study again.", "", INTRO, "", summary(found),
        "", _md_table(heads, lines), "", "## The rule", "", RULE, "## What cannot be tested here", "", "".join(cannot),
        "## Study by study", "", *parts])


# HTML


def _place(x: float) -> float:
    """Where an effect, in units of what counts, stands on an axis from 0 to 100: linear near zero, then by tenfold."""
    top = math.asinh(5 * REACH)
    return round(50 + 50 * max(-1.0, min(1.0, math.asinh(5 * x) / top)), 2)


def strip(row: Row) -> str:
    """Effect, interval and seeds of a study on the axis; what would speak for the claim is shaded."""
    if row.record is None or row.record["mean"] is None:
        return '<svg class="strip" aria-hidden="true"></svg>'
    d, r = row.decides, row.record
    low, high = {"better": (_place(1), 100), "no worse": (_place(-1), 100), "target": (_place(-1), _place(1))}[d.kind]
    mean, left, right = (_place(r[k] / d.bar) for k in ("mean", "low", "high"))
    seeds = "".join(f'<path d="M{_place(e / d.bar)} 20v.01" class="seed"/>' for e in r["effects"].values())
    grid_lines = "".join(f'<path d="M{_place(t)} 0v26" class="tick{" zero" * (t == 0)}"/>' for t in TICKS)
    told = esc(f"{row.name}: effect {effect(row)}")
    return (f'<svg class="strip" viewBox="0 0 100 26" preserveAspectRatio="none" role="img" aria-label="{told}">'
            f'<rect x="{low}" y="1" width="{high - low:.2f}" height="24"/>'
            f'{grid_lines}<g style="stroke:{COLOUR[row.verdict]}"><path d="M{left} 9H{right}" class="interval"/>'
            f'<path d="M{mean} 9v.01" class="mean"/>{seeds}</g></svg>')


def forest(found: Sequence[Row]) -> str:
    """All effects on one axis."""
    shown = [r for v in ORDER for r in found if r.verdict == v and r.record and r.record["mean"] is not None]
    if not shown:
        return ""
    ticks = "".join(f'<i style="left:{_place(t)}%">{t:+d}</i>'.replace("-", "\u2212").replace("+0", "0") for t in TICKS)
    lines = "".join(f'<li><a href="#{esc(r.name)}">{esc(r.name)}</a>{_word(r)}{strip(r)}</li>' for r in shown)
    axis = f'<li class="axis"><span></span><span></span><span class="ticks">{ticks}</span></li>'
    return f'<ol class="forest">{axis}{lines}</ol>'


def _word(row: Row) -> str:
    old = f' <small title="{esc(row.old)}">stale</small>' if row.old else ""
    colour = COLOUR[row.verdict] if row.record else "var(--soft)"
    return f'<b class="word" style="color:{colour}">{esc(row.verdict)}{old}</b>'


def _table(found: Sequence[Row]) -> str:
    heads = ("Study", "Verdict", "Effect, 95 %", "Counts", "Ours", "Published", "Claim", "Compared", "Difference of scale")
    lines = []
    for i, row in enumerate(found):
        verdict = cell(_word(row), ORDER.index(row.verdict))
        if row.record is None:
            claim, none = cell(esc(find_study(row.name)[0].claim), i, kind="text"), cell("")
            lines.append([cell(esc(row.name), i), verdict, *[none] * 4, claim, none, none])
            continue
        r, d = row.record, row.decides
        size = None if r["mean"] is None else r["mean"] / d.bar
        claim = f"{esc(r['claim'])}<small>{esc(r['source'])}</small>"
        texts = (esc(ours(row)), esc(r["published"]), claim, esc(compared(row)), esc(r["scale"]))
        lines.append([cell(f'<a href="#{esc(row.name)}">{esc(row.name)}</a>', i), verdict,
                      cell(esc(effect(row)), size, kind="text short"), cell(esc(bar(row)), d.bar, kind="bar"),
                      *(cell(t, i, kind="text") for t in texts)])
    titles = (f'<th data-first="{"down" if h.startswith("Effect") else "up"}"><button type="button">{h}</button></th>'
              for h in heads)
    return grid("sortable claims", titles, lines)


def _section(row: Row) -> str:
    r = row.record
    assert r is not None
    heads, lines = arm_table(row)
    table = grid("", (f"<th>{esc(h)}</th>" for h in heads), ([cell(esc(t)) for t in line] for line in lines))
    failed = "".join(f"<li>{esc(b)}</li>" for b in broken(row))
    told = {"Claim": f"{r['claim']} {r['source']}.", "Compared": compared(row), "Counts": bar(row),
            "Published": r["published"], "Scale": r["scale"], "Cannot be tested": r["cannot"], "How": how(row)}
    facts = "".join(f"<dt>{k}</dt><dd>{esc(v)}</dd>" for k, v in told.items() if v)
    old = f'<p class="failed">Stale, {esc(row.old)}.</p>' if row.old else ""
    return (f'<section id="{esc(row.name)}"><h3>{esc(row.name)} {_word(row)}</h3><p>{esc(r["sentence"])}</p>{old}'
            f'<div class="one">{strip(row)}</div><div class="scroll" tabindex="0">{table}</div>'
            f'{f"<p>Runs without a number:</p><ul>{failed}</ul>" if failed else ""}<dl>{facts}</dl></section>')


def _rule() -> str:
    """RULE, which is Markdown, as HTML."""
    before, *items = re.split(r"\n\n?- ", esc(RULE).strip())

    def marked(text: str) -> str:
        return re.sub(r"\*(.+?)\*", r"<i>\1</i>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text))

    return f"<p>{marked(before)}</p><ul class=\"read\">{''.join(f'<li>{marked(i)}</li>' for i in items)}</ul>"


def page(found: Sequence[Row]) -> str:
    """The page; it loads nothing from outside. Style and sorting are those of a comparison's report."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0] for tag in ("style", "script"))
    done = [r for r in found if r.record]
    drawn = forest(found)
    text = Template(Path(__file__).with_name("replication.html").read_text(encoding="utf-8"))
    return text.substitute(version=esc(__version__), style=style, script=script, summary=esc(summary(found)),
                           intro=esc(INTRO), forest=drawn, hidden="" if drawn else "hidden", rule=_rule(),
                           table=_table(found), sections="".join(map(_section, done)))
