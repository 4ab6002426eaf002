"""ResNet with batch norms (He et al. 2015, arXiv 1512.03385), as torchvision has it: it gives its stages' maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.errors import BadCheckpoint
from ..core.model import Feature, FeatureInfo
from ..weights.adapt import Change, refit_kernel
from ..weights.keys import Rule, drop, keymap, rule
from .norm import BatchNorm


class Block(nn.Module):
    """3x3 twice, or, as a bottleneck, 1x1, 3x3, 1x1; the stride is in the first 3x3; ReLU after the sum."""

    def __init__(self, in_chans: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        kernels, widths = ((1, 3, 1), (in_chans, width, width, out)) if bottleneck else ((3, 3), (in_chans, width, out))
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        for i, (k, s) in enumerate(zip(kernels, strides, strict=True), 1):
            self.add_module(f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], k, s, k // 2, bias=False))
            self.add_module(f"norm{i}", BatchNorm(widths[i]))
        self.count = len(kernels)
        projects = stride != 1 or in_chans != out
        self.conv0 = nn.Conv2d(in_chans, out, 1, stride, bias=False) if projects else None
        self.norm0 = BatchNorm(out) if projects else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.conv0 is None or self.norm0 is None else self.norm0(self.conv0(x))))


class ResNet(nn.Module):
    """images (B, in_chans, H, W) -> maps of its stages. layers: blocks of each stage; width: of the first.

    stem: "large", 7x7 with stride 2 and pooling by 2, as for ImageNet; "small", 3x3, as for CIFAR.
    """

    adapts = ("in_chans",)

    def __init__(self, *, in_chans: int = 3, layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64,
                 bottleneck: bool = True, stem: str = "large") -> None:
        super().__init__()
        self.large, self.layers = stem == "large", layers
        self.conv = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False) if self.large else \
            nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.norm = BatchNorm(width)
        self.stages, self.feature_info = nn.ModuleList(), list[FeatureInfo]()
        before = width
        for i, depth in enumerate(layers):
            own = width * 2**i
            out = 4 * own if bottleneck else own
            self.stages.append(nn.Sequential(*(Block(out if j else before, own, 2 if i and not j else 1,
                                                     bottleneck=bottleneck) for j in range(depth))))
            self.feature_info.append(FeatureInfo(out, (4 if self.large else 1) * 2**i))
            before = out
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def refit(self, name: str, tensor: Tensor | None, was: "ResNet") -> Change | None:
        return refit_kernel(tensor, self.conv.weight.shape) if name == "conv.weight" and tensor is not None else None

    def features(self, x: Float[Tensor, "b c h w"]) -> list[Feature]:
        """The maps of all stages, shallow to deep."""
        x, maps = F.relu(self.norm(self.conv(x))), []
        x = F.max_pool2d(x, 3, 2, 1) if self.large else x
        for stage, info in zip(self.stages, self.feature_info, strict=True):
            x = stage(x)
            maps.append(Feature(x, info.stride))
        return maps

    @torch.no_grad()
    def read_torchvision(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of torchvision's resnet18, 34, 50, ... in place, without their classifier."""
        told = keymap(drop("fc.*", "the classifier"), *torchvision_rules()).convert(dict(state))
        own = self.state_dict()
        if told.unmatched or {k: t.shape for k, t in told.state.items()} != {k: t.shape for k, t in own.items()}:
            strange = [*told.unmatched, *(k for k in own if k not in told.state or told.state[k].shape != own[k].shape)]
            raise BadCheckpoint(f"not the tensors of a torchvision ResNet with {self.layers} blocks: "
                                f"{', '.join(strange[:3])}")
        self.load_state_dict(told.state)


LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


def torchvision_rules(theirs: str = "", ours: str = "", layers: Sequence[str] = LAYERS) -> list[Rule]:
    """torchvision's names after `theirs`, ours after `ours`. layers: what root, its norm and the stages are called."""
    conv, norm, *stages = layers
    steps: Any = lambda t, state, o: torch.zeros((), dtype=torch.int64)  # noqa: E731
    why = "a count of steps that a fixed momentum does not need"
    rules = [drop(f"{theirs}{norm}.num_batches_tracked", why, (f"{ours}norm.running_mean", steps)),
             rule(f"{theirs}{conv}.*", f"{ours}conv.*"), rule(f"{theirs}{norm}.*", f"{ours}norm.*")]
    for s, stage in enumerate(stages):
        a, b = f"{theirs}{stage}.{{u}}", f"{ours}stages.{s}.{{u}}"
        for mine, norms, convs in ((0, "downsample.1", "downsample.0"), *((i, f"bn{i}", f"conv{i}") for i in (1, 2, 3))):
            rules += [drop(f"{a}.{norms}.num_batches_tracked", why, (f"{b}.norm{mine}.running_mean", steps)),
                      rule(f"{a}.{convs}.*", f"{b}.conv{mine}.*"), rule(f"{a}.{norms}.*", f"{b}.norm{mine}.*")]
    return rules
