"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin et al., NAACL 2019),
arXiv 1810.04805.

Here it hosts text objectives and reads encoders of its shape. Tokens, learned positions and segments are added and normed;
layers of attention in both directions and a GELU MLP, each normed after its residual sum (post-norm); no last norm. Its
objective, which any text encoder takes, is masked words (section 3.1, task 1): of every row 15 % of the tokens are to be
predicted, of which 80 % are hidden, 10 % replaced by any token and 10 % left.

    fm.pretrain("bert/nano", "bert", task="stdlib")

Deviations: the encoder alone; files lose the masked-word and next-sentence heads and their pooler when read. No next
sentences, no dropout. GELU is exact, as in the released PyTorch files. As in the authors' code, the number of tokens to
predict is a share of each row, rounded, and one at least; what becomes of each is drawn by itself; the loss is the mean
over those of the batch; the output matrix is the embedding. Ours: where tokens are bytes, 0 stands for a hidden one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.errors import DoesNotFit
from ...core.model import Model
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, linear, restart_linears
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PostNorm
from ...skeletons.encoder import Encoder
from ...skeletons.objective import Objective
from ...skeletons.stack import Stack
from ...weights.keys import FUSE, UNSQUEEZE, State, as_preset, count, drop, keymap, rule

CARD = Card(
    title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    authors="Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova",
    venue="NAACL 2019",
    arxiv="1810.04805",
    year=2018,
    code="https://github.com/google-research/bert",
    licence="Apache-2.0 (code and weights)",
    kind="encoder",
    domain="language",
    tags=("encoder", "bidirectional", "post_norm"),
    claim="One bidirectional encoder, pre-trained on plain text and fine-tuned with one more layer, sets the state of the "
          "art on eleven language tasks (GLUE 80.5).",
    variants={
        "nano": Published(note="ours, byte level: for tests and quick comparisons"),
        "base": Published(params=109.48e6, input=(512,), results={"GLUE": 79.6, "SQuAD 1.1 F1": 88.5},
                          note="uncased; the released file, its pooler of 0.6M included, which is not here (paper: 110M)"),
        "large": Published(params=335.1e6, input=(512,), results={"GLUE": 82.1, "SQuAD 1.1 F1": 90.9},
                           note="uncased; the paper says 340M, the released file holds 335.1M with the pooler"),
    },
    can=("packed", "bidirectional"),
)


