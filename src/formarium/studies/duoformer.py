"""DuoFormer: is attention among the scales of a region better than the same Transformer on the last scale alone?

Both arms are the same network, a small ResNet of four stages, and the same layers. One gives each of the 16 regions the 1,
4 and 16 cells of the last three stages, the other the one cell of the last. The scale token is a learned vector in both:
one made from all stages would show the control the others too.
"""

from typing import TYPE_CHECKING

from ..arena.study import Decides, Study

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task


def build(task: "Task", scales: int) -> "Model":
    from ..core.build import create_model
    from ..core.spec import spec
    from ..parts.resnet import ResNet

    trunk = spec(ResNet, layers=(1, 1, 1, 1), width=8, bottleneck=False, stem="small")
    return create_model("duoformer/nano", backbone=trunk, scales=scales, scale_token="random", depth=1,
                        **task.model_options())


def three_scales(task: "Task") -> "Model":
    return build(task, 3)


def one_scale(task: "Task") -> "Model":
    return build(task, 1)


STUDY = Study(
    system="duoformer",
    claim="Attention among the scales of each region, then among regions, classifies better than the same on the last "
          "stage alone.",
    source="DuoFormer (arXiv 2506.12982), abstract and the comparison with ViT hybrids on the same network",
    arms={"three scales": three_scales, "one scale": one_scale},
    matched="parameters",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 80, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="On two sets of kidney histopathology up to 3.83 points more accuracy than ResNet and ViT hybrids on it with "
              "supervised weights, 9.88 with self-supervised ones (a summary of arXiv 2407.13920; the tables not at hand)",
    scale="a ResNet of 4 blocks from scratch, 22 tokens of width 32 in 16 regions, a layer of each attention, little more "
          "than a quarter of a pass over 9,000 photographs, against a pre-trained ResNet-50 and up to 86 tokens of width "
          "768 in 49 regions.",
    cannot="Medical images, where fine patterns decide; pre-trained networks; the scale token made from channels.",
)
