"""A run that starts from a file's weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..core.build import from_recipe
from ..core.checkpoint import read_recipe
from ..core.errors import BadCheckpoint
from ..core.model import Model
from ..core.transform import replay
from ..weights.files import read
from ..weights.keys import State
from ..weights.load import load

HEADS = ("head.", "head_dist.")


def with_fingerprint(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with the SHA-256 of the file `init`, so that a resumed run starts from the same one."""
    if settings.get("init") is None:
        return settings
    path = Path(settings["init"])
    if not path.is_file():
        raise BadCheckpoint(f"no file {path} to start from")
    with path.open("rb") as f:
        return settings | {"init": str(path), "init_sha256": hashlib.file_digest(f, "sha256").hexdigest()}


@torch.no_grad()
def take_weights(model: Model, path: str | Path) -> dict[str, Any]:
    """Copies the file's tensors of equal name and shape, but for the head; {"taken", "of", "left": names}.

    A file of ours may be of any system; another is read as of the model's, else as what its tensors say. None that fits:
    BadCheckpoint. A model with transforms that the file's has not takes the weights as it was before them.
    """
    system = model.recipe["name"].split("/")[0]
    contents = read(path)
    state, recipe = contents.state, read_recipe(contents.told["recipe"], str(path)) if contents.told else None
    wanted, done = (r.get("transforms", []) for r in (model.recipe, recipe or {}))
    if wanted[:len(done)] == done != wanted:
        before = from_recipe({**model.recipe, "transforms": done})
        told = take_weights(before, path)
        model.load_state_dict(replay(before, wanted[len(done):]).state_dict())
        return told
    if recipe is None:
        state = _read_as(system, state)
    own = model.state_dict()
    taken = [k for k, v in own.items() if not k.startswith(HEADS) and k in state and state[k].shape == v.shape]
    if not taken:
        raise BadCheckpoint(f"{path} holds {recipe['name'] if recipe else 'another model'}: none of its {len(state)} "
                            f"tensors has the name and shape of one of {model.recipe['name']}")
    for name in taken:
        own[name].copy_(state[name])
    return {"taken": len(taken), "of": len(own), "left": [k for k in own if k not in taken]}


def _read_as(system: str, state: State) -> State:
    """Another's tensors under our names: those of this system, else of the one that they are recognised as."""
    try:
        return load(state, system).state_dict()
    except BadCheckpoint as refused:
        try:
            return load(state).state_dict()
        except BadCheckpoint:
            raise refused from None
