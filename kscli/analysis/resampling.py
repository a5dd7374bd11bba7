"""Error bars by resampling facts.

The m(m-1) entries of P are not independent: each fact stands in 2(m-1) of them. What is drawn
again is therefore the facts, m of them with replacement, so that fact i is there w_i times. Every
moment is then sum_{i != j} w_i w_j P_ij^k / sum_{i != j} w_i w_j: two copies of one fact are never
a pair, whose P would be exactly 1 and would swamp the tails. No resampled matrix is made: w^T A w
of all repeats at once is one product with a triangular matrix.

Intervals are percentiles of the repeats. tests/benchmarks/coverage.py measures how often they
hold the population's value, and why no other kind was taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
PairMask = NDArray[np.bool_]

LEVEL = 0.95
REPEATS = 1000

# P is stored in float32; entries that differ by less than this share of their size differ by
# rounding alone, and the shape of rounding errors is not a finding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends are NaN where it is not defined."""

    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """How often facts are drawn again, and the seed of the draws."""

    repeats: int = REPEATS
    seed: int = 0

    def counts(self, m: int) -> Counts:
        """`resample_counts` of `m` facts."""
        return resample_counts(m, self.repeats, self.seed)


@dataclass(frozen=True)
class Moments:
    """The moments of P off the diagonal in every repeat, each (repeats,); NaN where undefined.

    Kurtosis is the excess over a Gaussian's (Fisher); no moment is corrected for bias.
    """

    mean: Array
    std: Array
    skewness: Array
    kurtosis: Array


def resample_counts(m: int, repeats: int = REPEATS, seed: int = 0) -> Counts:
    """How often each of `m` facts is drawn in each repeat, (repeats, m); every row sums to m.

    Equal arguments give equal counts, so two models of equal m are compared on equal facts.
    """
    draws = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=repeats)
    return np.asarray(draws, dtype=np.int64)


def off_diagonal_pairs(m: int) -> PairMask:
    """The pairs i != j, (m, m)."""
    return ~np.eye(m, dtype=bool)


class PairSample:
    """Pairs of facts under resampling: which count (m, m), and the facts' `counts` (repeats, m).

    `pairs` is by default all i != j; the diagonal never counts.
    """

    def __init__(self, counts: Counts, pairs: PairMask | None = None) -> None:
        off = off_diagonal_pairs(counts.shape[1])
        self.pairs = off if pairs is None else pairs & off
        self._counts = counts
        self._weights = self._sums(self.pairs.astype(np.float32))

    def mean(self, A: Array) -> Array:
        """The mean of A (m, m) over the pairs in every repeat, (repeats,).

        NaN where a repeat holds no pair.
        """
        return self._over_weights(np.where(self.pairs, A, 0.0))

    def share(self, entries: PairMask) -> Array:
        """The share of the pairs that are in `entries` (m, m) in every repeat, (repeats,)."""
        # Counts of pairs are whole numbers, which float32 adds exactly up to 2^24 in half the time.
        return self._over_weights((entries & self.pairs).astype(np.float32))

    def moments(self, P: Array) -> Moments:
        """The moments of P (m, m) in every repeat; a shape is NaN where entries do not vary."""
        if not self.pairs.any():
            undefined = np.full(len(self._weights), np.nan)
            return Moments(undefined, undefined, undefined, undefined)
        # About their mean, in units of the largest deviation: raw moments would lose their digits.
        centre = float(P[self.pairs].mean())
        deviations = P - centre
        deviations[~self.pairs] = 0.0
        scale = float(np.abs(deviations).max())
        if not scale > ROUNDING * float(np.abs(P[self.pairs]).max()):
            scale = 0.0
        deviations /= scale or 1.0
        power = deviations.copy()
        raw = [self._over_weights(power)]
        for _ in range(3):
            power *= deviations
            raw.append(self._over_weights(power))
        s1, s2, s3, s4 = raw
        variance = np.maximum(s2 - s1**2, 0.0)
        varied = np.where((variance > ROUNDING**2 * s2) & (scale > 0), variance, np.nan)
        third = s3 - 3 * s1 * s2 + 2 * s1**3
        fourth = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
        return Moments(
            mean=centre + s1 * (scale or 1.0),
            std=np.sqrt(variance) * (scale or 1.0),
            skewness=third / varied**1.5,
            kurtosis=fourth / varied**2 - 3.0,
        )

    def _sums(self, A: Array | NDArray[np.float32]) -> Array:
        """sum_ij w_i w_j A_ij of every repeat, in A's precision but for the last sum.

        A's diagonal is 0, so that is w^T L w of a triangular L with A_ij + A_ji, half the work.
        """
        from scipy.linalg import get_blas_funcs

        w = self._counts.astype(A.dtype).T
        (trmm,) = get_blas_funcs(("trmm",), (A,))
        # Of a symmetric matrix the transpose, in BLAS's order of columns, is the matrix.
        products = trmm(1.0, (A + A.T).T, w, lower=1)
        return np.asarray(np.sum(products * w, axis=0, dtype=np.float64))

    def _over_weights(self, A: Array | NDArray[np.float32]) -> Array:
        undefined = np.full(len(self._weights), np.nan)
        sums = self._sums(A)
        return np.asarray(np.divide(sums, self._weights, out=undefined, where=self._weights > 0))


def bootstrap_moments(P: Array, counts: Counts, pairs: PairMask | None = None) -> Moments:
    """Mean, std, skewness and excess kurtosis of P (m, m) off the diagonal in every repeat.

    `counts` (repeats, m) are the facts' multiplicities, of `resample_counts`; `pairs` (m, m)
    says which pairs count, by default all i != j.
    """
    return PairSample(counts, pairs).moments(P)


def interval(values: Array, level: float = LEVEL) -> Interval:
    """The percentile interval of a statistic's values over the repeats.

    Repeats where it is NaN are left out; where they are over 1 - level of all, there is no
    interval, as for 3 facts or fewer.
    """
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < level * len(values):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
