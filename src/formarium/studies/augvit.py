"""Augmented shortcuts: do learned paths beside the identity help a deep, narrow ViT?

Eight layers on 16 patches, once with the identity alone, once with two block-circulant paths beside it. The diversity of
the last layer's tokens, which the paper explains the gain by, is shown.
"""

from ..arena.study import Cell, Decides, Study

HOST = "vit/nano:patch=7,depth=8"


def with_diversity(cell: Cell) -> dict[str, float]:
    from ..papers.residuals.augvit import feature_diversity

    model, numbers = cell.train()
    images, _ = next(iter(cell.task.batches("val", 256)))  # type: ignore[attr-defined]
    return numbers | {"diversity": feature_diversity(model, images, relative=True)[-1]}  # type: ignore[arg-type]


STUDY = Study(
    system="augvit",
    claim="Two block-circulant paths beside each shortcut of a deep ViT classify better than the identity alone.",
    source="Augmented Shortcuts for Vision Transformers (arXiv 2106.15941), table 2",
    arms={"augmented": f"{HOST},residual=augvit", "identity": HOST},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    measure=with_diversity,
    published="ImageNet top-1 80.9 % against 79.8 % of DeiT-S, 82.4 % against 81.8 % of DeiT-B",
    scale="400 thousand parameters in 8 layers of width 64, over one pass over 3,500 handwritten digits, against 22 M and "
          "86 M in 12 layers, 300 passes over ImageNet with DeiT's recipe.",
    cannot="The doubly exponential loss of diversity without any shortcut, which no model that trains shows; PVT and T2T.",
)
