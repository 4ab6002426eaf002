"""Tasks: batches that depend on (seed, step) alone, metrics over the whole split, and what bad names say."""

import base64
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import formarium as fm
import test_data
from formarium.core.errors import BadData, DoesNotFit, UnknownName
from formarium.data.cache import Origin
from formarium.data.images import Images
from formarium.data.text import Text
from formarium.tasks import classify
from formarium.tasks.base import evaluating
from formarium.tasks.classify import Classify, crop_and_flip
from formarium.tasks.language import NextByte
from formarium.tasks.registry import TASKS, describe_tasks, get_task, list_tasks

SPLITS = ("train", "val", "test")
HERE = Origin("Made up", "this test", "ours")
HOST = {"image": "vit/nano", "language": "gpt/nano"}
KINDS = {"classify": classify.Classify, "language": NextByte}  # the others have test files of their own
FILES = {"cifar10": ("cifar10.zip",), "shakespeare": ("shakespeare/input.txt",),
         "wikitext2": ("wikitext2/valid.txt", "wikitext2/test.txt")}
_tasks = {}


@pytest.fixture(params=[n for n, e in TASKS.items() if not e.path and e.module in KINDS])
def task(request, monkeypatch):
    """Every task of these two kinds without a path, read once; downloaded ones only where FORMARIUM_DATA has them."""
    name = request.param
    test_data.real(*FILES.get(name, ()))
    if name not in _tasks:
        monkeypatch.setattr("formarium.data.images.cifar10", lambda: test_data.read_once("cifar10"))
        _tasks[name] = get_task(name)
    return _tasks[name]


