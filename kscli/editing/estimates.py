"""Statistics of a run of edits with 95 % intervals; None where it is not defined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling, interval

FEWEST_UNITS = 5
"""Below this many things to draw again there is no interval."""
FEWEST_POINTS = 8
"""Below this many points there is no exponent and no rank correlation."""

# Repeats and pairs are worked on together, so many at once.
_AT_ONCE = 2_000_000

Real = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A statistic and the ends of its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, repeats: Real | None) -> Estimate:
        """A statistic, and its percentile interval over the repeats."""
        if math.isnan(value) or repeats is None:
            return cls(plain(value))
        ends = interval(repeats)
        return cls(value, plain(ends.low), plain(ends.high))

    def row(self, name: str) -> dict[str, float | None]:
        """As fields `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def over_units(statistic: Callable[[Real], Real], units: Whole, resampling: Resampling) -> Estimate:
    """A statistic of weights (repeats, pairs), with an interval that draws whole units again."""
    value = float(statistic(np.ones((1, len(units))))[0])
    names, own = np.unique(units, return_inverse=True)
    if math.isnan(value) or len(names) < FEWEST_UNITS:
        return Estimate(plain(value))
    counts = resampling.counts(len(names)).astype(np.float64)
    size = max(1, _AT_ONCE // len(units))
    blocks = [counts[at : at + size] for at in range(0, len(counts), size)]
    return Estimate.of(value, np.concatenate([statistic(block[:, own]) for block in blocks]))


def over_permutations(statistic: Callable[[Real, Real], Real], predicted: Real) -> Estimate:
    """The mean of a statistic over permuted predictors (permutations, pairs), and its spread."""
    once = np.ones((1, predicted.shape[1]))
    values = np.array([statistic(row, once)[0] for row in predicted])
    return Estimate.of(float(values.mean()), values) if len(values) else Estimate(None)


def plain(value: float) -> float | None:
    """The value; None for NaN."""
    return None if math.isnan(value) else value
