"""TurboViT: are blocks better spent after the second Q-pooling than evenly over the stages?

Three stages of about doubling width, two Q-poolings, six blocks. Both arms have the same computation; what is late has more
parameters, as in the paper's design.
"""

from ..arena.study import Decides, Study

HOST = "turbovit/nano:patch=4,heads=(1,2,4),unit=4,local=2,pools=2"

STUDY = Study(
    system="turbovit",
    claim="At the same computation, a mask-unit ViT with most of its blocks after the second Q-pooling classifies better "
          "than one with as many in each stage.",
    source="TurboViT (arXiv 2308.11421), section 2, discussion of the design that was found",
    arms={"late": f"{HOST},dims=(32,64,124),depths=(1,1,4)", "even": f"{HOST},dims=(32,64,128),depths=(2,2,2)"},
    matched="macs",
    task="mnist5k",
    recipe={"steps": 200, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="The paper has no ablation of the depths; the network found has 82.1 % ImageNet top-1 at 2.2 G "
              "multiply-accumulates (by the abstract's ratios)",
    scale="Half a million parameters and more in six blocks, on a grid of 7 x 7 tokens, 200 steps on 3,500 handwritten "
          "digits, against 12.7 M in thirteen blocks on 56 x 56 tokens and ImageNet. The late arm is as narrow in its last "
          "stage as equal computation asks.",
    cannot="The speed on a GPU, that the search of the paper finds this network, and its comparison with ten others.",
)
