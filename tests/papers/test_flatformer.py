"""FlatFormer against loops over its groups; orders, leftovers, empty slots; the authors' answers and names."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from formarium.core.build import create_model, spec
from formarium.core.ctx import Cache, Ctx, Place
from formarium.core.errors import BadData, DoesNotFit
from formarium.core.model import count_parameters
from formarium.papers.points.flatformer import (
    KEYS,
    TURNS,
    BatchNorm,
    FlattenedWindowAttention,
    PillarEmbed,
    cell_embedding,
    equal_groups,
    window_order,
)
from formarium.parts.residual import drop_path
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPE = torch.float64


def cells_of(count, grid, seed=0):
    """Different cells (x, y) of a grid, in the order of y, then x."""
    at = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.stack((at % grid[0], at // grid[0]), dim=1)


# sorting

def path(cells, window, axis, shift):
    """The cells of one set in order, by plain sorting: windows there and back, in them columns there and back."""
    def key(cell):
        x, y = (c + w // 2 * shift for c, w in zip(cell, window, strict=True))
        if axis == "y":
            x, y = y, x
        wx, wy = window if axis == "x" else window[::-1]
        row, column, dx, dy = y // wy, x // wx, x % wx, y % wy
        back, down = (-1) ** row, (-1) ** dx
        return row, back * column, back * dx, back * down * dy

    return sorted(range(len(cells)), key=lambda i: key(cells[i].tolist()))


@pytest.mark.parametrize(("axis", "shift"), TURNS)
@pytest.mark.parametrize(("grid", "window"), [((20, 20), (4, 4)), ((17, 9), (5, 3)), ((40, 40), (13, 13)),
                                              ((6, 8), (13, 9)), ((5, 30), (1, 2))])
def test_order(axis, shift, grid, window):
    """Sets follow one another, each sorted as alone. With the keys of the authors, sets of some of these grids mix."""
    sets = [cells_of(n, grid, n) for n in (min(100, grid[0] * grid[1]), 1, 30, 30)]
    owner = torch.arange(4).repeat_interleave(torch.tensor([len(s) for s in sets]))
    found = window_order(torch.cat(sets), owner, grid=grid, window=window, axis=axis, shift=shift)
    expected, start = [], 0
    for cells in sets:
        expected += [start + i for i in path(cells, window, axis, shift)]
        start += len(cells)
    assert found.tolist() == expected


def test_every_cell_is_near_the_next():
    """On a full grid the row of cells is one path: a step goes to a neighbour, or from a column to the next."""
    cells = cells_of(144, (12, 12))
    order = window_order(cells, torch.zeros(144, dtype=torch.long), grid=(12, 12), window=(4, 4))
    steps = (cells[order].diff(dim=0)).abs()
    assert steps.sum(1).max() <= 7  # from the last column of a window to the first of the next row of windows
    assert (steps.sum(1) == 1).sum() > 120


# grouping

def naive_groups(count, group):
    """Places of a set's tokens, group by group."""
    whole, left = divmod(count, group)
    groups = [list(range(i * group, (i + 1) * group)) for i in range(whole)]
    if left:
        before = groups[-1][left:] if groups else []
        groups.append([*range(whole * group, count), *before])
    return groups


@pytest.mark.parametrize("lengths", [(8, 12), (9,), (4, 1, 3), (5, 23, 2, 4), (1,)], ids=str)
def test_groups(lengths):
    take, back, mask = equal_groups(lengths, 4, torch.device("cpu"))
    assert (mask is None) == (min(lengths) >= 4)
    rows = take.view(-1, 4).tolist()
    seen = [[True] * 4] * len(rows) if mask is None else mask[:, 0, 0].tolist()
    expected, start = [], 0
    for n in lengths:
        expected += [[start + i for i in g] for g in naive_groups(n, 4)]
        start += n
    assert [[i for i, s in zip(*both, strict=True) if s] for both in zip(rows, seen, strict=True)] == expected
    assert take[back].tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("counts", [(5, 1, 8), (9, 3, 4), (2, 2, 9), (10, 7, 9)], ids=str)
