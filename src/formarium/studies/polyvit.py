"""PolyViT: does it give the same class for an image and its circular shifts, where a ViT does not?

Both are trained without augmentation. Then every test image is shifted around its edges by random numbers of pixels, eight
times, the same for both. Consistency is the share of these that keep the class; it decides. Accuracy, on the images as
they are and in the worst of the shifts, is shown: a net that always gives one class would be consistent too.

Consistency of 100 % needs one largest among the phases. In 7 % of these images (pixels at 0 and 255, 49 phases of 16
patches) several phases have exactly the same norm; a shift then changes which is taken, in float64 as in float32. The
images whose logits change under shifts are all of this kind.
"""

import torch

from ..arena.study import Cell, Decides, Study
from ..tasks.base import evaluating
from ..tasks.classify import Classify

HOST = "nano:patch=7"
SHIFTS = 8


def shifted(cell: Cell) -> dict[str, float]:
    model, found = cell.train()
    assert isinstance(cell.task, Classify)
    random = torch.Generator().manual_seed(cell.seed)
    kept = worst = total = 0
    with evaluating(model):
        for images, labels in cell.task.batches("test", 256):
            plain = model(images).argmax(1)
            right = plain == labels
            for _ in range(SHIFTS):
                by = [int(torch.randint(side, (), generator=random)) for side in images.shape[2:]]
                answer = model(images.roll(by, (2, 3))).argmax(1)
                kept += int((answer == plain).sum())
                right &= answer == labels
            worst, total = worst + int(right.sum()), total + len(labels)
    return {**found, "consistency": kept / (SHIFTS * total), "accuracy_worst_shift": worst / total}


STUDY = Study(
    system="polyvit",
    claim="With adaptive polyphase anchoring a ViT gives the same class for all circular shifts of an image; without, it "
          "does not.",
    source="Reviving Shift Equivariance in Vision Transformers (arXiv 2306.07470), abstract",
    arms={"polyvit": f"polyvit/{HOST}", "vit": f"vit/{HOST}"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 300, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("consistency", better="higher", by="difference", at_least=0.02),
    measure=shifted,
    published="100 % consistency of PolyViT and PolyTwins; Twins falls from 80.57 to 62.40 % ImageNet top-1 under small "
              "shifts chosen against it",
    scale="200 thousand parameters, handwritten digits of 28 pixels and shifts around the edges by any number of pixels, "
          "against 22 to 86 M, ImageNet and shifts of a few pixels, which cut a digit in two more seldom. "
          "Digits have phases of equal norm; photographs hardly ever do.",
    cannot="PolyTwins, whose logits the tests show to be the same under all shifts, against "
           "Twins, at their cost; cropped, tilted and otherwise changed images, where the paper finds less.",
)
