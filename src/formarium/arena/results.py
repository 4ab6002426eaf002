"""What studies found: where it is kept, what its numbers came from, and whether that has changed since."""

import hashlib
import json
import os
import platform
import re
from functools import cache
from pathlib import Path

from ..core.errors import BadData, FormariumError, UnknownName
from ..core.registry import _CARD, PACKAGE, PART_KINDS, named_parts, systems
from .jobs import Record, processors
from .study import ROOM, Seed, Study, find_study, studies, system_of

RUNS = Path("runs") / "replicate"

def _essence(path: Path) -> str:
    """The text of a Python file without its card, its docstring, comments that fill a line, and empty lines."""
    text = _CARD.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r'\A\s*(""".*?"""|"[^"\n]*")', "", text, flags=re.DOTALL)
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def files_of(study: Study) -> list[Path]:
    """The files of the systems and parts that a study names, and of the papers that those import."""
    words = {study.system}
    for model in study.arms.values():
        if isinstance(model, str):
            words |= set(re.findall(r"[A-Za-z_]\w*", model))
    parts = {name: module for kind in PART_KINDS for name, (module, _) in named_parts()[kind].items()}
    queue = [e.path for name, e in systems().items() if name in words]
    queue += [PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py") for name, module in parts.items()
              if name in words and name not in systems()]
    found: dict[Path, None] = {}
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found[path] = None
        for dots, module in re.findall(r"^from (\.+)([\w.]+) import", path.read_text(encoding="utf-8"), re.MULTILINE):
            other = path.parents[len(dots) - 1].joinpath(*module.split(".")).with_suffix(".py")
            if other.is_relative_to(PACKAGE / "papers") and other.is_file():
                queue.append(other)
    return sorted(found)


def sources(study: Study, path: Path) -> dict[str, str]:
    """What a result depends on, file by file: name -> hash. Comments, docstrings and cards do not count."""
    return {_label(p): _digest(_essence(p)) for p in (path, *files_of(study))}


def data_print(study: Study) -> str:
    """A hash of the data of all tasks of a study: what they say of it, sizes among that, and a batch of it."""
    from torch.utils._pytree import tree_leaves

    digest, bench = hashlib.sha256(), Seed(study, 0, Path())
    for make in ([] if study.task is None else [None]) + list(study.data):
        task = bench.get_task(make)
        digest.update(json.dumps([task.name, vars(task.info)], sort_keys=True).encode())
        for leaf in tree_leaves(task.train_batch(0, 0, 4)):
            digest.update(leaf.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def engine() -> str:
    """A hash of all that trains and measures: finished runs of another one are not taken up again."""
    rooms = [p for room in ("core", "parts", "skeletons", "data", "tasks") for p in sorted((PACKAGE / room).rglob("*.py"))]
    mine = [Path(__file__).with_name(f"{name}.py") for name in ("study", "train", "config", "pretrain", "initial")]
    return _digest("\n".join(_essence(p) for p in (*rooms, *mine)))


def stale(record: Record, *, data: bool = False) -> str:
    """What has changed since the result was found, in words; "" where nothing has. data: look at the data too, which
    reads it; where it cannot be had nothing is said of it."""
    try:
        study, path = find_study(record["study"])
    except UnknownName:
        return "the study is gone"
    except Exception as error:  # a file in the making must not hide the results of others
        return f"the study cannot be read: {error}"
    try:
        now = sources(study, path)
        if data:
            now["data"] = data_print(study)
    except BadData:
        pass
    except FormariumError as error:
        return str(error)
    then = {k: v for k, v in record["hashes"].items() if k != "data" or "data" in now}
    changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
    return f"changed since: {', '.join(changed)}" if changed else ""


# results


def results_folders() -> list[Path]:
    """Where results are written, and then everywhere that they are read: with the package, or in runs/replicate."""
    inside = ROOM / "results"
    own = RUNS / "results"
    return [inside, own] if os.access(inside if inside.is_dir() else ROOM, os.W_OK) else [own, inside]


def read_results() -> dict[str, Record]:
    """The results of all studies, by name; of two of the same study the later."""
    found: dict[str, Record] = {}
    for folder in results_folders():
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if file.stem not in found or record["date"] > found[file.stem]["date"]:
                found[file.stem] = record
    return dict(sorted(found.items()))


def summaries(system: str = "") -> list[dict[str, str]]:
    """A row a study (of one system): study, system, verdict, stale or not, and what came out in words."""
    results, rows = read_results(), []
    for name in sorted({*studies(), *results}):
        record = results.get(name)
        of = record["system"] if record else system_of(studies()[name])
        if system not in ("", of):
            continue
        if record is None:
            rows.append({"study": name, "system": of, "verdict": "not run", "what": f"formarium replicate {name}"})
            continue
        old = stale(record)
        said = f"{record['sentence']} Published: {record['published']}"
        rows.append({"study": name, "system": of, "verdict": record["verdict"] + ", STALE" * bool(old),
                     "what": f"{said} ({old})" if old else said})
    return rows


def changed() -> dict[str, str]:
    """The studies of the package that have no result or a stale one -> why."""
    results = read_results()
    why = {name: stale(results[name], data=True) if name in results else "was never run" for name in studies()}
    return {name: reason for name, reason in why.items() if reason}


def write_record(file: Path, record: Record) -> None:
    from .config import write_json

    write_json(file, record)


def versions() -> dict[str, str]:
    import numpy
    import torch

    return {"torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()}


def machine() -> str:
    """The machine in words."""
    import torch

    from .machine import describe_machine

    told = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = "" if told["device"] == "cpu" else f", {told['device']}"
    return f"{told['cpu']}{device}, {processors()} processors, one thread a run, {platform.system()}"
