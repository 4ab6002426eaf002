"""Attention Is All You Need (Vaswani et al., NeurIPS 2017), arXiv 1706.03762.

New: sequences turned into sequences by attention alone. An encoder lets source tokens attend to one another; a decoder
attends to the target's earlier tokens and, by cross attention, to the encoder's (section 3.2.3). Heads of scaled dot
products (Eq. 1), ReLU networks on each token (Eq. 2), LayerNorm(x + sublayer(x)) around each (section 3.1), sinusoids for
positions (section 3.5), one table for both embeddings, times sqrt(dim), and for the head (section 3.4).

A host for what works in an encoder and a decoder: mixer, channel, norm, residual and position can be exchanged. A mixer
must have both forms, with and without `causal`, since it serves in both stacks; its encoder form must leave out padding.

Decisions: after post-norm schemes no norm follows, as in the paper; after all others one follows each stack. Layers count
on from the encoder to the decoder (`drop_path`). The longest sequence is ours: sinusoids have none.
Deviation: no dropout; `drop_path` is there. Tables 3 (A) and (B) change heads and the width of keys apart from the width
of the tokens: heads= serves (A), the rows of (B) are not here.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention, CrossAttention
from ...parts.channel import Mlp
from ...parts.norm import LayerNorm, NoNorm
from ...parts.position import AbsolutePosition, LearnedPosition, positions, seat
from ...parts.residual import PostNorm, start_residuals
from ...skeletons.encdec import CrossStack, EncDec
from ...skeletons.stack import Stack
from ...weights.keys import State, as_preset, count, same, told_ratio

CARD = Card(
    title="Attention Is All You Need",
    authors="Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz Kaiser, "
            "Illia Polosukhin",
    venue="NeurIPS 2017",
    arxiv="1706.03762",
    year=2017,
    code="https://github.com/tensorflow/tensor2tensor",
    licence="Apache-2.0",
    kind="encdec",
    domain="seq2seq",
    tags=("encoder-decoder", "translation", "host"),
    claim="Attention alone, without recurrence or convolution, translates better and trains in a fraction of the time "
          "(28.4 BLEU on WMT 2014 English-German, 41.8 on English-French).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons"),
        "base": Published(results={"WMT14 En-De BLEU": 27.3, "WMT14 En-Fr BLEU": 38.1},
                          note="the paper's 65M does not follow from 'about 37000' tokens, which give 63.1M"),
        "big": Published(params=213e6, results={"WMT14 En-De BLEU": 28.4, "WMT14 En-Fr BLEU": 41.8}),
    },
)

PARTS = {
    "channel": {"relu_mlp": "ReluMlp"},
    "position": {"sinusoidal": "Sinusoidal"},
}


class ReluMlp(Mlp):
    """Linear, ReLU, linear (Eq. 2)."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, bias: bool = True) -> None:
        super().__init__(dim, place, ratio=ratio, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        return self.fc2(F.relu(self.fc1(x)))


class Sinusoidal(AbsolutePosition):
    """sin(p / base^(2i / dim)) in channel 2i, its cosine in channel 2i + 1 (section 3.5). For any number of tokens."""

    def __init__(self, dim: int, tokens: int, *, base: float = 10000.0) -> None:
        super().__init__(dim, tokens)
        if dim % 2:
            raise DoesNotFit(f"sinusoidal positions come in pairs of channels: the width must be even, got {dim}")
        self.base = base

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        waves = self.base ** (-torch.arange(0, self.dim, 2, device=x.device) / self.dim)  # always float32
        angle = positions(x.shape[1], ctx, x.device)[..., None] * waves
        return x + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(x.dtype)


class Transformer(EncDec):
    """(source ids (B, N), target ids (B, M)) -> logits (B, M, vocab).

    ratio: width of the channel mixers in widths of the tokens. position is added to the tokens of both sides, or given to
    the mixers of both stacks ("rotary"), not to `cross`. drop_path: of the last decoder layer, growing linearly from zero
    at the first of the encoder. See EncDec for the rest.
    """

    def __init__(self, *, source_vocab: int = 256, vocab: int = 256, source_context: int = 256, context: int = 256,
                 dim: int = 64, encoder_depth: int = 2, decoder_depth: int = 2, heads: int = 4, ratio: float = 4.0,
                 bias: bool = True, drop_path: float = 0.0, tie: str = "all", scale_embedding: bool = True, pad: int = 0,
                 start: int = 1, end: int = 2, mixer: Spec[Part] = spec(Attention),
                 cross: Spec[Part] = spec(CrossAttention), channel: Spec[Part] = spec(ReluMlp),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5), residual: Spec[Residual] = spec(PostNorm),
                 position: Spec[Any] = spec(Sinusoidal)) -> None:
        if min(encoder_depth, decoder_depth) < 1:
            raise DoesNotFit(f"encoder_depth and decoder_depth are 1 or more, got {encoder_depth} and {decoder_depth}")
        given: dict[str, Any] = {"heads": heads, "bias": bias, "length": max(source_context, context)}
        mixer, added = seat(position, mixer.offer(**given))
        why = "one mixer serves in the encoder, where all tokens are seen, and in the decoder, where no later one may be"
        norm, channel = norm.offer(bias=bias), channel.offer(ratio=ratio, bias=bias)
        residual = residual.offer(norm=norm, drop_path=drop_path, depths=(encoder_depth, decoder_depth))
        depth = encoder_depth + decoder_depth
        encoder = Stack(dim, encoder_depth, {"mixer": mixer.require(why, causal=False), "channel": channel}, residual,
                        place=Place(depth=depth, stages=2))
        decoder = CrossStack(dim, decoder_depth, {"mixer": mixer.require(why, causal=True), "cross": cross.offer(**given),
                                                  "channel": channel}, residual,
                             place=Place(layer=encoder_depth, depth=depth, stage=1, stages=2))
        normed = issubclass(residual.target, PostNorm)  # type: ignore[arg-type]
        super().__init__(encoder, decoder, source_vocab=source_vocab, vocab=vocab, source_context=source_context,
                         context=context, position=added, norm=spec(NoNorm) if normed else norm, tie=tie,
                         scale_embedding=scale_embedding, pad=pad, start=start, end=end)
        start_residuals(self)


