"""Whether the distribution of P has converged at m facts (Appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import Matrices
from kscli.analysis.resampling import Interval, Resampling, bootstrap_moments, interval
from kscli.analysis.statistics import STATISTICS, Entries, off_diagonal
from kscli.errors import UsageError
from kscli.numbers import number

_COUNTS = 8
# An interval that reaches further to either side than this share of the kurtosis leaves open
# whether it has converged; of a kurtosis about 0, of the 3 that a Gaussian's fourth moment is.
_CLOSE, _LEAST = 0.1, 3.0


@dataclass(frozen=True)
class Convergence:
    """The kurtosis of P of the first so many facts, one entry a count, ascending.

    `moved` is the greatest difference between the cumulative distributions of the entries at
    `before` and at the last count (Kolmogorov and Smirnov's), NaN where there are none.
    """

    counts: tuple[int, ...]
    kurtosis: tuple[float, ...]
    intervals: tuple[Interval, ...]
    moved: float

    @property
    def before(self) -> int | None:
        """Index of the count that is compared with the last: the greatest of at most its half."""
        return _before(self.counts)

    @property
    def converged(self) -> bool | None:
        """Whether the kurtosis of half the facts lies in the interval of all; None: not known.

        It is not known where it does and the interval is wide: an error that large would hide
        a change.
        """
        last = self.intervals[-1]
        if self.before is None or math.isnan(last.low) or math.isnan(self.kurtosis[self.before]):
            return None
        if not last.low <= self.kurtosis[self.before] <= last.high:
            return False
        close = _CLOSE * max(abs(self.kurtosis[-1]), _LEAST)
        return True if _reach(last) <= close else None

    @property
    def sentence(self) -> str:
        """Whether the kurtosis has converged, and by what numbers."""
        m, last = self.counts[-1], self.intervals[-1]
        if m < 2:
            return "One fact makes no pair: there is nothing that could converge."
        if math.isnan(self.kurtosis[-1]) or math.isnan(last.low):
            return f"Whether the kurtosis has converged at m = {m} cannot be told: " + (
                "it is undefined." if math.isnan(self.kurtosis[-1]) else "it has no interval."
            )
        if self.before is None:
            return (
                f"Whether the kurtosis has converged at m = {m} cannot be told: there is no count "
                "of at most half as many facts to compare with."
            )
        half, then, now = self.counts[self.before], self.kurtosis[self.before], self.kurtosis[-1]
        if math.isnan(then):
            return (
                f"Whether the kurtosis has converged at m = {m} cannot be told: at {half} facts "
                "it is undefined."
            )
        error = f"\N{PLUS-MINUS SIGN} {_relative(_reach(last), now)}"
        interval_ = f"the 95 % interval, {number(last.low, 1)} to {number(last.high, 1)}"
        course = f"it was {number(then, 1)} with {half} facts and is {number(now, 1)} now"
        if self.converged is None:
            verdict = f"Whether the kurtosis has converged at m = {m} cannot be told"
            end = f"inside {interval_}, which is wide ({error})"
        elif self.converged:
            verdict = f"The kurtosis has converged at m = {m} to within its error, {error}"
            end = f"inside {interval_}"
        else:
            verdict = f"The kurtosis has not converged at m = {m}"
            end = f"outside {interval_}"
        return (
            f"{verdict}: {course}, {end}. The two distributions differ by at most "
            f"{100 * self.moved:.1f} % of their entries."
        )


def default_counts(m: int) -> tuple[int, ...]:
    """Eight counts in even steps up to all `m` facts: 16, 32, ..., 128 of 128."""
    counts = sorted({round(m * at / _COUNTS) for at in range(1, _COUNTS + 1)})
    return tuple(count for count in counts if count >= 4 or count == m)


@lru_cache(maxsize=64)
def convergence_at(
    matrices: Matrices, layer: int, counts: tuple[int, ...], resampling: Resampling
) -> Convergence:
    """`convergence_of` a layer's P, computed once: a report speaks of it and draws it."""
    return convergence_of(matrices.matrix("P", layer), counts, resampling)


def convergence_of(
    P: NDArray[np.float64], counts: Sequence[int], resampling: Resampling
) -> Convergence:
    """The kurtosis of the first `counts` facts of P (m, m), with intervals of resampled facts.

    Raises UsageError for a count below 2 where there are 2 facts, and for one beyond m.
    """
    m = len(P)
    chosen = tuple(sorted(set(counts))) or default_counts(m)
    for count in chosen:
        if count > m:
            raise UsageError(f"there is no count of {count} facts among {m}; name {m} at most.")
        if count < min(2, m):
            raise UsageError(f"{count} facts make no pair; count at least 2.")
    kurtosis = STATISTICS["kurtosis"]
    parts = [P[:count, :count] for count in chosen]
    before = _before(chosen)
    return Convergence(
        chosen,
        tuple(kurtosis(off_diagonal(part)) for part in parts),
        tuple(
            interval(bootstrap_moments(part, resampling.counts(len(part))).kurtosis)
            for part in parts
        ),
        float("nan")
        if before is None
        else largest_difference(off_diagonal(parts[before]), off_diagonal(parts[-1])),
    )


def largest_difference(first: Entries, second: Entries) -> float:
    """The greatest difference between two empirical cumulative distributions; NaN of none."""
    if not (first.size and second.size):
        return float("nan")
    first, second = np.sort(first), np.sort(second)
    at = np.concatenate([first, second])
    shares = [np.searchsorted(one, at, side="right") / one.size for one in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def _reach(of: Interval) -> float:
    return (of.high - of.low) / 2


def _relative(reach: float, kurtosis: float) -> str:
    """How far an interval reaches, in per cent of the kurtosis where it is not about 0."""
    if abs(kurtosis) < _LEAST:
        return number(reach, 1)
    return f"{100 * reach / abs(kurtosis):.0f} %"


def _before(counts: Sequence[int]) -> int | None:
    halves = [at for at, count in enumerate(counts) if 2 * count <= counts[-1]]
    return halves[-1] if halves else None
