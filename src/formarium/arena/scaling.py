"""How the error falls with the compute: E = a (C + d)^-b + c, fitted to measured points, and their frontier.

The law of Scaling Vision Transformers (arXiv 2106.04560, section 2): c is the error that no compute removes, d shifts what
the smallest models reach, b is how fast the error falls between the two.

    points = [(macs * steps, 1 - accuracy), ...]
    law = fit_scaling_law(frontier(points))
    law(1e15), law.compute_for(0.05)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from ..core.errors import BadData, DoesNotFit

Point = tuple[float, float]  # compute, error
LEAST = 4  # points of different compute: as many as the law has numbers
TOLERANCE = 0.05  # relative errors above this count linearly, not squared


@dataclass(frozen=True)
class ScalingLaw:
    """E = a (C + d)^-b + c; a, b > 0, c, d >= 0. spread: root mean square of the points' relative errors."""

    a: float
    b: float
    c: float
    d: float
    spread: float = 0.0

    def __call__(self, compute: float) -> float:
        return self.a * (compute + self.d) ** -self.b + self.c

    def compute_for(self, error: float) -> float:
        """The compute at which the law reaches this error; DoesNotFit where it never does."""
        if error <= self.c:
            raise DoesNotFit(f"an error of {error:g} is never reached: {self.c:g} is left at any compute")
        return max(0.0, (self.a / (error - self.c)) ** (1 / self.b) - self.d)

    def __str__(self) -> str:
        return f"E = {self.a:.4g} (C + {self.d:.4g})^-{self.b:.4g} + {self.c:.4g}"


def _checked(points: Iterable[Point]) -> list[Point]:
    found = []
    for point in points:
        try:
            compute, error = map(float, point)
        except (TypeError, ValueError):
            raise BadData(f"expected points (compute, error), got {point!r}") from None
        if not (math.isfinite(compute) and math.isfinite(error) and compute > 0 and error > 0):
            raise BadData(f"compute and error must be finite and above zero, got ({compute:g}, {error:g})")
        found.append((compute, error))
    return sorted(found)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that none with as little compute or less beats, by compute; their errors fall."""
    best: list[Point] = []
    for compute, error in _checked(points):
        if not best or error < best[-1][1]:
            best.append((compute, error))
    return best


def fit_scaling_law(points: Iterable[Point]) -> ScalingLaw:
    """The law nearest to points (compute, error), in relative errors; a few points far off move it little (soft L1 loss).

    BadData for fewer than four points of different compute, for values that are not finite and above zero, and where the
    error does not fall as the compute grows. To fit the best at each compute alone, give `frontier(points)`.
    """
    import numpy as np
    from scipy.optimize import least_squares

    given = _checked(points)
    computes, errors = np.array(given).reshape(-1, 2).T
    different = len(set(computes))
    if different < LEAST:
        raise BadData(f"the law has four numbers: it needs {LEAST} points of different compute or more, got {different}")
    rank = np.argsort(np.argsort(errors, kind="stable"), kind="stable")
    if errors.max() - errors.min() <= 1e-9 * errors.max() or np.corrcoef(np.arange(len(rank)), rank)[0, 1] >= 0:
        raise BadData("the error does not fall as the compute grows, so there is no law to fit; points should differ in "
                      "compute by more than their noise hides")
    unit = float(np.exp(np.log(computes).mean()))  # else the numbers are of any size
    x, log_errors, least = computes / unit, np.log(errors), errors.min()

    def predicted(p: np.ndarray) -> np.ndarray:
        return np.exp(p[0]) * (x + p[3]) ** -p[1] + p[2]

    low, high = (-np.inf, 1e-3, 0.0, 0.0), (np.inf, 10.0, least, x.max())
    best = None
    for b, c, d in product((0.2, 0.6, 1.5), (0.0, 0.5, 0.95), (0.0, 1.0, 10.0)):
        start = [0.0, b, c * least, min(d * x.min(), 0.9 * x.max())]
        start[0] = np.median(np.log(errors - 0.999 * start[2]) + b * np.log(x + start[3]))
        found = least_squares(lambda p: np.log(predicted(p)) - log_errors, start, bounds=(low, high), loss="soft_l1",
                              f_scale=TOLERANCE, x_scale=(1.0, 0.1, least, x.min()), xtol=1e-12, ftol=1e-12, gtol=1e-12)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    log_a, b, c, d = map(float, best.x)
    spread = float(np.sqrt(np.mean((np.log(predicted(best.x)) - log_errors) ** 2)))
    return ScalingLaw(math.exp(log_a) * unit**b, b, c, d * unit, spread)
