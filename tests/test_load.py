"""Anyone's weights: recognised by their tensors, accounted for one by one, written under others' names."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import formarium as fm
from formarium.cli import app
from formarium.core import registry
from formarium.core.build import create_model, preset
from formarium.core.ctx import Ctx
from formarium.core.errors import BadCheckpoint, DoesNotFit, FormariumError, UnknownName
from formarium.core.registry import add_module
from formarium.weights import detect as detection
from formarium.weights.detect import collapse, detect
from formarium.weights.fit import defaults, nearest_preset
from formarium.weights.load import load
from formarium.weights.report import _span
from formarium.weights.save import in_layout, save
from golden_replay import replay

GOLDEN = {p.name.removesuffix(".json.gz"): p for p in sorted(Path(__file__).with_name("golden").glob("*.gz"))}
FUNCTIONS = {"deltanet__ops_h4_l128", "denseformer__dwa_n7_dil2_period1", "gmm_mask__gmm_layer",
             "llm_int8__matmul8bit_thr6_d96"}  # no nets
SAME_TENSORS = {"polyvit__polytwins_svt_small", "twins__twins_svt_small"}  # the name must be told
OF = {"transformer_attribution": "vit"}  # what a paper's golden file is a model of


def accounted(state, model, report):
    """Every tensor of the file and every tensor of the model stands in one row."""
    assert Counter(n for r in report.rows for n in r.theirs) == Counter(list(state))
    assert Counter(n for r in report.rows for n in r.ours) == Counter(list(model.state_dict()))
    assert all(r.why for r in report.rows if r.kind in ("ignored", "missing", "resized"))
    for r in report.rows:
        assert [tuple(state[n].shape) for n in r.theirs] == list(r.before)
        assert [tuple(model.state_dict()[n].shape) for n in r.ours] == list(r.after)
    assert sum(t["tensors"] for k, t in report.totals.items() if k != "missing") == len(state)


def timm(name="vit/nano", **changes):
    torch.manual_seed(0)
    model = create_model(name, **changes).eval()
    return model, in_layout(model, "timm")


# recognised

@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    """The references' state dicts, without help."""
    state, _, _ = replay(GOLDEN[name])
    system = name.split("__")[0]
    if name in FUNCTIONS:
        assert not state or not any(c.fits for c in detect(state))
        return
    options = {"heads": 8} if name.startswith("cosformer") else {}
    if name in SAME_TENSORS:
        with pytest.raises(BadCheckpoint, match=rf"equally.*name='{system}'"):
            load(state)
        options = {"name": system}
    else:
        best = detect(state)[0]
        assert (best.system, best.fits) == (OF.get(system, system), True), best.why
    model, report = load(state, report=True, **options)
    accounted(state, model, report)
    assert not report.totals.get("missing")


@pytest.mark.parametrize(("before", "beside"), [
    ("module.", {}), ("backbone.", {"neck.0.weight": (3, 3), "neck.1.bias": (3,)}), ("model.", {"ema_steps": ()}),
    ("net.encoder.", {"net.decoder.weight": (2, 2)}), ("_orig_mod.module.", {}),
])
def test_prefixes(before, beside):
    model, state = timm()
    inside = {f"{before}{k}": t for k, t in state.items()} | {k: torch.ones(s) for k, s in beside.items()}
    again, report = load(inside, report=True)
    x = model.example(2)
    assert torch.equal(again(x), model(x))
    accounted(inside, again, report)
    assert f"cut off the names: {before!r}" in report.notes
    assert {n for r in report.rows if r.kind == "ignored" for n in r.theirs} == set(beside)


def test_teacher_before_student():
    (student, _), (teacher, state) = timm(), timm()
    both = {f"student.{k}": t + 1 for k, t in state.items()} | {f"teacher.{k}": t for k, t in state.items()}
    again, report = load(both, report=True)
    x = teacher.example(2)
    assert torch.equal(again(x), student(x))
    assert "cut off the names: 'teacher.'" in report.notes
    accounted(both, again, report)


