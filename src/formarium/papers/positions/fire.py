"""Functional Interpolation for Relative Positions Improves Long Context Transformers (Li et al., ICLR 2024),
arXiv 2310.04418.

New: FIRE, a bias on the scores that is a learned function of an interpolated distance:
b(i, j) = f(psi(i - j) / psi(max(L, i))), psi(x) = log(c x + 1), f an MLP 1 -> 32 -> heads. The normaliser is the query's
own position (progressive interpolation), so the argument stays in [0, 1] at any length, no later token changes it, and a
cache of keys stays valid. psi, with a learned c, spreads out the near keys; below L, learned too, the scale is fixed, so
that short texts keep their resolution. With enough hidden units f holds any table of distances, and Kerple's logarithm.
FIRE-S: all layers share one bias.

Decisions, after the listing in the paper's appendix, the only code: positions count from 0; c and L enter by their
absolute value, L as 512 times a learned factor; psi takes |i - j|. So without a causal mask keys ahead are as far as keys
behind, and a key ahead by more than max(L, i) lies outside of [0, 1]; the tokens of an image are numbered row by row, the
class token first. The MLP's last layer has no bias: softmax does not notice a number added to a whole row of scores.
Its weights start as PyTorch's linear layers do, whatever the host's rule. FIRE-S shares within a stage. The sizes of the
presets are GPT-3's of 125M and 350M; the vocabulary is GPT-2's.

No parameter depends on a length: `load(file, context=...)`, or the same state in a model of a longer context, goes on
past the length of training. The hidden layer takes hidden * N * M numbers a layer: FIRE-S has it once, gradient
checkpointing holds one at a time.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx, Place
from ...core.errors import DoesNotFit
from ...core.spec import spec
from ...parts.position import ScorePosition
from ...weights.keys import Assumed, State, as_preset
from ..language.gpt import GPT, host_settings
from ..language.gpt import PRESETS as GPTS

CARD = Card(
    title="Functional Interpolation for Relative Positions Improves Long Context Transformers",
    authors="Shanda Li, Chong You, Guru Guruganesh, Joshua Ainslie, Santiago Ontanon, Manzil Zaheer, Sumit Sanghai, "
            "Yiming Yang, Sanjiv Kumar, Srinadh Bhojanapalli",
    venue="ICLR 2024",
    arxiv="2310.04418",
    year=2023,
    kind="position",
    domain="language",
    tags=("relative position", "length extrapolation", "attention bias"),
    claim="A decoder trained on 2,048 tokens of C4 with FIRE has a lower perplexity on up to 8,192 tokens than with RoPE, "
          "ALiBi, Kerple, T5's bias or Sandwich.",
    variants={
        "nano": Published(note="ours: gpt/nano with FIRE; L is a quarter of the context, as in the paper"),
        "base": Published(input=(2048,), note="125M in the paper, rounded, and of a vocabulary that we do not know"),
        "base_s": Published(input=(2048,), note="FIRE-S"),
        "large": Published(input=(2048,), note="350M in the paper, rounded, and of a vocabulary that we do not know"),
    },
    hosts=("gpt/nano", "vit/nano"),
    can=("causal", "bidirectional", "cache"),
)


class Fire(ScorePosition):
    """A bias (1 or B, heads, N, M) for the scores, by distance relative to the query's position.

    threshold, c: L and c at the start, both positive. hidden: units of the MLP. shared: FIRE-S, the first layer of a
    stage has the parameters and computes the bias, the others take it. place: offered by the mixer.
    """

    def __init__(self, head_dim: int, heads: int, *, threshold: float = 512.0, c: float = 0.1, hidden: int = 32,
                 shared: bool = False, place: Place | None = None) -> None:
        super().__init__(head_dim, heads)
        if not (threshold > 0 and c > 0 and hidden >= 1):
            raise DoesNotFit(f"threshold and c are positive, hidden is 1 or more; got {threshold}, {c} and {hidden}")
        if shared and place is None:
            raise DoesNotFit("Fire(shared=True) must know its layer, and this mixer does not offer its place; "
                             "take the mixer 'attention', or shared=False")
        self.threshold, self.shared = threshold, shared
        self.owner = not shared or (place is not None and place.nth == 0)
        if self.owner:
            self.c = nn.Parameter(torch.tensor(float(c)))
            self.multiplier = nn.Parameter(torch.ones(()))
            self.w1 = nn.Parameter(torch.empty(hidden, 1).uniform_(-1, 1))
            self.b1 = nn.Parameter(torch.empty(hidden).uniform_(-1, 1))
            self.w2 = nn.Parameter(torch.empty(heads, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))

    def bias(self, n: int, m: int, ctx: Ctx) -> Float[Tensor, "b h n m"]:
        key = f"fire {self.heads}"
        if self.owner:  # computed even if it is there: under checkpointing the layer must run the same way again
            bias = self._bias(*self._positions(n, m, ctx))
            if self.shared:
                ctx.shared[key] = bias
            return bias
        if key not in ctx.shared:
            raise DoesNotFit(f"Fire(shared=True) takes the bias of its stage's first layer, which must be attention of "
                             f"{self.heads} heads with the same position; take shared=False where mixers take turns")
        return ctx.shared[key]

    def _positions(self, n: int, m: int, ctx: Ctx) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
        """Of queries and keys; bfloat16 does not hold the whole numbers above 256."""
        if ctx.lengths is not None:
            raise DoesNotFit("Fire does not take packed batches: attention takes no bias with them")
        exact = torch.promote_types(self.c.dtype, torch.float32)
        if ctx.coords is not None:
            if n != m:
                raise DoesNotFit(f"Fire needs the positions of all {m} keys, ctx.coords has those of {n} new tokens")
            at = ctx.coords[..., 0].to(exact)
            return at, at
        keys = torch.arange(m, device=self.c.device, dtype=exact)[None]
        return keys[:, m - n:], keys

    def _bias(self, i: Float[Tensor, "b n"], j: Float[Tensor, "b m"]) -> Float[Tensor, "b h n m"]:
        c, limit = self.c.to(i.dtype).abs(), (self.threshold * self.multiplier.to(i.dtype)).abs()
        distance = (i[:, :, None] - j[:, None, :]).abs()
        t = (c * distance).log1p() / ((c * torch.maximum(i, limit)).log1p() + 1e-6)[:, :, None]  # 1e-6: c may reach 0
        hidden = (self.w1 * t.to(self.w1.dtype).flatten(1)[:, None] + self.b1[:, None]).relu()  # (B, hidden, N * M)
        return (self.w2 @ hidden).unflatten(-1, t.shape[1:])


PART = spec(Fire)

PAPER = spec(GPT, vocab=50257, dim=768, depth=12, heads=12, context=2048, init_std=0.02, position=PART)
PRESETS = {
    "nano": GPTS["nano"].but(position=PART.but(threshold=32.0)),
    "base": PAPER,
    "base_s": PAPER.but(position=PART.but(shared=True)),
    "large": PAPER.but(dim=1024, depth=24, heads=16),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """All sizes, and whether the layers share the bias. Untold by the tensors: the context and where L starts; the presets'
    are taken, else 2,048 and 512."""
    told = host_settings(state, PRESETS)
    first = "stack.layers.0.mixer.inner.position"
    heads, hidden = state[f"{first}.w2"].shape
    known = as_preset(PRESETS, "position", PART, vocab=told["vocab"], dim=told["dim"])
    options = {k: v for k, v in known.value.options if k == "threshold"}
    if hidden != 32:
        options["hidden"] = hidden
    if told["depth"] > 1 and f"{first.replace('.0.', '.1.')}.w1" not in state:
        options["shared"] = True
    return told | {"heads": heads, "position": Assumed(spec(Fire, **options), f"threshold {known.why}")}
