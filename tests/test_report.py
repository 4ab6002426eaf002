"""The report of a comparison, from folders made here. Every score and time in them is invented."""

import base64
import io
import json
import math
import random
import re
import statistics
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

from formarium.arena.plots import COLOURS, front
from formarium.arena.report import command, write_report
from formarium.arena.words import duration, esc, human, number
from formarium.core.errors import FormariumError

IMAGE_MODELS = ["vit/nano", "swin/nano", "vit/nano:mixer=cosformer", "poolformer/nano",
                "vit/nano:residual=denseformer(dilation=4,period=5)"]
TITLES = ["An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
          "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"]
INFO = {
    "accuracy": {"title": "MNIST, 5,000 digits", "source": "https://example.org/digits", "licence": "CC BY-SA 3.0",
                 "sizes": {"train": 4000, "val": 500, "test": 500}, "note": "28 x 28 pixels, ten classes."},
    "bits_per_byte": {"title": "Three plays", "source": "Project Gutenberg", "licence": "public domain",
                      "sizes": {"train": 900_000, "val": 50_000, "test": 50_000}, "note": ""},
}
PLAY = "First citizen: we are accounted poor, and what authority surfeits on would relieve us, if they would yield. "


def digits(count: int) -> tuple[list[str], list[int]]:
    """PNGs in base64 of scikit-learn's digits, and what they show."""
    pytest.importorskip("sklearn")
    image = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_digits

    data, pngs = load_digits(), []
    for pixels in data.images[:count]:
        file = io.BytesIO()
        image.fromarray((pixels * 15.9).astype("uint8")).resize((28, 28)).save(file, "PNG")
        pngs.append(base64.b64encode(file.getvalue()).decode())
    return pngs, data.target[:count].tolist()


