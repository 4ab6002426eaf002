"""The contract: what every system must answer, as small checks by kind. `cases` makes them from the registry.

Here are the checks of any model; the files in contracts/ add those of one kind of model each (backbones, language, ...).
A check takes a Case and asserts. A card's `exceptions` names the checks that do not hold for its system, with a reason.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from formarium.core.build import create_model, from_recipe, preset
from formarium.core.card import Card
from formarium.core.checkpoint import save
from formarium.core.errors import DoesNotFit
from formarium.core.macs import count_macs
from formarium.core.model import Model, count_parameters
from formarium.core.registry import METHODS, PART_KINDS, Entry, list_parts, systems
from formarium.weights.load import load

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


@dataclass(frozen=True)
class Kind:
    """A kind of model: its base class, and a function (model, batch) -> shape of the answer, or a tuple of shapes.

    training: what forward is told in training, besides the batch.
    """

    base: type[Model]
    shapes: Callable[[Model, Any], Any]
    training: dict[str, Any] = field(default_factory=dict)


CHECKS: dict[str, Check] = {}
KINDS: dict[str, Kind] = {}  # filled by the files in contracts/


def check(kind: str, applies: Callable[[Case], bool] = lambda case: True):
    """Registers a check under its function's name. It runs for every case of the kind to which it applies."""
    def register(run: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[run.__name__] = Check(run, kind, applies)
        return run
    return register


def kind_of(name: str) -> str:
    """The kind of model that a preset builds."""
    target = preset(name.split(":")[0]).target
    return next(name for name, kind in KINDS.items() if issubclass(target, kind.base))


def running_names(entry: Entry) -> list[str]:
    """The models on which a system is run: its own nano; a part on its hosts, and its own nano if that is none of them."""
    own = f"{entry.name}/nano"
    if not entry.is_part:
        return [own] if entry.card.variants else []
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
            **{kind: [c for c in running if kind_of(c.name) == kind] for kind in KINDS},
            **{kind: [Case(entry.name, entry)] * (kind == entry.card.kind) for kind in METHODS},
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
    assert list(case.card.variants) == list(getattr(case.entry.module, "PRESETS", ()))
    assert case.card.variants or case.card.kind in METHODS


@check("system")
def card_names_exist(case):
    assert set(case.card.exceptions) <= set(CHECKS)
    assert all(case.card.exceptions.values())
    assert set(case.card.can) <= CAN
    assert case.card.kind in {*KINDS, *PART_KINDS, *METHODS}
    assert bool(case.card.hosts) == (case.entry.is_part or case.card.kind in METHODS)
    for host in case.card.hosts:
        assert preset(host).takes(case.card.kind) or not case.entry.is_part


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

@torch.no_grad()
def answer(model: Model, batch: Any) -> Any:
    return model.eval()(batch)


def gradients(model: Model, batch: Any) -> dict[str, Tensor | None]:
    """Of fixed random projections of the training answers."""
    torch.manual_seed(1)
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    told = next((kind.training for kind in KINDS.values() if isinstance(model, kind.base)), {})
    outs = tree_leaves(model.train()(batch, **told))
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def samples(batch: Any) -> list[Any]:
    """A batch of each sample alone."""
    if isinstance(batch, tuple):
        return list(zip(*map(samples, batch), strict=True))
    return [[sample] for sample in batch] if isinstance(batch, list) else list(batch.split(1))


def floats_to(dtype: torch.dtype, batch: Any) -> Any:
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


@check("model")
def builds_and_answers(case):
    model = create_model(case.name)
    batch = model.example(2)
    for out in (answer(model, batch), model.train()(batch)):
        shapes = tuple(tuple(o.shape) for o in tree_leaves(out))
        assert (shapes if isinstance(out, tuple) else shapes[0]) == KINDS[kind_of(case.name)].shapes(model, batch)
        assert all(o.isfinite().all() for o in tree_leaves(out))


@check("model")
def every_parameter_learns(case):
    model = case.build()
    assert [n for n, g in gradients(model, model.example(2)).items() if g is None or not g.any()] == []


@check("model")
def eval_is_deterministic(case):
    model = case.build()
    batch = model.example(2)
    assert_close(answer(model, batch), answer(model, batch), atol=0, rtol=0)


@check("model")
def independent_of_the_batch(case):
    model = case.build()
    batch = model.example(3)
    alone = tree_map(lambda *answers: torch.cat(answers), *(answer(model, sample) for sample in samples(batch)))
    assert_close(answer(model, batch), alone, atol=1e-5, rtol=1e-5)


@check("model")
def gradient_checkpointing(case):
    model = case.build(drop_path=0.3)
    batch = model.example(4)
    plain = gradients(model, batch)
    ran = []
    layers = next(m.layers for m in model.modules() if hasattr(m, "checkpointing"))
    next(layers[0].children()).register_forward_pre_hook(lambda *_: ran.append(1))
    answer(model, batch)
    once = len(ran)  # where layers are shared, more than 1
    model.set_grad_checkpointing()
    assert_close(gradients(model, batch), plain)
    assert len(ran) == 3 * once > 0  # the layer was run again in the backward pass


@check("model")
def save_and_load(case):
    model = case.build()
    batch = model.example(2)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "m.safetensors")
        again = load(Path(folder) / "m.safetensors")
    assert again.recipe == model.recipe
    assert not again.training
    assert_close(answer(again, batch), answer(model, batch), atol=0, rtol=0)


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
    exact = tree_leaves(answer(model, batch))
    rounded = tree_leaves(answer(model.bfloat16(), floats_to(torch.bfloat16, batch)))
    assert {out.dtype for out in rounded} == {torch.bfloat16}
    assert all((out.float() - e).norm() < 0.05 * e.norm() for out, e in zip(rounded, exact, strict=True))


