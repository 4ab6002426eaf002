"""DeltaNet: does correcting the state recall more than adding to it, with a state of equal size?

Associative recall of several queries (MQAR), made here: 8 keys with their values, then the same keys in another order, each
asking for its value. The control is the same layer, short convolution, normalised keys and writing strengths included, that
only adds: S_t = S_{t-1} + beta_t k_t v_t^T. There are 16 keys, and a head has 8 channels for them:
a tight state, chosen after one trial seed with 32 keys and wider heads, where 400 steps gave 58 % against 54 %. A first run
of 400 steps at rates of 3e-3 and 1e-2 decided nothing: hardly any net, softmax included, had learned the task. The budget
and the rates are since those of which a trial of the delta rule, with a seed of its own, learned it.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arena.study import Decides, Study
from ..core.ctx import Ctx
from ..core.spec import spec
from ..papers.mixers.deltanet import DeltaNet
from ..parts.attention import join_heads, split_heads
from ..parts.position import NoPosition
from ..tasks.drawn import Drawn

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

HEADS = 8


class Recall(Drawn):
    name = "recall"
    rule = "Associative recall of several queries"

    def __init__(self, *, pairs: int = 8, keys: int = 16) -> None:
        super().__init__(vocab=2 * keys, tokens=4 * pairs, answers=pairs)
        self.stored, self.keys = pairs, keys

    def draw(self, random: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        keys = torch.rand(rows, self.keys, generator=random).argsort(1)[:, :self.stored]
        told = torch.stack((keys, self.keys + torch.randint(self.keys, keys.shape, generator=random)), dim=-1)
        order = torch.rand(keys.shape, generator=random).argsort(1)
        asked = told.gather(1, order[..., None].expand(-1, -1, 2))
        ids = torch.cat((told, asked), dim=1).flatten(1)
        answers = torch.full_like(ids, -100)
        answers[:, 2 * self.stored::2] = asked[..., 1]
        return ids, answers


class Adding(DeltaNet):
    """DeltaNet whose state keeps what it holds when something is written. For training: no cache, no packed rows."""

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        assert self.conv is not None
        qkv, _ = self.conv(self.qkv(x), None)
        q, k, v = (split_heads(t, 1, self.heads)[0] for t in qkv.split(self.widths, dim=-1))
        q, k = (self.normalise(self.activation(t)) for t in (q, k))
        v = F.silu(v) * self.beta(x).sigmoid().transpose(1, 2)[..., None]
        return self.proj(join_heads(self.out_norm((q @ k.mT * q.shape[-1] ** -0.5).tril() @ v)))


def adding(task: "Task") -> "Model":
    from ..core.build import create_model

    options = task.model_options() | {"depth": 2, "heads": HEADS, "position": spec(NoPosition)}
    return create_model("gpt/nano", mixer=spec(Adding), **options)


STUDY = Study(
    system="deltanet",
    claim="The delta rule recalls more associations than linear attention that only adds, with a state of equal size.",
    source="DeltaNet (arXiv 2406.06484), synthetic benchmarks (MQAR), after Zoology (arXiv 2312.04927)",
    arms={
        "delta rule": f"gpt/nano:depth=2,heads={HEADS},mixer=deltanet,position=none",
        "adding": adding,
        "softmax": f"gpt/nano:depth=2,heads={HEADS},position=rotary",
    },
    matched="parameters",
    task=Recall,
    recipe={"steps": 1600, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", at_least=0.1),
    published="In MQAR's hardest setting (512 tokens, 64 pairs) DeltaNet is perfect at almost all widths, and ahead of "
              "GLA, RetNet, RWKV-4 and Hyena (in a figure)",
    scale="2 layers of width 64, 8 pairs in 32 tokens, 1,600 steps of 32 made-up sequences. Softmax attention, without a "
          "convolution and with rotary positions, is shown and not compared: its state grows.",
    cannot="Perplexity and recall of models of 1.3 B parameters; speed on a GPU.",
)
