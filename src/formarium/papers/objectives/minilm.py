"""MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers (Wang et al.,
NeurIPS 2020), arXiv 2002.10957.

New: a small student learns only how the last attention of a large teacher relates tokens: its attention distributions
and its value relations, softmax(v v^T / sqrt(d)) a head. The loss is the sum of both divergences, L_AT + L_VR. Depth and
width are free, without projections; the number of heads must be equal.

Decisions: no trainer was released, so the loss follows the paper's text: KL(teacher || student), averaged over heads and
over the tokens that are real. Any models whose last mixer is softmax attention over equal tokens may be paired. A teacher
assistant (the teacher's depth, the student's width) is two runs, each with its own teacher:

    fm.pretrain("bert/nano:dim=32", "minilm(teacher=teacher.safetensors)", task="stdlib", out="assistant")
    fm.pretrain("minilm/nano", "minilm(teacher=assistant/encoder.safetensors)", task="stdlib")

The presets are the released students, in the shape of BERT. The multi-head relations of MiniLMv2 are another paper.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.spec import spec
from ...parts.attention import Attention, Seen, watching
from ...skeletons.objective import Objective, find_teacher
from ...weights.keys import State, as_preset
from ..language import bert
from ..language.bert import Bert

CARD = Card(
    title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    authors="Wenhui Wang, Furu Wei, Li Dong, Hangbo Bao, Nan Yang, Ming Zhou",
    venue="NeurIPS 2020",
    arxiv="2002.10957",
    year=2020,
    code="https://github.com/microsoft/unilm/tree/master/minilm",
    licence="MIT (code and weights); Apache-2.0 (all-MiniLM-L6-v2)",
    kind="objective",
    domain="language",
    tags=("distillation", "attention", "bidirectional"),
    claim="A student of 6 layers and width 768 keeps more than 99 % of BERT-base's accuracy on SQuAD 2.0 and several GLUE "
          "tasks with half of its Transformer parameters and computation.",
    variants={
        "nano": Published(note="ours: a student for bert/nano, half its width and depth"),
        "l12_h384": Published(params=33.36e6, input=(512,),
                              results={"SQuAD 2.0 F1": 81.7, "MNLI-m": 85.7, "SST-2": 93.0},
                              note="uncased, from a UniLM v2 of BERT-base's size; released with 0.1M of pooler"),
        "l6_h768": Published(params=66.96e6, input=(512,),
                             note="uncased, from BERT-base; with the pooler of 0.6M; the paper says 66M"),
        "l6_h384": Published(params=22.71e6, input=(512,), results={"SQuAD 2.0 F1": 75.6, "MNLI-m": 83.3, "SST-2": 91.5},
                             note="uncased, from BERT-base; the shape of all-MiniLM-L6-v2, a sentence encoder "
                                  "(`model.sentence`)"),
        "multilingual_l12_h384": Published(params=117.65e6, input=(512,), results={"XNLI average": 71.1},
                                           note="XLM-R's vocabulary: 96M of embeddings, 21M of Transformer"),
    },
    hosts=("bert/nano", "minilm/nano"),
    can=("packed", "bidirectional"),
)


class MiniLM(Objective):
    """ids, or (ids, mask) with mask True where a token is real -> the divergence of the student from the teacher.

    teacher: a file that `save` wrote, or the name of a model, which starts from chance: a control. layer: the teacher's
    layer, counted from 0, or from the end where negative. relations: "attention", "value" or both.
    """

    def __init__(self, model: Model, *, teacher: str = "", layer: int = -1,
                 relations: tuple[str, ...] = ("attention", "value")) -> None:
        super().__init__(model)
        for name in relations:
            if name not in RELATIONS:
                raise unknown("relation", name, RELATIONS)
        if not relations:
            raise DoesNotFit(f"expected one or more relations of {', '.join(RELATIONS)}, got none")
        self.relations = tuple(dict.fromkeys(relations))
        self.teacher = find_teacher(teacher, model, "minilm")
        taught, copied = self.watched = (_attention(self.teacher, layer, "teacher"), _attention(model, -1, "student"))
        if taught.heads != copied.heads:
            raise DoesNotFit(f"teacher and student need equally many heads, here {taught.heads} and {copied.heads}; "
                             f"build the student with heads={taught.heads}")
        self.train()

    def train(self, mode: bool = True) -> "MiniLM":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, inputs: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        ids, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        told, (taught, copied) = {} if mask is None else {"mask": mask}, self.watched
        with torch.no_grad(), watching(taught) as theirs:
            self.teacher(ids, **told)
        with watching(copied) as ours:
            self.model(ids, **told)
        if theirs[0].q.shape[:3] != ours[0].q.shape[:3]:
            raise DoesNotFit(f"teacher and student must see the same tokens, here {theirs[0].q.shape[2]} and "
                             f"{ours[0].q.shape[2]}")
        numbers = {name: divergence(RELATIONS[name](theirs[0]), RELATIONS[name](ours[0]), mask) for name in self.relations}
        return torch.stack(list(numbers.values())).sum(), {k: v.detach() for k, v in numbers.items()}


def value_relation(seen: Seen) -> Float[Tensor, "b h n n"]:
    """log softmax(v v^T / sqrt(d)) over the tokens that may be seen."""
    return Seen(seen.v, seen.v, seen.v, mask=seen.mask).log_probabilities()


RELATIONS = {"attention": Seen.log_probabilities, "value": value_relation}


def divergence(teacher: Float[Tensor, "b h n m"], student: Float[Tensor, "b h n m"],
               mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """KL(teacher || student) of log distributions over their last axis, the mean over heads and real tokens."""
    hidden = teacher == -torch.inf  # 0 log(0 / 0) is 0
    kl = (teacher.exp() * (teacher - student).masked_fill(hidden, 0)).sum(-1).mean(1)
    return kl.mean() if mask is None else kl[mask].mean()


def _attention(model: nn.Module, layer: int, who: str) -> Attention:
    """The softmax attention of a layer."""
    found = [m for m in model.modules() if isinstance(m, Attention)]
    if not found:
        raise DoesNotFit(f"the {who}, {type(model).__name__}, has no softmax attention: minilm copies its distributions")
    if not -len(found) <= layer < len(found):
        raise DoesNotFit(f"the {who} has {len(found)} layers of attention, from 0 to {len(found) - 1}, got layer={layer}")
    return found[layer]


OBJECTIVE = spec(MiniLM)

SMALL = bert.BASE.but(dim=384)
PRESETS = {
    "nano": spec(Bert, dim=32, depth=2, heads=4),
    "l12_h384": SMALL,
    "l6_h768": bert.BASE.but(depth=6),
    "l6_h384": SMALL.but(depth=6),
    "multilingual_l12_h384": SMALL.but(vocab=250037),
}

KEYS = bert.KEYS


def settings(state: State, layout: str) -> dict[str, Any]:
    """As BERT's; the heads, which leave no trace, as the student of these sizes has them."""
    told = bert.settings(state, layout)
    return told | {"heads": as_preset(PRESETS, "heads", told["heads"].value, vocab=told["vocab"], dim=told["dim"])}
