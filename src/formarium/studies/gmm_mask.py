"""GMM: does a Gaussian mixture mask on the scores help a small ViT on few images?

The paper's small ViT, made smaller, with its mask, without one, and with a learned number for each pair (ELM). All
average their tokens, so that nothing but the mask differs; the paper's plain ViT has a class token.
"""

from ..arena.study import Decides, Study

HOST = "gmm_mask/nano:patch=4,dim=48,depth=3"

STUDY = Study(
    system="gmm_mask",
    claim="A Gaussian mixture mask on the scores of each layer classifies small images better than plain attention.",
    source="RetNet Viewed through Convolution (arXiv 2309.05375), table of results on small data",
    arms={"gmm": HOST, "plain": f"{HOST},mixer=attention(qkv_bias=false)",
          "elm": f"{HOST},mixer=attention(qkv_bias=false,position=elm(tokens=64))"},
    matched="parameters",
    task="cifar10",
    task_options={"augment": False},
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="CIFAR-10 95.06 % with GMM, 93.65 % for the plain ViT with a class token; CIFAR-100 77.81 % and 75.36 %; "
              "Tiny-ImageNet 62.27 % and 59.89 %",
    scale="65 thousand parameters in 3 layers and less than one pass over 9,000 images, against 2.7 M in 9 layers and 100 "
          "passes over 50,000 with AutoAugment, CutMix and MixUp.",
    cannot="Swin, CaiT, PiT and T2T as hosts, where the paper's margins are smaller; long training.",
)
