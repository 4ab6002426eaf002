"""DeepNet: Scaling Transformers to 1,000 Layers (Wang, Ma, Dong, Huang, Zhang, Wei, 2022; TPAMI 2024), arXiv 2203.00555.

New: DeepNorm, LayerNorm(alpha x + f(x)): a post-norm whose skip is weighted up by alpha, with weights that start smaller by
beta, so that the change which an update makes to the model's answer is bounded by a constant at any depth (section 4).
Constants (Figure 2), for N layers of an encoder and M of a decoder:

    alone                                 alpha = (2N)^(1/4)                    beta = (8N)^(-1/4)
    encoder of an encoder-decoder         alpha = 0.81 (N^4 M)^(1/16)           beta = 0.87 (N^4 M)^(-1/16)
    decoder of an encoder-decoder         alpha = (3M)^(1/4)                    beta = (12M)^(-1/4)

Weights start as Xavier's normal ones with gain 1 for queries and keys, and beta for values, output projections and feed-
forward networks; biases at zero.

Decisions: in any part of the shelf, linear layers called `qkv`, `kv`, `q` or `k` hold queries and keys; all others have
gain beta. Where a host has one stack, its layers count as "alone", over all stages of a pyramid. The authors' code divides
its own start (Xavier uniform, 1 / sqrt(2) for values) by 1 / beta instead, and by (N^4 M)^(1/16) / 1.15 in the encoder of
an encoder-decoder, where the paper multiplies by 0.87 = 1 / 1.15; the paper's is taken, no weights were released.
Its configurations leave a decoder pre-norm unless told otherwise (decoder_normalize_before=False); such files are refused.
The networks are ReLU in the published models, which ran in fairseq; GELU is torchscale's. "opus_*" and "m2m_200" have
numbers of tokens that give the published sizes; the paper gives none. Results are quoted from memory of its tables.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.part import Part
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.norm import LayerNorm, NoNorm
from ...parts.position import AbsolutePosition, LearnedPosition
from ...parts.residual import PostNorm
from ...skeletons.stack import Stack
from ...weights.keys import FUSE, FUSE_PAIR, TIED, Assumed, Op, State, keymap, rule, told_ratio
from ..language import transformer
from ..language.gpt import GPT, host_settings

CARD = Card(
    title="DeepNet: Scaling Transformers to 1,000 Layers",
    authors="Hongyu Wang, Shuming Ma, Li Dong, Shaohan Huang, Dongdong Zhang, Furu Wei",
    venue="TPAMI 2024",
    arxiv="2203.00555",
    year=2022,
    code="https://github.com/microsoft/torchscale",
    licence="MIT",
    kind="residual",
    domain="seq2seq",
    tags=("depth", "post-norm", "initialisation", "translation"),
    claim="Transformers of 1,000 layers train stably; one of 200 layers and 3.2B parameters beats one of 48 layers and 12B "
          "by 5 BLEU on 7,482 translation directions.",
    variants={
        "nano": Published(note="ours: transformer/nano with this residual scheme"),
        "nano_encoder": Published(note="ours: an encoder alone"),
        "nano_decoder": Published(note="ours: gpt/nano with this residual scheme"),
        "wmt_18": Published(results={"WMT17 En-De BLEU": 28.8}, note="18 + 18 layers"),
        "wmt_50": Published(results={"WMT17 En-De BLEU": 29.0}, note="50 + 50 layers"),
        "wmt_100": Published(results={"WMT17 En-De BLEU": 28.9}, note="100 + 100 layers"),
        "opus_200": Published(params=863e6, results={"OPUS-100 mean BLEU": 31.1}, note="100 + 100 layers"),
        "opus_1000": Published(params=3.8e9, results={"OPUS-100 mean BLEU": 32.1}, note="500 + 500 layers"),
        "m2m_200": Published(params=3.2e9, note="100 + 100 layers, 102 languages"),
    },
    hosts=("transformer/nano", "gpt/nano", "vit/nano"),
    confused_with={
        "transformer": "our own names: DeepNorm has the tensors of any norm placement, and its scale is a constant",
        "gpt": "our own names: DeepNorm has the tensors of any norm placement, and its scale is a constant",
    },
)

QUERIES_AND_KEYS = {"qkv": (True, True, False), "kv": (True, False), "q": (True,), "k": (True,)}  # parts of the rows


class DeepNorm(PostNorm):
    """norm(alpha * x + drop(inner(x))), and the initial weights of `inner`.

    depths: layers of the encoder and of the decoder, where it stands in one of the two stacks (place.stage says which).
    """

    def __init__(self, dim: int, place: Place, inner: Part, *, norm: Spec[nn.Module] = spec(LayerNorm),
                 drop_path: float = 0.0, depths: tuple[int, int] | None = None) -> None:
        super().__init__(dim, place, inner, norm=norm, drop_path=drop_path)
        self.alpha, self.beta = constants(place, depths)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        for name, module in self.inner.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:  # where it takes most of the time
                scores = QUERIES_AND_KEYS.get(name.rpartition(".")[2], (False,))
                for rows, is_score in zip(module.weight.chunk(len(scores)), scores, strict=True):
                    nn.init.xavier_normal_(rows, gain=1.0 if is_score else self.beta)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, state: Any, ctx: Ctx) -> Any:
        return self.norm(self.alpha * state + self.branch(state, ctx))


def constants(place: Place, depths: tuple[int, int] | None) -> tuple[float, float]:
    """alpha and beta at a place of a stack that stands alone, or of one of two."""
    if depths is None:
        return (2 * place.depth) ** 0.25, (8 * place.depth) ** -0.25
    n, m = depths
    if place.stage == 0:
        return 0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)
    return (3 * m) ** 0.25, (12 * m) ** -0.25


PART = spec(DeepNorm)


class DeepNetEncoder(Model):
    """ids (B, N) -> logits (B, N, vocab) of an encoder alone: each token sees all.

    tie: the head uses the embedding's weights.
    """

    def __init__(self, *, vocab: int = 256, context: int = 128, dim: int = 64, depth: int = 4, heads: int = 4,
                 ratio: float = 4.0, tie: bool = False, drop_path: float = 0.0, residual: Spec[PostNorm] = PART,
                 channel: Spec[Part] = spec(Mlp), norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5),
                 position: Spec[AbsolutePosition] = spec(LearnedPosition)) -> None:
        super().__init__()
        self.vocab, self.context = vocab, context
        self.token = nn.Embedding(vocab, dim)
        nn.init.normal_(self.token.weight, std=dim**-0.5)
        self.position = position(dim, context)
        sublayers = {"mixer": spec(Attention, heads=heads), "channel": channel.offer(ratio=ratio)}
        self.stack = Stack(dim, depth, sublayers, residual.offer(norm=norm, drop_path=drop_path))
        self.head = None if tie else nn.Linear(dim, vocab, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=dim**-0.5)

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Int[Tensor, "b n"]:
        return torch.randint(self.vocab, (batch, *(shape or (self.context,))))

    def embed(self, batch: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], Ctx]:
        if batch.ndim != 2 or batch.dtype not in (torch.int64, torch.int32) or batch.shape[1] > self.context:
            raise DoesNotFit(f"expected token ids (B, N), int64 or int32, N up to {self.context}, got {tuple(batch.shape)} "
                             f"{batch.dtype}; build with context= for longer texts")
        ctx = Ctx()
        return self.position(self.token(batch), ctx), ctx

    def encode(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n c"], Ctx]:
        return self.stack(x, ctx)

    def forward(self, batch: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        x = self.encode(*self.embed(batch))[0]
        return F.linear(x, self.token.weight if self.head is None else self.head.weight)


WMT = transformer.PRESETS["base"].but(residual=PART)
OPUS = WMT.but(source_vocab=128000, vocab=128000, tie="target")
PRESETS = {
    "nano": transformer.PRESETS["nano"].but(residual=PART),
    "nano_encoder": spec(DeepNetEncoder),
    "nano_decoder": spec(GPT, dim=64, depth=4, heads=4, context=128, residual=PART),
    **{f"wmt_{n}": WMT.but(encoder_depth=n, decoder_depth=n) for n in (18, 50, 100)},
    **{f"opus_{2 * n}": OPUS.but(encoder_depth=n, decoder_depth=n) for n in (100, 500)},
    "m2m_200": WMT.but(source_vocab=256000, vocab=256000, dim=1024, heads=16, encoder_depth=100, decoder_depth=100),
}

TIED_3 = Op(TIED.there, lambda t, o: [*t, *t, *t])
FROM_2 = Op(lambda t, o: [t[0][None, 2:]], lambda t, o: [F.pad(t[0][0], (0, 0, 2, 0))])  # their positions start at 2


def _layers(theirs: str, ours: str) -> list[Any]:
    theirs, ours = f"{theirs}layers.{{i}}", f"{ours}.layers.{{i}}"
    attention, cross = f"{theirs}.self_attn", f"{theirs}.encoder_attn"
    kinds = ("weight", "bias")
    return [
        *[rule([f"{attention}.{x}_proj.{w}" for x in "qkv"], f"{ours}.mixer.inner.qkv.{w}", FUSE) for w in kinds],
        *[rule([f"{cross}.{x}_proj.{w}" for x in "kv"], f"{ours}.cross.inner.kv.{w}", FUSE_PAIR) for w in kinds],
        rule(f"{attention}.out_proj.*", f"{ours}.mixer.inner.proj.*"),
        rule(f"{attention}_layer_norm.*", f"{ours}.mixer.norm.*"),
        rule(f"{cross}.q_proj.*", f"{ours}.cross.inner.q.*"),
        rule(f"{cross}.out_proj.*", f"{ours}.cross.inner.proj.*"),
        rule(f"{cross}_layer_norm.*", f"{ours}.cross.norm.*"),
        rule(f"{theirs}.ffn.*", f"{ours}.channel.inner.*"),
        rule(f"{theirs}.final_layer_norm.*", f"{ours}.channel.norm.*"),
    ]


_SINUSOIDS = "fixed sinusoids for positions, where torchscale has learned ones"
_WITHOUT = {name: _SINUSOIDS for name, preset in PRESETS.items() if preset.target is not DeepNetEncoder} | {
    "nano_decoder": "a last norm, which torchscale's decoder has not after post-norm layers"}
_ALONE = (
    rule(("embed_tokens.weight", "output_projection.weight"), "token.weight", TIED),
    rule("embed_tokens.weight", "token.weight"),
    rule("embed_positions.weight", "position.table", FROM_2),
    *_layers("", "stack"),
    rule("output_projection.weight", "head.weight"),
)
KEYS = {  # of torchscale; an encoder and a decoder alone have the same names, and without layout= an encoder is taken
    "encoder": keymap(*_ALONE, without=_WITHOUT, example=("nano_encoder", {})),
    "decoder": keymap(*_ALONE, without=_WITHOUT | {"nano_encoder": "an encoder: the same names, another function"},
                      example=("nano_decoder", {"norm": spec(NoNorm),
                                                "residual": PART.but(norm=spec(LayerNorm, eps=1e-5))})),
    "encoder_decoder": keymap(
        rule([f"{x}.weight" for x in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")],
             "token.weight", TIED_3),
        rule(("decoder.embed_tokens.weight", "decoder.output_projection.weight"), "token.weight", TIED),
        rule("encoder.embed_tokens.weight", "source_token.weight"),
        rule("encoder.embed_positions.weight", "source_position.table", FROM_2),
        rule("decoder.embed_tokens.weight", "token.weight"),
        rule("decoder.embed_positions.weight", "position.table", FROM_2),
        *_layers("encoder.", "encoder"),
        *_layers("decoder.", "decoder"),
        rule("decoder.output_projection.weight", "head.weight"),
        without=_WITHOUT | {"nano_encoder": "an encoder alone"},
        example=("nano", {"position": spec(LearnedPosition), "channel": spec(Mlp), "scale_embedding": False, "pad": 1,
                          "start": 2}),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes. Untold by the tensors: heads (64 channels each, where no preset has the width); in torchscale's files GELU
    networks, no factor on the embeddings (torchscale's defaults), pad, start and end (fairseq's 1, 2 and 2). Our own names
    without positions are of a Transformer; an encoder alone and a decoder alone differ in the last norm."""
    eps = spec(LayerNorm, eps=1e-5)
    if "encoder.layers.0.channel.norm.weight" in state:
        told = transformer.host_settings(state, PRESETS) | {"residual": PART}
        if layout == "formarium":
            return told
        why = "leaves no trace in the tensors; fairseq's"
        return told | {"channel": spec(Mlp), "norm": eps, "scale_embedding": Assumed(False, "torchscale's default"),
                       **{k: Assumed(v, why) for k, v in {"pad": 1, "start": 2, "end": 2}.items()}}
    if layout == "encoder" or (layout == "formarium" and "norm.weight" not in state):
        told = host_settings(state, PRESETS)
        hidden = state["stack.layers.0.channel.inner.fc1.weight"].shape[0]
        return {k: told[k] for k in ("vocab", "dim", "depth", "heads", "tie", "context", "position")} | {
            "ratio": told_ratio(hidden, told["dim"]), "channel": spec(Mlp)}
    told = host_settings(state, PRESETS)
    if layout == "formarium":
        return told | {"residual": PART}
    # no norm follows the layers, which in GPT is theirs too
    return told | {"mixer": spec(Attention), "bias": True, "norm": spec(NoNorm), "residual": PART.but(norm=eps)}
