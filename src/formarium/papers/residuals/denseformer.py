"""DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging
(Pagliardini, Mohtashami, Fleuret, Jaggi, NeurIPS 2024), arXiv 2402.02622.

New: after each block, a weighted average of its output and of all earlier outputs, embedding included, goes on (DWA):
Y_i = sum_{j <= i} alpha_ij X_j, X_{i+1} = B_{i+1}(Y_i). The weights are free scalars, started at the identity.
Dilation k: block i averages over j = i, i-k, i-2k, ... only; period p: only every p-th block averages.

Decisions: a "block" is a layer (mixer and channel mixer). The average is taken over block outputs X, not over earlier
averages, as the authors' code has it. Their code writes into one stacked buffer through a custom backward; here the
history is a tuple, which is as much memory, and autograd does the rest.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part
from ...core.spec import Spec, spec
from ...parts.norm import LayerNorm
from ...parts.position import Rotary
from ...parts.residual import PreNorm
from ...weights.keys import TIED, Op, Options, Rule, State, drop, keymap, rule
from ..language.gpt import GPT, host_settings
from ..language.gpt import PRESETS as GPTS

CARD = Card(
    title="DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging",
    authors="Matteo Pagliardini, Amirkeivan Mohtashami, Francois Fleuret, Martin Jaggi",
    venue="NeurIPS 2024",
    arxiv="2402.02622",
    year=2024,
    code="https://github.com/epfml/DenseFormer",
    licence="Apache-2.0",
    kind="residual",
    domain="language",
    tags=("depth", "skip connections", "dense"),
    claim="Averaging over depth lets a 48-block model reach the perplexity of much deeper ones, with less memory and time.",
    variants={
        "nano": Published(note="ours: gpt/nano with this residual scheme"),
        "48": Published(params=378e6, input=(256,), note="48 blocks, dilation 1, period 1, OpenWebText2"),
        "48_4x5": Published(params=378e6, input=(256,), note="48 blocks, dilation 4, period 5"),
    },
    hosts=("gpt/nano", "vit/nano"),
)


class DenseFormer(PreNorm):
    """Pre-norm layers with a depth-weighted average after every `period`-th. State: the tokens, and the outputs so far."""

    undecayed = ("alpha",)

    def __init__(self, dim: int, place: Place, inner: Part, *, dilation: int = 1, period: int = 1,
                 norm: Spec[nn.Module] = spec(LayerNorm), drop_path: float = 0.0,
                 layer_scale: float | None = None) -> None:
        super().__init__(dim, place, inner, norm=norm, drop_path=drop_path, layer_scale=layer_scale)
        if dilation < 1 or period < 1:
            raise DoesNotFit(f"dilation and period are 1 or more, got {dilation} and {period}")
        self.dilation, self.block = dilation, place.nth + 1  # the embedding is block 0
        averages = place.ends_layer and self.block % period == 0
        self.alpha = nn.Parameter(self._identity(self.block // dilation + 1)) if averages else None

    @staticmethod
    def _identity(n: int) -> Float[Tensor, "n"]:
        alpha = torch.zeros(n)
        alpha[-1] = 1.0
        return alpha

    def enter(self, x: Float[Tensor, "b n c"]) -> Any:
        return x, (x,)

    def forward(self, state: Any, ctx: Ctx) -> Any:
        y, outputs = state
        x = super().forward(y, ctx)
        if not self.place.ends_layer:
            return x, outputs
        outputs = (*outputs, x)
        if self.alpha is not None:  # Y_i = sum_j alpha_ij X_j over j = i modulo the dilation
            x = sum(a * o for a, o in zip(self.alpha, outputs[self.block % self.dilation::self.dilation], strict=True))
        return x, outputs

    def leave(self, state: Any) -> Float[Tensor, "b n c"]:
        return state[0]


PART = spec(DenseFormer)

PAPER = spec(GPT, vocab=50257, dim=768, depth=48, heads=12, context=256, bias=False, init_std=0.02,
             position=spec(Rotary, interleaved=True))
PRESETS = {
    "nano": GPTS["nano"].but(residual=PART),
    "48": PAPER.but(residual=PART),
    "48_4x5": PAPER.but(residual=PART.but(dilation=4, period=5)),
}

FLAT = Op(lambda t, o: [t[0][0]], lambda t, o: [t[0][None]])  # alphas are the weight of a Linear(n, 1)


def _frequencies(table: Tensor, state: State, options: Options) -> Tensor:
    dim = table.shape[1] // options.get("heads", max(1, table.shape[1] // 64))
    return 10000 ** (-torch.arange(0, dim, 2) / dim)


def _block(theirs: str) -> list[Rule]:
    ours = "stack.layers.{i}"
    return [
        drop(f"{theirs}.attn.bias", "the causal mask, rebuilt"),
        rule(f"{theirs}.ln_1.*", f"{ours}.mixer.norm.*"),
        rule(f"{theirs}.attn.c_attn.*", f"{ours}.mixer.inner.qkv.*"),
        rule(f"{theirs}.attn.c_proj.*", f"{ours}.mixer.inner.proj.*"),
        rule(f"{theirs}.ln_2.*", f"{ours}.channel.norm.*"),
        rule(f"{theirs}.mlp.c_fc.*", f"{ours}.channel.inner.fc1.*"),
        rule(f"{theirs}.mlp.c_proj.*", f"{ours}.channel.inner.fc2.*"),
    ]


KEYS = {
    "authors": keymap(  # experiments/models/denseformer.py with an average after every block
        rule(("transformer.wte.weight", "lm_head.weight"), "token.weight", TIED),
        rule("transformer.wte.weight", "token.weight"),
        drop("transformer.wpe.freqs", "rotary frequencies, recomputed", ("token.weight", _frequencies)),
        *_block("transformer.h.{i}.0"),
        rule("transformer.ln_f.*", "norm.*"),
        rule("weights.{i}.weight", "stack.layers.{i}.channel.alpha", FLAT),
        rule("lm_head.weight", "head.weight"),
        without={"nano": "learned positions, where their files have rotary ones",
                 "48_4x5": "there, with a period, the dilation counts averages, not blocks: another function"},
        example=("48", {"vocab": 96, "context": 32, "dim": 64, "depth": 3, "heads": 1}),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes; the dilation, and a period, from which blocks average over how many. Untold by the tensors: the context, and
    the heads, 64 channels each where no preset has the width."""
    told = host_settings(state, PRESETS)
    depth = told["depth"]
    found = {i: len(state[name]) for i in range(1, depth + 1) if (name := f"stack.layers.{i - 1}.channel.alpha") in state}
    period = min(found)
    fitting = [k for k in range(1, depth + 1) if all(n == i // k + 1 for i, n in found.items())]
    if list(found) != list(range(period, depth + 1, period)) or not fitting:
        raise ValueError(f"no dilation and period give averages over {found} (block: outputs)")
    options = {k: v for k, v in {"dilation": fitting[0], "period": period}.items() if v != 1}
    told["residual"] = PART.but(**options)
    return {"position": spec(Rotary, interleaved=True)} | told
