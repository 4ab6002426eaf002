"""ALBERT: does sharing the parameters of all layers cost little accuracy?

Both arms are the same net of four layers from chance, with the same factorised embedding; in one the layers have one set of
parameters, less than a third of the parameters in all. They compute the same.
"""

from ..arena.study import Decides, Study

STUDY = Study(
    system="albert",
    claim="An encoder whose layers share all parameters is at most 2 points less accurate than the same without sharing.",
    source="ALBERT (arXiv 1909.11942), table 4: base size, embeddings of width 128",
    arms={"shared": "albert/nano", "own": "albert/nano:groups=4"},
    matched="macs",
    task="token_kinds",
    recipe={"steps": 600, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", no_worse_by=0.02),
    published="Average of five tasks: 80.1 with all parameters shared (12 M), 81.6 with none (89 M), a loss of 1.5 points "
              "(quoted from memory)",
    scale="62 against 212 thousand parameters in 4 layers of width 64, from chance on one task of bytes, against 12 and "
          "89 M in 12 layers of width 768, pre-trained on text.",
    cannot="Wider models for the parameters saved, which the paper's best results come from; sharing attention or the MLP "
           "alone; sentence-order prediction.",
)
