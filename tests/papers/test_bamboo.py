"""Bamboo: configurations of equal size, smoothness against a Fourier transform, MAE against its authors' steps."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import formarium as fm
from formarium.core.errors import DoesNotFit
from formarium.core.model import count_parameters
from formarium.papers.backbones import vit
from formarium.papers.objectives.bamboo import MAE, PRESETS, Configuration, iso_parameter, smoothness
from formarium.skeletons.objective import objective

# configurations

def test_iso_parameter():
    found = iso_parameter(768, 12, 12)
    assert Configuration(768, 12, 12) in found
    assert Configuration(512, 27, 8) in found  # to the parameter: 27 * 512^2 = 12 * 768^2
    assert Configuration(384, 48, 6) in found
    assert found == sorted(found, reverse=True)
    assert all(c.dim == 64 * c.heads and c.depth * c.dim**2 == pytest.approx(12 * 768**2, rel=0.03) for c in found)
    assert {c.dim > 768 for c in found} == {True, False}
    assert iso_parameter(768, 12, 12, within=0) == [c for c in found if c.depth * c.dim**2 == 12 * 768**2]
    for wrong in ({"dim": 100, "heads": 12}, {"depth": 0}, {"within": -0.1}):
        with pytest.raises(DoesNotFit, match="got dim="):
            iso_parameter(**({"dim": 768, "depth": 12, "heads": 12} | wrong))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """Deeper and narrower, with the layers' parameters of the usual one."""
    with torch.device("meta"):
        ours, usual = PRESETS[name](), vit.PRESETS[name]()
    assert ours.stages[0].depth > usual.stages[0].depth
    assert ours.num_features < usual.num_features
    assert count_parameters(ours.stages) == pytest.approx(count_parameters(usual.stages), rel=0.03)


@pytest.mark.parametrize("host", ["vit/nano:patch=7", "bert/nano"])
def test_any_plain_transformer_takes_them(host):
    """Options of those names, so that the helper's answer is all that is changed."""
    for c in iso_parameter(64, 4, 4, within=0.1)[-3:]:
        model = fm.create_model(host, **c._asdict())
        assert model(model.example(2)) is not None


