"""k-means cross-attention against its definition; the losses against plain sums; the authors' answers, names and losses."""

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from contract import CHECKS, Case
from formarium.core.build import create_model
from formarium.core.ctx import Place
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.registry import find
from formarium.core.spec import spec
from formarium.papers.dense.kmax_deeplab import (
    KEYS,
    PRESETS,
    AxialAttention,
    BatchNorm,
    KMeansLayer,
    Prediction,
    ResNet,
    _exact_product,
    assign,
    class_loss,
    draw,
    likeness_loss,
    mask_loss,
    match,
    region_loss,
    semantic_loss,
    settings,
    shrink,
)
from formarium.skeletons.segmenter import VOID, LinearSegmenter, Thresholds, _connected, _merge
from formarium.weights.fit import nearest_preset
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


# k-means

@pytest.mark.parametrize("assignment", ["kmeans", "softmax"])
def test_layer_by_pixel(assignment):
    """The update, pixel by pixel: forward and backward. Then self-attention and MLP, written out."""
    layer = randomised(KMeansLayer(12, Place(), pixels=20, num_classes=3, hidden=24, embed=6, heads=3,
                                   assignment=assignment)).double().eval()
    queries = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    pixels = torch.randn(2, 20, 3, 4, dtype=torch.float64, requires_grad=True)

    def naive():
        c, p = layer.query_in(queries.mT), layer.pixel_in(F.gelu(pixels))
        seen = layer.predictor(c, c, p)
        value, logits = layer.pixel_value(p), seen.masks
        sums = []
        for b in range(2):
            own = [torch.zeros(12, dtype=torch.float64) for _ in range(5)]
            for y in range(3):
                for x in range(4):
                    for q in range(5):
                        if assignment == "softmax":
                            weight = logits[b, q, y, x].exp() / logits[b, q].exp().sum()
                            own[q] = own[q] + weight * value[b, :, y, x]
                        elif logits[b, :, y, x].argmax() == q:
                            own[q] = own[q] + value[b, :, y, x]
            sums.append(torch.stack(own, dim=1))
        x = queries.mT + layer.update(layer.update_norm(torch.stack(sums)))
        q, k, v = (t.unflatten(1, (3, -1)) for t in layer.qkv(c).split((6, 6, 12), dim=1))
        found = torch.stack([torch.stack([
            v[b, h] @ layer.attention.score_norm((q[b].mT @ k[b])[None])[0, h].softmax(-1).mT for h in range(3)])
            for b in range(2)])
        x = F.gelu(x + layer.proj(F.gelu(layer.attention.out_norm(found.flatten(1, 2)))))
        return F.gelu(x + layer.fc2(layer.fc1(x))).mT, *seen

    fast, seen = layer(queries, pixels)
    slow = naive()
    assert_close((fast, *seen), slow, atol=1e-6, rtol=1e-6)  # the sums are made in float32
    inputs = [queries, pixels, *layer.parameters()]
    grads = [torch.autograd.grad(sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outs), inputs)
             for outs in ((fast, *seen), slow)]
    assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_assignments():
    logits = torch.randn(2, 5, 30, requires_grad=True)
    hard = assign(logits, "kmeans")
    assert not hard.requires_grad
    assert torch.equal(hard.sum(1), torch.ones(2, 30))
    assert torch.equal(hard.argmax(1), logits.argmax(1))
    soft = assign(logits, "softmax")
    assert soft.requires_grad
    assert_close(soft.sum(2), torch.ones(2, 5))


