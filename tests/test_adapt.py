"""Weights for a model of other options: what must stay the same stays, what cannot be made to fit is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import formarium as fm
from formarium.core.checkpoint import fill
from formarium.core.ctx import Ctx
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.core.registry import find, systems
from formarium.core.spec import from_json, spec
from formarium.parts.embed import PatchEmbed
from formarium.parts.position import LearnedPosition
from formarium.parts.window import RelativeBias
from formarium.skeletons.segmenter import LinearSegmenter
from formarium.weights.adapt import Change, Row, adapt, fold_channels, refit_kernel, refit_map, resize_map

side = st.integers(1, 12)
quick = settings(max_examples=25, deadline=None)


def moved(name, **options):
    """A model in eval mode whose parameters are away from their start."""
    model = fm.create_model(name, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def adapted(was, grow=False, **options):
    """The model with these options changed, and the rows by name."""
    changes = {k: from_json(v) for k, v in was.recipe["changes"].items()}
    model = fm.create_model(was.recipe["name"], **(changes | options)).eval()
    state, rows = adapt(was.state_dict(), was, model, grow=grow)
    fill(model, state, "the adapted state")
    return model, {r.name: r for r in rows}


def smooth(sides, channels):
    """A map (1, prod(sides), channels) without fine detail: what survives another resolution."""
    axes = torch.meshgrid(*((torch.arange(s) + 0.5) / s * 2 - 1 for s in sides), indexing="ij")
    waves = [torch.cos(c * 0.3 + sum((0.4 + 0.2 * i) * a for i, a in enumerate(axes))) for c in range(channels)]
    return torch.stack([w.flatten() for w in waves], dim=-1)[None]


def correlation(a, b):
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]


# maps

@quick
@given(side, side, side, side)
def test_constants_stay_constant(h, w, h2, w2):
    assert_close(resize_map(torch.full((1, h * w, 3), 2.5), 1, (h, w), (h2, w2)), torch.full((1, h2 * w2, 3), 2.5))


@quick
@given(side, side)
def test_a_map_of_the_same_size_stays(h, w):
    table = torch.randn(1, h * w, 3)
    assert resize_map(table, 1, (h, w), (h, w)).equal(table)


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_it_is_interpolation_of_two_axes_at_once(h, w, h2, w2):
    table = torch.randn(2, h * w, 3)
    image = table.transpose(1, 2).unflatten(2, (h, w))
    want = F.interpolate(image, size=(h2, w2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert_close(resize_map(table, 1, (h, w), (h2, w2)), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 13), (16, 24), (24, 12)])
def test_ramps_stay_ramps_away_from_the_border(old, new):
    ramp = torch.arange(old, dtype=torch.float64).repeat(5)[None, :, None]
    got = resize_map(ramp, 1, (5, old), (5, new)).view(5, new)
    want = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    inner = slice(math.ceil(2 * max(new / old, 1)), -math.ceil(2 * max(new / old, 1)))
    assert_close(got[:, inner], want[inner].expand(5, -1))
    assert (got.diff() > 0).all()


def test_a_map_of_an_image_is_repeated_over_time():
    table = torch.randn(1, 12, 5)
    assert_close(resize_map(table, 1, (3, 4), (6, 3, 4)).view(6, 12, 5), table.expand(6, -1, -1))
    assert_close(resize_map(table.repeat(1, 6, 1), 1, (6, 3, 4), (3, 4)), table)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_before_the_map_are_kept(prefix, dtype):
    table = torch.randn(1, prefix + 15, 6).to(dtype)
    got, how, grows = refit_map(table, 1, (3, 5), (7, 4), prefix=prefix)
    assert got.dtype == dtype
    assert got.shape == (1, prefix + 28, 6)
    assert not grows
    assert got[:, :prefix].equal(table[:, :prefix])
    want = F.interpolate(table[:, prefix:].float().transpose(1, 2).unflatten(2, (3, 5)), size=(7, 4), mode="bicubic",
                         antialias=True).flatten(2).transpose(1, 2)
    assert_close(got[:, prefix:].float(), want, atol={2: 2e-2}.get(dtype.itemsize, 1e-5), rtol=0)
    kept = {0: "", 1: ", 1 prefix token kept", 2: ", 2 prefix tokens kept"}
    assert how == f"interpolated bicubically from 3x5 to 7x4{kept[prefix]}"


# tables of parts, there and back

def refit(part, was):
    return type(part).refit(part, "table", was.table.detach(), was)


TABLES = {
    "positions": (lambda h, w: LearnedPosition(6, 1 + h * w, grid=(h, w), prefix=1),
                  lambda h, w: torch.cat((torch.randn(1, 1, 6), smooth((h, w), 6)), dim=1)),
    "relative bias": (lambda h, w: RelativeBias((h, w), 6), lambda h, w: smooth((2 * h - 1, 2 * w - 1), 6)[0]),
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize(("small", "large"), [((7, 7), (12, 12)), ((8, 6), (16, 9)), ((14, 14), (24, 24)),
                                              ((6, 8), (8, 6))])
def test_tables_go_up_and_down_again(what, small, large):
    build, table = TABLES[what]
    was, bigger, again = build(*small), build(*large), build(*small)
    was.table.data = table(*small)
    bigger.table.data = refit(bigger, was).tensor
    again.table.data = refit(again, bigger).tensor
    assert_close(again.table.data, was.table.data, atol=0.05, rtol=0)
    cells = slice(1, None) if what == "positions" else slice(None)
    assert_close(bigger.table.data.view(-1, 6)[cells], table(*large).view(-1, 6)[cells], atol=0.08, rtol=0)
    assert refit(build(*small), was) is None


@pytest.mark.parametrize("what", TABLES)
def test_the_sides_count_where_the_cells_are_as_many(what):
    build, _ = TABLES[what]
    tall, wide = build(3, 6), build(6, 3)
    change = refit(wide, tall)
    assert change.tensor.shape == tall.table.shape
    assert not torch.allclose(change.tensor, tall.table)


def test_a_relative_bias_that_falls_with_the_distance_still_does():
    was, wider = RelativeBias((7, 7), 1), RelativeBias((12, 12), 1)
    offset = torch.cartesian_prod(torch.arange(-6.0, 7), torch.arange(-6.0, 7))
    was.table.data = -offset.norm(dim=1, keepdim=True)
    wider.table.data = refit(wider, was).tensor
    bias = wider().detach()[0].view(12, 12, 12, 12)
    assert (bias[0, 0, 0].diff() < 0).all()
    assert (bias[3, :, 3, 0].diff() < 0).all()
    assert_close(bias, bias.permute(2, 3, 0, 1))


def test_other_tokens_before_the_grid_are_refused_also_where_the_table_is_as_long():
    was, model = LearnedPosition(4, 9, grid=(2, 4), prefix=1), LearnedPosition(4, 9, grid=(3, 3))
    with pytest.raises(DoesNotFit, match=r"table is .*: the file has 1 tokens before a grid, the model 0 before a grid"):
        adapt(was.state_dict(), was, model)
    with pytest.raises(DoesNotFit, match="the file has 1 tokens before a grid, the model 0 before a sequence"):
        adapt(was.state_dict(), was, LearnedPosition(4, 9))


def test_positions_must_say_the_truth_of_their_grid():
    with pytest.raises(DoesNotFit, match="1 tokens before a grid of 3x4 are not 12 tokens"):
        LearnedPosition(4, 12, grid=(3, 4), prefix=1)


# image size

def test_positions_of_a_vit_follow_the_image():
    torch.manual_seed(1)
    was = moved("vit/nano")
    was.embedding.position.table.data[:, 1:] = 2 * smooth((7, 7), 64)
    model, rows = adapted(was, img_size=56)
    assert rows == {"embedding.position.table": Row("embedding.position.table", (1, 50, 64), (1, 197, 64),
                    "interpolated bicubically from 7x7 to 14x14, 1 prefix token kept")}
    images = F.interpolate(torch.randn(4, 3, 4, 4), size=28, mode="bicubic")
    larger = F.interpolate(images, size=56, mode="bicubic")
    with torch.no_grad():
        want = was.forward_features(images)
        same = model.forward_features(larger)
        model.embedding.position.table.data[:, 1:] = model.embedding.position.table.data[:, 1:].flip(1)
        wrong = model.forward_features(larger)

    def coarse(tokens):
        return F.avg_pool2d(tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14)), 2).flatten(2).transpose(1, 2)

    assert correlation(coarse(same), want[:, 1:]) > 0.95
    assert correlation(coarse(wrong), want[:, 1:]) < 0.9


@pytest.mark.parametrize("size", [(28, 56), (16, 20), 8])
def test_images_of_other_sides(size):
    model, rows = adapted(moved("vit/nano", pool="mean"), img_size=size)
    h, w = (size, size) if isinstance(size, int) else size
    assert rows["embedding.position.table"].after == (1, h * w // 16, 64)
    assert model(model.example(2)).isfinite().all()


def test_turning_the_image_turns_the_table():
    was = moved("vit/nano", img_size=(16, 32))
    was.embedding.position.table.data[:, 1:] = smooth((4, 8), 64)
    model, rows = adapted(was, img_size=(32, 16))
    assert rows["embedding.position.table"].before == rows["embedding.position.table"].after
    made, want = (t.view(8, 4, 64)[1:-1, 1:-1] for t in (model.embedding.position.table[0, 1:], smooth((8, 4), 64)))
    assert_close(made, want, atol=0.05, rtol=0)


@pytest.mark.parametrize(("options", "tables"), [
    ({"img_size": 16}, {1: (49, 4)}),  # the second stage has 4x4 tokens: one window of its size
    ({"img_size": 8}, {0: (49, 2), 1: (9, 4)}),
    ({"img_size": (28, 12)}, {0: (13 * 11, 2), 1: (13 * 5, 4)}),
    ({"img_size": 96, "window": 12}, {0: (23**2, 2), 1: (23**2, 4)}),
    ({"img_size": 56}, {}),  # windows stay
])
def test_windows_of_a_swin(options, tables):
    was = moved("swin/nano")
    model, rows = adapted(was, **options)
    assert {n: r.after for n, r in rows.items()} == {
        f"stages.{s}.layers.{i}.mixer.inner.bias.table": shape for s, shape in tables.items() for i in range(2)}
    assert model(model.example(2)).isfinite().all()
    back, _ = adapted(model, **{k: {"img_size": 28, "window": 7}[k] for k in options})
    shapes = {k: v.shape for k, v in was.state_dict().items()}
    assert {k: v.shape for k, v in back.state_dict().items()} == shapes


# patches and channels

@pytest.mark.parametrize("sides", [((4, 4), (8, 8)), ((4, 4), (5, 7)), ((3, 5), (3, 9)), ((1, 1), (4, 4))])
def test_enlarged_patches_give_the_same_tokens(sides):
    (h, w), new = sides
    weight, patches = torch.randn(8, 3, h, w), torch.randn(10, 3, h, w)
    larger = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    made = refit_kernel(weight, (8, 3, *new)).tensor
    assert_close(F.conv2d(larger, made), F.conv2d(patches, weight), atol=1e-4, rtol=1e-4)


def test_smaller_patches_give_the_nearest_tokens():
    weight = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    made = refit_kernel(weight, (8, 3, 4, 4)).tensor
    line = F.interpolate(torch.eye(6, dtype=torch.float64)[None, None], size=(4, 6), mode="bicubic", antialias=True)[0, 0]
    want = torch.linalg.lstsq(torch.kron(line, line).t(), weight.flatten(2).flatten(0, 1).t()).solution.t()
    assert_close(made.flatten(2).flatten(0, 1), want)


def test_a_vit_of_larger_patches_answers_the_same():
    was = moved("vit/nano")
    model, rows = adapted(was, patch=8, img_size=56)
    assert list(rows) == ["embedding.proj.weight"]
    assert rows["embedding.proj.weight"].how == "resized from 4x4 to 8x8 by pseudo-inverse"
    images = torch.randn(2, 3, 28, 28)
    patches = images.unflatten(3, (7, 4)).unflatten(2, (7, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    larger = F.interpolate(patches, size=8, mode="bicubic", antialias=True)
    larger = larger.view(2, 7, 7, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 56, 56)
    assert_close(model(larger), was(images), atol=1e-4, rtol=1e-4)


def test_patch_and_image_and_channels_and_classes_at_once():
    was = moved("vit/nano")
    model, rows = adapted(was, patch=(4, 2), img_size=(32, 28), in_chans=1, num_classes=10)
    assert set(rows) == {"embedding.proj.weight", "embedding.position.table", "head.weight", "head.bias"}
    assert rows["embedding.proj.weight"].how == "3 channels folded to 1, resized from 4x4 to 4x2 by pseudo-inverse"
    assert rows["embedding.position.table"].how == "interpolated bicubically from 7x7 to 8x14, 1 prefix token kept"
    assert model(torch.randn(2, 1, 32, 28)).shape == (2, 10)


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_equal_channels_give_the_same_answer(old, new, axes):
    weight = torch.randn(5, old, *(2,) * axes)
    made = fold_channels(weight, new)
    assert made.shape == (5, new, *(2,) * axes)
    assert_close(made.sum(1), weight.sum(1))


def test_channels_are_folded_and_shared_out():
    r, g, b = torch.randn(3, 4, 1).unbind()
    weight = torch.stack((r, g, b), dim=1)
    assert_close(fold_channels(weight, 1), torch.stack((r + g + b,), dim=1))
    assert_close(fold_channels(weight, 2), torch.stack((r + b, g), dim=1))
    assert_close(fold_channels(weight, 4), torch.stack((r / 2, g, b, r / 2), dim=1))
    assert_close(fold_channels(weight, 6), weight.repeat(1, 2, 1) / 2)


@pytest.mark.parametrize("name", ["vit/nano", "swin/nano", "poolformer/nano"])
@pytest.mark.parametrize("channels", [1, 5])
def test_a_grey_image_gets_the_same_answer(name, channels):
    was = moved(name)
    model, rows = adapted(was, in_chans=channels)
    assert list(rows) == ["embedding.proj.weight"]
    grey = torch.randn(2, 1, 28, 28)
    assert_close(model(grey.expand(-1, channels, -1, -1)), was(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_channels_of_a_hybrid():
    was = moved("vit/nano", stem_layers=(), img_size=32, patch=2)
    grey = torch.randn(2, 1, 32, 32)
    model, rows = adapted(was, in_chans=6)
    assert rows["embedding.stem.conv.weight"].how == "3 channels shared out to 6, then standardised anew"
    assert_close(model(grey.expand(-1, 6, -1, -1)), was(grey.expand(-1, 3, -1, -1)), atol=1e-3, rtol=1e-3)
    model, _ = adapted(was, in_chans=1)
    assert correlation(model(grey), was(grey.expand(-1, 3, -1, -1))) > 0.9


class Tubes(nn.Module):
    """Patches of a video, or of an image where depth is 0, as a user may write it; the same class embeds both."""

    def __init__(self, depth, patch=4):
        super().__init__()
        self.proj = (nn.Conv3d(3, 8, (depth, patch, patch), (depth, patch, patch)) if depth
                     else nn.Conv2d(3, 8, patch, patch))

    def refit(self, name, tensor, was):
        return refit_kernel(tensor, self.proj.weight.shape) if name == "proj.weight" else None


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_still_video_gets_the_tokens_of_its_image(depth):
    image, video = Tubes(0), Tubes(depth)
    state, rows = adapt(image.state_dict(), image, video)
    fill(video, state, "the video's state")
    assert [r.how for r in rows] == [f"repeated over {depth} steps of time and divided by them"]
    x = torch.randn(2, 3, 8, 8)
    still = x[:, :, None].expand(-1, -1, depth, -1, -1)
    assert_close(video.proj(still)[:, :, 0], image.proj(x))
    video.proj.weight.data.add_(torch.randn_like(video.proj.weight))
    state, rows = adapt(video.state_dict(), video, image)
    fill(image, state, "the image's state")
    assert [r.how for r in rows] == [f"summed over {depth} steps of time"]
    assert_close(video.proj(still)[:, :, 0], image.proj(x))


def test_an_image_embedding_becomes_a_video_embedding_of_other_patches_and_channels():
    weight = torch.randn(8, 3, 4, 4)
    made, how, _ = refit_kernel(weight, (8, 1, 2, 6, 6))
    grey = torch.randn(5, 1, 4, 4)
    larger = F.interpolate(grey, size=6, mode="bicubic", antialias=True)[:, :, None].expand(-1, -1, 2, -1, -1)
    want = F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    assert_close(F.conv3d(larger, made).flatten(1), want.flatten(1), atol=1e-4, rtol=1e-4)
    assert how == ("repeated over 2 steps of time and divided by them, 3 channels folded to 1, "
                   "resized from 2x4x4 to 2x6x6 by pseudo-inverse")


# classes

@pytest.mark.parametrize("name", ["vit/nano", "swin/nano", "poolformer/nano", "flatformer/nano"])
def test_a_new_head_for_other_classes(name):
    was = moved(name)
    torch.manual_seed(5)
    model, rows = adapted(was, num_classes=7)
    torch.manual_seed(5)
    fresh = fm.create_model(name, num_classes=7)
    assert model.head.weight.equal(fresh.head.weight)
    assert rows["head.bias"] == Row("head.bias", tuple(was.head.bias.shape), (7,),
                                    f"new: 7 classes instead of {was.num_classes}")
    assert set(rows) == {"head.weight", "head.bias"}
    features, rows = adapted(model, num_classes=0)
    assert rows["head.bias"] == Row("head.bias", (7,), None, "left out: features instead of 7 classes")
    batch = was.example(2)
    assert_close(model.head(features(batch)), model(batch))
    model, rows = adapted(features, num_classes=3)
    assert rows["head.weight"] == Row("head.weight", None, (3, features.num_features), "new: 3 classes instead of features")


def test_a_segmenter_around_a_backbone():
    was = LinearSegmenter(num_classes=11)
    model = LinearSegmenter(num_classes=4, in_chans=1, img_size=16)
    state, rows = adapt(was.state_dict(), was, model)
    fill(model, state, "the segmenter")
    assert {r.name.split(".")[0] for r in rows} == {"heads", "trunk"}
    assert model(torch.randn(2, 1, 16, 16)).shape[:2] == (2, 4)


@pytest.mark.parametrize("name", [n for n, e in systems().items() if e.card.kind == "backbone"])
def test_every_backbone_takes_other_channels_classes_and_sizes(name):
    was = moved(f"{name}/nano")
    size = 2 * was.img_size[0]
    model, rows = adapted(was, in_chans=1, num_classes=5, img_size=size)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 5)
    assert any("head" in row and "5 classes instead of" in rows[row].how for row in rows)


# text

def test_a_shorter_context_answers_the_same():
    was = moved("gpt/nano")
    model, rows = adapted(was, context=32)
    assert rows["position.table"].how == f"the first 32 of {was.context} positions kept"
    ids = torch.randint(was.vocab, (2, 32))
    assert_close(model(ids), was(ids))


@pytest.mark.parametrize("name", ["gpt/nano", "bert/nano"])
def test_a_longer_context_only_on_request(name):
    was = moved(name)
    n = was.context
    with pytest.raises(DoesNotFit, match=f"position.table is .*{n}, .*{2 * n}.*context={2 * n}.*only if you say grow=True"):
        adapted(was, context=2 * n)
    model, rows = adapted(was, grow=True, context=2 * n)
    assert rows["position.table"].how == f"interpolated bicubically from {n} to {2 * n}"
    assert model(model.example(1)).isfinite().all()


@pytest.mark.parametrize(("name", "tables"), [
    ("gpt/nano", ["token.weight"]), ("gpt/nano:tie=false", ["token.weight", "head.weight"]),
    ("bert/nano", ["token.weight"]),
])
def test_a_larger_vocabulary_only_on_request(name, tables):
    was = moved(name)
    v = was.vocab
    with pytest.raises(DoesNotFit, match=rf"token.weight is \({v}, .*\({v + 4}, .*4 rows appended.*grow=True"):
        adapted(was, vocab=v + 4)
    model, rows = adapted(was, grow=True, vocab=v + 4)
    assert list(rows) == tables
    for table in tables:
        old, new = was.state_dict()[table], model.state_dict()[table]
        assert new[:v].equal(old)
        assert_close(new[v:], old.mean(0).expand(4, -1))
    ids = torch.randint(v, (2, 16))
    assert_close(model(ids)[..., :v], was(ids)[..., :v])
    with pytest.raises(DoesNotFit, match="a smaller vocabulary leaves 1 tokens of the text without a row"):
        adapted(was, grow=True, vocab=v - 1)


def test_both_vocabularies_of_an_encoder_decoder():
    was = moved("transformer/nano", tie="none")
    model, rows = adapted(was, grow=True, vocab=was.vocab + 1, source_vocab=was.source_vocab + 2)
    assert {n: r.after[0] - r.before[0] for n, r in rows.items()} == {
        "source_token.weight": 2, "token.weight": 1, "head.weight": 1}
    source, target = was.example(2)
    assert_close(model((source, target))[..., :-1], was((source, target)))


# what is refused, and the edges

@pytest.mark.parametrize(("name", "changes", "said"), [
    ("vit/nano", {"dim": 32}, r"\(1, 1, 64\) in the file and \(1, 1, 32\) in the model asked for \(dim=32\): no part of "
                           "the model says how to change its size"),
    ("vit/nano", {"depth": 3}, r"stages.0.layers.3.* \(192, 64\) in the file and absent.* \(depth=3\).* leave it out"),
    ("vit/nano", {"depth": 5}, r"stages.0.layers.4.* is absent in the file and \(192, 64\).* \(depth=5\).* make it up"),
    ("vit/nano", {"pool": "mean"}, r"embedding.position.table is \(1, 50, 64\).*\(1, 49, 64\).*pool='mean'"),
    ("vit/nano", {"dim": 32}, "What a ViT can be adapted in: img_size, in_chans, num_classes, patch$"),
    ("vit/nano", {"residual": "pre_norm(layer_scale=0.1)"}, r"mixer.scale is absent.* \(64,\).*\(residual='pre_norm"),
    ("poolformer/nano", {"layer_scale": None}, r"mixer.scale is \(48,\) in the file and absent.*layer_scale=None"),
    ("poolformer/nano", {"stride": 4}, r"embedding.proj.weight is \(48, 3, 3, 3\).*\(48, 3, 7, 7\).*stride=4"),
    ("swin/nano", {"heads": (4, 8)}, r"bias.table is \(169, 2\).*\(169, 4\) in the model asked for \(heads\).*"
                                     "can be adapted in: img_size, in_chans, num_classes, patch, window$"),
    ("gpt/nano", {"dim": 32}, "What a GPT can be adapted in: context, vocab$"),
])
def test_what_makes_another_model_is_refused(name, changes, said):
    with pytest.raises(DoesNotFit, match=said):
        adapted(moved(name), **changes)


def test_nothing_changes_where_nothing_is_asked():
    was = moved("swin/nano")
    state, rows = adapt(was.state_dict(), was, fm.create_model("swin/nano"))
    assert rows == []
    assert all(t is state[k] or t.equal(state[k]) for k, t in was.state_dict().items())
    assert list(state) == list(was.state_dict())


def test_the_model_that_was_may_be_an_outline():
    real = moved("vit/nano")
    with torch.device("meta"):
        was = fm.create_model("vit/nano")
    model = fm.create_model("vit/nano", img_size=32, in_chans=4)
    state, rows = adapt({k: t.half() for k, t in real.state_dict().items()}, was, model)
    assert {t.dtype for t in state.values()} == {torch.float16}
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert {r.name for r in rows} == {"embedding.proj.weight", "embedding.position.table"}


def test_tensors_that_are_missing_or_unknown_are_left_to_the_caller():
    was = moved("vit/nano")
    state = was.state_dict() | {"extra": torch.ones(2)}
    del state["embedding.cls"]
    made, _ = adapt(state, was, fm.create_model("vit/nano", img_size=32))
    assert set(made) == set(state)
    assert made["extra"].equal(torch.ones(2))


def test_tensors_of_another_model_than_is_said_are_refused():
    was, other = moved("vit/nano"), moved("vit/nano", img_size=32)
    with pytest.raises(BadCheckpoint, match=r"embedding.position.table is \(1, 65, 64\), but \(1, 50, 64\) in the model"):
        adapt(other.state_dict(), was, fm.create_model("vit/nano", img_size=56))
    with pytest.raises(BadCheckpoint, match=r"embedding\.cls is \(1, 1, 64\), but absent in the model"):
        adapt(was.state_dict(), fm.create_model("vit/nano", pool="mean"), was)


class Doubling(LearnedPosition):
    """A position of a user's that changes in its own way."""

    def refit(self, name, tensor, was):
        return None if self.tokens == was.tokens else Change(tensor.repeat_interleave(2, 1), "every place twice")


