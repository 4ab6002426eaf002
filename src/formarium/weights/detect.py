"""Whose weights are these? From names and shapes alone.

Two steps. Names, with numbers collapsed, are looked up in an index of signatures, which is made once from the presets and
the KEYS of all papers and kept in the cache. The few layouts that fit best are then fitted exactly (fit.py): converted,
the settings told, the model built on the meta device, every shape compared.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from ..core.build import create_model
from ..core.checkpoint import write_atomically
from ..core.ctx import Place
from ..core.errors import BadCheckpoint, FormariumError
from ..core.registry import PACKAGE, Entry, cache_folder, find, systems
from ..core.spec import Spec
from ..core.transform import apply
from .fit import DOORS, OWN, Fit, NoStart, defaults, fit, layouts_of
from .keys import KeyMap, State

TRIED = 6  # layouts that are fitted exactly
LEAST = 0.2  # share of a file's tensors under a prefix that may be a model in a larger net
FORMAT = 2  # of the index

Signature = dict[str, Any]  # "own": names of each structure a preset has; "names": theirs -> what of ours; "wild"


@dataclass
class Candidate:
    """A system and layout that a state dict may be of.

    prefix: what was cut off the names, or "+x." for what the layout has before them and the file has not; tensors,
    parameters: share of the file's that find a place; complete: share of the layout's names that the file has;
    fit: the exact comparison, for the best few; rest: names outside of the prefix.
    """

    system: str
    layout: str
    prefix: str
    tensors: float
    parameters: float
    complete: float
    fit: Fit | None = None

    @property
    def fits(self) -> bool:
        return self.fit is not None and self.fit.error is None

    @property
    def score(self) -> float:
        return self.tensors * self.complete

    def __str__(self) -> str:
        return f"{self.system} ({self.layout}{f', under {self.prefix!r}' if self.prefix else ''})"

    @property
    def renamed(self) -> list[str]:
        """What was done to the names before, as a note."""
        if self.prefix.startswith("+"):
            return [f"put before the names: {self.prefix[1:]!r}"]
        return [f"cut off the names: {self.prefix!r}"] if self.prefix else []

    @property
    def why(self) -> str:
        """The evidence in a sentence."""
        said = (f"{self.tensors:.0%} of the tensors ({self.parameters:.0%} of the parameters) have a place, "
                f"{self.complete:.0%} of the layout's names are there")
        if self.fits and self.fit and self.fit.plan:
            return f"{said}; every shape fits {self.fit.plan.name}"
        return f"{said}; {self.fit.error}" if self.fit else said


def detect(state: State, given: Mapping[str, Any] = {}, layout: str | None = None) -> list[Candidate]:
    """What these tensors may be, the likeliest first: those that fit exactly, then the nearest.

    Among those that fit, the order is: more of the file placed, fewer changes to a preset but for sizes of what goes in and
    out, a layout of others, the paper that has the model's class, fewer changes in all, the order of the papers' layouts.
    given: options that the caller names; layout: this alone.
    """
    found = [c for c in shortlist(state) if layout in (None, c.layout)]
    placed = 0.0
    for c in found[:TRIED]:
        if c.tensors >= placed:  # else it is no rival of one that fits
            c.fit = fit(under(c.prefix, state), c.system, c.layout, given=given)
            placed = max(placed, c.tensors * c.fits)
    return sorted(found, key=order)


def of_system(state: State, system: str, variant: str, given: Mapping[str, Any], partial: bool) -> list[Candidate]:
    """As `detect`, for one system that the caller names, every layout of it."""
    known = {c.layout: c for c in shortlist(state, [system])}
    found = [known.get(layout, Candidate(system, layout, "", 0, 0, 0)) for layout in layouts_of(system)]
    for c in found:
        c.fit = fit(under(c.prefix, state), system, c.layout, variant, given, partial)
    return sorted(found, key=(lambda c: -c.score) if partial else order)


def order(c: Candidate) -> tuple[Any, ...]:
    """For sorting: the likeliest first."""
    if c.fit is None or c.fit.error is not None:
        return 1, -round(c.score, 3), 99 if c.fit is None else c.fit.changed, not _owns(c)
    other = sum(k not in DOORS for k in c.fit.plan.changes) if c.fit.plan else 99  # ViT at 384 pixels is still a ViT
    return 0, -len(c.fit.converted.moves), other, c.layout == OWN, not _owns(c), c.fit.changed


def rivals(found: list[Candidate]) -> list[Candidate]:
    """Other systems that the file fits as well as the first, with another function."""
    best = found[0]
    assert best.fit is not None
    assert best.fit.plan is not None
    return [c for c in found[1:] if c.fits and c.fit and c.fit.plan and c.system != best.system and
            len(c.fit.converted.moves) == len(best.fit.converted.moves) and c.fit.changed == best.fit.changed and
            c.fit.plan.spec != best.fit.plan.spec]


def under(prefix: str, state: State) -> State:
    """The tensors whose names begin so, with the prefix cut off; all of them, with it put before, for "+prefix"."""
    if prefix.startswith("+"):
        return {prefix[1:] + k: t for k, t in state.items()}
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _owns(c: Candidate) -> bool:
    """Does the model's class stand in this paper?"""
    entry = find(c.system)
    presets = getattr(entry.module, "PRESETS", {})
    if c.fits and c.fit and c.fit.plan and c.fit.keys.makes == "model":
        presets = {"": presets[c.fit.plan.name.split("/")[1]]}
    return any(p.target.__module__ == entry.module_name for p in presets.values())


