"""Models from the Hugging Face Hub, or from a folder, whoever made them."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from ..core.errors import BadCheckpoint, FormariumError
from ..core.hub import CONFIG, WEIGHTS, Repository
from ..core.model import Model
from .load import load
from .report import Report

FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")  # where weights are


@overload
def from_pretrained(name: str | Path, /, *, report: Literal[False] = False, **options: Any) -> nn.Module: ...
@overload
def from_pretrained(name: str | Path, /, *, report: Literal[True], **options: Any) -> tuple[nn.Module, Report]: ...


def from_pretrained(name: str | Path, /, *, revision: str | None = None, token: str | bool | None = None,
                    cache_dir: str | Path | None = None, force_download: bool = False, local_files_only: bool = False,
                    base: Model | str | Path | None = None, report: bool = False,
                    **options: Any) -> nn.Module | tuple[nn.Module, Report]:
    """A model, in eval mode, from a repository of the Hub ("owner/name") or a folder: ours, or anyone's that `load` knows.

    revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub. base: for weights that are those
    trained alone, the model that was adapted, its file, folder or repository. report, options, name among
    them: of `load`.
    """
    repository = Repository(str(name), revision, token, cache_dir, force_download, local_files_only)
    path = Path(name) if Path(name).is_dir() else repository.file(*FILES)
    if path != Path(name):
        with suppress(FormariumError):  # beside the weights, it tells `load` the heads; not every repository has one
            repository.file(CONFIG)
    if path.suffix == ".json":
        for shard in _shards(path):
            repository.file(shard)
    if base is not None and not isinstance(base, Model) and not Path(base).exists():
        base = replace(repository, name=str(base), revision=None).file(WEIGHTS)
    return load(path, base=base, report=report, **options)  # type: ignore[call-overload]


def _shards(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(f) for f in files})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadCheckpoint(f"{index} is damaged: it does not say which files hold the weights") from None
