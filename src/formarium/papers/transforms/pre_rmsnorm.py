"""Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers (Jiang, Gu, Zhu, Pan,
NeurIPS 2023), arXiv 2305.14858.

New: in a pre-LN model the stream is read through layer norms alone, so its mean over the channels is redundant. If all that
writes to the stream (embeddings, the last linear layer of each part) has outputs of mean zero, W - 1/d 1 1^T W, layer norm
is RMSNorm, and the answers stay (Pre-RMSNorm, section 3.2). Then the last of d channels is minus the sum of the others and
can be left out: CRMSNorm(x) = x / sqrt((sum x_i^2 + (sum x_i)^2) / d) of d - 1 channels, and readers take
W[:, :-1] - W[:, -1:] (Pre-CRMSNorm, section 3.3). Gain and bias of a norm are folded into the linear layer that reads it.

`pre_rmsnorm(form=...)` converts any model of the toolkit that is pre-LN: "rms", "crms", or "training", which keeps all
parameters of the Pre-LN model and takes the means away in each forward pass, so that the gradients are those of Pre-LN.

Decisions: embeddings are centred where they enter the stack, one subtraction a token, so tables that a tied head reads stay
as they are. The last norm keeps its gain and bias and gives all d channels, for any head. A norm whose reader pads its
output with zeros (windows) keeps them too: a folded bias would reach the padding. Layer scale is folded into the writer.
The maps of `features` lose their mean over channels, compressed ones also their last channel. Refused by name: residuals,
norms, parts and models of which it is not known that they read the stream through layer norms alone; and what merges tokens
between stages (Swin): a norm over four tokens sees how their means differ, so there the mean is not redundant.

The presets are the authors' ViTs, in training form: norms without gain, positions of the patches alone; "mean" pooling is
over all tokens. Their Pre-LN and zero-mean training form have the same tensors and are the same function.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.errors import DoesNotFit, unknown
from ...core.model import Model
from ...core.part import Part, Resample
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp, SwiGLU
from ...parts.embed import PatchEmbed
from ...parts.position import LearnedPosition, seat
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone, Stage
from ...skeletons.decoder import Decoder
from ...skeletons.stack import Stack
from ...weights.keys import Assumed, Op, Passed, State, as_preset, count, keymap, rule, told_ratio
from ..backbones.swin import WindowAttention

CARD = Card(
    title="Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
    authors="Zixuan Jiang, Jiaqi Gu, Hanqing Zhu, David Z. Pan",
    venue="NeurIPS 2023",
    arxiv="2305.14858",
    year=2023,
    code="https://github.com/ZixuanJiang/pre-rmsnorm-transformer",
    licence="see the repository; no weights are released",
    kind="transform",
    domain="image",
    tags=("normalisation", "equivalence", "efficiency"),
    claim="Pre-LN, Pre-RMSNorm and Pre-CRMSNorm Transformers are equal in training and inference; the conversion saves "
          "1 to 10 % of the time.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 pixels"),
        "nano_crms": Published(note="ours: nano, compressed to 63 channels"),
        "tiny": Published(note="of the code, without published counts, as all below"),
        "tiny_crms": Published(note="tiny, compressed to 191 channels"),
        "small": Published(),
        "base": Published(),
        "large": Published(),
        "huge": Published(),
        "giant": Published(),
    },
    hosts=("pre_rmsnorm/nano", "fire/nano", "droppos/nano"),
)

LOOKS_FOR = "layers of pre-norm residuals with layer norms"
IDENTITY = {"form": "training"}
FORMS = ("rms", "crms", "training")
WRITES: dict[type[Part], str] = {Attention: "proj", WindowAttention: "proj", Mlp: "fc2", SwiGLU: "fc2"}
READS: dict[type[Part], str] = {Attention: "qkv", Mlp: "fc1", SwiGLU: "fc1"}  # all else may pad what it reads


def _shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), by default without gain and bias."""

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return _shift(F.rms_norm(x, (self.dim,), eps=self.eps), self.weight, self.bias)


