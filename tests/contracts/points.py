"""Sets of points: order, sizes, small and repeated sets, what is refused."""

import re

import pytest
import torch
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.errors import BadData, DoesNotFit
from formarium.skeletons.points import PointBackbone

KINDS["points"] = Kind(PointBackbone, lambda model, batch: (len(batch), model.num_classes))


@torch.no_grad()
def features_of_points(model, batch):
    return model.eval().point_features(batch)


@check("points")
def order_of_the_points(case):
    """Does not count: the answers stay, and the features go with their points."""
    model = case.build()
    batch = model.example(3)
    orders = [torch.randperm(len(points)) for points in batch]
    shuffled = [points[order] for points, order in zip(batch, orders, strict=True)]
    assert_close(answer(model, shuffled), answer(model, batch), atol=1e-5, rtol=1e-5)
    expected = [f[order] for f, order in zip(features_of_points(model, batch), orders, strict=True)]
    assert_close(features_of_points(model, shuffled), expected, atol=1e-5, rtol=1e-5)


@check("points")
def sets_of_any_size(case):
    """Of one point, of many, alone and together; the features of a set's points do not depend on the other sets."""
    model = case.build()
    many = model.example(1)[0]
    batch = [many[:n] for n in (1, len(many), 2, 37)]
    out, features = answer(model, batch), features_of_points(model, batch)
    assert out.isfinite().all()
    assert_close(out, torch.cat([answer(model, [points]) for points in batch]), atol=1e-5, rtol=1e-5)
    for points, found in zip(batch, features, strict=True):
        assert found.shape == (len(points), model.num_features)
        assert found.any()
        assert_close(found, features_of_points(model, [points])[0], atol=1e-5, rtol=1e-5)


@check("points")
def repeated_points(case):
    """Points that stand at the same place, once and all of them."""
    model = case.build()
    points = model.example(1)[0]
    batch = [torch.cat((points, points[:5])), torch.cat((points, points)), points[:1].repeat(50, 1)]
    assert answer(model, batch).isfinite().all()
    for found in features_of_points(model, batch):
        assert found.isfinite().all()
    twice = features_of_points(model, batch)[1]
    assert_close(twice[:len(points)], twice[len(points):], atol=1e-5, rtol=1e-5)


@check("points")
def positions_and_features_matter(case):
    """Every set gets its own answer, and every column of the points counts."""
    model = case.build(in_chans=2)
    points = model.example(1)[0]
    plain = answer(model, [points])
    for column in range(5):
        other = points.clone()
        other[:, column] = other[torch.randperm(len(points)), column]
        assert (answer(model, [other]) - plain).abs().max() > 1e-4, column


@check("points")
def refuses_wrong_sets(case):
    model = case.build(in_chans=1).eval()
    good = model.example(2)
    assert all(points.shape[1] == 4 for points in good)
    for wrong in (good[1][:, :3], torch.cat((good[1], good[1]), 1), good[1][0], good[1][None], good[1].long()):
        with pytest.raises(DoesNotFit, match=re.escape(f"set 1 is {tuple(wrong.shape)} {wrong.dtype}; build the model with "
                                                       "in_chans=")):
            model([good[0], wrong])
    for wrong, came in ((good[0][None], "a Tensor"), ([], "an empty list"), (tuple(good), "a tuple")):
        with pytest.raises(DoesNotFit, match=rf"expected a list of sets \(N, 4\).*got {came}; .*\[points\]"):
            model(wrong)
    with pytest.raises(BadData, match=r"set 1 of the batch is empty.*one point or more"):
        model([good[0], good[1][:0]])
    for value in (torch.nan, torch.inf):
        for column in (0, 3):
            wrong = good[1].clone()
            wrong[[3, 7], column] = value
            with pytest.raises(BadData, match=r"2 of \d+ points of set 1 have NaN or infinite values, first point 3 "):
                model([good[0], wrong])
    for options, why in (({"in_chans": -1}, "0 or more, not -1"), ({"bounds": (0, 0, 0, 1, 0, 1)}, "lowest x, y, z"),
                         ({"bounds": (0, 1)}, "lowest x, y, z"), ({"num_classes": -1}, "not -1")):
        with pytest.raises(DoesNotFit, match=why):
            case.build(**options)


@check("points")
def classifies_sets(case):
    model = case.build(num_classes=0)
    batch = model.example(2)
    features = answer(model, batch)
    assert features.shape == (2, model.num_features)
    model.reset_classifier(7)
    assert_close(answer(model, batch), model.head(features))
    assert model.num_classes == 7
    for bounds in ((0, 0, 0, 1, 1, 1), (-50, -20, -3, 50, 60, 2)):
        other = case.build(bounds=bounds, num_classes=3)
        assert answer(other, other.example(2)).isfinite().all()
