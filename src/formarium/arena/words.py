"""Numbers and text as people read them, the same on the terminal and on the page."""

import html
import math
import re

SHARES = ("accuracy", "macro_f1", "phoneme_error_rate", "word_accuracy", "miou", "pixel_accuracy",
          "pq")  # metrics shown in percent


NAMES = {"miou": "mIoU", "pq": "PQ", "mse": "MSE", "mae": "MAE", "psnr": "PSNR", "ssim": "SSIM", "macro_f1": "macro F1"}


def called(metric: str) -> str:
    """A metric's name in text: "bits_per_byte" -> "bits per byte", "miou" -> "mIoU"."""
    return NAMES.get(metric, metric.replace("_", " "))


def capital(text: str) -> str:
    """The text with a capital at its start; names such as mIoU keep theirs."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def human(value: float) -> str:
    """204000 -> "204 k": three figures."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    for limit, unit_size, unit in ((0.9995, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit_size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def number(metric: str, value: float | None, sign: str = "", unit: str = "") -> str:
    """A metric's value: a share in percent with one decimal and the unit, any other with three decimals."""
    if not known(value):
        return "–"
    text = f"{100 * value:{sign}.1f}{unit}" if metric in SHARES else f"{value:{sign}.3f}"
    return text.replace("-", "\u2212")


def esc(value: object) -> str:
    """Text for HTML, without the control characters that a model of bytes may write."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))
