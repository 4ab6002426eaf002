"""Texts: what each model wrote after the same prompt."""

from ..html import model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same prompt, continued by every model"
ABOUT = "The prompt is underlined; what follows is the model's, from its first run that finished."


def draw(page: Page, found: Found) -> str:
    texts = (f'<div>{model_name(i, model)}<pre><span class="prompt">{esc(s["prompt"])}</span>'
             f'{esc(s["text"].removeprefix(s["prompt"]))}</pre></div>' for i, model, s in found)
    return f'<div class="texts">{"".join(texts)}</div>'
