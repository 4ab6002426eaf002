"""Our answers against the references', on the same re-made weights (golden_replay.py)."""

from pathlib import Path

import pytest
import torch

from formarium.core.ctx import Ctx
from formarium.core.model import count_parameters
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).with_name("golden")
MODELS = {  # file -> system, options that the tensors cannot tell
    "vit__vit_tiny_patch16_224": ("vit", {}),
    "vit__vit_tiny_r_s16_p8_224": ("vit", {}),
    "swin__swin_tiny_patch4_window7_224": ("swin", {}),
    "poolformer__poolformer_s12": ("poolformer", {}),
    "denseformer__l6_d192_dil1": ("denseformer", {"context": 64}),
}
ELSEWHERE = {"cosformer__attention_d128_h8", "denseformer__dwa_n7_dil2_period1"}  # below, and in test_parts.py


def test_every_file_is_used():
    """Here, or by name in the tests of its paper."""
    for name in {p.name.removesuffix(".json.gz") for p in GOLDEN.iterdir()} - {*MODELS, *ELSEWHERE}:
        system, variant = name.split("__")
        assert variant in (GOLDEN.parent / "papers" / f"test_{system}.py").read_text(), name


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(name):
    state, inputs, golden = replay(GOLDEN / f"{name}.json.gz")
    system, options = MODELS[name]
    model = load(state, system, **options)
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))


@torch.no_grad()
def test_cosformer():
    """Bidirectional, then causal, with the same weights."""
    state, (x,), golden = replay(GOLDEN / "cosformer__attention_d128_h8.json.gz")
    both, causal = (load(state, "cosformer", heads=8, causal=c) for c in (False, True))
    assert count_parameters(both) == golden["parameters"]
    compare(golden, (both(x, Ctx()), causal(x, Ctx())))


@torch.no_grad()
def test_a_wrong_model_is_noticed():
    """The comparison fails where a detail is off: here the positions' layout, and a transposed weight."""
    state, inputs, golden = replay(GOLDEN / "denseformer__l6_d192_dil1.json.gz")
    model = load(state, "denseformer", context=64)
    model.stack.layers[0].mixer.inner.position.interleaved = False
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, model(*inputs))
    state["transformer.h.3.0.attn.c_proj.weight"] = state["transformer.h.3.0.attn.c_proj.weight"].T
    with pytest.raises(AssertionError, match="differs by"):
        compare(golden, load(state, "denseformer", context=64)(*inputs))
