"""Augmentation of labelled images, and named recipes: nothing where off, a function of (seed, step) where on."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.arena.compare import compare
from formarium.arena.config import RECIPES, RunConfig, checked
from formarium.arena.train import Run, train
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.tasks.augment import OPERATIONS, Augmentation, erase, mix, rand_augment
from formarium.tasks.base import generator, order
from formarium.tasks.classify import digits
from formarium.weights.load import load

ALL = {k: v for k, v in RECIPES["deit"].items() if k in Augmentation.__dataclass_fields__}
MODEL = "vit/nano:patch=2,dim=16,depth=2,heads=2"
RUN = {"task": "digits", "steps": 6, "batch_size": 8, "evaluations": 2}


def images(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_off_is_as_it_was():
    """The images of an epoch's order, normalised, with their labels."""
    task = digits()
    for other in (task, task.augmented(), digits(augmentation=Augmentation())):
        inputs, labels = other.train_batch(3, 2, 16)
        index = order(task.info.sizes["train"], 3, 0)[32:48]
        assert torch.equal(inputs, task.normalise(task.data.pixels["train"][index]))
        assert torch.equal(labels, task.data.labels["train"][index])


def test_a_batch_is_a_function_of_seed_and_step():
    task = digits(augment=True).augmented(**ALL)
    for other in (task, digits(augment=True).augmented(**ALL)):
        assert all(map(torch.equal, other.train_batch(1, 5, 12), task.train_batch(1, 5, 12)))
    assert not torch.equal(task.train_batch(1, 5, 12)[0], task.train_batch(1, 6, 12)[0])
    assert not torch.equal(task.train_batch(2, 5, 12)[0], task.train_batch(1, 5, 12)[0])


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_repeats(repeats):
    """Each image so often in a row, over the ends of batches and of epochs."""
    task, n = digits().augmented(repeats=repeats), digits().info.sizes["train"]
    stream = torch.cat([task.train_batch(0, step, 100)[1] for step in range(2 * n // 100 + 1)])
    for epoch in (0, 1):
        seen = order(n, 0, epoch).repeat_interleave(repeats)[:n]
        assert torch.equal(stream[epoch * n:(epoch + 1) * n], task.data.labels["train"][seen])


def test_labels():
    task = digits().augmented(smoothing=0.1)
    targets = task.train_batch(0, 0, 9)[1]
    assert_close(targets.sum(1), torch.ones(9))
    assert_close(targets.amax(1), torch.full((9,), 0.91))
    logits = torch.randn(9, 10)
    labels = digits().train_batch(0, 0, 9)[1]
    assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_and_targets_are_in_the_same_shares(mixup, cutmix):
    """Image i is of one number i everywhere, so its mean tells how much of which was mixed."""
    x, targets = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 10, 14), torch.eye(6)
    shares = []
    for step in range(20):
        mixed, soft = mix(x, targets, mixup, cutmix, generator(0, step))
        share = soft[0, 0]
        assert_close(soft, share * targets + (1 - share) * targets.flip(0))
        assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(6.0))
        if not mixup:
            assert set(mixed[0].unique().tolist()) <= {0.0, 5.0}
        shares.append(share.item())
    assert max(shares) - min(shares) > 0.2


def test_erasing():
    """This part of the images; a rectangle of them, of 2 to 33 % of the area."""
    x = torch.full((400, 2, 20, 30), 7.0)
    out = erase(x, 0.25, generator(0, 0))
    changed = (out != 7).all(1)
    hit = changed.any((1, 2))
    assert 0.17 < hit.float().mean() < 0.33
    for mask in changed[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        assert 0.01 < mask.float().mean() < 0.40
        assert rows.sum() == rows.nonzero().max() - rows.nonzero().min() + 1
    assert torch.equal(erase(x, 0.0, generator(0, 0)), x)
    assert (erase(x, 1.0, generator(0, 0)) != 7).any((1, 2, 3)).all()


@pytest.mark.parametrize("levels", [256, 7, 1])
def test_equalize_is_pillows(levels):
    from PIL import Image, ImageOps

    x = (images(3, 3, 40, 30).float() / 256 * levels).floor() ** 2 / max(1, levels - 1) ** 2 * 255
    x = x.round()
    out = OPERATIONS["equalize"](x, torch.ones(3))
    for before, after in zip(x, out, strict=True):
        theirs = ImageOps.equalize(Image.fromarray(before.permute(1, 2, 0).to(torch.uint8).numpy()))
        assert torch.equal(after, torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float())


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment(channels):
    """Keeps shape and kind; at no strength the operations with a strength do nothing; some images stay."""
    x = images(200, channels, 12, 9)
    out = rand_augment(x, 9.0, generator(0, 0))
    assert (out.shape, out.dtype) == (x.shape, torch.uint8)
    same = (out == x).all(3).all(2).all(1).float().mean()
    assert 0.15 < same < 0.5  # both operations left out in a quarter, and colour does nothing to grey
    for name, operation in OPERATIONS.items():
        for m in (torch.zeros(200), torch.full((200,), 0.9), torch.full((200,), -0.9)):
            made = operation(x.float(), m)
            assert made.shape == x.shape
            assert made.isfinite().all()
            if not m.any() and name not in ("posterize", "invert", "autocontrast"):
                assert_close(made, x.float(), atol=0.02, rtol=0)


def test_operations_on_a_grid():
    """Moved by whole pixels, turned by 30 degrees three times, inverted, darkened."""
    x = images(1, 1, 20, 20).float()
    full = torch.ones(1)
    assert_close(OPERATIONS["translate_x"](x, full)[..., :11], x[..., 9:], atol=0.02, rtol=0)
    assert not OPERATIONS["translate_x"](x, full)[..., 11:].any()
    assert_close(OPERATIONS["translate_y"](x, -full)[..., 9:, :], x[..., :11, :], atol=0.02, rtol=0)
    assert_close(OPERATIONS["brightness"](x, -full), x / 10)
    assert_close(OPERATIONS["invert"](x, full) + x, torch.full_like(x, 255))
    assert OPERATIONS["solarize"](x, full).max() <= 255
    blocks = F.interpolate(images(1, 1, 2, 2).float(), scale_factor=10)
    turned = OPERATIONS["rotate"](OPERATIONS["rotate"](OPERATIONS["rotate"](blocks, full), full), full)
    assert_close(turned[0, 0, 5, 5], blocks.rot90(1, (2, 3))[0, 0, 5, 5])


def test_bad_options():
    for options in ({"repeats": 0}, {"rand_augment": 11}, {"erasing": 1.5}, {"mixup": -1}, {"smoothing": 1.0}):
        with pytest.raises(DoesNotFit, match="expected repeats"):
            digits().augmented(**options)
    with pytest.raises(DoesNotFit, match="mixup: augmentation of labelled images, of which stdlib has none"):
        fm.get_task("stdlib").augmented(mixup=0.5)
    with pytest.raises(UnknownName, match="unknown recipe 'diet'; did you mean deit"):
        checked(RunConfig, model=MODEL, task="digits", recipe="diet")


# runs


def test_a_recipe_is_its_fields():
    named, given = (checked(RunConfig, model=MODEL, task="digits", **more)
                    for more in ({"recipe": "deit", "mixup": 0.2}, RECIPES["deit"] | {"mixup": 0.2}))
    assert named == given
    assert given.augmentation == ALL | {"mixup": 0.2}
    assert checked(RunConfig, model=MODEL, task="digits").augmentation == {}


def test_drop_path_of_a_recipe(tmp_path):
    """Unless the name says its own."""
    for name, rate in ((MODEL, 0.1), (f"{MODEL},drop_path=0.3", 0.3)):
        run = Run(checked(RunConfig, model=name, recipe="deit", **RUN), tmp_path)
        assert run.build().stages[0].layers[1]["mixer"].rate == rate


def test_a_run_under_the_recipe_resumes_bit_by_bit(tmp_path):
    """The moving average too."""
    def weights(folder):
        return load(tmp_path / folder / "last.safetensors").state_dict()

    whole, stopped = train(MODEL, out=tmp_path / "whole", recipe="deit", **RUN), []

    def stop(progress, loss):
        if progress > 0.3 and not stopped:
            stopped.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(MODEL, out=tmp_path / "halved", watch=stop, recipe="deit", **RUN)
    halved = train(MODEL, out=tmp_path / "halved", recipe="deit", **RUN)
    assert halved["test"] == whole["test"]
    assert all(map(torch.equal, weights("halved").values(), weights("whole").values()))
    config = json.loads((tmp_path / "whole" / "run.json").read_text())["config"]
    assert config["mixup"] == 0.8


def test_moving_average(tmp_path):
    """Its decay grows from 1 / 10 on; what is saved is the average."""
    seen, follow = [], Run.follow

    class Watched(Run):
        def follow(self, model):
            follow(self, model)
            seen.append((model.head.weight.detach().clone(), self.average.head.weight.clone()))

    run = Watched(checked(RunConfig, model=MODEL, ema=0.3, **RUN), tmp_path)
    run.train()
    mean = None
    for step, (now, average) in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        if mean is not None:
            mean = decay * mean + (1 - decay) * now
            assert_close(average, mean)
        mean = average
    assert torch.equal(load(tmp_path / "last.safetensors").head.weight, seen[-1][1])
    assert not torch.equal(*seen[-1])


def test_compare_takes_the_recipe(tmp_path):
    found = compare([MODEL, "poolformer/nano"], "digits", out=tmp_path, lr=1e-3, recipe="deit", steps=2, batch_size=4,
                    evaluations=1)
    assert [row["status"] for row in found.rows] == ["done", "done"]
    assert json.loads((tmp_path / "compare.json").read_text())["config"]["cutmix"] == 1.0
