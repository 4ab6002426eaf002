"""SN-Netv2: do stitches that start at the least-squares map make better routes than stitches that start at random?

Two ViTs are trained, stitched, and trained on together for a few steps with one drawn route each. The number is the mean
test accuracy of all stitched routes, whatever they cost; the anchors alone are not in it. Random stitches train their W,
which the others have frozen beside an update of low rank.
"""

from typing import TYPE_CHECKING

from ..arena.study import Cell, Decides, Seed, Study

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

ANCHORS = {"small": "vit/nano:dim=32", "large": "vit/nano"}
NET = "snnet_v2/nano"


def train(seed: Seed) -> None:
    for name, model in ANCHORS.items():
        seed.train(model, into=name, lr=3e-3)


def stitched(cell: Cell) -> dict[str, float]:
    from ..papers.backbones.snnet_v2 import stitch
    from ..weights.load import load

    def net(task: "Task") -> "Model":
        assert cell.prepared is not None
        small, large = (load(cell.prepared / name / "last.safetensors") for name in ANCHORS)
        model = stitch(small, large, rank=0 if cell.arm == "random" else 8, gap=2e6)
        if cell.arm != "random":
            model.init_stitches(task.train_batch(cell.seed, 0, 128)[0])
        return model

    model, _ = cell.train(net, lr=1e-3, steps=100)
    split, found = "val" if cell.quick else "test", []
    for i in model.drawn:
        if len(model.routes[i].anchors) > 1:
            model.route = i
            found.append(cell.task.evaluate(model, split)["accuracy"])
    return {"accuracy": sum(found) / len(found), "worst": min(found), "routes": float(len(found))}


STUDY = Study(
    system="snnet_v2",
    claim="Stitches that start at the least-squares map, with an update of low rank, give more accurate routes after the "
          "same short training than stitches that start at random.",
    source="SN-Netv2 (arXiv 2307.00154), section 3.3; SN-Net (arXiv 2302.06586), ablation of the initialisation",
    arms={"least squares": NET, "random": NET},
    matched="steps",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=train,
    measure=stitched,
    published="Curves alone: on ImageNet all routes between DeiT III-S and L lie near the line between the two anchors.",
    scale="Anchors of 4 layers of width 32 and 64, 100 steps together and an update of rank 8, against widths of 384 to "
          "1,024, 50 epochs and rank 64.",
    cannot="The comparison with SN-Net and with training each size; segmentation and depth.",
)
