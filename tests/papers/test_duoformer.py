"""DuoFormer against the authors' answers, cells counted by hand, any network below; torchvision's ResNet."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.core.spec import spec
from formarium.papers.backbones.duoformer import KEYS, ChannelToken, region_tokens
from formarium.parts.resnet import ResNet
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"layers": (1, 1, 1, 1), "width": 4}


def moved(module):
    """In float64, at parameters away from their start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double().eval()


@pytest.mark.parametrize(("variant", "layout"), [("duoformer_r50_3scales", "authors"),
                                                 ("multiscaleformer_3scales", "authors_former")])
@torch.no_grad()
def test_authors_answers(variant, layout):
    """Read, and written again with the norm whose result they drop."""
    state, inputs, golden = replay(GOLDEN / f"duoformer__{variant}.json.gz")
    model = load(state, *([] if layout == "authors_former" else ["duoformer"]))
    compare(golden, model(*inputs))
    theirs = KEYS[layout].convert(model.state_dict(), back=True)
    assert not theirs.unmatched
    assert all(torch.equal(theirs.state[k], t) for k, t in state.items() if "fc_norm" not in k)
    assert {k: t.shape for k, t in theirs.state.items() if "fc_norm" in k} == {
        k: t.shape for k, t in state.items() if "fc_norm" in k}


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_cells_of_a_region(factor):
    """Token n of region (r, c), by rows; of 2 x 2 by columns."""
    h, w = 2, 3
    x = torch.arange(h * w * factor**2).float().view(1, 1, h * factor, w * factor)
    tokens = region_tokens(x, factor)
    assert tokens.shape == (1, h * w, factor**2, 1)
    for r in range(h):
        for c in range(w):
            for n in range(factor**2):
                i, j = (n % 2, n // 2) if factor == 2 else (n // factor, n % factor)
                assert tokens[0, r * w + c, n, 0] == x[0, 0, r * factor + i, c * factor + j]


def naive(model, images):
    """Region by region, image by image; attention of the scale, then of the regions."""
    embed = model.embedding
    maps = [m.map for m in embed.trunk.features(images)]
    token = embed.token([*maps]) if isinstance(embed.token, ChannelToken) else None
    answers = []
    for b in range(len(images)):
        gathered = [model.stages[1].resample.cls[0, 0]]
        for r in range(embed.grid[0]):
            for c in range(embed.grid[1]):
                n = r * embed.grid[1] + c
                x = [embed.token[0, 0, 0] if token is None else token[b, n, 0]]
                for s in embed.used:
                    f, conv = embed.factors[s], embed.project[str(s)]
                    block = maps[s][b, :, r * f:(r + 1) * f, c * f:(c + 1) * f]
                    cells = (block.transpose(1, 2) if f == 2 else block).flatten(1).T
                    x += list(cells @ conv.weight.flatten(1).T + conv.bias)
                x = (torch.stack(x) + embed.position.table[0, 0])[None]
                for layer in model.stages[0].layers:
                    for sublayer in layer.values():
                        x = x + sublayer.inner(sublayer.norm(x), Ctx())
                gathered.append(x[0, 0])
        x = torch.stack(gathered)[None] + model.stages[1].resample.position.table
        for layer in model.stages[1].layers:
            for sublayer in layer.values():
                x = sublayer.inner(x, Ctx()) if model.bare else x + sublayer.inner(sublayer.norm(x), Ctx())
        answers.append(model.head(model.norm(x)[0, 0]))
    return torch.stack(answers)


@pytest.mark.parametrize("options", [
    {}, {"scales": 2, "scale_token": "random", "img_size": (12, 16)}, {"scales": 1, "patch_blocks": "pre_norm"}])
def test_naive_twin(options):
    """Forward and backward, square and not, both scale tokens, both kinds of global layers."""
    torch.manual_seed(0)
    model = moved(create_model("duoformer/nano", num_classes=5, **{"img_size": 12} | options))
    model.bare = "patch_blocks" not in options
    images = torch.randn(2, 3, *model.img_size, dtype=torch.float64, requires_grad=True)
    ours, theirs = model(images), naive(model, images)
    assert_close(ours, theirs)
    weight, inputs = torch.randn_like(ours), [images, *model.parameters()]
    assert_close(*[torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in (ours, theirs)])


def test_channel_token():
    """Of maps of 8, 4, 2 and 1 cells a region: two, one and no convolutions with stride 2, then the greatest of 2 x 2."""
    torch.manual_seed(0)
    token = ChannelToken([2, 3, 4, 5], [8, 4, 2, 1], 6).eval()
    assert [len(convs) for convs in token.down] == [2, 1, 0, 0]
    maps = [torch.randn(2, c, 3 * f, 3 * f) for c, f in zip((2, 3, 4, 5), (8, 4, 2, 1), strict=True)]
    out = token(maps)
    assert out.shape == (2, 9, 1, 6)
    for at in range(4):  # all of them count
        assert not torch.equal(token([m + 10 if i == at else m for i, m in enumerate(maps)]), out)


@pytest.mark.parametrize("backbone", ["poolformer/nano:stride=2", "swin/nano", spec(ResNet, **SMALL)])
def test_on_any_network(backbone):
    """Of the house, by name or as a Spec: what it gives are maps whose sides are multiples of the last one's."""
    name = backbone.split(":")[0] if isinstance(backbone, str) else backbone
    size = 32 if isinstance(name, str) else 64
    model = create_model("duoformer/nano", backbone=name, scales=2, img_size=size, num_classes=3).eval()
    assert model(model.example(2)).shape == (2, 3)
    maps = model.features(model.example(2))
    assert [f.map.shape[1] for f in maps] == [i.channels for i in model.feature_info]


def test_frozen():
    """A frozen network has no gradients and keeps its statistics; the rest is trained."""
    model = create_model("duoformer/nano", freeze=True, num_classes=3).train()
    before = {k: t.clone() for k, t in model.embedding.trunk.state_dict().items()}
    model(model.example(4)).sum().backward()
    assert all(p.grad is None for p in model.embedding.trunk.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.embedding.trunk.state_dict().items())
    assert model.embedding.token.norms[0].training
    assert all(p.grad is not None for n, p in model.named_parameters() if ".trunk." not in n)


def test_drop_path():
    """Acts in training alone; the contract's check asks for the same answers in training, which batch norms do not give."""
    torch.manual_seed(0)
    plain, dropping = (create_model("duoformer/nano", drop_path=rate) for rate in (0.0, 0.5))
    dropping.load_state_dict(plain.state_dict())
    batch = plain.example(4)
    assert torch.equal(plain.eval()(batch), dropping.eval()(batch))
    assert not torch.equal(plain.train()(batch), dropping.train()(batch))


def torchvision(model):
    """The state dict of a trunk in torchvision's names."""
    names = {"conv.weight": "conv1.weight"}
    state = {}
    for k, t in model.state_dict().items():
        if k.startswith("stages."):
            _, s, rest = k.split(".", 2)
            rest = rest.replace("conv0", "downsample.0").replace("norm0", "downsample.1").replace("norm", "bn")
            state[f"layer{int(s) + 1}.{rest}"] = t
        else:
            state[names.get(k, k.replace("norm", "bn1"))] = t
    return state | {"fc.weight": torch.ones(2, 2), "bn1.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("options", [SMALL, SMALL | {"bottleneck": False, "layers": (2, 1)}])
@torch.no_grad()
def test_resnet(options):
    """torchvision's names are read; each block by its equation."""
    torch.manual_seed(0)
    model, other = ResNet(**options).eval(), ResNet(**options)
    for t in model.state_dict().values():
        t.add_(0.1 * torch.rand_like(t))
    state = torchvision(model)
    other.read_torchvision(state)
    images = torch.randn(1, 3, 64, 64)

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    x = F.max_pool2d(norm(F.conv2d(images, state["conv1.weight"], None, 2, 3), "bn1").relu(), 3, 2, 1)
    for s, feature in enumerate(other.eval().features(images)):
        for u in range(options["layers"][s]):
            at, y, last = f"layer{s + 1}.{u}", x, 3 if options.get("bottleneck", True) else 2
            for i in range(1, last + 1):
                weight = state[f"{at}.conv{i}.weight"]
                strided = s > 0 and u == 0 and i == (2 if last == 3 else 1)
                y = norm(F.conv2d(y, weight, None, 2 if strided else 1, weight.shape[-1] // 2), f"{at}.bn{i}")
                y = y.relu() if i < last else y
            if f"{at}.downsample.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"], None, 2 if s else 1), f"{at}.downsample.1")
            x = (x + y).relu()
        assert_close(feature.map, x)
    del state["layer1.0.conv1.weight"]
    with pytest.raises(BadCheckpoint, match=r"not the tensors of a torchvision ResNet.*stages\.0\.0\.conv1\.weight"):
        other.read_torchvision(state)


@torch.no_grad()
def test_a_trunk_of_torchvision_names():
    """Files of the models on a self-supervised ResNet have its names in them."""
    model = create_model("duoformer/nano", backbone=spec(ResNet, **SMALL), img_size=64).eval()
    theirs = {k: t for k, t in KEYS["authors"].convert(model.state_dict(), back=True).state.items() if "tracked" not in k}
    called = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    renamed = {}
    for k, t in theirs.items():
        first, second, *rest = k.split(".")
        renamed[".".join([first, called[second], *rest]) if first == "resnet_projector" else k] = t
    batch = model.example(1)
    assert torch.equal(load(renamed, "duoformer", heads=4)(batch), model(batch))


def test_bad_inputs():
    with pytest.raises(DoesNotFit, match="maps of 3 scales, got scales=4"):
        create_model("duoformer/nano", scales=4)
    with pytest.raises(UnknownName, match="channels"):
        create_model("duoformer/nano", scale_token="channels")
    with pytest.raises(UnknownName, match="kind of patch blocks"):
        create_model("duoformer/nano", patch_blocks="plain")
    with pytest.raises(DoesNotFit, match=r"tokens of regions \(B, 4, 6, 24\), got \(1, 4, 5, 24\)"):
        create_model("duoformer/former_3", grid=(2, 2), tokens=6, dim=24, depth=1)(torch.randn(1, 4, 5, 24))
    with pytest.raises(DoesNotFit, match="no image"):
        create_model("duoformer/former_3", grid=(2, 2), tokens=6, dim=24, depth=1).features(torch.randn(1, 4, 6, 24))
