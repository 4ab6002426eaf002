"""ViTs as dynamic ConvNets: do ReLU and layer norm in the place of softmax learn faster?

The same small ViT with each as the activation of its scores, after the same few steps. That attention is two dynamic
convolutions is exact, so the tests hold it, not this.
"""

from ..arena.study import Decides, Study

HOST = "vit/nano:patch=7"

STUDY = Study(
    system="vit_as_dynamic_conv",
    claim="With ReLU and layer norm in the place of softmax a ViT is better after the same number of steps.",
    source="Interpret Vision Transformers as ConvNets with Dynamic Convolutions (arXiv 2309.10713), abstract",
    arms={"relu_ln": f"{HOST},mixer=vit_as_dynamic_conv", "softmax": HOST},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 220, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=4,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="A faster convergence and a better performance (in words: the tables could not be looked up)",
    scale="200 thousand parameters, two passes over 3,500 handwritten digits, against DeiT and Swin on ImageNet. How the "
          "two are put together is our reconstruction.",
    cannot="The end of a long training; Swin; the depth-wise form, whose advantage is its cost at many tokens.",
)
