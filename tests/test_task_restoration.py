"""Restoration: photographs, how they are degraded, PSNR and SSIM, the tasks and their drawing in the report."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import formarium as fm
import test_data
from formarium.arena.plots import Page
from formarium.arena.shown import restoration
from formarium.core.errors import BadData, DoesNotFit, UnknownName
from formarium.data import cache, photos
from formarium.data.cache import Origin, Remote
from formarium.data.photos import Photos
from formarium.tasks.registry import describe_tasks, get_task, list_tasks
from formarium.tasks.restore import Denoise, SuperResolve, eight_bits, luma, psnr, resize, ssim

SPLITS = ("train", "val", "test")
HERE = Origin("Made up", "this test", "ours")


def made_up(sizes=((40, 50), (44, 39)), counts=(3, 1, 2), seed=0):
    """Smooth random images, of these sizes in turn."""
    random = torch.Generator().manual_seed(seed)
    images, names = {}, {}
    for split, count in zip(SPLITS, counts, strict=True):
        coarse = [torch.rand(1, 3, 8, 8, generator=random) for _ in range(count)]
        large = [eight_bits(resize(c, sizes[i % len(sizes)]))[0] for i, c in enumerate(coarse)]
        images[split] = [(image * 255).round().byte() for image in large]
        names[split] = [f"{split} {i}" for i in range(count)]
    return Photos(images, names, HERE)


def denoise(**options):
    return Denoise("made up", made_up(), **{"patch": 16, **options})


def sr(**options):
    return SuperResolve("made up", made_up(), **{"patch": 8, **options})


class Answers(nn.Module):
    """Gives what a function makes of each batch, and keeps what it saw."""

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append(x)
        return self.function(x)


# metrics


def direct_ssim(x, y):
    """Wang et al. 2004, one window after another, one channel after another."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for a, b in zip(x.numpy().astype(float), y.numpy().astype(float), strict=True):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                found.append((2 * mp * mq + 1e-4) * (2 * both + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(found)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.4])
def test_ssim_is_the_definition(noise):
    clean = made_up().images["train"][0][:, :17, :20] / 255
    other = eight_bits(clean + noise * torch.randn_like(clean))
    assert ssim(other[None], clean[None]) == pytest.approx(direct_ssim(other, clean), abs=1e-9)
    assert (ssim(other[None], clean[None]) == pytest.approx(1, abs=1e-12)) == (noise == 0)
    assert ssim(1 - clean[None], clean[None]) < 0.9


def test_metrics_agree_with_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.image")
    clean = made_up().images["train"][0][None] / 255
    other = eight_bits(clean + 0.1 * torch.randn_like(clean))
    theirs = metrics.peak_signal_noise_ratio(other, clean, data_range=1.0)
    assert psnr(other, clean) == pytest.approx(theirs.item(), abs=1e-4)
    theirs = metrics.structural_similarity_index_measure(other.double(), clean.double(), data_range=1.0, sigma=1.5,
                                                         kernel_size=11, return_full_image=True)
    assert ssim(other, clean) == pytest.approx(theirs[1][..., 5:-5, 5:-5].mean().item(), abs=1e-6)


def test_psnr():
    x = torch.zeros(1, 3, 12, 12)
    assert psnr(x + 0.1, x) == pytest.approx(20, abs=1e-5)
    assert psnr(x + 1, x) == 0
    assert psnr(x, x) == 100
    assert json.loads(json.dumps(psnr(x, x), allow_nan=False)) == 100


def test_luma():
    colours = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)[..., None, None]
    assert (255 * luma(colours)).flatten().tolist() == pytest.approx([235, 16, 81.481])


# degradations


def test_noise():
    """White, of the deviation asked, not clipped, other for every image and channel, the same every time."""
    task = denoise(sigma=40)
    first, again = list(task.pairs("test")), list(task.pairs("test"))
    noise = [(x - y)[0] * 255 for x, y in first]
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(first, again, strict=True))
    assert [n.std().item() for n in noise] == pytest.approx([40, 40], rel=0.05)
    assert [n.mean().item() for n in noise] == pytest.approx([0, 0], abs=3)
    assert max(x.max() for x, _ in first) > 1
    assert min(x.min() for x, _ in first) < 0
    assert abs(torch.corrcoef(noise[0].flatten(1))[0, 1]) < 0.1
    assert not torch.equal(noise[0][:, :39, :39], noise[1][:, :39, :39])
    val = next(task.pairs("val"))
    assert not torch.equal((val[0] - val[1])[..., :39, :39] * 255, noise[0][None, :, :39, :39])
    assert all(torch.equal(255 * y[0], i) for (_, y), i in zip(first, task.data.images["test"], strict=True))


