"""Other people's parameter names as data: one table, read in both directions.

    KEYS = {"timm": keymap(
        rule("patch_embed.proj.*", "embed.proj.*"),
        rule("blocks.{i}.mlp.fc1.weight", "stages.0.layers.{i}.channel.inner.fc1.weight", LINEAR_AS_CONV),
        rule(("q.*", "k.*", "v.*"), "qkv.*", FUSE),
        drop("attn_mask", "rebuilt from the window size"),
    )}

`{i}` stands for a number, `*` for the rest of a name. The first rule that matches a name wins.
"""

import inspect
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checkpoint import same
from ..core.spec import Spec

State = dict[str, Tensor]
Options = dict[str, Any]
Change = Callable[[list[Tensor], Options], list[Tensor]]
Make = Callable[[Tensor, State, Options], Tensor | None]


class Passed(Exception):
    """Raised by an Op: these tensors are not what its rule is for; later rules may take them."""


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


def _one(t: list[Tensor], o: Options) -> list[Tensor]:
    if not all(same(t[0], other) for other in t[1:]):
        raise Passed
    return t[:1]


TIED = Op(_one, lambda t, o: [*t, *t])  # one tensor under two of their names; where they differ, later rules take them


@dataclass(frozen=True)
class Rule:
    """`made`: for a dropped tensor that their strict loader asks back, (a name of ours, what makes it of that tensor)."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = SAME
    why: str = ""
    made: tuple[str, Make] | None = None

    @cached_property
    def patterns(self) -> dict[bool, re.Pattern[str] | None]:
        """By `back`: what the first source name looks like."""
        return {False: name_regex(self.theirs[0]), True: name_regex(self.ours[0]) if self.ours else None}


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], op: Op = SAME) -> Rule:
    """One line of a key map; several names on a side are fused or split by `op`."""
    return Rule(_several(theirs), _several(ours), op)


def drop(theirs: str, why: str, made: tuple[str, Make] | None = None) -> Rule:
    """A foreign tensor that we do not need, and why. made: ("norm.weight", f): f(norm.weight, the state, options) writes it
    for those who do, or gives None; `{i}` as in rules."""
    return Rule((theirs,), (), why=why, made=made)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def name_regex(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\*", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", text))


def fill_in(name: str, groups: dict[str, str]) -> str:
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


def _beginning(prefix: str, ordered: list[str]) -> list[str]:
    """Those of the ordered names that begin so: of thousands of names, a rule is for few."""
    first = bisect_left(ordered, prefix)
    return ordered[first:bisect_left(ordered, f"{prefix}\U0010ffff", first)] if prefix else ordered


@dataclass(frozen=True)
class KeyMap:
    """A table of rules. `makes`: what the layout is of: a whole "model", the paper's "part" alone, or a model of the system
    of that name after the paper's transform. `without`: presets that no file of this layout can hold -> why. `example`: a
    preset, "" for the first, and the changes that make a small model of this layout, for tests."""

    rules: tuple[Rule, ...]
    makes: str = "model"
    without: Mapping[str, str] = field(default_factory=dict)
    example: tuple[str, Options] = ("", {})

    def convert(self, state: State, options: Options | None = None, *, back: bool = False) -> Converted:
        """`state` in our names (with `back`: ours in theirs). `options` are the model's, for rules that need e.g. heads."""
        out, remaining, options, ordered = Converted(), dict(state), options or {}, sorted(state)
        for r in self.rules:
            sources, targets = (r.ours, r.theirs) if back else (r.theirs, r.ours)
            pattern = r.patterns[back]
            for key in _beginning(re.split(r"[{*]", sources[0])[0], ordered) if pattern else ():
                if key not in remaining:
                    continue
                match = pattern.fullmatch(key) if pattern else None
                if match is None:
                    continue
                names = [fill_in(s, match.groupdict()) for s in sources]
                if not all(n in remaining for n in names):
                    continue
                tensors = [remaining.pop(n) for n in names]
                made = tuple(fill_in(t, match.groupdict()) for t in targets)
                if not targets:
                    out.moves.append(Move(tuple(names), made, r))
                    continue
                try:
                    changed = (r.op.back if back else r.op.there)(tensors, options)
                except Passed:
                    remaining |= dict(zip(names, tensors, strict=True))
                    continue
                except (RuntimeError, IndexError):  # not of the shape that the rule is for
                    out.unmatched += names
                    continue
                out.state |= dict(zip(made, changed, strict=True))
                out.moves.append(Move(tuple(names), made, r))
        out.unmatched += remaining
        if back:
            out.state |= self._made(state, options)
        return out

    def _made(self, state: State, options: Options) -> State:
        """What is dropped from their files, and their strict loader asks for."""
        out: State = {}
        for theirs, (ours, make) in [(r.theirs[0], r.made) for r in self.rules if r.made]:
            for match in filter(None, map(name_regex(ours).fullmatch, state)):
                tensor = make(state[match[0]], state, options)
                if tensor is not None:
                    out[fill_in(theirs, match.groupdict())] = tensor
        return out


def keymap(*rules: Rule, makes: str = "model", without: Mapping[str, str] | None = None,
           example: tuple[str, Options] = ("", {})) -> KeyMap:
    return KeyMap(rules, makes, without or {}, example)


def count(state: State, pattern: str) -> int:
    """How many values `{i}` takes in the names like `pattern`: count(state, "blocks.{i}.norm1.weight") is the depth."""
    regex = name_regex(pattern)
    return len({m.groupdict()["i"] for m in map(regex.fullmatch, state) if m})


def told_ratio(hidden: int, dim: int) -> float:
    """r for which int(dim * r) and round(dim * r) are hidden: the quotient, unless it falls below in floating point."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.25) / dim


def defaults(preset: Spec[Any]) -> Options:
    """Every option of a preset, written or not."""
    return {k: p.default for k, p in inspect.signature(preset.target).parameters.items()} | dict(preset.options)


def twin(presets: Mapping[str, Spec[Any]], state: State, options: Sequence[str], **sizes: Any) -> dict[str, Assumed]:
    """These options as the preset has them whose tensors have the very names and shapes of `state`; {} where none has. Only
    presets of these `sizes` are tried, which costs time."""
    for name, preset in presets.items():
        has = defaults(preset)
        if all(has.get(k) == v for k, v in sizes.items()):
            with torch.device("meta"):
                own = preset().state_dict()
            if {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in state.items()}:
                return {k: Assumed(has[k], f"leaves no trace in the tensors; as {name} has it, of the same shapes")
                        for k in options}
    return {}


def as_preset(presets: Mapping[str, Spec[Any]], option: str, default: Any, **sizes: Any) -> Assumed:
    """An option that leaves no trace: as the first preset of these sizes has it, else `default`."""
    for name, preset in presets.items():
        has = defaults(preset)
        if all(has.get(k) == v for k, v in sizes.items()) and option in has:
            return Assumed(has[option], f"leaves no trace in the tensors; as {name} has it, of the same sizes")
    return Assumed(default, "leaves no trace in the tensors; no preset is of these sizes")
