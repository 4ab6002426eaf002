"""FIRE: does a decoder that was trained on 64 bytes read 256 as well as one with rotary positions does?

All arms train on windows of 64 bytes; the rate is chosen there. Then they read the test text in windows of 256, which none
has seen. A quarter of the training length is FIRE's first threshold, as in the paper. Learned positions have rows for 256
bytes, of which 64 were trained.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena.study import Cell, Decides, Study
from ..core.ctx import Ctx
from ..core.spec import spec
from ..parts.position import ScorePosition

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

LENGTH, TIMES, DIM = 64, 4, 48
HOST = f"gpt/nano:dim={DIM},context={LENGTH * TIMES}"


class Alibi(ScorePosition):
    """A bias that falls with the distance, at a slope a head (arXiv 2108.12409)."""

    def bias(self, n: int, m: int, ctx: Ctx) -> Tensor:
        slopes = 2 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
        return slopes[:, None, None] * (torch.arange(m) - torch.arange(m - n, m)[:, None])


def alibi(task: "Task") -> "Model":
    from ..core.build import create_model

    return create_model("gpt/nano", dim=DIM, position=spec(Alibi), **task.model_options() | {"context": LENGTH * TIMES})


def at_four_times_the_length(cell: Cell) -> dict[str, float]:
    model, found = cell.train()
    longer = cell.get_task(context=LENGTH * TIMES).evaluate(model, "val" if cell.quick else "test")
    return found | {"bits_at_4x": longer["bits_per_byte"]}


STUDY = Study(
    system="fire",
    claim="A decoder with FIRE predicts texts four times as long as those of its training better than one with rotary "
          "positions.",
    source="FIRE (arXiv 2310.04418), language modelling on C4, trained on 2,048 tokens and tested up to 8,192",
    arms={
        "fire": f"{HOST},position=fire(threshold={LENGTH // 4})",
        "rotary": f"{HOST},position=rotary",
        "alibi": alibi,
        "none": f"{HOST},position=none",
        "learned": f"{HOST},position=learned",
    },
    matched="parameters",
    task="shakespeare",
    task_options={"context": LENGTH},
    recipe={"steps": 240, "batch_size": 16},
    lrs=(3e-3, 1e-2),
    seeds=3,
    decides=Decides("bits_at_4x", better="lower", by="ratio", at_least=0.02),
    measure=at_four_times_the_length,
    published="On C4 a perplexity 2.28 lower than with the best of the other encodings, RoPE and ALiBi among them",
    scale="4 layers of width 48, 240 steps on 1 MB of plays, 64 to 256 bytes, against 12 and 24 layers on C4, 2,048 to "
          "8,192 tokens. ALiBi, which was made to extrapolate, is shown: rotary decides.",
    cannot="Kerple, T5's bias and Sandwich; long texts whose answers lie far back, which plays seldom are.",
)
