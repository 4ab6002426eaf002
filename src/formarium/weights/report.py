"""What became of every tensor of a file, and where every tensor of the model is from."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .adapt import Row as Adapted
from .detect import Candidate, collapse
from .keys import SAME, Assumed, Converted, Options, State

Shape = tuple[int, ...]
KINDS = ("missing", "ignored", "resized", "used", "renamed", "fused", "split", "reshaped")  # what needs a look comes first


@dataclass(frozen=True)
class Row:
    """One step: tensors of the file (`theirs`) that became tensors of the model (`ours`), or did not, or are new.

    kind: "used" as it is, "renamed", "fused" (several in one), "split" (one in several), "reshaped" or transposed,
    "resized" to fit other options, "ignored" (of the file), "missing" (of the model). before, after: the shapes, in the
    same order; why: for all but plain uses.
    """

    kind: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    before: tuple[Shape, ...]
    after: tuple[Shape, ...]
    why: str = ""


@dataclass
class Report:
    """How a file was read. Each tensor of the file is in `theirs` of one row, each of the model in `ours` of one row.

    model: the preset; options: what differs from it; assumed: options that the tensors do not tell -> (value, why); also:
    presets that have the same tensors -> in what they differ; notes: of the container; candidates: what it may be.
    """

    source: str
    system: str
    model: str
    layout: str
    options: Options = field(default_factory=dict)
    assumed: dict[str, Assumed] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Kind -> tensors and parameters: of the file, for "missing" of the model."""
        found = {}
        for kind in KINDS:
            shapes = [s for r in self.rows if r.kind == kind for s in (r.after if kind == "missing" else r.before)]
            if shapes:
                found[kind] = {"tensors": len(shapes), "parameters": sum(map(_numel, shapes))}
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"source": self.source, "system": self.system, "model": self.model, "layout": self.layout,
                "options": {k: _plain(v) for k, v in self.options.items()},
                "assumed": {k: {"value": _plain(a.value), "why": a.why} for k, a in self.assumed.items()},
                "also": self.also, "notes": self.notes, "totals": self.totals,
                "candidates": [{"system": c.system, "layout": c.layout, "prefix": c.prefix, "fits": c.fits, "why": c.why}
                               for c in self.candidates],
                "rows": [{"kind": r.kind, "theirs": r.theirs, "ours": r.ours, "before": r.before, "after": r.after,
                          "why": r.why} for r in self.rows]}

    def __str__(self) -> str:
        changes = ", ".join(f"{k}={v}" for k, v in self.options.items())
        lines = [f"{self.source}: {self.model}{f' with {changes}' if changes else ''} (layout {self.layout})",
                 *(f"note: {n}" for n in self.notes),
                 *(f"assumed: {k}={a.value}, since {a.why}" for k, a in self.assumed.items()),
                 *(f"the same tensors has {name}: {apart}" for name, apart in self.also.items()), ""]
        cells = [("", "file", "model", "shape", ""), *(_line(rows) for rows in _alike(self.rows))]
        widths = [max(len(c[i]) for c in cells) for i in range(4)]
        lines += ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])).rstrip() for row in cells]
        said = [f"{t['tensors']} {kind} ({t['parameters']:,})" for kind, t in self.totals.items()]
        return "\n".join([*lines, "", f"tensors (parameters): {', '.join(said)}"])