def shortlist(state: State, among: Iterable[str] = ()) -> list[Candidate]:
    """Every layout that some names are of, best first, by names alone. among: systems, else all."""
    sizes = Counter({collapse(k): 0 for k in state})
    counts: Counter[str] = Counter()
    for k, t in state.items():
        sizes[collapse(k)] += t.numel()
        counts[collapse(k)] += 1
    tensors, parameters = max(1, len(state)), max(1, sum(sizes.values()))
    found: dict[tuple[str, str], Candidate] = {}
    signatures = index(among)
    for prefix in _prefixes(counts):
        names = [n.removeprefix(prefix) for n in counts if n.startswith(prefix)]
        for system, layouts in signatures.items():
            for layout, sign in layouts.items():
                for added in ("", sign["before"]) if sign["before"] and not prefix else ("",):
                    hits = {n: f"{added}{n}" for n in names if f"{added}{n}" in sign["names"]}
                    wild = [n for n in names if n not in hits and any(w.fullmatch(f"{added}{n}") for w in sign["wild"])]
                    if not hits:
                        continue
                    ours = {o for n in hits.values() for o in sign["names"][n]}
                    complete = max((len(ours & own) / len(own) for own in sign["own"]), default=1.0)
                    placed = [prefix + n for n in (*hits, *wild)]
                    c = Candidate(system, layout, f"+{added}" if added else prefix,
                                  sum(counts[n] for n in placed) / tensors,
                                  sum(sizes[n] for n in placed) / parameters, complete)
                    if (system, layout) not in found or c.score > found[system, layout].score:
                        found[system, layout] = c
    return sorted(found.values(), key=lambda c: -c.score)


def _prefixes(counts: Counter[str]) -> list[str]:
    """"" and what at least LEAST of the tensors begin with, up to a dot; teachers and averages first."""
    begun: Counter[str] = Counter()
    for name, n in counts.items():
        for at in (i for i, c in enumerate(name) if c == "."):
            begun[name[:at + 1]] += n
    often = [p for p, n in begun.most_common() if n >= LEAST * counts.total() and "#" not in p][:12]
    return ["", *sorted(often, key=lambda p: not re.search("teacher|ema", p))]


