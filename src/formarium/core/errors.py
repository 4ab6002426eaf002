"""What the user can mend. The command line prints these without a traceback and leaves with status 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class FormariumError(Exception):
    """Something a user can mend; the message says what was expected, what came, and how to get it."""


class UnknownName(FormariumError, LookupError):
    """A model, part, task or option that does not exist; the message names the nearest ones."""


class DoesNotFit(FormariumError, ValueError):
    """A part, size or setting that the mechanism cannot take, with the reason."""


class BadData(FormariumError, ValueError):
    """Data that is missing, damaged, empty or not finite."""


class BadCheckpoint(FormariumError, ValueError):
    """A file that is damaged, foreign, or belongs to another architecture."""


class Stopped(FormariumError):
    """Ctrl-C, after the state was saved."""


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownName:
    """An error for `name` that suggests the nearest of `known`, or lists them where none is near."""
    known = sorted(set(known))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) <= 24:
        hint = f"there are: {', '.join(known) or 'none'}"
    else:
        hint = f"there are {len(known)}, among them {', '.join(known[:8])}"
    return UnknownName(f"unknown {what} {name!r}; {hint}")
