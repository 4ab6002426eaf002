"""Training Data-Efficient Image Transformers & Distillation through Attention (Touvron et al., ICML 2021),
arXiv 2012.12877.

New: a ViT trained on ImageNet alone. A distillation token stands beside the class token; a second classifier reads it and
learns from a teacher: from its decision (hard, Eq. 3: half cross-entropy with the label, half with the class that the
teacher takes) or from its distribution (soft, Eq. 2). In evaluation the logits of both classifiers are averaged. And a
recipe of augmentation and regularisation (table 9): `formarium train deit/tiny --recipe deit`.

    fm.train("deit/nano", "cifar10", objective="deit(teacher=teacher.safetensors)", recipe="deit")

Decisions: without a teacher both classifiers learn from the labels. Soft distillation divides the divergence by images and
classes, as the authors' code has it; `by_image` divides it by images, as Eq. 2 is read; its temperature is 1 unless given,
as in the code. A model with one classifier is taught the usual way, both terms on the same logits. The recipe leaves the
learning rate (theirs: 5e-4 * batch / 512) and the clipping of gradients (theirs: none) to the caller. The layers are ViT's,
so the plain presets are ViT itself. Those called iii are from DeiT III (arXiv 2204.07118): layer scale, positions of the
patches alone; its constant drop rate is residual="pre_norm(even_drop=true)".
"""

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
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.norm import LayerNorm
from ...parts.position import LearnedPosition
from ...parts.residual import PreNorm
from ...skeletons.backbone import Backbone
from ...skeletons.objective import Supervised, find_teacher
from ...weights.adapt import Change, refit_classifier
from ...weights.keys import Assumed, State, keymap, rule
from . import vit
from .vit import OURS, ViT, plain_rules

CARD = Card(
    title="Training Data-Efficient Image Transformers & Distillation through Attention",
    authors="Hugo Touvron, Matthieu Cord, Matthijs Douze, Francisco Massa, Alexandre Sablayrolles, Hervé Jégou",
    venue="ICML 2021",
    arxiv="2012.12877",
    year=2020,
    code="https://github.com/facebookresearch/deit",
    licence="Apache-2.0 (code and weights)",
    kind="backbone",
    domain="image",
    tags=("plain", "attention", "distillation", "recipe"),
    claim="Trained on ImageNet alone a ViT of 86 M parameters reaches 83.1 % top-1; a convolutional teacher through a "
          "distillation token lifts it to 85.2 %.",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons at 28 to 32 pixels; with a distillation token"),
        "tiny": Published(params=5.717e6, input=(3, 224, 224), results={"ImageNet top-1": 72.2}),
        "small": Published(params=22.051e6, macs=4.6e9, input=(3, 224, 224), results={"ImageNet top-1": 79.9},
                           note="the paper says 79.8; MACs as DeiT III has them of the same net"),
        "base": Published(params=86.568e6, macs=17.5e9, input=(3, 224, 224), results={"ImageNet top-1": 81.8},
                          note="MACs as DeiT III has them of the same net"),
        "base_384": Published(params=86.9e6, macs=55.5e9, input=(3, 384, 384), results={"ImageNet top-1": 82.9},
                              note="the paper says 83.1; MACs as DeiT III has them of the same net"),
        "tiny_distilled": Published(params=5.911e6, input=(3, 224, 224), results={"ImageNet top-1": 74.5}),
        "small_distilled": Published(params=22.436e6, input=(3, 224, 224), results={"ImageNet top-1": 81.2}),
        "base_distilled": Published(params=87.338e6, input=(3, 224, 224), results={"ImageNet top-1": 83.4}),
        "base_distilled_384": Published(params=87.63e6, input=(3, 384, 384), results={"ImageNet top-1": 85.2},
                                        note="1000 epochs"),
        "iii_small": Published(params=22.0e6, macs=4.6e9, input=(3, 224, 224),
                               results={"ImageNet top-1": 81.4, "ImageNet top-1 (ImageNet-21k)": 83.1}, note="DeiT III"),
        "iii_small_384": Published(params=22.2e6, macs=15.5e9, input=(3, 384, 384),
                                   results={"ImageNet top-1": 83.4, "ImageNet top-1 (ImageNet-21k)": 84.8},
                                   note="DeiT III; its table has the 22.0M of 224 pixels"),
        "iii_medium": Published(params=38.8e6, macs=8.0e9, input=(3, 224, 224),
                                results={"ImageNet top-1": 83.0, "ImageNet top-1 (ImageNet-21k)": 84.5}, note="DeiT III"),
        "iii_base": Published(params=86.6e6, macs=17.5e9, input=(3, 224, 224),
                              results={"ImageNet top-1": 83.8, "ImageNet top-1 (ImageNet-21k)": 85.7}, note="DeiT III"),
        "iii_base_384": Published(params=86.9e6, macs=55.5e9, input=(3, 384, 384),
                                  results={"ImageNet top-1": 85.0, "ImageNet top-1 (ImageNet-21k)": 86.7}, note="DeiT III"),
        "iii_large": Published(params=304.4e6, macs=61.6e9, input=(3, 224, 224),
                               results={"ImageNet top-1": 84.9, "ImageNet top-1 (ImageNet-21k)": 87.0}, note="DeiT III"),
        "iii_large_384": Published(params=304.8e6, macs=191.2e9, input=(3, 384, 384),
                                   results={"ImageNet top-1": 85.8, "ImageNet top-1 (ImageNet-21k)": 87.7},
                                   note="DeiT III"),
        "iii_huge_p14": Published(params=632.1e6, macs=167.4e9, input=(3, 224, 224),
                                  results={"ImageNet top-1": 85.2, "ImageNet top-1 (ImageNet-21k)": 87.2}, note="DeiT III"),
    },
    exceptions={
        "builds_and_answers": "in training the two classifiers answer apart",
        "drop_path": "in training the two classifiers answer apart, in evaluation together",
        "classifier": "the features are the mean of both tokens, of which each classifier reads one",
        "forward_features": "the features are the mean of both tokens, of which each classifier reads one",
    },
)

