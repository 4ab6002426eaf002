"""CrossViT: does the fusion of two branches classify better than two branches that never meet?

Both arms have a branch of small and one of large patches, and average the logits of both class tokens. In the second arm
each class token goes through the same layers of fusion, and reads itself alone, not the other branch's patches. So the
parameters are the same.
"""

from typing import TYPE_CHECKING

from ..arena.study import Decides, Study

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

HOST = "crossvit/nano:dims=(32,64),ratios=(3,3)"


def apart(task: "Task") -> "Model":
    """CrossViT whose branches do not meet."""
    from ..arena.train import build_for

    model = build_for(HOST, task)
    for stage in model.stages:
        for fusion in stage.fusion:
            fusion.attention.register_forward_pre_hook(lambda _, args: ((args[0][0], args[0][1][:, :0]), *args[1:]))
    return model


STUDY = Study(
    system="crossvit",
    claim="Two branches whose class tokens read each other's patches classify better than two that never meet.",
    source="CrossViT (arXiv 2103.14899), table of fusion schemes in section 4.3, none and cross-attention",
    arms={"fused": HOST, "apart": apart},
    matched="parameters",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 160, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.008),
    published="ImageNet top-1 of CrossViT-S: 81.0 % with cross-attention, 80.2 % without fusion (quoted from memory)",
    scale="240 thousand parameters in two stages, half a pass over 9,000 images of 32x32 pixels, against 27 M in "
          "three stages and 300 passes over ImageNet.",
    cannot="That cross-attention is better than other fusions of the same branches; the margin over DeiT.",
)
