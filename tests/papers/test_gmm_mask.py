"""GMM and ELM against the masked scores written out, on any grid; what the mask is at its limits; the authors' answers."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from formarium.core.build import create_model
from formarium.core.ctx import Ctx, Place
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import count_parameters
from formarium.core.spec import spec
from formarium.papers.backbones.cait import TalkingHeads
from formarium.papers.backbones.swin import WindowAttention
from formarium.papers.positions.gmm_mask import ELM, GMM, KEYS, MaskedWindows, TalkingReader
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = {"causal": False, "window": None, "scale": None}


def moved(kernels=3):
    """In float64, with kernels about as wide as the grids below."""
    gmm = GMM(6, 2, kernels=kernels).double()
    with torch.no_grad():
        gmm.sigma.normal_().add_(2)
        gmm.alpha.normal_()
    return gmm


def naive(gmm, q, k, v, grid, prefix):
    """The mixture for every pair, multiplied to its score."""
    cells, rows = list(itertools.product(*map(range, grid))), []
    for i in range(q.shape[2]):
        scores = []
        for j in range(q.shape[2]):
            s = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(6)
            if i >= prefix and j >= prefix:
                d2 = sum((a - b) ** 2 for a, b in zip(cells[i - prefix], cells[j - prefix], strict=True))
                s = s * sum(a * math.exp(-d2 / 2) ** (1 / (c**2 + 1e-5)) for a, c in zip(gmm.alpha, gmm.sigma, strict=True))
            scores.append(s)
        rows.append((torch.stack(scores, -1).softmax(-1)[..., None] * v).sum(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 0), ((4, 2), 1), ((1, 6), 2)])
def test_is_the_masked_attention(grid, prefix):
    """Forward and backward, on rectangles, with tokens before the grid."""
    gmm, n = moved(), prefix + math.prod(grid)
    q, k, v = (torch.randn(2, 2, n, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = gmm.attend(q, k, v, Ctx(grid=grid, prefix=prefix), **PLAIN)
    theirs = naive(gmm, q, k, v, grid, prefix)
    assert_close(ours, theirs)
    weights, inputs = torch.randn_like(ours), [q, k, v, gmm.sigma, gmm.alpha]
    assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)))


def test_hidden_keys():
    """A mask of keys, a causal one and a window leave the rest as it is."""
    gmm, ctx = moved(), Ctx(grid=(2, 3))
    q, k, v = (torch.randn(1, 2, 6, 6, dtype=torch.float64) for _ in range(3))
    seen = torch.arange(6) < 4
    hidden = gmm.attend(q, k, v, Ctx(grid=(2, 3), mask=seen[None, None, None]), **PLAIN)
    assert_close(hidden, gmm.attend(q, k, v * seen[:, None], Ctx(grid=(2, 3), mask=seen[None, None, None]), **PLAIN))
    assert not torch.allclose(hidden, gmm.attend(q, k, v, ctx, **PLAIN))
    causal = gmm.attend(q, k, v, ctx, **PLAIN | {"causal": True})
    assert_close(causal[:, :, 0], v[:, :, 0])
    assert_close(gmm.attend(q, k, v, ctx, **PLAIN | {"window": 1}), v)


def test_only_the_distance_counts():
    """So a corner of a large grid has the mask of a small one; it is symmetric, and each diagonal is constant."""
    gmm = moved()
    large, small = gmm.mask(Ctx(grid=(5, 6))), gmm.mask(Ctx(grid=(3, 2)))
    at = (torch.arange(3)[:, None] * 6 + torch.arange(2)).flatten()
    assert_close(large[:, at][:, :, at], small)
    assert_close(large, large.transpose(1, 2))
    assert_close(large.diagonal(dim1=1, dim2=2), gmm.alpha.sum(0)[:, None].expand(2, 30))


@torch.no_grad()
def test_limits():
    """Wide kernels scale the scores, narrow ones leave a token's own; wide ones that sum to one are plain attention."""
    gmm, ctx = moved(2), Ctx(grid=(3, 3))
    gmm.sigma.fill_(1e6)
    gmm.alpha.fill_(0.5)
    q, k, v = (torch.randn(1, 2, 9, 6, dtype=torch.float64) for _ in range(3))
    assert_close(gmm.attend(q, k, v, ctx, **PLAIN), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    gmm.sigma.fill_(1e-3)
    assert_close(gmm.mask(ctx), torch.eye(9, dtype=torch.float64).expand(2, 9, 9))


def test_elm():
    """A number for each pair, for all heads; at the start every score is zero, so attention is the mean."""
    elm, ctx = ELM(6, 2, tokens=8).double(), Ctx(grid=(2, 4))
    q, k, v = (torch.randn(1, 2, 8, 6, dtype=torch.float64) for _ in range(3))
    assert_close(elm.attend(q, k, v, ctx, **PLAIN), v.mean(2, keepdim=True).expand_as(v))
    torch.nn.init.normal_(elm.table)
    by_hand = (elm.table * (q @ k.mT) / math.sqrt(6)).softmax(-1) @ v
    assert_close(elm.attend(q, k, v, ctx, **PLAIN), by_hand)


def test_any_host():
    """With a class token, or without; in any ViT. Where the class token is read, the last layer's mask has no effect."""
    for name in ("vit/nano:position=gmm_mask(kernels=2)", "vit/nano:pool=mean,position=elm(tokens=49)",
                 "vit/nano:position=elm(tokens=49)", "vit/nano:mixer=attention(position=gmm_mask)",
                 "cait/nano:position=gmm_mask", "cait/nano:position=elm(tokens=49)", "swin/nano:mixer=masked_window",
                 "swin/nano:mixer=masked_window(position=elm)", "pit/nano:mixer=attention(position=gmm_mask)",
                 "t2t_vit/nano:mixer=attention(position=gmm_mask)"):
        model = create_model(name)
        model(model.example(2)).logsumexp(1).sum().backward()
        assert any(isinstance(m, GMM | ELM) for m in model.modules())
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_two_numbers_a_kernel_and_head():
    masked = create_model("gmm_mask/nano")
    plain = create_model("gmm_mask/nano", mixer="attention(qkv_bias=false)")
    assert count_parameters(masked) - count_parameters(plain) == 4 * 4 * 5 * 2


@pytest.mark.parametrize(("name", "published", "products"), [
    ("vit", 170.9e6, 9 * 64**2 * 192), ("cait", 305.9e6, 24 * 64**2 * (256 + 2 * 4) + 2 * 64 * (256 + 2 * 4)),
    ("swin", 236.9e6, 16 * (2 * 256 * 96 + 6 * 64 * 192 + 4 * 16 * 384)),
    ("pit", 239.1e6, 2 * 257**2 * 96 + 6 * 65**2 * 192 + 4 * 17**2 * 384),
    ("t2t", 417.4e6, 256**2 * 64 + 12 * 64**2 * 256)])
def test_published_macs_leave_out_the_products_of_attention(name, published, products):
    """products: of queries and keys, and of weights and values, half of both; the mixes of talking heads are among them."""
    with torch.device("meta"):
        model = create_model(f"gmm_mask/{name}")
        macs = count_macs(model, model.example(1))
    assert macs - 2 * products == pytest.approx(published, rel=0.005)


def test_authors_layer():
    state, inputs, golden = replay(GOLDEN / "gmm_mask__gmm_layer.json.gz")
    gmm = GMM(8, 1)
    gmm.load_state_dict({k: v.flatten(1) for k, v in state.items()})
    with torch.no_grad():
        compare(golden, gmm.mask(Ctx(grid=(7, 7))) * inputs[0])


@pytest.mark.parametrize(("file", "variant"), [("gmm_vit_32", "vit"), ("gmm_swin_32", "swin"),
                                               ("gmm_cait_32", "cait"), ("gmm_pit_32", "pit"),
                                               ("gmm_t2t_32", "t2t"), ("gmm_t2t_64", "t2t_64")])
def test_authors_answers(file, variant):
    state, inputs, golden = replay(GOLDEN / f"gmm_mask__{file}.json.gz")
    model = load(state)
    assert model.recipe == {"name": f"gmm_mask/{variant}", "changes": {}}
    with torch.no_grad():
        compare(golden, model(*inputs))


SMALL = {"swin": "dim=24,depths=(2,2),heads=(2,4)", "cait": "dim=24,depth=2,head_dim=8", "t2t": "dim=128,depth=2,heads=2",
         "pit": "dims=(48,96),depths=(1,1),heads=(1,2)"}


@pytest.mark.parametrize("position", ["gmm_mask(kernels=3)", "elm"])
@pytest.mark.parametrize(("host", "layout"), [("swin", "authors_swin"), ("cait", "authors_cait"), ("pit", "authors_pit"),
                                              ("t2t", "authors_t2t")])
def test_names_of_other_hosts(host, layout, position):
    """Under each layer's name is GMM's fixed base, or what an ELM has learned. The names tell the host and its sizes."""
    model = create_model(f"gmm_mask/{host}:{SMALL[host]},position={position}", num_classes=5, img_size=16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = KEYS[layout].convert(model.state_dict(), {}, back=True)
    assert not theirs.unmatched
    masks = [t for k, t in theirs.state.items() if k.endswith(".mask.mask")]
    assert len(masks) == sum(isinstance(m, GMM | ELM) for m in model.modules())
    if position != "elm":
        assert {tuple(t.shape[:2]) for t in masks} == {(1, 1)}
        assert_close(masks[0][0, 0, 0, 1], torch.tensor(math.exp(-0.5)))
    again = load(theirs.state)
    x = model.example(2)
    assert_close(again(x), model(x))


@pytest.mark.parametrize("position", [GMM, ELM])
@pytest.mark.parametrize(("grid", "shifted"), [((4, 6), False), ((4, 6), True), ((2, 3), True)])
def test_masked_windows(grid, shifted, position):
    """One window at a time, forward and backward: the mask multiplies the scores before their bias is added."""
    part = MaskedWindows(8, Place(), heads=2, window=2, shifted=shifted, grid=grid, position=spec(position)).double()
    with torch.no_grad():
        for p in part.position.parameters():
            p.normal_().add_(1)
        part.bias.table.normal_()
    q, k, v = (torch.randn(3, 6, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    ours = part.mix(q, k, v, bias, grid, part.shift(grid))
    by = part.position.mask(Ctx(grid=(2, 2)))
    rows = [[(by * (q[b, w] @ k[b, w].mT) / 2 + bias[w]).softmax(-1) @ v[b, w] for w in range(6)] for b in range(3)]
    theirs = torch.stack([torch.stack(row) for row in rows])
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, theirs)))


@torch.no_grad()
def test_masks_that_are_one_leave_the_windows():
    masked = MaskedWindows(8, Place(), heads=2, window=4, shifted=True, position=spec(ELM)).double()
    masked.position.table.fill_(1)
    plain = WindowAttention(8, Place(), heads=2, window=4, shifted=True).double()
    plain.load_state_dict(masked.state_dict(), strict=False)
    x = torch.randn(2, 48, 8, dtype=torch.float64)
    assert_close(masked(x, Ctx(grid=(6, 8))), plain(x, Ctx(grid=(6, 8))))


@torch.no_grad()
def test_talking_heads_mix_masked_scores():
    part = TalkingHeads(8, Place(), heads=2, inner=12, qkv_bias=False, talk_bias=False, position=spec(GMM)).double()
    part.position.sigma.normal_().add_(2)
    ctx, x = Ctx(grid=(2, 3), prefix=1), torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = part.project(x)
    by = torch.ones(2, 7, 7, dtype=torch.float64)
    by[:, 1:, 1:] = part.position.mask(ctx)
    scores = torch.einsum("bhnm,gh->bgnm", by * (q @ k.mT) / math.sqrt(6), part.proj_l.weight)
    weights = torch.einsum("bhnm,gh->bgnm", scores.softmax(-1), part.proj_w.weight)
    assert_close(part(x, ctx), part.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_factors_of_deep_layers_start_small():
    model = create_model("gmm_mask/cait_w192:dim=8,head_dim=2,depth=25")
    starts = [layer["mixer"].scale[0].item() for layer in model.stages[0].layers]
    assert starts == pytest.approx([0.1] * 18 + [1e-5] * 6 + [1e-6])


def test_other_hosts_on_rectangles():
    """With gradients everywhere; images of another size are refused."""
    for host, changes in SMALL.items():
        for position in ("gmm_mask", "elm"):
            model = create_model(f"gmm_mask/{host}:{changes},position={position}", img_size=(16, 32), in_chans=2)
            model(model.example(2)).logsumexp(1).sum().backward()
            still = [n for n, p in model.named_parameters() if p.grad is None]
            assert not still
            with pytest.raises(DoesNotFit, match="built for images 16x32, got 32x16"):
                model(torch.randn(1, 2, 32, 16))


def test_authors_names():
    """The layout "authors", whose base mask stands under every layer's name; of an ELM the learned table stands there."""
    for name in ("gmm_mask/nano:mixer=attention(qkv_bias=false,position=gmm_mask(kernels=3))",
                 "gmm_mask/nano:mixer=attention(qkv_bias=false,position=elm(tokens=49))"):
        model = create_model(name, num_classes=5).eval()
        theirs = KEYS["authors"].convert(model.state_dict(), {}, back=True)
        assert not theirs.unmatched
        assert theirs.state["mask"].shape == (1, 1, 49, 49)
        assert_close(theirs.state["mask"][0, 0, 0, 8], torch.tensor(math.exp(-1)))  # one down, one right
        assert theirs.state["transformer.layers.2.0.fn.mask.mask"].shape[-2:] == (49, 49)
        again = load(theirs.state)
        x = model.example(2)
        assert_close(again(x), model(x))


def test_what_does_not_fit():
    with pytest.raises(DoesNotFit, match="1 kernel or more, got 0"):
        GMM(8, 2, kernels=0)
    with pytest.raises(DoesNotFit, match=r"how many the grid has.*elm\(tokens=49\)"):
        ELM(8, 2)
    with pytest.raises(DoesNotFit, match=r"built for 9 tokens, the grid has 2x4.*tokens=8"):
        ELM(8, 2, tokens=9).mask(Ctx(grid=(2, 4)))
    with pytest.raises(DoesNotFit, match="GMM needs tokens on a full grid"):
        moved().mask(Ctx())
    for name in ("gmm_mask/t2t:position=rotary", "swin/nano:mixer=masked_window(position=rotary)"):
        with pytest.raises(DoesNotFit, match=r"Rotary is no mask of scores.*'gmm_mask' or 'elm'"):
            create_model(name)
    with pytest.raises(DoesNotFit, match=r"3 stages .* got 2 and 3"):
        create_model("gmm_mask/pit", depths=(1, 1))
    with pytest.raises(DoesNotFit, match="tokens of an encoder"):
        TalkingReader(8, Place())(torch.zeros(1, 2, 8), Ctx())
