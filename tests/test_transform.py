"""Transforms as such: names, recipes, files of what is trained, the command line, training by name."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import formarium as fm
from formarium.arena.initial import take_weights
from formarium.arena.measure import peak_memory
from formarium.arena.train import build_for, train
from formarium.cli import app
from formarium.core.build import parse_call, parse_name, part, split_transforms
from formarium.core.checkpoint import save
from formarium.core.errors import BadCheckpoint, FormariumError, UnknownName
from formarium.core.macs import count_macs
from formarium.core.model import Model
from formarium.core.spec import spec
from formarium.core.transform import apply, list_transforms, size
from formarium.parts.norm import RMSNorm
from formarium.tasks.registry import get_task
from formarium.weights.files import read
from formarium.weights.load import load

TINY = "vit/nano:depth=2,dim=16,heads=2,patch=2"


# names

@pytest.mark.parametrize(("text", "name", "options"), [
    ("vit/nano+llm_int8", "vit/nano+llm_int8", {}),
    ("vit/nano:depth=2 + zero_tprune(keep=0.7, layers=(1,))+llm_int8",
     "vit/nano+zero_tprune(keep=0.7, layers=(1,))+llm_int8", {"depth": 2}),
    ("m/nano:layer_scale=1e+3,rate=2e+0+adaptformer(scale=1e+1)", "m/nano+adaptformer(scale=1e+1)",
     {"layer_scale": 1e3, "rate": 2.0}),
])
def test_parse_name(text, name, options):
    assert parse_name(text) == (name, options)
    assert parse_name(name) == (name, {})


def test_split_transforms():
    assert split_transforms("vit/nano") == ["vit/nano"]
    assert split_transforms("a/b:x=1e+5 + t(y=(1,2)) +u") == ["a/b:x=1e+5", "t(y=(1,2))", "u"]
    assert split_transforms("a+t(name=b+c)+u") == ["a", "t(name=b+c)", "u"]


def test_parse_call():
    assert parse_call("llm_int8") == ("llm_int8", {})
    assert parse_call(" t ( a=1, norm=rms_norm(eps=1e-3), c=none ) ") == (
        "t", {"a": 1, "norm": spec(RMSNorm, eps=1e-3), "c": None})
    for wrong in ("zero_tprune(keep=0.7", "zero_tprune(keep=0.7):depth=2", "llm_int8(3)"):
        with pytest.raises(FormariumError, match="cannot read"):
            parse_call(wrong)
    with pytest.raises(FormariumError, match="a parenthesis is not closed"):
        part("mixer", "attention(heads=2")


def test_options_come_before():
    with pytest.raises(UnknownName, match="unknown transform 'llm_int8:depth=2'; did you mean llm_int8"):
        fm.create_model("vit/nano+llm_int8:depth=2")
    with pytest.raises(FormariumError, match="options of the model come before the first"):
        fm.create_model("vit/nano+zero_tprune(keep=0.7):depth=2")


def test_unknown_names():
    model = fm.create_model(TINY)
    with pytest.raises(UnknownName, match="unknown transform 'zero_prune'; did you mean zero_tprune"):
        apply(model, "zero_prune")
    with pytest.raises(FormariumError, match=r"swin is no transform, its kind is 'backbone'; there are: adaptformer"):
        apply(model, "swin")
    with pytest.raises(UnknownName, match="unknown setting of llm_int8 'treshold'; did you mean threshold"):
        apply(model, "llm_int8(treshold=3)")
    with pytest.raises(UnknownName, match="unknown setting of llm_int8 'model'"):
        apply(model, "llm_int8", model=3)
    assert "transforms" not in model.recipe
    assert {"adaptformer", "llm_int8", "zero_tprune"} <= set(list_transforms()) == set(fm.list_transforms())


def test_settings_are_joined():
    model = fm.apply(fm.create_model(TINY), "adaptformer(bottleneck=3,scale=2.0)", scale=0.5)
    assert model.recipe["transforms"] == [{"name": "adaptformer", "settings": {"bottleneck": 3, "scale": 0.5}}]


def test_a_model_without_a_recipe():
    """One that was built from its class is transformed all the same."""
    model = fm.preset("vit/nano")()
    assert not hasattr(fm.apply(model, "llm_int8"), "recipe")


def test_size():
    class Tied(Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Parameter(torch.zeros(7, dtype=torch.int8), requires_grad=False)

    assert size(Tied()) == {"parameters": 22, "trainable parameters": 15, "bytes": 67}


# files

def test_only_the_head(tmp_path):
    """Without any transform: what is frozen comes from the base."""
    base = fm.create_model(TINY + ",num_classes=3").eval()
    for p in base.requires_grad_(False).head.parameters():
        p.requires_grad_()
    tuned = fm.load(_saved(base, tmp_path / "base.safetensors"))
    with torch.no_grad():
        tuned.head.weight.add_(1.0)
    tuned.requires_grad_(False).head.requires_grad_()
    save(tuned, tmp_path / "head.safetensors", only="trained")
    assert set(read(tmp_path / "head.safetensors").state) == {"head.weight", "head.bias"}
    batch = base.example(2)
    assert torch.equal(load(tmp_path / "head.safetensors", base=base)(batch), tuned(batch))
    tuned.requires_grad_(False)
    with pytest.raises(FormariumError, match="nothing in this model is trained"):
        save(tuned, tmp_path / "none.safetensors", only="trained")
    with pytest.raises(FormariumError, match="only is 'trained' or None, not 'head'"):
        save(tuned, tmp_path / "none.safetensors", only="head")


def _saved(model, path):
    save(model, path)
    return path


def test_int8_base_under_adapters(tmp_path):
    """Frozen int8 weights are made from the base again, not stored."""
    base = fm.create_model(TINY)
    model = fm.apply(fm.apply(base, "llm_int8"), "adaptformer(bottleneck=2)")
    save(model, tmp_path / "part.safetensors", only="trained")
    assert all(t.is_floating_point() for t in read(tmp_path / "part.safetensors").state.values())
    again = load(tmp_path / "part.safetensors", base=base)
    batch = base.example(2)
    assert torch.equal(again(batch), model.eval()(batch))
    with pytest.raises(BadCheckpoint, match="another base"):
        load(tmp_path / "part.safetensors", base=fm.apply(base, "zero_tprune"))


def test_a_header_that_starts_like_a_pickle(tmp_path):
    """The first byte of a safetensors file is of a length, which may be that of a pickle."""
    for size_of_text in range(256):
        model = fm.create_model("vit/nano:depth=1,dim=8,heads=1,patch=14")
        model.recipe["changes"]["num_classes"] = 1000
        model.recipe["note"] = "x" * 8 * size_of_text
        save(model, tmp_path / "m.safetensors")
        if (tmp_path / "m.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no file began with the byte")
    assert load(tmp_path / "m.safetensors").recipe["name"] == "vit/nano"


@pytest.mark.parametrize("transforms", [[3], "adaptformer", [{"name": "adaptformer"}], [{"settings": {}}]])
def test_recipes_that_are_none(tmp_path, transforms):
    model = fm.create_model(TINY)
    model.recipe["transforms"] = transforms
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(BadCheckpoint, match="its recipe is not one"):
        load(tmp_path / "m.safetensors")


# at work

def test_command_line(tmp_path):
    run, file = CliRunner(), tmp_path / "m.safetensors"
    found = run.invoke(app, ["apply", TINY, "zero_tprune(keep=0.5)", "llm_int8", "--out", str(file)])
    assert found.exit_code == 0
    assert all(w in found.output for w in ("before", "zero_tprune(keep=0.5)", "trainable parameters", "m.safetensors"))
    assert [t["name"] for t in load(file).recipe["transforms"]] == ["zero_tprune", "llm_int8"]
    found = run.invoke(app, ["apply", str(file), "adaptformer(bottleneck=3)", "--out", str(file), "--json"])
    rows = json.loads(found.output)["sizes"]
    assert list(rows) == ["before", "adaptformer(bottleneck=3)"]
    before, after = rows.values()
    assert after["parameters"] - before["parameters"] == 2 * (2 * 3 * 16 + 3 + 16)
    assert after == size(load(file))
    failed = run.invoke(app, ["apply", "swin/nano", "zero_tprune", "--out", str(tmp_path / "none.safetensors")])
    assert isinstance(failed.exception, FormariumError)
    assert not (tmp_path / "none.safetensors").exists()


def test_train_by_name(tmp_path):
    """The task's options reach the model under the transform; what is frozen stays as it began."""
    name, task = f"{TINY}+adaptformer(bottleneck=2)", get_task("digits")
    model = build_for(name, task)
    assert model.num_classes == 10
    found = train(name, "digits", out=tmp_path, steps=4, batch_size=8, evaluations=1)
    assert found["steps"] == 4
    trained = load(tmp_path / "last.safetensors")
    torch.manual_seed(0)
    begun = build_for(name, task)
    changed = {n for n, p in trained.named_parameters() if not p.equal(begun.get_parameter(n))}
    assert changed == {n for n, p in begun.named_parameters() if p.requires_grad}


