"""Restormer: do attention over channels and gated networks denoise better than convolutions in the same U-Net?

The control is Restormer's own U-Net of residual blocks (3x3, ReLU, 3x3, no norm), the paper's baseline: two of them where
Restormer has two layers, with as many hidden channels as give the same parameters.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from ..arena.study import Decides, Study
from ..core.ctx import Ctx, Place
from ..core.part import Part
from ..core.spec import spec
from ..parts.embed import to_map, to_tokens
from ..parts.norm import NoNorm

if TYPE_CHECKING:
    from ..core.model import Model
    from ..tasks.base import Task

HIDDEN = 0.8  # hidden channels in channels


class ConvBlock(Part):
    """3x3 convolution, ReLU, 3x3 convolution, over the grid."""

    def __init__(self, dim: int, place: Place) -> None:
        super().__init__(dim, place)
        hidden = round(dim * HIDDEN)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return to_tokens(self.conv2(F.relu(self.conv1(to_map(x, ctx.need_grid(self))))))


def conv_unet(task: "Task") -> "Model":
    from ..papers.restoration.restormer import Restormer

    block = spec(ConvBlock)
    return Restormer(dim=12, depths=(1, 1, 1), heads=(1, 2, 4), refinement=1, mixer=block, channel=block,
                     norm=spec(NoNorm), **task.model_options())


def middles(*, side: int = 128, patch: int = 24) -> "Task":
    """CBSD68 with noise of sigma 25; of each photograph for validation and testing the middle."""
    from ..data.photos import cbsd68
    from ..tasks.restore import Denoise

    data = cbsd68()
    images = dict(data.images)
    for split in ("val", "test"):
        corners = [[(size - side) // 2 for size in image.shape[1:]] for image in images[split]]
        images[split] = [image[:, top:top + side, left:left + side].clone()
                         for image, (top, left) in zip(images[split], corners, strict=True)]
    return Denoise("denoise, middles of the photographs", replace(data, images=images), patch=patch)


STUDY = Study(
    system="restormer",
    claim="In a U-Net, attention over channels with gated feed-forward networks denoises better than residual blocks of as "
          "many parameters.",
    source="Restormer (arXiv 2111.09881), section 4.5, ablation of the Transformer block",
    arms={"restormer": "restormer/nano:dim=12,depths=(2,2,2),refinement=2,heads=(1,2,4)", "conv": conv_unet},
    matched="parameters",
    task=middles,
    recipe={"steps": 250, "batch_size": 4},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("psnr", better="higher", by="difference", at_least=0.2, unit="dB"),
    published="29.62 dB against 29.11 dB of the U-Net with residual blocks (26.1 M and 24.5 M parameters, noise of sigma "
              "50, Urban100; quoted from memory)",
    scale="190 thousand parameters, 250 steps of 4 patches of 24x24 from 44 photographs, noise of sigma 25, against 26 M, "
          "100,000 steps of 128x128 from several sets and sigma 50. Parameters are equal; Restormer computes a fifth more.",
    cannot="Real noise, blur and rain, large images, and what long training adds.",
)
