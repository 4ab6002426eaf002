"""Segmenters: sizes, channels, classes, semantic and panoptic maps, the criterion."""

import pytest
import torch
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.errors import DoesNotFit
from formarium.skeletons.segmenter import VOID, Segmenter, cells


def shapes(model, batch):
    map_size = cells(batch.shape[2:], model.stride)
    if model.queries is None:
        return (len(batch), model.num_classes, *map_size)
    return (len(batch), model.queries, model.num_classes + 1), (len(batch), model.queries, *map_size)


KINDS["dense"] = Kind(Segmenter, shapes, training={"supervised": True})


def truth_of(model, batch):
    """Four quarters, each a segment of its own class (as far as there are classes), and a void row and column."""
    h, w = batch.shape[2:]
    number = (torch.arange(h)[:, None] >= h // 2).long() * 2 + (torch.arange(w) >= w // 2).long()
    number[0], number[:, 0] = VOID, VOID
    truth = torch.stack((torch.where(number == VOID, VOID, number % model.num_classes), number))
    return truth.expand(len(batch), -1, -1, -1).contiguous()


@check("dense")
def other_sizes(case):
    h, w = case.build().img_size
    for size in ((h, 2 * w), (h + 5, w + 3)):
        for model in (case.build(), case.build(img_size=size)):
            batch = torch.randn(2, model.in_chans, *size)
            with torch.no_grad():
                assert model.eval().semantic(batch).shape == (2, model.num_classes, *size)
                assert model.panoptic(batch)[0].shape == (2, *size)
        assert model.example(2).shape == batch.shape


@check("dense")
def other_channels_and_classes(case):
    for channels, classes in ((1, 2), (4, 30)):
        model = case.build(in_chans=channels, num_classes=classes)
        batch = model.example(2)
        assert batch.shape[1] == channels
        assert model.eval().semantic(batch).shape[1] == classes
        with pytest.raises(DoesNotFit, match=rf"\(B, {channels}, H, W\), got \(2, {channels + 1}, .*in_chans="):
            model(torch.cat((batch, batch[:, :1]), dim=1))
    for wrong in (0, VOID):
        with pytest.raises(DoesNotFit, match=f"num_classes is 1 to {VOID - 1}, got {wrong}"):
            case.build(num_classes=wrong)
    with pytest.raises(DoesNotFit, match=r"things are classes from 0 to 4, got \(2, 5\)"):
        case.build(num_classes=5, things=(2, 5))


@check("dense")
def semantic_probabilities(case):
    model = case.build().double().eval()
    batch = model.example(2).double()
    with torch.no_grad():
        found = model.semantic(batch)
        both = model.both(batch)
        assert_close(both[0], found)
        assert torch.equal(both[1][0], model.panoptic(batch)[0])
    assert found.min() >= 0
    assert found.sum(1).max() <= 1 + 1e-9
    if model.queries is None:
        assert_close(found.sum(1), torch.ones_like(found[:, 0]))


@check("dense")
def panoptic_segments(case):
    """Segments are numbered from 1 without a gap; stuff of a class is one; with thresholds of zero some are found."""
    model = case.build(things=(1, 2), thresholds=(0.0, 0.0, 0.0, 0.0, 1.0)).eval()
    with torch.no_grad():
        segments, classes = model.panoptic(model.example(3))
    assert segments.dtype == torch.int64
    for image, own in zip(segments, classes, strict=True):
        assert set(image.unique().tolist()) - {0} <= set(range(1, len(own) + 1))
        assert image.max() >= 1
        assert all(0 <= k < model.num_classes for k in own)
        stuff = [k for k in own if k not in model.things]
        assert len(stuff) == len(set(stuff))


@check("dense")
def criterion_teaches(case):
    """A finite loss with gradients for every parameter; a few steps on one batch bring it down; void counts for nothing."""
    model = case.build().train()
    batch = model.example(4)
    truth = truth_of(model, batch)
    model.criterion(model(batch, supervised=True), truth).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.criterion(model(batch, supervised=True), truth)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    unknown = torch.full_like(truth, VOID)
    assert model.criterion(model(batch, supervised=True), unknown).isfinite()


@check("dense")
def answers_agree(case):
    """What training asks for holds the answer that is given without it."""
    model = case.build().eval()
    batch = model.example(2)
    plain = answer(model, batch)
    with torch.no_grad():
        full = model(batch, supervised=True)
    if model.queries is None:
        assert_close(full, plain)
    else:
        assert_close((full.layers[-1].classes, full.layers[-1].masks), tuple(plain))