def test_a_part_of_a_user_says_itself_how_it_changes():
    was, model = (PatchEmbed(3, 8, patch=4, img_size=size, position=spec(Doubling)) for size in ((8, 16), (8, 32)))
    state, rows = adapt(was.state_dict(), was, model)
    fill(model, state, "the embedding")
    assert rows == [Row("position.table", (1, 8, 8), (1, 16, 8), "every place twice")]
    zeros = torch.zeros(1, 3, 8, 32)
    tokens = model(zeros, Ctx())[0]
    assert_close(tokens[:, ::2], was(zeros[..., :16], Ctx())[0])


# from a file

def foreign(model, layout):
    """The state dict of a model in the names of others."""
    name = model.recipe["name"]
    return find(name.split("/")[0]).module.KEYS[layout].convert(model.state_dict(), back=True).state


@pytest.mark.parametrize("options", [
    {"img_size": 56}, {"img_size": (32, 56)}, {"in_chans": 1}, {"num_classes": 10}, {"num_classes": 0},
    {"patch": 8, "img_size": 56}, {"img_size": 32, "in_chans": 1, "num_classes": 10, "patch": 8}])
@pytest.mark.parametrize("layout", ["ours", "timm"])
def test_load_adapts_a_vit(tmp_path, layout, options):
    was = moved("vit/nano")
    if layout == "ours":
        fm.save(was, tmp_path / "file.safetensors")
        loaded, report = fm.load(tmp_path / "file.safetensors", report=True, **options)
    else:
        save_file({k: t.contiguous() for k, t in foreign(was, layout).items()}, tmp_path / "file.safetensors")
        loaded, report = fm.load(tmp_path / "file.safetensors", "vit", heads=4, report=True, **options)
    expected, rows = adapted(was, **options)
    kept = {k: t for k, t in expected.state_dict().items() if not k.startswith("head.") or "num_classes" not in options}
    assert all(loaded.state_dict()[k].equal(t) for k, t in kept.items())
    assert loaded.recipe["changes"] == fm.create_model("vit/nano", **options).recipe["changes"]
    assert loaded(loaded.example(2)).isfinite().all()
    for row in rows.values():
        assert row.how in str(report)
    fm.save(loaded, tmp_path / "adapted.safetensors")  # whose recipe is that of the new size
    again = fm.load(tmp_path / "adapted.safetensors")
    x = loaded.example(1)
    assert_close(again(x), loaded(x))


