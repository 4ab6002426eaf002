"""iTransformer: Inverted Transformers Are Effective for Time Series Forecasting (Liu et al., ICLR 2024), arXiv 2310.06625.

New: a token is not a time step of all variates but the whole past of one variate. One linear layer embeds the past
(Eq. 1), attention mixes variates and the MLP works on each series (section 3.2), and one linear layer reads the whole
forecast off each token. Tokens have no order, so there are no positions: permuting the variates permutes the forecast, and
the weights fit any number of variates, those unseen in training among them.

Decisions: known features of the steps (`marks`, the authors' time stamps) are tokens too; here they stand before the
variates, which changes nothing, as no token has a position. The authors do not pass gradients to the input through the mean
that is subtracted; ours are the true ones. Any mixer may take attention's place (section 4.2: Informer's, Reformer's,
Flowformer's attention); one that depends on the order of the tokens loses the equivariance. Linear layers start at
PyTorch's weights, as the authors' do: from the larger ones of Xavier the forecasts come out worse.
Deviation: the authors' dropout of 0.1 is not there; `drop_path` is.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.card import Card, Published
from ...core.ctx import Ctx
from ...core.part import Part, Residual
from ...core.spec import Spec, spec
from ...parts.attention import Attention
from ...parts.channel import Mlp
from ...parts.norm import LayerNorm
from ...parts.residual import PostNorm, start_residuals
from ...skeletons.series import Forecaster
from ...skeletons.stack import Stack
from ...weights.keys import FUSE, Op, State, as_preset, count, keymap, rule, told_ratio

CARD = Card(
    title="iTransformer: Inverted Transformers Are Effective for Time Series Forecasting",
    authors="Yong Liu, Tengge Hu, Haoran Zhang, Haixu Wu, Shiyu Wang, Lintao Ma, Mingsheng Long",
    venue="ICLR 2024",
    arxiv="2310.06625",
    year=2024,
    code="https://github.com/thuml/iTransformer",
    licence="MIT",
    kind="series",
    domain="series",
    tags=("forecasting", "variate tokens", "host"),
    claim="A plain Transformer is state of the art on multivariate forecasting once whole series are its tokens "
          "(MSE averaged over four horizons: 0.428 on Traffic, 0.178 on ECL).",
    variants={
        "nano": Published(note="ours: for tests and quick comparisons"),
        "etth1": Published(params=841568, input=(96, 7), results={"ETTh1 96 MSE": 0.386, "ETTh1 96 MAE": 0.405},
                           note="at horizon 192: 0.441, 0.436; parameters counted in the authors' code, as all here"),
        "etth1_336": Published(input=(96, 7), results={"ETTh1 336 MSE": 0.487, "ETTh1 336 MAE": 0.458},
                               note="twice as wide; also at horizon 720: 0.503, 0.491"),
        "etth2": Published(input=(96, 7), results={"ETTh2 96 MSE": 0.297, "ETTh2 96 MAE": 0.349}),
        "ettm1": Published(input=(96, 7), results={"ETTm1 96 MSE": 0.334, "ETTm1 96 MAE": 0.368}),
        "ettm2": Published(input=(96, 7), results={"ETTm2 96 MSE": 0.180, "ETTm2 96 MAE": 0.264}),
        "exchange": Published(input=(96, 8), results={"Exchange 96 MSE": 0.086, "Exchange 96 MAE": 0.206}),
        "weather": Published(input=(96, 21), results={"Weather 96 MSE": 0.174, "Weather 96 MAE": 0.214}),
        "solar": Published(input=(96, 137), results={"Solar-Energy 96 MSE": 0.203, "Solar-Energy 96 MAE": 0.237}),
        "ecl": Published(params=4.83e6, input=(96, 321), results={"ECL 96 MSE": 0.148, "ECL 96 MAE": 0.240}),
        "traffic": Published(params=6.41e6, input=(96, 862), results={"Traffic 96 MSE": 0.395, "Traffic 96 MAE": 0.268}),
        "pems03": Published(input=(96, 358), results={"PEMS03 12 MSE": 0.071, "PEMS03 12 MAE": 0.174}),
        "pems04": Published(input=(96, 307), results={"PEMS04 12 MSE": 0.078, "PEMS04 12 MAE": 0.183}),
        "pems07": Published(input=(96, 883), results={"PEMS07 12 MSE": 0.067, "PEMS07 12 MAE": 0.165},
                            note="two layers; four at horizons 48 and 96"),
        "pems08": Published(input=(96, 170), results={"PEMS08 12 MSE": 0.079, "PEMS08 12 MAE": 0.182},
                            note="two layers; four, and no normalisation, at horizons 48 and 96"),
    },
)


class ITransformer(Forecaster):
    """history (B, context, variates) -> forecast (B, horizon, variates); marks (B, context, M) become M tokens more.

    ratio: width of the MLP in widths of the tokens. variates: None takes any number; a model of another number is loaded
    with load(file, variates=...). drop_path: of the last layer, growing linearly from zero.
    """

    def __init__(self, *, context: int = 96, horizon: int = 96, variates: int | None = None, normalise: bool = True,
                 dim: int = 512, depth: int = 2, heads: int = 8, ratio: float = 1.0, drop_path: float = 0.0,
                 mixer: Spec[Part] = spec(Attention), channel: Spec[Part] = spec(Mlp),
                 norm: Spec[nn.Module] = spec(LayerNorm, eps=1e-5), residual: Spec[Residual] = spec(PostNorm)) -> None:
        stack = Stack(dim, depth, {"mixer": mixer.offer(heads=heads), "channel": channel.offer(ratio=ratio)},
                      residual.offer(norm=norm, drop_path=drop_path))
        super().__init__(stack, context=context, horizon=horizon, variates=variates, normalise=normalise, norm=norm)
        self.embedding = nn.Linear(context, dim)
        self.head = nn.Linear(dim, horizon)
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        start_residuals(stack)

    def embed(self, batch: Float[Tensor, "b t v"],
              marks: Float[Tensor, "b t m"] | None = None) -> tuple[Float[Tensor, "b n c"], Ctx]:
        known = 0 if marks is None else marks.shape[2]
        series = batch if marks is None else torch.cat((marks, batch), dim=2)
        return self.embedding(series.transpose(1, 2)), Ctx(prefix=known)

    def project(self, x: Float[Tensor, "b n c"], ctx: Ctx) -> Float[Tensor, "b h v"]:
        return self.head(x[:, ctx.prefix:]).transpose(1, 2)


SMALL = spec(ITransformer, dim=128)
PRESETS = {
    "nano": spec(ITransformer, dim=32, heads=4, context=48, horizon=24, variates=7),
    "etth1": spec(ITransformer, dim=256, variates=7),
    "etth1_336": spec(ITransformer, horizon=336, variates=7),
    "etth2": SMALL.but(variates=7),
    "ettm1": SMALL.but(variates=7),
    "ettm2": SMALL.but(variates=7),
    "exchange": SMALL.but(variates=8),
    "weather": spec(ITransformer, depth=3, variates=21),
    "solar": spec(ITransformer, variates=137),
    "ecl": spec(ITransformer, depth=3, variates=321),
    "traffic": spec(ITransformer, depth=4, variates=862),
    "pems03": spec(ITransformer, depth=4, variates=358, horizon=12),
    "pems04": spec(ITransformer, dim=1024, depth=4, variates=307, horizon=12, normalise=False),
    "pems07": spec(ITransformer, variates=883, horizon=12, normalise=False),
    "pems08": spec(ITransformer, variates=170, horizon=12),
}

CONV1D = Op(lambda t, o: [t[0][..., 0]], lambda t, o: [t[0][..., None]])  # theirs is a convolution over one step
_LAYER, _OURS = "encoder.attn_layers.{i}", "stack.layers.{i}"
KEYS = {
    "authors": keymap(
        rule("enc_embedding.value_embedding.*", "embedding.*"),
        *[rule([f"{_LAYER}.attention.{t}_projection.{w}" for t in ("query", "key", "value")],
               f"{_OURS}.mixer.inner.qkv.{w}", FUSE) for w in ("weight", "bias")],
        rule(f"{_LAYER}.attention.out_projection.*", f"{_OURS}.mixer.inner.proj.*"),
        rule(f"{_LAYER}.norm1.*", f"{_OURS}.mixer.norm.*"),
        *[rule(f"{_LAYER}.conv{n}.weight", f"{_OURS}.channel.inner.fc{n}.weight", CONV1D) for n in (1, 2)],
        *[rule(f"{_LAYER}.conv{n}.bias", f"{_OURS}.channel.inner.fc{n}.bias") for n in (1, 2)],
        rule(f"{_LAYER}.norm2.*", f"{_OURS}.channel.norm.*"),
        rule("encoder.norm.*", "norm.*"),
        rule("projector.*", "head.*"),
    ),
}


def settings(state: State, layout: str) -> dict[str, Any]:
    """Sizes; any number of variates. Heads and normalisation leave no trace: those of the preset of these sizes are taken,
    else the authors' 8 and True."""
    dim, context = state["embedding.weight"].shape
    sizes = {"dim": dim, "context": context, "horizon": state["head.weight"].shape[0],
             "depth": count(state, "stack.layers.{i}.mixer.norm.weight")}
    return sizes | {"variates": None, "heads": as_preset(PRESETS, "heads", 8, **sizes),
                    "normalise": as_preset(PRESETS, "normalise", True, **sizes),
                    "ratio": told_ratio(state["stack.layers.0.channel.inner.fc1.weight"].shape[0], dim)}
