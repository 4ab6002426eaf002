"""A plain decoder to host language parts: the shape of Language Models are Unsupervised Multitask Learners
(Radford et al., 2019), GPT-2. No arXiv number.

Nothing is new here: token embedding, learned positions, pre-norm layers of causal attention and a GELU MLP, final norm,
head tied to the embedding. Every piece can be exchanged by name: mixer, channel, norm, residual, position.

Deviations: no dropout; GPT-2's tanh form of GELU is the preset `small`'s only. What joins the stream starts a factor
sqrt(2 depth) smaller, as in GPT-2, where the part ends in a projection.
"""

import math
from typing import Any

import torch
from torch import nn

from ...core.card import Card, Published
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, restart_linears
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.decoder import Decoder
from ...skeletons.stack import Stack
from ...weights.keys import TRANSPOSE, UNSQUEEZE, State, count, drop, keymap, rule

CARD = Card(
    title="Language Models are Unsupervised Multitask Learners (GPT-2)",
    authors="Alec Radford, Jeffrey Wu, Rewon Child, David Luan, Dario Amodei, Ilya Sutskever",
    venue="OpenAI 2019",
    year=2019,
    code="https://github.com/openai/gpt-2",
    licence="MIT",
    kind="language",
    domain="language",
    tags=("decoder", "host", "causal"),
    claim="A decoder trained on enough text does many language tasks without being trained on them.",
    variants={
        "nano": Published(note="ours, byte level: for tests and quick comparisons"),
        "micro": Published(note="ours, byte level: minutes on a CPU"),
        "small": Published(params=124.44e6, input=(1024,), note="GPT-2 small; the paper's 117M was corrected to 124M"),
    },
    can=("causal", "cache", "packed"),
)


class GPT(Decoder):
    """ids (B, N) -> logits (B, N, vocab).

    mixer must have a causal form; several take turns, layer i has number i modulo their count (hybrids).
    position is added to the tokens ("learned", "none") or given to every mixer ("rotary").
    init_std: of the linear layers; None: Xavier, which small widths need. bias: of the projections and norms.
    drop_path: of the last layer, growing linearly from zero.
    """

    def __init__(self, *, vocab: int = 256, context: int = 256, dim: int = 64, depth: int = 4, heads: int = 4,
                 bias: bool = True, tie: bool = True, drop_path: float = 0.0, init_std: float | None = None,
                 mixer: Spec[Part] | tuple[Spec[Part], ...] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        why = "in a language decoder no token may see a later one"
        seats = [seat(position, one.require(why, causal=True).offer(heads=heads, bias=bias, length=context))
                 for one in ((mixer,) if isinstance(mixer, Spec) else mixer)]
        if not seats:
            raise DoesNotFit("expected one mixer, or several that take turns, got none")
        mixers, position = [one for one, _ in seats], seats[0][1]
        norm = norm.offer(bias=bias)
        stack = Stack(dim, depth, {"mixer": mixers, "channel": channel.offer(bias=bias)},
                      residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(vocab, context, stack, position=position, norm=norm, tie=tie)
        restart_linears(stack, init_std)
        with torch.no_grad():
            for name, p in stack.named_parameters():
                if name.endswith(("proj.weight", "fc2.weight")):  # what joins the stream, 2 depth times
                    p /= math.sqrt(2 * depth)
        start_residuals(stack)


PRESETS = {
    "nano": spec(GPT, dim=64, depth=4, heads=4, context=128),
    "micro": spec(GPT, dim=192, depth=6, heads=6, context=256),
    "small": spec(GPT, vocab=50257, dim=768, depth=12, heads=12, context=1024, init_std=0.02,
                  channel=spec(Mlp, approximate=True)),
}

KEYS = {
    "transformers": keymap(
        rule("transformer.wte.weight", "token.weight"),
        rule("transformer.wpe.weight", "position.table", UNSQUEEZE),
        drop("transformer.h.{i}.attn.bias", "the causal mask, rebuilt"),
        drop("transformer.h.{i}.attn.masked_bias", "the causal mask, rebuilt"),
        rule("transformer.h.{i}.ln_1.*", "stack.layers.{i}.mixer.norm.*"),
        rule("transformer.h.{i}.attn.c_attn.weight", "stack.layers.{i}.mixer.inner.qkv.weight", TRANSPOSE),
        rule("transformer.h.{i}.attn.c_attn.bias", "stack.layers.{i}.mixer.inner.qkv.bias"),
        rule("transformer.h.{i}.attn.c_proj.weight", "stack.layers.{i}.mixer.inner.proj.weight", TRANSPOSE),
        rule("transformer.h.{i}.attn.c_proj.bias", "stack.layers.{i}.mixer.inner.proj.bias"),
        rule("transformer.h.{i}.ln_2.*", "stack.layers.{i}.channel.norm.*"),
        rule("transformer.h.{i}.mlp.c_fc.weight", "stack.layers.{i}.channel.inner.fc1.weight", TRANSPOSE),
        rule("transformer.h.{i}.mlp.c_fc.bias", "stack.layers.{i}.channel.inner.fc1.bias"),
        rule("transformer.h.{i}.mlp.c_proj.weight", "stack.layers.{i}.channel.inner.fc2.weight", TRANSPOSE),
        rule("transformer.h.{i}.mlp.c_proj.bias", "stack.layers.{i}.channel.inner.fc2.bias"),
        rule("transformer.ln_f.*", "norm.*"),
        rule("lm_head.weight", "head.weight"),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes; heads leave no trace: GPT-2's head size of 64 is taken."""
    vocab, dim = state["token.weight"].shape
    head = state.get("head.weight")
    return {"vocab": vocab, "dim": dim, "depth": count(state, "stack.layers.{i}.mixer.norm.weight"),
            "heads": max(1, dim // 64), "context": state["position.table"].shape[1],
            "channel": spec(Mlp, approximate=True), "bias": "norm.bias" in state,
            "tie": head is None or head.equal(state["token.weight"])}
