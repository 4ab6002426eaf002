"""FlatFormer: are groups of equal sizes faster than windows of equal shapes, and as accurate?

Speed: the paper's Waymo network on a sweep of a made-up lidar, dense near the car and thin far away, a sweep a seed; both
kinds of groups answer in turns in one process, and the ratio of their times decides. Accuracy: nano on the digits of MNIST
as points, trained with either kind; it is shown.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arena.study import Cell, Decides, Seed, Study
from ..core.ctx import Ctx
from ..core.spec import spec
from ..papers.points.flatformer import FlattenedWindowAttention
from ..skeletons.points import set_of

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

BEAMS, TURNS, ROUNDS = 24, 200, 5


class PaddedWindowAttention(FlattenedWindowAttention):
    """Attention within each window, all padded to the tokens of the fullest."""

    def groups(self, lengths: tuple[int, ...], coords: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor | None]:
        key = f"windows {self.window} {self.shift}"
        if key not in ctx.shared:
            size = torch.tensor(self.window, device=coords.device)
            at = (coords[0].long() + (size // 2 if self.shift else 0)) // size
            owner = set_of(lengths, coords.device)
            _, window, counts = torch.stack((owner, *at.T)).unique(dim=1, return_inverse=True, return_counts=True)
            fullest = int(counts.max())
            order = window.argsort(stable=True)
            slots = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[window[order]]
            slots = slots + window[order] * fullest
            take = order.new_zeros(len(counts) * fullest).index_copy(0, slots, order)
            seen = torch.zeros_like(take, dtype=torch.bool).index_fill(0, slots, True)
            back = torch.empty_like(order).index_copy(0, order, slots)
            ctx.shared[key] = take.view(-1, fullest), back, seen.view(-1, 1, 1, fullest)
        return ctx.shared[key]


def padded_windows(task: "Task") -> "Model":
    from ..core.build import create_model

    return create_model("flatformer/nano", mixer=spec(PaddedWindowAttention), **task.model_options())


def sweep(seed: int, turns: int = TURNS) -> Tensor:
    """Points (N, 5) of a lidar: beams that meet the ground in rings, and boxes that stop some; two features are zero."""
    random = torch.Generator().manual_seed(seed)
    down = torch.linspace(0.025, 0.4, BEAMS)[:, None]
    angle = torch.arange(turns) / turns * 2 * torch.pi + 0.01 * torch.randn(BEAMS, turns, generator=random)
    boxes = (5 + 65 * torch.rand(turns // 10, generator=random)).repeat_interleave(10)
    far = torch.minimum(2 / down, boxes) * (1 + 0.02 * torch.randn(BEAMS, turns, generator=random))
    xyz = torch.stack((far * angle.cos(), far * angle.sin(), 2 - far * down), dim=-1).flatten(0, 1)
    return torch.cat((xyz, torch.zeros(len(xyz), 2)), dim=1)


def in_turns(seed: Seed) -> None:
    """Seconds that each kind takes for the sweep, with the same weights."""
    from ..arena.measure import speeds
    from ..core.build import create_model

    kinds: dict[str, Any] = {"groups": FlattenedWindowAttention, "padded": PaddedWindowAttention}
    models = {name: create_model("flatformer/waymo_1f", mixer=spec(kind)).eval() for name, kind in kinds.items()}
    models["padded"].load_state_dict(models["groups"].state_dict())
    points = sweep(seed.seed, 20 if seed.quick else TURNS)
    found = speeds(models, [points], rounds=1 if seed.quick else ROUNDS, seconds=0)
    (seed.folder / "seconds.json").write_text(json.dumps(found), encoding="utf-8")


def speed_and_accuracy(cell: Cell) -> dict[str, float]:
    assert cell.prepared is not None
    seconds = json.loads((cell.prepared / "seconds.json").read_text(encoding="utf-8"))[cell.arm]
    return {**cell.train()[1], "seconds_a_sweep": seconds}


STUDY = Study(
    system="flatformer",
    claim="Attention in sorted groups of equal size is faster than in padded windows of equal shape.",
    source="FlatFormer (arXiv 2301.08739), sections 3 and 5.3",
    arms={"groups": "flatformer/nano", "padded": padded_windows},
    matched="parameters",
    task="points",
    recipe={"steps": 120, "batch_size": 32},
    lrs=(3e-3,),
    seeds=3,
    decides=Decides("seconds_a_sweep", better="lower", by="ratio", at_least=1 / 3, unit="s"),
    prepare=in_turns,
    measure=speed_and_accuracy,
    published="4.6 times as fast as SST, which batches padded windows, at 67.2 mAPH (level 2) on Waymo",
    scale="One processor thread in float32 and made-up sweeps of 4,800 points, against a GPU in float16 and Waymo's. "
          "Pillars and attention layers are timed, without the detection head and without special kernels for either.",
    cannot="Detection on Waymo; SST itself, which sorts windows into classes of size and so pads less than to the fullest. "
           "Times differ from run to run, so a second run gives other numbers.",
)
