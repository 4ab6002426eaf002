"""Scaling ViT: does strong weight decay in the classifier alone make better features for a few examples of new classes?

Two runs that differ in the decay of one matrix. Then the model is frozen and its pooled features are asked about other
classes: ten images of each, a linear map by regularised least squares, as the authors evaluate theirs.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..arena.study import Cell, Decides, Study

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

HOST = "scaling_vit/nano:patch=8"
SHOTS, DRAWS, RIDGE = 10, 20, 1e-2


@torch.no_grad()
def features(model: "Model", task: "Task", split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled and centred, each of length one, of grey images made as large as the model's, with their labels."""
    size, found, labels = model.img_size, [], []
    for images, targets in task.batches(split, 256):
        images = F.interpolate(images, size, mode="bilinear").expand(-1, 3, -1, -1)
        found.append(model.pooled(*model.encode(*model.embed(images))))
        labels.append(targets)
    every = torch.cat(found)
    return F.normalize(every - every.mean(0), dim=1), torch.cat(labels)


def few_shot(model: "Model", task: "Task", seed: int) -> float:
    """Accuracy with SHOTS images a class, the mean of DRAWS choices of them; the choices are the same for all arms."""
    (x, y), (test, truth) = features(model, task, "train"), features(model, task, "test")
    generator, hits = torch.Generator().manual_seed(seed), []
    for _ in range(DRAWS):
        order = torch.randperm(len(x), generator=generator)
        chosen = torch.cat([order[y[order] == c][:SHOTS] for c in y.unique()])
        a, target = x[chosen], F.one_hot(y[chosen], int(y.max()) + 1).float() * 2 - 1
        weights = torch.linalg.solve(a.T @ a + RIDGE * torch.eye(a.shape[1]), a.T @ target)
        hits.append(((test @ weights).argmax(1) == truth).float().mean().item())
    return sum(hits) / len(hits)


def transfer(cell: Cell) -> dict[str, float]:
    model, found = cell.train(head_weight_decay=3.0 if cell.arm == "head 3.0" else 0.03)
    return found | {"few_shot_accuracy": few_shot(model, cell.get_task("mnist5k"), cell.seed)}


STUDY = Study(
    system="scaling_vit",
    claim="A weight decay a hundred times stronger in the classifier than in the body makes frozen features better for ten "
          "examples a class of other classes.",
    source="Scaling Vision Transformers (arXiv 2106.04560), section 3.1",
    arms={"head 3.0": HOST, "head 0.03": HOST},
    matched="parameters",
    task="cifar10",
    recipe={"steps": 300, "batch_size": 32, "weight_decay": 0.03, "schedule": "rsqrt", "timescale": 0.1, "cooldown": 0.3},
    lrs=(3e-3,),
    seeds=3,
    decides=Decides("few_shot_accuracy", better="higher", by="difference", at_least=0.01),
    data=("mnist5k",),
    measure=transfer,
    published="ViT-B/32 pre-trained on JFT: with stronger decay in the head ten-shot ImageNet accuracy rises by several "
              "points while the loss of pre-training gets worse (in a figure; from memory)",
    scale="320 thousand parameters and 9,600 small photographs of 10 classes, each seen once, then handwritten digits, "
          "against 88 M parameters, JFT-300M with 18,291 classes, then photographs of 1,000 classes. What decay does grows "
          "with rate times steps: here a weight of the classifier is forgotten within about a hundred steps of 300, there "
          "within a few hundred of many thousands.",
    cannot="The law of error and compute over three orders of magnitude of data, and models of billions of parameters.",
)
