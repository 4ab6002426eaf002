"""Sequences turned into sequences: rows are the samples, columns the truth and the models."""

from difflib import SequenceMatcher

from ..html import grid, model_name
from ..plots import Found, Page
from ..words import esc

HEADING = "The same inputs, answered by every model"
ABOUT = ("Beside each input is what is right, then the answer of each model, from its first run that finished. A wrong "
         "answer has a &times; and a tinted ground; what differs from the nearest right one is underlined, a gap is a "
         "&middot;.")


def draw(page: Page, found: Found) -> str:
    first, lines = found[0][2], []
    for n, (source, truths) in enumerate(zip(first["sources"], first["truths"], strict=True)):
        cells = [f"<td>{esc(source)}</td>", f"<td>{' or '.join(map(esc, truths))}</td>"]
        for _, _, s in found:
            answer = s["answers"][n]
            cells.append(f"<td>{esc(answer)}</td>" if answer in truths else
                         f'<td class="miss">× {marked(answer.split(), [t.split() for t in truths])}</td>')
        lines.append(cells)
    rights = [sum(a in t for a, t in zip(s["answers"], first["truths"], strict=True)) for _, _, s in found]
    heads = ["<th>Input</th>", "<th>Right</th>",
             *(f'<th>{model_name(i, model)}<small>{right} of {len(lines)}</small></th>'
               for (i, model, _), right in zip(found, rights, strict=True))]
    return f'<div class="scroll" tabindex="0">{grid("sample", heads, lines)}</div>'


def marked(answer: list[str], truths: list[list[str]]) -> str:
    """The answer's symbols, those underlined that the most similar truth has not; what is missing is a dot."""
    matches = [SequenceMatcher(None, truth, answer, autojunk=False) for truth in truths]
    best, texts = max(matches, key=SequenceMatcher.ratio), []
    for kind, _, _, start, stop in best.get_opcodes():
        for symbol in answer[start:stop] or (["·"] if kind == "delete" else []):
            texts.append(esc(symbol) if kind == "equal" else f"<u>{esc(symbol)}</u>")
    return " ".join(texts)
