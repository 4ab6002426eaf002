"""Rethinking Vision Transformer Depth via Structural Reparameterization (Zhou, Chaudhary, Datta, arXiv 2511.19718, 2025).

New: a shallow ViT is trained with several parallel branches in each block, which are joined, little by little, where they
enter a non-linear function, until they are one and merge into an ordinary block without approximation. Layer norm is taken
out of the branches and the heads are written as a sum instead of a concatenation.

Decided by us, as the text that could be read (abstract, summaries) gives neither equations nor code: with a share `a`
that grows from 0 to 1, what enters softmax attention (queries, keys, values) and GELU (W1 x) of branch i is (1 - a) of
its own and a of the mean over the branches; what leaves them, Wo and W2, is summed. At a = 1 all branches carry the same
values, and the mean of the first layers and the sum of the last ones make one block. Values must be joined too: with the
maps alone shared, the sum over branches of Wv Wo has a greater rank than one head can hold. One norm a sublayer, with its
gain, is read by all branches; a gain for each could be folded into its first layer. Branches times layers are 12, the
depth that is replaced. `a` grows linearly between two training steps (`merge_steps`), or is set by whoever trains
(`merge_to`).

At a = 0 a block of n branches is an ordinary one with n times the heads and hidden neurons, and is computed as such.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...core.build import create_model
from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...weights.keys import Assumed, State, as_preset, count, told_ratio
from .vit import OURS, ViT

CARD = Card(
    title="Rethinking Vision Transformer Depth via Structural Reparameterization",
    authors="Chengwei Zhou, Vipin Chaudhary, Gourav Datta",
    venue="arXiv 2025",
    arxiv="2511.19718",
    year=2025,
    licence="no code released",
    kind="backbone",
    domain="image",
    tags=("plain", "reparameterisation", "compression"),
    claim="ViT-Tiny shrinks from 12 to 6, 4 or 3 layers with its ImageNet-1k accuracy kept, up to 37 % faster on mobile "
          "CPUs.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "tiny_l6": Published(note="6 layers of 2 branches; accuracies could not be read, as of all"),
        "tiny_l4": Published(note="4 layers of 3 branches"),
        "tiny_l3": Published(note="3 layers of 4 branches"),
    },
)


def _join(x: Tensor, joined: Tensor, axis: int) -> Tensor:
    """(1 - a) of each branch and a of their mean over this axis."""
    return x + joined.to(x.dtype) * (x.mean(axis, keepdim=True) - x)


class BranchedAttention(Attention):
    """`branches` attentions of the same tokens, summed; `joined`, 0 to 1, is how far they have become one."""

    def __init__(self, dim: int, place: Place, *, heads: int = 4, branches: int = 2, bias: bool = True) -> None:
        super().__init__(dim, place, heads=heads * branches, inner=dim * branches, bias=bias)
        self.branches = branches
        self.register_buffer("joined", torch.zeros(()))

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b h n d"], ...]:
        q, k, v = super().project(x)
        split = [t.unflatten(1, (self.branches, -1)) for t in (q, k, v)]
        return tuple(_join(t, self.joined, 1).flatten(1, 2) for t in split)

    def merged(self) -> dict[str, Tensor]:
        """The tensors of the one Attention that the joined branches are."""
        n, qkv = self.branches, {k: t.unflatten(0, (3, self.branches, -1)).mean(1).flatten(0, 1)
                                 for k, t in self.qkv.state_dict(prefix="qkv.").items()}
        proj = self.proj.state_dict(prefix="proj.")
        return qkv | proj | {"proj.weight": self.proj.weight.unflatten(1, (n, -1)).sum(1)}


class BranchedMlp(Mlp):
    """`branches` MLPs of the same tokens, summed; `joined` as of the attention."""

    def __init__(self, dim: int, place: Place, *, ratio: float = 4.0, branches: int = 2, bias: bool = True) -> None:
        hidden = int(dim * ratio)
        super().__init__(dim, place, ratio=told_ratio(hidden * branches, dim), bias=bias)
        self.branches = branches
        self.register_buffer("joined", torch.zeros(()))

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b n c"]:
        h = _join(self.fc1(x).unflatten(-1, (self.branches, -1)), self.joined, -2)
        return self.fc2(F.gelu(h.flatten(-2)))

    def merged(self) -> dict[str, Tensor]:
        """The tensors of the one Mlp that the joined branches are."""
        fc1 = {k: t.unflatten(0, (self.branches, -1)).mean(0) for k, t in self.fc1.state_dict(prefix="fc1.").items()}
        fc2 = self.fc2.state_dict(prefix="fc2.")
        return fc1 | fc2 | {"fc2.weight": self.fc2.weight.unflatten(1, (self.branches, -1)).sum(1)}


class BranchedViT(ViT):
    """images (B, in_chans, H, W) -> logits (B, num_classes).

    branches: of each block, in training. merge_steps: training steps between which they become one; None: by `merge_to`.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 6, heads: int = 3, ratio: float = 4.0,
                 drop_path: float = 0.0, pool: str = "token", branches: int = 2,
                 merge_steps: tuple[int, int] | None = None) -> None:
        if branches < 1:
            raise DoesNotFit(f"branches is 1 or more, got {branches}")
        if merge_steps is not None and not 0 <= merge_steps[0] < merge_steps[1]:
            raise DoesNotFit(f"merge_steps are the first and the last step of merging, (begin, end), got {merge_steps}")
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth,
                         heads=heads, drop_path=drop_path, pool=pool, mixer=spec(BranchedAttention, branches=branches),
                         channel=spec(BranchedMlp, branches=branches, ratio=ratio))
        self._plain: dict[str, Any] = {
            "img_size": img_size, "patch": patch, "in_chans": in_chans, "dim": dim, "depth": depth, "heads": heads,
            "drop_path": drop_path, "pool": pool, "channel": spec(Mlp) if ratio == 4 else spec(Mlp, ratio=ratio)}
        self.merge_steps = merge_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def _branched(self) -> dict[str, Any]:
        return {n: m for n, m in self.named_modules() if isinstance(m, BranchedAttention | BranchedMlp)}

    def merge_to(self, share: float) -> None:
        """How far the branches are one: 0 apart, 1 merged. To be called before a training step."""
        if not 0 <= share <= 1:
            raise DoesNotFit(f"branches are joined to a share of 0 to 1, got {share}")
        for part in self._branched.values():
            part.joined = torch.full_like(part.joined, share)  # a new tensor: graphs of earlier steps keep theirs

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if self.training and self.merge_steps is not None:
            begin, end = self.merge_steps
            self.merge_to(min(1.0, max(0.0, (int(self.steps) - begin) / (end - begin))))
            self.steps += 1
        return super().forward(batch)

    @torch.no_grad()
    def reparameterize(self) -> ViT:
        """The plain ViT of the same answers; the branches must be one (`merge_to(1)`)."""
        if any(float(part.joined) != 1 for part in self._branched.values()):
            raise DoesNotFit("the branches are not one yet: train until merge_steps are over, or call merge_to(1)")
        like = next(self.parameters())
        plain = create_model("vit/tiny", num_classes=self.num_classes, **self._plain).to(like.device, like.dtype)
        state = {k: t for k, t in self.state_dict().items() if ".inner." not in k and k != "steps"}
        for name, part in self._branched.items():
            state |= {f"{name}.{k}": t for k, t in part.merged().items()}
        plain.load_state_dict(state)
        return plain.train(self.training)


