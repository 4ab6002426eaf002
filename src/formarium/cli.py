"""The command line. Nothing heavy is imported before a command needs it: `formarium list` answers at once."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .core.errors import FormariumError, Stopped, unknown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(name="formarium", help="Published Transformers from one shelf of parts: compared, loaded, re-tested.",
                  no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
PIPED = 140  # characters of a line where the output is no terminal

Modules = Annotated[list[Path], typer.Option("--module", help="A Python file of your own with a CARD; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Steps = Annotated[int | None, typer.Option(help="Budget: optimiser steps of a run (default 300).")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the results; the same call resumes it.")]
Init = Annotated[Path | None, typer.Option("--init", help="Start from this file's weights; the head is new.")]
Seconds = Annotated[float | None, typer.Option(help="Budget: seconds of training of a run.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples in a batch (default 64, or the recipe's).")]
Decay = Annotated[float | None, typer.Option(help="Weight decay (default 0.05, or the recipe's).")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A published way to train, by name: deit.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE",
                                               help="A field of the recipe without an option here: ema=0.999, "
                                                    "schedule=rsqrt, mixup=0.8, drop_path=0.1; may be repeated.")]
Flops = Annotated[float | None, typer.Option(help="Budget: floating point operations of a run.")]


@cache
def out() -> "Console":
    from rich.console import Console  # a third of the time that `formarium list` has

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED)


def _table() -> "Table":
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold")


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Columns of plain text; the last two wrap, so that a line fits."""
    if not rows:
        print("nothing matches")
        return
    cells = [[*rows[0]], *([", ".join(v) if isinstance(v, list) else str(v) for v in row.values()] for row in rows)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for i in range(max(0, len(widths) - 2), len(widths)):
        left = room - sum(widths[:i]) - 2 * (len(widths) - 1)
        widths[i] = max(16, min(widths[i], left // (len(widths) - i)))
    for row in cells:
        for line in zip_longest(*(textwrap.wrap(c, w) or [""] for c, w in zip(row, widths, strict=True)), fillvalue=""):
            print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def _add(modules: list[Path]) -> None:
    from .core.registry import add_module

    for path in modules:
        add_module(path)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A name or glob, e.g. 'swin*'.")] = "*",
    kind: Annotated[str | None, typer.Option(help="backbone, language, mixer, residual, ...")] = None,
    domain: Annotated[str | None, typer.Option(help="image, language, ...")] = None,
    tag: Annotated[str | None, typer.Option(help="A tag of the card.")] = None,
    text: Annotated[str | None, typer.Option(help="Words in name, title, claim or tags.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks instead.")] = False,
    parts: Annotated[str | None, typer.Option(help="List parts: mixer, channel, norm, residual or position.")] = None,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """The systems, with their presets; filters combine."""
    from .core import registry

    _add(module)
    if tasks:
        from .tasks.registry import describe_tasks

        rows = [{"task": n, "what": d} for n, d in describe_tasks().items()]
    elif parts:
        rows = [{parts: n} for n in registry.list_parts(parts)]
    else:
        names = registry.list_models(pattern, kind=kind, domain=domain, tag=tag, text=text)
        if not names and pattern != "*" and not any("*?[" for c in pattern if c in "*?["):
            registry.find(pattern.split("/")[0])  # says what is near
        presets: dict[str, list[str]] = {}
        for system, _, preset in (n.partition("/") for n in names):
            presets.setdefault(system, []).extend([preset] if preset else [])
        rows = [{"system": system, "kind": c.kind, "domain": c.domain, "year": c.year, "presets": found, "title": c.title}
                for system, found in presets.items() for c in [registry.card(system)]]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print_rows(rows)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A system, or system/preset.")], as_json: Json = False,
         module: Modules = []) -> None:  # noqa: B006
    """A system's card: what is new, published against measured parameters and MACs, how to use it."""
    _add(module)
    from .arena.results import summaries
    from .arena.words import human, known
    from .core.registry import METHODS, find, split_name

    def counted(value: float | None) -> str:
        return human(value) if known(value) else "-"

    entry, only = find(name.split("/")[0]), split_name(name)[1] if "/" in name else None
    c, rows = entry.card, []
    for variant, published in c.variants.items():
        if only in (None, variant):
            rows.append({"preset": variant, "published": published} | _measured(f"{entry.name}/{variant}", published.input))
    verdicts = summaries(entry.name)
    if as_json:
        from dataclasses import asdict

        measured = [{**r, "published": asdict(r["published"])} for r in rows]
        print(json.dumps({"name": entry.name, **asdict(c), "measured": measured, "replicated": verdicts},
                         indent=1))
        return
    out().print(f"[bold]{entry.name}[/bold]  {c.title}", soft_wrap=True)
    where = ", ".join(filter(None, (c.authors, c.venue, f"arXiv {c.arxiv}" if c.arxiv else "", c.code, c.licence)))
    out().print(f"{where}\n\nClaim: {c.claim}\n", soft_wrap=True, markup=False)
    table = _table()
    for column in ("preset", "params", "published", "MACs", "published", "at", "published results"):
        table.add_column(column, overflow="fold")
    for row in rows:
        p = row["published"]
        results = "; ".join([*(f"{k} {v}" for k, v in p.results.items()), *([p.note] if p.note else [])])
        table.add_row(row["preset"], counted(row["params"]), counted(p.params), counted(row["macs"]), counted(p.macs),
                      "x".join(map(str, row["input"])), results)
    if rows:
        out().print(table)
    out().print("\nUse it:\n  import formarium as fm", markup=False)
    if rows:
        out().print(f"  model = fm.create_model('{entry.name}/{only or next(iter(c.variants))}')", markup=False)
    host = next(iter(c.hosts or [f"{entry.name}/{v}" for v in c.variants]), "")
    for kind, exported in {"transform": "TRANSFORM", "objective": "OBJECTIVE", "explanation": "METHODS"}.items():
        if hasattr(entry.module, exported):
            out().print(f"  {METHODS[kind].format(entry.name, host)}", markup=False)
    if entry.is_part:
        for host in c.hosts:
            out().print(f"  model = fm.create_model({host!r}, {c.kind}={entry.name!r})", markup=False)
    layouts = getattr(entry.module, "KEYS", {})
    if layouts:
        out().print(f"  model = fm.load('checkpoint.pth')  # reads the layouts: {', '.join(layouts)}", markup=False)
    if verdicts:
        out().print("\nReplicated (formarium replicate):", markup=False)
    for v in verdicts:
        out().print(f"  {v['study']}: {v['verdict']}. {v['what']}", markup=False, soft_wrap=True)
    if c.exceptions:
        out().print("\nWhere it departs: " + "; ".join(f"{k}: {v}" for k, v in c.exceptions.items()), markup=False)


def _measured(name: str, published: tuple[int, ...] | None) -> dict[str, Any]:
    """Parameters and MACs counted on the meta device, without memory for weights."""
    import torch

    from .core.build import create_model
    from .core.macs import count_macs
    from .core.model import count_parameters

    with torch.device("meta"):
        model = create_model(name)
        example = model.example(1, published)
    shape = tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else published or ()
    return {"params": count_parameters(model), "macs": count_macs(model, example), "input": shape}


def _recipe(settings: list[str] | None, **given: Any) -> dict[str, Any]:
    """What the options of a command gave, and its settings, NAME=VALUE: other fields of the recipe."""
    from .arena.config import Recipe

    found: dict[str, Any] = {}
    for text in settings or ():
        name, _, value = (s.strip() for s in text.partition("="))
        if name in given:
            raise FormariumError(f"{name} has an option of its own: --{name.replace('_', '-')}")
        if name not in Recipe.model_fields:
            raise unknown("field of the recipe", name, Recipe.model_fields.keys() - given)
        if not value or name in found:
            raise FormariumError(f"--set takes each field once, as {name}=VALUE; got {', '.join(settings or ())}")
        found[name] = None if value == "none" else value
    return found | {k: v for k, v in given.items() if v is not None}


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Names, with options: vit/nano gpt/nano:mixer=cosformer")],
    task: Annotated[str, typer.Option(help="See: formarium list --tasks")] = "mnist5k",
    steps: Steps = None,
    seconds: Seconds = None,
    flops: Flops = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    lr: Annotated[list[float] | None, typer.Option(help="Of several, each model keeps its best.")] = None,
    batch_size: BatchSize = None,
    recipe: RecipeName = None,
    settings: Set = None,
    folder: Out = None,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Train several models under equal conditions and compare them: a table, and a report to open."""
    _add(module)
    from .arena import compare as arena
    from .progress import Bars

    with Bars(quiet=as_json) as bars:
        found = arena.compare(models, task, seeds=seeds, lrs=lr or None, out=folder, watcher=bars,
                              **_recipe(settings, steps=steps, seconds=seconds, flops=flops, batch_size=batch_size,
                                        recipe=recipe))
    if as_json:
        print(json.dumps({"rows": found.rows, "verdict": found.verdict, "report": str(found.report)}, indent=1))
        return
    _print_comparison(found)


def _print_comparison(found: Any) -> None:
    from functools import partial

    from .arena.words import SHARES, called, human, number

    metric, percent = partial(number, found.metric), found.metric in SHARES
    heads = [called(found.metric) + (" %" if percent else ""), "to the first", "params", "MACs", "train s",
             "memory", "ms", "samples/s"]
    columns = len(heads) if out().width >= 110 else 5  # a narrow terminal gets what matters; the report has it all
    table = _table()
    table.add_column("model", overflow="fold", min_width=16)
    for head in heads[:columns]:
        table.add_column(head, justify="right", no_wrap=True)
    for r in found.rows:
        if not r["test"]:
            table.add_row(r["model"], "failed", *["-"] * (columns - 1))
            continue
        t, d = r["test"][found.metric], r["difference"]
        spread = "" if t["sd"] is None else f" ± {metric(t['sd'])}"
        apart = "" if d is None else metric(d["mean"], "+")
        if d and d["low"] is not None:
            apart += f" ({metric(d['low'], '+')} to {metric(d['high'], '+')})"
        cells = [metric(t["mean"]) + spread, apart, human(r["params"]), human(r["macs"]), f"{r['train_seconds']:.1f}",
                 human(r["peak_memory"]) + "B", f"{r['latency_ms']:.2f}", f"{r['throughput']:.0f}"]
        table.add_row(r["model"], *cells[:columns])
    out().print(table)
    for r in found.rows:
        if r["status"] == "failed":
            out().print(f"{r['model']}: {r['reason']}", markup=False)
    out().print(f"\n{found.verdict}", markup=False, soft_wrap=True)
    for note in found.notes:
        out().print(note, markup=False, style="dim", soft_wrap=True)
    out().print(f"\nreport: {found.report}", markup=False, soft_wrap=True)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A name, with options: swin/nano:drop_path=0.1")],
    task: Annotated[str, typer.Option(help="See: formarium list --tasks")] = "mnist5k",
    steps: Steps = None,
    seconds: Seconds = None,
    flops: Flops = None,
    lr: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: BatchSize = None,
    weight_decay: Decay = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    grad_checkpointing: Annotated[bool, typer.Option("--grad-checkpointing")] = False,
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    init: Init = None,
    recipe: RecipeName = None,
    settings: Set = None,
    objective: Annotated[str | None, typer.Option(help="A loss with labels, e.g. 'deit(teacher=t.safetensors)'")] = None,
    folder: Out = None,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Train one model; Ctrl-C keeps the state and the same command goes on."""
    _add(module)
    from .arena import train as arena
    from .progress import Bars

    with Bars(quiet=as_json) as bars:
        bars.plan(1)
        bars.begin(model, lr, seed)
        found = arena.train(model, task, out=folder, watch=bars.step,
                            **_recipe(settings, steps=steps, seconds=seconds, flops=flops, lr=lr, seed=seed,
                                      batch_size=batch_size, weight_decay=weight_decay, precision=precision, init=init,
                                      grad_checkpointing=grad_checkpointing, compile=compiled, recipe=recipe,
                                      objective=objective))
    if as_json:
        print(json.dumps({k: v for k, v in found.items() if k != "shown"}, indent=1))
        return
    _print_init(found, init)
    metrics = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found["test"].items())
    out().print(f"test: {metrics}\n{found['steps']} steps in {found['seconds']:.1f} s\n"
              f"weights: {found['folder']}/last.safetensors, best.safetensors (best on validation)",
              markup=False, soft_wrap=True)


@app.command("load")
def load_command(
    file: Annotated[Path, typer.Argument(help="Anyone's checkpoint: a file, an index of shards, or a folder with one.")],
    name: Annotated[str | None, typer.Option(help="The system, or system/preset, where you know it.")] = None,
    layout: Annotated[str | None, typer.Option(help="Whose names the tensors have: timm, authors, formarium, ...")] = None,
    part: Annotated[str | None, typer.Option(help="Which of several state dicts in the file, e.g. student.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Load what has a place; the rest is new.")] = False,
    option: Annotated[list[str] | None, typer.Option(help="heads=6, or img_size=384 to adapt; may be repeated.")] = None,
    written: Annotated[Path | None, typer.Option("--out", help="Write the model: a file of ours, unless --as.")] = None,
    other: Annotated[str | None, typer.Option("--as", help="Write it in this layout (.safetensors, .pth).")] = None,
    candidates: Annotated[bool, typer.Option("--candidates", help="Only say what the file may be, and why.")] = False,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Find out what a checkpoint is and load it: what became of every tensor; with --out, convert it."""
    _add(module)
    if candidates:
        from .weights.detect import detect
        from .weights.files import read

        rows = [{"system": c.system, "layout": c.layout, "under": c.prefix, "fits": "yes" if c.fits else "no", "why": c.why}
                for c in detect(read(file).state if part is None else read(file, part=part).state)[:8]]
        print(json.dumps(rows, indent=1)) if as_json else _print_rows(rows)
        return
    from .core.build import parse_name
    from .core.model import Model
    from .weights.load import load
    from .weights.save import save

    if other is not None and written is None:
        raise FormariumError(f"--as {other} says how to write the model; say where by --out")
    options = parse_name(f"model:{','.join(option)}")[1] if option else {}
    model, report = load(file, name, layout=layout, part=part, partial=partial, report=True, **options)
    if written is not None:
        if not isinstance(model, Model):
            raise FormariumError(f"{file} holds {report.model}, which is no whole model, so it cannot be written")
        save(model, written, layout=other)
    if as_json:
        print(json.dumps(report.as_dict() | ({"written": str(written)} if written else {}), indent=1))
        return
    print(report)
    if written is not None:
        print(f"written: {written}")


@app.command()
def apply(
    source: Annotated[str, typer.Argument(help="A model's name, or anyone's file.")],
    transforms: Annotated[list[str], typer.Argument(help="Applied in order, e.g. 'zero_tprune(keep=0.7)' llm_int8")],
    file: Annotated[Path, typer.Option("--out", help="Where the transformed model is written (.safetensors).")],
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Transform a model, say what changed, and write it; formarium list --kind transform names the transforms."""
    _add(module)
    from .core.build import create_model
    from .core.model import Model
    from .core.transform import apply, size
    from .weights.load import load
    from .weights.save import save

    model = load(source) if Path(source).exists() else create_model(source)
    if not isinstance(model, Model):
        raise FormariumError(f"{source} holds a {type(model).__name__} alone, which is no whole model")
    rows = {"before": size(model)}
    for transform in transforms:
        model = apply(model, transform, copy=False)
        rows[transform] = size(model)
    save(model, file)
    if as_json:
        print(json.dumps({"file": str(file), "sizes": rows}, indent=1))
        return
    table = _table()
    table.add_column("model")
    for head in rows["before"]:
        table.add_column(head, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{n:,}" for n in row.values()))
    out().print(table)
    out().print(f"\nwritten: {file}", markup=False, soft_wrap=True)


def _print_init(found: dict[str, Any], init: Path | None) -> None:
    if "init" in found:
        told = found["init"]
        out().print(f"started from {init}: {told['taken']} of {told['of']} tensors"
                  + (f"; new: {', '.join(told['left'][:4])}{', ...' * (len(told['left']) > 4)}" if told["left"] else ""),
                  markup=False, soft_wrap=True)


@app.command()
def pretrain(
    model: Annotated[str, typer.Argument(help="A name, with options: vit/nano")],
    objective: Annotated[str, typer.Argument(help="A name, with options: 'droppos(pos_ratio=0.5)'")],
    task: Annotated[str, typer.Option(help="Its inputs are used. See: formarium list --tasks")] = "mnist5k",
    steps: Steps = None,
    seconds: Seconds = None,
    flops: Flops = None,
    lr: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: BatchSize = None,
    weight_decay: Decay = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    grad_checkpointing: Annotated[bool, typer.Option("--grad-checkpointing")] = False,
    init: Init = None,
    settings: Set = None,
    folder: Out = None,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Pretrain a model under an objective, most without labels; `train --init` goes on from the encoder that it leaves."""
    _add(module)
    from .arena.pretrain import pretrain as run
    from .progress import Bars

    with Bars(quiet=as_json) as bars:
        bars.plan(1)
        bars.begin(f"{model} {objective}", lr, seed)
        found = run(model, objective, task, out=folder, watch=bars.step,
                    **_recipe(settings, steps=steps, seconds=seconds, flops=flops, lr=lr, seed=seed, batch_size=batch_size,
                              weight_decay=weight_decay, precision=precision, grad_checkpointing=grad_checkpointing,
                              init=init))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _print_init(found, init)
    metrics = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found["val"].items())
    on = task if found.get("does_task", True) else "TASK"
    out().print(f"validation: {metrics}\n{found['steps']} steps in {found['seconds']:.1f} s\nencoder: {found['encoder']}\n"
              f"go on: formarium train {model} --task {on} --init {found['encoder']}", markup=False, soft_wrap=True)
    if on != task:
        out().print(f"(TASK: one that {model} does, unlike {task}; see: formarium list --tasks)", markup=False,
                    soft_wrap=True)


@app.command()
def replicate(
    names: Annotated[list[str] | None, typer.Argument(help="Studies, or files of yours that end in .py.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every study.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Every study without a result, or with a stale one.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: does it run? No verdict.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side, each with one thread; else one a processor.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the page and the table of all results.")] = False,
    folder: Out = None,
    as_json: Json = False,
    module: Modules = [],  # noqa: B006
) -> None:
    """Does a paper's claim hold at this scale? Runs its study and gives the verdict; no name lists the studies."""
    _add(module)
    from .arena.replicate import replicate as run_study
    from .arena.results import changed as changed_studies
    from .arena.study import studies
    from .progress import Bars

    why = changed_studies() if changed else {}
    for name, reason in why.items():
        print(f"{name}: {reason}", file=sys.stderr)
    wanted = list(dict.fromkeys([*(names or ()), *(studies() if everything else ()), *why]))
    if not (wanted or report or changed or everything):
        _print_studies(as_json)
        return
    found, failed = [], {}
    for name in wanted:
        try:
            with Bars(quiet=as_json) as bars:
                found.append(run_study(name, quick=quick, jobs=jobs, out=folder, watcher=bars))
        except Stopped:
            raise
        except FormariumError as error:
            if len(wanted) == 1:
                raise
            failed[name] = str(error)
            continue
        if not as_json:
            out().print(f"{found[-1]!r}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"results": [r.record for r in found], "failed": failed}, indent=1))
    for name, reason in failed.items():
        print(f"formarium: {name}: {reason}", file=sys.stderr)
    if report:
        from .arena.replication_page import write_replication

        for path in write_replication(folder):
            print(f"written: {path}", file=sys.stderr)
    if failed:
        raise FormariumError(f"{len(failed)} of {len(wanted)} studies did not run: {', '.join(failed)}")


def _print_studies(as_json: bool) -> None:
    from .arena.results import summaries

    rows = summaries()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print_rows(rows)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Anyone's file, or a name.")],
    image: Annotated[Path, typer.Argument(help="A picture; it is brought to the model's size.")],
    method: Annotated[str, typer.Option(help="transformer_attribution, rollout, raw_attention, grad_cam, gradient, ...")]
    = "transformer_attribution",
    target: Annotated[int | None, typer.Option(help="A class; else the one that the model says.")] = None,
    task: Annotated[str | None, typer.Option(help="What the model was trained on: its normalisation, its classes' names.")]
    = None,
    picture: Annotated[Path, typer.Option("--out", help="The PNG that is written.")] = Path("explanation.png"),
    module: Modules = [],  # noqa: B006
) -> None:
    """Which part of a picture made the answer: writes the picture beside its relevance."""
    _add(module)
    from .arena.explanations import explain_image, overlay
    from .core.build import create_model
    from .core.errors import DoesNotFit
    from .tasks.classify import Classify
    from .tasks.registry import get_task
    from .weights.load import load

    trained_on = None if task is None else get_task(task)
    if trained_on is not None and not isinstance(trained_on, Classify):
        raise DoesNotFit(f"pictures are explained of classifiers; {task} is of the domain {trained_on.domain!r}")
    built: Any = load(model) if Path(model).is_file() else create_model(model).eval()
    found, pixels = explain_image(built, image, target=target, method=method, task=trained_on)
    k = int(found.target[0])
    name = f"class {k}" + (f" ({trained_on.data.classes[k]})" if trained_on else "")
    sure = f"{name}, probability {found.logits[0].softmax(0)[k]:.0%}"
    overlay(pixels, found, picture, f"{built.recipe['name']}: {sure}")
    told = "" if Path(model).is_file() else "; the model is untrained, so this says nothing: give a trained file"
    out().print(f"{sure}{told}\nwritten: {picture}", markup=False, soft_wrap=True)


def main() -> None:
    """Runs the command line; what a user can mend is printed without a traceback."""
    try:
        app()
    except FormariumError as error:
        print(f"formarium: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Stopped) else 2)


if __name__ == "__main__":
    main()