def test_a_prefix_that_the_file_lacks():
    """GPT-2 without its head is released without `transformer.`"""
    model = create_model("gpt/small", vocab=60, context=32, depth=2, dim=64, heads=4).eval()
    state = {k.removeprefix("transformer."): t for k, t in in_layout(model, "transformers").items() if "lm_head" not in k}
    again, report = load(state, heads=4, report=True)
    x = model.example(2)
    assert torch.equal(again(x), model(x))
    accounted(state, again, report)


def test_exact_presets_are_found():
    for name in ("swin/small", "vit/base_p32", "poolformer/m36"):
        with torch.device("meta"):
            state = preset(name)().state_dict()
        plan = detect(state)[0].fit.plan
        assert (plan.name, plan.changes) == (name, {})


def test_what_cannot_be_told_is_said():
    """Heads: the preset's of this size, or of no preset a guess; both are in the report, and the caller may know better."""
    _, state = timm("vit/nano", num_classes=3)
    model, report = load(state, report=True)
    assert model.recipe["name"] == "vit/nano"
    assert report.assumed["heads"].value == preset("vit/nano")["heads"]
    assert "assumed: heads=" in str(report)
    assert "heads" not in load(state, heads=2, report=True)[1].assumed


def test_given_presets_and_options():
    model, state = timm()
    assert load(state, "vit/nano").recipe == {"name": "vit/nano", "changes": {}}
    assert load(state, "vit/tiny").recipe["name"] == "vit/tiny"
    with pytest.raises(UnknownName, match="variant of vit 'tinny'; did you mean tiny"):
        load(state, "vit/tinny")
    with pytest.raises(UnknownName, match="unknown system 'vitt'"):
        load(state, "vitt")
    with pytest.raises(UnknownName, match="unknown option of ViT 'hedas'"):
        load(state, hedas=2)
    assert load(state, layout="timm").recipe == model.recipe
    with pytest.raises(BadCheckpoint, match=r"no system in the layout '\w+'; it fits vit \(timm\): leave layout= out"):
        load(state, layout="npz")


def test_assumptions_give_way_to_a_preset():
    told = defaults(preset("vit/tiny"))
    assert nearest_preset("vit", told | {"heads": 7}, assumed=("heads",))[0] == "vit/tiny"


# not recognised

def test_a_layer_of_another_shape():
    _, state = timm("vit/nano", depth=3)
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"][:-1]
    with pytest.raises(BadCheckpoint, match=r"of another shape: blocks.1.mlp.fc1.weight is \(255, 64\), expected \(256"):
        load(state)


def test_unknown_nets():
    state = {f"tower.{i}.{part}.kernel": torch.ones(4, 4) for i in range(5) for part in ("wq", "wk", "wv", "gate")}
    with pytest.raises(BadCheckpoint, match=r"these 20 tensors, e.g. tower.0.wq.kernel, .* resemble none of the"):
        load(state)
    _, own = timm()
    with pytest.raises(BadCheckpoint, match=r"nearest: .*\bvit \(timm\) \d\d% of \d+ tensors"):
        load(own | {f"blocks.{i}.moe.experts.{j}.weight": torch.ones(2, 2) for i in range(2) for j in range(4)})
    for empty in ({}, {"a": torch.ones(1)}):
        with pytest.raises(BadCheckpoint):
            load(empty)


def test_partial():
    model, state = timm("vit/nano", depth=3)
    del state["norm.weight"], state["norm.bias"]
    state |= {"blocks.2.attn.qkv.bias": torch.ones(5), "stray": torch.ones(2)}
    with pytest.raises(BadCheckpoint, match="stray"):
        load(state)
    again, report = load(state, "vit", partial=True, report=True)
    accounted(state, again, report)
    missing = {n for r in report.rows if r.kind == "missing" for n in r.ours}
    assert missing == {"norm.weight", "norm.bias", "stages.0.layers.2.mixer.inner.qkv.bias"}
    own, theirs = again.state_dict(), model.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own if k not in missing)
    assert torch.equal(own["norm.weight"], torch.ones(64))
    assert load(state, partial=True).recipe == again.recipe


def test_partial_needs_a_tensor():
    with pytest.raises(BadCheckpoint, match="no tensor of the state dict has a place in swin/nano"):
        load({"a.weight": torch.ones(3, 5), "b": torch.ones(7)}, "swin", partial=True)


