"""Other people's parameter names as data: one table, read in both directions.

    KEYS = {"timm": keymap(
        rule("patch_embed.proj.*", "embed.proj.*"),
        rule("blocks.{i}.mlp.fc1.weight", "stages.0.layers.{i}.channel.inner.fc1.weight", LINEAR_AS_CONV),
        rule(("q.*", "k.*", "v.*"), "qkv.*", FUSE),
        drop("attn_mask", "rebuilt from the window size"),
    )}

`{i}` stands for a number, `*` for the rest of a name. The first rule that matches a name wins.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Options = dict[str, Any]
Change = Callable[[list[Tensor], Options], list[Tensor]]


@dataclass(frozen=True)
class Op:
    """How the tensors of a rule change: `there` from the foreign layout to ours, `back` from ours."""

    there: Change
    back: Change


SAME = Op(lambda t, o: t, lambda t, o: t)
FUSE = Op(lambda t, o: [torch.cat(t)], lambda t, o: list(t[0].chunk(3)))  # rows of q, k, v in one matrix
FUSE_PAIR = Op(FUSE.there, lambda t, o: list(t[0].chunk(2)))  # rows of k, v
LINEAR_AS_CONV = Op(lambda t, o: [t[0].flatten(1)], lambda t, o: [t[0][..., None, None]])  # theirs is a 1x1 convolution
UNSQUEEZE = Op(lambda t, o: [t[0][None]], lambda t, o: [t[0][0]])  # a table of ours has a batch axis
TRANSPOSE = Op(lambda t, o: [t[0].t()], lambda t, o: [t[0].t()])
HWIO = Op(lambda t, o: [t[0].permute(3, 2, 0, 1)], lambda t, o: [t[0].permute(2, 3, 1, 0)])  # convolutions of JAX


@dataclass(frozen=True)
class Rule:
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = SAME
    why: str = ""

    @cached_property
    def patterns(self) -> dict[bool, re.Pattern[str] | None]:
        """By `back`: what the first source name looks like."""
        return {False: _pattern(self.theirs[0]), True: _pattern(self.ours[0]) if self.ours else None}


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], op: Op = SAME) -> Rule:
    """One line of a key map; several names on a side are fused or split by `op`."""
    return Rule(_several(theirs), _several(ours), op)


def drop(theirs: str, why: str) -> Rule:
    """A foreign tensor that we do not need, and why."""
    return Rule((theirs,), (), why=why)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\*", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", text))


def _fill(name: str, groups: dict[str, str]) -> str:
    for key, value in groups.items():
        name = name.replace("*", value) if key == "rest" else name.replace(f"{{{key}}}", value)
    return name


class Assumed(NamedTuple):
    """What `settings` takes for an option that leaves no trace in the tensors, and why it cannot be told."""

    value: Any
    why: str


class Move(NamedTuple):
    """What one rule did: from these tensors these others were made; none if they were dropped."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    rule: Rule


@dataclass
class Converted:
    """A converted state dict and what became of each source tensor."""

    state: State = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def ignored(self) -> dict[str, str]:
        """Name -> why."""
        return {name: m.rule.why for m in self.moves if not m.targets for name in m.sources}


@dataclass(frozen=True)
class KeyMap:
    """A table of rules. `makes`: what the layout is of: a whole "model", the paper's "part" alone, or a model of the system
    of that name after the paper's transform."""

    rules: tuple[Rule, ...]
    makes: str = "model"

    def convert(self, state: State, options: Options | None = None, *, back: bool = False) -> Converted:
        """`state` in our names (with `back`: ours in theirs). `options` are the model's, for rules that need e.g. heads."""
        out, remaining, options = Converted(), dict(state), options or {}
        for r in self.rules:
            sources, targets = (r.ours, r.theirs) if back else (r.theirs, r.ours)
            pattern = r.patterns[back]
            for key in list(remaining) if pattern else ():
                match = pattern.fullmatch(key) if pattern else None
                if match is None:
                    continue
                names = [_fill(s, match.groupdict()) for s in sources]
                if not all(n in remaining for n in names):
                    continue
                tensors = [remaining.pop(n) for n in names]
                made = tuple(_fill(t, match.groupdict()) for t in targets)
                if not targets:
                    out.moves.append(Move(tuple(names), made, r))
                    continue
                try:
                    changed = (r.op.back if back else r.op.there)(tensors, options)
                except (RuntimeError, IndexError):  # not of the shape that the rule is for
                    out.unmatched += names
                    continue
                out.state |= dict(zip(made, changed, strict=True))
                out.moves.append(Move(tuple(names), made, r))
        out.unmatched += remaining
        return out


def keymap(*rules: Rule, makes: str = "model") -> KeyMap:
    return KeyMap(rules, makes)


def count(state: State, pattern: str) -> int:
    """How many values `{i}` takes in the names like `pattern`: count(state, "blocks.{i}.norm1.weight") is the depth."""
    regex = _pattern(pattern)
    return len({m.groupdict()["i"] for m in map(regex.fullmatch, state) if m})