def test_mixed_precision():
    """The sums over the pixels and the losses are made in float32 all the same."""
    a, b = torch.randn(2, 3, 900), torch.rand(2, 900, 4)
    model = create_model("kmax_deeplab/nano").train()
    x = model.example(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert_close(_exact_product(a, b), (a.double() @ b.double()).float(), atol=1e-3, rtol=1e-4)
        answer = model(x, supervised=True)
        assert answer.layers[-1].masks.dtype == torch.bfloat16
        loss = model.criterion(answer, truth_of(2, 32, 32, 11))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_starts_void():
    """At the start a query is of no class with a probability of 0.9."""
    found = create_model("kmax_deeplab/nano").eval()(torch.randn(2, 3, 32, 32)).classes.softmax(-1)
    assert_close(found[..., -1].mean().item(), 0.9, atol=0.01, rtol=0)


def test_axial_attention_by_cell():
    layer = randomised(AxialAttention(6, key=4, value=8, heads=2)).double().eval()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    q, k, v = (t.unflatten(1, (2, -1)) for t in layer.qkv(x).split((4, 4, 8), dim=1))
    scale, shift = layer.score_norm.weight / (1 + 1e-3) ** 0.5, layer.score_norm.bias
    out = torch.zeros(3, 16, 5, dtype=torch.float64)
    for b in range(3):
        for h in range(2):
            for i in range(5):
                row = []
                for j in range(5):
                    key, place = k[b, h, :, j], j - i + 254
                    kinds = (q[b, h, :, i] @ key, q[b, h, :, i] @ layer.of_query[place], key @ layer.of_key[place])
                    row.append(sum(s * scale[2 * n + h] + shift[2 * n + h] for n, s in enumerate(kinds)))
                weights = torch.stack(row).softmax(0)
                out[b, 4 * h:4 * h + 4, i] = v[b, h] @ weights
                out[b, 8 + 4 * h:12 + 4 * h, i] = weights @ layer.of_value[torch.arange(5) - i + 254]
    out = out * (layer.out_norm.weight / (1 + 1e-3) ** 0.5)[:, None] + layer.out_norm.bias[:, None]
    assert_close(layer(x), out[:, :8] + out[:, 8:])
    with pytest.raises(DoesNotFit, match="positions for 255 cells, got 256"):
        layer(torch.randn(1, 6, 256, dtype=torch.float64))


def test_batch_norm():
    """As PyTorch's, but that one value a channel neither fails nor counts."""
    own, theirs = randomised(BatchNorm(4)), torch.nn.BatchNorm1d(4, eps=1e-3, momentum=0.01)
    theirs.load_state_dict(own.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    for _ in range(3):
        x = torch.randn(5, 4, 6)
        assert_close(own(x), theirs(x))
    assert_close(own.running_var, theirs.running_var)
    before = own.running_var.clone()
    assert own(torch.randn(1, 4, 1)).isfinite().all()
    assert torch.equal(own.running_var, before)


def test_drop_path():
    """Changes training alone (with batch norms at rest, as they differ in training too)."""
    plain, dropping = (Case("kmax_deeplab/nano", find("kmax_deeplab")).build(drop_path=rate).eval() for rate in (0.0, 0.5))
    x = plain.example(4)
    assert_close(plain(x), dropping(x), atol=0, rtol=0)
    dropping.train()
    for module in dropping.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    assert not torch.equal(dropping(x).classes, plain(x).classes)


# the baseline and the ablation answer the same contract

CHECKED = ["builds_and_answers", "every_parameter_learns", "independent_of_the_batch", "save_and_load", "other_sizes",
           "other_channels_and_classes", "semantic_probabilities", "criterion_teaches", "answers_agree"]
OTHERS = [("linear", check) for check in CHECKED] + [
    (name, check) for name in ("nano:assignment=softmax", "nano:backbone=poolformer/nano")
    for check in [*CHECKED, "gradient_checkpointing", "panoptic_segments"]]


@pytest.mark.parametrize(("name", "check"), OTHERS)
def test_contract_of_others(name, check):
    CHECKS[check].run(Case(f"kmax_deeplab/{name}", find("kmax_deeplab")))


def test_linear_segmenter_is_linear_in_its_maps():
    model = randomised(LinearSegmenter(backbone="poolformer/nano")).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.trunk.features(x)
    assert len(maps) == 2
    normed = [F.layer_norm(f.map.movedim(1, -1), (f.map.shape[1],), n.weight, n.bias, 1e-6)
              for f, n in zip(maps, model.norms, strict=True)]
    fine, coarse = (torch.einsum("bhwc,kc->bkhw", t, h.weight) for t, h in zip(normed, model.heads, strict=True))
    coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
    assert_close(model(x), fine + coarse + model.heads[0].bias[:, None, None])


def test_dense_logits_connect_things():
    labels = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [2, 0, 2, 0]])
    segments, classes = _connected(labels, (1,))
    assert classes == [0, 1, 1, 2]
    assert torch.equal(segments, torch.tensor([[2, 2, 1, 3], [1, 1, 1, 3], [4, 1, 4, 1]]))


# panoptic maps

