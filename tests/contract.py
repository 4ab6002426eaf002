"""The contract: what every system must answer, as small checks by kind. `cases` makes them from the registry.

A check takes a Case and asserts. A card's `exceptions` names the checks that do not hold for its system, with a reason.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from formarium.core.build import create_model, from_recipe, preset
from formarium.core.card import Card
from formarium.core.checkpoint import load, save
from formarium.core.ctx import Cache
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import Model, count_parameters
from formarium.core.registry import PART_KINDS, Entry, list_parts, systems
from formarium.parts.embed import to_map
from formarium.skeletons.backbone import Backbone
from formarium.skeletons.decoder import Decoder

BASES = {"backbone": Backbone, "language": Decoder}
CAN = {"any_size", "packed", "causal", "cache", "bidirectional", "cross"}


@dataclass(frozen=True)
class Case:
    """A model by name, e.g. "gpt/nano:mixer=cosformer", and the card that it is held to."""

    name: str
    entry: Entry

    @property
    def card(self) -> Card:
        return self.entry.card

    @property
    def published(self):
        return self.card.variants[self.name.split("/")[1]]

    def build(self, **changes) -> Model:
        """Parameters moved away from their start, where many mechanisms are still the identity."""
        torch.manual_seed(0)
        model = create_model(self.name, **changes)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model

    def on_meta(self) -> Model:
        with torch.device("meta"):
            return create_model(self.name)


@dataclass(frozen=True)
class Check:
    run: Callable[[Case], None]
    kind: str
    applies: Callable[[Case], bool]


CHECKS: dict[str, Check] = {}


def check(kind: str, applies: Callable[[Case], bool] = lambda case: True):
    """Registers a check under its function's name. It runs for every case of the kind to which it applies."""
    def register(run: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[run.__name__] = Check(run, kind, applies)
        return run
    return register


def kind_of(name: str) -> str:
    """The kind of model that a preset builds."""
    target = preset(name.split(":")[0]).target
    return next(kind for kind, base in BASES.items() if issubclass(target, base))


def running_names(entry: Entry) -> list[str]:
    """The models on which a system is run: its own nano; a part on its hosts, and its own nano if that is none of them."""
    own = f"{entry.name}/nano"
    if not entry.is_part:
        return [own]
    kind, part = entry.card.kind, entry.module.PART
    as_host = any(preset(h).takes(kind) and preset(h).but(**{kind: part}) == preset(own) for h in entry.card.hosts)
    return [f"{host}:{kind}={entry.name}" for host in entry.card.hosts] + ([] if as_host else [own])


def guest_names(entry: Entry) -> list[str]:
    """A host with each part of each kind that it takes; where it takes several, also in turn with its own."""
    host = preset(f"{entry.name}/nano")
    single = [f"{kind}={part}" for kind in PART_KINDS if host.takes(kind) for part in list_parts(kind)]
    several = [text for kind in PART_KINDS if host.takes(f"{kind}s") for part in list_parts(kind)
               for text in (f"{kind}s={part}", f"{kind}s=({part},pooling)", f"{kind}s=(attention,{part})")]
    return [f"{entry.name}/nano:{text}" for text in single + several]


def cases() -> Iterator[tuple[str, Case]]:
    """Every check with every case it applies to."""
    for entry in systems().values():
        running = [Case(n, entry) for n in running_names(entry)]
        by_kind = {
            "system": [Case(entry.name, entry)],
            "preset": [Case(f"{entry.name}/{v}", entry) for v in entry.card.variants],
            "model": running,
            **{kind: [c for c in running if kind_of(c.name) == kind] for kind in BASES},
            "guest": [Case(n, entry) for n in guest_names(entry)] if "host" in entry.card.tags else [],
        }
        for name, check in CHECKS.items():
            yield from ((name, case) for case in by_kind[check.kind] if check.applies(case))


# a system's file and card

@check("system")
def card_as_text(case):
    assert case.card == case.entry.module.CARD


@check("system")
def card_lists_presets(case):
    assert list(case.card.variants) == list(case.entry.module.PRESETS)


@check("system")
def card_names_exist(case):
    assert set(case.card.exceptions) <= set(CHECKS)
    assert all(case.card.exceptions.values())
    assert set(case.card.can) <= CAN
    assert case.card.kind in {*BASES, *PART_KINDS}
    assert bool(case.card.hosts) == case.entry.is_part
    for host in case.card.hosts:
        assert preset(host).takes(case.card.kind)


# every preset, on the meta device

@check("preset")
def recipe(case):
    """A recipe gives the same tensors again, and itself."""
    model = case.on_meta()
    with torch.device("meta"):
        again = from_recipe(model.recipe)
    assert model.recipe == again.recipe == {"name": case.name, "changes": {}}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


@check("preset", lambda case: case.published.params is not None)
def parameters_published(case):
    assert count_parameters(case.on_meta()) == pytest.approx(case.published.params, rel=0.01)


@check("preset", lambda case: case.published.macs is not None)
def macs_published(case):
    model = case.on_meta()
    example = model.example(1, case.published.input).to("meta")
    assert count_macs(model, example) == pytest.approx(case.published.macs, rel=0.03)


# running models of any kind

def answer_shape(model: Model, batch: Tensor) -> tuple[int, ...]:
    if isinstance(model, Backbone):
        return (batch.shape[0], model.num_classes)
    return (*batch.shape, model.vocab)


@torch.no_grad()
def answer(model: Model, batch: Tensor) -> Tensor:
    return model.eval()(batch)


def gradients(model: Model, batch: Tensor) -> dict[str, Tensor | None]:
    """Of a fixed random projection of the training answer."""
    torch.manual_seed(1)
    model.zero_grad()
    out = model.train()(batch)
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


@check("model")
def builds_and_answers(case):
    model = create_model(case.name)
    batch = model.example(2)
    for out in (answer(model, batch), model.train()(batch)):
        assert out.shape == answer_shape(model, batch)
        assert out.isfinite().all()


@check("model")
def every_parameter_learns(case):
    model = case.build()
    assert [n for n, g in gradients(model, model.example(2)).items() if g is None or not g.any()] == []


@check("model")
def eval_is_deterministic(case):
    model = case.build()
    batch = model.example(2)
    assert torch.equal(answer(model, batch), answer(model, batch))


@check("model")
def independent_of_the_batch(case):
    model = case.build()
    batch = model.example(3)
    alone = torch.cat([answer(model, sample) for sample in batch.split(1)])
    assert_close(answer(model, batch), alone, atol=1e-5, rtol=1e-5)


@check("model")
def gradient_checkpointing(case):
    model = case.build(drop_path=0.3)
    batch = model.example(4)
    plain = gradients(model, batch)
    model.set_grad_checkpointing()
    ran = []
    model.get_submodule("stages.0" if isinstance(model, Backbone) else "stack").layers[0].mixer.register_forward_hook(
        lambda *_: ran.append(1))
    assert_close(gradients(model, batch), plain)
    assert len(ran) == 2  # the layer was run again in the backward pass


@check("model")
def save_and_load(case):
    model = case.build()
    batch = model.example(2)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "m.safetensors")
        again = load(Path(folder) / "m.safetensors")
    assert again.recipe == model.recipe
    assert not again.training
    assert torch.equal(answer(model, batch), answer(again, batch))