def test_what_torch_load_gives():
    """A training checkpoint that the caller has opened: the state dict in it, beside what is none."""
    model, state = timm()
    x = model.example(2)
    with torch.no_grad():
        for held in ({"state_dict": state, "epoch": 3}, state | {"epoch": 3}, {"student": {}, "teacher": state}):
            assert torch.equal(load(held)(x), model(x))
        assert torch.equal(load({"ema": {}, "net": state}, part="net")(x), model(x))
    for none in ({0: torch.ones(2)}, {"a": 1}, {}):
        with pytest.raises(BadCheckpoint, match="the dict holds no state dict"):
            load(none)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_usual_numbers(dtype, tmp_path):
    save_file({k: t.to(dtype) for k, t in timm()[1].items()}, tmp_path / "q.safetensors")
    with pytest.raises(BadCheckpoint, match=rf"56 weights .* \({dtype}\): quantised weights are not read"):
        load(tmp_path / "q.safetensors")


def test_own_files_are_what_they_say(tmp_path):
    fm.save(timm()[0], tmp_path / "m.safetensors")
    for name in ("vit/base", "vit/none", "swin"):
        with pytest.raises(BadCheckpoint, match=f"holds vit/nano, not {name}"):
            load(tmp_path / "m.safetensors", name)
    with pytest.raises(BadCheckpoint, match="a file of ours, not of the layout 'timm'"):
        load(tmp_path / "m.safetensors", layout="timm")
    assert load(tmp_path / "m.safetensors", "vit/nano", layout="formarium").recipe["name"] == "vit/nano"


@pytest.mark.parametrize("options", [{"img_size": "big"}, {"in_chans": 0}, {"heads": "two"}])
def test_options_of_no_use(options, tmp_path):
    model, state = timm()
    fm.save(model, tmp_path / "m.safetensors")
    for source in (state, tmp_path / "m.safetensors"):
        with pytest.raises(FormariumError, match=r"make no model|no model can be made with"):
            load(source, "vit", **options)


def test_sides_that_the_caller_knows():
    """7 x 14 cells are told as no square, but fit the sides that the caller names: nothing is resized."""
    model = create_model("vit/nano", img_size=(28, 56)).eval()
    with pytest.raises(BadCheckpoint, match="another shape"):
        load(model.state_dict(), "vit")
    again, report = load(model.state_dict(), "vit", img_size=(28, 56), report=True)
    x = model.example(2)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert set(report.totals) == {"used"}


@pytest.mark.parametrize("before", ["", "roberta."])
def test_roberta_is_no_bert(before):
    """The same names and shapes, but its positions begin at 2."""
    state = {before + k.removeprefix("bert."): t for k, t in
             in_layout(create_model("bert/nano", context=130, segments=2), "transformers").items()}
    name = f"{before}embeddings.token_type_embeddings.weight"
    assert load(state, "bert").recipe["changes"]["context"] == 130
    with pytest.raises(DoesNotFit, match="RoBERTa's, which counts positions from 2"):
        load(state | {name: state[name][:1]}, "bert")
    with pytest.raises(BadCheckpoint, match=r"not recognised.* RoBERTa's"):
        load(state | {name: state[name][:1]})


def test_a_config_is_believed_or_said(tmp_path):
    """Its heads are taken, and make no rivals; where norms or GELU are others, the report says so."""
    model, state = timm(heads=2)
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, report = load(tmp_path, report=True)
    x = model.example(2)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not [n for n in report.notes if "differ" in n]
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5, "hidden_act": "relu"}))
    said = "\n".join(load(tmp_path, report=True)[1].notes)
    assert "norms is 0.5, the model has 1e-06: the answers differ" in said
    assert "activation is relu, the model has exact GELU: the answers differ" in said


# adapted

