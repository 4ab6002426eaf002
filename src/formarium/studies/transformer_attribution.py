"""Transformer attribution: does it find the pixels that the answer needs better than attention does?

Trained ViTs explain their answers to test images by each method. Then the pixels become the mean, tenth by tenth, the most
relevant first: the sooner the answer's probability falls, the better the method knew. All methods
explain the same five models.
"""

import torch

from ..arena.explanations import deletion, explain, insertion
from ..arena.study import Cell, Decides, Seed, Study

HOST = "vit/nano"
EVERY = 8  # of the test images, which are sorted by class: 125


def train(seed: Seed) -> None:
    seed.train(HOST, into="base", lr=3e-3)


def deleted(cell: Cell) -> dict[str, float]:
    from ..weights.load import load

    assert cell.prepared is not None
    model, task = load(cell.prepared / "base/last.safetensors"), cell.task
    images = next(task.batches("test", task.info.sizes["test"]))[0][::EVERY]
    if cell.arm == "random":
        found = explain(model, images, method="rollout")
        relevance = torch.rand(found.relevance.shape, generator=torch.Generator().manual_seed(cell.seed))
    else:
        found = explain(model, images, method=cell.arm.replace(" ", "_"))
        relevance = found.relevance
    return {"deletion": deletion(model, images, relevance, found.target).mean().item(),
            "insertion": insertion(model, images, relevance, found.target).mean().item()}


STUDY = Study(
    system="transformer_attribution",
    claim="Relevance times gradient, rolled out, finds the pixels that an answer needs better than attention rolled out.",
    source="Transformer Interpretability Beyond Attention Visualization (arXiv 2012.09838), table 1, positive perturbation",
    arms=dict.fromkeys(("transformer attribution", "rollout", "raw attention", "grad cam", "lrp layer", "random"), HOST),
    matched="steps",
    task="mnist5k",
    recipe={"steps": 600, "batch_size": 32},
    lrs=(),
    seeds=5,
    decides=Decides("deletion", better="lower", by="difference", at_least=0.02),
    prepare=train,
    measure=deleted,
    published="ViT-B/16 on ImageNet, area under the accuracy while pixels are removed, predicted class: 17.03 % with it, "
              "20.05 % with rollout, 24.0 % with raw attention (quoted from memory)",
    scale="4 layers and 49 patches of handwritten digits, against 12 layers and 196 patches of photographs; 125 images; "
          "the probability of the answer is averaged, not whether it stays.",
    cannot="Segmentation of ImageNet, and text.",
)
