"""timm's layout, as recorded by golden_timm.py: our files have its names and shapes, and its state dicts are recognised."""

import gzip
import json

import pytest
import torch

from formarium.core.build import create_model
from formarium.core.registry import systems
from formarium.weights.detect import detect
from golden_timm import FACTS, OURS, READ, TWO_SYSTEMS, in_their_names

RECORDED = json.loads(gzip.decompress(FACTS.read_bytes()))


def test_every_model_is_recorded():
    """And all presets but our own small ones and PoolFormer's control, which timm has not."""
    assert list(RECORDED["models"]) == list(OURS)
    assert list(RECORDED["reads_our_file"]) == list(READ)
    wanted = {f"{s}/{v}" for s in ("vit", "swin", "poolformer") for v in systems()[s].card.variants}
    assert wanted - {name for name, _ in OURS.values()} == {"vit/nano", "swin/nano", "poolformer/nano", "poolformer/id_s12"}


@pytest.mark.parametrize("theirs", READ)
def test_timm_reads_our_file(theirs):
    """Strictly, and answers the same."""
    assert RECORDED["reads_our_file"][theirs] < 1e-5


@pytest.mark.parametrize("theirs", OURS)
def test_names_and_shapes(theirs):
    """Equal, no tensor exempt; and from theirs alone it is told which model it is."""
    name, changes = OURS[theirs]
    with torch.device("meta"):
        model = create_model(name, **changes)
        state = {k: torch.empty(shape) for k, shape in RECORDED["models"][theirs].items()}
    written = in_their_names(name, model)
    assert {k: list(v.shape) for k, v in written.items()} == RECORDED["models"][theirs]
    best, *others = detect(state)
    if theirs in TWO_SYSTEMS:  # a name must say which
        assert {best.system, others[0].system} == {name.split("/")[0], TWO_SYSTEMS[theirs]}
        best = next(found for found in (best, *others) if found.system == name.split("/")[0])
    assert (best.system, best.layout, best.fit.error) == (name.split("/")[0], "timm", None)
    assert (best.fit.plan.name, best.fit.plan.changes) == (name, changes)