def test_groups_with_empty_slots(counts):
    """The filled slots come first in each set, and are grouped as if there were no others."""
    lengths = (10, 7, 9)
    take, _, mask = equal_groups(lengths, 4, torch.device("cpu"), torch.tensor(counts))
    rows = take.view(-1, 4)
    assert mask.any(-1).all()  # no softmax over nothing
    row, start = 0, 0
    for n, length in zip(counts, lengths, strict=True):
        for expected in naive_groups(n, 4):
            kept = rows[row][mask[row, 0, 0]] if len(expected) < 4 else rows[row]
            assert (kept - start).tolist() == expected
            row += 1
        row = sum(math.ceil(m / 4) for m in lengths[:lengths.index(length) + 1])
        start += length
    assert ((take >= 0) & (take < sum(lengths))).all()


# attention

OPTIONS = [{"axis": a, "shift": s} for a, s in TURNS] + [{"group": 1}, {"group": 64}, {"normalise": True},
                                                         {"temperature": 20.0, "window": (3, 7)}]


def built(**options):
    part = FlattenedWindowAttention(22, Place(), **{"heads": 2, "group": 5, "window": (4, 4), "grid": (12, 10), **options})
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return part.to(DTYPE)


def by_loop(part, x, cells, lengths):
    """Set by set, group by group, head by head, token by token."""
    scale = 2 * 3.1415 / torch.tensor(part.grid) if part.normalise else torch.ones(2)
    pe = torch.zeros(len(cells), part.dim, dtype=DTYPE)
    for axis in (0, 1):
        for pair in range(5):  # 22 channels: 10 for x, 10 for y, 2 are left over
            angle = (cells[:, axis].float() * scale[axis]) / part.temperature ** (pair / 5)
            pe[:, 10 * axis + 2 * pair], pe[:, 10 * axis + 2 * pair + 1] = angle.sin(), angle.cos()
    q, k, v = part.qkv.weight.chunk(3)
    bq, bk, bv = part.qkv.bias.chunk(3)
    out = [torch.zeros(part.dim, dtype=DTYPE)] * len(cells)
    for start, n in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True):
        order = path(cells[start:start + n], part.window, part.axis, part.shift)
        for i, group in enumerate(naive_groups(n, part.group)):
            tokens = [start + order[place] for place in group]
            for place in range(i * part.group, min(n, (i + 1) * part.group)):
                token, answers = start + order[place], []
                for head in range(part.heads):
                    at = slice(11 * head, 11 * head + 11)
                    query = (q @ (x[0, token] + pe[token]) + bq)[at]
                    scores = torch.stack([query @ (k @ (x[0, t] + pe[t]) + bk)[at] for t in tokens]) / 11**0.5
                    answers.append(sum(p * (v @ x[0, t] + bv)[at] for p, t in zip(scores.softmax(0), tokens, strict=True)))
                out[token] = torch.cat(answers)
    return torch.stack(out)[None] @ part.proj.weight.T + part.proj.bias


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_the_loop(options):
    """Answers and all gradients, of sets above, at and below a group, and below it with leftovers."""
    part, lengths = built(**options), (13, 10, 5, 2, 1)
    cells = torch.cat([cells_of(n, part.grid, n) for n in lengths])
    x = torch.randn(1, sum(lengths), 22, dtype=DTYPE, requires_grad=True)
    ours = part(x, Ctx(coords=cells[None].float(), lengths=lengths))
    naive = by_loop(part, x, cells, lengths)
    assert_close(ours, naive, atol=1e-6, rtol=1e-5)  # the embedding is computed in float32
    direction = torch.randn_like(ours)
    inputs = [x, *part.parameters()]
    assert_close(torch.autograd.grad((ours * direction).sum(), inputs),
                 torch.autograd.grad((naive * direction).sum(), inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [(7, 3, 10, 1), (5, 5, 1, 4)], ids=str)
def test_empty_slots_change_nothing(counts):
    """Slots that a mask declares empty: the same answers and gradients as without them, and none through them."""
    lengths, part = (14, 9, 10, 6), built()
    filled = torch.cat([torch.arange(n) < m for n, m in zip(lengths, counts, strict=True)])
    slots = torch.zeros(sum(lengths), 2, dtype=torch.long)
    slots[filled] = torch.cat([cells_of(n, part.grid, n) for n in counts])
    x = torch.randn(1, sum(lengths), 22, dtype=DTYPE, requires_grad=True)
    out = part(x, Ctx(coords=slots[None].float(), lengths=lengths, mask=filled.view(1, 1, 1, -1)))
    tight = part(x[:, filled], Ctx(coords=slots[None, filled].float(), lengths=counts))
    assert_close(out[:, filled], tight)
    direction = torch.randn_like(tight)
    found, expected = (torch.autograd.grad((o * direction).sum(), [x, *part.parameters()]) for o in (out[:, filled], tight))
    assert_close(found, expected)
    assert not found[0][:, ~filled].any()


def test_groups_do_not_see_each_other():
    part, n = built(), 23
    cells = cells_of(n, part.grid)
    x = torch.randn(1, n, 22, dtype=DTYPE, requires_grad=True)
    out = part(x, Ctx(coords=cells[None].float(), lengths=(n,)))
    order = path(cells, part.window, part.axis, part.shift)
    grad = torch.autograd.grad(out[0, order[7]].sum(), x)[0][0].any(1)  # of the second group
    assert sorted(grad.nonzero().flatten().tolist()) == sorted(order[5:10])


def test_turns():
    """Four layers see along x and y, with and without shift; another mixer has no turns and works too."""
    model = create_model("flatformer/nano", blocks=2)
    mixers = [layer["mixer"].inner for stage in model.stages for layer in stage.layers]
    assert [(m.axis, m.shift) for m in mixers] == [*TURNS, *TURNS]
    assert [m.place.layer for m in mixers] == list(range(8))
    other = create_model("flatformer/nano:mixer=attention").eval()
    assert other(other.example(2)).shape == (2, 10)
    with pytest.raises(DoesNotFit, match="in one packed row; here are others"):
        built()(torch.randn(1, 6, 22, dtype=DTYPE), Ctx())
    with pytest.raises(DoesNotFit, match="in one packed row; here are others"):
        built()(torch.randn(1, 6, 22, dtype=DTYPE), Ctx(coords=torch.zeros(1, 6, 2), lengths=(6,), cache=Cache()))
    for options in ({"axis": "z"}, {"group": 0}, {"window": (0, 4)}, {"heads": 3}):
        with pytest.raises(DoesNotFit):
            built(**options)
    with pytest.raises(DoesNotFit, match="GroupNorm does not fit here: the sets of a batch share one row"):
        create_model("flatformer/nano", norm="group_norm")


# points to cells

def pillars_by_loop(embed, points):
    """One set: dict cell -> its token, with the network of the points written out."""
    nx, ny = embed.grid
    low, high = torch.tensor(embed.box, dtype=DTYPE).chunk(2)
    size = (high - low) / torch.tensor([nx, ny, 1])
    members = {}
    for i, point in enumerate(points):
        if ((point[:3] < low) | (point[:3] > high)).any():
            continue
        at = [min(int(c), n - 1) for c, n in zip((point[:2] - low[:2]) / size[:2], (nx, ny), strict=True)]
        members.setdefault((at[1], at[0]), []).append(i)
    tokens = {}
    for (y, x), inside in members.items():
        p = points[inside]
        centre = low + (torch.tensor([x, y, 0]) + 0.5) * size
        f = torch.cat((p, p[:, :3] - p[:, :3].mean(0), p[:, :3] - centre), dim=1)
        for i, layer in enumerate(embed.layers):
            f = F.relu(layer["norm"](f @ layer["linear"].weight.T))
            if i < len(embed.layers) - 1:
                f = torch.cat((f, f.max(0).values.expand(len(f), -1)), dim=1)
        tokens[y, x] = f.max(0).values
    return tokens, members


@pytest.mark.parametrize("hidden", [(), (6,), (5, 7)], ids=str)
def test_pillars_are_the_loop(hidden):
    """Answers and gradients; points on the edges and outside; also with batch norm, in training the statistics."""
    embed = PillarEmbed(2, 8, bounds=(-2.0, -1.0, 0.0, 2.0, 1.0, 1.0), grid=(5, 3), hidden=hidden).to(DTYPE).eval()
    for layer in embed.layers:
        layer["norm"].running_mean.normal_()
        layer["norm"].running_var.uniform_(0.5, 2)
    sets = [torch.rand(n, 5, dtype=DTYPE) * torch.tensor([4.4, 2.2, 1.1, 1, 1]) - torch.tensor([2.2, 1.1, 0.05, 0, 0])
            for n in (60, 1, 25)]
    sets[1][0, :3] = torch.tensor([2.0, 1.0, 1.0])  # the far corner
    sets[2][0, :3] = torch.tensor([-2.0, -1.0, 0.0])
    x, ctx = embed(sets, Ctx())
    expected, coords, token, start = [], [], [], 0
    for points in sets:
        tokens, members = pillars_by_loop(embed, points)
        place = {cell: start + i for i, cell in enumerate(sorted(tokens))}
        of = {i: place[cell] for cell, inside in members.items() for i in inside}
        expected += [tokens[cell] for cell in sorted(tokens)]
        coords += [(b, a) for a, b in sorted(tokens)]
        token += [of.get(i) for i in range(len(points))]
        start += len(tokens)
    assert None in token
    assert ctx.lengths == tuple(len(set(token[a:b]) - {None}) for a, b in ((0, 60), (60, 61), (61, 86)))
    assert ctx.coords[0].long().tolist() == [list(c) for c in coords]
    assert ctx.shared["token"].tolist() == [start if t is None else t for t in token]
    assert_close(x[0], torch.stack(expected))
    direction = torch.randn_like(x)
    assert_close(torch.autograd.grad((x * direction).sum(), list(embed.parameters()), retain_graph=True),
                 torch.autograd.grad((torch.stack(expected)[None] * direction).sum(), list(embed.parameters())))


def test_batch_norm_counts_points_inside_alone():
    embed = PillarEmbed(0, 4, grid=(3, 3), hidden=(), norm=spec(BatchNorm)).train()
    inside = torch.rand(20, 3) * 2 - 1
    embed([torch.cat((inside, torch.full((30, 3), 5.0)))], Ctx())
    found = embed.layers[0]["norm"].running_mean.clone()
    embed.layers[0]["norm"].reset_running_stats()
    embed([inside], Ctx())
    assert_close(embed.layers[0]["norm"].running_mean, found)
    assert found.any()


def test_outside():
    model = create_model("flatformer/nano").eval()
    points = model.example(1)[0]
    far = torch.cat((points, torch.tensor([[3.0, 0, 0], [0, 0, -1.5]])))
    assert_close(model([far]), model([points]))
    features = model.point_features([far])[0]
    assert not features[-2:].any()
    assert features[:-2].any(1).all()
    with pytest.raises(BadData, match=r"no point of set 1 lies inside the bounds.*bounds="):
        model([points, points + 5])


def test_traced_with_points_outside():
    """A compiled model has a slot for each point; the answers are the same, with points outside, and sets below a group."""
    model = create_model("flatformer/nano", group=7).eval()
    batch = [*model.example(2), torch.tensor([[0.2, 0.3, 0.4], [9.0, 9.0, 9.0]])]
    batch[0][::3] *= 4
    torch._dynamo.reset()
    with torch.no_grad():
        plain, compiled = model(batch), torch.compile(model, fullgraph=True, backend="eager")(batch)
    assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(model, (batch,), strict=False).module()
    assert_close(exported(batch), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooling(pool):
    model = create_model("flatformer/nano", pool=pool, num_classes=0).eval()
    batch = model.example(3)
    x, ctx = model.encode(*model.embed(batch))
    rows = x[0].split(ctx.lengths)
    assert_close(model(batch), torch.stack([r.mean(0) if pool == "mean" else r.max(0).values for r in rows]))
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(batch), model(batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(DoesNotFit, match="'mean' or 'max', not 'sum'"):
        create_model("flatformer/nano", pool="sum")


@torch.no_grad()
def test_bev():
    """The map of a head: each token in its cell, zeros elsewhere; the same for any order of the points."""
    model = create_model("flatformer/nano", grid=(12, 20)).eval()
    batch = model.example(3)
    maps = model.bev(batch)
    assert maps.shape == (3, 32, 20, 12)
    x, ctx = model.encode(*model.embed(batch))
    start = 0
    for canvas, n in zip(maps, ctx.lengths, strict=True):
        cells = ctx.coords[0, start:start + n].long()
        assert_close(canvas[:, cells[:, 1], cells[:, 0]].T, x[0, start:start + n])
        assert canvas.any(0).sum() == n
        start += n
    assert_close(model.bev([points.flip(0) for points in batch]), maps, atol=1e-5, rtol=1e-5)


def test_drop_path_takes_sets_one_by_one():
    """In a packed row each set's branch is dropped or kept as a whole, on its own."""
    torch.manual_seed(0)
    x = drop_path(torch.ones(1, 600, 2), 0.5, True, (200, 100, 300))
    kept = set()
    for _ in range(40):
        x = drop_path(torch.ones(1, 600, 2), 0.5, True, (200, 100, 300))
        parts = [set(p.flatten().tolist()) for p in x[0].split((200, 100, 300))]
        assert all(p in ({0.0}, {2.0}) for p in parts)
        kept.add(tuple(map(tuple, parts)))
    assert len(kept) == 8


# the authors

def cells_as_points(cells, features):
    return torch.cat((cells + 0.5, torch.zeros(len(cells), 1), features), dim=1)


def loaded(state, **options):
    """Their encoder; a point stands in the middle of its cell and carries the cell's features."""
    nx, ny = options["grid"]
    return load(state, "flatformer", bounds=(0.0, 0.0, -1.0, nx, ny, 1.0), **options)


@torch.no_grad()
def test_authors_small_grid():
    state, (scores, features), golden = replay(GOLDEN / "flatformer__waymo_small_grid.json.gz")
    picked = [s.topk(k).indices.sort().values for s, k in zip(scores, (520, 380), strict=True)]
    cells = [torch.stack((p % 48, p // 48), dim=1) for p in picked]
    model = loaded(state, grid=(48, 48), window=(9, 9), group=69)
    assert count_parameters(model) == golden["parameters"]
    batch = [cells_as_points(c, f) for c, f in zip(cells, features.split((520, 380)), strict=True)]
    out = model.encode(*model.embed(batch))[0][0]
    assert compare(golden, [out, model.bev(batch)]) < 1e-5
    assert_close(torch.cat(model.point_features(batch)), out)
    order = torch.randperm(520)
    assert compare(golden, [out, model.bev([batch[0][order], batch[1]])]) < 1e-5


@torch.no_grad()
def test_authors_waymo():
    """Pillars, embedding, orders, groups and the map of the published configuration."""
    state, (features, ids), golden = replay(GOLDEN / "flatformer__waymo_1f_middle_encoder.json.gz")
    picked = [row.unique() for row in ids]
    lengths = tuple(map(len, picked))
    cells = torch.cat([torch.stack((p % 468, p // 468), dim=1) for p in picked])
    model = loaded(state, grid=(468, 468))
    batch = list(cells_as_points(cells, features[:sum(lengths)]).split(lengths))
    x, ctx = model.embed(batch)
    assert ctx.lengths == lengths
    assert_close(ctx.coords[0].long(), cells)
    owner = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    windows = {"grid": (468, 468), "window": (13, 13)}
    take, back, mask = equal_groups(lengths, 144, torch.device("cpu"))
    assert mask is None
    found = [model.encode(x, ctx)[0][0], cell_embedding(cells.float(), 128), window_order(cells, owner, **windows),
             window_order(cells, owner, axis="y", shift=True, **windows), take, back, model.bev(batch).sum((-2, -1))]
    assert compare(golden, found) < 1e-5
    assert len(golden["outputs"]) == len(found)


@torch.no_grad()
@pytest.mark.parametrize(("preset", "options"), [
    ("nano", {}), ("waymo_1f", {"blocks": 3}), ("waymo_1f", {"hidden": (16, 24), "dim": 48, "ratio": 3.0}),
], ids=str)
def test_their_detector(preset, options):
    """Both ways; sizes are told from the tensors; what follows the map is left out."""
    model = create_model(f"flatformer/{preset}", num_classes=0, point_norm=spec(BatchNorm), **options).eval()
    theirs = KEYS["authors_detector"].convert(model.state_dict(), back=True)
    assert theirs.unmatched == []
    assert "middle_encoder.block_list.0.block.3.attn.attn.in_proj_weight" in theirs.state
    assert "voxel_encoder.vfe_layers.0.norm.running_mean" in theirs.state
    head = {"bbox_head.task_heads.0.reg.0.conv.weight": torch.zeros(1), "backbone.blocks.0.0.weight": torch.ones(1)}
    mixer = model.stages[0].layers[0]["mixer"].inner
    again = load(theirs.state | head, "flatformer", heads=mixer.heads, bounds=model.bounds, grid=model.grid,
                 group=mixer.group, window=mixer.window)
    batch = model.example(2)
    assert_close(again.bev(batch), model.bev(batch))
