"""Specs, names, registry, key maps and checkpoints."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import formarium as fm
from formarium.core import checkpoint
from formarium.core.build import create_model, from_recipe, parse_name, part, preset
from formarium.core.card import Card, Published
from formarium.core.checkpoint import save, write_atomically
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit, FormariumError, UnknownName, unknown
from formarium.core.macs import count_macs
from formarium.core.registry import add_module, card, find, list_models, list_parts, systems
from formarium.core.spec import from_json, option_names, spec, to_json
from formarium.papers.mixers.cosformer import CosFormer
from formarium.papers.residuals.denseformer import DenseFormer
from formarium.parts.attention import Attention
from formarium.parts.channel import Mlp
from formarium.parts.norm import LayerNorm, RMSNorm
from formarium.parts.position import Rotary
from formarium.parts.residual import PreNorm
from formarium.weights.files import read
from formarium.weights.keys import FUSE, FUSE_PAIR, HWIO, LINEAR_AS_CONV, TRANSPOSE, UNSQUEEZE, count, drop, keymap, rule
from formarium.weights.load import load

# errors


def test_unknown_suggests_or_lists():
    assert str(unknown("part", "atention", ["attention", "mlp"])) == "unknown part 'atention'; did you mean attention?"
    assert str(unknown("part", "zzz", ["b", "a"])) == "unknown part 'zzz'; there are: a, b"
    assert str(unknown("part", "zzz", [])) == "unknown part 'zzz'; there are: none"
    many = [f"name{i:02}" for i in range(30)]
    assert str(unknown("part", "zzz", many)).startswith("unknown part 'zzz'; there are 30, among them name00, name01")
    assert issubclass(UnknownName, FormariumError)


# Spec

def test_spec_calls_later():
    s = spec(Mlp, ratio=2.0)
    assert s(8, Place()).fc1.out_features == 16
    assert (s.name, s["ratio"], repr(s)) == ("Mlp", 2.0, "Mlp(ratio=2.0)")
    assert s == spec(Mlp, ratio=2.0) != spec(Mlp)
    assert spec(Mlp, ratio=2.0, bias=False) == spec(Mlp, bias=False, ratio=2.0)
    assert (s.takes("bias"), s.takes("heads")) == (True, False)
    assert option_names(Mlp) == ["ratio", "bias", "approximate"]


def test_spec_names_the_nearest_option():
    for wrong in (lambda: spec(Mlp, ration=2), lambda: spec(Mlp).but(ration=2)):
        with pytest.raises(UnknownName, match="unknown option of Mlp 'ration'; did you mean ratio"):
            wrong()


def test_spec_changes():
    s = spec(Mlp, ratio=2.0)
    assert s.but(ratio=3.0, bias=False) == spec(Mlp, ratio=3.0, bias=False)
    assert s.offer(ratio=3.0, bias=False, heads=4) == spec(Mlp, ratio=2.0, bias=False)  # set and unknown options stay out
    assert s.require("it must", ratio=3.0) == spec(Mlp, ratio=3.0)
    with pytest.raises(DoesNotFit, match="Mlp does not fit here: it must be causal, and it has no option 'causal'"):
        s.require("it must be causal", causal=True)
    assert s == spec(Mlp, ratio=2.0)


@pytest.mark.parametrize("value", [
    spec(Mlp), spec(PreNorm, norm=spec(RMSNorm, eps=1e-3), drop_path=0.1), (1, (2.5, None), "x"), [1, (True,)], (), None,
    (spec(Attention, heads=2), spec(Attention, position=spec(Rotary, base=500.0))),
])
def test_spec_survives_json(value):
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_json_has_its_limits():
    with pytest.raises(TypeError, match="cannot be written into a recipe"):
        to_json({"a": 1})
    for name, why in (("os:system", "not a part of Formarium"), ("formarium.parts.attention:Nope", "has not"),
                      ("formarium.parts.nope:Mlp", "has not"), ("formarium.core.registry:re", "not a part of Formarium"),
                      ("formarium.core.build:create_model", "not a part of Formarium"),
                      ("formarium.core.build:Spec", "not a part of Formarium")):
        with pytest.raises(DoesNotFit, match=why):
            from_json({"spec": name, "options": {}})
    with pytest.raises(UnknownName, match="did you mean ratio"):
        from_json({"spec": "formarium.parts.channel:Mlp", "options": {"ration": 1}})


# names

@pytest.mark.parametrize(("text", "name", "options"), [
    ("vit", "vit", {}),
    ("vit/tiny", "vit/tiny", {}),
    ("vit/nano: depth = 2 , drop_path=1e-1", "vit/nano", {"depth": 2, "drop_path": 0.1}),
    ("vit/nano:pool=mean,shifted=true,bias=False,stem_layers=none", "vit/nano",
     {"pool": "mean", "shifted": True, "bias": False, "stem_layers": None}),
    ("m/nano:dims=(32,64),depths=(2,),stem_layers=()", "m/nano", {"dims": (32, 64), "depths": (2,), "stem_layers": ()}),
    ("gpt/nano:mixer=cosformer,residual=denseformer(dilation=4,period=5)", "gpt/nano",
     {"mixer": "cosformer", "residual": "denseformer(dilation=4,period=5)"}),
    ("m/nano:mixers=(pooling(size=5),attention)", "m/nano", {"mixers": ("pooling(size=5)", "attention")}),
    ("vit/nano:position=none", "vit/nano", {"position": "none"}),
])
def test_parse_name(text, name, options):
    assert parse_name(text) == (name, options)


def test_parse_name_says_how_to_write():
    for wrong in ("vit/nano:depth", "vit/nano:=3", "vit/nano:a b=3"):
        with pytest.raises(FormariumError, match="write NAME:option=value"):
            parse_name(wrong)


def test_parts_by_name():
    assert part("mixer", "attention") == spec(Attention)
    assert part("mixer", "cosformer") == spec(CosFormer)
    assert part("residual", "denseformer(dilation=4, norm=rms_norm(eps=1e-3))") == spec(
        DenseFormer, dilation=4, norm=spec(RMSNorm, eps=1e-3))
    assert part("mixer", "attention(heads=2,position=rotary(interleaved=true))") == spec(
        Attention, heads=2, position=spec(Rotary, interleaved=True))
    with pytest.raises(UnknownName, match="unknown mixer 'atention'; did you mean attention"):
        part("mixer", "atention")
    with pytest.raises(UnknownName, match="unknown option of Attention 'head'; did you mean heads"):
        part("mixer", "attention(head=2)")
    with pytest.raises(FormariumError, match="a parenthesis is not closed"):
        part("mixer", "attention(heads=2")
    for kind in ("mixer", "channel", "norm", "residual", "position"):
        assert list_parts(kind) == sorted(set(list_parts(kind)))
        assert all(part(kind, name).target for name in list_parts(kind))
    with pytest.raises(UnknownName, match="unknown kind of part 'mixers'; did you mean mixer"):
        list_parts("mixers")


def test_create_model():
    model = create_model("gpt/nano:mixer=cosformer,depth=3", depth=2, norm=spec(LayerNorm, eps=1e-3))
    assert len(model.stack.layers) == 2
    assert isinstance(model.stack.layers[0]["mixer"].inner, CosFormer)
    assert model.norm.eps == 1e-3
    assert model.recipe["name"] == "gpt/nano"
    again = from_recipe(json.loads(json.dumps(model.recipe)))
    assert again.recipe == model.recipe
    assert str(again) == str(model)
    assert create_model("vit", depth=1, dim=24, patch=28).recipe["name"] == "vit/nano"  # the first preset is the default


@pytest.mark.parametrize(("name", "why"), [
    ("swn/tiny", "unknown system 'swn'; did you mean swin"),
    ("swin/tinny", "unknown variant of swin 'tinny'; did you mean tiny"),
    ("swin/nano:widow=4", "unknown option of Swin 'widow'; did you mean window"),
    ("gpt/nano:mixer=atention", "unknown mixer 'atention'; did you mean attention"),
    ("", "unknown system ''"),
])
def test_unknown_names(name, why):
    with pytest.raises(UnknownName, match=why):
        create_model(name)


def test_presets_change():
    tiny = preset("swin/tiny")
    assert tiny.but(window=12)["window"] == 12
    with pytest.raises(UnknownName, match="did you mean window"):
        tiny.but(windows=12)


# registry

def test_list_models():
    everything = list_models()
    assert everything == [n for s, e in systems().items() for n in ([f"{s}/{v}" for v in e.card.variants] or [s])]
    assert list_models("swin*") == list_models("swin") == [f"swin/{v}" for v in card("swin").variants]
    assert list_models("*/nano") == [f"{s}/nano" for s, e in systems().items() if e.card.variants]
    for field, value, some, others in (("kind", "mixer", "cosformer", "vit"), ("domain", "image", "swin", "gpt"),
                                       ("tag", "host", "poolformer", "swin")):
        found = {n.split("/")[0] for n in list_models(**{field: value})}
        assert some in found
        assert others not in found
    found = {n.split("/")[0] for n in list_models(text="SHIFTED")}
    assert "swin" in found
    assert "gpt" not in found
    assert list_models("nothing") == []
    assert card("swin/tiny") is find("swin").card


def test_listing_needs_no_torch():
    code = ("import sys, formarium as fm; assert 'torch' not in sys.modules; fm.list_models(tag='host'); fm.card('swin')\n"
            "fm.list_parts('mixer'); assert 'torch' not in sys.modules; dir(fm); fm.Card\n"
            "assert not [m for m in sys.modules if m.startswith('formarium.papers.')]; assert 'torch' not in sys.modules\n"
            "fm.create_model; assert 'torch' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert set(dir(fm)) == {*fm.__all__, "__version__"}
    assert fm.create_model is create_model
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        fm.nope  # noqa: B018


MINE = '''
"""A user's own paper."""

