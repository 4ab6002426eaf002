"""ALBERT: A Lite BERT for Self-supervised Learning of Language Representations (Lan et al., ICLR 2020), arXiv 1909.11942.

New: two ways to save parameters of a BERT (section 3.1). The embedding is factorised: tables of width E, a projection to
the layers' width H, so that O(V H) becomes O(V E + E H). Layers share their parameters: all of them, or those of each of
several groups. Here it hosts text objectives and reads encoders of its shape.

Decisions: as for BERT, the encoder alone, without pooler and heads; files lose them when read. No dropout (the second
release has none). The released files win: xlarge has 16 heads, where the paper's H/64 makes 32. Their code knows the tanh
form of GELU only, in both releases; configurations in the transformers library name the exact one for the first. The
paper's ablation that shares attention alone, or the MLP alone, is not here; groups=depth shares nothing.
"""

from typing import Any

from torch import nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, restart_linears
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PostNorm
from ...skeletons.encoder import Encoder
from ...skeletons.stack import Stack, Sublayers
from ...weights.keys import FUSE, UNSQUEEZE, State, as_preset, count, drop, keymap, rule

CARD = Card(
    title="ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
    authors="Zhenzhong Lan, Mingda Chen, Sebastian Goodman, Kevin Gimpel, Piyush Sharma, Radu Soricut",
    venue="ICLR 2020",
    arxiv="1909.11942",
    year=2019,
    code="https://github.com/google-research/albert",
    licence="Apache-2.0 (code and weights); MIT (RXNMapper)",
    kind="encoder",
    domain="language",
    tags=("encoder", "bidirectional", "post_norm", "shared layers"),
    claim="With shared layers and a factorised embedding, an encoder of fewer parameters than BERT-large is made far wider "
          "and sets the state of the art on GLUE, RACE and SQuAD (GLUE 89.4).",
    variants={
        "nano": Published(note="ours, byte level: for tests and quick comparisons"),
        "base": Published(params=11.09e6, input=(512,),
                          results={"average of 5 tasks": 80.1, "average of 5 tasks (second release)": 82.3},
                          note="the released file less its pooler of 0.6M, which is not here (paper: 12M)"),
        "large": Published(params=16.63e6, input=(512,),
                           results={"average of 5 tasks": 82.4, "average of 5 tasks (second release)": 85.7},
                           note="the released file less its pooler of 1.0M (paper: 18M)"),
        "xlarge": Published(params=54.53e6, input=(512,),
                            results={"average of 5 tasks": 85.5, "average of 5 tasks (second release)": 87.9},
                            note="the released file less its pooler of 4.2M (paper: 60M)"),
        "xxlarge": Published(params=205.8e6, input=(512,),
                             results={"average of 5 tasks": 91.0, "average of 5 tasks (second release)": 90.9},
                             note="the released file less its pooler of 16.8M (paper: 235M, also with it 222.6M here)"),
        "rxnmapper": Published(note="RXNMapper (Schwaller et al., Science Advances 2021): trained on chemical reactions "
                                    "written as text; attention of one head tells which atom became which"),
    },
    can=("packed", "bidirectional"),
)


class SharedStack(Stack):
    """`depth` layers with the parameters of `groups` layers: neighbours share, layer i has those of i * groups // depth.

    To what they are built of, the groups are the last layers of the net.
    """

    def __init__(self, dim: int, depth: int, sublayers: Sublayers, residual: Spec[Residual], *, groups: int = 1) -> None:
        if not 1 <= groups <= depth:
            raise DoesNotFit(f"{depth} layers fall into 1 to {depth} groups, not {groups}")
        super().__init__(dim, groups, sublayers, residual, place=Place(layer=depth - groups, depth=depth))
        self.depth, self.groups = depth, groups

    def _layer(self, i: int, ctx: Ctx) -> list[tuple[Residual, Ctx]]:
        return super()._layer(i * self.groups // self.depth, ctx)

    def _end(self, i: int) -> Residual:
        return super()._end(i * self.groups // self.depth)


class Albert(Encoder):
    """ids (B, N) -> tokens (B, N, dim).

    embed_dim: width of the embeddings, E. groups: of layers that share their parameters.
    position is added to the embeddings ("learned", "none") or given to every mixer ("rotary"). drop_path: of the layers of
    the last group. init_std: of the linear layers; None: Xavier, which small widths need.
    """

    def __init__(self, *, vocab: int = 256, context: int = 128, embed_dim: int = 32, dim: int = 64, depth: int = 4,
                 groups: int = 1, heads: int = 4, segments: int = 2, drop_path: float = 0.0, init_std: float | None = None,
                 mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp, approximate=True),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-12), position: Spec[Any] = spec(LearnedPosition)) -> None:
        mixer, position = seat(position, mixer.offer(heads=heads, length=context))
        residual = spec(PostNorm, norm=norm, drop_path=drop_path)
        stack = SharedStack(dim, depth, {"mixer": mixer, "channel": channel}, residual, groups=groups)
        super().__init__(vocab, context, stack, position=position, segments=segments, embed_norm=norm, embed_dim=embed_dim)
        restart_linears(self, init_std)


