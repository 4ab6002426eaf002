"""Segmentation: reading, splits, batches, metrics against direct counts, what is shown; a model of the domain learns."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import formarium as fm
import test_data
from formarium.arena.shown import masks as shown
from formarium.core.errors import BadData, DoesNotFit, UnknownName
from formarium.data import masks
from formarium.data.cache import Origin
from formarium.data.images import mnist5k
from formarium.data.masks import CAMVID, VOID, Masks
from formarium.tasks.base import share
from formarium.tasks.registry import get_task
from formarium.tasks.segment import PanopticQuality, Segment, confusion_of, mean_iou, overlay, palette

SPLITS = ("train", "val", "test")
HERE = Origin("Made up", "this test", "ours")


@pytest.fixture(scope="module")
def scenes():
    return get_task("digit_scenes")


def made_up(sizes=(10, 3, 7), size=(16, 24), channels=3, things=(), seed=0):
    """Bright and dark rectangles: class 1 and 2 on class 0; the first row has no label."""
    random = np.random.RandomState(seed)
    pixels, truth = {}, {}
    for split, n in zip(SPLITS, sizes, strict=True):
        image, label = np.full((n, channels, *size), 128, np.uint8), np.zeros((n, 2, *size), np.uint8)
        for i in range(n):
            for number, k in enumerate((1, 2, 1), 1):
                y, x = random.randint(size[0] - 6), random.randint(size[1] - 6)
                image[i, :, y:y + 6, x:x + 6] = 255 if k == 1 else 0
                label[i, :, y:y + 6, x:x + 6] = np.array([k, number if things else k])[:, None, None]
        label[:, :, 0] = VOID
        pixels[split], truth[split] = torch.from_numpy(image), torch.from_numpy(label)
    return Masks(pixels, truth, ("floor", "light", "dark"), things, HERE)


class Known(nn.Module):
    """Answers with a fixed truth's classes (void: class 0), as if it had seen it; panoptic likewise."""

    def __init__(self, truth, k):
        super().__init__()
        self.truth, self.k = truth.long(), k

    def both(self, images):
        assert not torch.is_grad_enabled()
        truth, self.truth = self.truth.split([len(images), len(self.truth) - len(images)])
        labels = torch.where(truth[:, 0] == VOID, 0, truth[:, 0])
        return nn.functional.one_hot(labels, self.k).movedim(-1, 1).float(), self.segments(truth)

    def segments(self, truth):
        segments, classes = [], []
        for labels, numbers in truth:
            ids = [i for i in numbers.unique().tolist() if i != VOID]
            segments.append(sum(torch.where(numbers == i, n, 0) for n, i in enumerate(ids, 1)))
            classes.append([int(labels[numbers == i][0]) for i in ids])
        return torch.stack(segments), classes


# the digits on canvases

def test_scenes_are_made_of_the_digits_of_their_split(scenes):
    data, digits = scenes.data, mnist5k()
    assert scenes.info.sizes == {"train": 2000, "val": 200, "test": 500}
    assert data.things == tuple(range(1, 11))
    for split in SPLITS:
        label, number = data.truth[split].unbind(1)
        assert torch.equal(label == 0, number == 0)
        assert label.max() == 10
        assert number.max() == 5
        for image in data.truth[split][:20].long():
            for n in image[1].unique().tolist():
                inside = image[1] == n
                assert len(image[0][inside].unique()) == 1
                assert inside.sum() >= 20
    # a scene's bright pixels are its digits'
    assert ((data.pixels["train"][:, 0] > 127) >= (data.truth["train"][:, 0] > 0)).all()
    first = data.truth["test"][0, 1]
    own = first == first.max()  # the frontmost digit, which nothing hides
    cut = {s: any(torch.equal(cut_out(own), cut_out(digit[0] > 127)) for digit in digits.pixels[s]) for s in SPLITS}
    assert cut == {"train": False, "val": False, "test": True}


