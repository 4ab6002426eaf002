"""Swin: do shifted windows classify better than windows that stay where they are?

Both arms are the same two-stage pyramid. Images of 32x32 in patches of 4x4 give grids of 8x8 and 4x4 tokens, so windows of
2x2 leave 4 and 2 to a side (the paper's stages have 8, 4, 2 and 1). Only merging and the final mean pass anything between
windows that stay.
"""

from ..arena.study import Decides, Study

HOST = "swin/nano:patch=4,window=2,dim=48"

STUDY = Study(
    system="swin",
    claim="Shifting the windows in every second layer classifies better than windows that stay, at the same cost.",
    source="Swin Transformer (arXiv 2103.14030), table 4, rows w/o shifting and shifted windows",
    arms={"shifted": HOST, "unshifted": f"{HOST},shifted=False"},
    matched="parameters",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 400, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=4,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="Swin-T on ImageNet: 81.3 % top-1 shifted, 80.2 % unshifted; on COCO 50.5 and 47.7 box AP, on ADE20K 46.1 "
              "and 43.3 mIoU",
    scale="300 thousand parameters in 2 + 2 layers, one and a half passes over 9,000 images of 32x32 pixels, windows of "
          "2x2 tokens, against 28 M in 2 + 2 + 6 + 2 layers, 300 passes over 1.28 M images of 224x224 and windows of 7x7.",
    cannot="Detection and segmentation, where the paper's margins are larger; cost at large images.",
)
