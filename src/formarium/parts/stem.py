"""Convolutional networks that stand before a Transformer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..weights.adapt import Change, refit_kernel


class Stem(nn.Module):
    """Images (B, in_chans, H, W) -> maps (B, channels, H / stride, W / stride). Built as stem(in_chans)."""

    channels: int
    stride: int


class StdConv(nn.Conv2d):
    """Convolution without bias whose weights are standardised for each output channel (arXiv 1903.10520)."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, *, eps: float = 1e-8) -> None:
        super().__init__(in_chans, out_chans, kernel, stride, bias=False)
        self.eps = eps

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        w = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True, momentum=0.0, eps=self.eps)
        return F.conv2d(same_pad(x, self.kernel_size[0], self.stride[0]), w.view_as(self.weight), None, self.stride)


def same_pad(x: Float[Tensor, "b c h w"], kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Padding as TensorFlow's "SAME": the output has ceil(size / stride) cells; the odd pixel goes right and below."""
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolution, each with group norm; ReLU after the sum."""

    def __init__(self, in_chans: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = StdConv(in_chans, width, 1), nn.GroupNorm(32, width)
        self.conv2, self.norm2 = StdConv(width, width, 3, stride), nn.GroupNorm(32, width)
        self.conv3, self.norm3 = StdConv(width, out, 1), nn.GroupNorm(32, out)
        projects = in_chans != out or stride != 1
        self.conv0 = StdConv(in_chans, out, 1, stride) if projects else None
        self.norm0 = nn.GroupNorm(32, out) if projects else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + (x if self.conv0 is None or self.norm0 is None else self.norm0(self.conv0(x))))


class ResNetStem(Stem):
    """Root (7x7, stride 2, pool by 2), then stages of bottlenecks: BiT-style ResNet v1 of the ViT hybrids.

    layers: blocks of each stage; () is the root alone.
    """

    adapts = ("in_chans",)

    def __init__(self, in_chans: int, *, layers: tuple[int, ...] = (3, 4, 9), width: int = 64) -> None:
        super().__init__()
        self.conv, self.norm = StdConv(in_chans, width, 7, 2), nn.GroupNorm(32, width)
        self.channels, self.stride = width, 4
        self.stages = nn.ModuleList()
        for i, depth in enumerate(layers):
            stride = 1 if i == 0 else 2
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(self.channels, width * 2**i, stride if j == 0 else 1))
                self.channels = 4 * width * 2**i
            self.stride *= stride
            self.stages.append(nn.Sequential(*blocks))

    def refit(self, name: str, tensor: Tensor | None, was: "ResNetStem") -> Change | None:
        """Not exact for fewer channels: the standardisation gives each output channel another scale."""
        change = refit_kernel(tensor, self.conv.weight.shape) if name == "conv.weight" and tensor is not None else None
        return change and change._replace(how=f"{change.how}, then standardised anew")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(same_pad(x, 3, 2, value=float("-inf")), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x