@check("model")
def drop_path(case):
    """Changes training alone."""
    plain, dropping = case.build(), case.build(drop_path=0.5)
    batch = plain.example(4)
    assert_close(answer(dropping, batch), answer(plain, batch), atol=0, rtol=0)
    assert_close(plain.train()(batch), answer(plain, batch), atol=1e-5, rtol=1e-5)  # training may take another kernel
    trained, asked = tree_leaves(dropping.train()(batch)), tree_leaves(answer(dropping, batch))
    assert not all(map(torch.equal, trained, asked))


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


# hosts with every part of the shelf

REFUSED = {
    "gpt/nano:mixer=class_attention": "no token may see a later one, and it has no option 'causal'",
    "itransformer/nano:mixer=class_attention": "class-attention needs a class token",
    "transformer/nano:mixer=class_attention": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=parallel": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "restormer/nano:mixer=class_attention": "class-attention needs a class token, and here is none",
    "poolformer/nano:mixers=class_attention": "class-attention needs a class token, and here is none.*pool='token'",
    "poolformer/nano:mixers=(class_attention,pooling)": "class-attention needs a class token, and here is none",
    "poolformer/nano:mixers=(attention,class_attention)": "class-attention needs a class token, and here is none",
    "gpt/nano:channel=gdfn": "GDFN needs tokens on a full grid; these are a sequence",
    "gpt/nano:mixer=hyena_nd": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=identity": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=vit_as_dynamic_conv": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=dynamic_conv_window": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=l2": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=local": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=lrformer": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=masked_window": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=mdta": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=subsampled": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:residual=poly": "Poly needs tokens on a full grid; these are a sequence",
    "gpt/nano:mixer=parallel": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=pooling": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:mixer=window": "no token may see a later one, and it has no option 'causal'",
    "gpt/nano:position=elm": r"ELM has a number for each pair of tokens.*elm\(tokens=49\)",
    "gpt/nano:position=gmm_mask": "GMM needs tokens on a full grid; these are a sequence",
    "gpt/nano:position=irpe": "IRPE needs tokens on a full grid; these are a sequence",
    "gpt/nano:norm=group_norm": "GroupNorm does not fit here.*no token may see a later one",
    "itransformer/nano:channel=gdfn": "GDFN needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=hyena_nd": "HyenaND needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=local": "LocalAttention needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=masked_window": "MaskedWindows needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=mdta": "MDTA needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=subsampled": "SubsampledAttention needs tokens on a full grid; these are a sequence",
    "itransformer/nano:residual=poly": "Poly needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=pooling": "Pooling needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=window": "WindowAttention needs tokens on a full grid; these are a sequence",
    "itransformer/nano:mixer=dynamic_conv_window": "DynamicConvWindow needs tokens on a full grid; these are a sequence",
    "transformer/nano:channel=gdfn": "GDFN needs tokens on a full grid; these are a sequence",
    "transformer/nano:mixer=hyena_nd": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=identity": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=vit_as_dynamic_conv": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=dynamic_conv_window": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=l2": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=local": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=lrformer": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=masked_window": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=mdta": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=subsampled": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "restormer/nano:residual=poly": "a grid whose sides are multiples of its step, 7x7; got 32x32",
    "transformer/nano:residual=poly": "Poly needs tokens on a full grid; these are a sequence",
    "transformer/nano:mixer=pooling": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=window": "one mixer serves in the encoder.*, and it has no option 'causal'",
    "transformer/nano:mixer=deltanet": "DeltaNet has no form that sees later tokens",
    "transformer/nano:mixer=retention": "retention has no form that sees later tokens",
    "transformer/nano:position=elm": r"ELM has a number for each pair of tokens.*elm\(tokens=49\)",
    "transformer/nano:position=gmm_mask": "GMM needs tokens on a full grid; these are a sequence",
    "transformer/nano:position=irpe": "IRPE needs tokens on a full grid; these are a sequence",
    "transformer/nano:norm=group_norm": "GroupNorm does not fit here.*no token may see padding",
    "vit/nano:channel=gdfn": "GDFN needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=hyena_nd": "HyenaND needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=local": "LocalAttention needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=masked_window": "MaskedWindows needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=mdta": "MDTA needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=subsampled": "SubsampledAttention needs tokens on a grid and nothing before it.*pool='mean'",
    "vit/nano:residual=poly": "Poly needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=pooling": "Pooling needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:position=elm": r"ELM has a number for each pair of tokens.*elm\(tokens=49\)",
    "vit/nano:mixer=window": "WindowAttention needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
    "vit/nano:mixer=dynamic_conv_window": "needs tokens on a grid and nothing before it, here are 1 .*pool='mean'",
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
    for name in {"language": ("causal", "cache_by_chunk"),
                 "encdec": ("causal_in_the_target", "cached_target", "source_padding")}.get(kind_of(case.name), ()):
        CHECKS[name].run(case)


for _path in sorted((Path(__file__).parent / "contracts").glob("*.py")):  # last, as they import this file
    import_module(f"contracts.{_path.stem}")