@pytest.mark.parametrize(("options", "resized"), [
    ({"num_classes": 10}, set()), ({"img_size": 56}, {"embedding.position.table"}),
    ({"in_chans": 1}, {"embedding.proj.weight"}), ({"num_classes": 0}, set()),
])
def test_adapted_on_request(options, resized, tmp_path):
    """A foreign file and one of ours; what was made to fit, what is new and what was left out is in the report."""
    model, state = timm(num_classes=1000)
    save(model, tmp_path / "ours.safetensors")
    for source, tensors in ((state, state), (tmp_path / "ours.safetensors", model.state_dict())):
        again, report = load(source, report=True, **options)
        accounted(tensors, again, report)
        assert {n for r in report.rows if r.kind == "resized" for n in r.ours} == resized
        new = {n for r in report.rows if r.kind == "missing" for n in r.ours}
        assert new == ({"head.weight", "head.bias"} if options.get("num_classes") else set())
        assert again(again.example(2)).shape[0] == 2
    with pytest.raises(DoesNotFit, match="dim"):
        load(state, dim=32, heads=4)


def test_half_precision_is_said():
    model, state = timm()
    again, report = load({k: t.half() for k, t in state.items()}, report=True)
    assert "stored as float16, loaded as float32" in report.notes
    assert again.norm.weight.dtype == torch.float32
    assert torch.allclose(again(x := model.example(2)), model(x), atol=0.05)


# the report

def test_report_in_words_and_json():
    state, _, _ = replay(GOLDEN["swin__swin_tiny_patch4_window7_224"])
    _, report = load(state, report=True)
    text = str(report)
    ours = r"stages.\{0..3\}.layers.\{0..5\}.mixer.inner.qkv.\{bias,weight\}"
    assert re.search(r"renamed 24  layers.\{0..3\}.blocks.\{0..5\}.attn.qkv.\{bias,weight\} +" + ours, text)
    assert len(text.splitlines()) < 30
    assert "2 used (1,536), 171 renamed (28,286,818)" in text
    told = json.loads(json.dumps(report.as_dict()))
    assert (told["model"], told["layout"], len(told["candidates"]) > 0) == ("swin/tiny", "timm", True)


@pytest.mark.parametrize(("names", "short"), [
    (["a.0.w", "a.1.w", "a.2.w"], "a.{0..2}.w"), (["a.1.w"], "a.1.w"), (["a.0.w", "a.4.w"], "a.{0,4}.w"),
    (["a.0.weight", "a.0.bias"], "a.0.{weight,bias}"), (["a.0", "a.1"], "a.{0..1}"), (["x"], "x"),
    (["s.0.b.0.fc1.w", "s.1.b.3.fc1.w"], "s.{0..1}.b.{0,3}.fc1.w"),
])
def test_spans(names, short):
    assert _span(names) == short


def test_kinds_of_rows():
    state = in_layout(create_model("bert/nano"), "transformers")
    _, report = load(state, report=True)
    kinds = {r.kind: r for r in report.rows}
    assert len(kinds["fused"].theirs) == 3
    assert kinds["reshaped"].theirs == ("embeddings.position_embeddings.weight",) or "reshaped" not in kinds
    untied = in_layout(create_model("gpt/small", vocab=50, context=16, depth=1, dim=64, heads=1), "transformers")
    untied["lm_head.weight"] = untied["transformer.wte.weight"].clone()
    model, report = load(untied, report=True)
    accounted(untied, model, report)


# the index

