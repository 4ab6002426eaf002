"""iRPE: do relative positions that meet the query classify better beside the absolute ones than these alone?

The same model, which has its learned absolute positions in all arms, as DeiT has. The relative ones start at zero, so both
arms start from the same function. The bias mode, which knows nothing of the query, is shown.
"""

from ..arena.study import Decides, Study

HOST = "vit/nano:patch=7"

STUDY = Study(
    system="irpe",
    claim="Contextual relative positions on the keys, added to a ViT with absolute positions, classify better, without any "
          "other setting changed.",
    source="Rethinking and Improving Relative Position Encoding for Vision Transformer (arXiv 2107.14222), abstract, "
           "and the table of released models",
    arms={"contextual": f"{HOST},mixer=attention(position=irpe)", "absolute": HOST,
          "bias": f"{HOST},mixer=attention(position=irpe(mode=bias,shared=false))"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 300, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1: DeiT-S 79.9 %, with iRPE on keys 80.9 %; DeiT-Ti 72.2 % and 73.7 %, DeiT-B 81.8 % and "
              "82.3 % (those without iRPE quoted from memory)",
    scale="200 thousand parameters, 16 patches of handwritten digits and nearly three passes over 3,500 of them, against 6 "
          "to 87 M, 196 patches and 300 passes over ImageNet.",
    cannot="DETR, where the paper gains 1.3 mAP; which of the four methods is best, as they differ by a few tenths.",
)
