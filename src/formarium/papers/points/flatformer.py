"""FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer (Liu, Yang, Tang, Yang, Han, CVPR 2023),
arXiv 2301.08739.

New: groups of equal sizes, not windows of equal shapes. The occupied cells of a bird's-eye grid are sorted by window and,
within a window, by place (section 4.1), the sorted row is cut into groups of G tokens, and softmax attention works inside
each group: one dense batch, without padding. The sorting runs along x or y, with the windows shifted by half or not, in
turn, so four layers see four neighbourhoods. Queries and keys carry a sine embedding of the cell, values do not.

Decisions, by the authors' code: the windows, and the columns of a window, are walked there and back, so that the row is
one path; the paper has them start anew. The last group of a set is filled up with the tokens at the same places of the
group before it. A set smaller than a group has none: there the authors' index fails or reads another set, here the group
ends with the set (a mask). Their keys of different sets overlap where a window is wide for the grid; here they never do.
The far edge of the bounds belongs to the last cell. Points outside the bounds are left out, as in the authors' pipeline.
While a graph is traced (compiled, exported, counted on the meta device) shapes may not depend on values: a set then has one
slot for each point, and the empty ones are masked, with the same answers; MACs count one cell a point.

Encoder of pillars: mmdetection3d's DynamicVFE, as the authors' models have it: each point with its distance to the mean of
its cell and to the cell's centre, linear layers with batch norm and ReLU, maximum over the cell, which is handed back to
the points before the next layer. `nano` has layer norm there, so that sets never meet in training either.
Deviations: what follows the bird's-eye map (SECOND, its pyramid, CenterPoint's head) is not here, `bev` gives the map that
they take. The classifier (mean or maximum over the cells) is ours. Biases start at zero, in the MLP too.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import BadData, DoesNotFit
from ...core.part import Part, Resample, Residual
from ...core.spec import Spec, spec
from ...parts.attend import attend
from ...parts.attention import head_dim, join_heads, split_heads
from ...parts.channel import Mlp, linear
from ...parts.norm import LayerNorm
from ...parts.residual import PostNorm
from ...skeletons.points import UNIT, PointBackbone, Sets, set_of, values_known
from ...skeletons.stack import Stack
from ...weights.keys import State, as_preset, count, drop, keymap, rule, told_ratio

CARD = Card(
    title="FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer",
    authors="Zhijian Liu, Xinyu Yang, Haotian Tang, Shang Yang, Song Han",
    venue="CVPR 2023",
    arxiv="2301.08739",
    year=2023,
    code="https://github.com/mit-han-lab/flatformer",
    licence="none stated",
    kind="points",
    domain="points",
    tags=("point cloud", "window attention", "efficient", "bird's-eye view", "lidar"),
    claim="4.6 times as fast as SST and 1.4 times as fast as CenterPoint on Waymo, at equal or better accuracy "
          "(67.2 mAPH at level 2 with one frame).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons"),
        "waymo_1f": Published(params=1077312, results={"Waymo L2 mAPH": 67.2, "Waymo L2 mAP": 69.7},
                              note="parameters of the authors' code: 1,059,840 of the encoder, 17,472 of the pillars; the "
                                   "detection head is not counted"),
        "waymo_2f": Published(params=1077312, results={"Waymo L2 mAPH": 71.2, "Waymo L2 mAP": 72.7},
                              note="the same network on the points of two frames"),
        "waymo_3f": Published(params=1077312, results={"Waymo L2 mAPH": 72.0, "Waymo L2 mAP": 73.5},
                              note="the same network on the points of three frames"),
    },
)

TURNS = (("x", False), ("x", True), ("y", False), ("y", True))  # axis and shift of four layers


class BatchNorm(nn.BatchNorm1d):
    """As in mmdetection3d's voxel encoders."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-3, momentum=0.01)


