"""The Transformer against PyTorch's layers and its equations; cross attention; tables that are shared; refusals."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import DoesNotFit, UnknownName
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.language.transformer import Sinusoidal
from formarium.papers.mixers.cosformer import CosFormer
from formarium.parts.attention import CrossAttention
from formarium.parts.norm import LayerNorm, NoNorm
from formarium.weights.load import load


def built(**options):
    model = create_model("transformer/nano", **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def gradients(out, inputs):
    random = torch.Generator().manual_seed(3)
    return torch.autograd.grad((out * torch.randn(out.shape, generator=random, dtype=out.dtype)).sum(), inputs)


def sinusoids(n, dim):
    """Section 3.5, number by number."""
    return torch.tensor([[(math.sin if c % 2 == 0 else math.cos)(p / 10000 ** (c // 2 * 2 / dim)) for c in range(dim)]
                         for p in range(n)], dtype=torch.float64)


def copy_attention(theirs, ours):
    if isinstance(ours, CrossAttention):
        theirs.in_proj_weight.copy_(torch.cat((ours.q.weight, ours.kv.weight)))
        theirs.in_proj_bias.copy_(torch.cat((ours.q.bias, ours.kv.bias)))
    else:
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.proj.state_dict())


@torch.no_grad()
def pytorchs(model):
    """torch.nn's encoder and decoder layers with the weights of a model."""
    dim, width = model.token.weight.shape[1], model.encoder.layers[0].channel.inner.fc1.out_features
    stacks = []
    for kind, stack in ((nn.TransformerEncoderLayer, model.encoder), (nn.TransformerDecoderLayer, model.decoder)):
        stacks.append([])
        for ours in stack.layers:
            theirs = kind(dim, 4, width, dropout=0.0, batch_first=True, dtype=torch.float64)
            copy_attention(theirs.self_attn, ours.mixer.inner)
            if "cross" in ours:
                copy_attention(theirs.multihead_attn, ours.cross.inner)
            for i, name in enumerate(ours):
                getattr(theirs, f"norm{i + 1}").load_state_dict(ours[name].norm.state_dict())
            for i in (1, 2):
                getattr(theirs, f"linear{i}").load_state_dict(getattr(ours.channel.inner, f"fc{i}").state_dict())
            stacks[-1].append(theirs)
    return stacks


@pytest.mark.parametrize("tie", ["all", "none"])
def test_is_pytorchs(tie):
    """Logits and gradients of weights, with a padded source."""
    model = built(tie=tie)
    source, target = model.example(3)
    source[1, -6:] = model.pad
    encoder, decoder = pytorchs(model)
    padding = source == model.pad
    table = model.token.weight if tie == "all" else model.source_token.weight
    x = 8 * table[source] + sinusoids(source.shape[1], 64)
    for layer in encoder:
        x = layer(x, src_key_padding_mask=padding)
    y, later = 8 * model.token.weight[target] + sinusoids(24, 64), nn.Transformer.generate_square_subsequent_mask(24)
    for layer in decoder:
        y = layer(y, x, tgt_mask=later.isinf(), memory_key_padding_mask=padding)
    theirs = y @ (model.token.weight if tie == "all" else model.head.weight).T
    ours = model((source, target))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # positions are computed in float32
    pairs = [(model.token.weight, model.token.weight), (table, table)]
    for i, name in ((0, "mixer"), (1, "mixer")):
        pairs.append((model.encoder.layers[i][name].inner.qkv.weight, encoder[i].self_attn.in_proj_weight))
        pairs.append((model.decoder.layers[i][name].inner.qkv.weight, decoder[i].self_attn.in_proj_weight))
        pairs.append((model.decoder.layers[i].cross.inner.proj.weight, decoder[i].multihead_attn.out_proj.weight))
    assert_close(gradients(ours, [a for a, _ in pairs]), gradients(theirs, [b for _, b in pairs]), atol=1e-4, rtol=1e-4)


def test_sinusoids():
    x = torch.zeros(1, 40, 12, dtype=torch.float64)
    assert_close(Sinusoidal(12, 8)(x, Ctx())[0], sinusoids(40, 12), atol=1e-6, rtol=0)
    assert_close(Sinusoidal(12, 8)(x[:, :3], Ctx(cache=Cache(length=30)))[0], sinusoids(33, 12)[30:], atol=1e-6, rtol=0)
    with pytest.raises(DoesNotFit, match="width must be even, got 7"):
        Sinusoidal(7, 8)


# cross attention

def crossing(x, memory, part, hidden=0):
    """Query by query and head by head; the last `hidden` tokens of the memory are not seen."""
    d, seen = x.shape[2] // part.heads, memory[:, :memory.shape[1] - hidden]
    q, kv = x @ part.q.weight.T + part.q.bias, seen @ part.kv.weight.T + part.kv.bias
    k, v = kv.chunk(2, dim=-1)
    rows = []
    for t in range(x.shape[1]):
        heads = [slice(h * d, (h + 1) * d) for h in range(part.heads)]
        weights = [((k[..., h] @ q[:, t, h, None])[..., 0] / d**0.5).softmax(-1) for h in heads]
        rows.append(torch.cat([(w[..., None] * v[..., h]).sum(1) for w, h in zip(weights, heads, strict=True)], dim=-1))
    return torch.stack(rows, dim=1) @ part.proj.weight.T + part.proj.bias


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9), (70, 80)])
def test_cross_attention(n, m):
    part = CrossAttention(24, Place(), heads=3).double()
    x, memory = (torch.randn(2, k, 24, dtype=torch.float64, requires_grad=True) for k in (n, m))
    mask = (torch.arange(m) < max(1, m - 3))[None, None, None].expand(2, 1, 1, m)
    for told, hidden in ((Ctx(), 0), (Ctx(mask=mask), min(3, m - 1))):
        ours, naive = part(x, Ctx(memory=(memory, told))), crossing(x, memory, part, hidden)
        assert_close(ours, naive)
        inputs = [x, memory, *part.parameters()]
        assert_close(gradients(ours, inputs), gradients(naive, inputs))


