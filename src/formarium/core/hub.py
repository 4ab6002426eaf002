"""Models on the Hugging Face Hub, by its own mixin: `model.push_to_hub("me/vit")`, `Model.from_pretrained("me/vit")`.

A repository of ours, or a folder, holds model.safetensors, our own file; config.json, its recipe, to be read before weights
are downloaded; README.md, the model card.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from huggingface_hub import ModelCard, ModelCardData, constants, errors, hf_hub_download
from huggingface_hub.hub_mixin import ModelHubMixin
from safetensors import SafetensorError, safe_open

from .card import Card
from .errors import BadCheckpoint, FormariumError, UnknownName
from .registry import card, split_name
from .spec import from_json

if TYPE_CHECKING:
    from .model import Model

F = TypeVar("F", bound=Callable[..., Any])

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LICENCES = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0")

_LOG_IN = "log in (hf auth login) or give token="
_SAYS: tuple[tuple[type[Exception], type[FormariumError], str], ...] = (  # the first that fits
    (errors.HFValidationError, UnknownName, "{name} is neither a folder nor the name of a repository, owner/name"),
    (errors.GatedRepoError, FormariumError, "{name} is gated: accept its conditions at {hub}/{name}, then " + _LOG_IN),
    (errors.RepositoryNotFoundError, UnknownName,
     "there is no folder {name}, and no such repository at {hub} that you may see; if it is private, " + _LOG_IN),
    (errors.RevisionNotFoundError, UnknownName, "the repository {name} has no such revision"),
    (errors.LocalEntryNotFoundError, FormariumError,
     "{name} is no folder, it is not in the cache, and {hub} was not asked or did not answer ({error}); check the network, "
     "HF_ENDPOINT, HF_HUB_OFFLINE"),
    (errors.HfHubHTTPError, FormariumError, "{hub} refuses: {error}. If {name} needs a permission, " + _LOG_IN),
    (errors.HTTPError, FormariumError, "no connection to {hub}, or it broke off ({error}); call again"),
    (OSError, FormariumError, "{name} could not be read or written ({error})"),
    (ValueError, FormariumError, "{hub} does not take {name}: {error}"),
)


@contextmanager
def _plainly(name: str) -> Iterator[None]:
    """What the Hub and the network raise about the repository `name`, as a FormariumError that says what to do."""
    try:
        yield
    except FormariumError:
        raise
    except Exception as raised:
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised  # an upload wraps what it met in a thread
        for kind, ours, text in _SAYS:
            if isinstance(error, kind):
                told = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
                said = " ".join(str(told or error).split()).rstrip(".")
                raise ours(text.format(name=name, hub=constants.ENDPOINT, error=said)) from raised
        raise


@dataclass(frozen=True)
class Repository:
    """A folder, or a repository of the Hub. revision: branch, tag or commit; the others as in `hf_hub_download`."""

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    def file(self, *names: str) -> Path:
        """The first of these files that it has, downloaded into the Hub's cache if need be.

        Raises BadCheckpoint if it has none, FormariumError if the repository cannot be had.
        """
        folder, missed = Path(self.name), None
        if folder.is_file():
            raise BadCheckpoint(f"{folder} is a file: fm.load reads it")
        if folder.is_dir():
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        else:
            with _plainly(self.name):
                for name in names:
                    try:
                        return Path(hf_hub_download(
                            self.name, name, revision=self.revision, cache_dir=self.cache_dir, token=self.token,
                            force_download=self.force_download and not missed,
                            local_files_only=self.local_files_only or missed is not None))  # wait for the network once
                    except errors.LocalEntryNotFoundError as error:
                        missed = missed or error
                    except errors.EntryNotFoundError:
                        pass
                if missed:
                    raise missed
        raise BadCheckpoint(f"{self.name} has no {' or '.join(names)}")

    def recipe(self) -> dict[str, Any]:
        """The recipe in config.json; BadCheckpoint if there is none."""
        from .checkpoint import read_recipe

        try:
            path = self.file(CONFIG)
            config = json.loads(path.read_text(encoding="utf-8"))
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}; {self.ask}") from None
        except (ValueError, RecursionError):
            raise BadCheckpoint(f"{path} is damaged: it is no JSON; {self.ask}") from None
        if not isinstance(config, dict) or "recipe" not in config:
            raise BadCheckpoint(f"{path} has no recipe of ours; {self.ask}")
        return read_recipe(json.dumps(config["recipe"]), str(path))

    @property
    def ask(self) -> str:
        return f"fm.from_pretrained finds out what {self.name} holds"


def _named(push: F) -> F:
    """`push_to_hub` that tells the model card the repository's name, and errors plainly."""
    @wraps(push)
    def told(self: Any, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        named = {"model_name": repo_id} if "/" in repo_id else {}
        with _plainly(repo_id):
            return push(self, repo_id, model_card_kwargs=named | (model_card_kwargs or {}), **options)

    return cast(F, told)


class OnHub(ModelHubMixin):
    """The Hub's mixin for what has a recipe, which says how it was made: its constructor is neither read nor wrapped.

    `pipeline`: what the Hub calls the task of such models.
    """

    recipe: dict[str, Any]
    pipeline: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super(ModelHubMixin, cls).__init_subclass__(**options)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        return super(ModelHubMixin, cls).__new__(cls)

    push_to_hub = _named(ModelHubMixin.push_to_hub)

    def _save_pretrained(self, save_directory: Path) -> None:
        from formarium import __version__

        from .checkpoint import save, write_atomically

        save(cast("Model", self), save_directory / WEIGHTS)
        config = {"library_name": "formarium", "formarium": __version__, "recipe": self.recipe}
        write_atomically(save_directory / CONFIG, lambda name: Path(name).write_text(json.dumps(config, indent=2) + "\n"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, force_download: bool = False,
                        token: str | bool | None = None, cache_dir: str | Path | None = None,
                        local_files_only: bool = False, revision: str | None = None, base: "Model | None" = None,
                        **model_kwargs: Any) -> Self:
        """A model of this class from what `save_pretrained` or `push_to_hub` wrote, a folder or "owner/name"; in eval mode.

        model_kwargs: constructor options to have otherwise. base: where the weights are those trained alone, the model that
        was adapted. `fm.from_pretrained` reads models of any class, and those of others.
        """
        from .checkpoint import restore

        repository = Repository(str(pretrained_model_name_or_path), revision, token, cache_dir, force_download,
                                local_files_only)
        name = repository.recipe()["name"]
        entry, variant = split_name(name)
        target = entry.module.PRESETS[variant].target
        if not issubclass(target, cls):
            raise BadCheckpoint(f"{repository.name} holds {name}, which is a {target.__name__}, not a {cls.__name__}; "
                                "fm.from_pretrained reads models of any class")
        path = repository.file(WEIGHTS)
        try:
            with safe_open(path, framework="pt") as file:
                told, state = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} is damaged or truncated ({error})") from None
        if "recipe" not in told:
            raise BadCheckpoint(f"{path} has no recipe of ours; {repository.ask}")
        model = restore(state, told, str(path), base, **model_kwargs)
        assert isinstance(model, cls)
        return model

    def generate_model_card(self, *args: Any, **metadata: Any) -> ModelCard:
        """README.md, from the card of the system. metadata: of the Hub, e.g. license="mit", datasets=["mnist"]."""
        model = cast("Model", self)
        system = self.recipe["name"].split("/")[0]
        c = card(system)
        licence = c.licence.split(" ")[0].rstrip(";,").lower()
        data: dict[str, Any] = {
            "library_name": "formarium", "pipeline_tag": self.pipeline or None,
            "license": licence if licence in LICENCES else "other" if licence else None,
            "tags": ["formarium", system, *(t.replace(" ", "-") for t in c.tags)]} | metadata
        text = [*_about(model, c), "## Use\n", "```python", "import formarium as fm\n",
                f"model = fm.from_pretrained({data.get('model_name', 'OWNER/NAME')!r})", "```\n", *_published(c)]
        return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n".join(text))


def _about(model: "Model", c: Card) -> Iterator[str]:
    from formarium import __version__

    from .model import count_parameters

    def call(name: str, options: dict[str, Any]) -> str:
        return f"`{name}({', '.join(f'{k}={from_json(v)!r}' for k, v in options.items())})`" if options else f"`{name}`"

    recipe = model.recipe
    made = [call(recipe["name"], recipe["changes"])]
    made += [call(t["name"], t["settings"]) for t in recipe.get("transforms", [])]
    yield f"# {recipe['name']}\n"
    yield f"{', '.join(filter(None, (c.title, c.authors, c.venue or str(c.year))))}.\n"
    yield f"- Model: {', then '.join(made)}, written by Formarium {__version__}"
    yield f"- Parameters: {count_parameters(model):,}"
    for what, told in {"Claim of the paper": c.claim, "Paper": f"https://arxiv.org/abs/{c.arxiv}" if c.arxiv else "",
                       "Code of the authors": c.code, "Licence of the authors": c.licence}.items():
        if told:
            yield f"- {what}: {told}"
    yield ""


def _published(c: Card) -> Iterator[str]:
    rows = {name: p for name, p in c.variants.items() if p.params or p.results}
    if rows:
        yield "## What the authors published\n\nOf their weights, not of these.\n"
        yield "| preset | parameters | input | results | note |\n| --- | --- | --- | --- | --- |"
    for name, p in rows.items():
        results = ", ".join(f"{k} {v}" for k, v in p.results.items())
        size = "x".join(map(str, p.input or ()))
        yield f"| {name} | {f'{p.params:,.0f}' if p.params else ''} | {size} | {results} | {p.note} |"
    yield ""