class PillarEmbed(Resample):
    """Sets of points to the occupied cells of a grid over x and y, in the order of y, then x (DynamicVFE).

    Gives the tokens as a packed row, with ctx.coords (1, T, 2): x and y of each cell. grid: cells along x and y. hidden:
    widths before dim; None: no network, a token is the mean of the in_chans = dim features of the points in its cell.
    """

    def __init__(self, in_chans: int, dim: int, *, bounds: tuple[float, ...] = UNIT, grid: tuple[int, int] = (16, 16),
                 hidden: tuple[int, ...] | None = (64,), norm: Spec[nn.Module] = spec(BatchNorm)) -> None:
        super().__init__()
        if min(grid) < 1:
            raise DoesNotFit(f"grid is the number of cells along x and y, 1 or more, not {grid}")
        if hidden is None and in_chans != dim:
            raise DoesNotFit("without a point encoder (hidden=None) the points' features are the tokens: in_chans must be "
                             f"dim, got {in_chans} and {dim}")
        self.dim, self.grid = dim, grid
        self.box = tuple(bounds)
        self.layers = nn.ModuleList()
        before = 3 + in_chans + 6
        for width in () if hidden is None else (*hidden, dim):
            self.layers.append(nn.ModuleDict({"linear": linear(before, width, bias=False), "norm": norm(width)}))
            before = 2 * width

    def cells(self, xyz: Float[Tensor, "p 3"]) -> tuple[Int[Tensor, "p 2"], Bool[Tensor, " p"], Float[Tensor, "p 3"]]:
        """The cell of each point, whether it is inside the bounds, and its distance to the centre of its cell."""
        low, high = xyz.new_tensor(self.box).chunk(2)
        size = (high - low) / xyz.new_tensor([*self.grid, 1])
        most = torch.tensor([n - 1 for n in (*self.grid, 1)], device=xyz.device)
        cell = ((xyz - low) / size).floor().long().clamp_min(0).minimum(most)
        inside = ((xyz >= low) & (xyz <= high)).all(1)
        return cell[:, :2], inside, xyz - (low + (cell + 0.5) * size)

    def forward(self, batch: Sets, ctx: Ctx) -> tuple[Float[Tensor, "1 t c"], Ctx]:  # type: ignore[override]
        points, sizes, (nx, ny) = torch.cat(batch), [len(s) for s in batch], self.grid
        device, sets, area = points.device, len(batch), nx * ny
        xyz = points[:, :3].to(torch.promote_types(points.dtype, torch.float32))
        cell, inside, offset = self.cells(xyz)
        owner = set_of(sizes, device)
        key = torch.where(inside, owner * area + cell[:, 1] * nx + cell[:, 0], sets * area)
        ranked, order = key.sort()
        first = torch.cat((ranked.new_ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1]))
        token = torch.empty_like(order).scatter(0, order, first.cumsum(0) - 1)  # those outside come last
        counts = token.new_zeros(sets + 1).index_add(0, ranked // area, first.long())[:sets]
        lengths = tuple(sizes)
        if values_known(batch):
            lengths = tuple(counts.tolist())
            if 0 in lengths:
                raise BadData(f"no point of set {lengths.index(0)} lies inside the bounds {self.box}; build the model with "
                              "bounds= for these data, or scale them")
            if not inside.all():
                xyz, points, cell, offset, slot = (t[inside] for t in (xyz, points, cell, offset, token))
            else:
                slot = token
        else:
            unused = torch.tensor(sizes, device=device) - counts
            slot = token = torch.where(inside, token + (unused.cumsum(0) - unused)[owner], sum(sizes))
        total = sum(lengths)  # the slot after the last takes what is outside
        members = xyz.new_zeros(total + 1, 1).index_add(0, slot, torch.ones_like(xyz[:, :1]))
        coords = cell.new_zeros(total + 1, 2).index_copy(0, slot, cell)

        def mean(values: Float[Tensor, "p c"]) -> Float[Tensor, "t c"]:
            return values.new_zeros(total + 1, values.shape[1]).index_add(0, slot, values) / members.clamp_min(1)

        if self.layers:
            features = torch.cat((points, (xyz - mean(xyz)[slot]), offset), dim=1).to(points.dtype)
            x = features
            for i, layer in enumerate(self.layers):
                features = F.relu(layer["norm"](layer["linear"](features)))  # type: ignore[index]
                where = slot[:, None].expand_as(features)
                x = features.new_zeros(total + 1, features.shape[1]).scatter_reduce(0, where, features, "amax")
                if i < len(self.layers) - 1:
                    features = torch.cat((features, x[slot]), dim=1)
        else:
            x = mean(points[:, 3:].to(xyz.dtype)).to(points.dtype)
        mask = None if values_known(batch) else (members[:total] > 0).view(1, 1, 1, total)
        return x[None, :total], replace(ctx, lengths=lengths, coords=coords[None, :total].float(), mask=mask,
                                        shared=ctx.shared | {"token": token})


def window_order(cells: Int[Tensor, "t 2"], owner: Int[Tensor, " t"], *, grid: tuple[int, int], window: tuple[int, int],
                 axis: str = "x", shift: bool = False, filled: Bool[Tensor, " t"] | None = None) -> Int[Tensor, " t"]:
    """The tokens in the order of their sets, in each along the windows (section 4.1), empty slots last.

    axis "x": a row of windows after the other, in each window a column of cells (all its y) after the other, every other
    row and column backwards; "y": x and y change places. shift: windows that begin half a window further out.
    """
    (m, n), (q, p) = ((grid[1], grid[0]), (window[1], window[0])) if axis == "x" else (grid, window)
    slow, fast = (cells[:, 1], cells[:, 0]) if axis == "x" else (cells[:, 0], cells[:, 1])
    if shift:
        slow, fast = slow + q // 2, fast + p // 2
    row, column = slow // q, fast // p
    back = 1 - 2 * (row % 2)
    down = 1 - 2 * (fast % p % 2)
    wide = 2 * (-(-n // p) + 1)  # as many windows twice, so that rows walked backwards do not meet the next
    high = 2 * (-(-m // q) + 1)
    key = (wide * row + back * column) * 4 * p * q + back * (2 * q * (fast % p) + down * (slow % q))
    span = wide * high * 4 * p * q
    if filled is not None:
        key = torch.where(filled, key, span - 1)
    return (owner * span + key).argsort()


def equal_groups(lengths: tuple[int, ...], group: int, device: torch.device, counts: Int[Tensor, " s"] | None = None,
                 ) -> tuple[Int[Tensor, " g"], Int[Tensor, " t"], Bool[Tensor, "groups 1 1 group"] | None]:
    """Cuts a packed row into groups of one size, set by set: (take, back, mask).

    row[take] are the groups, one after another; groups[back] is the row. The last group of a set is filled with tokens of
    the group before it; mask: where a set is smaller than a group, True for the tokens that it has. counts: tokens of each
    set, the rest of its length being empty slots; None: all.
    """
    sizes = torch.tensor(lengths, device=device)
    padded = tuple(-(-n // group) * group for n in lengths)
    paddeds = torch.tensor(padded, device=device)
    starts, padded_starts = sizes.cumsum(0) - sizes, paddeds.cumsum(0) - paddeds
    owner = set_of(padded, device)
    place = torch.arange(sum(padded), device=device) - padded_starts[owner]
    n = (sizes if counts is None else counts)[owner]
    within = torch.where(place < n, place, place - group).clamp_min(0).minimum(n - 1)
    back = torch.arange(sum(lengths), device=device) + (padded_starts - starts)[set_of(lengths, device)]
    if counts is None and min(lengths) >= group:
        return starts[owner] + within, back, None
    seen = (place < n) | (n >= group) | (place >= group)  # a group of empty slots alone must see something
    return starts[owner] + within, back, seen.view(-1, 1, 1, group)


def cell_embedding(cells: Float[Tensor, "t 2"], dim: int, temperature: float = 10000.0,
                   grid: tuple[int, int] | None = None) -> Float[Tensor, "t c"]:
    """Sines and cosines of x, then of y, in turn; the channels that are left over are zero. grid: scales to 2 * 3.1415."""
    if grid is not None:
        cells = cells / cells.new_tensor(grid) * 2 * 3.1415
    length = dim // 4 * 2
    freqs = temperature ** (2 * torch.arange(length // 2, dtype=torch.float32, device=cells.device) / length)
    angle = cells[:, :, None] / freqs
    return F.pad(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1), (0, dim - 2 * length))


class FlattenedWindowAttention(Part):
    """Attention in groups of `group` tokens that follow one another in the order of the windows.

    Takes packed sets of cells: ctx.lengths, and ctx.coords (1, T, 2) of cells in the grid. grid, window: cells along x and
    y. axis, shift: see `window_order`. temperature, normalise: of the sine embedding of queries and keys.
    """

    def __init__(self, dim: int, place: Place, *, heads: int = 8, group: int = 69, window: tuple[int, int] = (9, 9),
                 grid: tuple[int, int] = (468, 468), axis: str = "x", shift: bool = False, temperature: float = 10000.0,
                 normalise: bool = False) -> None:
        super().__init__(dim, place)
        if axis not in ("x", "y"):
            raise DoesNotFit(f"axis is 'x' or 'y', not {axis!r}")
        if group < 1 or min(window) < 1:
            raise DoesNotFit(f"group and window are 1 or more, got {group} and {window}")
        head_dim(dim, heads)
        self.heads, self.group, self.window, self.grid, self.axis, self.shift = heads, group, window, grid, axis, shift
        self.temperature, self.normalise = temperature, normalise
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def forward(self, x: Float[Tensor, "1 t c"], ctx: Ctx) -> Float[Tensor, "1 t c"]:
        if ctx.coords is None or ctx.lengths is None or ctx.cache is not None:
            raise DoesNotFit("flattened windows need sets of cells with coordinates, in one packed row; here are others")
        take, back, mask = self.groups(ctx.lengths, ctx.coords, ctx)
        split = 2 * self.dim
        weight, bias = self.qkv.weight, self.qkv.bias
        qk = F.linear(x + self.position(x, ctx), weight[:split], bias[:split])
        qkv = torch.cat((qk, F.linear(x, weight[split:], bias[split:])), dim=-1)
        q, k, v = split_heads(qkv[0].index_select(0, take.flatten()).unflatten(0, take.shape), 3, self.heads)
        return self.proj(join_heads(attend(q, k, v, mask=mask)).flatten(0, 1).index_select(0, back)[None])

    def groups(self, lengths: tuple[int, ...], coords: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `equal_groups`, of the tokens in the order of the windows; take: (groups, tokens of each). The same for every
        layer of this axis and shift."""
        key = f"groups {self.group} {self.window} {self.grid} {self.axis} {self.shift}"
        if key not in ctx.shared:
            owner = set_of(lengths, coords.device)
            filled = None if ctx.mask is None else ctx.mask.flatten()
            counts = None if filled is None else owner.new_zeros(len(lengths)).index_add(0, owner, filled.long())
            order = window_order(coords[0].long(), owner, grid=self.grid, window=self.window, axis=self.axis,
                                 shift=self.shift, filled=filled)
            take, back, mask = equal_groups(lengths, self.group, coords.device, counts)
            ctx.shared[key] = order[take].unflatten(0, (-1, self.group)), back[order.argsort()], mask
        return ctx.shared[key]

    def position(self, x: Tensor, ctx: Ctx) -> Tensor:
        assert ctx.coords is not None
        key = f"cells {self.dim} {self.temperature} {self.normalise and self.grid}"
        if key not in ctx.shared:
            scale = self.grid if self.normalise else None
            ctx.shared[key] = cell_embedding(ctx.coords[0], self.dim, self.temperature, scale).to(x.dtype)
        return ctx.shared[key]


class FlatFormer(PointBackbone):
    """Sets (N_i, 3 + in_chans) -> logits (B, num_classes); `bev` gives the bird's-eye map.

    blocks: of four layers each. group: tokens that see each other; window, grid: cells along x and y; bounds: what the
    grid covers. hidden, point_norm: of the point encoder; hidden=None: the in_chans = dim features of the points are the
    tokens. mixer: of windows, taking turns of axis and shift, or another that takes packed rows ("attention": whole sets).
    """

    def __init__(self, *, in_chans: int = 0, num_classes: int = 10, bounds: tuple[float, ...] = UNIT,
                 grid: tuple[int, int] = (16, 16), hidden: tuple[int, ...] | None = (64,), dim: int = 128, blocks: int = 2,
                 heads: int = 8, ratio: float = 2.0, group: int = 69, window: tuple[int, int] = (9, 9),
                 temperature: float = 10000.0, normalise: bool = False, pool: str = "mean", drop_path: float = 0.0,
                 mixer: Spec[Part] = spec(FlattenedWindowAttention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5), residual: Spec[Residual] = spec(PostNorm),
                 point_norm: Spec[nn.Module] = spec(BatchNorm)) -> None:
        turns = (mixer.offer(heads=heads),) * 4
        if mixer.takes("axis"):  # elsewhere an option `window` means something else
            turns = tuple(m.offer(group=group, window=tuple(window), grid=tuple(grid), axis=axis, shift=shift,
                                  temperature=temperature, normalise=normalise)
                          for m, (axis, shift) in zip(turns, TURNS, strict=True))
        stages = [Stack(dim, 4, {"mixer": turns, "channel": channel.offer(ratio=ratio)},
                        residual.offer(norm=norm, drop_path=drop_path),
                        place=Place(layer=4 * i, depth=4 * blocks, stage=i, stages=blocks)) for i in range(blocks)]
        super().__init__(stages, in_chans=in_chans, num_classes=num_classes, bounds=bounds, pool=pool)
        self.grid = tuple(grid)
        self.embedding = PillarEmbed(in_chans, dim, bounds=self.bounds, grid=self.grid, hidden=hidden, norm=point_norm)

    def embed(self, batch: Sets) -> tuple[Float[Tensor, "1 t c"], Ctx]:  # type: ignore[override]
        return self.embedding(batch, Ctx())

    def bev(self, batch: Sets) -> Float[Tensor, "b c ny nx"]:
        """The last tokens in their cells, zero where no point is: what a detection head takes."""
        self.check_sets(batch)
        x, ctx = self.embed(batch)
        assert ctx.lengths is not None
        assert ctx.coords is not None
        (nx, ny), sets = self.grid, len(batch)
        at = (set_of(ctx.lengths, x.device) * ny + ctx.coords[0, :, 1].long()) * nx + ctx.coords[0, :, 0].long()
        if ctx.mask is not None:
            at = torch.where(ctx.mask.flatten(), at, sets * ny * nx)
        x, _ = self.encode(x, ctx)
        canvas = x.new_zeros(sets * ny * nx + 1, x.shape[2]).index_copy(0, at, x[0])
        return canvas[:-1].view(sets, ny, nx, -1).permute(0, 3, 1, 2)


WAYMO = spec(FlatFormer, in_chans=2, num_classes=0, bounds=(-74.88, -74.88, -2.0, 74.88, 74.88, 4.0), grid=(468, 468),
             group=144, window=(13, 13))
PRESETS = {
    "nano": spec(FlatFormer, dim=32, blocks=1, heads=2, hidden=(16,), grid=(24, 24), group=72, window=(6, 6),
                 point_norm=spec(LayerNorm)),
    "waymo_1f": WAYMO,
    "waymo_2f": WAYMO,
    "waymo_3f": WAYMO,
}


def _blocks(prefix: str) -> list[Any]:
    theirs, ours = f"{prefix}block_list.{{i}}.block.{{j}}.", "stages.{i}.layers.{j}."
    return [
        rule(f"{theirs}attn.attn.in_proj_*", f"{ours}mixer.inner.qkv.*"),
        rule(f"{theirs}attn.attn.out_proj.*", f"{ours}mixer.inner.proj.*"),
        rule(f"{theirs}norm1.*", f"{ours}mixer.norm.*"),
        rule(f"{theirs}fc1.*", f"{ours}channel.inner.fc1.*"),
        rule(f"{theirs}fc2.*", f"{ours}channel.inner.fc2.*"),
        rule(f"{theirs}norm2.*", f"{ours}channel.norm.*"),
    ]


KEYS = {
    "authors": keymap(*_blocks(""),  # their module FlatFormer, which takes cells
                      without=dict.fromkeys(PRESETS, "points, which that module does not encode"),
                      example=("waymo_1f", {"hidden": None, "in_chans": 32, "dim": 32, "blocks": 1})),
    "authors_detector": keymap(
        rule("voxel_encoder.vfe_layers.{i}.*", "embedding.layers.{i}.*"),
        *_blocks("middle_encoder."),
        *[drop(f"{part}.*", "what follows the bird's-eye map is not part of the model")
          for part in ("backbone", "neck", "bbox_head")],
        without={"nano": "layer norms in the point encoder, and a classifier"},
        example=("waymo_1f", {"hidden": (16,), "dim": 32, "blocks": 1}),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Widths, depth and classes. Heads, group, window, grid and bounds leave no trace: those of the authors' configurations
    are taken, but nano's where they are of nano's size. Their encoder alone makes a model without a point encoder: in_chans
    is dim, and its points are cells."""
    width, dim = state["stages.0.layers.0.channel.inner.fc1.weight"].shape
    name = "embedding.layers.{i}.linear.weight"
    points = [state[name.replace("{i}", str(i))].shape for i in range(count(state, name))]
    hidden = tuple(out for out, _ in points[:-1]) if points else None
    sizes = {"dim": dim, "blocks": count(state, "stages.{i}.layers.0.channel.norm.weight"), "hidden": hidden}
    layered = bool(points) and "embedding.layers.0.norm.running_mean" not in state
    usual = {k: WAYMO[k] for k in ("bounds", "grid", "group", "window")} | {"heads": 8}
    return sizes | {k: as_preset(PRESETS, k, v, **sizes) for k, v in usual.items()} | {
        "ratio": told_ratio(width, dim), "in_chans": points[0][1] - 9 if points else dim,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "point_norm": spec(LayerNorm) if layered else spec(BatchNorm)}
