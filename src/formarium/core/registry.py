"""Finds every system and part by reading the files' literals: listing imports neither the papers nor torch.

A system is a file in `papers/` whose text holds `CARD = Card(...)`; its name is the file's name. A user's own file
joins by `add_module("my.py")` (`--module my.py`) or by an entry point of the group `formarium.papers`.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from glob import escape, iglob
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from .card import Card, Published
from .errors import FormariumError, unknown

PACKAGE = Path(__file__).resolve().parent.parent
PART_KINDS = ("mixer", "channel", "norm", "residual", "position")
METHODS = {"transform": "fm.apply(model, {0!r})", "objective": "fm.pretrain({1!r}, {0!r}, task=...)",
           "explanation": "fm.explain(model, x, method={0!r})"}  # kinds that act on models: how, by name and first host

_CARD = re.compile(r"^CARD = Card\(.*?^\)", re.MULTILINE | re.DOTALL)
_PARTS = re.compile(r"^PARTS = \{.*?^\}", re.MULTILINE | re.DOTALL)


def _literal(node: ast.AST) -> Any:
    """The value of literals, and of Card(...) and Published(...) made of literals; anything else raises ValueError."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Card", "Published"):
        values = {k.arg: _literal(k.value) for k in node.keywords if k.arg}
        return {"Card": Card, "Published": Published}[node.func.id](**values)
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Tuple):
        return tuple(_literal(x) for x in node.elts)
    return ast.literal_eval(node)


def _assigned(pattern: re.Pattern[str], path: Path) -> Any:
    found = pattern.search(path.read_text(encoding="utf-8"))
    if found is None:
        return None
    try:
        statement = ast.parse(found[0]).body[0]
        assert isinstance(statement, ast.Assign)
        return _literal(statement.value)
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise FormariumError(f"{path}: {found[0][:20]!r}... must be made of literals only ({error})") from error


def cache_folder() -> Path:
    """The user's folder of what can be made again: formarium in XDG_CACHE_HOME, LOCALAPPDATA (Windows) or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(root, "formarium")


class Cards:
    """Cards by file. To parse hundreds takes longer than to list them, so they are kept in the cache folder, each with its
    file's times and size, all with a checksum. No cache, or a damaged one, is none."""

    def __init__(self) -> None:
        self.path = cache_folder() / f"cards-{crc32(os.fsencode(PACKAGE)):08x}.json"
        self.seed = crc32(repr([self.stamp(Path(__file__).with_name(f)) for f in ("card.py", "registry.py")]).encode())
        self.kept: dict[str, Any] = {}
        self.new: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            head, _, body = self.path.read_bytes().partition(b"\n")
            if int(head) == crc32(body, self.seed):
                self.kept = json.loads(body)

    @staticmethod
    def stamp(path: Path) -> list[int]:
        found = path.stat()
        return [found.st_mtime_ns, found.st_ctime_ns, found.st_size]

    def read(self, path: Path) -> Any:
        stamp, (known, card) = self.stamp(path), self.kept.get(str(path), (None, None))
        if known == stamp:
            return _thaw(card)
        card = _assigned(_CARD, path)
        if card is not None and time.time_ns() - stamp[0] > 2e9:  # else it may change again within one tick of the clock
            frozen = asdict(card)
            if _thaw(json.loads(json.dumps(frozen))) == card:
                self.new[str(path)] = stamp, frozen
        return card

    def keep(self, paths: Iterable[Path]) -> None:
        """Writes what was read anew; of all others, those of `paths` stay."""
        rows = {str(p): row for p in paths if (row := self.new.get(str(p)) or self.kept.get(str(p)))}
        if self.new:
            body, temporary = json.dumps(rows).encode(), self.path.with_suffix(f".{os.getpid()}")
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(b"%d\n" % crc32(body, self.seed) + body)
                temporary.replace(self.path)
        self.kept, self.new = rows, {}


def _thaw(card: dict[str, Any]) -> Card:
    variants = {n: Published(**{**p, "input": p["input"] and tuple(p["input"])}) for n, p in card["variants"].items()}
    return Card(**{**card, "variants": variants, **{k: tuple(card[k]) for k in ("tags", "hosts", "can")}})


cards = cache(Cards)