class Bert(Encoder):
    """ids (B, N) -> tokens (B, N, dim).

    position is added to the tokens ("learned", "none") or given to every mixer ("rotary"). drop_path: of the last layer,
    growing linearly from zero. init_std: of the linear layers; None: Xavier, which small widths need.
    """

    def __init__(self, *, vocab: int = 256, context: int = 128, dim: int = 64, depth: int = 4, heads: int = 4,
                 segments: int = 2, drop_path: float = 0.0, init_std: float | None = None,
                 mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-12), residual: Spec[Residual] = spec(PostNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        mixer, position = seat(position, mixer.offer(heads=heads, length=context))
        stack = Stack(dim, depth, {"mixer": mixer, "channel": channel}, residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(vocab, context, stack, position=position, segments=segments, embed_norm=norm)
        restart_linears(stack, init_std)


class MLM(Objective):
    """ids, or (ids, mask) with mask True where a token is real -> the cross-entropy of the chosen tokens; numbers:
    masked_accuracy.

    ratio: part of each row's tokens that is chosen. hidden, other: parts of those that the mask stands for, and any
    token; the rest are left. mask_id: of the token that stands for hidden ones; None: 0, a byte that no text has. Larger
    vocabularies need it: 103 in BERT's, 4 in ALBERT's.
    """

    model: Encoder

    def __init__(self, model: Model, *, ratio: float = 0.15, hidden: float = 0.8, other: float = 0.1,
                 mask_id: int | None = None) -> None:
        super().__init__(model)
        if not isinstance(model, Encoder):
            raise DoesNotFit(f"masked words need a text encoder such as bert/nano; {type(model).__name__} is none")
        if not (0 < ratio <= 1 and min(hidden, other) >= 0 and hidden + other <= 1):
            raise DoesNotFit("expected 0 < ratio <= 1 and hidden + other <= 1, neither below 0; got "
                             f"ratio={ratio}, hidden={hidden}, other={other}")
        if mask_id is None and model.vocab > 256:
            raise DoesNotFit(f"{model.vocab} tokens are more than bytes: say which one stands for hidden ones, e.g. "
                             "bert(mask_id=103); BERT's vocabularies have it at 103, ALBERT's at 4")
        if not 0 <= (mask_id or 0) < model.vocab:
            raise DoesNotFit(f"mask_id={mask_id} is none of {model.vocab} tokens")
        self.ratio, self.hidden, self.other, self.mask_id = ratio, hidden, other, mask_id or 0
        width = model.token.embedding_dim
        self.dense, self.norm = linear(model.stack.dim, width), LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(model.vocab))

    def forward(self, inputs: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        ids, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        noise, fate = torch.rand(2, *ids.shape, device=ids.device)
        chosen = self.choose(noise, mask)
        x = self.model(self.disguise(ids, chosen, fate, torch.randint_like(ids, self.model.vocab)), mask=mask)
        logits, target = self.logits(x[chosen]), ids[chosen].long()
        return F.cross_entropy(logits, target), {"masked_accuracy": (logits.argmax(-1) == target).float().mean()}

    def choose(self, noise: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Bool[Tensor, "b n"]:
        """The tokens to predict: the real ones of least noise, which is below 1."""
        real = torch.ones_like(noise, dtype=torch.bool) if mask is None else mask
        count = (self.ratio * real.sum(-1, keepdim=True)).round().clamp_min(1)
        return noise.masked_fill(~real, 1.0).argsort(-1).argsort(-1) < count

    def disguise(self, ids: Int[Tensor, "b n"], chosen: Bool[Tensor, "b n"], fate: Float[Tensor, "b n"],
                 drawn: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """What the encoder sees; fate: uniform in [0, 1), drawn: any tokens."""
        given = torch.where(fate < self.hidden + self.other, drawn, ids).masked_fill(fate < self.hidden, self.mask_id)
        return torch.where(chosen, given, ids)

    def logits(self, x: Float[Tensor, "k c"]) -> Float[Tensor, "k v"]:
        return F.linear(self.norm(F.gelu(self.dense(x))), self.model.token.weight, self.bias)


OBJECTIVE = spec(MLM)

BASE = spec(Bert, vocab=30522, context=512, dim=768, depth=12, heads=12, init_std=0.02)
PRESETS = {
    "nano": spec(Bert, dim=64, depth=4, heads=4),
    "base": BASE,
    "large": BASE.but(dim=1024, depth=24, heads=16),
}

OURS = "stack.layers.{i}"
THEIRS = "encoder.layer.{i}"
NORMS = {"embeddings.LayerNorm": "embed_norm", f"{THEIRS}.attention.output.LayerNorm": f"{OURS}.mixer.norm",
         f"{THEIRS}.output.LayerNorm": f"{OURS}.channel.norm"}


def _rules(before: str) -> list[Any]:
    """`before`: what stands before the encoder's names, "bert." in files with heads."""
    rules = [rule(f"{before}embeddings.word_embeddings.weight", "token.weight"),
             rule(f"{before}embeddings.position_embeddings.weight", "position.table", UNSQUEEZE),
             rule(f"{before}embeddings.token_type_embeddings.weight", "segment.weight")]
    for theirs, ours in NORMS.items():
        rules += [rule(f"{before}{theirs}.{old}", f"{ours}.{new}")
                  for old, new in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias"))]
    for kind in ("weight", "bias"):
        rules.append(rule([f"{before}{THEIRS}.attention.self.{x}.{kind}" for x in ("query", "key", "value")],
                          f"{OURS}.mixer.inner.qkv.{kind}", FUSE))
    return [*rules,
            rule(f"{before}{THEIRS}.attention.output.dense.*", f"{OURS}.mixer.inner.proj.*"),
            rule(f"{before}{THEIRS}.intermediate.dense.*", f"{OURS}.channel.inner.fc1.*"),
            rule(f"{before}{THEIRS}.output.dense.*", f"{OURS}.channel.inner.fc2.*"),
            drop(f"{before}embeddings.position_ids", "0, 1, 2, ..."),
            drop(f"{before}pooler.*", "the pooler of next-sentence prediction, which we have not")]


KEYS = {"transformers": keymap(
    *_rules(""), *_rules("bert."), drop("cls.*", "the heads of pre-training, which we have not"),
    *[drop(f"{head}.*", "the head of a task, which we have not") for head in ("classifier", "qa_outputs")])}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes; heads leave no trace: 64 channels each, but 32 at the width of 384 (MiniLM)."""
    vocab, dim = state["token.weight"].shape
    ratio = state["stack.layers.0.channel.inner.fc1.weight"].shape[0] / dim
    context, segments = state["position.table"].shape[1], len(state.get("segment.weight", ()))
    if layout == "transformers" and segments == 1 and context % 64 == 2:
        raise DoesNotFit("one segment and two positions more than tokens are RoBERTa's, which counts positions from 2")
    return {"vocab": vocab, "dim": dim, "depth": count(state, f"{OURS}.mixer.norm.weight"),
            "heads": as_preset(PRESETS, "heads", 12 if dim == 384 else max(1, dim // 64), dim=dim, vocab=vocab),
            "context": context, "segments": segments,
            "channel": spec(Mlp) if ratio == 4 else spec(Mlp, ratio=ratio)}
