"""Sets of points, each of its own size, to class logits and to features of every point."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.ctx import Ctx
from ..core.errors import BadData, DoesNotFit
from ..core.model import Model
from ..core.spec import Spec, spec
from ..parts.norm import NoNorm
from ..weights.adapt import Change, refit_classifier
from .stack import Stack

Sets = list[Tensor]  # a batch: float tensors (N_i, 3 + in_chans), a row a point: x, y, z and its features
UNIT = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)


class PointBackbone(Model):
    """sets -> embed -> stages -> norm -> pool -> head.

    A batch is a list of sets (N_i, 3 + in_chans). Their tokens travel as one packed row (1, T, C), set after set, with
    `ctx.lengths` tokens each; where `ctx.mask` (1, 1, 1, T) is given, some of them are empty slots.
    A paper defines `embed`, which also notes in ctx.shared["token"] the token of each point, (sum N_i,), T for none.

    in_chans: columns after x, y, z. bounds: lowest x, y, z, then highest, of the box that the sets lie in.
    pool: "mean" or "max" over the tokens of a set. num_classes: 0 gives the pooled features.
    """

    adapts = ("num_classes",)

    def __init__(self, stages: Sequence[Stack], *, in_chans: int, num_classes: int, bounds: Sequence[float] = UNIT,
                 pool: str = "mean", norm: Spec[nn.Module] = spec(NoNorm)) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise DoesNotFit(f"pool is 'mean' or 'max', not {pool!r}")
        if in_chans < 0:
            raise DoesNotFit(f"in_chans is the number of columns after x, y, z, 0 or more, not {in_chans}")
        if len(bounds) != 6 or not all(low < high for low, high in zip(bounds[:3], bounds[3:], strict=True)):
            raise DoesNotFit(f"bounds are the lowest x, y, z and then the highest, which are greater, not {tuple(bounds)}")
        self.in_chans, self.bounds, self.pool = in_chans, tuple(map(float, bounds)), pool
        self.stages = nn.ModuleList(stages)
        self.num_features = stages[-1].dim
        self.norm = norm(self.num_features)
        self.head: nn.Module
        self.reset_classifier(num_classes)
        for module in self.modules():
            if getattr(module, "across_tokens", False):
                raise DoesNotFit(f"{type(module).__name__} does not fit here: the sets of a batch share one row of tokens, "
                                 "and it takes statistics over all of them")

    def example(self, batch: int = 1, shape: tuple[int, ...] | None = None) -> Sets:
        """Sets of different sizes; `shape` (N, 3 + in_chans) is that of the first and largest. Coordinates are uniform in
        the bounds and exact in bfloat16 too, so that no point changes its cell with the type."""
        n, columns = shape or (256, 3 + self.in_chans)
        low, high = torch.tensor(self.bounds).chunk(2)
        sets = []
        for i in range(batch):
            points = torch.randn(max(1, n * (8 - i % 4) // 8), columns)
            points[:, :3] = (low + (high - low) * torch.rand(len(points), 3)).bfloat16().float().clamp(low, high)
            sets.append(points)
        return sets

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear head for `num_classes` classes; 0: none, the model answers with the pooled features."""
        if num_classes < 0:
            raise DoesNotFit(f"num_classes is 0 (features) or more, not {num_classes}")
        self.num_classes = num_classes
        old = next(self.stages.parameters(), None)
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head if old is None else head.to(old.device, old.dtype)

    def refit(self, name: str, tensor: Tensor | None, was: "PointBackbone") -> Change | None:
        return refit_classifier(self, name, was)

    def check_sets(self, batch: Sets) -> None:
        """Raises unless `batch` is a list of finite sets (N_i, 3 + in_chans) of one point or more."""
        columns = 3 + self.in_chans
        wanted = f"a list of sets (N, {columns}) of floating point numbers: x, y, z and {self.in_chans} more columns"
        if not isinstance(batch, list) or not batch:
            came = f"a {type(batch).__name__}" if not isinstance(batch, list) else "an empty list"
            raise DoesNotFit(f"expected {wanted}, got {came}; a single set is written [points]")
        for i, points in enumerate(batch):
            if points.ndim != 2 or points.shape[1] != columns or not points.is_floating_point():
                raise DoesNotFit(f"expected {wanted}; set {i} is {tuple(points.shape)} {points.dtype}; build the model "
                                 "with in_chans= for another number of columns")
            if not len(points):
                raise BadData(f"set {i} of the batch is empty; a set needs one point or more, leave the empty ones out")
        if values_known(batch) and not torch.cat(batch).isfinite().all():
            i, bad = next((i, s.isfinite().logical_not_()) for i, s in enumerate(batch) if not s.isfinite().all())
            raise BadData(f"{int(bad.any(1).sum())} of {len(bad)} points of set {i} have NaN or infinite values, first "
                          f"point {int(bad.any(1).nonzero()[0])} (counted from 0); leave them out")

    def embed(self, batch: Sets) -> tuple[Float[Tensor, "1 t c"], Ctx]:  # type: ignore[override]
        raise TypeError(f"{type(self).__name__} must define embed")

    def encode(self, x: Float[Tensor, "1 t c"], ctx: Ctx) -> tuple[Float[Tensor, "1 t c"], Ctx]:
        for stage in self.stages:
            x, ctx = stage(x, ctx)
        return self.norm(x), ctx

    def forward(self, batch: Sets) -> Float[Tensor, "b k"]:
        self.check_sets(batch)
        x, ctx = self.encode(*self.embed(batch))
        return self.head(pool_sets(x, ctx, self.pool))

    def point_features(self, batch: Sets) -> list[Float[Tensor, "n c"]]:
        """For each set the last token of every point, in the order of the points; zeros where a point has none. (Where the
        stages change the token set, the paper defines it.)"""
        self.check_sets(batch)
        x, ctx = self.embed(batch)
        token = ctx.shared["token"]
        x, _ = self.encode(x, ctx)
        return list(torch.cat((x[0], x.new_zeros(1, x.shape[2])))[token].split([len(points) for points in batch]))


def values_known(batch: Sets) -> bool:
    """May shapes depend on the values? Not while a graph is traced, nor on the meta device."""
    return not (torch.compiler.is_compiling() or batch[0].is_meta)


def set_of(lengths: Sequence[int], device: torch.device) -> Int[Tensor, " t"]:
    """The number of the set of each token of a packed row."""
    repeats = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(repeats, output_size=sum(lengths))


def pool_sets(x: Float[Tensor, "1 t c"], ctx: Ctx, pool: str) -> Float[Tensor, "b c"]:
    """The mean or maximum of each set's tokens."""
    assert ctx.lengths is not None
    owner, sets = set_of(ctx.lengths, x.device), len(ctx.lengths)
    filled = None if ctx.mask is None else ctx.mask.view(-1, 1)
    values = x[0].float()  # sums of many tokens need more digits than bfloat16 has
    if pool == "max":
        values = values if filled is None else values.masked_fill(~filled, -torch.inf)
        least = values.new_full((sets, x.shape[2]), -torch.inf)
        return least.scatter_reduce(0, owner[:, None].expand_as(values), values, "amax").to(x.dtype)
    ones = values.new_ones(len(values), 1) if filled is None else filled.to(values.dtype)
    total = values.new_zeros(sets, x.shape[2]).index_add(0, owner, values * ones)
    return (total / values.new_zeros(sets, 1).index_add(0, owner, ones)).to(x.dtype)
