"""SReT: does running every block twice, with the same weights, classify better at the same parameters?

The plain recursion of the paper's ablation, without the layers between the runs, which would add parameters. The same three
blocks, run once and run twice; the same steps, so the second costs twice the computation.
"""

from ..arena.study import Decides, Study

HOST = "sret/nano:patch=4,groups=(1,1),regroups=(1,1),projection_ratio=none"

STUDY = Study(
    system="sret",
    claim="Running each block twice with the same weights classifies better than running it once.",
    source="Sliced Recursive Transformer (arXiv 2111.05297), abstract, and the ablation of recursion in section 4",
    arms={"twice": HOST, "once": f"{HOST},loops=1"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="About 2 % ImageNet top-1 by naive recursion at the same parameters (abstract)",
    scale="170 thousand parameters in three blocks, two convolutional halvings before them, and 150 steps on 3,500 "
          "handwritten digits, against 4.8 M and 300 passes over ImageNet.",
    cannot="That the largest models beat other networks of their computation, that slicing costs little accuracy, and "
           "that a thousand layers train well.",
)