def slowly(scores, masks, things, least):
    """Region by region, pixel by pixel."""
    q, h, w = masks.shape
    inside = [[(y, x) for y in range(h) for x in range(w) if masks[i, y, x] > least.pixel] for i in range(q)]
    mean = [sum(masks[i, y, x].item() for y, x in inside[i]) / max(1, len(inside[i])) for i in range(q)]
    rank = sorted(range(q), key=lambda i: -scores[i].max().item() * mean[i] ** least.power)
    taken, classes, stuff = {}, [], {}
    for i in rank:
        k = int(scores[i].argmax())
        free = [c for c in inside[i] if c not in taken]
        if scores[i, k] > (least.thing if k in things else least.stuff) and len(free) > least.overlap * len(inside[i]):
            if k in things:
                classes.append(k)
                number = len(classes)
            else:
                if k not in stuff:
                    classes.append(k)
                    stuff[k] = len(classes)
                number = stuff[k]
            taken |= dict.fromkeys(free, number)
    return torch.tensor([[taken.get((y, x), 0) for x in range(w)] for y in range(h)]), classes


def test_merging_by_pixel():
    found = 0
    for least in (Thresholds(), Thresholds(0.3, 0.2, 0.3, 0.3, 0.0)):
        for _ in range(10):
            scores = (4 * torch.randn(12, 8)).softmax(-1)[:, :-1]
            masks = F.interpolate(6 * torch.randn(1, 12, 4, 4), size=(9, 11), mode="bilinear")[0].softmax(0)
            fast, slow = _merge(scores, masks, (0, 1, 2), least), slowly(scores, masks, (0, 1, 2), least)
            assert torch.equal(fast[0], slow[0])
            assert fast[1] == slow[1]
            found += len(fast[1])
    assert found > 40


# the criterion

def prediction(b=2, q=6, k=4, h=7, w=9, e=5):
    return Prediction(torch.randn(b, q, k + 1), 2 * torch.randn(b, q, h, w), F.normalize(torch.randn(b, e, h, w), dim=1))


