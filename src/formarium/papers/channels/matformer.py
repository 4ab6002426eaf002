"""MatFormer: Nested Transformer for Elastic Inference (Devvrit, Kudugunta, Kusupati, Dettmers, Chen, Dhillon, Tsvetkov,
Hajishirzi, Kakade, Farhadi, Jain, NeurIPS 2024), arXiv 2310.07707.

New: the hidden neurons of each MLP are ordered. Granularity i uses the first m_i of them, y = W2[:, :m] act(W1[:m] x)
(Eq. 1), and all else is shared, so one model holds g models, of m = h/8, h/4, h/2 and h. Training draws one granularity a
step, or sums the losses of all (`joint_loss`). At inference each layer may have its own (Mix'n'Match): hundreds of models
that were never trained (section 3.3). The small ones draft for the largest, with which they share the attention.

A host's MLPs are nested by `channel=matformer`. `choose(model, sizes)` takes a granularity, or one for each layer;
`extract` makes a plain smaller model of the same answers; `speculative` decodes as the largest model would, drafting with a
small one.

Decisions: four granularities a factor 2 apart, as in both released codes (and the paper's ratios 0.5 to 4). Unless one is
chosen, training draws, one for a whole forward pass (of each stage, in pyramids), and evaluation takes the largest. The
released Llama code multiplies gate and value before the activation, act(gate * value), which `product_first` does; the rule
is act(gate) * value. In `speculative` the draft goes on from the largest model's keys and values, so that one cache serves
both. The sizes are written beside the weights, which else would be those of a plain model. The presets olmo_* have the
sizes of the commands in the OLMo port (widths 512, 1024, 2048, 8 layers, ratio 8), but the heads and positions of our
decoder for its multi-query attention and ALiBi, so its files are not read and its counts not held; MatLM's widths are not
known to us.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.build import create_model
from ...core.card import Card, Published
from ...core.ctx import Cache, Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.part import Part
from ...core.spec import Spec, from_json, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, SwiGLU, linear
from ...skeletons.decoder import Decoder
from ...weights.keys import State, told_ratio
from ..backbones import vit
from ..language.gpt import GPT, host_settings

CARD = Card(
    title="MatFormer: Nested Transformer for Elastic Inference",
    authors="Devvrit, Sneha Kudugunta, Aditya Kusupati, Tim Dettmers, Kaifeng Chen, Inderjit Dhillon, Yulia Tsvetkov, "
            "Hannaneh Hajishirzi, Sham Kakade, Ali Farhadi, Prateek Jain",
    venue="NeurIPS 2024",
    arxiv="2310.07707",
    year=2024,
    code="https://github.com/devvrit/matformer",
    licence="Apache-2.0 (OLMo port and scenic); see the repositories for weights",
    kind="channel",
    domain="language",
    tags=("elastic", "nested", "speculative"),
    claim="A 2.6B MatLM holds models from 1.5B to 2.6B parameters with the losses of models trained for each size.",
    variants={
        "nano": Published(note="ours, a decoder on bytes: for tests and quick comparisons"),
        "nano_gated": Published(note="ours, with gated MLPs, as in the released Llama code"),
        "nano_vit": Published(note="ours, a ViT for 28 pixels"),
        "olmo_180m": Published(note="sizes of the port's command; its name counts otherwise"),
        "olmo_460m": Published(note="as olmo_180m"),
        "olmo_1300m": Published(note="as olmo_180m"),
        "vit_base": Published(params=86.57e6, macs=17.58e9, input=(3, 224, 224), note="MatViT-B/16, as ViT-B/16"),
        "vit_large": Published(params=304.33e6, macs=61.60e9, input=(3, 224, 224), note="MatViT-L/16, as ViT-L/16"),
    },
    hosts=("gpt/nano", "vit/nano"),
    exceptions={"drop_path": "training draws a granularity, so it answers otherwise than evaluation, without any drop"},
)


class NestedMlp(Part):
    """An MLP, or a gated one, that may use the first of its hidden neurons alone: of h, h / 2, h / 4, ...

    chosen: number of the granularity, the smallest is 0; None: drawn in training, else the largest.
    product_first: act(gate * value) for act(gate) * value.
    """

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, bias: bool = True, gated: bool = False,
                 product_first: bool = False, approximate: bool = False, granularities: int = 4) -> None:
        super().__init__(dim, place)
        hidden = round(dim * ratio * 2 / 3) if gated else int(dim * ratio)
        if granularities < 1 or hidden >> (granularities - 1) < 1:
            raise DoesNotFit(f"{granularities} granularities need 1 or more, and at least a neuron each, of {hidden}")
        if product_first and not gated:
            raise DoesNotFit("product_first says how a gate is used: it needs gated=True")
        self.gated, self.product_first, self.approximate = gated, product_first, "tanh" if approximate else "none"
        self.fc1 = linear(dim, hidden * (2 if gated else 1), bias=bias)
        self.fc2 = linear(hidden, dim, bias=bias)
        self.sizes = tuple(hidden >> k for k in reversed(range(granularities)))
        self.chosen: int | None = None
        self.register_buffer("granularities", torch.tensor(self.sizes))

    def used(self, ctx: Ctx) -> int:
        """How many hidden neurons this pass uses; the same granularity in all layers that share the Ctx."""
        if self.chosen is None and not self.training:
            return self.sizes[-1]
        if self.chosen is None and "granularity" not in ctx.shared:
            ctx.shared["granularity"] = int(torch.randint(len(self.sizes), ()))
        return self.sizes[ctx.shared["granularity"] if self.chosen is None else self.chosen]

    def rows(self, m: int) -> list[slice]:
        """The rows of fc1 that the first m neurons read with: of the gates, and of the values."""
        return [slice(0, m), *([slice(self.sizes[-1], self.sizes[-1] + m)] if self.gated else [])]

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        m = self.used(ctx)
        bias = self.fc1.bias
        h, *value = [F.linear(x, self.fc1.weight[r], None if bias is None else bias[r]) for r in self.rows(m)]
        if not self.gated:
            h = F.gelu(h, approximate=self.approximate)
        else:
            h = F.silu(h * value[0]) if self.product_first else F.silu(h) * value[0]
        return F.linear(h, self.fc2.weight[:, :m], self.fc2.bias)


class SizedMlp(Part):
    """What `extract` makes: a plain MLP, or a gated one, of hidden[layer] neurons."""

    def __init__(self, dim: int, place: Place, *, hidden: tuple[int, ...] = (1,), bias: bool = True, gated: bool = False,
                 product_first: bool = False, approximate: bool = False) -> None:
        super().__init__(dim, place)
        if len(hidden) != place.depth:
            raise DoesNotFit(f"hidden has {len(hidden)} widths for {place.depth} layers")
        width = hidden[place.layer]
        self.gated, self.product_first, self.approximate = gated, product_first, "tanh" if approximate else "none"
        self.fc1 = linear(dim, width * (2 if gated else 1), bias=bias)
        self.fc2 = linear(width, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h = self.fc1(x)
        if not self.gated:
            return self.fc2(F.gelu(h, approximate=self.approximate))
        gate, value = h.chunk(2, dim=-1)
        return self.fc2(F.silu(gate * value) if self.product_first else F.silu(gate) * value)


def nested(model: nn.Module) -> list[NestedMlp]:
    """The nested MLPs, layer by layer; DoesNotFit if there are none."""
    found = [m for m in model.modules() if isinstance(m, NestedMlp)]
    if not found:
        raise DoesNotFit(f"this {type(model).__name__} has no nested MLPs; build it with channel='matformer'")
    return found


def choose(model: nn.Module, sizes: int | Sequence[int] | None) -> None:
    """Fixes the granularity of all layers, or of each (0 the smallest, -1 the largest); None: drawn in training, else the
    largest."""
    parts = nested(model)
    each = [sizes] * len(parts) if sizes is None or isinstance(sizes, int) else list(sizes)
    if len(each) != len(parts):
        raise DoesNotFit(f"expected a granularity, or one for each of {len(parts)} layers, got {len(each)}")
    for part, one in zip(parts, each, strict=True):
        if one is not None and not -len(part.sizes) <= one < len(part.sizes):
            raise DoesNotFit(f"granularities are 0 to {len(part.sizes) - 1}, got {one}")
        part.chosen = one


def mix_n_match(layers: int, level: float) -> tuple[int, ...]:
    """A granularity for each layer, `level` on average: never falling, rising as little as can be (section 3.3)."""
    low = int(level)
    high = round((level - low) * layers)
    return (low,) * (layers - high) + (low + 1,) * high


def joint_loss(model: nn.Module, loss: Callable[[], Tensor]) -> Float[Tensor, ""]:
    """The mean of `loss()` over all granularities: the joint training of the OLMo port. What was chosen stays."""
    before = [part.chosen for part in nested(model)]
    total: Any = 0.0
    granularities = min(len(p.sizes) for p in nested(model))
    try:
        for i in range(granularities):
            choose(model, i)
            total = total + loss() / granularities
    finally:
        choose(model, before)  # type: ignore[arg-type]
    return total


@torch.no_grad()
def extract(model: Model, sizes: int | Sequence[int]) -> Model:
    """A plain model of what these granularities use, with a recipe of its own; the model was made by name."""
    recipe = getattr(model, "recipe", None)
    if recipe is None or recipe.get("transforms"):
        raise DoesNotFit("extract takes a model that was made or loaded by name, without transforms")
    parts = nested(model)
    before = [p.chosen for p in parts]
    choose(model, sizes)
    widths = tuple(p.sizes[-1 if p.chosen is None else p.chosen] for p in parts)
    choose(model, before)  # type: ignore[arg-type]
    first = parts[0]
    bias = {"bias": first.fc1.bias is not None}
    if len(set(widths)) == 1 and len({p.dim for p in parts}) == 1 and not first.product_first:
        ratio = told_ratio(widths[0], first.dim)
        tanh = first.approximate == "tanh"
        plain = spec(SwiGLU, ratio=1.5 * ratio, **bias) if first.gated else spec(Mlp, ratio=ratio, approximate=tanh, **bias)
    else:
        plain = spec(SizedMlp, hidden=widths, gated=first.gated, product_first=first.product_first,
                     approximate=first.approximate == "tanh", **bias)
    changes = {k: from_json(v) for k, v in recipe["changes"].items()} | {"channel": plain}
    small = create_model(recipe["name"], **changes).to(first.fc1.weight.device, first.fc1.weight.dtype)
    state = model.state_dict()
    for name, part in model.named_modules():
        if isinstance(part, NestedMlp):
            m = widths[parts.index(part)]
            for kind in ("weight", "bias"):
                if f"{name}.fc1.{kind}" in state:
                    state[f"{name}.fc1.{kind}"] = torch.cat([state[f"{name}.fc1.{kind}"][r] for r in part.rows(m)])
            state[f"{name}.fc2.weight"] = state[f"{name}.fc2.weight"][:, :m]
            del state[f"{name}.granularities"]
    small.load_state_dict(state)
    return small.train(model.training)


@torch.no_grad()
def speculative(model: Decoder, prompt: Int[Tensor, "b n"], tokens: int, *, draft: int | Sequence[int] = 0,
                ahead: int = 4) -> tuple[Int[Tensor, "b m"], float]:
    """The prompt with the `tokens` that the largest model finds likeliest, and the share of drafts that it took.

    draft: the granularity that drafts, `ahead` tokens at a time; of a batch, so many are taken as in all rows are right.
    """
    if not isinstance(model, Decoder) or any(type(layer["mixer"].inner) is not Attention for layer in model.stack.layers):
        raise DoesNotFit("speculative decoding takes back cached keys and values: it needs a language decoder of attention")
    if prompt.shape[1] == 0 or ahead < 1 or prompt.shape[1] + tokens > model.context:
        raise DoesNotFit(f"expected a prompt of a token or more, drafts of 1 or more and at most {model.context} tokens in "
                         f"all, got {prompt.shape[1]}, {ahead} and {prompt.shape[1] + tokens}")
    before = [p.chosen for p in nested(model)]
    ids, end, cache, tried, right = prompt, prompt.shape[1] + tokens, Cache(), 0, 0
    try:
        while ids.shape[1] < end:
            many = min(ahead, end - ids.shape[1] - 1) if cache.length else 0
            drafting, guess = Cache(cache.length, dict(cache.states)), ids[:, cache.length:]
            choose(model, draft)
            for _ in range(many):
                new = model(guess[:, drafting.length - cache.length:], cache=drafting)[:, -1:].argmax(-1)
                guess = torch.cat((guess, new), dim=1)
            choose(model, -1)
            start = cache.length
            answers = model(guess, cache=cache)[:, -many - 1:].argmax(-1)
            agreed = (guess[:, guess.shape[1] - many:] == answers[:, :-1]).all(0)
            taken = int(agreed.int().cumprod(0).sum())
            ids = torch.cat((ids[:, :start], guess[:, :guess.shape[1] - many + taken], answers[:, taken:taken + 1]), dim=1)
            cache.length -= many - taken
            cache.states = {place: (k[:, :, :cache.length], v[:, :, :cache.length])
                            for place, (k, v) in cache.states.items()}
            tried, right = tried + many, right + taken
    finally:
        choose(model, before)  # type: ignore[arg-type]
    return ids, right / max(1, tried)


PART = spec(NestedMlp)

OLMO = spec(GPT, vocab=50304, context=2048, depth=8, heads=16, init_std=0.02, channel=spec(NestedMlp, ratio=8))
PRESETS: dict[str, Spec[Any]] = {
    "nano": spec(GPT, dim=64, depth=4, heads=4, context=128, channel=spec(NestedMlp)),
    "nano_gated": spec(GPT, dim=64, depth=4, heads=4, context=128, channel=spec(NestedMlp, gated=True)),
    "nano_vit": vit.PRESETS["nano"].but(channel=spec(NestedMlp)),
    "olmo_180m": OLMO.but(dim=512),
    "olmo_460m": OLMO.but(dim=1024),
    "olmo_1300m": OLMO.but(dim=2048),
    "vit_base": vit.PRESETS["base"].but(channel=spec(NestedMlp)),
    "vit_large": vit.PRESETS["large"].but(channel=spec(NestedMlp)),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As of a ViT's or a decoder's; how a gate is used leaves no trace."""
    image = "embedding.proj.weight" in state
    at = f"{'stages.0' if image else 'stack'}.layers.0.channel.inner"
    plain = {k: t for k, t in state.items() if not k.endswith(".granularities")}
    decoders = {k: p for k, p in PRESETS.items() if p.target is GPT}
    told = vit.settings(plain, layout) if image else host_settings(plain, decoders)
    dim = told["dim"]
    up, hidden = state[f"{at}.fc1.weight"].shape[0], state[f"{at}.fc2.weight"].shape[1]
    gated = up == 2 * hidden
    channel = spec(NestedMlp, gated=True) if gated else spec(NestedMlp)
    if hidden != (round(dim * 4 * 2 / 3) if gated else 4 * dim):
        ratio = told_ratio(hidden, dim) * (1.5 if gated else 1)
        channel = channel.but(ratio=int(ratio) if ratio == int(ratio) else ratio)
    if (g := state[f"{at}.granularities"].shape[0]) != 4:
        channel = channel.but(granularities=g)
    return told | {"channel": channel}
