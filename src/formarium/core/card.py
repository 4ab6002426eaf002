"""What a paper's file says of itself, as literals: readable without importing the file or torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A preset and what its authors published of it. Empty numbers: ours, or not published.

    params: parameters; macs: multiply-accumulates for one `input`; input: shape of one sample;
    results: metric -> value; note: where our count differs from the table, or where a number is from.
    """

    params: float | None = None
    macs: float | None = None
    input: tuple[int, ...] | None = None
    results: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Card:
    """The librarian's card of a system.

    kind: what the file exports ("backbone", "language", ... for models; "mixer", "channel", "norm", "residual",
    "position" for parts; "transform", "objective", "explanation" for what acts on models); variants: preset -> Published,
    the first is the default; hosts: for a part, models it is
    tested on; can: properties that tests hold it to; exceptions: contract check -> why it does not hold here;
    confused_with: other systems whose models have the same tensors -> what tells them apart, which no file says.
    """

    title: str
    kind: str
    domain: str
    year: int
    authors: str = ""
    venue: str = ""
    arxiv: str = ""
    code: str = ""
    licence: str = ""
    tags: tuple[str, ...] = ()
    claim: str = ""
    variants: dict[str, Published] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    can: tuple[str, ...] = ()
    exceptions: dict[str, str] = field(default_factory=dict)
    confused_with: dict[str, str] = field(default_factory=dict)