BASE = spec(Albert, vocab=30000, context=512, embed_dim=128, dim=768, depth=12, heads=12, init_std=0.02,
            channel=spec(Mlp, approximate=True))
PRESETS = {
    "nano": spec(Albert, dim=64, depth=4, heads=4, channel=spec(Mlp, approximate=True)),
    "base": BASE,
    "large": BASE.but(dim=1024, depth=24, heads=16),
    "xlarge": BASE.but(dim=2048, depth=24, heads=16),
    "xxlarge": BASE.but(dim=4096, depth=12, heads=64),
    "rxnmapper": BASE.but(vocab=591, dim=256, heads=8, channel=spec(Mlp, ratio=2.0)),
}

OURS = "stack.layers.{i}"
THEIRS = "encoder.albert_layer_groups.{i}.albert_layers.0"
PAIRS = {
    "embeddings.LayerNorm.*": "embed_norm.*",
    "encoder.embedding_hidden_mapping_in.*": "project.*",
    f"{THEIRS}.attention.dense.*": f"{OURS}.mixer.inner.proj.*",
    f"{THEIRS}.attention.LayerNorm.*": f"{OURS}.mixer.norm.*",
    f"{THEIRS}.ffn.*": f"{OURS}.channel.inner.fc1.*",
    f"{THEIRS}.ffn_output.*": f"{OURS}.channel.inner.fc2.*",
    f"{THEIRS}.full_layer_layer_norm.*": f"{OURS}.channel.norm.*",
}


def _rules(before: str) -> list[Any]:
    """`before`: what stands before the encoder's names, "albert." in files with heads."""
    return [rule(f"{before}embeddings.word_embeddings.weight", "token.weight"),
            rule(f"{before}embeddings.position_embeddings.weight", "position.table", UNSQUEEZE),
            rule(f"{before}embeddings.token_type_embeddings.weight", "segment.weight"),
            *[rule(f"{before}{theirs}", ours) for theirs, ours in PAIRS.items()],
            *[rule([f"{before}{THEIRS}.attention.{x}.{kind}" for x in ("query", "key", "value")],
                   f"{OURS}.mixer.inner.qkv.{kind}", FUSE) for kind in ("weight", "bias")],
            drop(f"{before}embeddings.position_ids", "0, 1, 2, ..."),
            drop(f"{before}pooler.*", "the pooler of sentence-order prediction, which we have not")]


KEYS = {"transformers": keymap(
    *_rules(""), *_rules("albert."),
    *[drop(f"{head}.*", "a head of pre-training, which we have not") for head in ("predictions", "sop_classifier")],
    *[drop(f"{head}.*", "the head of a task, which we have not") for head in ("classifier", "qa_outputs")])}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes. Untold by the tensors: how many layers share their parameters, heads, the form of GELU."""
    vocab, embed_dim = state["token.weight"].shape
    hidden, dim = state["stack.layers.0.channel.inner.fc1.weight"].shape
    groups = count(state, f"{OURS}.mixer.norm.weight")
    depth = as_preset(PRESETS, "depth", 12, dim=dim)
    if depth.value < groups:
        depth = depth._replace(value=groups)
    channel = as_preset(PRESETS, "channel", spec(Mlp, approximate=True), dim=dim)
    if hidden != dim * dict(channel.value.options).get("ratio", 4):
        channel = channel._replace(value=channel.value.but(ratio=hidden / dim))
    return {"vocab": vocab, "embed_dim": embed_dim, "dim": dim, "depth": depth, "groups": groups, "channel": channel,
            "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim), "context": state["position.table"].shape[1],
            "segments": len(state["segment.weight"]) if "segment.weight" in state else 0}