from formarium import Card, Part, Published, spec


CARD = Card(
    title="Mine", kind="mixer", domain="image", year=2026, variants={"nano": Published(params=1e3, note="mine")},
    hosts=("vit/nano",),
)


class Mine(Part):
    def __init__(self, dim, place, *, factor=2.0):
        super().__init__(dim, place)
        self.factor = factor

    def forward(self, x, ctx):
        return self.factor * x


PART = spec(Mine)
'''


def test_add_module(tmp_path, forgets_systems):
    """A user's own part is listed, built by name, saved and loaded."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert add_module(file) == "mine"
    assert card("mine") == Card(title="Mine", kind="mixer", domain="image", year=2026, hosts=("vit/nano",),
                                variants={"nano": Published(params=1e3, note="mine")})
    assert "mine" in list_parts("mixer")
    assert "mine/nano" in list_models(kind="mixer")
    model = create_model("vit/nano:mixer=mine(factor=3.0)").eval()
    assert model.stages[0].layers[0]["mixer"].inner.factor == 3.0
    model.mine = create_model("vit/nano", mixer=part("mixer", "mine").but(factor=3.0))
    assert model.mine.recipe["changes"]["mixer"] == {"spec": "formarium_user.mine:Mine", "options": {"factor": 3.0}}
    save(model.mine, tmp_path / "m.safetensors")
    x = model.example(1)
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model.mine.eval()(x))


def test_add_module_forgets(forgets_systems):
    """The test before this one left nothing behind."""
    assert "mine" not in systems()


@pytest.mark.parametrize(("name", "text", "why"), [
    ("swin", MINE, "the name 'swin' is taken by swin.py; rename your file"),
    ("cardless", "x = 1\n", "has no 'CARD = Card"),
    ("computed", "N = 3\nCARD = Card(\n  title='x', kind='mixer', domain='image', year=N,\n)\n", "made of literals only"),
    ("misspelt", "CARD = Card(\n  titel='x', kind='mixer', domain='image', year=1,\n)\n", "made of literals only"),
])
def test_add_module_refuses(name, text, why, tmp_path, forgets_systems):
    """And leaves the registry as it was."""
    file, before = tmp_path / f"{name}.py", list_models()
    file.write_text(text)
    with pytest.raises(FormariumError, match=why):
        add_module(file)
    assert list_models() == before


def test_add_module_without_a_file(tmp_path):
    with pytest.raises(FormariumError, match=r"no file .*mine.py: --module takes the path"):
        add_module(tmp_path / "mine.py")


def test_add_module_that_fails_on_import(tmp_path, forgets_systems):
    """A second try imports it again, mended or not."""
    file = tmp_path / "mine.py"
    file.write_text(MINE + "\nraise RuntimeError('not yet')\n")
    add_module(file)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            create_model("vit/nano", mixer="mine")
    file.write_text(MINE)
    assert create_model("vit/nano", mixer="mine")


# multiply-accumulates

def test_count_macs():
    """By hand, for what counts and what does not; the model stays as it is."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear, self.norm = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Linear(8, 5), nn.BatchNorm2d(8)
            self.register_buffer("vector", torch.ones(5))

        def forward(self, x):
            tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)  # (B, 36, 8)
            attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            scores = torch.einsum("bnc,bmc->bnm", tokens, attended)
            pooled = nn.functional.avg_pool1d(scores, 2).relu().sum()
            return self.linear(attended) @ self.vector + pooled

    model, x = Net(), torch.randn(2, 3, 6, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    by_hand = 36 * 8 * 27 + 2 * 36 * 36 * 8 + 36 * 36 * 8 + 36 * 8 * 5 + 36 * 5
    assert count_macs(model, x) == 2 * by_hand
    assert count_macs(model, x[:1].to("meta")) == by_hand
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_macs_are_those_of_evaluation():
    """SNNet takes another route at each step of training; the mode is left as it was, module by module."""
    model = fm.create_model("snnet_v2/nano")
    model.anchors[0].eval()
    before = [m.training for m in model.modules()]
    counts = {count_macs(model, model.example(1)) for _ in range(8)}
    assert counts == {count_macs(model.eval(), model.example(1))}
    model.train()
    model.anchors[0].eval()
    count_macs(model, model.example(1))
    assert [m.training for m in model.modules()] == before


# key maps

def test_rules():
    """Every kind of rule, there and back."""
    keys = keymap(
        drop("index", "rebuilt"),
        rule("a.{i}.*", "x.{i}.part.*"),
        rule(("q.*", "k.*", "v.*"), "qkv.*", FUSE),
        rule(("kk", "vv"), "kv", FUSE_PAIR),
        rule("conv", "linear", LINEAR_AS_CONV), rule("table", "position", UNSQUEEZE), rule("t", "t", TRANSPOSE),
        rule("jax", "kernel", HWIO),
    )
    theirs = {"a.0.w": torch.randn(2), "a.11.w": torch.randn(3), "q.b": torch.zeros(2), "k.b": torch.ones(2),
              "v.b": torch.full((2,), 2.0), "kk": torch.zeros(1, 3), "vv": torch.ones(1, 3),
              "conv": torch.randn(2, 3, 1, 1), "table": torch.randn(4, 2), "t": torch.randn(2, 3),
              "jax": torch.randn(1, 2, 3, 4), "index": torch.arange(3), "stray": torch.ones(1)}
    there = keys.convert(theirs)
    assert set(there.state) == {"x.0.part.w", "x.11.part.w", "qkv.b", "kv", "linear", "position", "t", "kernel"}
    assert (there.ignored, there.unmatched) == ({"index": "rebuilt"}, ["stray"])
    assert there.state["qkv.b"].tolist() == [0, 0, 1, 1, 2, 2]
    assert there.state["kv"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert [tuple(there.state[k].shape) for k in ("linear", "position", "t", "kernel")] == [
        (2, 3), (1, 4, 2), (3, 2), (4, 3, 1, 2)]
    back = keys.convert(there.state, back=True)
    assert back.unmatched == []
    assert_same_state(back.state, {k: v for k, v in theirs.items() if k not in ("index", "stray")})


def test_rules_leave_what_they_cannot_take():
    keys = keymap(rule(("q.*", "k.*", "v.*"), "qkv.*", FUSE), rule("t", "t", TRANSPOSE))
    incomplete = keys.convert({"q.w": torch.ones(2), "k.w": torch.ones(2), "t": torch.ones(2, 2, 2)})
    assert sorted(incomplete.unmatched) == ["k.w", "q.w", "t"]
    assert incomplete.state == {}
    assert count({"a.0.w": 0, "a.10.w": 0, "b.3.w": 0, "a.0.v": 0}, "a.{i}.w") == 2


def assert_same_state(a, b):
    assert set(a) == set(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# system -> layout -> what makes the nano sayable in it, and what its tensors do not tell
ROTARY = {"bias": False, "position": spec(Rotary, interleaved=True)}
SAYABLE = {
    ("vit", "timm"): ({}, {"heads": 4, "channel": spec(Mlp)}),
    ("vit", "authors"): ({"channel": spec(Mlp, approximate=True)}, {"heads": 4}),
    ("swin", "timm"): ({}, {}),
    ("swin", "authors"): ({}, {}),
    ("poolformer", "timm"): ({"pool_first": True}, {}),
    ("poolformer", "authors"): ({}, {}),
    ("gpt", "transformers"): ({"channel": spec(Mlp, approximate=True)}, {"heads": 4}),
    ("denseformer", "authors"): (ROTARY, {"heads": 4, "context": 128}),
    ("cosformer", "authors"): ({"heads": 3}, {"heads": 3}),
}
LAYOUTS = list(SAYABLE)


def foreign(system, layout):
    """A model with its state in a foreign layout, and the options to load it again."""
    changes, options = SAYABLE[system, layout]
    paper = find(system).module
    if paper.KEYS[layout].makes == "part":
        model = paper.PART.but(**changes)(12, Place())
    else:
        model = create_model(f"{system}/nano", **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    converted = paper.KEYS[layout].convert(model.state_dict(), options, back=True)
    assert converted.unmatched == []
    return model.eval(), {k: v.clone() for k, v in converted.state.items()}, options


def answer(model):
    torch.manual_seed(5)
    with torch.no_grad():
        return model(model.example(2)) if hasattr(model, "example") else model(torch.randn(2, 7, model.dim), Ctx())


@pytest.mark.parametrize(("system", "layout"), LAYOUTS)
def test_layouts_there_and_back(system, layout):
    """Our state -> theirs -> ours is the same, none of theirs is named as ours by accident, and it loads: same answers."""
    model, state, options = foreign(system, layout)
    again = find(system).module.KEYS[layout].convert(state, options)
    assert again.unmatched == []
    assert_same_state(again.state, model.state_dict())
    assert len(set(state) & set(model.state_dict())) < len(state)
    for given in ({"layout": layout}, {}):  # said, and found out
        loaded = load(state, system, **given, **options)
        assert not loaded.training
        assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize(("system", "layout"), LAYOUTS)
def test_layouts_in_files(system, layout, tmp_path):
    """In safetensors, in a training checkpoint with `module.` before every name, and in NumPy's format."""
    model, state, options = foreign(system, layout)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "optimizer": {}}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **{k: v.numpy() for k, v in state.items()})
    for name in ("a.safetensors", "b.pt", "c.npz"):
        loaded = load(tmp_path / name, system, layout=layout, **options)
        assert torch.equal(answer(loaded), answer(model))


def test_every_layout_is_tested():
    """Above, with the library that has it, or in the tests of its paper, by name."""
    here = Path(__file__).parent
    with_peers = set(re.findall(r'^    "(\w+)": Peer\(', (here / "test_peers.py").read_text(), re.MULTILINE))
    there = {(s, layout) for s, e in systems().items() for layout in getattr(e.module, "KEYS", {})}
    assert set(SAYABLE) <= there
    for system, layout in there - set(SAYABLE) - {(s, "transformers") for s in with_peers}:
        assert layout in (here / "papers" / f"test_{system}.py").read_text(), (system, layout)


def test_fused_rows_stand_in_order():
    """Query, key, value: a wrong order would survive a round trip."""
    state = {f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{x}/kernel": torch.full((8, 2, 4), float(i))
             for i, x in enumerate(("query", "key", "value"))}
    fused = find("vit").module.KEYS["authors"].convert(state).state["stages.0.layers.0.mixer.inner.qkv.weight"]
    assert fused[:, 0].tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 8
    kv = find("cosformer").module.KEYS["authors"].convert(
        {"k_proj.weight": torch.zeros(2, 2), "v_proj.weight": torch.ones(2, 2)}).state["kv.weight"]
    assert kv[:, 0].tolist() == [0, 0, 1, 1]


def test_jax_heads():
    """(D, heads, d) -> rows head by head, (heads, d, D) -> columns head by head, as the released files have them."""
    kernel, out = torch.randn(8, 2, 4), torch.randn(2, 4, 8)
    there = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    state = {f"{there}/{x}/kernel": kernel for x in ("query", "key", "value")} | {f"{there}/out/kernel": out}
    ours = find("vit").module.KEYS["authors"].convert(state).state
    x = torch.randn(3, 8)
    by_head = torch.einsum("nc,chd->nhd", x, kernel)
    assert torch.allclose(x @ ours["stages.0.layers.0.mixer.inner.qkv.weight"][:8].T, by_head.flatten(1), atol=1e-6)
    joined = torch.einsum("nhd,hdc->nc", by_head, out)
    assert torch.allclose(by_head.flatten(1) @ ours["stages.0.layers.0.mixer.inner.proj.weight"].T, joined, atol=1e-5)


def test_tied_heads_in_foreign_files():
    """Files hold a tied head twice; one that differs makes the model untied."""
    model, state, options = foreign("gpt", "transformers")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    assert load(state, "gpt", **options).head is None
    assert torch.equal(answer(load(state, "gpt", **options)), answer(model))
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    untied = load(state, "gpt", **options)
    assert torch.equal(untied.head.weight, state["lm_head.weight"])


# loading what is not right

@pytest.fixture
def vit_state():
    _, state, options = foreign("vit", "timm")
    return state, options


def changed(state, key, value):
    return {k: v for k, v in state.items() if k != key} | ({} if value is None else {key: value})


@pytest.mark.parametrize(("key", "value", "why"), [
    ("norm.bias", lambda t: t * float("nan"), "holds NaN or infinity in 1 tensors, e.g. norm.bias"),
    ("blocks.1.attn.proj.weight", lambda t: t / 0, "holds NaN or infinity in 1 tensors"),
    ("blocks.1.attn.qkv.weight", lambda t: None, "1 missing: stages.0.layers.1.mixer.inner.qkv.weight"),
    ("patch_embed.proj.weight", lambda t: None, "a tensor is missing or of another shape.*embedding.proj.weight"),
    ("patch_embed.proj.weight", lambda t: t.flatten(1), "a tensor is missing or of another shape"),
    ("pos_embed", lambda t: t[0, 0, 0], "a tensor is missing or of another shape"),
    ("head.bias", lambda t: t[1:], r"1 of another shape: head.bias is \(999,\), expected \(1000,\)"),
    ("head.extra.bias", lambda t: torch.ones(3), "1 unknown: head.extra.bias"),
    ("stray", lambda t: torch.ones(3), "1 of 57 tensors have no place in its nearest layout 'timm', e.g. stray"),
])
def test_wrong_tensors(key, value, why, vit_state):
    state, options = vit_state
    with pytest.raises(BadCheckpoint, match=why):
        load(changed(state, key, value(state.get(key))), "vit", **options)


def test_foreign_files_need_the_right_name(vit_state, tmp_path):
    state, _ = vit_state
    save_file(state, tmp_path / "a.safetensors")
    for source in (state, tmp_path / "a.safetensors"):
        with pytest.raises(BadCheckpoint, match=r"not a checkpoint of swin: .* tensors have no place"):
            load(source, "swin")
    with pytest.raises(BadCheckpoint, match="vit has no layout 'jax'; there are: timm, timm_gap, authors"):
        load(state, "vit", layout="jax")
    with pytest.raises(UnknownName, match="unknown option of ViT 'hedas'; did you mean heads"):
        load(state, "vit", hedas=4)
    with pytest.raises(BadCheckpoint, match="the dict holds no state dict"):
        load({}, "vit")


def test_systems_without_foreign_files(tmp_path, forgets_systems):
    (tmp_path / "mine.py").write_text(MINE)
    add_module(tmp_path / "mine.py")
    with pytest.raises(BadCheckpoint, match="mine reads its own files only"):
        load({"a": torch.ones(1)}, "mine")


def own_file(tmp_path, **changes):
    model = create_model("swin/nano", **changes).eval()
    save(model, tmp_path / "own.safetensors")
    return model, tmp_path / "own.safetensors"


def test_own_files(tmp_path):
    """Weights and recipe; options given on loading win; another system's name is refused."""
    model, file = own_file(tmp_path, drop_path=0.1, num_classes=5)
    assert torch.equal(answer(load(file)), answer(model))
    again = load(str(file), "swin", drop_path=0.3)
    assert again.recipe["changes"] == {"drop_path": 0.3, "num_classes": 5}
    with safe_open(file, framework="pt") as f:
        assert json.loads(f.metadata()["recipe"]) == model.recipe
        assert f.metadata()["formarium"] == fm.__version__
    with pytest.raises(BadCheckpoint, match="holds swin/nano, not vit; leave the name out"):
        load(file, "vit")
    assert load(file, num_classes=6).head.weight.shape == (6, 64)
    with pytest.raises(FormariumError, match="no recipe"):
        save(nn.Linear(2, 2), tmp_path / "linear.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_damaged_files(suffix, tmp_path):
    """Truncated anywhere, empty, or a text: refused with the file's name, never a raw error."""
    state, file = {"a": torch.randn(40, 40), "b": torch.randn(7)}, tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    elif suffix == ".pt":
        torch.save(state, file)
    else:
        np.savez(file, **{k: v.numpy() for k, v in state.items()})
    whole = file.read_bytes()
    assert_same_state(read(file).state, state)
    broken = tmp_path / f"broken{suffix}"
    for part_of_it in (1, 7, len(whole) // 3, len(whole) - 9):
        broken.write_bytes(whole[:part_of_it])
        with pytest.raises(BadCheckpoint, match=f"broken{suffix} is damaged, truncated or not a checkpoint"):
            load(broken, "vit")
    broken.write_text("a model it is not, but a text that goes on for a while\n" * 20)
    with pytest.raises(BadCheckpoint, match="damaged, truncated or not a checkpoint"):
        load(broken, "vit")
    broken.write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="is empty"):
        load(broken, "vit")
    broken.unlink()
    with pytest.raises(BadCheckpoint, match="no file"):
        load(broken, "vit")


class Planted:
    """A pickle of it runs a command when read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["torch", "pickle", "npz"])
def test_code_in_a_file_does_not_run(how, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / ("a.npz" if how == "npz" else "a.pt")
    planted = {"a": torch.ones(1), "b": Planted(f"touch '{marker}'")}
    if how == "torch":
        torch.save(planted, file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps(planted, protocol=2))
    else:
        np.savez(file, b=np.array([planted["b"]], dtype=object), allow_pickle=True)
    with pytest.raises(BadCheckpoint, match=r"refused|damaged"):
        load(file, "vit")
    assert not marker.exists()
    pickle.loads(pickle.dumps(planted["b"]))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 1}}, {}])
def test_files_without_tensors(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(BadCheckpoint, match="holds no state dict"):
        load(tmp_path / "a.pt", "vit")


def test_text_arrays_are_no_tensors(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array(["x"]))
    with pytest.raises(BadCheckpoint, match="not a checkpoint"):
        load(tmp_path / "a.npz", "vit")


@pytest.mark.parametrize(("recipe", "error", "why"), [
    ("{oops", BadCheckpoint, "damaged"),
    ("[1]", BadCheckpoint, "its recipe is not one"),
    ('{"name": "swin/nano"}', BadCheckpoint, "its recipe is not one"),
    ('{"name": "swin/nano", "changes": {"mixer": {"spec": "os:system", "options": {}}}}', DoesNotFit, "not a part of"),
    ('{"name": "swan/nano", "changes": {}}', UnknownName, "did you mean swin"),
    ('{"name": "swin/nano", "changes": {"widow": 3}}', UnknownName, "did you mean window"),
    ('{"name": "vit/nano", "changes": {}}', BadCheckpoint, r"own.safetensors \(vit/nano\) does not match .* missing"),
])
def test_wrong_recipes(recipe, error, why, tmp_path):
    model, file = own_file(tmp_path)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file, {"recipe": recipe})
    with pytest.raises(error, match=why):
        load(file)


# writing

def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, file = own_file(tmp_path)
    old = file.read_bytes()

    def fails(state, name, metadata):
        with open(name, "wb") as f:
            f.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save(model, file)
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    _, file = own_file(tmp_path / "new" / "folder")
    write_atomically(tmp_path / "text", lambda name: open(name, "w").close())
    for path in (file, tmp_path / "text"):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_ctx_is_not_shared():
    """Each Ctx has a dictionary of its own, also those that `replace` makes with a new one."""
    a, b = Ctx(), Ctx()
    a.shared["x"] = 1
    assert b.shared == {}
    assert replace(a, shared={}).shared == {}