def trace(state: State, own: State, converted: Converted, prefix: str = "", rest: Iterable[str] = (),
          adapted: Iterable[Adapted] = (), copies: Mapping[str, str] = {},
          missing: str = "not in the file; as a new model has it") -> list[Row]:
    """The rows of a report.

    state: of the file; own: of the model; prefix: cut off the file's names, `rest` had it not; copies: converted tensors
    that equal others, to which the model ties them -> those; missing: why tensors of the model may be.
    """
    added = prefix[1:] if prefix.startswith("+") else ""
    cut = "" if added else prefix

    def full(name: str) -> str:
        return name.removeprefix(added) if added else cut + name

    def shapes(names: Iterable[str], tensors: State) -> tuple[Shape, ...]:
        return tuple(tuple(tensors[n].shape) for n in names)

    changed = {r.name: r for r in adapted}
    rows, given = [], set()
    for move in converted.moves:
        theirs = tuple(map(full, move.sources))
        ours = tuple(t for t in move.targets if t in own)
        bad = [t for t in ours if own[t].shape != converted.state[t].shape and t not in changed]
        row = changed.get(move.targets[0]) if move.targets else None
        before, after = shapes(theirs, state), shapes(ours, own)
        if not move.targets:
            rows.append(Row("ignored", theirs, (), before, (), move.rule.why))
        elif row and (row.after is None or row.how.startswith("new")):  # as a head of other classes
            rows.append(Row("ignored", theirs, (), before, (), row.how))
            continue
        elif bad:  # of a partial load
            rows.append(Row("ignored", theirs, (), before, (), f"of another shape than {bad[0]}, {_by(after)}"))
            continue
        elif not ours:
            twin = copies.get(move.targets[0])
            rows.append(Row("ignored", theirs, (), before, (), f"equal to {twin}, to which it is tied" if twin
                            else "the model has no place for it"))
        elif row:
            rows.append(Row("resized", theirs, ours, before, after, row.how))
        elif len(theirs) > 1 or len(ours) > 1:
            rows.append(Row("split" if len(theirs) == 1 else "fused", theirs, ours, before, after))
        elif move.rule.op is not SAME:
            rows.append(Row("reshaped", theirs, ours, before, after))
        else:
            rows.append(Row("used" if theirs == ours else "renamed", theirs, ours, before, after))
        given |= set(ours)
    rows += [Row("ignored", (n,), (), shapes((n,), state), (), f"outside of {cut!r}") for n in rest]
    rows += [Row("ignored", (full(n),), (), shapes((full(n),), state), (), "no place in this layout")
             for n in converted.unmatched]
    for name in own:
        if name not in given:
            why = changed[name].how if name in changed else missing
            rows.append(Row("missing", (), (name,), (), shapes((name,), own), why))
    return rows


def _numel(shape: Shape) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows of one kind whose names differ in numbers, or in weight and bias, alone; what needs a look comes first."""
    found: dict[Any, list[Row]] = {}
    for r in rows:
        key = (r.kind, *(tuple(collapse(n).rpartition(".")[0] or n for n in names) for names in (r.theirs, r.ours)),
               collapse(r.why), r.before[0] if r.kind == "resized" else ())
        found.setdefault(key, []).append(r)
    return sorted(found.values(), key=lambda g: KINDS.index(g[0].kind))


def _line(rows: list[Row]) -> tuple[str, str, str, str, str]:
    def names(side: str) -> str:
        return " + ".join(_span([getattr(r, side)[i] for r in rows]) for i in range(len(getattr(rows[0], side))))

    first, shape = rows[0], ""
    if first.kind in ("reshaped", "resized"):
        shapes = Counter(f"{_by(r.before)} -> {_by(r.after)}" for r in rows)
        shape = next(iter(shapes)) + (", ..." if len(shapes) > 1 else "")
    elif first.kind == "missing":
        shape = _by(first.after)
    count = sum(max(len(r.theirs), len(r.ours)) for r in rows)
    return f"{first.kind} {count}", names("theirs"), names("ours"), shape, first.why


def _by(shapes: tuple[Shape, ...]) -> str:
    return " + ".join("x".join(map(str, s)) or "1" for s in shapes)


def _span(names: list[str]) -> str:
    """["blocks.0.norm1.weight", ..., "blocks.11.norm1.bias"] -> "blocks.{0..11}.norm1.{weight,bias}"."""
    heads, tails = zip(*((h + dot, t) for h, dot, t in (n.rpartition(".") for n in names)), strict=True)
    slots = list(zip(*(re.findall(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", h) for h in heads), strict=False))
    texts = iter([_range(sorted(set(map(int, s)))) for s in slots])
    head = re.sub("#", lambda _: next(texts), collapse(heads[0]))
    tails = tuple(dict.fromkeys(tails))
    if all(t.isdigit() for t in tails):
        return head + _range(sorted(map(int, tails)))
    return head + (tails[0] if len(tails) == 1 else f"{{{','.join(tails)}}}")


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"

