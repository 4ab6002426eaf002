"""Files of weights, read without running anything that is in them."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import BadCheckpoint
from .keys import State

NESTED = ("state_dict", "model", "model_state_dict", "params_ema", "params", "ema", "module")


@dataclass
class Contents:
    """What a file holds: its tensors, what it `told` of itself (the metadata, if it is ours; else empty), and `notes` of
    what was done to get at them."""

    state: State
    told: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(path: str | Path) -> Contents:
    """The tensors of a .safetensors, .pth/.pt/.bin (weights only) or .npz file."""
    path = Path(path)
    if not path.is_file():
        raise BadCheckpoint(f"no file {path}")
    with path.open("rb") as f:
        head = f.read(16)
    if not head:
        raise BadCheckpoint(f"{path} is empty")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return Contents({k: torch.from_numpy(arrays[k]) for k in arrays.files})
        if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):  # safetensors: a length, then JSON
            return Contents(_unwrap(torch.load(path, map_location="cpu", weights_only=True), path))
        with safe_open(path, framework="pt") as f:
            told = f.metadata() or {}
            return Contents({k: f.get_tensor(k) for k in f.keys()}, told if "recipe" in told else {})  # noqa: SIM118
    except BadCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise BadCheckpoint(f"{path} is a pickle that wants to run more than tensors need{what}; refused") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError,
            zipfile.BadZipFile) as error:
        raise BadCheckpoint(f"{path} is damaged, truncated or not a checkpoint ({str(error).splitlines()[0]})") from None


def _unwrap(content: Any, path: Path) -> State:
    """The state dict inside a training checkpoint: under `model`, `state_dict`, ..., with `module.` cut off."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in NESTED if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise BadCheckpoint(f"{path} holds no state dict")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state