def test_collapse():
    assert collapse("blocks.11.mlp.fc1.weight") == "blocks.#.mlp.fc1.weight"
    assert collapse("Transformer/encoderblock_3/x") == "Transformer/encoderblock_#/x"


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """An index of its own, of two systems."""
    known = {n: e for n, e in registry._built_in().items() if n in ("vit", "swin")}
    monkeypatch.setattr(registry, "_built_in", lambda: known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(detection, "_memory", {})
    return tmp_path / "cache" / "formarium"


def _spied(monkeypatch):
    made, whole = [], detection._signatures
    monkeypatch.setattr(detection, "_signatures", lambda name: made.append(name) or whole(name))
    return made


def test_index_is_kept(own_cache, monkeypatch):
    made = _spied(monkeypatch)
    assert detection.index(["vit"])["vit"]["timm"]["names"]["cls_token"] == ["embedding.cls"]
    monkeypatch.setattr(detection, "_memory", {})
    assert "timm" in detection.index(["vit"])["vit"]
    assert made == ["vit"]
    next(own_cache.glob("layouts-*.json")).write_text("{broken")
    monkeypatch.setattr(detection, "_memory", {})
    assert "timm" in detection.index(["vit"])["vit"]
    assert made == ["vit", "vit"]


def test_index_in_an_unwritable_folder(own_cache):
    own_cache.parent.write_text("a file, no folder")
    assert "timm" in detection.index(["vit"])["vit"]


MINE = '''
from formarium import Card, Published
from formarium.core.spec import spec
from formarium.papers.backbones.vit import ViT

CARD = Card(
    title="Mine", kind="backbone", domain="image", year=2025, variants={{"nano": Published()}},
)


class Mine(ViT):
    def __init__(self, *, dim: int = 16, **options):
        super().__init__(dim=dim, depth=1, heads=1, patch=4, img_size=8, num_classes=2, **options)
        self.{name} = __import__("torch").nn.Linear(dim, 3)


PRESETS = {{"nano": spec(Mine)}}
'''


def test_files_of_users_join_and_stale_ones_are_seen(own_cache, tmp_path, forgets_systems):
    """Without KEYS or settings a preset's own names are enough; an edit of the file is noticed."""
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(name="special"))
    add_module(path)
    model = create_model("mine/nano")
    assert load(model.state_dict()).recipe == {"name": "mine/nano", "changes": {}}
    assert "special.weight" in detection.index(["mine"])["mine"]["formarium"]["names"]
    before = detection._stamps()
    path.write_text(MINE.format(name="other") + "\n")
    after = detection._stamps()
    assert {n for n in after if after[n] != before[n]} == {"mine"}


def test_a_broken_file_hinders_nothing(own_cache, tmp_path, forgets_systems):
    (tmp_path / "broken.py").write_text(MINE.format(name="x").replace("PRESETS = ", "PRESETS = 1 / 0 or "))
    add_module(tmp_path / "broken.py")
    _, state = timm()
    assert load(state).recipe["name"] == "vit/nano"
    with pytest.raises(ZeroDivisionError):
        load(state, "broken")


# written

@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_written_for_others(tmp_path, suffix):
    model, state = timm()
    fm.save(model, tmp_path / f"m{suffix}", layout="timm")
    path = tmp_path / f"m{suffix}"
    there = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert there.keys() == state.keys()
    again = fm.load(path)
    assert torch.equal(again(x := model.example(2)), model(x))


def test_not_written(tmp_path):
    model, _ = timm()
    file = tmp_path / "m.safetensors"
    with pytest.raises(UnknownName, match="layout of vit 'tim'; did you mean timm"):
        fm.save(model, file, layout="tim")
    with pytest.raises(UnknownName, match="unknown layout of fire 'timm'"):
        fm.save(create_model("fire/nano"), file, layout="timm")
    with pytest.raises(DoesNotFit, match=r"no name for .* tensors of this model"):
        fm.save(create_model("vit/nano", residual="denseformer"), file, layout="authors")
    with pytest.raises(DoesNotFit, match=r"does not hold this model: .* of another shape"):
        fm.save(create_model("vit/nano", mixer="attention(inner=32)"), file, layout="timm")
    with pytest.raises(DoesNotFit, match="means pool_first=True, this model has pool_first=False"):
        fm.save(create_model("poolformer/nano"), file, layout="timm")
    with pytest.raises(DoesNotFit, match=r"means residual=PreNorm\(\), this model has residual=DeepNorm\(\)"):
        fm.save(create_model("vit/nano", residual="deepnet"), file, layout="timm")  # leaves no trace in the tensors
    for layout in (None, "timm"):
        with pytest.raises(FormariumError, match="cannot be written: it is a folder"):
            fm.save(model, tmp_path, layout=layout)
        with pytest.raises(FormariumError, match=r"test_load.py.m.pth cannot be written"):
            fm.save(model, Path(__file__) / "m.pth", layout=layout)
    with pytest.raises(FormariumError, match="no recipe"):
        fm.save(torch.nn.Linear(2, 2), file, layout="timm")
    with pytest.raises(FormariumError, match="leave only= out"):
        fm.save(model, file, layout="timm", only="trained")
    assert not list(tmp_path.iterdir())


