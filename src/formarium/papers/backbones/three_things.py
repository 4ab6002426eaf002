"""Three Things Everyone Should Know About Vision Transformers (Touvron et al., ECCV 2022), arXiv 2203.09795.

New: (1) p successive layers of a ViT work side by side: x + sum of p attentions, each after its own norm, then the same of
the MLPs (Eq. 4 and 5 for p = 2); parameters and operations stay, the depth is divided by p. (2) For another resolution or
task it is enough to fine-tune the attentions. (3) hMLP, a stem of small convolutions that never cross a patch's border, so
that masking patches before or after it is the same.

    fm.create_model("three_things/small_18x2")         # or three_things/nano:branches=3,stem=hmlp
    fm.apply(model, "three_things")                    # any host: all is frozen but attentions, head and positions

Decisions: every branch has its norm, layer scale and drop path, as in the authors' code; their drop rate is the same in all
layers, and positions are of the patches alone (timm's models give the class token one: position_first=False). The stem's
three convolutions of patch / 4, 2 and 2 pixels are each followed by batch norm, the first two by GELU. Fine-tuning trains
what is inside the attention, not the norm before it nor the layer scale behind it; a stem stays frozen. The deep presets
without branches are ViTs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.embed import PatchEmbed
from ...parts.norm import BatchNorm, LayerNorm, NoNorm
from ...parts.position import AbsolutePosition, LearnedPosition, seat
from ...parts.residual import PreNorm
from ...skeletons.stack import Stack
from ...weights.adapt import Change, refit_kernel
from ...weights.keys import State, count, defaults, drop, keymap, rule
from . import vit
from .vit import OURS, ViT, plain_rules

CARD = Card(
    title="Three Things Everyone Should Know About Vision Transformers",
    authors="Hugo Touvron, Matthieu Cord, Alaaeldin El-Nouby, Jakob Verbeek, Hervé Jégou",
    venue="ECCV 2022",
    arxiv="2203.09795",
    year=2022,
    code="https://github.com/facebookresearch/deit",
    licence="Apache-2.0 (code)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "parallel", "fine-tuning"),
    claim="Pairs of residual layers of a ViT can work in parallel, fine-tuning the attentions alone does as well as "
          "fine-tuning all, and a patch-wise stem helps masked pre-training, each at practically no cost.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels; 2x2 with hMLP"),
        "small_36x1": Published(params=64.6e6, input=(3, 224, 224), note="parameters quoted from memory"),
        "small_18x2": Published(params=64.6e6, input=(3, 224, 224), note="parameters quoted from memory"),
        "small_12x3": Published(input=(3, 224, 224), note="figure 2 of the paper: the same layers in threes"),
        "base_36x1": Published(input=(3, 224, 224)),
        "base_18x2": Published(input=(3, 224, 224)),
        "huge_p14_52x1": Published(input=(3, 224, 224), note="of the authors' code, without published results"),
        "huge_p14_26x2": Published(input=(3, 224, 224), note="of the authors' code, without published results"),
        "small_hmlp": Published(input=(3, 224, 224)),
        "base_hmlp": Published(input=(3, 224, 224)),
    },
    exceptions={"drop_path": "the stem's batch norm uses the batch's own statistics in training"},
)


class Parallel(Part):
    """The sum of what p branches add, each a part within its own residual: norm, layer scale, drop path."""

    def __init__(self, dim: int, place: Place, *, part: Spec[Part], residual: Spec[PreNorm] = spec(PreNorm),
                 branches: int = 2) -> None:
        super().__init__(dim, place)
        self.branches = nn.ModuleList(residual(dim, place, part(dim, place)) for _ in range(branches))

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        first, *rest = (b.branch(b.norm(x), ctx) for b in self.branches)  # type: ignore[operator]
        return sum(rest, start=first)


class HMLP(PatchEmbed):
    """Patches to tokens by three convolutions that stay inside a patch. patch: a multiple of 4."""

    def __init__(self, in_chans: int, dim: int, *, patch: int | tuple[int, int] = 16,
                 img_size: int | Sequence[int] | None = None, class_token: bool = False, position_first: bool = False,
                 position: Spec[AbsolutePosition] = spec(LearnedPosition)) -> None:
        super().__init__(in_chans, dim, patch=patch, img_size=img_size, class_token=class_token,
                         position_first=position_first, position=position)
        if dim % 4 or any(p % 4 for p in self.patch):
            raise DoesNotFit(f"hMLP halves a patch twice and needs a width and a patch that 4 divides, "
                             f"got {dim} and {patch}")
        first = (self.patch[0] // 4, self.patch[1] // 4)
        self.proj = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(in_chans, dim // 4, first, first), BatchNorm(dim // 4), nn.GELU(),
            nn.Conv2d(dim // 4, dim // 4, 2, 2), BatchNorm(dim // 4), nn.GELU(),
            nn.Conv2d(dim // 4, dim, 2, 2), BatchNorm(dim))

    def refit(self, name: str, tensor: Tensor | None, was: PatchEmbed) -> Change | None:
        wanted = self.state_dict()["proj.0.weight"].shape
        return refit_kernel(tensor, wanted) if name == "proj.0.weight" and tensor is not None else None


STEMS, FINE_TUNED = ("patch", "hmlp"), ("all", "attention")


class ThreeThings(ViT):
    """images (B, in_chans, H, W) -> logits (B, num_classes): a ViT with three switches.

    branches: layers that work side by side; depth counts the layers that follow each other, so depth * branches is a plain
    ViT's. stem: "patch", one convolution, or "hmlp". fine_tune: "all", or "attention": all else is frozen but head and
    positions. The rest as ViT's. layer_scale: None for none.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 384, depth: int = 18, heads: int = 6, drop_path: float = 0.0,
                 pool: str = "token", branches: int = 2, stem: str = "patch", fine_tune: str = "all",
                 position_first: bool = True, layer_scale: float | None = 1e-4, mixer: Spec[Part] = spec(Attention),
                 channel: Spec[Part] = spec(Mlp), norm: Spec[nn.Module] = spec(LayerNorm),
                 residual: Spec[Residual] = spec(PreNorm), position: Spec[Any] = spec(LearnedPosition)) -> None:
        if stem not in STEMS:
            raise unknown("stem of ThreeThings", stem, STEMS)
        if fine_tune not in FINE_TUNED:
            raise unknown("fine_tune of ThreeThings", fine_tune, FINE_TUNED)
        if branches < 1 or (branches > 1 and getattr(residual.target, "forward", None) is not PreNorm.forward):
            raise DoesNotFit(f"expected 1 branch or more, each a pre-norm residual, got {branches} and {residual.name}")
        mixer, position = seat(position, mixer.offer(heads=heads))
        own = residual.offer(norm=norm, drop_path=drop_path, even_drop=True, layer_scale=layer_scale)
        if branches > 1:
            mixer, channel = (spec(Parallel, part=p, residual=own, branches=branches) for p in (mixer, channel))
            own = spec(PreNorm, norm=spec(NoNorm), drop_path=0.0)
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth,
                         heads=heads, pool=pool, position_first=position_first, mixer=mixer, channel=channel, norm=norm,
                         residual=own, position=position)
        if stem == "hmlp":
            self.embedding = HMLP(in_chans, dim, patch=patch, img_size=img_size, class_token=pool == "token",
                                  position_first=position_first, position=position)
        if fine_tune == "attention":
            attention_only(self)


