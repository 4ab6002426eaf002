"""PiT against a naive forward pass of maps; its sizes, its distilled form, and timm's and the authors' names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import DoesNotFit
from formarium.core.model import FeatureInfo, count_parameters
from formarium.papers.backbones.pit import KEYS, TokenPooling
from formarium.weights.adapt import adapt
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double()


@torch.no_grad()
def test_timm_answers():
    """Layout timm, found without a name; written in the authors' layout and read again."""
    state, inputs, golden = replay(GOLDEN / "pit__pit_ti_224.json.gz")
    model = load(state)
    assert model.recipe == {"name": "pit/tiny", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    out = model(*inputs)
    compare(golden, out)
    theirs = KEYS["authors"].convert(model.state_dict(), back=True).state
    assert "pools.0.conv.weight" in theirs
    assert torch.equal(load(theirs)(*inputs), out)


def naive(model, images):
    """As the paper has it: a map and tokens beside it, joined within each stage alone."""
    x = F.conv2d(images, model.embedding.proj.weight, model.embedding.proj.bias, model.embedding.step)
    x = x + model.embedding.position.table
    tokens = [t for t in (model.embedding.cls, model.embedding.registers) if t is not None]
    tokens = torch.cat(tokens, dim=1).expand(len(images), -1, -1)
    for stage in model.stages:
        if stage.resample is not None:
            weight, bias = stage.resample.conv.weight, stage.resample.conv.bias
            x = F.conv2d(x, weight, bias, stride=2, padding=1, groups=x.shape[1])
            tokens = tokens @ stage.resample.fc.weight.T + stage.resample.fc.bias
        (b, c, h, w), n = x.shape, tokens.shape[1]
        joined = torch.cat((tokens, x.reshape(b, c, h * w).transpose(1, 2)), dim=1)
        for layer in stage.layers:
            for sublayer in layer.values():
                joined = joined + sublayer.inner(sublayer.norm(joined), Ctx(prefix=n, grid=(h, w)))
        tokens, x = joined[:, :n], joined[:, n:].transpose(1, 2).reshape(b, c, h, w)
    tokens = model.norm(tokens)
    answers = [model.head(tokens[:, 0])] + ([model.head_dist(tokens[:, 1])] if model.distilled else [])
    return sum(answers) / len(answers)


@pytest.mark.parametrize(("size", "distilled"), [((28, 28), False), ((28, 40), False), ((36, 28), True)])
def test_naive_twin(size, distilled):
    """Forward and backward, square and not, with one token and with two."""
    torch.manual_seed(0)
    model = moved(create_model("pit/nano", img_size=size, distilled=distilled, num_classes=5)).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    inputs = [images, *model.parameters()]
    ours, theirs = model(images), naive(model, images)
    assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)]
    assert_close(*grads)


def test_space_becomes_channels():
    """Each pooling halves the map and doubles the channels."""
    with torch.device("meta"):
        model, images = create_model("pit/base"), torch.empty(1, 3, 224, 224)
    sizes = [(c, h, w) for _, c, h, w in (f.map.shape for f in model.features(images))]
    assert sizes == [(256, 31, 31), (512, 16, 16), (1024, 8, 8)]
    assert model.feature_info == [FeatureInfo(256, 7), FeatureInfo(512, 14), FeatureInfo(1024, 28)]


@pytest.mark.parametrize("size", [(28, 28), (28, 56), (60, 36)])
def test_features(size):
    """What the contract takes for size / stride is (size - patch) / stride + 1 cells, then half of them, rounded up."""
    model = create_model("pit/nano", img_size=size).eval()
    batch = model.example(2)
    maps, cells = model.features(batch), [(s - 8) // 4 + 1 for s in size]
    for feature in maps:
        assert list(feature.map.shape[2:]) == cells
        cells = [-(-c // 2) for c in cells]
    tokens, ctx = model.encode(*model.embed(batch))
    assert_close(model.norm(maps[-1].map.flatten(2).transpose(1, 2)), tokens[:, ctx.prefix:])


def test_distilled():
    """Training answers with both, evaluation with the mean; the second token and head come and go with the option alone."""
    torch.manual_seed(0)
    model = moved(create_model("pit/nano", distilled=True, num_classes=5))
    batch = model.example(2).double()
    both = model.train()(batch)
    assert [t.shape for t in both] == [(2, 5), (2, 5)]
    assert not torch.equal(*both)
    assert_close(model.eval()(batch), (both[0] + both[1]) / 2)
    model.reset_classifier(0)
    tokens = model.forward_features(batch)
    assert_close(model(batch), (tokens[:, 0] + tokens[:, 1]) / 2)
    assert_close(model.train()(batch), model.eval()(batch))
    model.reset_classifier(3)
    assert model(batch).shape == (2, 3)
    assert model.head is not model.head_dist


@pytest.mark.parametrize("layout", ["timm", "authors"])
def test_distilled_files(layout):
    torch.manual_seed(0)
    model = moved(create_model("pit/nano", distilled=True)).float().eval()
    theirs = KEYS[layout].convert(model.state_dict(), back=True).state
    assert theirs["cls_token"].shape == (1, 2, 24)
    again, batch = load(theirs), model.example(2)
    assert again.distilled
    assert torch.equal(again(batch), model(batch))
    other = load(theirs, num_classes=4, img_size=44)  # both classifiers are new, positions are resized
    assert other.eval()(other.example(2)).shape == (2, 4)


def test_positions_of_another_size():
    """A constant table stays constant, a map stays a map: rows before columns."""
    was, model = create_model("pit/nano"), create_model("pit/nano", img_size=(44, 28))
    state = was.state_dict() | {"embedding.position.table": torch.arange(6.0)[:, None].expand(1, 24, 6, 6)}
    table = adapt(state, was, model)[0]["embedding.position.table"]
    assert table.shape == (1, 24, 10, 6)
    assert_close(table, table[:, :1, :, :1].expand_as(table))
    assert (table[0, 0, 1:, 0] > table[0, 0, :-1, 0]).all()


def test_bad_inputs():
    with pytest.raises(DoesNotFit, match=r"multiples of 4x4 plus 4x4, got 30x28; the nearest: 28x28 or 32x28"):
        create_model("pit/nano", img_size=(30, 28))
    with pytest.raises(DoesNotFit, match=r"28x28, got 32x32.*img_size="):
        create_model("pit/nano")(torch.randn(1, 3, 32, 32))
    with pytest.raises(DoesNotFit, match=r"3 stages .* got 2 and 3"):
        create_model("pit/nano", depths=(1, 1))
    with pytest.raises(DoesNotFit, match="60 are no multiple of 24"):
        create_model("pit/nano", dims=(24, 60, 120))
    with pytest.raises(DoesNotFit, match="full grid"):
        TokenPooling(4, 8)(torch.randn(1, 5, 4), Ctx())