@cache
def collapse(name: str) -> str:
    """"blocks.11.mlp.fc1.weight" -> "blocks.#.mlp.fc1.weight": numbers that are a word of their own."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "#", name)


# the index

_memory: dict[str, tuple[str, dict[str, Signature]]] = {}  # system -> stamp, layouts


def index(among: Iterable[str] = ()) -> dict[str, dict[str, Signature]]:
    """system -> layout -> signature, of these systems, else of all: from memory, else the cache, else made and kept."""
    stamps = _stamps()
    wanted = list(among) or list(stamps)
    if any(_memory.get(n, ("",))[0] != stamps[n] for n in wanted):
        path = cache_folder() / f"layouts-{crc32(os.fsencode(PACKAGE)):08x}.json"
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, re.error):
            kept = json.loads(path.read_text(encoding="utf-8"))
            _memory.update({n: (stamp, {k: _ready(v) for k, v in layouts.items()})
                            for n, (stamp, layouts) in kept.items() if stamps.get(n) == stamp})
        stale = [n for n in wanted if _memory.get(n, ("",))[0] != stamps[n]]
        for name in stale:
            try:
                _memory[name] = stamps[name], {k: _ready(v) for k, v in _signatures(name).items()}
            except Exception:  # a file that does not run is no reason to recognise nothing
                if among:
                    raise
                _memory[name] = stamps[name], {}
        if stale:
            with suppress(OSError):  # a folder that cannot be written costs time alone
                text = json.dumps({n: (s, {k: _plain(v) for k, v in v.items()}) for n, (s, v) in _memory.items()})
                write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    return {n: _memory[n][1] for n in wanted}


def _stamps() -> dict[str, str]:
    """System -> what its signature depends on: the files of core and shelf, its own, and those that it imports."""
    def states(paths: Iterable[Any]) -> list[tuple[str, int, int]]:
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in paths]

    known = systems()
    shelf = states(p for room in ("core", "parts", "skeletons", "weights") for p in sorted((PACKAGE / room).glob("*.py")))
    common = hashlib.sha256(repr((FORMAT, torch.__version__, shelf)).encode()).hexdigest()
    return {n: hashlib.sha256(repr((common, states(p.path for p in _reads(e, known)))).encode()).hexdigest()[:16]
            for n, e in known.items()}


def _reads(entry: Entry, known: dict[str, Entry]) -> list[Entry]:
    """The entry, and the papers that its text imports."""
    found, rest = {entry.name: entry}, [entry]
    while rest:
        lines = re.findall(r"^(?:from|import) .*", rest.pop().path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r"\w+", " ".join(lines)):
            if name in known and name not in found:
                found[name] = known[name]
                rest.append(known[name])
    return list(found.values())


def _ready(sign: Signature) -> Signature:
    return sign | {"own": [frozenset(own) for own in sign["own"]], "wild": [re.compile(w) for w in sign["wild"]]}


def _plain(sign: Signature) -> Signature:
    return sign | {"own": [sorted(own) for own in sign["own"]], "wild": [w.pattern for w in sign["wild"]]}


def _signatures(system: str) -> dict[str, Signature]:
    layouts = layouts_of(system)
    structures = {makes: {frozenset(map(collapse, m.state_dict())) for m in _structures(system, makes)}
                  for makes in {keys.makes for keys in layouts.values()}}
    return {layout: _signature(keys, structures[keys.makes]) for layout, keys in layouts.items()}


def _structures(system: str, makes: str) -> Iterator[nn.Module]:
    """On the meta device, a model of each structure that there is: presets that differ in sizes alone count once."""
    module = find(system).module
    with torch.device("meta"), NoStart():
        if makes == "part":
            with suppress(Exception):  # some need more than a width: their names are then the rules' alone
                yield module.PART(64, Place())
        elif makes != "model":
            yield apply(create_model(f"{makes}/nano"), system, copy=False)
        else:
            presets = {_structure(Spec(p.target, tuple(defaults(p).items()))): p for p in reversed(module.PRESETS.values())}
            yield from map(_shallow, presets.values())


def _structure(value: Any) -> Any:
    """A preset without its sizes: numbers but 0 are one."""
    if isinstance(value, Spec):
        return value.target, tuple((k, _structure(v)) for k, v in value.options)
    if isinstance(value, tuple):
        return tuple(dict.fromkeys(map(_structure, value)))
    return "size" if isinstance(value, int | float) and not isinstance(value, bool) and value else value


def _shallow(preset: Spec[Any]) -> nn.Module:
    """The model with four layers, where it can be: a thousand have no other names."""
    try:
        return preset.but(**{k: min(v, 4) for k, v in preset.options if "depth" in k and isinstance(v, int)})()
    except FormariumError:
        return preset()


def _signature(keys: KeyMap, structures: set[frozenset[str]]) -> Signature:
    """The names that these rules give the tensors of ours; those of rules that drop, or are for no preset, as regexes."""
    names: dict[str, set[str]] = {}  # one of theirs may be several of ours: blocks of two kinds, matrices that are split
    wild = set()
    every = sorted(frozenset().union(*structures))
    for r in keys.rules:
        theirs = [_collapsed(t) for t in r.theirs]
        ours = re.compile(_regex(_collapsed(r.ours[0]))) if r.ours else None
        matches = [m for name in every if (m := ours.fullmatch(name))] if ours else []
        if not matches or any("{" in t for t in theirs):
            wild |= {_regex(t) for t in theirs}
        for m in matches:
            rest = m.groupdict().get("rest", "")
            for t in theirs:
                names.setdefault(t.replace("*", rest), set()).update(_collapsed(o).replace("*", rest) for o in r.ours)
    first = Counter(n.partition(".")[0] for n in names if "." in n).most_common(1)
    before = f"{first[0][0]}." if first and first[0][1] > 0.6 * len(names) and "#" not in first[0][0] else ""
    return {"own": [sorted(own) for own in structures], "names": {t: sorted(ours) for t, ours in names.items()},
            "wild": sorted(wild), "before": before}


def _collapsed(name: str) -> str:
    """As `collapse`, of a name in a rule; a number inside a word stays "{i}"."""
    return collapse(re.sub(r"(?<![A-Za-z0-9])\{\w+\}(?![A-Za-z0-9])", "#", name))


def _regex(name: str) -> str:
    return re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(name)).replace(r"\*", "(?P<rest>.+)")


def no_match(found: list[Candidate], state: State) -> BadCheckpoint:
    """What to say of tensors that are of no system: the nearest, with how much matches."""
    first = {c.system: c for c in reversed(found)}  # of each system the nearest layout
    near = [c for c in found if c.tensors > 0.05 and first[c.system] is c][:3]
    if not near:
        return BadCheckpoint(f"these {len(state)} tensors, e.g. {', '.join(list(state)[:2])}, resemble none of the "
                             f"{len(systems())} systems; formarium list names them")
    best = found[0]
    said = "; ".join(f"{c} {c.tensors:.0%} of {len(state)} tensors" for c in near)
    problem = f". {best.fit.error}" if best.fit and best.fit.error and best.tensors > 0.5 else ""
    return BadCheckpoint(f"not recognised; nearest: {said}{problem}")