def attention_only(model: Model) -> int:
    """Freezes a model but for what is inside its attentions (the sublayers called "mixer"), its head and its positions;
    returns how many attentions."""
    found: list[nn.Module] = []
    for layer in (layer for stack in model.modules() if isinstance(stack, Stack) for layer in stack.layers):
        inner = getattr(layer["mixer"], "inner", None) if "mixer" in layer else None  # type: ignore[operator, index]
        if inner is not None:
            found += [b.inner for b in inner.branches] if isinstance(inner, Parallel) else [inner]
    if not found:
        return 0
    model.requires_grad_(False)
    heads = [child for name, child in model.named_children() if name.startswith("head")]
    positions = [m for m in model.modules() if isinstance(m, AbsolutePosition)]
    for trained in [*found, *heads, *positions]:
        for p in trained.parameters():
            p.requires_grad_(p.is_floating_point())
    return len(found)


TRANSFORM = attention_only
LOOKS_FOR = "layers with a sublayer 'mixer', whose residual holds it as `inner`"
IDENTITY: dict[str, Any] = {}

SMALL = spec(ThreeThings, dim=384, heads=6)
BASE = spec(ThreeThings, dim=768, heads=12)
HUGE = spec(ThreeThings, dim=1280, heads=16, patch=14)
DEEP = spec(ViT, position_first=True, layer_scale=1e-4)
PRESETS = {
    "nano": spec(ThreeThings, dim=64, depth=2, heads=4, patch=4, img_size=28, stem="hmlp"),
    "small_36x1": DEEP.but(dim=384, depth=36, heads=6),
    "small_18x2": SMALL,
    "small_12x3": SMALL.but(depth=12, branches=3),
    "base_36x1": DEEP.but(dim=768, depth=36, heads=12),
    "base_18x2": BASE,
    "huge_p14_52x1": DEEP.but(dim=1280, depth=52, heads=16, patch=14),
    "huge_p14_26x2": HUGE.but(depth=26),
    "small_hmlp": SMALL.but(depth=12, branches=1, stem="hmlp"),
    "base_hmlp": BASE.but(depth=12, branches=1, stem="hmlp"),
}