class CRMSNorm(nn.Module):
    """RMSNorm of tokens of mean zero from all channels but the last (Eq. 10), by default without gain and bias.

    dim: channels that are there. expand: gives the missing one too.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = False, expand: bool = False) -> None:
        super().__init__()
        self.dim, self.eps, self.expand = dim, eps, expand
        out = dim + 1 if expand else dim
        self.weight = nn.Parameter(torch.ones(out)) if affine else None
        self.bias = nn.Parameter(torch.zeros(out)) if affine else None

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        kept = x.to(torch.promote_types(x.dtype, torch.float32))
        last = -kept.sum(-1, keepdim=True)
        square = (kept.square().sum(-1, keepdim=True) + last.square()) / (self.dim + 1)
        whole = torch.cat((kept, last), dim=-1) if self.expand else kept
        return _shift((whole * (square + self.eps).rsqrt()).to(x.dtype), self.weight, self.bias)


class PlainLayerNorm(nn.LayerNorm):
    """Layer norm without gain and bias, as in the authors' Pre-LN models."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=False)


class Centre(Resample):
    """Tokens less their mean over the channels. compress: without the last channel."""

    step = (1, 1)

    def __init__(self, compress: bool = False) -> None:
        super().__init__()
        self.compress = compress

    def forward(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> tuple[Float[Tensor, "b n d"], Ctx]:
        x = x - x.mean(-1, keepdim=True)
        return x[..., :-1] if self.compress else x, ctx


class ZeroMeanLinear(nn.Linear):
    """A linear layer, times `scale`, whose outputs have mean zero, from ordinary weights (training form)."""

    scale: nn.Parameter | None

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, *_centred(self.weight, self.bias, self.scale))


