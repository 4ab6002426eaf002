"""ResFormer: does training at several resolutions, with consistency between them, help at resolutions that were not seen?

The same model with the same positions, which take any grid, trained on images of 28, 20 and 16 pixels in each step, or of
28 alone. A step of the first computes about 1.8 times as much. The number that decides is the mean accuracy over sides that
neither saw, smaller and larger ones.
"""

import torch.nn.functional as F

from ..arena.study import Cell, Decides, Study
from ..core.model import Model
from ..tasks.base import evaluating
from ..tasks.classify import Classify

HOST = "resformer/nano"
UNSEEN = (12, 24, 36, 44)  # pixels


def accuracy_at(model: Model, task: Classify, side: int) -> float:
    right = counted = 0
    with evaluating(model):
        for images, labels in task.batches("test", 256):
            resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
            right += int((model(resized).argmax(1) == labels).sum())
            counted += len(labels)
    return right / counted


def measure(cell: Cell) -> dict[str, float]:
    model, numbers = cell.train(objective="resformer" if cell.arm == "several" else None)
    assert isinstance(cell.task, Classify)
    at = {f"accuracy_{side}": accuracy_at(model, cell.task, side) for side in UNSEEN}
    return numbers | at | {"unseen_accuracy": sum(at.values()) / len(at)}


STUDY = Study(
    system="resformer",
    claim="Training at several resolutions with scale consistency is more accurate at resolutions that were not seen than "
          "training at one.",
    source="ResFormer (arXiv 2212.00776), figure 1 and table 1",
    arms={"several": HOST, "one": HOST},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 100, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("unseen_accuracy", better="higher", by="difference", at_least=0.02),
    measure=measure,
    published="ImageNet top-1 of ResFormer-B trained at 128, 160 and 224 pixels: 75.86 % at 96 and 81.72 % at 640 pixels, "
              "48 and 7.49 points above DeiT-B trained at 224",
    scale="200 thousand parameters and 100 steps on 3,500 digits of 28 pixels, seen at 12 to 44, against 86 M and 200 "
          "epochs of ImageNet, 96 to 640 pixels.",
    cannot="What the positions and the consistency give each; equal computing; detection and segmentation at other sizes.",
)