PRESETS: dict[str, Spec[BranchedViT]] = {
    "nano": spec(BranchedViT, dim=64, depth=2, heads=4, patch=4, img_size=28),
    "tiny_l6": spec(BranchedViT),
    "tiny_l4": spec(BranchedViT, depth=4, branches=3),
    "tiny_l3": spec(BranchedViT, depth=3, branches=4),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Square images; everything but the heads and the schedule."""
    dim, in_chans, patch, patch_w = state["embedding.proj.weight"].shape
    token = "embedding.cls" in state
    side = round((state["embedding.position.table"].shape[1] - int(token)) ** 0.5)
    branches = state[f"{OURS}.mixer.inner.proj.weight".format(i=0)].shape[1] // dim
    hidden = state[f"{OURS}.channel.inner.fc1.weight".format(i=0)].shape[0] // branches
    return {
        "dim": dim, "patch": patch if patch == patch_w else (patch, patch_w), "in_chans": in_chans, "branches": branches,
        "img_size": side * patch if patch == patch_w else (side * patch, side * patch_w),
        "depth": count(state, f"{OURS}.mixer.norm.weight"), "pool": "token" if token else "mean",
        "heads": as_preset(PRESETS, "heads", max(1, dim // 64), dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "ratio": 4.0 if hidden == 4 * dim else told_ratio(hidden, dim),
        "merge_steps": Assumed(None, "of training alone; leaves no trace in the tensors"),
    }