def test_adapting_what_was_trained(tmp_path):
    """A run under a transform starts from a file of the model without it; its frozen weights end as they were there."""
    host = build_for(TINY, get_task("digits"))
    with torch.no_grad():
        for p in host.parameters():
            p.add_(0.1 * torch.randn_like(p))
    file = _saved(host, tmp_path / "host.safetensors")
    train(f"{TINY}+adaptformer(bottleneck=2)", "digits", out=tmp_path / "run", steps=2, batch_size=8, evaluations=1,
          init=str(file))
    trained = load(tmp_path / "run" / "last.safetensors")
    frozen = {n: p for n, p in trained.named_parameters() if not p.requires_grad}
    for name, p in frozen.items():
        assert torch.equal(p, host.get_parameter(name.replace(".channel.residual.", ".channel.")))
    assert len(frozen) == sum(not n.startswith("head.") for n, _ in host.named_parameters())
    model = build_for(f"{TINY}+llm_int8+zero_tprune(keep=0.5)", get_task("digits"))
    take_weights(model, file)
    batch, head = model.example(2), model.head.state_dict()
    host.head.load_state_dict(head)
    assert torch.equal(model.eval()(batch), apply(apply(host, "llm_int8"), "zero_tprune(keep=0.5)").eval()(batch))


def test_compare_by_name(tmp_path):
    names = [TINY, f"{TINY}+zero_tprune(keep=0.5)", f"{TINY}+llm_int8"]
    found = fm.compare(names, task="digits", steps=2, batch_size=8, evaluations=1, lrs=[1e-3], out=tmp_path / "c")
    assert {r["model"]: r["status"] for r in found.rows} == dict.fromkeys(names, "done")
    macs = {r["model"]: r["macs"] for r in found.rows}
    assert macs[names[1]] < macs[names[0]] == macs[names[2]]
    assert names[1] in found.report.read_text()


@pytest.mark.parametrize(("name", "sign"), [("llm_int8", 0), ("zero_tprune(keep=0.3)", -1), ("adaptformer", 1)])
def test_cost_is_counted(name, sign):
    """MACs and memory of a training step, as a comparison asks for them."""
    task = get_task("digits")
    model = build_for(f"{TINY}+{name}", task)
    plain = build_for(TINY, task)
    macs = [count_macs(m, m.example(1)) for m in (model, plain)]
    assert (macs[0] > macs[1]) - (macs[0] < macs[1]) == sign
    assert peak_memory(model, task, 8) > 0
