"""Image backbones: sizes, channels, features, classifier."""

import re

import pytest
import torch
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.errors import DoesNotFit
from formarium.parts.embed import to_map
from formarium.skeletons.backbone import Backbone

KINDS["backbone"] = Kind(Backbone, lambda model, batch: (len(batch), model.num_classes))


@check("backbone")
def classifier(case):
    model = case.build(num_classes=0)
    batch = model.example(2)
    features = answer(model, batch)
    assert features.shape == (2, model.num_features)
    model.reset_classifier(7)
    assert_close(answer(model, batch), model.head(features))
    assert model.num_classes == 7
    assert answer(model, batch).shape == (2, 7)


@check("backbone")
def other_channels(case):
    for channels in (1, 4):
        model = case.build(in_chans=channels)
        assert answer(model, model.example(2)).isfinite().all()
        for wrong in (channels + 1, 3):
            with pytest.raises(DoesNotFit, match=rf"\(B, {channels}, H, W\), got \(2, {wrong}, .*in_chans="):
                model(torch.randn(2, wrong, *model.img_size))
        with pytest.raises(DoesNotFit, match="expected images"):
            model(model.example(1)[0])


@check("backbone")
def not_square(case):
    h, w = case.build().img_size
    for size in ((h, 2 * w), (2 * h, w)):
        model = case.build(img_size=size)
        assert model.example(2).shape[2:] == size
        assert answer(model, model.example(2)).isfinite().all()
        for feature in model.features(model.example(1)):
            assert feature.map.shape[2:] == (size[0] // feature.stride, size[1] // feature.stride)


@check("backbone")
def sizes(case):
    """Either any size will do, or a wrong one is refused with the nearest right ones, when built and when run."""
    model = case.build()
    h, w = model.img_size
    odd = [(h + 1, w + 3), (h - 1, w), (2 * h - 1, 3 * w + 1)]
    if "any_size" in case.card.can:
        for size in odd:
            assert answer(model, torch.randn(2, 3, *size)).isfinite().all()
            assert answer(case.build(img_size=size), torch.randn(2, 3, *size)).isfinite().all()
        return
    for size in odd:
        with pytest.raises(DoesNotFit, match=rf"{h}x{w}, got {size[0]}x{size[1]}.*img_size="):
            model(torch.randn(2, 3, *size))
        with pytest.raises(DoesNotFit, match=r"the nearest: \d+x\d+") as refused:
            case.build(img_size=size)
        for near in re.findall(r"(\d+)x(\d+)", str(refused.value).split("the nearest:")[1]):
            near = (int(near[0]), int(near[1]))
            assert all(abs(n - s) < step for n, s, step in zip(near, size, model.embedding.step, strict=True))
            assert answer(case.build(img_size=near), torch.randn(1, 3, *near)).isfinite().all()


@check("backbone")
def features(case):
    model = case.build().eval()
    batch = model.example(2)
    maps = model.features(batch)
    assert len(maps) == len(model.feature_info)
    for feature, info in zip(maps, model.feature_info, strict=True):
        assert feature.stride == info.stride
        assert feature.map.shape == (2, info.channels, *(s // info.stride for s in model.img_size))
        assert feature.map.isfinite().all()
    assert [i.stride for i in model.feature_info] == sorted(i.stride for i in model.feature_info)
    tokens, ctx = model.encode(*model.embed(batch))
    last = maps[-1].map.flatten(2).transpose(1, 2)
    assert_close(last if model.pool_first else model.norm(last), tokens[:, ctx.prefix:])


@check("backbone")
def forward_features(case):
    model = case.build().eval()
    batch = model.example(2)
    tokens, ctx = model.forward_features(batch), model.encode(*model.embed(batch))[1]
    if type(model).pooled is Backbone.pooled:
        pooled = tokens[:, 0] if model.pool == "token" else tokens[:, ctx.prefix:].mean(1)
    else:
        pooled = model.pooled(tokens, ctx)
    assert_close(model.head(model.norm(pooled) if model.pool_first else pooled), answer(model, batch))
    final = to_map(tokens, ctx.need_grid(model, prefix=True), ctx.prefix)
    assert final.shape[1] == model.num_features == model.feature_info[-1].channels


@check("backbone")
def channels_last(case):
    model = case.build()
    batch = model.example(2)
    plain = answer(model, batch)
    out = answer(model.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last))
    assert_close(out, plain, atol=1e-5, rtol=1e-5)