def truth_of(b, h, w, k):
    """Blocks of segments, fewer in the second image, with void at the top and in a band."""
    y, x = torch.arange(h)[:, None], torch.arange(w)
    number = torch.stack([(y * 3 // h * 4 + x * 4 // w) // (1 + i) for i in range(b)])
    label = (number * 5 + torch.arange(b)[:, None, None]) % k
    void = ((y < 7) | ((x > 20) & (x < 27))).expand_as(number)
    return torch.stack((label.masked_fill(void, VOID), number.masked_fill(void, VOID)), dim=1)


def small_truth(p, k=4):
    b, _, h, w = p.masks.shape
    number = torch.randint(5, (b, 3, 3)).repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :h, :w]
    number[:, 0] = VOID
    label = torch.where(number == VOID, VOID, (number * 3) % k)
    return torch.stack((label, number), dim=1)


def test_matching_is_the_best_of_all():
    """Of a small problem every assignment is tried."""
    p = prediction(b=1, q=5)
    truth = small_truth(p)
    target = match(p, truth)
    ids = [i for i in truth[0, 1].unique().tolist() if i != VOID]
    inside = torch.stack([(truth[0, 1] == i).float() for i in ids])
    regions = p.masks[0].softmax(0) * inside.sum(0)
    labels = [int(truth[0, 0][truth[0, 1] == i][0]) for i in ids]
    dice = torch.tensor([[2 * (r * m).sum() / (r.sum() + m.sum() + 2e-5) for m in inside] for r in regions])
    gain = dice * p.classes[0].softmax(-1)[:, labels]
    best = max(permutations(range(5), len(ids)), key=lambda order: sum(gain[q, s] for s, q in enumerate(order)))
    for s, q in enumerate(best):
        assert torch.equal(target.masks[0, q], inside[s].flatten())
        assert target.labels[0, q] == labels[s]
        assert_close(target.class_weight[0, q], dice[q, s])
    assert sorted(set(range(5)) - set(best)) == (target.labels[0] == 4).nonzero().flatten().tolist()
    assert torch.equal(target.void[0], (truth[0, 1] == VOID).float().flatten())


def test_losses_by_sums():
    p = prediction()
    truth = small_truth(p)
    target = match(p, truth)
    masks = p.masks.flatten(2)
    classes, regions, dices = [], [], []
    for b in range(2):
        log_classes, log_regions = p.classes[b].log_softmax(-1), masks[b].log_softmax(0)
        own = [-(0.25 if target.labels[b, q] == 4 else 0.75) * target.class_weight[b, q]
               * log_classes[q, target.labels[b, q]] for q in range(6)]
        classes.append(sum(own) / 6)
        known = [n for n in range(63) if target.void[b, n] == 0]
        regions.append(sum(-log_regions[target.masks[b, :, n].argmax(), n] for n in known) / len(known))
        total = 0
        for q in range(6):
            r, m = masks[b].softmax(0)[q, known], target.masks[b, q, known]
            total += target.mask_weight[b, q] * (1 - (2 * (r * m).sum() + 1) / (r.sum() + m.sum() + 1))
        dices.append(0.75 * total / 6)
    assert_close(class_loss(p.classes, target), sum(classes) / 2)
    assert_close(region_loss(masks, target), sum(regions) / 2)
    assert_close(mask_loss(masks, target), sum(dices) / 2)

    pixels, likeness = p.pixels.flatten(2), []
    for b in range(2):
        rows = []
        for n in range(63):
            same = [m for m in range(63) if (target.masks[b, :, n] * target.masks[b, :, m]).sum() > 0]
            alike = (pixels[b].mT @ pixels[b, :, n] / 0.3).log_softmax(0)
            rows += [-alike[same].mean()] if same else []
        likeness.append(sum(rows) / len(rows))
    assert_close(likeness_loss(pixels, target, 63, 1.5), sum(likeness) / 2)
    logits = torch.randn(2, 5, 7, 9)
    plain = [F.cross_entropy(x[None], t[None, 0], ignore_index=VOID) for x, t in zip(logits, truth, strict=True)]
    for samples in (0, 63):
        assert_close(semantic_loss(logits, truth, target, samples, 2.0), sum(plain) / 2)


def test_drawing_prefers_small_segments_and_leaves_void():
    p = prediction(q=12)
    truth = torch.zeros(2, 2, 7, 9, dtype=torch.int64)
    truth[:, :, 0] = VOID
    truth[:, :, 3, 3:5] = 1
    target = match(p, truth)
    drawn = torch.stack([draw(target, 4, 1.5) for _ in range(200)])
    assert (drawn >= 9).all()
    assert all(len(set(row)) == 4 for row in drawn.flatten(0, 1).tolist())
    chosen = ((drawn == 30) | (drawn == 31)).any(-1).double().mean()
    even = torch.stack([draw(target, 4, 0.0) for _ in range(200)])
    assert chosen > 0.9 > 0.3 > ((even == 30) | (even == 31)).any(-1).double().mean()


def test_all_layers_share_the_last_matching_and_are_taught():
    model = Case("kmax_deeplab/nano", find("kmax_deeplab")).build().train()
    x = model.example(2)
    answer = model(x, supervised=True)
    assert len(answer.layers) == 3
    truth = truth_of(2, 32, 32, 11)
    loss = model.criterion(answer, truth)
    small = shrink(truth, answer.layers[-1].masks.shape[2:])
    target = match(answer.layers[-1], small)
    assert not any(t.requires_grad for t in target)
    grads = torch.autograd.grad(loss, [t for p in answer.layers for t in p])
    assert all(g.any() for g in grads)


def test_shrinking_keeps_corners_or_centres():
    truth = truth_of(1, 9, 13, 4)
    truth[:] = torch.arange(9 * 13).view(9, 13)
    assert torch.equal(shrink(truth, (5, 7))[0, 0], truth[0, 0, ::2, ::2])
    truth = torch.arange(8 * 12).view(1, 1, 8, 12).expand(1, 2, -1, -1)
    assert torch.equal(shrink(truth, (4, 6))[0, 0], truth[0, 0, 1::2, 1::2])
    assert torch.equal(shrink(truth, (8, 12)), truth)


# the authors' answers, names and sizes

@torch.no_grad()
def test_golden_layer():
    state, (pixels, queries), golden = replay(GOLDEN / "kmax_deeplab__transformer_layer.json.gz")
    layer = load(state, "kmax_deeplab")
    assert count_parameters(layer) == golden["parameters"]
    x, seen = layer(queries.mT, pixels)
    assert compare(golden, (x.mT, *seen)) < 1e-5
    layer.assignment = "softmax"
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, (layer(queries.mT, pixels)[0].mT, *seen))


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet_aspp", "convnext_stem"])
def test_golden_model_and_losses(name):
    """Trunk, decoders, semantic head; every loss of the final prediction, and the sum over all layers."""
    state, (x,), golden = replay(GOLDEN / f"kmax_deeplab__{name}.json.gz")
    model = load({**state, "backbone.stem.conv1.norm.num_batches_tracked": torch.tensor(3)}, "kmax_deeplab",
                 samples=(10**6, 10**6))
    assert count_parameters(model) == golden["parameters"]
    answer = model(x, supervised=True)
    final = answer.layers[-1]
    truth = truth_of(2, *x.shape[2:], model.num_classes)
    small = shrink(truth, final.masks.shape[2:])
    target = match(final, small)
    losses = torch.stack((
        class_loss(final.classes, target), region_loss(final.masks.flatten(2), target),
        mask_loss(final.masks.flatten(2), target), likeness_loss(final.pixels.flatten(2), target, 10**6, 1.5),
        semantic_loss(answer.semantic[0], small, target, 10**6, 2.0), model.criterion(answer, truth)))
    ours = [*final, *(t for p in answer.layers[:-1] for t in p), *answer.semantic, losses]
    assert compare(golden, ours) < 5e-5
    model.centers.copy_(model.centers.flip(0))
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, [*model(x, supervised=True).layers[-1], *ours[3:]])