def _centred(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W - 1/d 1 1^T W and b - mean(b), of diag(scale) W and scale * b."""
    if scale is not None:
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    return weight - weight.mean(0), None if bias is None else bias - bias.mean()


def _write(owner: nn.Module, name: str, form: str, scale: nn.Parameter | None = None) -> None:
    """Makes the outputs of this linear layer have mean zero."""
    linear: nn.Linear = getattr(owner, name)
    scale = getattr(linear, "scale", scale)
    if form == "training":
        made: nn.Linear = ZeroMeanLinear(1, 1, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        made.scale = scale  # type: ignore[assignment]
    else:
        weight, bias = _centred(linear.weight, linear.bias, scale)
        if form == "crms":
            weight, bias = weight[:-1], None if bias is None else bias[:-1]
        made = nn.Linear(1, 1, bias=False)
        made.weight = _parameter(weight, linear.weight)
        made.bias = None if bias is None else _parameter(bias, linear.bias)  # type: ignore[assignment]
    made.out_features, made.in_features = made.weight.shape
    setattr(owner, name, made)


def _read(linear: nn.Linear, norm: nn.Module, form: str) -> None:
    """Takes over gain and bias of the norm before; compressed: what the last channel meant."""
    weight = linear.weight
    if norm.bias is not None:
        added = weight @ norm.bias  # type: ignore[operator]
        linear.bias = _parameter(added if linear.bias is None else linear.bias + added, weight)
    if norm.weight is not None:
        weight = weight * norm.weight
    if form == "crms":
        weight = weight[:, :-1] - weight[:, -1:]
    linear.weight = _parameter(weight, linear.weight)
    linear.in_features = weight.shape[1]


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad)


def _norm(old: nn.Module, form: str, *, folded: bool = False) -> nn.Module:
    """What stands for this norm of zero-mean tokens. folded: another takes over its gain and bias."""
    dim = old.normalized_shape[0] if isinstance(old, nn.LayerNorm) else old.dim
    made: PlainRMSNorm | CRMSNorm = PlainRMSNorm(dim, eps=old.eps)  # type: ignore[arg-type]
    if form == "crms":
        made = CRMSNorm(dim - 1, eps=old.eps, expand=not folded)  # type: ignore[arg-type, operator]
    if not folded:
        made.weight, made.bias = old.weight, old.bias  # type: ignore[assignment]
    return made


def _part(residual: PreNorm) -> tuple[str, str | None]:
    """The names of the linear layers that write to the stream and, if it is known, read from the norm."""
    part = residual.inner
    for kind, name in WRITES.items():
        if isinstance(part, kind) and type(part).forward is kind.forward and isinstance(getattr(part, name), nn.Linear):
            reads = READS.get(type(part))
            return name, reads if isinstance(getattr(part, reads or "", None), nn.Linear) else None
    raise DoesNotFit(f"pre_rmsnorm does not know which linear layer of {type(part).__name__} writes to the stream; it "
                     f"knows {', '.join(k.__name__ for k in WRITES)}")


def _check(model: Model, stacks: list[Stack]) -> None:
    """Raises unless the stream is read through layer norms alone."""
    encode = type(model).encode
    if encode not in (Backbone.encode, Decoder.encode):
        raise DoesNotFit(f"pre_rmsnorm converts image backbones and language decoders; {type(model).__name__} may read its "
                         "stream in other places")
    residuals = [r for stack in stacks for layer in stack.layers for r in layer.values()]  # type: ignore[operator, union-attr]
    for r in residuals:
        if type(r) is not PreNorm:
            raise DoesNotFit("pre_rmsnorm needs pre-norm residuals, which read the stream through their norm alone; here "
                             f"is {type(r).__name__}")
        _part(r)
    for stack in stacks:
        if type(stack).span is not Stack.span:
            raise DoesNotFit(f"pre_rmsnorm does not know what {type(stack).__name__} does to the tokens between its layers")
        if stack.resample is not None and type(stack.resample) is not Centre:
            raise DoesNotFit(f"pre_rmsnorm does not fit {type(stack.resample).__name__}, which reads tokens otherwise than "
                             "one by one through a layer norm, and so their means")
    for owner in (*residuals, model):
        norm = owner.norm
        if not isinstance(norm, nn.LayerNorm | PlainRMSNorm | CRMSNorm):
            raise DoesNotFit(f"pre_rmsnorm needs layer norms, here is {type(norm).__name__}")
        if isinstance(norm, PlainRMSNorm) and not isinstance(stacks[0].resample, Centre):
            raise DoesNotFit("pre_rmsnorm needs layer norms, here are RMSNorms of a stream that is not centred")


@torch.no_grad()
def pre_rmsnorm(model: Model, *, form: str = "rms") -> int:
    """To Pre-RMSNorm ("rms"), Pre-CRMSNorm ("crms") or the training form; returns the number of norms."""
    if form not in FORMS:
        raise unknown("form of pre_rmsnorm", form, FORMS)
    stacks = [m for m in model.modules() if isinstance(m, Stack)]
    layers = [(stack, layer) for stack in stacks for layer in stack.layers]
    if not layers:
        return 0
    _check(model, stacks)
    places = sum(len(layer) for _, layer in layers) + 1  # type: ignore[arg-type]
    if isinstance(model.norm, CRMSNorm):
        if form != "crms":
            raise DoesNotFit("the model is compressed already; convert the one that it was made of")
        return places
    done: set[int] = set()  # layers may be shared
    for _, layer in layers:
        for residual in layer.values():  # type: ignore[operator, union-attr]
            if id(residual) not in done:
                done.add(id(residual))
                write, read = _part(residual)
                folded = read is not None and form != "training"
                if folded:
                    _read(getattr(residual.inner, read), residual.norm, form)
                _write(residual.inner, write, form, residual.scale)
                residual.norm, residual.scale = _norm(residual.norm, form, folded=folded), None
    for stack in stacks:
        stack.resample = Centre(form == "crms")
        if form == "crms":
            stack.dim -= 1
    model.norm = _norm(model.norm, form)  # type: ignore[arg-type]
    like = next(model.parameters())
    model.to(like.device, like.dtype)
    return places


TRANSFORM = pre_rmsnorm


class PreRMSNormViT(Backbone):
    """images (B, in_chans, H, W) -> logits (B, num_classes): the authors' ViT.

    pool: "token" takes the class token, "mean" the mean of all tokens, class token included; the norm comes after.
    norm: PlainRMSNorm, CRMSNorm (with a `dim` one less than `inner` of the attention) or PlainLayerNorm.
    zero_mean: all that writes to the stream has mean zero over the channels, as the training form of Pre-RMSNorm needs.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 12, heads: int = 3, drop_path: float = 0.0,
                 pool: str = "token", zero_mean: bool = True, mixer: Spec[Part] = spec(Attention),
                 channel: Spec[Part] = spec(Mlp), norm: Spec[nn.Module] = spec(PlainRMSNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        mixer, position = seat(position, mixer.offer(heads=heads))
        embed = PatchEmbed(in_chans, dim, patch=patch, img_size=img_size, class_token=True, position_first=True,
                           position=position)
        stage = Stage(dim, depth, {"mixer": mixer, "channel": channel}, spec(PreNorm, norm=norm, drop_path=drop_path))
        super().__init__(embed, [stage], img_size=img_size, norm=norm, num_classes=num_classes, pool=pool, pool_first=True)
        if zero_mean:
            stack: Stack = self.stages[0]  # type: ignore[assignment]
            stack.resample = Centre()
            for layer in stack.layers:
                for residual in layer.values():  # type: ignore[operator, union-attr]
                    _write(residual.inner, _part(residual)[0], "training")

    def pooled(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        return x[:, 0] if self.pool == "token" else x.mean(1)


def _crms(width: int, ratio: float = 4.0) -> dict[str, Any]:
    """Options of a model of this width that is compressed."""
    return {"dim": width - 1, "mixer": spec(Attention, inner=width), "norm": spec(CRMSNorm), "zero_mean": False,
            "channel": spec(Mlp, ratio=told_ratio(int(width * ratio), width - 1))}


PRESETS = {
    "nano": spec(PreRMSNormViT, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "nano_crms": spec(PreRMSNormViT, depth=4, heads=4, patch=4, img_size=28, **_crms(64)),
    "tiny": spec(PreRMSNormViT, dim=192, depth=12, heads=3),
    "tiny_crms": spec(PreRMSNormViT, depth=12, heads=3, **_crms(192)),
    "small": spec(PreRMSNormViT, dim=384, depth=12, heads=6),
    "base": spec(PreRMSNormViT, dim=768, depth=12, heads=12),
    "large": spec(PreRMSNormViT, dim=1024, depth=24, heads=16),
    "huge": spec(PreRMSNormViT, dim=1280, depth=32, heads=16),
    "giant": spec(PreRMSNormViT, dim=1664, depth=48, heads=16, channel=spec(Mlp, ratio=told_ratio(8192, 1664))),
}


def _patches(t: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Their patches are rows (p1 p2 c) of a linear layer."""
    for chans in (options["in_chans"],) if "in_chans" in options else (3, 1, 4, 2):
        side = math.isqrt(t[0].shape[1] // chans)
        if side * side * chans == t[0].shape[1]:
            return [t[0].unflatten(1, (side, side, chans)).permute(0, 3, 1, 2)]
    raise Passed


OURS, THEIRS = "stages.0.layers.{i}", "transformer.layers.{i}"
PATCHES = Op(_patches, lambda t, o: [t[0].permute(0, 2, 3, 1).flatten(1)])
KEYS = {
    "authors": keymap(
        rule("cls_token", "embedding.cls"),
        rule("pos_embedding", "embedding.position.table"),
        rule("to_patch_embedding.1.weight", "embedding.proj.weight", PATCHES),
        rule("to_patch_embedding.1.bias", "embedding.proj.bias"),
        rule(f"{THEIRS}.1.to_qkv.*", f"{OURS}.mixer.inner.qkv.*"),
        rule(f"{THEIRS}.1.to_out.*", f"{OURS}.mixer.inner.proj.*"),
        rule(f"{THEIRS}.3.net.0.*", f"{OURS}.channel.inner.fc1.*"),
        rule(f"{THEIRS}.3.net.2.*", f"{OURS}.channel.inner.fc2.*"),
        rule("mlp_head.1.*", "head.*"),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Square images. Where attention is one wider than the stream, the model is compressed."""
    dim, in_chans, patch, patch_w = state["embedding.proj.weight"].shape
    inner = state["stages.0.layers.0.mixer.inner.proj.weight"].shape[1]
    hidden = state["stages.0.layers.0.channel.inner.fc1.weight"].shape[0]
    side = math.isqrt(state["embedding.position.table"].shape[1])
    width, compressed = (inner, True) if inner == dim + 1 else (dim, False)
    told: dict[str, Any] = {
        "dim": dim, "patch": patch if patch == patch_w else (patch, patch_w), "in_chans": in_chans,
        "img_size": side * patch if patch == patch_w else (side * patch, side * patch_w),
        "depth": count(state, f"{OURS}.mixer.inner.qkv.weight"),
        "heads": as_preset(PRESETS, "heads", max(1, width // 64), dim=dim),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "pool": Assumed("token", "leaves no trace in the tensors"),
        "mixer": spec(Attention) if inner == dim else spec(Attention, inner=inner),
        "channel": spec(Mlp) if hidden == 4 * dim else spec(Mlp, ratio=told_ratio(hidden, dim)),
    }
    if layout == "authors":
        told["in_chans"] = Assumed(in_chans, "the patches are rows of a linear layer")
    if compressed:
        return told | {"norm": spec(CRMSNorm), "zero_mean": False}
    why = "leaves no trace in the tensors; Pre-LN and Pre-RMSNorm in training form are one function"
    return told | {"norm": Assumed(spec(PlainRMSNorm), why), "zero_mean": Assumed(True, why)}
