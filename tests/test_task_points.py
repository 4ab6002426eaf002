"""Sets of points: reading, splits, batches, metrics, what is shown; a model of the domain learns."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import formarium as fm
from formarium.arena.shown import points as shown
from formarium.core.errors import BadData, DoesNotFit, UnknownName
from formarium.data.cache import Origin
from formarium.data.images import mnist5k
from formarium.data.points import RADIUS, Clouds, into_ball, mnist_points, read_cloud, relief
from formarium.tasks.base import share
from formarium.tasks.registry import get_task
from formarium.tasks.shapes import ClassifyPoints, look, turn_and_shrink

SPLITS = ("train", "val", "test")
HERE = Origin("Made up", "this test", "ours")


@pytest.fixture(scope="module")
def digits():
    return get_task("points")


def made_up(sizes=(10, 3, 7), classes=3, most=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    sets = {s: [torch.rand(int(torch.randint(1, most, (1,), generator=random)), 3, generator=random) for _ in range(n)]
            for s, n in zip(SPLITS, sizes, strict=True)}
    labels = {s: torch.randint(classes, (n,), generator=random) for s, n in zip(SPLITS, sizes, strict=True)}
    return Clouds(sets, labels, tuple("abcdefgh"[:classes]), HERE)


class Means(nn.Module):
    """Logits from the mean point."""

    def __init__(self, classes):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, classes), []

    def forward(self, sets):
        self.seen += sets
        return self.layer(torch.stack([points.mean(0) for points in sets]))


# the digits

def test_relief():
    image = np.zeros((4, 4), np.uint8)
    image[0, 3], image[2, 1] = 255, 51  # above on the right; below the middle on the left
    assert_close(relief(image), torch.tensor([[0.75, 0.75, 1.0], [-0.25, -0.25, 0.2]]))


def test_digits_are_the_images_of_mnist5k(digits):
    images = mnist5k()
    for split in SPLITS:
        assert torch.equal(digits.data.labels[split], images.labels[split])
    for i in (0, 17, 999):
        points, image = digits.data.sets["test"][i], images.pixels["test"][i][0]
        again = torch.zeros(28, 28)
        column, row = (points[:, 0] * 28 + 27) / 2, (27 - points[:, 1] * 28) / 2
        again[row.round().long(), column.round().long()] = points[:, 2] * 255
        assert_close(again, image.float())
    assert {s: len(sets) for s, sets in digits.data.sets.items()} == digits.info.sizes == {"train": 3500, "val": 500,
                                                                                         "test": 1000}
    assert len({len(points) for points in digits.data.sets["test"]}) > 50
    assert digits.data.flat


# the user's clouds

FORMS = {
    "a.xyz": "1 2 3\n4 5 6\n", "b.txt": "# a scan\n\n1,2,3,255\n4, 5, 6, 0\n", "c.xyz": "// from a tool\n1;2;3\n4;5;6",
    "d.ply": "ply\nformat ascii 1.0\ncomment made by hand\nelement material 1\nproperty int a\nelement vertex 2\n"
             "property float red\nproperty float x\nproperty float y\nproperty float z\nelement face 1\n"
             "property list uchar int vertex_indices\nend_header\n7\n9 1 2 3\n9 4 5 6\n3 0 1 1\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    assert read_cloud(tmp_path / name).tolist() == [[1, 2, 3], [4, 5, 6]]
    (tmp_path / name).write_bytes(FORMS[name].replace("\n", "\r\n").encode())
    assert read_cloud(tmp_path / name).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_arrays(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 9], [4, 5, 6, 9]], dtype))
    assert read_cloud(tmp_path / "a.npy").tolist() == [[1, 2, 3], [4, 5, 6]]


def folder(root, classes=("cube", "line"), count=12):
    random = np.random.RandomState(0)
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(count):
            points = random.rand(20 + j, 3) * ([1, 1, 1] if i == 0 else [1, 0.01, 0.01]) + 100
            np.savetxt(root / name / f"{j:02}.xyz", points)
    return root


def test_folder(tmp_path):
    task = get_task(f"clouds:{folder(tmp_path / 'scans')}", points=25)
    assert task.data.classes == ("cube", "line")
    assert task.info.sizes == {"train": 20, "val": 2, "test": 2}
    assert all(task.data.labels[s].bincount().unique().numel() == 1 for s in SPLITS)
    every = [points for s in SPLITS for points in task.data.sets[s]]
    assert len({tuple(points.flatten().tolist()) for points in every}) == 24  # no set in two splits
    assert sorted(len(points) for points in every) == sorted([*range(20, 32)] * 2)
    for points in every:
        assert points.norm(dim=1).max() == pytest.approx(RADIUS, rel=1e-5)
        assert_close(points.amax(0), -points.amin(0), atol=1e-5, rtol=0)
    assert task.augment
    assert not get_task(f"clouds:{tmp_path / 'scans'}", augment=False).augment
    again = get_task(f"clouds:{tmp_path / 'scans'}").data.sets
    assert all(torch.equal(a, b) for s in SPLITS for a, b in zip(again[s], task.data.sets[s], strict=True))
    for sets, _ in task.batches("val", 1):
        assert len(sets[0]) <= 25


def test_smallest_folder_has_every_class_in_every_split(tmp_path):
    data = get_task(f"clouds:{folder(tmp_path / 'few', count=3)}").data
    assert all(sorted(data.labels[s].tolist()) == [0, 1] for s in SPLITS)


def test_bad_folders(tmp_path):
    for path, why in ((tmp_path / "none", "does not exist; write clouds:PATH"), (tmp_path, "has 0 sub-folders")):
        with pytest.raises(BadData, match=why):
            get_task(f"clouds:{path}")
    root = folder(tmp_path / "scans", count=4)
    (root / "cube" / "00.xyz").write_text("a file")
    with pytest.raises(BadData, match="is a file; write clouds:PATH"):
        get_task(f"clouds:{root / 'cube' / '00.xyz'}")
    for i, line in enumerate(("1 2 three", "1 2", "", "1 2 nan", "1 inf 2")):
        (root / "cube" / "00.xyz").write_text(line)
        (root / "line" / "03.xyz").write_text("1 2 3" if i else "\x00")
        with pytest.raises(BadData, match=rf"{1 if i else 2} of 8 clouds cannot be read, e\.g\. cube/00\.xyz \("):
            get_task(f"clouds:{root}")
    for file in (root / "cube").iterdir():
        file.unlink()
    with pytest.raises(BadData, match=r"needs 3 clouds or more .*1 of 2 have fewer, e\.g\. cube \(0\)"):
        get_task(f"clouds:{root}")


@pytest.mark.parametrize(("content", "why"), [
    (b"solid", "no header"), (FORMS["d.ply"].replace("ascii", "binary_little_endian").encode(), "binary PLY file; save it"),
    (FORMS["d.ply"].replace("vertex 2", "vertex 9").encode(), "3 vertices, the header says 9"),
    (FORMS["d.ply"].replace("float y", "float w").encode(), "no vertices with x, y and z"),
    (FORMS["d.ply"].replace("vertex 2", "vertex 0").encode(), "no points"),
], ids=["no header", "binary", "too short", "no y", "empty"])
def test_bad_ply(tmp_path, content, why):
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(BadData, match=why):
        read_cloud(tmp_path / "a.ply")


def test_bad_arrays(tmp_path):
    for array in (np.zeros((4, 2)), np.zeros(3), np.zeros((2, 3), complex), np.zeros((0, 3))):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(BadData):
            read_cloud(tmp_path / "a.npy")


def test_into_ball():
    assert into_ball(np.ones((5, 3))).tolist() == [[0.0] * 3] * 5  # one place has no size
    points = into_ball(np.array([[0, 0, 0], [4, 0, 0], [0, 2, 0]]))
    assert_close(torch.from_numpy(points) / RADIUS, torch.tensor([[-2, -1, 0], [2, -1, 0], [-2, 1, 0]]) / 5**0.5)


def test_bad_sets():
    good = made_up()
    for change in (lambda d: d.sets["val"].clear(), lambda d: d.labels["test"].add_(8),
                   lambda d: d.sets["train"].__setitem__(1, torch.zeros(0, 3)),
                   lambda d: d.sets["train"].__setitem__(1, torch.zeros(4, 2)),
                   lambda d: d.sets["train"][2].fill_(torch.nan), lambda d: d.sets["test"][2].fill_(1.1)):
        data = made_up()
        change(data)
        with pytest.raises(BadData, match=r"^Made up, (train|val|test)"):
            Clouds(data.sets, data.labels, data.classes, HERE)
    Clouds(good.sets, good.labels, good.classes, HERE)


# the task

def test_a_batch_depends_on_seed_and_step_alone(digits):
    def same(a, b):
        return all(map(torch.equal, a[0], b[0])) and torch.equal(a[1], b[1])

    for task in (digits, ClassifyPoints("made up", made_up(sizes=(40, 3, 3)), points=4, augment=True)):
        first, state = task.train_batch(1, 5, 8), torch.get_rng_state()
        other = task.train_batch(1, 6, 8)
        assert same(first, task.train_batch(1, 5, 8))
        assert not same(first, other)
        assert not same(first, task.train_batch(2, 5, 8))
        assert torch.equal(state, torch.get_rng_state())
        assert [len(part) for part in share(first, 1, 4)] == [2, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_every_epoch_sees_each_set_once(batch_size):
    data = made_up()
    task = ClassifyPoints("made up", data)
    batches = [task.train_batch(3, step, batch_size) for step in range(math.ceil(30 / batch_size))]
    seen = [sample for batch in batches for sample in zip(*batch, strict=True)]
    numbers = [next(i for i, s in enumerate(data.sets["train"]) if torch.equal(s, points)) for points, _ in seen]
    for epoch in range(3):
        assert sorted(numbers[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert [int(label) for _, label in seen] == [int(data.labels["train"][i]) for i in numbers]


def test_larger_sets_are_thinned():
    data = made_up(sizes=(5, 5, 5), most=200)
    task = ClassifyPoints("made up", data, points=10)
    first, second = (task.train_batch(0, step, 5)[0] for step in (0, 1))
    assert all(len(points) <= 10 for points in first)
    assert not any(map(torch.equal, sorted(first, key=len), sorted(second, key=len)))
    fixed = [points for sets, _ in task.batches("test", 2) for points in sets]
    assert all(map(torch.equal, fixed, [points for sets, _ in task.batches("test", 5) for points in sets]))
    for points, whole in zip(fixed, data.sets["test"], strict=True):
        assert len(points) == min(10, len(whole))
        assert {tuple(p) for p in points.tolist()} <= {tuple(p) for p in whole.tolist()}
    for wrong in (0, 1.5, "all"):
        with pytest.raises(DoesNotFit, match="1 or more"):
            ClassifyPoints("made up", data, points=wrong)


def test_turn_and_shrink():
    points, random = torch.randn(50, 3), torch.Generator().manual_seed(0)
    scales, angles = [], []
    for _ in range(200):
        out = turn_and_shrink(points, random)
        scale = (out[:, 2] / points[:, 2]).mean()
        assert_close(out.norm(dim=1), points.norm(dim=1) * scale)
        assert_close(out[:, 2], points[:, 2] * scale)
        scales.append(scale.item())
        angles.append(math.atan2(out[0, 1], out[0, 0]) - math.atan2(points[0, 1], points[0, 0]))
    assert 0.8 <= min(scales) < 0.82
    assert 0.98 < max(scales) <= 1
    assert len({round(a % (2 * math.pi)) for a in angles}) == 7
    augmented = ClassifyPoints("made up", made_up(), augment=True)
    assert all(map(torch.equal, next(augmented.batches("test", 7))[0], made_up().sets["test"]))


@pytest.mark.parametrize("batch_size", [1, 17, 1000])
def test_metrics_agree_with_sklearn(batch_size):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    task, model = ClassifyPoints("made up", made_up(sizes=(5, 5, 93), classes=4)), Means(4)
    found = task.evaluate(model.train(), "test", batch_size)
    assert model.training
    assert len(model.seen) == 93
    with torch.no_grad():
        logits = model(task.data.sets["test"])
    truth, predicted = task.data.labels["test"].numpy(), logits.argmax(1).numpy()
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["loss"] == pytest.approx(log_loss(truth, logits.double().softmax(1).numpy(), labels=range(4)), rel=1e-5)


def test_evaluation_is_whole():
    class DropsLast(ClassifyPoints):
        def batches(self, split, batch_size):
            return iter(list(super().batches(split, batch_size))[:-1])

    with pytest.raises(BadData, match="20 samples of the test split were evaluated, it has 25"):
        DropsLast("made up", made_up(sizes=(10, 5, 25))).evaluate(Means(3), "test", 10)
    task = ClassifyPoints("made up", made_up())
    with pytest.raises(DoesNotFit, match=r"3 classes, so 7 sets need logits \(7, 3\); the model gave \(7, 5\)"):
        task.evaluate(Means(5), "test")
    with pytest.raises(UnknownName, match="test"):
        task.evaluate(Means(3), "tests")
    with pytest.raises(DoesNotFit, match="domain 'points'"):
        task.check_fits(fm.create_model("vit/nano"), "vit/nano")


def test_look():
    points = torch.tensor([[0.2, 0.4, 0.6], [0.0, -0.9, 0.0], [0.0, 0.0, 0.9]])
    assert_close(look(points, flat=True), points.clamp_min(-0.9))
    seen = look(points, flat=False)
    assert seen[2, 0] == 0  # what stands up is drawn up
    assert seen[2, 1] > 0.8
    assert seen[1, 2] > 0.5 > look(-points, flat=False)[1, 2]  # y points away


def test_shows_sets_that_can_be_drawn(digits):
    model = Means(10)
    found = digits.show(model)
    assert found["kind"] == "points"
    assert json.loads(json.dumps(found)) == found == digits.show(model)
    index = np.linspace(0, 999, 10).astype(int)
    assert found["truth"] == [digits.data.classes[digits.data.labels["test"][i]] for i in index]
    for i, drawn in zip(index, found["sets"], strict=True):
        assert len(drawn) == min(200, len(digits.data.sets["test"][i]))
        whole = {tuple(round(v, 3) for v in p) for p in digits.data.sets["test"][i].tolist()}
        assert {tuple(p) for p in drawn} <= whole
    with torch.no_grad():
        chances = model([digits.data.sets["test"][i] for i in index]).softmax(1)
    assert found["predicted"] == [str(i) for i in chances.argmax(1).tolist()]
    assert found["confidence"] == pytest.approx(chances.amax(1).tolist())


def test_drawing():
    picture = shown.cloud([[0.5, 0.25, 0.0], [-1, 1, 0.5], [0, 0.5, 1.0], [0, 0.1, 0.99]], '"7<')
    assert re.findall(r'd="([^"]+)" stroke-opacity="([\d.]+)"', picture) == [
        ("M0.50 -0.25h0", "0.3"), ("M-1.00 -1.00h0", "0.6"), ("M0.00 -0.50h0M0.00 -0.10h0", "1.0")]
    assert "&quot;7&lt;" in picture
    task = ClassifyPoints("made up", made_up())
    found = [(0, "a/b", task.show(Means(3))), (1, "c/d", task.show(Means(3)))]
    section = shown.draw(None, found)
    assert section.count("<svg viewBox=\"-1.1") == 7
    misses = 0
    for _, _, s in found:
        wrong = sum(p != t for p, t in zip(s["predicted"], s["truth"], strict=True))
        assert f"{7 - wrong} of 7" in section
        misses += wrong
    assert section.count("× ") == section.count(' miss"') == misses > 0


def test_flatformer_learns_to_tell_two_shapes(tmp_path):
    """Boxes and rods, of the user's own files, at any angle."""
    task = get_task(f"clouds:{folder(Path(tmp_path) / 'scans', count=30)}")
    model = fm.create_model("flatformer/nano", **task.model_options())
    inputs, labels = task.train_batch(0, 0, 16)
    assert task.loss(model, (inputs, labels)).item() == pytest.approx(math.log(2), abs=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(25):
        optimizer.zero_grad()
        task.loss(model, task.train_batch(0, step, 16)).backward()
        optimizer.step()
    assert task.evaluate(model, "test")["accuracy"] == 1


def test_digits_fit_the_model(digits):
    assert mnist_points().classes == digits.data.classes == tuple("0123456789")
    model = fm.create_model("flatformer/nano", **digits.model_options())
    digits.check_fits(model, "flatformer/nano")
    batch = digits.train_batch(0, 0, 4)
    loss = digits.loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(10), abs=0.5)
    features = model.point_features(batch[0])
    assert all(f.any(1).all() for f in features)  # no pixel is outside the bounds