ANSWERS = ("both", "class", "distillation")


class TwoHeads(Backbone):
    """A backbone whose first two tokens have a classifier each: in training the logits of both, a tuple, in evaluation
    their mean, or those of one (`answer`). With num_classes=0 the answer is always the mean of both tokens.

    distilled: False leaves a usual backbone.
    """

    distilled, answer = True, "both"

    def reset_classifier(self, num_classes: int) -> None:
        """New classifiers of both tokens; 0: none."""
        if self.distilled:
            super().reset_classifier(num_classes)
            self.head_dist = self.head
        super().reset_classifier(num_classes)

    def refit(self, name: str, tensor: Tensor | None, was: Any) -> Change | None:
        return super().refit(name, tensor, was) or refit_classifier(self, name, was, "head_dist")

    def pooled(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b c"]:
        return (x[:, 0] + x[:, 1]) / 2 if self.distilled else super().pooled(x, ctx)

    def forward(self, batch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"] | tuple[Float[Tensor, "b k"], ...]:
        if not self.distilled:
            return super().forward(batch)
        x, ctx = self.encode(*self.embed(batch))
        if not self.num_classes:
            return self.pooled(x, ctx)
        answers = self.head(x[:, 0]), self.head_dist(x[:, 1])
        if self.training:
            return answers
        return (answers[0] + answers[1]) / 2 if self.answer == "both" else answers[self.answer == "distillation"]


class DeiT(TwoHeads, ViT):
    """images (B, in_chans, H, W) -> logits (B, num_classes); in training the logits of both classifiers, a tuple.

    answer: the classifiers whose logits are averaged in evaluation: "both", or that of the "class" or the "distillation"
    token alone (table 3).
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch: int | tuple[int, int] = 16, in_chans: int = 3,
                 num_classes: int = 1000, dim: int = 192, depth: int = 12, heads: int = 3, drop_path: float = 0.0,
                 answer: str = "both", mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm), residual: Spec[Residual] = spec(PreNorm),
                 position: Spec[Any] = spec(LearnedPosition)) -> None:
        if answer not in ANSWERS:
            raise unknown("answer of DeiT", answer, ANSWERS)
        super().__init__(img_size=img_size, patch=patch, in_chans=in_chans, num_classes=num_classes, dim=dim, depth=depth,
                         heads=heads, drop_path=drop_path, registers=1, mixer=mixer, channel=channel, norm=norm,
                         residual=residual, position=position)
        self.answer = answer


class Distillation(Supervised):
    """images, targets -> (1 - alpha) * cross-entropy of the first classifier + alpha * the teacher's loss on the second.

    teacher: a module images -> logits, a file, or a model's name (which starts from chance: a control); it sees the same
    augmented images. kind: "hard" or "soft". tau: temperature of the soft loss. by_image: see the decisions above.
    Numbers: labels and teacher, the two losses; agreement: part of the images where student and teacher take one class.
    """

    def __init__(self, model: Model, *, teacher: str | nn.Module = "", kind: str = "hard", alpha: float = 0.5,
                 tau: float = 1.0, by_image: bool = False) -> None:
        super().__init__(model)
        if kind not in ("hard", "soft"):
            raise unknown("kind of distillation", kind, ("hard", "soft"))
        if not (0 <= alpha <= 1 and tau > 0):
            raise DoesNotFit(f"expected alpha from 0 to 1 and tau > 0, got alpha={alpha} and tau={tau}")
        self.kind, self.alpha, self.tau, self.by_image = kind, alpha, tau, by_image
        self.teacher = find_teacher(teacher, model, "deit")
        self.train()

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, inputs: Float[Tensor, "b c h w"], targets: Tensor) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        answers = self.model(inputs)
        student, taught = (answers, answers) if isinstance(answers, Tensor) else answers
        with torch.no_grad():
            teacher = self.teacher(inputs)
        if teacher.shape != taught.shape:
            raise DoesNotFit(f"student and teacher need the same classes, here are logits {tuple(taught.shape)} and "
                             f"{tuple(teacher.shape)}; build one of them with num_classes=")
        labels = F.cross_entropy(student, targets)
        told = F.cross_entropy(taught, teacher.argmax(1)) if self.kind == "hard" else self.divergence(taught, teacher)
        agreement = (taught.argmax(1) == teacher.argmax(1)).float().mean()
        return (1 - self.alpha) * labels + self.alpha * told, {"labels": labels.detach(), "teacher": told.detach(),
                                                               "agreement": agreement}

    def divergence(self, student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        """tau^2 KL(teacher || student) of the distributions at temperature tau (Eq. 2)."""
        logs = [(x / self.tau).log_softmax(1) for x in (student, teacher)]
        total = F.kl_div(*logs, reduction="sum", log_target=True) * self.tau**2
        return total / (len(student) if self.by_image else student.numel())


OBJECTIVE = spec(Distillation)

III = spec(ViT, position_first=True, layer_scale=1e-4)
PRESETS = {
    "nano": spec(DeiT, dim=64, depth=4, heads=4, patch=4, img_size=28),
    "tiny": spec(ViT, dim=192, heads=3),
    "small": spec(ViT, dim=384, heads=6),
    "base": spec(ViT, dim=768, heads=12),
    "base_384": spec(ViT, dim=768, heads=12, img_size=384),
    "tiny_distilled": spec(DeiT, dim=192, heads=3),
    "small_distilled": spec(DeiT, dim=384, heads=6),
    "base_distilled": spec(DeiT, dim=768, heads=12),
    "base_distilled_384": spec(DeiT, dim=768, heads=12, img_size=384),
    "iii_small": III.but(dim=384, heads=6),
    "iii_small_384": III.but(dim=384, heads=6, img_size=384),
    "iii_medium": III.but(dim=512, heads=8),
    "iii_base": III.but(dim=768, heads=12),
    "iii_base_384": III.but(dim=768, heads=12, img_size=384),
    "iii_large": III.but(dim=1024, depth=24, heads=16),
    "iii_large_384": III.but(dim=1024, depth=24, heads=16, img_size=384),
    "iii_huge_p14": III.but(dim=1280, depth=32, heads=16, patch=14),
}

KEYS = {
    "timm": keymap(  # the authors' too, but for those of DeiT III
        rule("dist_token", "embedding.registers"),
        rule("head_dist.*", "head_dist.*"),
        *[r for r in plain_rules() if r.theirs != ("reg_token",)],
    ),
    "authors": keymap(  # of DeiT III
        rule("blocks.{i}.gamma_1", f"{OURS}.mixer.scale"),
        rule("blocks.{i}.gamma_2", f"{OURS}.channel.scale"),
        *[r for r in plain_rules() if not r.theirs[0].endswith((".gamma", "reg_token"))],
        example=("iii_small", {"dim": 128, "depth": 2, "heads": 2, "patch": 4, "img_size": 28}),
        without={v: "its names are those of the layout timm" for v in PRESETS if not v.startswith("iii")},
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """As ViT's. A distillation token is told by its classifier, or by timm's name for it."""
    told = vit.settings(state, "timm" if layout == "authors" else layout)
    if "head_dist.weight" in state or (layout == "timm" and "embedding.registers" in state):
        own = {k: v for k, v in told.items() if PRESETS["nano"].takes(k)}
        return own | {"answer": Assumed("both", "leaves no trace in the tensors; what is done in evaluation")}
    return told
