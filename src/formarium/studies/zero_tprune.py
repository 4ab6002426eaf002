"""Zero-TPrune: do votes on the graph of attention choose tokens better than chance, in a model that is not trained for it?

The same trained ViT is pruned in each way, after the same layers and to the same numbers of tokens. keep=0.7 saves as
large a part of the MACs (over a third) as the paper's setting does of DeiT-S. The choice by the class token's attention, a
simpler one that the paper's ablation has not, is shown beside them.
"""

from ..arena.study import Cell, Decides, Seed, Study

HOST = "vit/nano"


def train(seed: Seed) -> None:
    seed.train(HOST, into="base", lr=3e-3)


def pruned(cell: Cell) -> dict[str, float]:
    from ..core.transform import apply
    from ..weights.load import load

    assert cell.prepared is not None
    model, transform = load(cell.prepared / "base/last.safetensors"), str(cell.model).partition("+")[2]
    return cell.task.evaluate(apply(model, transform) if transform else model, "test")


STUDY = Study(
    system="zero_tprune",
    claim="Without any training, tokens chosen by votes on the graph of attention and by likeness cost less accuracy to "
          "prune than as many chosen at random.",
    source="Zero-TPrune (arXiv 2305.17328), ablation of its parts on DeiT-S",
    arms={"zero-tprune": f"{HOST}+zero_tprune(keep=0.7)", "random": f"{HOST}+zero_tprune(keep=0.7,by=random)",
          "class attention": f"{HOST}+zero_tprune(keep=0.7,by=class)", "all tokens": HOST},
    matched="tokens",
    task="mnist5k",
    recipe={"steps": 1000, "batch_size": 32},
    lrs=(),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=train,
    measure=pruned,
    published="DeiT-S on ImageNet: 0.4 points lost of 79.8 % for 34.7 % fewer FLOPs; at equal FLOPs random choice leaves "
              "76.8 % (the latter quoted from memory)",
    scale="4 layers and 49 patches of handwritten digits on black, against 12 layers and 196 patches of photographs. The "
          "rates are the same after each of three layers, not searched for on images as the paper's are.",
    cannot="Time, since at this size the votes cost more than the tokens; the paper's comparison with methods that merge "
           "tokens or train.",
)
