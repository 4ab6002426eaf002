"""DropPos: does classifying the dropped positions of visible patches make a better start than chance?

Pre-training and fine-tuning see the same training images. The arms are equal in steps of fine-tuning, not in computing: a
step of pre-training computes about as much as one of fine-tuning (a quarter of the patches with gradients, all of them
without, and a small decoder), so that the pre-trained arm computes two to three times as much as the other in all.
"""

from ..arena.study import Cell, Decides, Seed, Study

HOST = "droppos/nano"
PRETRAINING, TUNING = 600, 400  # steps


def pretrain(seed: Seed) -> None:
    seed.pretrain("droppos", HOST, steps=PRETRAINING, lr=1e-3)


def tune(cell: Cell) -> dict[str, float]:
    assert cell.prepared is not None
    return cell.train(init=str(cell.prepared / "pretrained/encoder.safetensors") if cell.arm == "droppos" else None)[1]


STUDY = Study(
    system="droppos",
    claim="A ViT that was pre-trained to say where patches are from is more accurate after fine-tuning than one that "
          "starts from chance.",
    source="DropPos (arXiv 2309.03576), abstract; the published accuracies from the authors' repository",
    arms={"droppos": HOST, "scratch": HOST},
    matched="steps",
    task="mnist5k",
    recipe={"steps": TUNING, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=pretrain,
    measure=tune,
    published="ViT-B/16 on ImageNet: 83.0 % after 200 epochs of pre-training and 84.2 % after 800, against 82.3 % from "
              "scratch (the last from MAE, arXiv 2111.06377, quoted from memory)",
    scale="200 thousand parameters and 600 steps of pre-training on 3,500 images of digits with 49 patches, many of them "
          "black, against 86 M and 200 epochs or more on 1.3 M photographs with 196 patches.",
    cannot="Equal computing in all, where training from scratch for longer may do as well; MAE and contrastive learning; "
           "detection and segmentation.",
)