@check("model")
def exports(case):
    model = case.build().eval()
    batch = model.example(2)
    exported = torch.export.export(model, (batch,), strict=False).module()
    assert_close(exported(batch), answer(model, batch))


@check("model")
def compiles_whole(case):
    model = case.build().eval()
    batch = model.example(2)
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True, backend="eager")(batch)
    assert_close(out, answer(model, batch))


@check("model")
def bfloat16(case):
    model = case.build()
    batch = model.example(2)
    exact = answer(model, batch)
    out = answer(model.bfloat16(), batch.bfloat16() if batch.is_floating_point() else batch)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.03 * exact.norm()


@check("model")
def drop_path(case):
    """Changes training alone."""
    plain, dropping = case.build(), case.build(drop_path=0.5)
    batch = plain.example(4)
    assert torch.equal(answer(plain, batch), answer(dropping, batch))
    assert torch.equal(plain.train()(batch), answer(plain, batch))
    assert not torch.equal(dropping.train()(batch), answer(dropping, batch))


@check("model")
def weight_decay(case):
    """The names that are spared exist, and each parameter is in one group."""
    model = case.build()
    named = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(named)
    decayed, spared = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sorted(map(id, decayed["params"] + spared["params"])) == sorted(map(id, named.values()))
    assert {id(named[n]) for n in model.no_weight_decay()} <= set(map(id, spared["params"]))
    assert all(p.ndim > 1 for p in decayed["params"])


# backbones

