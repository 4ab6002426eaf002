"""ViT's options of later plain ViTs: registers, positions of the patches alone, layer scale, averaging before the norm; and
what the tensors say of them under timm's names ("timm", and "timm_gap" where the mean is normed)."""

import pytest
import torch
from torch.testing import assert_close

import formarium as fm
from formarium.core.build import create_model
from formarium.core.errors import DoesNotFit
from formarium.weights.load import load

BASE = {"dim": 128, "heads": 2, "depth": 2, "num_classes": 5}
NAMES = {"registers": "reg_token", "layer_scale": "blocks.1.ls2.gamma", "pool_first": "fc_norm.weight"}
MEAN = {"pool": "mean", "pool_first": True}


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("options", [
    {"registers": 4, "position_first": True, "layer_scale": 1e-4},  # DINOv2 with registers
    {"registers": 4},
    {"position_first": True},  # FlexiViT
    {"position_first": True, "layer_scale": 1e-4},  # DeiT III
    {**MEAN, "registers": 4, "position_first": True, "layer_scale": 1e-4},
    {**MEAN, "registers": 1, "mixer": "attention(qkv_bias=false)"},
    {**MEAN, "class_token": True},  # fine-tuned MAE
    {"pool": "mean", "registers": 4, "channel": "swiglu(ratio=3,bias=true)"},
    {**MEAN, "channel": "mlp(ratio=5.5)"},
], ids=str)
def test_told_by_the_tensors(options, tmp_path):
    """Written as timm has it and read without a word: the same answers."""
    model, x = moved(create_model("vit/nano", **BASE, **options)), torch.randn(2, 3, 28, 28)
    fm.save(model, tmp_path / "m.pth", layout="timm_gap" if "pool_first" in options else "timm")
    names = torch.load(tmp_path / "m.pth")
    assert all((name in names) == (option in options) for option, name in NAMES.items())
    again = load(tmp_path / "m.pth")
    assert_close(again(x), model(x))
    prefix = (options.get("class_token") or options.get("pool") != "mean") + options.get("registers", 0)
    assert names["pos_embed"].shape[1] == 49 + prefix * ("position_first" not in options)


def test_what_stands_before_the_patches():
    """Class token, then registers, then patches; with position_first only the patches have positions."""
    for first in (False, True):
        model = moved(create_model("vit/nano", **BASE, registers=3, position_first=first))
        e, x = model.embedding, torch.randn(1, 3, 28, 28)
        tokens, ctx = model.embed(x)
        assert (ctx.prefix, ctx.grid) == (4, (7, 7))
        patches = e.proj(x).flatten(2).mT
        before = torch.cat((e.cls, e.registers), dim=1)
        wanted = torch.cat((before, patches + e.position.table), 1) if first else (
            torch.cat((before, patches), 1) + e.position.table)
        assert_close(tokens, wanted)


def test_layer_scale_and_the_mean_before_the_norm():
    model, x = moved(create_model("vit/nano", **BASE, **MEAN, layer_scale=0.5)), torch.randn(2, 3, 28, 28)
    tokens, ctx = model.embed(x)
    for layer in model.stages[0].layers:
        for s in layer.values():
            tokens = tokens + s.scale * s.inner(s.norm(tokens), ctx)
    assert_close(model(x), model.head(model.norm(tokens.mean(1))))


def test_what_does_not_fit():
    for options in ({"pool_first": True}, {"class_token": False}):
        with pytest.raises(DoesNotFit, match="pool='token' classifies the class token: it needs one"):
            create_model("vit/nano", **options)
    with pytest.raises(DoesNotFit, match="has no form in the layout 'timm_gap': it classifies the class token"):
        fm.save(create_model("vit/nano"), "never.pth", layout="timm_gap")
