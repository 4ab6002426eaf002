"""LRFormer: does attention by contractive distances tell strange images from known ones better than dot products?

Small ViTs learn handwritten digits and are then shown photographs of the same size, grey. The lower its highest
probability, the stranger an image is taken to be; the area under the ROC curve decides. The calibration error and the
likelihood on digits are shown.
"""

from ..arena.study import Cell, Decides, Study

HOST = "vit/nano:patch=7"


def telling_apart(cell: Cell) -> dict[str, float]:
    from ..arena.calibration import uncertainty

    model, numbers = cell.train()
    found = uncertainty(model, cell.task, cell.get_task("cifar10"), "val" if cell.quick else "test")  # type: ignore[arg-type]
    return {**found, "val": numbers["val"]}


STUDY = Study(
    system="lrformer",
    claim="A ViT with Lipschitz-regularised attention detects images unlike its training's better than with dot products.",
    source="LRFormer (arXiv 2306.06849), abstract: out-of-distribution detection on vision benchmarks",
    arms={"lrsa": f"{HOST},mixer=lrformer", "dot product": HOST},
    matched="steps",
    task="mnist5k",
    data=("cifar10",),
    recipe={"steps": 220, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("auroc", better="higher", by="difference", at_least=0.01),
    measure=telling_apart,
    val_better="higher",
    published="Higher AUROC and AUPR from CIFAR-10 to SVHN and CIFAR-100 than other methods of one forward pass (in words: "
              "the tables could not be looked up)",
    scale="190 and 205 thousand parameters in 4 layers, two passes over 3,500 digits, against 6 and 12 layers and long "
          "training on CIFAR-10 and CIFAR-100. Digits and photographs differ more than CIFAR-10 and CIFAR-100 do.",
    cannot="Ensembles and the other methods of one forward pass; the Gaussian-process head; strange images that are near.",
)