@pytest.mark.parametrize("name", ["r50", "convnext_large_256", "r50_cityscapes", "convnext_large_cityscapes", "r50_ade20k"])
def test_their_files_name_the_preset(name):
    with torch.device("meta"):
        model = create_model(f"kmax_deeplab/{name}")
    state = {k: torch.empty(v.shape, device="meta") for k, v in model.state_dict().items()}
    theirs = KEYS["authors"].convert(state, back=True)
    assert theirs.unmatched == []
    assert all(k.startswith(("backbone.", "sem_seg_head.")) for k in theirs.state)
    back = KEYS["authors"].convert(theirs.state)
    assert back.unmatched == []
    assert nearest_preset("kmax_deeplab", settings(back.state, "authors")) == (f"kmax_deeplab/{name}", {})


@pytest.mark.parametrize("layers", [(0, 2), (1, 0, 2), (1, 2, 0, 1), (3,)])
def test_where_their_layers_stand(layers):
    model = create_model("kmax_deeplab/nano", backbone=spec(ResNet, width=8, layers=(1, 2, 1, 1)), bases=(16, 12, 8, 4),
                         depths=(1, 2, 1, 1), kinds=("axial", "axial", "bottleneck", "bottleneck"), layers=layers)
    randomised(model)
    loaded = load(KEYS["authors"].convert(model.state_dict(), back=True).state, "kmax_deeplab")
    assert loaded.levels == model.levels
    x = model.example(2)
    assert loaded(x).masks.isfinite().all()
    assert_close(loaded(x), model.eval()(x), atol=0, rtol=0)


def test_a_backbone_of_one_stage():
    """A ViT gives four maps of one size; the decoder has four stages."""
    model = create_model("kmax_deeplab/nano", backbone="vit/nano", img_size=28, in_chans=1, bases=(8,) * 4, depths=(1,) * 4,
                         kinds=("axial", "bottleneck") * 2, layers=(1, 0, 1))
    answer = model(model.example(2), supervised=True)
    assert len(answer.layers) == 3
    model.criterion(answer, truth_of(2, 28, 28, 11)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("name", "millions"), [
    ("r50", 57), ("convnext_tiny", 61), ("convnext_small", 83), ("convnext_base", 122), ("convnext_large", 232)])
def test_sizes_of_the_paper_leave_the_semantic_head_out(name, millions):
    with torch.device("meta"):
        model = create_model(f"kmax_deeplab/{name}")
        without = create_model(f"kmax_deeplab/{name}", semantic=None)
    assert count_parameters(without) == pytest.approx(millions * 1e6, rel=0.01)
    assert count_parameters(model) == count_parameters(without) + count_parameters(model.auxiliary)


def test_published_labels():
    ade, cityscapes = PRESETS["r50_ade20k"], PRESETS["r50_cityscapes"]
    assert len(ade["things"]) == 100
    assert math.prod(cityscapes["img_size"]) == 1025 * 2049


def test_refusals():
    state = {k: v for k, v in replay(GOLDEN / "kmax_deeplab__transformer_layer.json.gz")[0].items() if "qkv" not in k}
    with pytest.raises(BadCheckpoint, match="a tensor is missing"):
        load(state, "kmax_deeplab")
    for options, error, why in [
            ({"assignment": "kmean"}, UnknownName, "assignment 'kmean'; did you mean kmeans"),
            ({"kinds": ("axial", "bottle")}, UnknownName, "did you mean bottleneck"),
            ({"semantic": "aspp3"}, UnknownName, "did you mean aspp"),
            ({"depths": (1, 1, 1)}, DoesNotFit, "the backbone gives 2 maps.*got 2, 3, 2 and 1"),
            ({"layers": (1, 1, 1)}, DoesNotFit, "the backbone gives 2 maps"),
            ({"heads": 5}, DoesNotFit, "5 heads do not divide"),
            ({"backbone": "gpt/nano"}, DoesNotFit, "a segmenter reads the feature maps of a backbone")]:
        with pytest.raises(error, match=why):
            create_model("kmax_deeplab/nano", **options)
