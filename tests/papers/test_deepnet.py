"""DeepNorm: its constants and start, 200 layers that learn, updates that do not grow with depth; the authors' answers."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import BadCheckpoint, DoesNotFit
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.language.gpt import GPT
from formarium.papers.language.transformer import Transformer
from formarium.papers.residuals.deepnet import KEYS, PART, DeepNetEncoder, DeepNorm
from formarium.parts.attention import Attention, CrossAttention
from formarium.parts.channel import Mlp, SwiGLU
from formarium.parts.position import LearnedPosition
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"


def schemes(model):
    return [m for m in model.modules() if isinstance(m, DeepNorm)]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 6), (18, 3)])
def test_constants_of_two_stacks(n, m):
    with torch.device("meta"):
        model = create_model("deepnet/nano", encoder_depth=n, decoder_depth=m)
    encoder, decoder = schemes(model.encoder), schemes(model.decoder)
    assert (len(encoder), len(decoder)) == (2 * n, 3 * m)
    for scheme in encoder:
        assert scheme.alpha == pytest.approx(0.81 * (n**4 * m) ** 0.0625)
        assert scheme.beta == pytest.approx(0.87 / (n**4 * m) ** 0.0625)
    for scheme in decoder:
        assert (scheme.alpha, scheme.beta) == pytest.approx(((3 * m) ** 0.25, (12 * m) ** -0.25))


@pytest.mark.parametrize("name", ["deepnet/nano_encoder", "gpt/nano:residual=deepnet", "vit/nano:residual=deepnet"])
@pytest.mark.parametrize("depth", [1, 12])
def test_constants_of_one_stack(name, depth):
    with torch.device("meta"):
        found = schemes(create_model(name, depth=depth))
    assert len(found) == 2 * depth
    for scheme in found:
        assert (scheme.alpha, scheme.beta) == pytest.approx(((2 * depth) ** 0.25, (8 * depth) ** -0.25))


def test_forward():
    scheme = PART(16, Place(depth=8), Mlp(16, Place())).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_close(scheme(x, Ctx()), F.layer_norm(2.0 * x + scheme.inner(x, Ctx()), (16,), eps=1e-6))


@pytest.mark.parametrize(("part", "gains"), [
    (spec(Attention, heads=4), {"qkv": (1, 1, 0), "proj": (0,)}),
    (spec(CrossAttention, heads=4), {"q": (1,), "kv": (1, 0), "proj": (0,)}),
    (spec(Mlp), {"fc1": (0,), "fc2": (0,)}),
    (spec(SwiGLU), {"fc1": (0,), "fc2": (0,)}),
], ids=str)
def test_start(part, gains):
    """Xavier's deviation, times beta for all but queries and keys; normal, not uniform; no bias."""
    dim, place = 256, Place(depth=32)
    scheme = PART(dim, place, part(dim, place))
    assert scheme.beta == 0.25
    for name, pieces in gains.items():
        layer = getattr(scheme.inner, name)
        for rows, is_score in zip(layer.weight.chunk(len(pieces)), pieces, strict=True):
            xavier = math.sqrt(2 / sum(rows.shape))
            assert rows.std().item() == pytest.approx(xavier * (1 if is_score else 0.25), rel=0.03)
            assert (rows.abs() > 3 * rows.std()).any()
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("name", ["gpt/nano:init_std=0.02", "gpt/nano", "vit/nano", "swin/nano:init_std=0.02",
                                  "poolformer/nano:init_std=0.02"])
def test_has_the_last_word(name):
    """What hosts do to the weights when they are built does not stay."""
    for scheme in schemes(create_model(name, residual="deepnet")):
        layers = [m for m in scheme.inner.modules() if isinstance(m, nn.Linear)]
        for layer in layers[-1:]:
            xavier = math.sqrt(2 / sum(layer.weight.shape))
            assert layer.weight.std().item() == pytest.approx(xavier * scheme.beta, rel=0.1)


# depth

def deep(residual, depth, seed=0):
    torch.manual_seed(seed)
    return create_model("deepnet/nano_encoder", vocab=16, context=8, dim=16, depth=depth, heads=2, residual=residual)


def copying(model, batch=16):
    ids = torch.randint(16, (batch, 8))
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def update(residual, depth, seed):
    """How far one step of gradient descent on the layers' weights moves the last tokens."""
    model, probe = deep(residual, depth, seed), torch.randint(16, (8, 8))
    with torch.no_grad():
        before = model.encode(*model.embed(probe))[0]
    copying(model).backward()
    weights = [p for p in model.stack.parameters() if p.ndim > 1]
    torch.optim.SGD(weights, lr=1e-3).step()
    with torch.no_grad():
        return (model.encode(*model.embed(probe))[0] - before).square().mean().sqrt().item()


def test_updates_are_bounded_at_any_depth():
    """Theorem 4.3's quantity: the same from 10 to 200 layers; after post-norm layers it is 100 times as large, and grows.
    Of the weights alone, as in the paper: biases and norms, which it leaves out, do add up."""
    found = {(r, n): [update(r, n, seed) for seed in range(3)] for r in ("deepnet", "post_norm") for n in (10, 50)}
    found["deepnet", 200] = [update("deepnet", 200, 0)]
    flat = [u for (r, _), us in found.items() if r == "deepnet" for u in us]
    assert max(flat) < 2 * min(flat)
    mean = {key: sum(us) / len(us) for key, us in found.items()}
    assert mean["post_norm", 50] > 10 * mean["post_norm", 10] > 300 * mean["deepnet", 10]