def by_pillow(images, size):
    """Images (B, C, H, W) from 0 to 1 in another size (H, W), in floating point: Pillow's own antialiased cubic filter."""
    resized = [Image.fromarray(c.numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for c in images.flatten(0, 1)]
    return torch.from_numpy(np.stack([np.asarray(r) for r in resized])).unflatten(0, images.shape[:2])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_smaller_images_are_as_pillow_makes_them(scale):
    """Cubic and antialiased; sides are cut to multiples of the scale; 8 bits."""
    task = sr(scale=scale)
    for (small, clean), image in zip(task.pairs("test"), task.data.images["test"], strict=True):
        h, w = (s // scale * scale for s in image.shape[1:])
        assert torch.equal((clean[0] * 255).round().byte(), image[:, :h, :w])
        assert small.shape == (1, 3, h // scale, w // scale)
        assert (small - by_pillow(clean, (h // scale, w // scale)).clamp(0, 1)).abs().max() < 0.502 / 255
        assert_close(small * 255, (small * 255).round())
        assert_close(task.baseline(small), by_pillow(small, (h, w)), atol=1e-5, rtol=1e-5)


def test_cubic_interpolation_of_set5_scores_as_published():
    """33.66, 30.39 and 28.42 dB (Dong et al. 2016 and everyone since), from MATLAB; so task and measure are the field's."""
    test_data.real("cbsd68.zip", "set5.zip")
    for scale, published, similarity in ((2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)):
        task = get_task("sr", scale=scale)
        assert task.baselines["psnr"] == pytest.approx(published, abs=0.03)
        assert task.baselines["ssim"] == pytest.approx(similarity, abs=0.001)
        assert f"{task.baselines['psnr']:.2f} dB" in task.info.note


# batches


@pytest.mark.parametrize(("make", "scale"), [(denoise, 1), (sr, 2), (lambda: sr(scale=3), 3)])
def test_train_batch_depends_on_seed_and_step_alone(make, scale):
    task = make()
    first = task.train_batch(1, 5, 16)
    state = torch.get_rng_state()
    other = task.train_batch(1, 6, 16)
    torch.rand(3)
    assert all(map(torch.equal, first, task.train_batch(1, 5, 16)))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[1], task.train_batch(2, 5, 16)[1])
    torch.set_rng_state(state)
    task.train_batch(1, 7, 16)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    x, y = first
    assert x.shape == (16, 3, task.patch, task.patch)
    assert y.shape == (16, 3, scale * task.patch, scale * task.patch)
    assert x.dtype == y.dtype == torch.float32


def test_patches_are_of_the_training_images_turned_and_mirrored():
    """Every patch is found in some training image, in one of eight ways; all images and ways occur, and no other split."""
    task, found = denoise(patch=8), set()
    where = {window.numpy().tobytes(): i for i, image in enumerate(task.data.images["train"])
             for window in image.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)}
    for patch in (task.train_batch(0, 0, 200)[1] * 255).round().byte():
        ways = {(turns, flipped): (patch.flip(2) if flipped else patch).rot90(-turns, (1, 2)).contiguous().numpy().tobytes()
                for turns in range(4) for flipped in (False, True)}
        hits = {(where[asked], *way) for way, asked in ways.items() if asked in where}
        assert hits, "a patch is in no training image"
        found |= hits
    assert found == {(i, t, f) for i in range(3) for t in range(4) for f in (False, True)}


# evaluation


def test_evaluate_means_over_all_images_of_a_split():
    task = denoise()
    half = Answers(lambda x: 0.5 * x + 0.25).train()
    found = task.evaluate(half, "test")
    assert half.training
    assert [tuple(x.shape) for x in half.seen] == [(1, 3, 40, 50), (1, 3, 44, 39)]
    rows = []
    for x, y in task.pairs("test"):
        answer = 0.5 * x + 0.25
        rounded = (answer.clamp(0, 1) * 255).round() / 255
        mse = ((rounded - y) ** 2).double().mean().item()
        rows.append(((answer - y).abs().mean().item(), 10 * math.log10(1 / mse), direct_ssim(rounded[0], y[0])))
    assert [found[k] for k in ("loss", "psnr", "ssim")] == pytest.approx(np.mean(rows, 0), abs=1e-5)
    task.info.sizes["test"] = 3
    with pytest.raises(BadData, match="2 samples of the test split were evaluated, it has 3"):
        task.evaluate(half, "test")
    with pytest.raises(UnknownName, match="did you mean train"):
        next(task.pairs("trian"))


def test_super_resolution_scores_the_luma_without_a_border():
    task = sr(scale=2)
    x, y = next(task.pairs("test"))
    right = task.score(y, y)
    assert right == {"psnr": 100, "ssim": pytest.approx(1)}
    framed = y.clone()
    framed[..., :2, :] = framed[..., -2:] = 0
    assert task.score(framed, y) == right  # the border does not count
    framed[..., 2, 2] = 1 - framed[..., 2, 2]
    assert task.score(framed, y)["psnr"] < 100
    a, b = (luma(images)[..., 2:-2, 2:-2] for images in (eight_bits(task.baseline(x)), y))
    assert task.score(task.baseline(x), y) == {"psnr": psnr(a, b), "ssim": ssim(a, b)}


def test_baselines_are_those_of_no_model():
    """What the task's information says is what a model reaches that does nothing, or interpolates."""
    for task, nothing in ((denoise(), lambda x: x), (sr(), lambda x: resize(x, (2 * x.shape[2], 2 * x.shape[3])))):
        found = task.evaluate(Answers(nothing), "test")
        assert {k: found[k] for k in task.baselines} == task.baselines
        assert f"PSNR of {found['psnr']:.2f} dB and an SSIM of {found['ssim']:.4f} on the test split" in task.info.note
    assert denoise(sigma=50).baselines["psnr"] < denoise(sigma=15).baselines["psnr"]


def test_an_answer_of_another_size_is_refused():
    with pytest.raises(DoesNotFit, match=r"needs images \(1, 3, 40, 50\); the model gave \(1, 3, 39, 50\)"):
        denoise().evaluate(Answers(lambda x: x[:, :, 1:]), "test")


@pytest.mark.parametrize("make", [denoise, lambda: sr(scale=3)])
def test_a_restorer_fits(make):
    task = make()
    model = fm.create_model("restormer/nano", **task.model_options())
    task.check_fits(model, "restormer/nano")
    x, y = task.train_batch(0, 0, 2)
    assert model.example(2).shape == x.shape
    loss = task.loss(model, (x, y))
    assert loss.item() == pytest.approx((model(x) - y).abs().mean().item())
    loss.backward()
    assert task.evaluate(model, "val")["psnr"] > 0
    vit = fm.create_model("vit/nano")
    with pytest.raises(DoesNotFit, match="needs a model of the domain 'restoration'"):
        task.check_fits(vit, "vit/nano")


def test_training_takes_noise_off():
    """A few steps on scikit-learn's photographs beat the noisy images by decibels, on columns that were not trained on."""
    task = get_task("two_photos", sigma=50, patch=32)
    assert task.info.sizes == {"train": 2, "val": 2, "test": 2}
    model = fm.create_model("restormer/nano", **task.model_options())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        task.loss(model, task.train_batch(0, step, 4)).backward()
        optimizer.step()
    crop = [(x[..., :96, :96], y[..., :96, :96]) for x, y in task.pairs("test")]
    with torch.no_grad():
        better = np.mean([psnr(model(x), y) - psnr(x, y) for x, y in crop])
    assert better > 2


# data


def test_cbsd68_and_set5():
    """Splits are fixed, disjoint and whole; images are those of the archives."""
    test_data.real("cbsd68.zip", "set5.zip")
    ours, with_set5 = photos.cbsd68(), photos.cbsd68_set5()
    assert [len(ours.images[s]) for s in SPLITS] == [44, 8, 16]
    assert sorted(chain(*ours.names.values())) == [f"{i:04}.png" for i in range(68)]
    assert [len(with_set5.images[s]) for s in SPLITS] == [60, 8, 5]
    assert sorted(with_set5.names["train"] + with_set5.names["val"]) == [f"{i:04}.png" for i in range(68)]
    assert with_set5.names["val"] == ours.names["val"]
    assert ours.names["val"] == sorted(f"{i:04}.png" for i in np.random.RandomState(0).permutation(68)[:8])
    assert {tuple(x.shape) for split in SPLITS for x in ours.images[split]} == {(3, 321, 481), (3, 481, 321)}
    images = [*ours.images["train"], *ours.images["val"], *ours.images["test"], *with_set5.images["test"]]
    assert len({hashlib.sha256(x.numpy().tobytes()).digest() for x in images}) == 73


def archive(path, names, colour=9):
    with zipfile.ZipFile(path, "w") as opened:
        for i, name in enumerate(names):
            file = io.BytesIO()
            Image.new("RGB", (20 + i, 20), (colour, i, 0)).save(file, "PNG")
            opened.writestr(f"some/{name}", file.getvalue())
    return path


def test_an_archive_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    archive(tmp_path / "a.zip", ["x.png", "y.png"])
    with zipfile.ZipFile(tmp_path / "a.zip") as opened:
        files = {n: hashlib.sha256(opened.read(f"some/{n}")).hexdigest() for n in ("x.png", "y.png")}
    assert [tuple(i.shape) for i in photos._read("a.zip", "a", files)] == [(3, 20, 20), (3, 20, 21)]
    with pytest.raises(BadData, match=r"has no z.png \(1 of 3 images are missing\)"):
        photos._read("a.zip", "a", files | {"z.png": ""})
    archive(tmp_path / "a.zip", ["x.png", "y.png"], colour=8)
    with pytest.raises(BadData, match=r"x.png is damaged or another image \(2 of 2 "):
        photos._read("a.zip", "a", files)
    (tmp_path / "a.zip").write_bytes(b"PK not an archive")
    with pytest.raises(BadData, match="no whole zip archive"):
        photos._read("a.zip", "a", files)


def test_without_an_archive_each_image_is_located(tmp_path, monkeypatch):
    """In the folder under its own name, else by a download with its sum."""
    with zipfile.ZipFile(archive(tmp_path / "a.zip", ["x.png", "y.png"])) as opened:
        opened.extractall(tmp_path)
    (tmp_path / "a.zip").unlink()
    shutil.move(tmp_path / "some", tmp_path / "a")
    files = {n: hashlib.sha256((tmp_path / "a" / n).read_bytes()).hexdigest() for n in ("x.png", "y.png")}
    for name, digest in files.items():
        monkeypatch.setitem(cache.FILES, f"a/{name}", Remote(f"https://nowhere.invalid/{name}", digest))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert [tuple(i.shape) for i in photos._read("a.zip", "a", files)] == [(3, 20, 20), (3, 20, 21)]
    (tmp_path / "a" / "y.png").write_bytes(b"other")
    with pytest.raises(BadData, match=r"y.png is damaged or another file: .*get it anew from https://nowhere.invalid/y.png"):
        photos._read("a.zip", "a", files)


def test_addresses_and_sums_of_all_images():
    assert list(photos.CBSD68) == [f"{i:04}.png" for i in range(68)]
    remotes = {n: r for n, r in cache.FILES.items() if n.startswith(("cbsd68/", "set5/"))}
    assert len(remotes) == 73
    assert all(r.url.endswith(n.split("/")[1]) and re.fullmatch("[0-9a-f]{64}", r.sha256) for n, r in remotes.items())
    assert all(re.search("/[0-9a-f]{40}/", r.url) for r in remotes.values())  # of one commit: they cannot change


def test_two_photos_are_cut_into_separate_columns():
    from sklearn.datasets import load_sample_images

    ours = photos.two_photos()
    for i, whole in enumerate(load_sample_images().images):
        parts = [ours.images[s][i] for s in SPLITS]
        assert [tuple(p.shape) for p in parts] == [(3, 427, 384), (3, 427, 128), (3, 427, 128)]
        assert np.array_equal(torch.cat(parts, dim=2).permute(1, 2, 0).numpy(), whole)


def save_images(folder, count, size=(50, 40)):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        array = np.random.RandomState(i).randint(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return folder


def test_your_own_folder(tmp_path):
    root = save_images(tmp_path / "mine", 12)
    Image.new("L", (64, 70), 7).save(root / "grey.jpg")
    (root / "notes.txt").write_text("no image")
    task = get_task(f"denoise:{root}", sigma=10, patch=24)
    assert task.name == f"denoise:{root}"
    assert task.info.sizes == {"train": 11, "val": 1, "test": 1}
    assert sorted(chain(*task.data.names.values())) == [*(f"{i:02}.png" for i in range(12)), "grey.jpg"]
    again = get_task(f"sr:{root}", scale=2, patch=16)
    assert again.data.names == task.data.names
    assert again.model_options() == {"in_chans": 3, "out_chans": 3, "scale": 2, "img_size": 16}


@pytest.mark.parametrize(("name", "options", "error", "says"), [
    ("denoise:nowhere/to/be", {}, BadData, "does not exist; write denoise:PATH"),
    ("sr:", {}, BadData, "needs a path: write sr:PATH"),
    ("denoise", {"sigma": 0}, DoesNotFit, "more than 0, not 0"),
    ("two_photos", {"sigma": "25"}, DoesNotFit, "not '25'"),
    ("two_photos", {"patch": 4}, DoesNotFit, "8 or more, not 4"),
    ("two_photos", {"patch": 500}, BadData, r"china.jpg has 384x427 pixels; images of train need 500x500 or more.*patch="),
    ("two_photos", {"sigmas": 25}, UnknownName, "did you mean sigma"),
    ("two_photos:here", {}, BadData, "takes no path"),
    ("sr", {"scale": 5}, DoesNotFit, "2, 3 or 4, not 5"),
])
def test_get_task_says_what_is_wrong(name, options, error, says, monkeypatch):
    monkeypatch.setattr(photos, "cbsd68", made_up)
    monkeypatch.setattr(photos, "cbsd68_set5", made_up)
    with pytest.raises(error, match=says):
        get_task(name, **options)


def test_folders_that_do_not_do(tmp_path):
    root = save_images(tmp_path / "mine", 2)
    with pytest.raises(BadData, match=r"has 2 images \(.*three or more"):
        photos.folder(root)
    with pytest.raises(BadData, match="is a file"):
        photos.folder(root / "00.png")
    save_images(root, 3)
    (root / "01.png").write_bytes((root / "01.png").read_bytes()[:200])
    with pytest.raises(BadData, match=r"01.png cannot be read as an image"):
        photos.folder(root)
    Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16)).save(root / "01.png")
    with pytest.raises(BadData, match=r"01.png has pixels of 16 bits or more"):
        photos.folder(root)
    save_images(root, 3, size=(40, 20))
    with pytest.raises(BadData, match=r"has 20x40 pixels; images of train need 30x30"):
        get_task(f"denoise:{root}", patch=30)


def test_photos_check_what_they_hold():
    good = made_up()
    for images, says in (({"test": []}, "one image or more"), ({"val": [torch.zeros(3, 5, 5)]}, "expected uint8"),
                         ({"val": [torch.zeros(1, 5, 5, dtype=torch.uint8)]}, r"got torch.uint8 \(1, 5, 5\)")):
        with pytest.raises(BadData, match=says):
            Photos(good.images | images, good.names, HERE)


def test_the_path_may_be_left_out():
    assert {"denoise", "sr", "two_photos"} <= set(describe_tasks()) & set(list_tasks())
    assert all("PATH" in describe_tasks()[name] for name in ("denoise", "sr"))


# the report


@pytest.mark.parametrize("make", [denoise, lambda: sr(scale=3)])
def test_show_and_draw(make):
    """PNGs of the same patches for every model, with the PSNR that one finds from them."""
    task = make()
    nothing = Answers(task.baseline)
    shown = task.show(nothing)
    assert shown == task.show(Answers(task.baseline))
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["kind"] == Path(restoration.__file__).stem
    assert shown["names"] == ["test 0", "test 1"]
    assert shown["psnr"] == shown["baseline"]

    def pixels(text):
        array = np.array(Image.open(io.BytesIO(base64.b64decode(text))))
        return torch.from_numpy(array).permute(2, 0, 1)[None] / 255

    for answer, truth, value in zip(shown["answer"], shown["truth"], shown["psnr"], strict=True):
        assert task.score(pixels(answer), pixels(truth))["psnr"] == pytest.approx(value, abs=1e-3)
    side = pixels(shown["truth"][0]).shape[2]
    assert pixels(shown["input"][0]).shape[2] == side // task.scale
    page = Page(Path(), {}, [{"model": "restormer/<nano>"}], "psnr", 1)
    drawn = restoration.draw(page, [(0, "restormer/<nano>", shown)])
    assert drawn.count("<img") == 3 * len(shown["names"])
    assert all(f"{v:.2f}" in drawn for v in shown["psnr"])
    assert "&lt;nano&gt;" in drawn
    assert "<nano>" not in drawn