BASE = spec(Transformer, source_vocab=37000, vocab=37000, source_context=512, context=512, dim=512, encoder_depth=6,
            decoder_depth=6, heads=8)
PRESETS = {
    "nano": spec(Transformer, source_vocab=64, vocab=64, source_context=24, context=24, dim=64),
    "base": BASE,
    "big": BASE.but(dim=1024, heads=16),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes, and what is tied."""
    return host_settings(state, PRESETS)


def host_settings(state: State, presets: Mapping[str, Spec[Any]]) -> dict[str, Any]:
    """What the tensors tell of a Transformer by a paper with these `presets`. Untold: heads (else 64 channels each), the
    longest sequences where positions have no table (else 512), the tokens with a meaning."""
    vocab, dim = state["token.weight"].shape
    source, head = state.get("source_token.weight"), state.get("head.weight")
    tied = head is None or same(head, state["token.weight"])
    shared = tied and (source is None or same(source, state["token.weight"]))
    hidden = state["encoder.layers.0.channel.inner.fc1.weight"].shape[0]
    sizes: dict[str, Any] = {
        "vocab": vocab, "source_vocab": vocab if source is None else source.shape[0], "dim": dim,
        "encoder_depth": count(state, "encoder.layers.{i}.channel.norm.weight"),
        "decoder_depth": count(state, "decoder.layers.{i}.channel.norm.weight")}
    told = sizes | {"ratio": told_ratio(hidden, dim), "tie": "all" if shared else "target" if tied else "none",
                    "bias": "encoder.layers.0.channel.inner.fc1.bias" in state,
                    "heads": as_preset(presets, "heads", max(1, dim // 64), dim=dim)}
    usual = {"pad": 0, "start": 1, "end": 2, "scale_embedding": True, "source_context": 512, "context": 512}
    told |= {k: as_preset(presets, k, v, **sizes) for k, v in usual.items()}
    if "position.table" in state:
        told |= {"source_context": state["source_position.table"].shape[1], "context": state["position.table"].shape[1],
                 "position": spec(LearnedPosition)}
    return told