@check("backbone")
def classifier(case):
    model = case.build(num_classes=0)
    batch = model.example(2)
    features = answer(model, batch)
    assert features.shape == (2, model.num_features)
    model.reset_classifier(7)
    assert_close(answer(model, batch), model.head(features))
    assert model.num_classes == 7
    assert answer(model, batch).shape == (2, 7)


@check("backbone")
def other_channels(case):
    for channels in (1, 4):
        model = case.build(in_chans=channels)
        assert answer(model, model.example(2)).isfinite().all()
        for wrong in (channels + 1, 3):
            with pytest.raises(DoesNotFit, match=rf"\(B, {channels}, H, W\), got \(2, {wrong}, .*in_chans="):
                model(torch.randn(2, wrong, *model.img_size))
        with pytest.raises(DoesNotFit, match="expected images"):
            model(model.example(1)[0])


@check("backbone")
def not_square(case):
    h, w = case.build().img_size
    for size in ((h, 2 * w), (2 * h, w)):
        model = case.build(img_size=size)
        assert model.example(2).shape[2:] == size
        assert answer(model, model.example(2)).isfinite().all()
        for feature in model.features(model.example(1)):
            assert feature.map.shape[2:] == (size[0] // feature.stride, size[1] // feature.stride)


@check("backbone")
def sizes(case):
    """Either any size will do, or a wrong one is refused with the nearest right ones, when built and when run."""
    model = case.build()
    h, w = model.img_size
    odd = [(h + 1, w + 3), (h - 1, w), (2 * h - 1, 3 * w + 1)]
    if "any_size" in case.card.can:
        for size in odd:
            assert answer(model, torch.randn(2, 3, *size)).isfinite().all()
            assert answer(case.build(img_size=size), torch.randn(2, 3, *size)).isfinite().all()
        return
    for size in odd:
        with pytest.raises(DoesNotFit, match=rf"{h}x{w}, got {size[0]}x{size[1]}.*img_size="):
            model(torch.randn(2, 3, *size))
        with pytest.raises(DoesNotFit, match=r"the nearest: \d+x\d+") as refused:
            case.build(img_size=size)
        for near in re.findall(r"(\d+)x(\d+)", str(refused.value).split("the nearest:")[1]):
            near = (int(near[0]), int(near[1]))
            assert all(abs(n - s) < step for n, s, step in zip(near, size, model.embedding.step, strict=True))
            assert answer(case.build(img_size=near), torch.randn(1, 3, *near)).isfinite().all()


@check("backbone")
def features(case):
    model = case.build().eval()
    batch = model.example(2)
    maps = model.features(batch)
    assert len(maps) == len(model.feature_info)
    for feature, info in zip(maps, model.feature_info, strict=True):
        assert feature.stride == info.stride
        assert feature.map.shape == (2, info.channels, *(s // info.stride for s in model.img_size))
        assert feature.map.isfinite().all()
    assert [i.stride for i in model.feature_info] == sorted(i.stride for i in model.feature_info)
    tokens, ctx = model.encode(*model.embed(batch))
    last = maps[-1].map.flatten(2).transpose(1, 2)
    assert_close(last if model.pool_first else model.norm(last), tokens[:, ctx.prefix:])


@check("backbone")
def forward_features(case):
    model = case.build().eval()
    batch = model.example(2)
    tokens, ctx = model.forward_features(batch), model.embed(batch)[1]
    pooled = tokens[:, 0] if model.pool == "token" else tokens[:, ctx.prefix:].mean(1)
    assert_close(model.head(model.norm(pooled) if model.pool_first else pooled), answer(model, batch))
    final = to_map(tokens, model.encode(*model.embed(batch))[1].need_grid(model, prefix=True), ctx.prefix)
    assert final.shape[1] == model.num_features == model.feature_info[-1].channels


@check("backbone")
def channels_last(case):
    model = case.build()
    batch = model.example(2)
    plain = answer(model, batch)
    out = answer(model.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last))
    assert_close(out, plain, atol=1e-5, rtol=1e-5)


# language decoders, in double precision, so that equal means equal

@check("language")
def causal(case):
    model = case.build().double()
    batch = model.example(2)
    before = answer(model, batch)
    for t in (1, batch.shape[1] // 2, batch.shape[1] - 1):
        other = batch.clone()
        other[:, t] = (other[:, t] + 1) % model.vocab
        after = answer(model, other)
        assert_close(after[:, :t], before[:, :t])
        changed = (after - before).abs().amax(dim=(0, 2)) > 1e-6
        assert changed[t]
        assert not changed[:t].any()


def with_cache(model: Model, batch: Tensor, pieces: list[int]) -> Tensor:
    cache = Cache()
    out = torch.cat([model(piece, cache=cache) for piece in batch.split(pieces, dim=1)], dim=1)
    assert cache.length == batch.shape[1]
    return out


@check("language")
def cache_by_token(case):
    model = case.build().double().eval()
    batch = model.example(2)
    with torch.no_grad():
        assert_close(with_cache(model, batch, [1] * batch.shape[1]), model(batch))


@check("language")
def cache_by_chunk(case):
    model = case.build().double().eval()
    batch = model.example(2)
    n = batch.shape[1]
    with torch.no_grad():
        for pieces in ([n - 1, 1], [3, 1, n - 4], [n // 2 + 1, n - n // 2 - 1]):
            assert_close(with_cache(model, batch, pieces), model(batch))


@torch.no_grad()
def greedy(model: Model, prompt: Tensor, tokens: int) -> Tensor:
    """The likeliest continuation without a cache; a full context goes on from its last half."""
    seen, out = prompt[:, -model.context:], prompt
    for _ in range(tokens):
        if seen.shape[1] > model.context:
            seen = seen[:, -(model.context // 2):]
        new = model(seen)[:, -1].argmax(-1, keepdim=True)
        seen, out = torch.cat((seen, new), dim=1), torch.cat((out, new), dim=1)
    return out


@check("language")
def generates(case):
    """At temperature 0 as without a cache, within the context and past it; sampled, a function of the generator."""
    model = case.build().double().eval()
    prompt = model.example(2, (9,))
    assert torch.equal(model.generate(prompt, 12, temperature=0), greedy(model, prompt, 12))
    assert torch.equal(model.generate(prompt, 12, top_k=1), greedy(model, prompt, 12))
    for length in (model.context - 2, model.context, model.context + 5):
        prompt = model.example(2, (length,))
        assert torch.equal(model.generate(prompt, 5, temperature=0), greedy(model, prompt, 5))
    first, again, other = (model.generate(prompt, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@check("language")
def refuses_wrong_ids(case):
    model = case.build().eval()
    batch = model.example(2)
    for wrong in (batch.float(), batch.bool(), batch.to(torch.uint8), batch[0], batch[None]):
        with pytest.raises(DoesNotFit, match=re.escape(f"(B, N), int64 or int32, got {tuple(wrong.shape)} {wrong.dtype}")):
            model(wrong)
    longer = torch.cat((batch, batch[:, :1]), dim=1)
    with pytest.raises(DoesNotFit, match=f"{model.context} tokens, got {model.context + 1}"):
        model(longer)
    cache = Cache()
    model(batch, cache=cache)
    with pytest.raises(DoesNotFit, match=f"{model.context} tokens, got {model.context + 1}"):
        model(batch[:, :1], cache=cache)
    with pytest.raises(DoesNotFit, match="at least one token"):
        model.generate(batch[:, :0], 1)


@check("language", lambda case: "packed" in case.card.can)
def packed(case):
    model = case.build().double().eval()
    lengths = (5, 1, 17, 5)
    row = model.example(1, (sum(lengths),))
    alone = torch.cat([answer(model, sequence) for sequence in row.split(lengths, dim=1)], dim=1)
    assert_close(model(row, lengths=lengths), alone)
    for wrong in ((5, 5), (28, 1)):
        with pytest.raises(DoesNotFit, match="one row"):
            model(row, lengths=wrong)
    with pytest.raises(DoesNotFit, match="one row"):
        model(row.expand(2, -1), lengths=lengths)


# hosts with every part of the shelf

REFUSED = {
    "gpt/nano:mixer=identity": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=pooling": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=window": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:norm=group_norm": "GroupNorm does not fit here.*no token may see a later one",
    "vit/nano:mixer=pooling": "Pooling needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=window": "WindowAttention needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
}


@check("guest")
def fits_or_says_why(case):
    """A part by name works in the host, but for those above, which are refused with their reason."""
    def grads() -> dict[str, Tensor | None]:
        model = case.build()
        return gradients(model, model.example(2))

    if case.name in REFUSED:
        with pytest.raises(DoesNotFit, match=REFUSED[case.name]):
            grads()
        return
    assert [n for n, g in grads().items() if g is None or not g.isfinite().all()] == []
    model = case.build()
    assert from_recipe(model.recipe).recipe == model.recipe
    if isinstance(model, Decoder):
        causal(case)
        cache_by_chunk(case)