@dataclass(frozen=True)
class Entry:
    """A system: where its file is, its card (read as text), its module (imported on use)."""

    name: str
    path: Path
    module_name: str

    @cached_property
    def card(self) -> Card:
        return cards().read(self.path)

    @property
    def is_part(self) -> bool:
        return self.card.kind in PART_KINDS

    @cached_property
    def module(self) -> ModuleType:
        if self.module_name in sys.modules:
            return sys.modules[self.module_name]
        if self.path.is_relative_to(PACKAGE):
            return importlib.import_module(self.module_name)
        spec = importlib.util.spec_from_file_location(self.module_name, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[self.module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception:
            del sys.modules[self.module_name]  # a second try must not find half a module
            raise
        return module


_added: dict[str, Entry] = {}


def add_module(path: str | Path) -> str:
    """Registers a user's own paper file; returns the system's name (the file's). Its code runs on first use only."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FormariumError(f"no file {path}: --module takes the path of a Python file with a CARD")
    name = path.stem
    entry = Entry(name, path, f"formarium_user.{name}")
    if entry.card is None:  # one that is not made of literals raises here, before it is among the systems
        raise FormariumError(f"{path} has no 'CARD = Card(...)' at the start of a line; see docs/architecture.md")
    taken = _built_in().get(name) or _added.get(name)
    if taken is not None and taken.path != path:
        raise FormariumError(f"the name {name!r} is taken by {taken.path.name}; rename your file")
    _added[name] = entry
    return name


@cache
def _built_in() -> dict[str, Entry]:
    found = {}
    for path in sorted((PACKAGE / "papers").rglob("*.py")):
        if path.name != "__init__.py":
            dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            found[path.stem] = Entry(path.stem, path, dotted)
    return found


@cache
def _entry_points() -> dict[str, Entry]:
    folders = [f or os.curdir for f in sys.path]
    listed = (file for f in folders for file in iglob(os.path.join(escape(f), "*-[iI][nN][fF][oO]", "entry_points.txt")))
    if not any(map(os.path.isfile, folders)) and not any(b"formarium.papers" in Path(f).read_bytes() for f in listed):
        return {}  # at a tenth of the time that importlib.metadata takes to say so

    from importlib.metadata import entry_points

    found = {}
    for point in entry_points(group="formarium.papers"):
        spec = importlib.util.find_spec(point.value)
        if spec is not None and spec.origin is not None:
            found[point.name] = Entry(point.name, Path(spec.origin), point.value)
    return found


def systems() -> dict[str, Entry]:
    """Every system by name, in order of name."""
    return dict(sorted((_entry_points() | _built_in() | _added).items()))


def find(name: str) -> Entry:
    """The system called `name`; an unknown name raises with the nearest ones."""
    for known in (_added, _built_in(), _entry_points()):
        if name in known:
            return known[name]
    raise unknown("system", name, systems())


def card(name: str) -> Card:
    """The card of a system, e.g. card("swin")."""
    return find(name.split("/")[0]).card


def split_name(name: str) -> tuple[Entry, str]:
    """"swin/tiny" -> (entry, "tiny"); "swin" -> its default variant. Unknown names raise with the nearest ones."""
    system, _, variant = name.partition("/")
    entry = find(system)
    variants = entry.card.variants
    if not variants:
        raise FormariumError(f"{system} is no model: use {METHODS[entry.card.kind].format(system, entry.card.hosts[0])}")
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise unknown(f"variant of {system}", variant, variants)
    return entry, variant


def list_models(pattern: str = "*", *, kind: str | None = None, domain: str | None = None, tag: str | None = None,
                text: str | None = None) -> list[str]:
    """Names "system/variant" that match, "system" where it has no models: a glob, the card's kind, domain, a tag, a text in
    title, claim or tags."""
    names, entries = [], systems().values()
    for entry in entries:
        c = entry.card
        if kind not in (None, c.kind) or domain not in (None, c.domain) or (tag is not None and tag not in c.tags):
            continue
        if text is not None and text.lower() not in f"{entry.name} {c.title} {c.claim} {' '.join(c.tags)}".lower():
            continue
        names += [f"{entry.name}/{v}" for v in c.variants] or [entry.name]
    cards().keep(e.path for e in entries)
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.split("/")[0], pattern)]


@cache
def named_parts() -> dict[str, dict[str, tuple[str, str]]]:
    """kind -> name -> (module, class), from the literal PARTS of the files in `parts/` and `papers/`."""
    found: dict[str, dict[str, tuple[str, str]]] = {kind: {} for kind in PART_KINDS}
    files = {f"formarium.parts.{p.stem}": p for p in sorted((PACKAGE / "parts").glob("*.py"))}
    for module, path in (files | {e.module_name: e.path for e in _built_in().values()}).items():
        for kind, names in (_assigned(_PARTS, path) or {}).items():
            found[kind] |= {name: (module, class_name) for name, class_name in names.items()}
    return found


def list_parts(kind: str) -> list[str]:
    """Names that an option of this kind ("mixer", "residual", ...) takes: by name: PARTS, and papers of the kind."""
    if kind not in PART_KINDS:
        raise unknown("kind of part", kind, PART_KINDS)
    return sorted([*named_parts()[kind], *(n for n, e in systems().items() if e.card.kind == kind)])
