"""Windows on a grid: cut tokens into them, put them back, and the bias of relative positions inside one."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..weights.adapt import Change, refit_map


def to_windows(x: Float[Tensor, "b h w c"], window: tuple[int, int],
               shift: tuple[int, int] = (0, 0)) -> Float[Tensor, "b*n m c"]:
    """(B, H, W, C) -> (B * windows, window area, C); H and W are multiples of the window.

    shift: the windows lie this many rows and columns further, around the edges of the grid.
    """
    (p, q), (b, h, w, c) = window, x.shape
    if any(shift):  # one gather: roll copies once an axis, and its backward pass takes several times as long
        place = torch.arange(h * w, device=x.device).view(1, h, w, 1).roll((-shift[0], -shift[1]), (1, 2))
        return x.flatten(1, 2).index_select(1, to_windows(place, window).flatten()).view(-1, p * q, c)
    return x.view(b, h // p, p, w // q, q, c).transpose(2, 3).reshape(-1, p * q, c)


def from_windows(x: Float[Tensor, "b*n m c"], window: tuple[int, int], grid: tuple[int, int],
                 shift: tuple[int, int] = (0, 0)) -> Float[Tensor, "b h w c"]:
    """The inverse of `to_windows`."""
    (p, q), (h, w), c = window, grid, x.shape[-1]
    if any(shift):
        place = from_windows(torch.arange(h * w, device=x.device).view(-1, p * q, 1), window, grid).roll(shift, (1, 2))
        return x.view(-1, h * w, c).index_select(1, place.flatten()).view(-1, h, w, c)
    return x.view(-1, h // p, w // q, p, q, c).transpose(2, 3).reshape(-1, h, w, c)


def pad_to_windows(x: Float[Tensor, "b h w c"], window: tuple[int, int]) -> Float[Tensor, "b h2 w2 c"]:
    """Zeros to the right and below, up to multiples of the window."""
    right, below = -x.shape[2] % window[1], -x.shape[1] % window[0]
    return F.pad(x, (0, 0, 0, right, 0, below)) if right or below else x


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int],
               device: torch.device | None = None) -> Bool[Tensor, "n m m"]:
    """For each window of a cyclically shifted grid: True where two tokens were neighbours before the shift."""
    def region(size: int, step: int, by: int) -> Int[Tensor, "size"]:
        i = torch.arange(size, device=device)
        return (i >= size - step).int() + (i >= size - by).int() if by else torch.zeros_like(i).int()

    rows, cols = (region(*a) for a in zip(grid, window, shift, strict=True))
    regions = to_windows((3 * rows[:, None] + cols)[None, ..., None], window)[..., 0]
    return regions[:, :, None] == regions[:, None, :]


class RelativeBias(nn.Module):
    """A learned number for each head and each offset inside a window (Swin, arXiv 2103.14030, Eq. 4)."""

    undecayed = ("table",)
    adapts = ("window", "img_size")
    index: Tensor

    def __init__(self, window: tuple[int, int], heads: int) -> None:
        super().__init__()
        h, w = window
        self.offsets = (2 * h - 1, 2 * w - 1)
        self.table = nn.Parameter(torch.empty((2 * h - 1) * (2 * w - 1), heads))
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)
        y, x = np.divmod(np.arange(h * w), w)  # not torch, whose meta device imports its compiler to subtract
        down, right = y[:, None] - y + h - 1, x[:, None] - x + w - 1
        self.register_buffer("index", torch.tensor(down * (2 * w - 1) + right), persistent=False)

    def forward(self) -> Float[Tensor, "heads m m"]:
        return self.table[self.index.flatten()].view(*self.index.shape, -1).permute(2, 0, 1)

    def refit(self, name: str, tensor: Tensor | None, was: "RelativeBias") -> Change | None:
        """As the authors of Swin do for another window, but antialiased."""
        if tensor is None or self.offsets == was.offsets:
            return None
        return refit_map(tensor, 0, was.offsets, self.offsets)