@pytest.mark.parametrize("options", [{"window": 12, "img_size": 96, "in_chans": 1}, {"img_size": 16}, {"img_size": 64}])
def test_load_adapts_a_swin(options):
    was = moved("swin/nano")
    loaded = fm.load(foreign(was, "timm"), "swin", **options)
    expected, _ = adapted(was, **options)
    x = expected.example(2)
    assert_close(loaded(x), expected(x))


def test_load_grows_a_text_model_only_on_request(tmp_path):
    was = moved("gpt/nano")
    fm.save(was, tmp_path / "file.safetensors")
    with pytest.raises(DoesNotFit, match="grow=True"):
        fm.load(tmp_path / "file.safetensors", context=2 * was.context)
    loaded = fm.load(tmp_path / "file.safetensors", context=2 * was.context, vocab=was.vocab + 3, grow=True)
    assert loaded.token.weight[:was.vocab].equal(was.token.weight)
    assert loaded.position.table.shape[1] == 2 * was.context


def test_load_refuses_another_width(tmp_path):
    fm.save(moved("vit/nano"), tmp_path / "file.safetensors")
    with pytest.raises(DoesNotFit, match=r"dim=32.*What a ViT can be adapted in: img_size"):
        fm.load(tmp_path / "file.safetensors", dim=32)
