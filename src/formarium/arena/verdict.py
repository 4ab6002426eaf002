"""Does the claim hold? One rule for all studies, fixed before any of them is run.

A study gives an effect a paired seed, positive where it speaks for the claim, and says beforehand which effect counts.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.errors import DoesNotFit

HOLDS, DOES_NOT_HOLD, INCONCLUSIVE = "HOLDS", "DOES NOT HOLD", "INCONCLUSIVE"
DRAWS = 10_000
LEVEL = 0.95
RULE = """\
Each paired seed gives an effect, positive where it speaks for the claim. Its mean over the seeds has a 95 % interval: at
each end the wider of the bootstrap over seeds (10,000 draws) and Student's. A study says before it is run what counts.

- **Better by at least *a*.** HOLDS: the interval lies above zero and the mean is *a* or more. DOES NOT HOLD: the interval
  lies below *a* (tight around zero, too small to count, or opposite).
- **No worse by more than *m*.** HOLDS: the interval lies above −*m*. DOES NOT HOLD: it lies below −*m*.
- **A published number, within *w*.** The effect is the distance from that number, as a share of it. HOLDS: the interval
  lies within −*w* and *w*. DOES NOT HOLD: it lies outside.
- INCONCLUSIVE: everything else; and always where a planned seed is missing, or a run of a deciding arm failed or
  diverged. Only where the study says beforehand what a diverged run counts as (a worst value, for every arm) does it
  count as that.
"""


@dataclass(frozen=True)
class Decides:
    """The one number that decides, and which effect counts. Exactly one of at_least, no_worse_by and target is given.

    number: a key of what `measure` returns. by: the effect is the idea's number less the control's ("difference"), or that
    as a share of the control's ("ratio": 0.01 is 1 %). at_least: the least effect in favour of the idea that counts.
    no_worse_by: the claim is that the idea is as good, and this much worse would refute it. target, within: a published
    number, and the share of it by which ours may differ. unit: of a difference, in words. diverged: the worst value, which
    a diverged run counts as, and at which every run is cut off.
    """

    number: str
    better: Literal["lower", "higher"] = "lower"
    by: Literal["ratio", "difference"] = "difference"
    at_least: float | None = None
    no_worse_by: float | None = None
    target: float | None = None
    within: float | None = None
    unit: str = ""
    diverged: float | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("better", ("lower", "higher")), ("by", ("ratio", "difference"))):
            if getattr(self, field) not in allowed:
                raise DoesNotFit(f"{field} is one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        bars = {k: v for k in ("at_least", "no_worse_by", "target") if (v := getattr(self, k)) is not None}
        if len(bars) != 1:
            raise DoesNotFit(f"exactly one of at_least, no_worse_by and target decides; given: {', '.join(bars) or 'none'}")
        if (self.target is None) != (self.within is None):
            raise DoesNotFit("a target needs within, the share of it by which ours may differ, and within needs a target")
        if self.bar <= 0 or self.target == 0:
            raise DoesNotFit(f"what counts is above zero, not {self.bar:g}: an effect of zero is evidence of nothing")

    @property
    def kind(self) -> Literal["better", "no worse", "target"]:
        return "target" if self.target is not None else "better" if self.at_least is not None else "no worse"

    @property
    def bar(self) -> float:
        """The effect that counts: at_least, no_worse_by or within."""
        found = next(v for v in (self.at_least, self.no_worse_by, self.within) if v is not None)
        return float(found)

    @property
    def sign(self) -> int:
        return 1 if self.better == "higher" else -1

    @property
    def relative(self) -> bool:
        return self.by == "ratio" or self.kind == "target"

    def counted(self, value: float) -> float:
        """A run's number, cut off at the worst value if there is one."""
        if self.diverged is None:
            return value
        return min(value, self.diverged) if self.better == "lower" else max(value, self.diverged)

    def effect(self, idea: float, control: float | None = None) -> float:
        """Of one seed. control: of the same seed; none where a published number is the measure."""
        if self.target is not None:
            return (idea - self.target) / abs(self.target)
        assert control is not None
        if self.by == "difference":
            return self.sign * (idea - control)
        if control == 0:
            raise DoesNotFit(f"{self.number} of the control is 0, so no ratio to it can be taken; decide by 'difference'")
        return self.sign * (idea - control) / abs(control)


@dataclass(frozen=True)
class Verdict:
    """word: HOLDS, DOES NOT HOLD or INCONCLUSIVE; mean, low, high: of the effect, None where a seed is missing; reason: why
    it is inconclusive."""

    word: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def interval(effects: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean: at each end the wider of the bootstrap over seeds and Student's.

    With three to five seeds a percentile bootstrap is too narrow: no draw leaves the range of the seeds seen, and of three
    equal-sized draws in nine one is the least seed thrice; so its 95 % cover far less. Student's interval covers what it
    says for normal noise, however few the seeds; where the seeds are skewed the bootstrap may reach further at one end.
    """
    import numpy as np
    from scipy.stats import t

    n = len(effects)
    if n < 2:
        raise DoesNotFit(f"an interval needs two seeds or more, got {n}")
    values, mean = np.asarray(effects, dtype=float), statistics.fmean(effects)
    draws = values[np.random.default_rng(seed).integers(n, size=(DRAWS, n))].mean(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    half = t.ppf((1 + LEVEL) / 2, n - 1) * statistics.stdev(effects) / math.sqrt(n)
    return min(float(low), mean - half), max(float(high), mean + half)


def judge(effects: Sequence[float], decides: Decides) -> Verdict:
    """The verdict on the effects of all planned seeds."""
    mean, (low, high), bar = statistics.fmean(effects), interval(effects), decides.bar
    holds, fails = {
        "better": (low > 0 and mean >= bar, high < bar),
        "no worse": (low > -bar, high < -bar),
        "target": (low > -bar and high < bar, low > bar or high < -bar),
    }[decides.kind]
    word = HOLDS if holds else DOES_NOT_HOLD if fails else INCONCLUSIVE
    why = "" if holds or fails else f"{len(effects)} seeds do not tell"
    return Verdict(word, mean, low, high, why)
