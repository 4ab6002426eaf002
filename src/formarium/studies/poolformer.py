"""PoolFormer: is a mixer without any parameters, the mean of the neighbours, better than no mixer at all?

The same two-stage frame with three mixers. The first two have the same parameters and decide. Attention, which has more, is
shown: how far does the frame go without it?
"""

from ..arena.study import Decides, Study

HOST = "poolformer/nano:stride=4"

STUDY = Study(
    system="poolformer",
    claim="In the frame of a Transformer, average pooling as the mixer of tokens classifies better than the identity.",
    source="MetaFormer Is Actually What You Need for Vision (arXiv 2111.11418), table 5, ablation of PoolFormer-S12",
    arms={"pooling": HOST, "identity": f"{HOST},mixers=identity", "attention": f"{HOST},mixers=attention"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 400, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=4,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.02),
    published="ImageNet top-1 77.2 % with pooling, 74.3 % with the identity, 81.0 % with attention in the last two of four "
              "stages (the last quoted from memory)",
    scale="230 thousand parameters in 2 + 2 layers, nearly four passes over 3,500 handwritten digits, against 12 M in "
          "2 + 2 + 6 + 2 layers and 300 passes over ImageNet. Stem and merging are overlapping convolutions in all "
          "arms, as in the paper, so the identity too mixes a little.",
    cannot="That a large PoolFormer beats DeiT and ResMLP at fewer parameters and MACs.",
)