@torch.no_grad()
def test_cross_attention_projects_the_memory_once():
    part, cache = CrossAttention(24, Place(), heads=3), Cache()
    x, memory = torch.randn(2, 6, 24), (torch.randn(2, 9, 24), Ctx())
    whole, calls = part(x, Ctx(memory=memory)), []
    part.kv.register_forward_hook(lambda *_: calls.append(1))
    pieces = [part(piece, Ctx(memory=memory, cache=cache)) for piece in x.split([1, 3, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole)
    assert len(calls) == 1


def test_cross_attention_refuses():
    with pytest.raises(DoesNotFit, match=r"needs the tokens of an encoder \(ctx.memory\)"):
        CrossAttention(24, Place(), heads=3)(torch.randn(1, 2, 24), Ctx())
    with pytest.raises(DoesNotFit, match="5 heads do not divide"):
        CrossAttention(24, Place(), heads=5)


@torch.no_grad()
def test_cosformer_crosses_where_asked():
    """A mixer that works on the memory where it sees one: in a decoder only the sublayer `cross` lets it."""
    model = create_model("transformer/nano", mixer="cosformer").eval()
    source, target = model.example(2)
    memory = model.encode(*model.embed(source))
    other = memory[0] + torch.randn_like(memory[0]), memory[1]
    seen = []
    model.decoder.layers[0].mixer.inner.register_forward_hook(lambda part, given, out: seen.append(out))
    model.decode(target, memory)
    model.decode(target, other)
    assert torch.equal(*seen)
    model = create_model("transformer/nano", cross=spec(CosFormer)).double().eval()
    padded = torch.cat((source[:, :-5], torch.zeros_like(source[:, :5])), dim=1)
    assert_close(model((padded, target)), model((source[:, :-5], target)))


# the host

def test_tables():
    """What is shared counts once and is saved once."""
    size = {tie: count_parameters(create_model("transformer/nano", tie=tie)) for tie in ("all", "target", "none")}
    assert size["target"] - size["all"] == size["none"] - size["target"] == 64 * 64
    with pytest.raises(DoesNotFit, match="source_vocab=30 is not vocab=64; take tie='target' or 'none'"):
        create_model("transformer/nano", source_vocab=30)
    assert create_model("transformer/nano", source_vocab=30, tie="target").source_token.weight.shape == (30, 64)
    with pytest.raises(UnknownName, match="unknown tie 'al'; did you mean all"):
        create_model("transformer/nano", tie="al")


def test_final_norms():
    """None after a post-norm scheme, one after each stack elsewhere."""
    for residual, kind in (("post_norm", NoNorm), ("deepnet", NoNorm), ("pre_norm", LayerNorm), ("denseformer", LayerNorm)):
        model = create_model("transformer/nano", residual=residual)
        assert type(model.encoder_norm) is type(model.norm) is kind


def test_depths(tmp_path):
    model = create_model("transformer/nano", encoder_depth=3, decoder_depth=1)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (3, 1)
    assert list(model.encoder.layers[0]) == ["mixer", "channel"]
    assert list(model.decoder.layers[0]) == ["mixer", "cross", "channel"]
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors").token.weight, model.token.weight)
    with pytest.raises(DoesNotFit, match="1 or more, got 2 and 0"):
        create_model("transformer/nano", decoder_depth=0)


@pytest.mark.parametrize("wrong", [{"pad": 64}, {"end": -1}, {"pad": 1}, {"pad": 2}])
def test_special_tokens(wrong):
    with pytest.raises(DoesNotFit, match="are tokens of the target's 64, pad is also one of the source's 64"):
        create_model("transformer/nano", **wrong)


@torch.no_grad()
def test_start_may_be_end():
    """As fairseq has it; such a start can be generated, another cannot."""
    for start, end in ((2, 2), (1, 2)):
        model = create_model("transformer/nano", tie="none", start=start, end=end).eval()
        decode, start_again = model.decode, 30 * torch.eye(64)[start]
        model.decode = lambda *a, decode=decode, by=start_again: decode(*a) + by
        out = model.generate(model.example(3)[0], 6, beam=2)
        assert (out.shape == (3, 1) and (out == 2).all()) == (start == end)
        assert not (out == 1).any()


@torch.no_grad()
def test_rotary_positions():
    """They replace the sinusoids, in both stacks and not across them, and count on from the cache."""
    model = built(position="rotary")
    source, target = model.example(2)
    assert model.decoder.layers[0].mixer.inner.position is not model.encoder.layers[0].mixer.inner.position
    assert type(model.position).__name__ == "NoPosition"
    memory, cache = model.encode(*model.embed(source)), Cache()
    out = torch.cat([model.decode(piece, memory, cache) for piece in target.split([5, 1, 18], dim=1)], dim=1)
    assert_close(out, model((source, target)), atol=1e-6, rtol=1e-6)
