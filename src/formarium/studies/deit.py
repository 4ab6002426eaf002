"""DeiT: is a student better that also learns, by a distillation token, from the decisions of a teacher?

The teacher of each seed is a PoolFormer, whose pooling sees neighbours as a convolution does, trained on the same images.
Students differ in their loss alone: both have the two tokens and the two classifiers.
"""

from ..arena.study import Cell, Decides, Seed, Study

HOST, TEACHER = "deit/nano:patch=7", "poolformer/nano"
STEPS = 120


def teach(seed: Seed) -> None:
    seed.train(TEACHER, into="teacher", steps=150, lr=3e-3)


def learn(cell: Cell) -> dict[str, float]:
    assert cell.prepared is not None
    teacher = cell.prepared / "teacher/last.safetensors"
    return cell.train(objective=None if cell.arm == "labels" else f"deit(teacher={teacher},kind={cell.arm})")[1]


STUDY = Study(
    system="deit",
    claim="A ViT with a distillation token that learns from a teacher's decisions is more accurate than one that learns "
          "from the labels alone.",
    source="Training Data-Efficient Image Transformers (arXiv 2012.12877), tables 3 and 5",
    arms={"hard": HOST, "labels": HOST},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": STEPS, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    prepare=teach,
    measure=learn,
    published="ImageNet top-1 without and with a distilled RegNetY-16GF: DeiT-Ti 72.2 and 74.5 %, S 79.9 and 81.2 %, "
              "B 81.8 and 83.4 % (the authors' repository)",
    scale="200 thousand parameters and 120 steps on 3,500 digits of 16 patches, without augmentation, against 5 to 87 M "
          "and 300 epochs of augmented ImageNet; the teacher is no larger than the student.",
    cannot="That a convolutional teacher is better than a Transformer of the same accuracy; that the token is better than "
           "distillation without one; the recipe, whose regularisation pays after many epochs.",
)
