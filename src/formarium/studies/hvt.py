"""HVT: is a wider ViT whose tokens are pooled better than a narrow one that keeps them, at the same cost?

Both average their last tokens. The third arm is the narrow one pooled, without spending what is saved.
"""

from ..arena.study import Decides, Study

STUDY = Study(
    system="hvt",
    claim="Pooling the tokens and spending what is saved on width classifies better than keeping them all.",
    source="Scalable Vision Transformers with Hierarchical Pooling (arXiv 2103.10619), abstract, figure 1 and table 2",
    arms={"pooled and wide": "hvt/nano:dim=68", "plain": "vit/nano:pool=mean,dim=48",
          "pooled": "hvt/nano:dim=48"},
    matched="macs",
    task="mnist5k",
    recipe={"steps": 150, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=5,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.01),
    published="ImageNet top-1: Scale HVT-Ti-4 75.23 % at 1.39 G MACs, DeiT-Ti 72.2 % at 1.25 G",
    scale="two poolings of 49 tokens and a width of 68 against 48, in 4 layers, little more than one pass over 3,500 "
          "handwritten digits, against four poolings of 196 tokens, widths of 384 and 192, 12 layers and 300 passes over "
          "ImageNet.",
    cannot="The same at 12 layers, where a longer way with few tokens follows; more resolution or smaller patches instead "
           "of width; the class token against the mean.",
)