def test_200_layers_learn():
    """To copy tokens, in six steps, which 200 post-norm layers do not: they stay at chance."""
    losses = {}
    for residual in ("deepnet", "post_norm"):
        model = deep(residual, 200)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
        found = []
        for _ in range(6):
            loss = copying(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[residual] = found
    chance = math.log(16)
    assert all(math.isfinite(x) for found in losses.values() for x in found)
    assert losses["deepnet"][-1] < chance - 0.4
    assert min(losses["post_norm"]) > chance - 0.2


# the authors' answers and names

@torch.no_grad()
def test_golden_encoder():
    state, (ids,), golden = replay(GOLDEN / "deepnet__encoder_l6_d256.json.gz")
    model = load(state, "deepnet")
    assert isinstance(model, DeepNetEncoder)
    unused = 2 * 256  # positions, which begin at 2
    assert count_parameters(model) == golden["parameters"] - unused
    second = model.stack.intermediates(*model.embed(ids), taps=[1])[2][0]
    assert compare(golden, (model(ids), second)) < 1e-5
    state["layers.3.final_layer_norm.weight"] = state["layers.3.final_layer_norm.weight"] * 1.01
    with pytest.raises(AssertionError, match="output 0 differs by"):
        compare(golden, (load(state, "deepnet")(ids), second))


def their_layer(cross):
    attentions = ("self_attn", "encoder_attn") if cross else ("self_attn",)
    kinds = ("weight", "bias")
    return {f"{a}.{x}_proj.{w}" for a in attentions for x in ("q", "k", "v", "out") for w in kinds} | {
        f"{a}_layer_norm.{w}" for a in attentions for w in kinds} | {
        f"{name}.{w}" for name in ("ffn.fc1", "ffn.fc2", "final_layer_norm") for w in kinds}


SIZES = {"vocab": 50, "dim": 128, "heads": 2, "context": 20, "position": spec(LearnedPosition)}
ALONE = {"layout": "encoder", "kind": DeepNetEncoder, "preset": "deepnet/nano_encoder",
         "options": {"depth": 3, "ratio": 3.0}}
DECODER = {"layout": "decoder", "kind": GPT, "preset": "deepnet/nano_decoder",
           "options": {"depth": 3, "channel": spec(Mlp, ratio=3.0), "norm": "none",
                       "residual": "deepnet(norm=layer_norm(eps=1e-5))"}}
BOTH = {"layout": "encoder_decoder", "kind": Transformer, "preset": "deepnet/nano",
        "options": {"source_vocab": 50, "source_context": 30, "encoder_depth": 3, "decoder_depth": 2, "ratio": 3.0,
                    "channel": spec(Mlp), "scale_embedding": False, "pad": 1, "start": 2, "end": 2}}


@torch.no_grad()
@pytest.mark.parametrize("case", [ALONE, DECODER, BOTH], ids=lambda case: case["layout"])
@pytest.mark.parametrize("tie", [True, False])
def test_their_models(case, tie):
    """In their names, of any size, with tables shared or not, a model is recognised whole."""
    ties = {"tie": ("all" if tie else "none") if case is BOTH else tie}
    options = {k: v for k, v in case["options"].items() if k not in ("norm", "residual")}
    model = create_model(case["preset"], **SIZES, **options, **ties, **{
        k: v for k, v in case["options"].items() if k in ("norm", "residual")}).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    converted = KEYS[case["layout"]].convert(model.state_dict(), back=True)
    assert converted.unmatched == []
    theirs, at = converted.state, "decoder." if case is BOTH else ""
    assert {k.removeprefix(f"{at}layers.0.") for k in theirs if k.startswith(f"{at}layers.0.")} == their_layer(case is BOTH)
    assert theirs[f"{at}embed_positions.weight"].shape == (22, 128)
    if tie:  # as files hold it
        table = theirs[f"{at}embed_tokens.weight"]
        theirs[f"{at}output_projection.weight"] = table
        theirs |= {"encoder.embed_tokens.weight": table} if case is BOTH else {}
    loaded = load(theirs, "deepnet", layout=case["layout"])
    assert isinstance(loaded, case["kind"])
    batch = model.example(2)
    assert torch.equal(loaded(batch), model(batch))


def test_their_pre_norm_decoder():
    """torchscale's EncoderDecoderConfig(deepnorm=True) leaves the decoder pre-norm; that is another model."""
    model = create_model("deepnet/nano", **SIZES, **BOTH["options"])
    state = KEYS["encoder_decoder"].convert(model.state_dict(), back=True).state
    with pytest.raises(BadCheckpoint, match=r"1 of .* have no place.* decoder.layer_norm.weight"):
        load(state | {"decoder.layer_norm.weight": torch.ones(128)}, "deepnet")


@torch.no_grad()
def test_encoder_alone():
    """Each token sees all others; wrong ids are refused."""
    model = create_model("deepnet/nano_encoder", context=12).double().eval()
    ids = model.example(2)
    before = model(ids)
    ids[:, 11] = (ids[:, 11] + 1) % model.vocab
    assert ((model(ids) - before).abs().amax(-1) > 1e-9).all()
    for wrong in (ids.float(), ids[0], torch.cat((ids, ids), dim=1)):
        with pytest.raises(DoesNotFit, match=r"expected token ids \(B, N\), int64 or int32, N up to 12, got"):
            model(wrong)


def test_every_parameter_of_an_encoder_learns():
    model = create_model("deepnet/nano_encoder")
    model(model.example(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
