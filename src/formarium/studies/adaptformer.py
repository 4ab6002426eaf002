"""AdaptFormer: are bottlenecks beside frozen MLPs as good as tuning everything?

A ViT learns the digits 0 to 4 and is then tuned to tell 5 to 9 apart. The bottlenecks are an eighth of the width (the
paper's a twelfth). The linear arm has adapters of scale 0, which change nothing: only its head learns.
"""

from ..arena.study import Cell, Decides, Seed, Study
from ..tasks.classify import Classify, mnist5k

HOST = "vit/nano:patch=7"


def half(*, first: int) -> Classify:
    """MNIST's five digits from the first on."""
    from ..data.images import Images

    whole = mnist5k().data
    chosen = {s: (labels >= first) & (labels < first + 5) for s, labels in whole.labels.items()}
    pixels = {s: whole.pixels[s][c] for s, c in chosen.items()}
    labels = {s: whole.labels[s][c] - first for s, c in chosen.items()}
    return Classify(f"digits {first} to {first + 4} of mnist5k",
                    Images(pixels, labels, whole.classes[first:first + 5], whole.origin))


def pretrain(seed: Seed) -> None:
    seed.train(HOST, task=seed.get_task(first=0), into="base", steps=600, lr=3e-3)


def tune(cell: Cell) -> dict[str, float]:
    assert cell.prepared is not None
    model, found = cell.train(init=str(cell.prepared / "base/last.safetensors"))
    trained = model.head if cell.arm == "linear" else model
    return {**found, "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad)}


STUDY = Study(
    system="adaptformer",
    claim="Tuning small bottlenecks beside the frozen MLPs of a pre-trained ViT, and its head, is as good as tuning all.",
    source="AdaptFormer (arXiv 2205.13535), abstract; results on images and video",
    arms={"adaptformer": f"{HOST}+adaptformer(bottleneck=8)", "full": HOST,
          "linear": f"{HOST}+adaptformer(bottleneck=1,scale=0.0)"},
    matched="steps",
    task=half,
    task_options={"first": 5},
    recipe={"steps": 300, "batch_size": 32},
    lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", no_worse_by=0.02),
    prepare=pretrain,
    measure=tune,
    data=("mnist5k",),
    published="With 1.5 % of the parameters 10 % (Something-Something v2) and 19 % (HMDB51) better than full tuning, "
              "relatively; on images (CIFAR-100, SVHN, Food-101) from equal to 2.5 points worse (these from memory)",
    scale="200 thousand parameters, pre-trained with labels on 1,750 digits, against a ViT-B that was pre-trained without "
          "labels on ImageNet or on video. Tuned by AdamW, each arm at its best rate.",
    cannot="That it beats full tuning on video, where data is scarce for so large a model.",
)