def test_configurations_of_bert():
    """The layers of BERT-base in as many parameters; and the other half of the paper, masked words, trains them."""
    base = fm.preset("bert/base")
    with torch.device("meta"):
        usual = count_parameters(base().stack)
        for c in iso_parameter(base["dim"], base["depth"], base["heads"]):
            if c.depth > 48:
                break
            assert count_parameters(base.but(**c._asdict())().stack) == pytest.approx(usual, rel=0.03)
    (narrow,) = [c for c in iso_parameter(32, 2, 4) if c.depth == 8]
    made, losses = objective("bert")(fm.create_model("bert/nano", context=32, **narrow._asdict())), []
    optimizer, ids = torch.optim.AdamW(made.parameters(), lr=3e-3), torch.arange(32).repeat(16, 1)
    for _ in range(12):
        losses.append(made(ids)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# smoothness

def test_smoothness_written_out():
    """One row for the embedded tokens and one a layer of every stage; class tokens are left out; the mode is kept."""
    model = fm.create_model("vit/nano:patch=7,depth=2").train()
    images = torch.randn(3, 3, 28, 28)
    cosine, ratio = smoothness(model, images)
    assert model.training
    assert len(cosine) == len(ratio) == 3
    model.eval()
    x, ctx = model.embed(images)
    for i in range(3):
        tokens = (x if i == 0 else model.stages[0].intermediates(x, ctx, [i - 1])[2][0])[:, 1:].double()
        pairs = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
        n = tokens.shape[1]
        assert_close(cosine[i], (pairs.sum((1, 2)) - n).mean() / (n * (n - 1)))
        energy = torch.fft.fft(tokens, dim=1).abs().square().sum(-1)
        assert_close(ratio[i], (energy[:, 1:].sum(1) / energy[:, 0]).mean())


def test_smoothness_of_pyramids_and_at_its_ends():
    model = fm.create_model("swin/nano")
    assert len(smoothness(model, model.example(2)).cosine) == 1 + sum(stage.depth for stage in model.stages)
    model = fm.create_model("scaling_vit/nano:position=none,depth=1").eval()
    cosine, ratio = smoothness(model, torch.ones(1, 3, 28, 28))  # all patches are equal
    assert_close(cosine, torch.ones(2, dtype=torch.float64))
    assert ratio.max() < 1e-6
    with pytest.raises(DoesNotFit, match="here is one"):
        smoothness(fm.create_model("vit/nano:patch=28"), torch.randn(1, 3, 28, 28))
    with pytest.raises(DoesNotFit, match="GPT is none"):
        smoothness(fm.create_model("gpt/nano"), torch.zeros(1, 4).long())


@pytest.mark.parametrize("host", ["bert/nano", "albert/nano"])
def test_smoothness_of_text(host):
    """The first row is of the embedded tokens, the last of what the encoder answers."""
    model = fm.create_model(f"{host}:depth=3").eval()
    ids = model.example(2, (9,))
    found = smoothness(model, ids).cosine
    assert len(found) == 4
    for value, tokens in ((found[0], model.embed(ids)[0]), (found[-1], model(ids))):
        pairs = F.cosine_similarity(tokens[:, :, None].double(), tokens[:, None].double(), dim=-1)
        assert_close(value, (pairs.sum((1, 2)) - 9).mean() / 72)


# the objective

def of_the_authors(objective, images, noise, pool):
    """Shuffle, keep the first, restore; positions before hiding; mean squared error of normed hidden patches."""
    model, decoder, p = objective.model, objective.decoder, objective.model.embedding.patch[0]
    b, (h, w) = len(images), objective.grid
    x, ctx = model.embed(images)
    cls, x = x[:, :ctx.prefix], x[:, ctx.prefix:]
    shuffle = noise.argsort(1)
    restore, keep = shuffle.argsort(1), shuffle[:, :objective.visible]
    x = torch.cat((cls, torch.stack([x[i, keep[i]] for i in range(b)])), 1)
    for layer in model.stages[0].layers:
        for sub in layer.values():
            x = x + sub.inner(sub.norm(x), ctx)
    x = decoder.embed(model.norm(x))
    cls, x = x[:, :ctx.prefix], x[:, ctx.prefix:]
    x = torch.cat((x, decoder.hidden.expand(b, h * w - x.shape[1], -1)), 1)
    x = torch.stack([x[i, restore[i]] for i in range(b)])
    rates = 10000 ** (-torch.arange(x.shape[-1] // 4) / (x.shape[-1] / 4))
    rows, columns = torch.arange(h).repeat_interleave(w)[:, None] * rates, torch.arange(w).repeat(h)[:, None] * rates
    x = x + torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), 1)
    x = torch.cat((cls, x), 1)
    for layer in decoder.stack.layers:
        for sub in layer.values():
            x = x + sub.inner(sub.norm(x), ctx)
    drawn = decoder.head(decoder.norm(x))[:, ctx.prefix:]
    total, hidden = 0, [(i, j) for i in range(b) for j in range(h * w) if j not in keep[i].tolist()]
    for i, j in hidden:
        top, left = p * (j // w), p * (j % w)
        target = images[i, :, top:top + p, left:left + p].permute(1, 2, 0).flatten()
        if objective.norm_pixels:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        total = total + (drawn[i, j] - target).square().mean()
    return total / len(hidden)


@pytest.mark.parametrize(("pool", "norm_pixels"), [("token", True), ("mean", False)])
def test_mae(pool, norm_pixels):
    """The loss and all gradients, on images that are not square."""
    torch.manual_seed(0)
    model = fm.create_model("vit/nano:patch=7,depth=2", pool=pool, img_size=(28, 14))
    made = MAE(model, norm_pixels=norm_pixels, decoder_depth=2, decoder_heads=4)
    images, noise = model.example(2), torch.rand(2, 8)
    named = {n: p for n, p in made.named_parameters() if not n.startswith("model.head.")}
    ours, theirs = made.error(images, noise), of_the_authors(made, images, noise, pool)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, list(named.values())), torch.autograd.grad(theirs, list(named.values())))


def test_hidden_patches_are_not_seen():
    """Other pixels in hidden patches leave what is encoded, and change the loss through the target alone."""
    made = MAE(fm.create_model("vit/nano:patch=7"), decoder_depth=1, norm_pixels=False).eval()
    images, noise = torch.randn(1, 3, 28, 28), torch.arange(16.0)[None]  # the first four, the upper row, are seen
    drawn = []
    made.decoder.register_forward_hook(lambda module, given, out: drawn.append(out.detach()))
    other = images.clone()
    other[:, :, 7:] = 0
    losses = [made.error(x, noise).item() for x in (images, other)]
    assert_close(*drawn, atol=0, rtol=0)
    assert losses[0] != losses[1]


def test_what_does_not_fit():
    for host, why in (("swin/nano", "plain ViT"), ("hvt/nano", "plain ViT"), ("tnt/nano", "plain ViT"),
                      ("vit/nano:position=rotary", "position='learned'"), ("vit/nano:position=none", "position='learned'")):
        with pytest.raises(DoesNotFit, match=why):
            MAE(fm.create_model(host))
    for ratio in (0.0, 1.0, 0.99, -1):
        with pytest.raises(DoesNotFit, match="of 16 patches"):
            MAE(fm.create_model("vit/nano:patch=7"), ratio=ratio)


def test_pretraining_by_name(tmp_path):
    """By `pretrain`, on a configuration of the helper; the encoder is read back and fine-tuned."""
    host = "bamboo/nano:patch=4,depth=2"
    short = {"steps": 2, "batch_size": 8, "evaluations": 1}
    found = fm.pretrain(host, "bamboo(decoder_depth=1)", "digits", out=tmp_path / "pre", **short)
    tuned = fm.train(host, "digits", init=found["encoder"], out=tmp_path / "tuned", **short)
    assert tuned["init"]
    assert fm.load(found["encoder"]).recipe["name"] == "bamboo/nano"