PLAIN = [r for r in plain_rules() if r.theirs != ("reg_token",)]
BRANCH = "inner.branches.{j}"
STEPS = drop("patch_embed.proj.{k}.num_batches_tracked", "a count of steps that a fixed momentum does not need",
             ("embedding.proj.{k}.running_mean", lambda t, state, options: torch.zeros((), dtype=torch.int64)))
KEYS = {
    "timm": keymap(
        *[rule(f"blocks.{{i}}.{theirs}.{{j}}.{a}", f"{OURS}.{ours}.{BRANCH}.{b}")
          for theirs, ours, part in (("attns", "mixer", "attn"), ("ffns", "channel", "mlp"))
          for a, b in (("norm.*", "norm.*"), (f"{part}.*", "inner.*"), ("ls.gamma", "scale"))],
        *PLAIN, example=("small_18x2", {"dim": 128, "depth": 2, "heads": 2, "patch": 4, "img_size": 28}),
        without={v: "timm has no such stem" for v in PRESETS if v in ("nano", "small_hmlp", "base_hmlp")},
    ),
    "authors": keymap(  # two branches
        *[rule(f"blocks.{{i}}.{a}", f"{OURS}.{ours}.inner.branches.{j}.{b}")
          for k, ours, part in ((1, "mixer", "attn"), (2, "channel", "mlp")) for j in (0, 1)
          for a, b in ((f"norm{k}{'1' * j}.*", "norm.*"), (f"{part}{'1' * j}.*", "inner.*"),
                       (f"gamma_{k}{'_1' * j}", "scale"))],
        STEPS, *[r for r in PLAIN if not r.theirs[0].startswith("blocks")],
        without={v: "this layout is of pairs of layers" for v, p in PRESETS.items() if defaults(p).get("branches") != 2},
    ),
    "authors_x1": keymap(
        rule("blocks.{i}.gamma_1", f"{OURS}.mixer.scale"),
        rule("blocks.{i}.gamma_2", f"{OURS}.channel.scale"),
        STEPS, *[r for r in PLAIN if not r.theirs[0].endswith(".gamma")],
        example=("small_hmlp", {"dim": 128, "depth": 2, "heads": 2, "patch": 4, "img_size": 28}),
        without={v: "this layout is of layers in a row" for v, p in PRESETS.items() if defaults(p).get("branches", 1) != 1},
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As of the ViT that its first branches are, and how many there are."""
    branches = count(state, "stages.0.layers.0.mixer.inner.branches.{i}.norm.weight")
    plain = {k.replace(".inner.branches.0.", "."): t for k, t in state.items()}
    stem = "embedding.proj.0.weight" in state
    if stem:
        (_, in_chans, *first), dim = state["embedding.proj.0.weight"].shape, len(state["embedding.proj.6.bias"])
        plain["embedding.proj.weight"] = torch.empty(dim, in_chans, *(4 * p for p in first), device="meta")
    told = vit.settings(plain, layout if layout == "formarium" else "timm")
    if not (stem or branches):
        return told
    own = {k: v for k, v in told.items() if PRESETS["nano"].takes(k)}
    return own | {"branches": max(1, branches), "stem": "hmlp" if stem else "patch"}
