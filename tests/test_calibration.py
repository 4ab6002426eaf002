"""Scores of calibration and of strange images, against scikit-learn and their definitions."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from formarium.arena.calibration import (
    as_images_of,
    aupr,
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
    uncertainty,
)
from formarium.core.build import create_model
from formarium.core.errors import BadData, UnknownName
from formarium.tasks.registry import get_task


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 7), (13, 200)])
def test_areas_are_those_of_scikit_learn(n, m, ties):
    inside, outside = torch.randn(n), torch.randn(m) + 0.5
    if ties:
        inside, outside = inside.round(), outside.round()
    truth, scores = [0] * n + [1] * m, torch.cat((inside, outside)).double()
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, scores))
    assert aupr(inside, outside) == pytest.approx(average_precision_score(truth, scores))


def test_areas_at_the_ends():
    low, high = torch.tensor([0.0, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    assert (auroc(low, high), auroc(high, low), auroc(low, low)) == (1.0, 0.0, 0.5)
    assert aupr(low, high) == 1.0
    assert aupr(torch.zeros(6), torch.zeros(2)) == 0.25


def test_likelihood_is_that_of_scikit_learn():
    p, labels = torch.randn(50, 4).double().softmax(1), torch.randint(4, (50,))
    assert negative_log_likelihood(p, labels) == pytest.approx(log_loss(labels, p, labels=[0, 1, 2, 3]))
    sure = torch.tensor([[1.0, 0.0]])
    assert negative_log_likelihood(sure, torch.tensor([0])) == 0
    assert math.isfinite(negative_log_likelihood(sure, torch.tensor([1])))


def naive_ece(p, labels, bins):
    total = 0.0
    for b in range(bins):
        rows = [i for i in range(len(p)) if b / bins < p[i].max() <= (b + 1) / bins]
        if rows:
            right = sum(int(p[i].argmax() == labels[i]) for i in rows) / len(rows)
            total += len(rows) / len(p) * abs(right - sum(p[i].max().item() for i in rows) / len(rows))
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_by_its_definition(bins):
    p, labels = (2 * torch.randn(200, 5)).double().softmax(1), torch.randint(5, (200,))
    assert expected_calibration_error(p, labels, bins=bins) == pytest.approx(naive_ece(p, labels, bins))


def test_calibration_at_the_ends():
    p = torch.tensor([[0.75, 0.25]] * 4)
    assert expected_calibration_error(p, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)
    assert expected_calibration_error(p, torch.tensor([1, 1, 1, 1])) == pytest.approx(0.75)
    assert expected_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1


def test_what_is_not_scores():
    for p, n in ((torch.ones(2, 3), 2), (torch.eye(3), 2), (torch.ones(0, 3), 0)):
        with pytest.raises(BadData, match="rows that sum to 1"):
            expected_calibration_error(p, torch.zeros(n, dtype=torch.long))
    with pytest.raises(BadData, match="one or more each"):
        auroc(torch.zeros(3), torch.zeros(0))
    with pytest.raises(BadData, match="not numbers"):
        aupr(torch.zeros(3), torch.tensor([math.nan]))


def test_of_a_model_and_two_tasks():
    """Numbers of the whole split; any classifier of images; the model stays in training mode."""
    inside, outside = get_task("digits"), get_task("mnist5k")
    model = create_model("poolformer/nano", stride=2, **inside.model_options()).train()
    found = uncertainty(model, inside, outside, "val")
    assert set(found) == {"accuracy", "nll", "ece", "auroc", "aupr"}
    assert model.training
    expected = inside.evaluate(model, "val")
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["nll"] == pytest.approx(expected["loss"], rel=1e-5)
    assert set(uncertainty(model, inside)) == {"accuracy", "nll", "ece"}
    assert uncertainty(model, inside, inside, "val")["auroc"] == pytest.approx(0.5)
    by_entropy = uncertainty(model, inside, inside, "val", score="entropy")
    assert by_entropy["auroc"] == pytest.approx(0.5)
    with pytest.raises(UnknownName, match="score of uncertainty 'energy'"):
        uncertainty(model, inside, outside, score="energy")
    with pytest.raises(UnknownName, match="split 'tests'"):
        uncertainty(model, inside, outside, "tests")


def test_strange_images_take_the_shape_of_the_known():
    grey, colour = (torch.randint(256, (2, *shape), dtype=torch.uint8) for shape in ((1, 8, 8), (3, 28, 28)))
    digits = get_task("digits")
    assert torch.equal(as_images_of(digits, grey), grey)
    made = as_images_of(digits, colour)
    assert made.shape == (2, 1, 8, 8)
    assert made.dtype == torch.uint8
    assert made.float().mean().item() == pytest.approx(colour.float().mean().item(), abs=3)
