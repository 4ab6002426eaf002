"""Series and forecasting: files and what is wrong with them, splits, windows, metrics."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import formarium as fm
import test_data
from formarium.core.errors import BadData, DoesNotFit
from formarium.data import series
from formarium.data.cache import Origin
from formarium.data.series import Series, read_csv, seventy_ten_twenty
from formarium.tasks.forecast import Forecast
from formarium.tasks.registry import get_task

HERE = Origin("Made up", "this test", "ours")
FILES = {"etth1": ("ett/ETTh1.csv",), "etth2": ("ett/ETTh2.csv",), "exchange": ("exchange_rate.csv",), "temperatures": ()}


def made(rows=200, variates=3, borders=None):
    values = np.random.default_rng(0).normal(size=(rows, variates)) * [1, 10, 0.1][:variates] + 5
    return Series(values, tuple("abc"[:variates]), borders or seventy_ten_twenty(rows), HERE)


class Last(nn.Module):
    """The forecast that nothing changes."""

    def __init__(self, horizon):
        super().__init__()
        self.horizon = horizon

    def forward(self, x):
        assert not self.training
        return x[:, -1:].expand(-1, self.horizon, -1)


@pytest.mark.parametrize("name", FILES)
def test_real_series(name):
    """A model of the domain trains on it; the standard splits and sizes."""
    test_data.real(*FILES[name])
    task = get_task(name)
    assert (task.name, task.domain) == (name, "series")
    inputs, targets = task.train_batch(0, 0, 4)
    model = fm.create_model("itransformer/nano", **task.model_options())
    task.loss(model, (inputs, targets)).backward()
    assert model(inputs).shape == targets.shape


def test_windows_of_etth1_are_the_fields():
    """12, 4, 4 months of 30 days; a test window's history may begin before the test part: 2880 - horizon + 1 windows."""
    test_data.real("ett/ETTh1.csv")
    for horizon in (96, 720):
        sizes = get_task("etth1", horizon=horizon).info.sizes
        assert sizes == {"train": 8640 - 96 - horizon + 1, "val": 2880 - horizon + 1, "test": 2880 - horizon + 1}


def test_splits_are_disjoint_and_standardised_by_training():
    task = Forecast("made", made(), context=8, horizon=4)
    train = task.values[:140]
    assert torch.allclose(train.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(train.std(0, correction=0), torch.ones(3), atol=1e-5)
    forecast = {s: {float(v) for w in task.windows(s) for v in w[8:, 0]} for s in ("train", "val", "test")}
    assert not forecast["train"] & forecast["val"]
    assert not forecast["val"] & forecast["test"]
    assert len(forecast["val"]) == 20
    assert len(forecast["test"]) == 40


def test_batches_depend_on_seed_and_step_alone():
    task = Forecast("made", made(), context=8, horizon=4)
    one, again, other = (task.train_batch(*at, 5) for at in ((0, 3), (0, 3), (1, 3)))
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])


def test_metrics_are_those_of_all_windows():
    """Against a loop over windows, with a batch that does not divide their number."""
    task = Forecast("made", made(), context=8, horizon=4)
    found = task.evaluate(Last(4), "test", batch_size=7)
    windows = task.windows("test")
    errors = torch.stack([w[7:8] - w[8:] for w in windows]).double()
    assert found["mse"] == pytest.approx(errors.square().mean().item(), rel=1e-6)
    assert found["loss"] == found["mse"]
    assert found["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-6)
    shown = task.show(Last(4))
    assert shown["variate"] == "c"
    assert shown["forecast"][0] == pytest.approx([shown["history"][0][-1]] * 4, rel=1e-5)
    assert math.isclose(shown["truth"][-1][-1], task.series.values[-1, -1], rel_tol=1e-5)


@pytest.mark.parametrize(("text", "says"), [
    ("", "is empty"),
    ("a,b\n", "no numbers|too short"),
    ("a,b\n1,2\n3\n", "row 3: 1 cells, expected 2"),
    ("a,b\n1,2\n3,x\n", "row 3: 'b' is 'x', which is no number; text cannot be forecast"),
    ("a,b\n1,2\n3,\n", "row 3: 'b' is empty; fill the gaps"),
    ("a,b\n1,2\n3,nan\n", "NaN or infinite, the first in row 2 of 'b'"),
    ("date,a\n2024-01-01,1\n2024-01-02,2\n2024-01-04,3\n2024-01-05,3\n", "leaves a gap"),
    ("date,a\n2024-01-02,1\n2024-01-01,2\n", "is not later"),
    ("date,a\n2024-01-01,1\nlater,2\n", "'later' is no date"),
    ("a,b\n" + "1,2\n" * 50, "'a', 'b' never changes in the training part"),
    ("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(50)), "too short for a context of 96 and a horizon of 96"),
])
def test_a_table_says_what_is_wrong(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadData, match=says):
        get_task(f"csv:{tmp_path / 't.csv'}")


def test_tables_are_read(tmp_path):
    """With and without names, dates and row numbers."""
    rows = [(i, math.sin(i)) for i in range(30)]
    plain = "".join(f"{a},{b!r}\n" for a, b in rows)
    dated = "date,x,y\n" + "".join(f"2024-01-01 {h:02}:00:00,{a},{b!r}\n" for h, (a, b) in enumerate(rows[:24]))
    numbered = ",x,y\n" + "".join(f"{i},{a},{b!r}\n" for i, (a, b) in enumerate(rows))
    for text, names, n in ((plain, ("column 1", "column 2"), 30), (dated, ("x", "y"), 24), (numbered, ("x", "y"), 30)):
        (tmp_path / "t.csv").write_text(text)
        values, found = read_csv(tmp_path / "t.csv")
        assert found == names
        assert values.tolist() == [list(map(float, r)) for r in rows[:n]]
    task = get_task(f"csv:{tmp_path / 't.csv'}", context=4, horizon=2)
    assert task.info.sizes == {"train": 16, "val": 2, "test": 5}


@pytest.mark.parametrize("options", [{"context": 0}, {"horizon": 0}, {"horizon": 1.5}])
def test_wrong_options(options):
    with pytest.raises(DoesNotFit, match="a number of steps, 1 or more"):
        Forecast("made", made(), **options)


def test_a_forecast_of_another_shape_is_refused():
    task = Forecast("made", made(), context=8, horizon=4)
    with pytest.raises(DoesNotFit, match=r"needs forecasts \(.*, 4, 3\)"):
        task.evaluate(Last(5), "val")


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    (tmp_path / "exchange_rate.csv").write_text("1,2\n")
    monkeypatch.setenv("FORMARIUM_DATA", str(tmp_path))
    with pytest.raises(BadData, match="is damaged or another file"):
        series.exchange()
