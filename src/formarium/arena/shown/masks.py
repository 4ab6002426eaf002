"""Segmented images: columns are the samples, rows the image, the truth and each model's answer laid over it."""

from collections.abc import Sequence

from ..html import grid, model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same images, segmented by every model"
ABOUT = ("Colours are classes; a white line stands between things of one class that are told apart. Each answer is from "
         "the model's first run that finished; below it is its mean IoU on that image.")
WIDTH = 132  # pixels that an image is drawn with


def _cell(png: str, what: str, below: str = "") -> str:
    style = f"width:{WIDTH}px;height:auto;image-rendering:pixelated"
    return (f'<td class="guess"><img alt="{esc(what)}" title="{esc(what)}" style="{style}" '
            f'src="data:image/png;base64,{esc(png)}">{below}</td>')


def _row(head: str, images: Sequence[str], what: str, ious: Sequence[float] | None = None) -> list[str]:
    below = [""] * len(images) if ious is None else [f'<span class="soft">{100 * iou:.1f} %</span>' for iou in ious]
    return [f"<td>{head}</td>", *(_cell(png, f"{what}, image {i + 1}", b) for i, (png, b) in
                                  enumerate(zip(images, below, strict=True)))]


def draw(page: Page, found: Found) -> str:
    first = found[0][2]
    lines = [_row("Image", first["images"], "image"), _row("Truth", first["truth"], "truth")]
    lines += [_row(model_name(i, model), s["predicted"], model, s["iou"]) for i, model, s in found]
    box = "display:inline-block;width:.9em;height:.9em;background:"
    names = "".join(f'<li><span style="{box}{esc(colour)}"></span> {esc(name)}</li>'
                    for name, colour in zip(first["classes"], first["colours"], strict=True))
    heads = ["<th></th>", *(f"<th>{i + 1}</th>" for i in range(len(first["images"])))]
    return f'<ul class="legend">{names}</ul><div class="scroll" tabindex="0">{grid("sample", heads, lines)}</div>'
