"""A plain decoder to host language parts: the shape of Language Models are Unsupervised Multitask Learners
(Radford et al., 2019), GPT-2. No arXiv number.

Nothing is new here: token embedding, learned positions, pre-norm layers of causal attention and a GELU MLP, final norm,
head tied to the embedding. Every piece can be exchanged by name: mixer, channel, norm, residual, position.

Deviations: no dropout; GPT-2's tanh form of GELU is the preset `small`'s only. What joins the stream starts a factor
sqrt(2 depth) smaller, as in GPT-2, where the part ends in a projection.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core.card import Card, Published
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, SwiGLU, restart_linears
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PreNorm, start_residuals
from ...skeletons.decoder import Decoder
from ...skeletons.stack import Stack
from ...weights.keys import SAME, TIED, TRANSPOSE, UNSQUEEZE, State, as_preset, count, drop, keymap, rule, same, told_ratio

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

def _rules(before: str) -> list[Any]:
    """`before`: what stands before the decoder's names, "transformer." in files with a head."""
    theirs, ours = f"{before}h.{{i}}", "stack.layers.{i}"
    convs = {"attn.c_attn": "mixer.inner.qkv", "attn.c_proj": "mixer.inner.proj", "mlp.c_fc": "channel.inner.fc1",
             "mlp.c_proj": "channel.inner.fc2"}
    return [rule((f"{before}wte.weight", "lm_head.weight"), "token.weight", TIED),
            rule(f"{before}wte.weight", "token.weight"),
            rule(f"{before}wpe.weight", "position.table", UNSQUEEZE),
            drop(f"{theirs}.attn.bias", "the causal mask, rebuilt"),
            drop(f"{theirs}.attn.masked_bias", "the causal mask, rebuilt"),
            rule(f"{theirs}.ln_1.*", f"{ours}.mixer.norm.*"),
            rule(f"{theirs}.ln_2.*", f"{ours}.channel.norm.*"),
            *[rule(f"{theirs}.{a}.{kind}", f"{ours}.{b}.{kind}", op)
              for a, b in convs.items() for kind, op in (("weight", TRANSPOSE), ("bias", SAME))],
            rule(f"{before}ln_f.*", "norm.*")]


KEYS = {"transformers": keymap(*_rules("transformer."), *_rules(""), rule("lm_head.weight", "head.weight"))}


def host_settings(state: State, presets: Mapping[str, Spec[Any]]) -> dict[str, Any]:
    """Sizes of a model of this shape, with any mixer; as `presets` have it what the tensors cannot tell: heads, the form of
    GELU and, without a table of positions, the context."""
    vocab, dim = state["token.weight"].shape
    (up, _), (_, hidden) = (state[f"stack.layers.0.channel.inner.{x}.weight"].shape for x in ("fc1", "fc2"))
    gated = up == 2 * hidden
    channel = as_preset(presets, "channel", spec(SwiGLU if gated else Mlp), vocab=vocab, dim=dim)
    usual = dim * dict(channel.value.options).get("ratio", 4)
    if channel.value.target is not (SwiGLU if gated else Mlp) or hidden != (round(usual * 2 / 3) if gated else int(usual)):
        ratio = told_ratio(hidden, dim)
        channel = channel._replace(value=spec(SwiGLU, ratio=1.5 * ratio) if gated else spec(Mlp, ratio=ratio))
    told = {"vocab": vocab, "dim": dim, "depth": count(state, "stack.layers.{i}.mixer.norm.weight"),
            "heads": as_preset(presets, "heads", max(1, dim // 64), vocab=vocab, dim=dim), "bias": "norm.bias" in state,
            "tie": "head.weight" not in state or same(state["head.weight"], state["token.weight"]), "channel": channel}
    if "position.table" in state:
        return told | {"context": state["position.table"].shape[1], "position": spec(LearnedPosition)}
    return told | {"context": as_preset(presets, "context", 2048, vocab=vocab, dim=dim)}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As `host_settings`; GELU has the tanh form in the transformers library."""
    told = host_settings(state, PRESETS)
    if layout == "transformers" and told["channel"].value.target is Mlp:
        told["channel"] = told["channel"].value.but(approximate=True)
    return told
