"""Where data comes from: the folder FORMARIUM_DATA, or a download into the cache, checked by its SHA-256."""

import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..core.errors import BadData, FormariumError, unknown

VARIABLE = "FORMARIUM_DATA"


class Remote(NamedTuple):
    url: str
    sha256: str


class Origin(NamedTuple):
    """What a report says of the data: title, where these bytes are from, licence, and what to know of the splits."""

    title: str
    source: str
    licence: str
    note: str = ""


_WIKITEXT2 = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"

FILES = {
    "cifar-10-binary.tar.gz": Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "shakespeare/input.txt": Remote(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "wikitext2/valid.txt": Remote(
        _WIKITEXT2 + "valid.txt", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
    "wikitext2/test.txt": Remote(
        _WIKITEXT2 + "test.txt", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
}


def need(module: str, package: str) -> ModuleType:
    """An optional dependency, imported; where it is not installed, FormariumError names the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FormariumError(f"this needs the package {package}, which cannot be imported ({error}); "
                             "install it with: pip install 'formarium[arena]'") from error


def in_folder(name: str) -> Path | None:
    """The file `name` in the folder FORMARIUM_DATA; None where the variable is not set or the folder has no such file."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise BadData(f"{VARIABLE} is {folder!r}, which is not a folder; name a folder with data files, or unset it")
    path = Path(folder, name)
    return path if path.is_file() else None


def locate(name: str) -> Path:
    """The file `name` of FILES: from the folder FORMARIUM_DATA, else from the cache, downloaded if it is not there.

    Raises BadData where the bytes are not the expected ones or cannot be had.
    """
    if name not in FILES:
        raise unknown("data file", name, FILES)
    path = in_folder(name)
    if path is None:
        return _download(name)
    found, remote = sha256(path), FILES[name]
    if found != remote.sha256:
        raise BadData(f"{path} is damaged or another file: its SHA-256 is {found}, expected {remote.sha256}; "
                      f"get it anew from {remote.url}, or remove it and it is downloaded")
    return path


def _download(name: str) -> Path:
    remote, pooch = FILES[name], need("pooch", "pooch")
    folder, cached = Path(pooch.os_cache("formarium")), name.replace("/", "-")
    try:
        return Path(pooch.retrieve(remote.url, f"sha256:{remote.sha256}", fname=cached, path=folder))
    except (OSError, ValueError) as error:
        raise BadData(f"{name} could not be had from {remote.url} ({error}). Get the file with SHA-256 {remote.sha256} "
                      f"and put it into the cache folder {folder} as {cached}, or into a folder of yours as {name} and "
                      f"set {VARIABLE} to that folder") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