def cut_out(own):
    rows, columns = own.any(1).nonzero().flatten(), own.any(0).nonzero().flatten()
    return own[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


# batches

def test_batches(scenes):
    """A function of seed and step; every image once an epoch; the global random numbers are left alone."""
    state = torch.get_rng_state()
    task = Segment("made up", made_up(), flip=True)
    images, truth = task.train_batch(1, 2, 4)
    assert (images.shape, truth.shape) == ((4, 3, 16, 24), (4, 2, 16, 24))
    assert (images.dtype, truth.dtype) == (torch.float32, torch.int64)
    assert all(map(torch.equal, task.train_batch(1, 2, 4), (images, truth)))
    assert not torch.equal(task.train_batch(2, 2, 4)[0], images)
    plain = Segment("made up", made_up())
    epoch = torch.cat([plain.train_batch(3, s, 5)[1] for s in (0, 1)])
    assert sorted(t.numpy().tobytes() for t in epoch) == sorted(
        t.long().numpy().tobytes() for t in plain.data.truth["train"])
    assert torch.equal(state, torch.get_rng_state())
    half = share((images, truth), 1, 2)
    assert torch.equal(half[1], truth[1::2])
    assert scenes.train_batch(0, 0, 2)[0].shape == (2, 1, 64, 64)


def test_flips_images_and_truth_together():
    task, flipping = (Segment("made up", made_up(), flip=f) for f in (False, True))
    seen = set()
    for step in range(6):
        (a, s), (b, t) = (x.train_batch(0, step, 5) for x in (task, flipping))
        for i in range(5):
            flipped = torch.equal(a[i].flip(2), b[i]) and torch.equal(s[i].flip(2), t[i])
            assert flipped or (torch.equal(a[i], b[i]) and torch.equal(s[i], t[i]))
            seen.add(flipped)
    assert seen == {True, False}


def test_normalisation_is_fitted_on_the_training_part():
    data = made_up()
    task = Segment("made up", data)
    pixels = task.normalise(data.pixels["train"])
    assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert task.model_options() == {"num_classes": 3, "in_chans": 3, "img_size": (16, 24), "things": ()}


# metrics

def test_a_perfect_answer():
    for things in ((), (1, 2)):
        data = made_up(things=things)
        found = Segment("made up", data).evaluate(Known(data.truth["test"], 3), "test", 4)
        assert {k: round(v, 6) for k, v in found.items()} == {"loss": 0, "miou": 1, "pixel_accuracy": 1, "pq": 1}


def test_miou_against_counts():
    random = torch.Generator().manual_seed(3)
    predicted, truth = (torch.randint(4, (3, 5, 7), generator=random) for _ in range(2))
    truth[:, 0] = VOID
    truth[predicted == 3] = VOID  # class 3 is never counted as predicted
    truth[truth == 2] = 1  # class 2 is predicted and never true
    ious = []
    for k in range(4):
        hits = union = 0
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t != VOID:
                hits += p == k == t
                union += k in (p, t)
        ious += [hits / union] if union else []
    assert len(ious) in (3, 4)
    assert mean_iou(confusion_of(predicted, truth, 4)) == pytest.approx(sum(ious) / len(ious))
    assert mean_iou(torch.zeros(4, 4, dtype=torch.int64)) == 0


def panoptic_quality(images, k):
    """By sets of pixels, as the definition reads."""
    ious, matched, extra, missed = [0.0] * k, [0] * k, [0] * k, [0] * k
    for segments, classes, truth in images:
        h, w = segments.shape
        cells = [(y, x) for y in range(h) for x in range(w)]
        void = {c for c in cells if truth[1][c] == VOID}
        theirs = {}
        for c in cells:
            if c not in void:
                theirs.setdefault((int(truth[1][c]), int(truth[0][c])), set()).add(c)
        met = set()
        for n, label in enumerate(classes, 1):
            own = {c for c in cells if segments[c] == n}
            hit = [(name, pixels) for name, pixels in theirs.items() if name[1] == label
                   and len(own & pixels) / len((own | pixels) - (void - pixels)) > 0.5]
            if hit:
                (name, pixels), = hit
                met.add(name)
                matched[label] += 1
                ious[label] += len(own & pixels) / len((own - void) | pixels)
            elif own and len(own & void) <= len(own) / 2:
                extra[label] += 1
        for name in theirs.keys() - met:
            missed[name[1]] += 1
    of = [m + (e + f) / 2 for m, e, f in zip(matched, extra, missed, strict=True)]
    scores = [i / o for i, o in zip(ious, of, strict=True) if o]
    return sum(scores) / len(scores), sum(matched), sum(extra), sum(missed)


def test_panoptic_quality_against_sets():
    random = torch.Generator().manual_seed(0)
    images, quality = [], PanopticQuality(4)
    for _ in range(30):
        number = torch.randint(4, (3, 3), generator=random).repeat_interleave(3, 0).repeat_interleave(3, 1)
        truth = torch.stack((number % 3, number))
        truth[:, torch.rand(9, 9, generator=random) < 0.1] = VOID
        truth[:, :, :2] = VOID
        segments, classes = number + 1, (torch.arange(4) % 3).tolist()
        wrong = torch.rand(9, 9, generator=random) < 0.25
        segments = torch.where(wrong, torch.randint(6, (9, 9), generator=random), segments)
        classes += [3]
        images.append((segments, classes, truth))
        quality.add(*images[-1])
    expected, matched, extra, missed = panoptic_quality(images, 4)
    assert quality.result() == pytest.approx(expected)
    assert (quality.matched.sum(), quality.extra.sum(), quality.missed.sum()) == (matched, extra, missed)
    assert min(matched, extra, missed) > 5


def test_every_image_is_counted():
    data = made_up()
    task = Segment("made up", data)
    task.info.sizes["test"] += 1
    with pytest.raises(BadData, match=r"7 samples of the test split were evaluated, it has 8"):
        task.evaluate(Known(data.truth["test"], 3), "test")
    with pytest.raises(UnknownName, match="did you mean test"):
        task.evaluate(Known(data.truth["test"], 3), "tests")
    with pytest.raises(DoesNotFit, match=r"needs probabilities \(7, 3, 16, 24\); the model gave \(7, 4, 16, 24\)"):
        task.evaluate(Known(data.truth["test"], 4), "test")
    with pytest.raises(DoesNotFit, match="'dense'"):
        task.check_fits(fm.create_model("vit/nano"), "vit/nano")


# learning and showing

@pytest.mark.parametrize("name", ["kmax_deeplab/nano", "kmax_deeplab/linear"])
def test_a_model_learns(name):
    torch.manual_seed(0)
    task = Segment("made up", made_up((64, 4, 16), size=(24, 24), things=(1, 2)))
    model = fm.create_model(name, **task.model_options())
    before = task.evaluate(model, "test")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    model.train()
    for step in range(40):
        optimizer.zero_grad()
        task.loss(model, task.train_batch(0, step, 8)).backward()
        optimizer.step()
    after = task.evaluate(model, "test")
    assert after["loss"] < before["loss"]
    assert after["miou"] > max(0.6, before["miou"] + 0.2)
    assert after["pq"] > before["pq"] + 0.1
    assert model.training  # as it was before the evaluation


def test_shown(scenes):
    model = fm.create_model("kmax_deeplab/linear", **scenes.model_options())
    told = json.loads(json.dumps(scenes.show(model)))
    assert told["kind"] == "masks"
    assert len(told["images"]) == len(told["truth"]) == len(told["predicted"]) == len(told["iou"]) == 6
    assert told["classes"] == ["background", *"0123456789"]
    for png in told["truth"] + told["predicted"]:
        assert Image.open(io.BytesIO(base64.b64decode(png))).size == (64, 64)
    page = shown.draw(None, [(0, "a<b", told), (1, "other", told)])
    assert page.count("<img") == 4 * 6
    assert "a<b" not in page.replace("a&lt;b", "")
    assert re.search(r"digit|background", page)


def test_overlay():
    colours = palette(5)
    assert len({tuple(c) for c in colours.tolist()}) == 5
    pixels = torch.full((1, 2, 3), 100, dtype=torch.uint8)
    labels, numbers = torch.tensor([[0, 1, VOID], [0, 1, VOID]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    out = overlay(pixels, labels, numbers, colours, False)
    assert out.dtype == torch.uint8
    assert_close(out[:, 0, 1], (45 + 0.55 * colours[1].float()).round().to(torch.uint8))
    assert out[:, 0, 2].tolist() == [100] * 3
    assert torch.equal(overlay(pixels, labels, numbers, colours, True), out)  # the classes tell these segments apart
    labels = torch.ones_like(labels)
    drawn = overlay(pixels, labels, numbers, colours, True)
    assert (drawn == 255).all(0).tolist() == [[False, True, False]] * 2


# your own folder

def write(root, names, size=(20, 30), classes=3, mode="L"):
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for name in names:
        Image.fromarray(random.randint(256, size=(*size, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        label = random.randint(classes, size=size).astype(np.uint8)
        label[0] = VOID
        label[-1] = classes - 1
        Image.fromarray(label).convert(mode).save(root / "masks" / f"{name}.png")


def test_folder(tmp_path):
    write(tmp_path, [f"a{i}" for i in range(20)])
    task = get_task(f"masks:{tmp_path}", size=16)
    assert task.info.sizes == {"train": 16, "val": 2, "test": 2}
    assert task.data.classes == ("class 0", "class 1", "class 2")
    seen = [t.numpy().tobytes() for s in SPLITS for t in task.data.pixels[s]]
    assert len(set(seen)) == 20
    again = get_task(f"masks:{tmp_path}", size=16)
    assert all(torch.equal(task.data.truth[s], again.data.truth[s]) for s in SPLITS)
    values = set(task.data.truth["train"].unique().tolist())
    assert values <= {0, 1, 2, VOID}
    model = fm.create_model("kmax_deeplab/linear", **task.model_options())
    assert task.loss(model, task.train_batch(0, 0, 4)).isfinite()
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nrock\n")
    assert get_task(f"masks:{tmp_path}").data.classes == ("sky", "sea", "sand", "rock")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    with pytest.raises(BadData, match=r"names 2 classes, but a mask has the class 2"):
        get_task(f"masks:{tmp_path}")


def test_folder_keeps_pixels_and_labels_together(tmp_path):
    """A mask of the image's own brightness is still so after scaling and cutting."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(4):
        bright = np.zeros((32, 48), np.uint8)
        bright[:, 8 * i + 8:] = 1
        Image.fromarray(bright * 255).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(bright).save(tmp_path / "masks" / f"{i}.png")
    data = masks.folder(tmp_path, size=16)
    for split in SPLITS:
        agrees = (data.pixels[split][:, 0] > 127) == (data.truth[split][:, 0] == 1)
        assert agrees.double().mean() > 0.97


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train", [f"a{i}" for i in range(10)])
    write(tmp_path / "test", [f"b{i}" for i in range(4)])
    assert get_task(f"masks:{tmp_path}").info.sizes == {"train": 9, "val": 1, "test": 4}
    write(tmp_path / "val", [f"c{i}" for i in range(3)])
    assert get_task(f"masks:{tmp_path}").info.sizes == {"train": 10, "val": 3, "test": 4}


def test_folders_that_do_not_match(tmp_path):
    def refused(why, **options):
        with pytest.raises(BadData, match=why):
            get_task(f"masks:{tmp_path}", **options)

    refused("has no folder images/; expected images/ and masks/")
    write(tmp_path, ["a", "b"])
    refused("three images or more are needed, found 2")
    write(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "masks" / "b.png").unlink()
    refused("4 images and 3 masks; 1 of them have no partner of the same name, e.g. b")
    write(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "masks" / "b.png").rename(tmp_path / "masks" / "e.png")
    refused("4 images and 4 masks; 2 of them have no partner of the same name, e.g. b, e")
    (tmp_path / "masks" / "e.png").rename(tmp_path / "masks" / "b.png")
    Image.new("L", (10, 10)).save(tmp_path / "masks" / "b.png")
    refused(r"1 of 4 .*b.png: the image is 30x20, the mask 10x10; they must be equal")
    Image.new("RGB", (30, 20)).save(tmp_path / "masks" / "b.png")
    refused("the mask has the mode RGB; expected grey or palette pixels")
    (tmp_path / "masks" / "b.png").write_bytes(b"no picture")
    refused("cannot be read")
    write(tmp_path, ["a", "b", "c", "d"], mode="P")
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    refused("several images have the same name but for its ending")
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DoesNotFit, match="8 or more, not 3"):
        get_task(f"masks:{tmp_path}", size=3)
    for name in ("a", "b", "c", "d"):
        Image.new("L", (30, 20), VOID).save(tmp_path / "masks" / f"{name}.png")
    refused("no pixel of the training images has a class")
    (tmp_path / "train").mkdir()
    refused("has train/, but not both train/ and test/")
    with pytest.raises(BadData, match="does not exist; write masks:PATH"):
        get_task(f"masks:{tmp_path / 'nowhere'}")


def test_wrong_masks_are_refused():
    good = made_up()
    for change, why in [
            (lambda p, t: (p, t[:, :, :-1]), "expected a truth"),
            (lambda p, t: (p, t.long()), "expected uint8 pixels and truth"),
            (lambda p, t: (p[:, :2], t), "of 1 or 3 channels and one size"),
            (lambda p, t: (p, torch.where(t == 2, 7, t).to(torch.uint8)), "a pixel has the class 7, classes: 3"),
            (lambda p, t: (p, torch.stack((t[:, 0], 0 * t[:, 1]), 1)), "a class and no segment, or a segment")]:
        made = change(good.pixels["val"], good.truth["val"])
        with pytest.raises(BadData, match=why):
            Masks(good.pixels | {"val": made[0]}, good.truth | {"val": made[1]}, good.classes, (), HERE)


# CamVid

def test_camvid():
    test_data.real("camvid.zip")
    task = get_task("camvid", size=24)
    assert task.info.sizes == {"train": 367, "val": 101, "test": 233}
    assert task.model_options() == {"num_classes": 11, "in_chans": 3, "img_size": (24, 32), "things": ()}
    labels = task.data.truth["train"][:, 0]
    share_of = torch.bincount(labels.flatten().long(), minlength=256).double() / labels.numel()
    assert 0.01 < share_of[VOID] < 0.1
    assert {CAMVID[k] for k in share_of[:11].argsort(descending=True)[:3]} == {"building", "road", "sky"}
    sky = task.data.pixels["train"].movedim(1, -1)[labels == 0].double().mean()
    road = task.data.pixels["train"].movedim(1, -1)[labels == 3].double().mean()
    assert sky > road + 50


def test_camvid_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FORMARIUM_DATA", str(tmp_path))
    with pytest.raises(BadData, match=r"camvid.zip in a folder that FORMARIUM_DATA names: .*it is not downloaded"):
        get_task("camvid")
    (tmp_path / "camvid.zip").write_bytes(b"PK no archive")
    with pytest.raises(BadData, match="not a whole CamVid archive"):
        get_task("camvid")
