"""Twins: do windows that stay classify better when every second layer attends to a subsampled map of the whole image?

Both arms are the same two-stage pyramid. Images of 32x32 in patches of 4x4 give grids of 8x8 and 4x4 tokens, windows of 2x2
leave 4 and 2 to a side. In the first arm layers take turns, the second has local attention alone, of which only the
positions, merging and the final mean pass anything between windows. It lacks the convolutions that subsample, three
percent of the parameters, so the arms are matched in MACs.
"""

from ..arena.study import Decides, Study

HOST = "twins/nano:patch=4,window=2"

STUDY = Study(
    system="twins",
    claim="Windows that stay, in turn with attention to a subsampled map, classify better than windows alone.",
    source="Twins (arXiv 2104.13840), ablation of local and subsampled attention in Twins-SVT-S",
    arms={"in_turn": HOST, "local": f"{HOST},mixers=local"},
    matched="macs",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 200, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1 of the small model: 76.9 % with local attention alone, 81.7 % in turn (the first quoted from "
              "memory)",
    scale="140 thousand parameters in 2 + 2 layers, less than one pass over 9,000 images of 32x32 pixels, windows of 2x2 "
          "tokens, against 24 M in 2 + 2 + 10 + 4 layers, 300 passes over 1.28 M images of 224x224 and windows of 7x7.",
    cannot="That Twins-SVT beats Swin; detection and segmentation; cost at large images.",
)
