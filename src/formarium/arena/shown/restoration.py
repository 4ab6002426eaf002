"""Restored images: columns are patches of test images, rows the truth, the input and each model's answer."""

from collections.abc import Sequence

from ..html import grid, model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same patches, restored by every model"
ABOUT = ("The middles of some test images. Under each answer is its PSNR in dB, higher is better; under the input is what "
         "one has without a model. Answers are each model's first run that finished.")


def draw(page: Page, found: Found) -> str:
    first = found[0][2]
    lines = [_row("<b>Input</b>", first["input"], first["baseline"])]
    lines += [_row(model_name(i, model), s["answer"], s["psnr"]) for i, model, s in found]
    heads = [f"<th>{_image(png, name)}{esc(name)}</th>" for png, name in zip(first["truth"], first["names"], strict=True)]
    return f'<div class="scroll" tabindex="0">{grid("sample", ["<th>Truth</th>", *heads], lines)}</div>'


def _row(head: str, pngs: Sequence[str], values: Sequence[float]) -> list[str]:
    cells = (f"<td>{_image(png, f'{value:.2f} dB')}{value:.2f}</td>" for png, value in zip(pngs, values, strict=True))
    return [f"<td>{head}</td>", *cells]


def _image(png: str, alt: str) -> str:
    return f'<img alt="{esc(alt)}" style="width:9.5rem;height:9.5rem" src="data:image/png;base64,{esc(png)}">'
