"""Hyena N-D: does it classify few images better than attention, in the same small ViT?

The same frame, without a class token: Hyena in all layers with four directions, attention in all layers, and Hyena in the
first two of three layers. The filter network is narrow, so that the layers have few parameters more than attention's.
"""

from ..arena.study import Decides, Study

FRAME = "hyena_nd/nano:patch=8,dim=48,depth=3"

STUDY = Study(
    system="hyena_nd",
    claim="With Hyena N-D in place of attention a small ViT classifies better after training on few images.",
    source="Multi-Dimensional Hyena for Spatial Inductive Bias (arXiv 2309.13600), abstract",
    arms={"hyena": f"{FRAME},attention=0,mixer=hyena_nd(directions=4dir,width=16)", "attention": f"{FRAME},attention=3",
          "hybrid": f"{FRAME},attention=1,mixer=hyena_nd(directions=4dir,width=16)"},
    matched="steps",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 120, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="Better accuracy on CIFAR-10, CIFAR-100 and Tiny-ImageNet than the same ViT with attention; the numbers were "
              "not looked up",
    scale="60 to 80 thousand parameters in 3 layers, 16 patches and less than half a pass over 9,000 images, against some "
          "millions in 9 layers, 64 patches and 100 passes over 50,000 images and more. Hyena has up to a fifth more "
          "parameters here, by its short convolution and the filter network.",
    cannot="Swin and DeiT as hosts; ImageNet; long training, where attention catches up.",
)