def write_metrics(path: Path, metric: str, start: float, end: float, steps: int, dice: random.Random,
                  dies_at: int | None = None) -> None:
    path.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        far = math.exp(-5 * step / steps)
        loss = end + (start - end) * far * dice.uniform(0.85, 1.15)
        if dies_at and step > 0.7 * dies_at:
            loss *= 2 ** ((step - 0.7 * dies_at) / 5)
        if step % 3 == 1 or step == dies_at:
            lines.append({"step": step, "seconds": 0.07 * step, "loss": None if step == dies_at else loss, "lr": 0.001})
        if step == dies_at:
            break
        if step % (steps // 6) == 0:
            score = loss / math.log(2) if metric == "bits_per_byte" else max(0.1, 1 - 0.35 * loss)
            lines.append({"step": step, "seconds": 0.07 * step, "val": {"loss": loss, metric: score}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make(folder: Path, models: list[str], *, metric: str = "accuracy", seeds: int = 3, dead: tuple[int, ...] = (),
         shaky: tuple[int, ...] = (), lrs: tuple[float, ...] = (1e-3,), budget: dict[str, float] | None = None) -> Path:
    """A comparison's folder. dead: models whose every run failed; shaky: those whose last run diverged."""
    dice, text = random.Random(7), metric == "bits_per_byte"
    pngs, truth = ([], []) if text else digits(16)
    rows: list[dict[str, Any]] = []
    for i, model in enumerate(models):
        level = dice.uniform(1.9, 2.6) if text else dice.uniform(0.85, 0.97)
        slug = re.sub(r"[^\w.]", "-", model).strip("-")
        cells = []
        for seed in range(seeds):
            lost = i in dead or (i in shaky and seed == seeds - 1)
            path = f"cells/{slug}/lr0.001-seed{seed}"
            end = level * math.log(2) if text else (1 - level) * 2.5
            write_metrics(folder / path, metric, 5.5 if text else 2.3, end, 300, dice, 140 + 10 * seed if lost else None)
            score = level + dice.gauss(0, 0.006)
            cells.append({"seed": seed, "status": "failed" if lost else "done", "path": path,
                          "reason": f"the loss became nan at step {140 + 10 * seed}" if lost else "",
                          "test": {} if lost else {"loss": end, metric: score}, "seconds": 21.0 + 3 * dice.random()})
        done = [c for c in cells if c["status"] == "done"]
        values = {n: [c["test"][n] for c in done] for n in (done[0]["test"] if done else ())}
        failed = len(cells) - len(done)
        scale = 4 ** dice.random()
        wrong = [dice.random() > level for _ in truth]
        shown = {"kind": "text", "prompt": PLAY[:40], "text": PLAY[40:] + "".join(dice.choices(PLAY, k=160))} if text else {
            "kind": "images", "images": pngs, "truth": truth, "confidence": [dice.uniform(0.4, 1) for _ in truth],
            "predicted": [(t + 3) % 10 if w else t for t, w in zip(truth, wrong, strict=True)]}
        rows.append({
            "model": model, "slug": slug, "title": TITLES[i % 2], "status": "failed" if failed else "done", "lr": 1e-3,
            "reason": f"{failed} of {len(cells)} runs failed: {cells[-1]['reason']}" if failed else "",
            "lr_tried": {f"{lr:g}": level + abs(lr - 1e-3) * (20 if text else -20) if done else None for lr in lrs}
            if len(lrs) > 1 else {},
            "cells": cells, "difference": None, "params": 204_000 * scale, "macs": 9.1e6 * scale * dice.uniform(0.5, 2),
            "test": {n: {"mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "values": v}
                     for n, v in values.items()},
            "train_seconds": 21.0 * scale if done else None, "peak_memory": int(4e8 * scale), "latency_ms": 1.9 * scale,
            "throughput": 3100 / scale, "throughput_batch": 64, "shown": shown if done else None})
    base = {c["seed"]: c["test"][metric] for c in rows[0]["cells"] if c["status"] == "done"}
    for row in rows[1:]:
        values = [c["test"][metric] - base[c["seed"]] for c in row["cells"] if c["status"] == "done" and c["seed"] in base]
        half = 2.5 * statistics.stdev(values) if len(values) > 1 else None
        mean = statistics.fmean(values) if values else None
        row["difference"] = {"mean": mean, "low": half and mean - half, "high": half and mean + half, "values": values} \
            if values else None
    plan = {"formarium": "0.1.0", "task": "plays" if text else "mnist5k", "task_info": INFO[metric], "metric": metric,
            "higher_is_better": not text, "models": models, "seeds": list(range(seeds)), "budget": budget or {"steps": 300},
            "batch_size": 64, "lrs": list(lrs), "weight_decay": 0.05, "warmup": 0.1, "started": "2026-01-31T12:00:00",
            "machine": {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "device": "cpu"}}
    (folder / "compare.json").write_text(json.dumps(plan), encoding="utf-8")
    results = {"rows": rows, "verdict": f"{models[0]} is a model, and this sentence its verdict.",
               "notes": [f"{seeds} seeds."]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The visible text, the tags with their attributes, and whether every tag is closed in its order."""

    VOID = frozenset({"meta", "br", "img", "wbr", "link", "input", "base"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def having(self, **wanted: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if all(v in (a.get(k.rstrip("_")) or "").split() for k, v in wanted.items())]

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


def written(folder: Path, *args: Any, **kwargs: Any) -> Page:
    return Page(write_report(make(folder, *args, **kwargs)).read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "audio", "video")
        assert tag != "script" or not attributes
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "xlink:href", "poster", "data") and tag != "a":
                assert (value or "").startswith(("data:image/png;base64,", "#"))
            for target in re.findall(r"url\((.*?)\)", value or ""):
                assert target.startswith("#")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("images"), [*IMAGE_MODELS, "vit/nano:norm=none"], dead=(5,), shaky=(3,),
                   lrs=(3e-4, 1e-3, 3e-3))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("many"), [f"system{i}/nano" for i in range(20)], dead=(7,), shaky=(12,),
                   budget={"flops": 1e13})


def test_loads_nothing_from_outside(images: Page, many: Page) -> None:
    for page in (images, many):
        assert_self_contained(page)


def test_style_sheet_loads_nothing(tmp_path: Path) -> None:
    text = write_report(make(tmp_path, ["vit/nano"])).read_text(encoding="utf-8")
    for block in re.findall(r"<style.*?</style>|<script.*?</script>", text, re.DOTALL):
        assert not re.search(r"@import|url\(|https?:|//|fetch\(|XMLHttp", block)


def test_says_what_was_compared(images: Page) -> None:
    for words in ("MNIST, 5,000 digits: 6 models", "vit/nano is a model, and this sentence its verdict.", "3 seeds.",
                  "4,000 train, 500 validation, 500 test (samples)", "CC BY-SA 3.0", "300 steps a run, in batches of 64",
                  "3 (0, 1, 2)", "best of 0.0003, 0.001, 0.003", "weight decay 0.05", "10 % of the budget",
                  "formarium compare vit/nano", "Some CPU", "torch 2.13.0", "Formarium 0.1.0"):
        assert words in images.text


def test_failed_models_stay_with_their_reason(images: Page) -> None:
    assert "failed: 3 of 3 runs failed: the loss became nan at step 160" in images.text
    assert "1 of 3 runs failed: the loss became nan at step 160" in images.text
    assert len(images.having(class_="reason")) == 1


def test_table_agrees_with_the_results(tmp_path: Path) -> None:
    page = written(tmp_path, IMAGE_MODELS)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    for row in rows:
        found, d = row["test"]["accuracy"], row["difference"]
        assert f"{100 * found['mean']:.1f} ± {100 * found['sd']:.1f}" in page.text
        assert human(row["params"]) in page.text
        if d:
            low, high = (f"{100 * d[k]:+.1f}".replace("-", "\u2212") for k in ("low", "high"))
            assert f"{low} to {high}" in page.text
    keys = {float(a["data-v"]) for a in page.named("td") if a.get("data-v")}  # by which the columns are sorted
    assert {r["test"]["accuracy"]["mean"] for r in rows} | {r["macs"] for r in rows} <= keys


def test_best_of_a_column_is_marked(tmp_path: Path) -> None:
    make(tmp_path, IMAGE_MODELS, dead=(1,))
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    results["rows"][1]["params"] = 1  # a failed model is the best of nothing
    results["rows"][2]["params"] = 1000
    path.write_text(json.dumps(results))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="best">1 k</span>' in text
    assert '<span class="best">1</span>' not in text
    best = max(r["test"]["accuracy"]["mean"] for r in results["rows"] if r["test"])
    assert f'<span class="best">{100 * best:.1f}</span>' in text


def test_every_model_answers_every_image(images: Page) -> None:
    assert len(images.named("img")) == 16
    assert len(images.having(class_="guess")) == 5 * 16  # the sixth model failed
    wrong = images.having(class_="miss")
    assert 0 < len(wrong) < 5 * 16
    assert images.text.count("× ") == len(wrong) + 1  # and once where the mark is explained


def test_curves_are_svg_with_text(images: Page) -> None:
    labels = [a["aria-label"] for a in images.having(class_="plot")]
    assert labels == ["Training loss", "Validation accuracy", "Test accuracy against MACs", "Test accuracy against latency"]
    assert {a["data-model"] for a in images.having(class_="band")} == {"0", "1", "2", "3", "4"}
    assert {a["data-model"] for _, a in images.tags if "data-model" in a} == {"0", "1", "2", "3", "4", "5"}
    assert "Step" in images.text
    assert not re.search("|".join(COLOURS), str([a for t, a in images.tags if t in ("path", "use", "text")]))


def test_ids_are_unique_and_references_resolve(images: Page) -> None:
    ids = [a["id"] for _, a in images.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = {v[1:] for _, a in images.tags for k, v in a.items() if k == "href" and v and v.startswith("#")}
    used |= {name for _, a in images.tags for v in a.values() for name in re.findall(r"url\(#(.*?)\)", v or "")}
    assert used
    assert used <= set(ids)


def test_no_nan_no_none_is_shown(images: Page, many: Page) -> None:
    for page in (images, many):
        shown = re.sub("became nan at", "", page.text).replace("norm=none", "")
        assert not re.search(r"\b(nan|none|null|inf)\b", shown, re.IGNORECASE)


def test_user_text_is_escaped(tmp_path: Path) -> None:
    bad = "vit/nano:mixer=<script>alert('$x_$')</script>&amp;"
    make(tmp_path, [bad, "swin/nano"], dead=(1,))
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    results["rows"][1]["reason"] = "<img src=x onerror=alert(1)>"
    results["verdict"] = "<b>${title}</b>"
    results["rows"][0]["shown"] |= {"predicted": ['"><script>'] * 16}
    path.write_text(json.dumps(results))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert_self_contained(page)
    assert len(page.named("script")) == 1
    assert len(page.named("img")) == 16
    for words in (bad, "<img src=x onerror=alert(1)>", "<b>${title}</b>", '"><script>'):
        assert words in page.text


def test_language_samples(tmp_path: Path) -> None:
    make(tmp_path, ["gpt/nano", "gpt/nano:mixer=cosformer"], metric="bits_per_byte", budget={"seconds": 60.0})
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    results["rows"][0]["shown"] |= {"prompt": "To be,", "text": "To be, <or> \x00\udcff not"}
    path.write_text(json.dumps(results))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="prompt">To be,</span> &lt;or&gt; \ufffd\ufffd not</pre>' in text
    page = Page(text)
    for words in ("bits per byte on test data, lower is better", "the lower left corner", "60 s of training",
                  "(predicted bytes)"):
        assert words in page.text
    assert f"{results['rows'][0]['test']['bits_per_byte']['mean']:.3f} ±" in page.text
    assert "Training time, s" in page.text
    assert not page.named("img")


def test_one_seed_has_neither_bands_nor_intervals(tmp_path: Path) -> None:
    page = written(tmp_path, ["vit/nano", "swin/nano"], seeds=1)
    assert not page.having(class_="band")
    assert len(page.having(class_="plot")) == 4
    assert "One (0), so nothing is known of the spread" in page.text
    assert not re.search(r"[\d.]+ to [+\u2212]", page.text)
    assert len(page.having(class_="difference")) == 1


def test_one_model(tmp_path: Path) -> None:
    page = written(tmp_path, ["vit/nano"])
    assert "5,000 digits: 1 model " in page.text
    assert not page.having(class_="best")
    assert not page.having(class_="difference")
    assert len(page.having(class_="plot")) == 4


def test_all_failed(tmp_path: Path) -> None:
    page = written(tmp_path, ["vit/nano", "swin/nano"], dead=(0, 1))
    assert len(page.having(class_="reason")) == 2
    assert [a["aria-label"] for a in page.having(class_="plot")] == ["Training loss", "Validation accuracy"]
    assert not page.having(class_="guess")


def test_nothing_measured(tmp_path: Path) -> None:
    """A folder whose runs left no metrics.jsonl and whose costs are unknown has no plots, and says so with dashes."""
    make(tmp_path, ["vit/nano", "swin/nano"])
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    for row in results["rows"]:
        row |= {"macs": None, "latency_ms": None, "peak_memory": None}
    path.write_text(json.dumps(results))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert not page.having(class_="plot")
    assert page.text.count("–") == 7  # three costs of two models, the first model's difference


def test_learning_rates_that_were_tried(tmp_path: Path) -> None:
    make(tmp_path, ["vit/nano", "swin/nano", "poolformer/nano"], dead=(2,), lrs=(3e-4, 1e-3, 3e-3))
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    results["rows"][1]["lr"] = 3e-4
    path.write_text(json.dumps(results))
    table = write_report(tmp_path).read_text(encoding="utf-8").split("Choice of the learning rate")[1].split("</table>")[0]
    shares = [[f"{100 * v:.1f} %" for v in r["lr_tried"].values()] for r in results["rows"][:2]]
    assert re.findall(r'<span class="best">(.*?)</span>(†?)', table) == [(shares[0][1], ""), (shares[1][0], "†")]
    assert table.count('<span class="failed">failed</span>') == 3
    plan = json.loads((tmp_path / "compare.json").read_text()) | {"lrs": [3e-4, 1e-3]}  # of two, each is an end
    (tmp_path / "compare.json").write_text(json.dumps(plan))
    assert "†<" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_many_models_are_told_apart(many: Page, images: Page) -> None:
    looks = set()
    for label in ("Training loss", "Validation accuracy"):
        assert label in [a.get("aria-label") for a in many.having(class_="plot")]
    for tag, a in many.tags:
        if tag == "path" and "stroke-dasharray" in a:
            looks.add((a["stroke"], a["stroke-dasharray"]))
    assert len(looks) == 20
    assert many.having(class_="many")
    assert not images.having(class_="many")


def test_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    make(tmp_path, ["vit/nano"])
    for loss, path in zip((1.0, 2.0, 6.0), tmp_path.rglob("metrics.jsonl"), strict=True):
        lines = [{"step": step, "seconds": 1.0, "loss": loss, "lr": 0.1} for step in (1, 2)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    band = re.search(r'class=band>.*?<path[^>]* d="(.*?)".*?<use [^>]*y="(.*?)"', text, re.DOTALL)
    line = re.search(r'<g data-model="0">.*?<path[^>]* d="(.*?)"', text, re.DOTALL)
    assert band
    assert line
    edges = [float(band[2]) + float(y) for y in re.findall(r"[ML] \S+ (\S+)", band[1])]
    (mean,) = {float(y) for y in re.findall(r"[ML] \S+ (\S+)", line[1])}  # SVG counts downwards
    assert (max(edges) - mean) / (max(edges) - min(edges)) == pytest.approx((3 - 1) / (6 - 1), abs=1e-3)


def end_labels(folder: Path) -> list[float]:
    """Heights of the numbers at the validation curves' ends, downwards from the top; the best curve's number first."""
    text = write_report(folder).read_text(encoding="utf-8")
    plot = re.search(r'<svg class="plot"[^>]*aria-label="Validation accuracy">.*?</svg>', text, re.DOTALL)
    assert plot
    heights = {int(m[2]): float(m[1]) for m in re.finditer(r'<text[^>]*y="([\d.]+)"[^>]*>(\d+)</text>', plot[0])}
    ends = []
    for i, row in enumerate(json.loads((folder / "results.json").read_text())["rows"]):
        paths = [folder / cell["path"] / "metrics.jsonl" for cell in row["cells"]]
        last = [json.loads(path.read_text().splitlines()[-1])["val"]["accuracy"] for path in paths]
        ends.append((statistics.fmean(last), i + 1))
    return [heights[i] for _, i in sorted(ends, reverse=True)]


def test_labels_at_the_ends_of_curves_are_in_order_and_apart(tmp_path: Path) -> None:
    labels = end_labels(make(tmp_path, [f"system{i}/nano" for i in range(20)]))
    assert all(b - a > 8 for a, b in pairwise(labels))


def test_labels_stay_at_curves_that_are_apart(tmp_path: Path) -> None:
    low, high = end_labels(make(tmp_path, ["vit/nano", "swin/nano"]))
    assert high - low > 20


@pytest.mark.parametrize("end", ['{"step": 301, "seco', '{"step": 302, "seconds": 1.0, "loss": null, "lr": 0.1}\n'
                                 '{"step": 303, "seconds": 1.0, "loss": 0.5, "lr": 0.1}\n'])
def test_curves_end_at_a_torn_line_or_a_loss_that_is_no_number(tmp_path: Path, end: str) -> None:
    make(tmp_path, ["vit/nano"])
    whole = write_report(tmp_path).read_text(encoding="utf-8")
    for path in tmp_path.rglob("metrics.jsonl"):
        path.write_text(path.read_text() + end)
    assert write_report(tmp_path).read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("missing", ["results.json", "compare.json"])
def test_unfinished_folder(tmp_path: Path, missing: str) -> None:
    make(tmp_path, ["vit/nano"], seeds=1)
    (tmp_path / missing).unlink()
    with pytest.raises(FormariumError, match=missing):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_front() -> None:
    points = [(1.0, 0.5, 0), (2.0, 0.4, 1), (2.0, 0.9, 2), (3.0, 0.9, 3), (4.0, 0.95, 4)]
    assert [i for _, _, i in front(points, 1)] == [0, 2, 4]
    assert [i for _, _, i in front(points, -1)] == [0, 1]


@pytest.mark.parametrize(("got", "wanted"), [
    (human(204_000), "204 k"), (human(28_288_354), "28.3 M"), (human(4.5e9), "4.5 G"), (human(999_600), "1 M"),
    (duration(0.0019), "1.9 ms"), (duration(21.04), "21 s"), (duration(600), "10 min"), (duration(9000), "2.5 h"),
    (number("accuracy", 0.9312, unit=" %"), "93.1 %"), (number("bits_per_byte", 1.23456), "1.235"),
    (number("accuracy", -0.0104, "+"), "\u22121.0"), (number("accuracy", None), "–"), (number("loss", math.nan), "–"),
    (esc("a<b>\x07\ud800"), "a&lt;b&gt;\ufffd\ufffd"),
])
def test_human_forms(got: str, wanted: str) -> None:
    assert got == wanted


def test_command_is_exact(tmp_path: Path) -> None:
    make(tmp_path, ["vit/nano", "vit/nano:residual=denseformer(dilation=4,period=5)"], lrs=(3e-4, 1e-3))
    plan = json.loads((tmp_path / "compare.json").read_text())
    assert command(plan) == ("formarium compare vit/nano 'vit/nano:residual=denseformer(dilation=4,period=5)' "
                             "--task mnist5k --steps 300 --seeds 3 --batch-size 64 --lr 0.0003 --lr 0.001")


@pytest.mark.parametrize("other", [{"weight_decay": 0.1}, {"warmup": 0.0}, {"seeds": [3, 5]}])
def test_command_is_python_where_the_shell_has_no_option(tmp_path: Path, other: dict[str, Any]) -> None:
    make(tmp_path, ["vit/nano"])
    text = command(json.loads((tmp_path / "compare.json").read_text()) | other)
    key, value = next(iter(other.items()))
    assert text.startswith("import formarium as fm\n")
    assert f"{key}={value!r}" in text
    compile(text, "report", "exec")