def images(sizes=(10, 3, 7), classes=3, channels=1, size=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    pixels = {s: torch.randint(256, (n, channels, size, size), generator=random, dtype=torch.uint8)
              for s, n in zip(SPLITS, sizes, strict=True)}
    labels = {s: torch.randint(classes, (n,), generator=random) for s, n in zip(SPLITS, sizes, strict=True)}
    return Images(pixels, labels, tuple("abcdefgh"[:classes]), HERE)


def text(*lengths):
    random = torch.Generator().manual_seed(0)
    return Text({s: torch.randint(256, (n,), generator=random, dtype=torch.uint8)
                 for s, n in zip(SPLITS, lengths, strict=True)}, HERE)


class Linear(nn.Module):
    """Flattened images -> logits, by fixed random weights."""

    def __init__(self, task):
        super().__init__()
        o = task.model_options()
        self.layer = nn.Linear(o["in_chans"] * o["img_size"] ** 2, o["num_classes"])
        self.seen = []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append(x)
        return self.layer(x.flatten(1))


class Bigram(nn.Module):
    """Logits of the next byte from the last one alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.table(x)


# every task


def test_a_model_of_the_domain_trains_on_it_and_is_evaluated(task):
    model = fm.create_model(HOST[task.domain], **task.model_options())
    task.check_fits(model, "host")
    inputs, targets, *_ = task.train_batch(0, 0, 2)
    x = model.example(2)
    assert x.shape == inputs.shape
    assert x.dtype == inputs.dtype
    assert targets.dtype == torch.int64
    loss = task.loss(model, (inputs, targets))
    assert loss.shape == ()
    loss.backward()
    k = task.model_options().get("num_classes", 256)
    assert loss.item() == pytest.approx(math.log(k), abs=1)  # an untrained model guesses


def test_a_model_of_another_domain_does_not_fit(task):
    other = next(h for d, h in HOST.items() if d != task.domain)
    with pytest.raises(DoesNotFit, match=task.domain):
        task.check_fits(fm.create_model(other), other)


def test_train_batch_depends_on_seed_and_step_alone(task):
    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first = task.train_batch(1, 5, 16)
    state = torch.get_rng_state()
    other = task.train_batch(1, 6, 16)
    task.train_batch(2, 5, 7)
    torch.rand(3)
    assert same(first, task.train_batch(1, 5, 16))
    assert not same(first, other)
    assert not same(first, task.train_batch(2, 5, 16))
    torch.set_rng_state(state)
    task.train_batch(1, 7, 16)
    assert torch.equal(state, torch.get_rng_state())  # and it leaves the global random numbers alone


def test_info_is_whole(task):
    assert set(task.info.sizes) == set(SPLITS)
    assert min(task.info.sizes.values()) > 0
    assert task.info.title
    assert task.info.source
    assert task.info.licence
    json.dumps(vars(task.info))


def test_unknown_split(task):
    with pytest.raises(UnknownName, match="test"):
        task.evaluate(nn.Identity(), "tests")


def test_evaluating_restores_the_mode_after_an_error():
    model = nn.Linear(1, 1)
    for before in (True, False):
        model.train(before)
        with evaluating(model) as device:
            assert not model.training
            assert not torch.is_grad_enabled()
            assert device.type == "cpu"
        assert model.training is before
        with pytest.raises(RuntimeError, match="planted"), evaluating(model):
            raise RuntimeError("planted")
        assert model.training is before
    assert torch.is_grad_enabled()


# images


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, 25])
def test_every_epoch_sees_each_image_once(batch_size):
    data = images()
    data.pixels["train"][:, 0, 0, 0] = torch.arange(10)
    task = Classify("made up", data)
    steps = math.ceil(30 / batch_size)
    batches = [task.train_batch(3, s, batch_size) for s in range(steps)]
    assert {len(y) for _, y in batches} == {batch_size}
    pixels = torch.cat([x for x, _ in batches])[:, 0, 0, 0] * task.std + task.mean
    numbers = pixels.round().long()
    for epoch in range(3):
        assert sorted(numbers[10 * epoch:10 * epoch + 10].tolist()) == list(range(10))
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels["train"][numbers])
    assert not torch.equal(numbers[:10], numbers[10:20])


def test_normalisation_is_of_the_training_split_alone():
    data, other = images(channels=3), images(channels=3)
    for split in ("val", "test"):
        other.pixels[split].zero_()
    a, b = Classify("a", data), Classify("b", other)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.std, b.std)
    train = data.pixels["train"].numpy()
    np.testing.assert_allclose(a.mean, train.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(a.std, train.std((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_normalised_training_images_have_mean_0_and_deviation_1(name):
    x = torch.cat([inputs for inputs, _ in get_task(name).batches("train", 1000)]).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_one_colour_does_not_divide_by_zero():
    data = images()
    data.pixels["train"].fill_(7)
    assert Classify("flat", data).train_batch(0, 0, 4)[0].eq(0).all()


def test_crop_and_flip_is_a_crop_of_the_padded_image_and_a_flip():
    pixels = torch.randint(256, (200, 3, 9, 9), dtype=torch.uint8)
    out = crop_and_flip(pixels, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(pixels.numpy(), out.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (4, 4), (4, 4)))
        views = {(y, x, flip): padded[:, y:y + 9, x:x + 9][:, :, ::-1 if flip else 1]
                 for y in range(9) for x in range(9) for flip in (False, True)}
        matches = [k for k, v in views.items() if np.array_equal(v, after)]
        assert len(matches) == 1
        found.update(matches)
    assert [{k[i] for k in found} for i in range(3)] == [set(range(9)), set(range(9)), {False, True}]


def test_augmentation_is_for_training_only():
    data = images(sizes=(40, 40, 40))
    plain, augmented = Classify("a", data), Classify("b", data, augment=True)
    assert not torch.equal(plain.train_batch(0, 0, 8)[0], augmented.train_batch(0, 0, 8)[0])
    assert torch.equal(plain.train_batch(0, 0, 8)[1], augmented.train_batch(0, 0, 8)[1])
    torch.rand(1)
    assert torch.equal(augmented.train_batch(0, 1, 8)[0], augmented.train_batch(0, 1, 8)[0])
    for a, b in zip(plain.batches("test", 16), augmented.batches("test", 16), strict=True):
        assert torch.equal(a[0], b[0])
    assert not get_task("digits").augment
    assert get_task("digits", augment=True).augment


@pytest.mark.parametrize("batch_size", [1, 17, 1000])
def test_classify_metrics_agree_with_sklearn(batch_size):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    data = images(sizes=(50, 5, 93), classes=5)
    for split in SPLITS:
        data.labels[split][data.labels[split] == 4] = 1
    task = Classify("made up", data)
    model = Linear(task)
    with torch.no_grad():
        model.layer.bias[4] = -100  # so the last class occurs neither in truth nor among the predictions
    found = task.evaluate(model.train(), "test", batch_size)
    assert model.training
    assert sum(map(len, model.seen)) == 93
    with torch.no_grad():
        logits = model.layer(torch.cat(model.seen).flatten(1))
    truth, predicted = data.labels["test"].numpy(), logits.argmax(1).numpy()
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["loss"] == pytest.approx(log_loss(truth, logits.double().softmax(1).numpy(), labels=range(5)), rel=1e-5)


class DropsLastImages(Classify):
    def batches(self, split, batch_size):
        return iter(list(super().batches(split, batch_size))[:-1])


class DropsLastBytes(NextByte):
    def batches(self, split, batch_size):
        return iter(list(super().batches(split, batch_size))[:-1])


def test_evaluation_of_a_part_of_the_split_raises():
    task = DropsLastImages("made up", images(sizes=(10, 5, 25)))
    with pytest.raises(BadData, match="20 samples of the test split were evaluated, it has 25"):
        task.evaluate(Linear(task), "test", 10)
    task = DropsLastBytes("made up", text(30, 30, 30), context=8)
    with pytest.raises(BadData, match="24 samples of the test split were evaluated, it has 29"):
        task.evaluate(Bigram(), "test", 2)


def test_a_model_with_other_classes_does_not_fit():
    task = Classify("made up", images(classes=3))
    with pytest.raises(DoesNotFit, match=r"3 classes.*gave \(7, 5\)"):
        task.evaluate(Linear(Classify("other", images(classes=5))), "test")


@pytest.mark.parametrize(("channels", "sizes", "shown"), [(1, (10, 3, 100), 12), (3, (10, 3, 5), 5)])
def test_classify_shows_images_that_can_be_looked_at(channels, sizes, shown):
    data = images(sizes=sizes, channels=channels)
    task = Classify("made up", data)
    model = Linear(task)
    found = task.show(model)
    assert found["kind"] == "images"
    assert json.loads(json.dumps(found)) == task.show(model)
    assert len(found["images"]) == shown
    index = np.linspace(0, sizes[2] - 1, shown).astype(int)
    for i, encoded, truth in zip(index, found["images"], found["truth"], strict=True):
        array = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)), formats=["PNG"]))
        array = array[None] if channels == 1 else array.transpose(2, 0, 1)
        assert np.array_equal(array, data.pixels["test"][i])
        assert truth == data.classes[data.labels["test"][i]]
    with torch.no_grad():
        chances = model.layer(model.seen[0].flatten(1)).softmax(1)
    assert found["predicted"] == [data.classes[i] for i in chances.argmax(1)]
    assert found["confidence"] == pytest.approx(chances.amax(1).tolist())


def test_a_model_learns_the_digits():
    task = get_task("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for step in range(150):
        task.loss(model, task.train_batch(0, step, 64)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert task.evaluate(model, "test")["accuracy"] > 0.9  # a linear classifier's place on these data


# bytes


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 24, 25, 26, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_each_byte_but_the_first_is_predicted_once(length, batch_size):
    data = text(20, 20, length)
    task = NextByte("made up", data, context=8)
    batches = list(task.batches("test", batch_size))
    assert torch.equal(torch.cat([x.flatten() for x, _ in batches]), data.splits["test"][:-1].long())
    assert torch.equal(torch.cat([y.flatten() for _, y in batches]), data.splits["test"][1:].long())
    assert all(x.shape == y.shape and x.shape[1] <= 8 and x.shape[0] <= batch_size for x, y in batches)
    assert task.info.sizes["test"] == length - 1


def test_next_byte_metrics():
    data = text(20, 20, 100)
    task, model = NextByte("made up", data, context=8), Bigram()
    found = task.evaluate(model.train(), "test", 3)
    assert model.training
    ids = data.splits["test"].long()
    with torch.no_grad():
        chances = model.table(ids[:-1]).double().log_softmax(1)
    bits = -chances[torch.arange(99), ids[1:]].mean().item() / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["loss"] == pytest.approx(bits * math.log(2), rel=1e-5)
    assert found["accuracy"] == pytest.approx((chances.argmax(1) == ids[1:]).double().mean().item())
    nn.init.zeros_(model.table.weight)
    assert task.evaluate(model, "val")["bits_per_byte"] == pytest.approx(8)


def test_training_windows_are_of_the_training_split_and_reach_both_ends():
    train = torch.arange(100, dtype=torch.uint8)
    other = torch.full((20,), 200, dtype=torch.uint8)
    task = NextByte("made up", Text({"train": train, "val": other, "test": other}, HERE), context=8)
    x, y, before = task.train_batch(0, 0, 4000)
    assert x.shape == y.shape == before.shape == (4000, 8)
    assert torch.equal(torch.cat((before, x), dim=1), (x[:, :1] + torch.arange(-8, 8)) % 100)  # the text is a ring there
    assert torch.equal(x + 1, y)
    assert torch.equal(x[:, :-1], y[:, 1:] - 2)
    assert x.min() == 0
    assert y.max() == 99


@pytest.mark.parametrize("lengths", [(8, 20, 20), (20, 8, 20), (20, 20, 8), (20, 20, 0)])
def test_a_text_too_short_for_the_context(lengths):
    NextByte("made up", text(9, 9, 9), context=8)
    train, val, test = lengths
    with pytest.raises(BadData, match=f"needs 9 bytes, there are {train} in train, {val} in val, {test} in test"):
        NextByte("made up", text(*lengths), context=8)


@pytest.mark.parametrize("context", [0, -1, 2.5, "128"])
def test_context_is_a_number_of_bytes(context):
    with pytest.raises(DoesNotFit, match="context is a number of bytes"):
        NextByte("made up", text(20, 20, 20), context=context)


def test_next_byte_shows_text_that_goes_on_from_the_test_split():
    task = NextByte("made up", text(200, 200, 200), context=32)
    model = fm.create_model("gpt/nano", depth=1, dim=16, heads=1, **task.model_options())
    found = task.show(model.train())
    assert model.training
    assert found["kind"] == "text"
    assert found["prompt"] == bytes(task.text.splits["test"][:32].tolist()).decode(errors="replace")
    torch.rand(5)
    assert task.show(model) == found == json.loads(json.dumps(found))
    assert 0 < len(found["text"]) <= 300


def test_next_byte_sample_has_300_bytes():
    task = NextByte("made up", text(200, 200, 200), context=32)

    class Letters(nn.Module):
        def generate(self, prompt, tokens, *, temperature, top_k, generator):
            assert (temperature, top_k) == (0.8, 40)
            return torch.cat([prompt, torch.randint(97, 123, (1, tokens), generator=generator)], 1)

    found = task.show(Letters())["text"]
    assert len(found) == 300
    assert found.isalpha()


# names


def test_listing_needs_no_torch():
    code = ("import sys; from formarium.tasks.registry import list_tasks, describe_tasks; list_tasks(); describe_tasks(); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tasks_are_listed_as_they_are_written():
    assert len(describe_tasks()) == len(list_tasks())
    assert [n.partition(":")[0] for n in describe_tasks()] == list_tasks()
    assert {n for n in describe_tasks() if ":" in n} == {f"{n}:PATH" for n, e in TASKS.items() if e.path and not e.pathless}
    assert fm.get_task("digits").name in fm.list_tasks()


def test_get_task_with_a_path(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    task = get_task(f"text:{tmp_path / 'a.txt'}", context=16)
    assert task.model_options() == {"vocab": 256, "context": 16}
    assert task.name == f"text:{tmp_path / 'a.txt'}"
    for c, colour in (("cat", 0), ("dog", 90)):
        (tmp_path / c).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (colour, i, 0)).save(tmp_path / c / f"{i}.png")
    task = get_task(f"imagefolder:{tmp_path}", size=12)
    assert task.model_options() == {"num_classes": 2, "in_chans": 3, "img_size": 12}
    assert task.augment
    assert not get_task(f"imagefolder:{tmp_path}", augment=False).augment


@pytest.mark.parametrize(("name", "options", "error", "says"), [
    ("mnist", {}, UnknownName, "did you mean mnist5k"),
    ("cifar", {}, UnknownName, "cifar10"),
    ("", {}, UnknownName, "unknown task"),
    ("digits", {"augmented": True}, UnknownName, "did you mean augment"),
    ("stdlib", {"contex": 3}, UnknownName, "did you mean context"),
    ("stdlib", {"context": 0}, DoesNotFit, "context"),
    ("imagefolder", {}, BadData, "write imagefolder:PATH"),
    ("imagefolder:", {}, BadData, "write imagefolder:PATH"),
    ("text: ", {}, BadData, "write text:PATH"),
    ("text:no/such/file", {}, BadData, "no/such/file does not exist"),
    ("imagefolder:no/such/folder", {}, BadData, "no/such/folder does not exist"),
    ("digits:here", {}, BadData, "takes no path"),
])
def test_get_task_says_what_is_wrong(name, options, error, says):
    with pytest.raises(error, match=says):
        get_task(name, **options)


def test_every_entry_makes_the_task_of_its_name(task):
    assert task.name in TASKS
    entry = TASKS[task.name]
    assert task.domain == entry.domain
    assert isinstance(task, KINDS[entry.module])
