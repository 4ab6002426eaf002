"""PiT: is it better to trade tokens for channels with depth than to keep both?

The control is the same class with one stage: the same overlapping patches, as many layers, one width. Widths are chosen so
that both arms cost about the same; the pyramid has then more parameters, as it has in the paper.
"""

from ..arena.study import Decides, Study

STUDY = Study(
    system="pit",
    claim="At the same cost, a ViT whose map shrinks and whose channels grow with depth classifies better than one that "
          "keeps both.",
    source="Rethinking Spatial Dimensions of Vision Transformers (arXiv 2103.16302), tables 1 and 3; the code's README",
    arms={"pyramid": "pit/nano:dims=(32,64,128)", "one stage": "pit/nano:dims=(34,),depths=(4,),heads=(2,)"},
    matched="macs",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1 with DeiT's recipe: PiT-XS 78.1 % at 1.4 G MACs, DeiT-Ti 72.2 % at 1.3 G; PiT-S 80.9 % at "
              "2.9 G, DeiT-S 79.8 % at 4.6 G; PiT-B 82.0 % at 12.5 G, DeiT-B 81.8 % at 17.6 G",
    scale="333 thousand parameters against 66 thousand, 49, 16 and 4 tokens in 1 + 2 + 1 layers against 49 in 4, less than "
          "one pass over 9,000 images, against 10.6 M and 5.7 M, 729, 196 and 49 tokens in 2 + 6 + 4 layers against 196 in "
          "12, and 300 passes over ImageNet.",
    cannot="Detection and robustness; distillation; training long enough for the larger model to overfit.",
)