def test_transformed_models_are_written(tmp_path):
    """In the layout of the transform's paper."""
    model = fm.apply(create_model("vit/nano"), "adaptformer").eval()
    fm.save(model, tmp_path / "a.pth", layout="authors")
    again = fm.load(tmp_path / "a.pth")
    assert again.recipe["transforms"][0]["name"] == "adaptformer"
    assert torch.allclose(again(x := model.example(2)), model(x), atol=1e-5)


# the command line

def test_settings_of_transforms_that_leave_no_trace(tmp_path):
    """They are said to be assumed; the caller's word counts."""
    model = fm.apply(create_model("vit/nano").eval(), "adaptformer", scale=0.5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    fm.save(model, tmp_path / "m.pth", layout="authors")
    _, report = load(tmp_path / "m.pth", report=True)
    assert {k: report.assumed[k].value for k in ("scale", "mode")} == {"scale": 0.1, "mode": "parallel"}
    again, report = load(tmp_path / "m.pth", scale=0.5, report=True)
    assert "scale" not in report.assumed
    x = model.example(2)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-6)


def run(*args):
    return CliRunner().invoke(app, ["load", *map(str, args)])


def test_command(tmp_path):
    model, state = timm()
    source, ours, theirs = tmp_path / "what.bin", tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    torch.save({"model": {f"module.backbone.{k}": t for k, t in state.items()}, "epoch": 3}, source)
    shown = run(source, "--out", ours)
    assert shown.exit_code == 0
    assert "vit/nano (layout timm)" in shown.stdout
    assert "renamed" in shown.stdout
    x = model.example(2)
    assert torch.equal(fm.load(ours)(x), model(x))
    assert run(ours, "--as", "timm", "--out", theirs).exit_code == 0
    assert torch.load(theirs, weights_only=True).keys() == state.keys()
    told = json.loads(run(source, "--option", "num_classes=4", "--option", "img_size=56", "--json").stdout)
    assert told["options"] == {"num_classes": 4, "img_size": 56}
    ranked = json.loads(run(source, "--candidates", "--json").stdout)
    assert (ranked[0]["system"], ranked[0]["fits"]) == ("vit", "yes")
    assert "every shape fits vit/nano" in " ".join(run(source, "--candidates").stdout.split())


def test_command_refuses(tmp_path, monkeypatch, capsys):
    from formarium import cli

    (tmp_path / "text.pth").write_text("hello")
    save_file({"a.b": torch.ones(2, 2)}, tmp_path / "unknown.safetensors")
    for args, why in ((["text.pth"], "text.pth is damaged"), (["unknown.safetensors"], "resemble none"),
                      (["none.pth"], "no file"), (["text.pth", "--as", "timm"], "say where by --out")):
        monkeypatch.setattr("sys.argv", ["formarium", "load", str(tmp_path / args[0]), *args[1:]])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert why in capsys.readouterr().err


def test_parts_are_found():
    from formarium.papers.mixers.deltanet import PART
    from formarium.weights.fit import layouts_of

    part = PART(64, fm.Place()).eval()
    state = layouts_of("deltanet")["fla_layer"].convert(part.state_dict(), dict(PART.options), back=True).state
    again, report = load(state, report=True)
    accounted(state, again, report)
    x = torch.randn(2, 9, 64)
    assert torch.allclose(again(x, Ctx()), part(x, Ctx()), atol=1e-5)


@torch.no_grad()
def test_cells_that_could_be_a_square_are_not_one_if_the_caller_says_so(tmp_path):
    """7 x 28 cells: the tensors tell 196, and that the caller's shape has as many is no reason to resize."""
    torch.manual_seed(0)
    model = fm.create_model("vit/nano", img_size=(28, 112)).eval()
    fm.save(model, tmp_path / "wide.pth", layout="timm")
    again, report = fm.load(tmp_path / "wide.pth", img_size=(28, 112), report=True)
    assert not [r for r in report.rows if r.kind == "resized"]
    images = model.example(2)
    assert torch.equal(again(images), model(images))
    square, report = fm.load(tmp_path / "wide.pth", img_size=64, report=True)
    assert [r.kind for r in report.rows if "embedding.position.table" in r.ours] == ["resized"]
    assert square(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
