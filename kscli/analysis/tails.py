"""What the tails of P are made of: how heavy they are, and which pairs and facts carry them.

A pair here is two facts in either order: P_ij and P_ji are large together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import ROUNDING, Array, PairMask

# Where this few pairs hold half of the fourth moment, kurtosis is a statement about them. In
# tests/benchmarks/coverage.py such sets come from populations whose bound pairs a draw of 128
# facts may hold none of, and no interval can know of pairs that were not drawn.
FEW_PAIRS = 5

HILL_ENTRIES = 20  # one entry in so many is in the tail that the Hill index describes: 5 %
TOP_PAIRS = 100  # one pair in so many is a top pair: 1 %


@dataclass(frozen=True)
class Hill:
    """A tail index and its standard error; a smaller index is a heavier tail. NaN: undefined."""

    index: float
    error: float


@dataclass(frozen=True)
class Carriers:
    """Who carries the variance and the fourth moment of P off the diagonal.

    `variance_top_pairs` is the share of the variance in the top 1 % of pairs (rounded up),
    `variance_top_pair` in the strongest, of facts `top_pair_i` < `top_pair_j`, and
    `variance_top_fact` in all pairs of the fact that is in the most of it, `top_fact`.
    `fourth_moment_pairs` is the least number of pairs that hold half of the fourth moment.
    All NaN where the entries do not vary.
    """

    variance_top_pairs: float = math.nan
    variance_top_pair: float = math.nan
    top_pair_i: float = math.nan
    top_pair_j: float = math.nan
    variance_top_fact: float = math.nan
    top_fact: float = math.nan
    fourth_moment_pairs: float = math.nan


def hill(P: Array, pairs: PairMask) -> Hill:
    """The Hill index of the largest 5 % of |P_ij| over `pairs` (m, m), with a jackknife error.

    With n entries and k = floor(n / 20) it is 1 / mean log(|p|_(r) / |p|_(k+1)) over r = 1..k
    (Hill 1975, Annals of Statistics 3). The error is that of leaving out one fact at a time.
    Whitened cosines are bounded, so this describes the tail that is there and extrapolates none.
    """
    m = len(P)
    sizes = np.abs(P[pairs])
    of_fact = pairs.sum(axis=0) + pairs.sum(axis=1)
    tails = (len(sizes) - of_fact) // HILL_ENTRIES
    # Without a fact, the tail that is left lies within this many of the largest entries.
    needed = min(len(sizes), int((tails + of_fact).max(initial=len(sizes) // HILL_ENTRIES)) + 1)
    if not needed:
        return Hill(math.nan, math.nan)
    largest = np.argpartition(sizes, len(sizes) - needed)[len(sizes) - needed :]
    largest = largest[np.argsort(-sizes[largest])]
    rows, columns = np.divmod(np.flatnonzero(pairs)[largest], m)
    with np.errstate(divide="ignore"):
        logs = np.log(sizes[largest])
    sums = np.append(0.0, np.cumsum(logs))
    entries_of = _entries_of(np.stack([rows, columns]), m)
    without = np.array(
        [_hill_index(logs, sums, int(tails[fact]), entries_of[fact]) for fact in range(m)]
    )
    spread = np.sum((without - without.mean()) ** 2)
    error = math.sqrt((m - 1) / m * spread)
    nothing = np.empty(0, dtype=np.intp)
    return Hill(_hill_index(logs, sums, len(sizes) // HILL_ENTRIES, nothing), error)


def _entries_of(facts: NDArray[np.intp], m: int) -> list[NDArray[np.intp]]:
    """Of each of m facts, at which of n pairs `facts` (2, n) it is, ascending."""
    order = np.argsort(facts, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(facts.ravel(), minlength=m))
    return [np.sort(own) for own in np.split(order % facts.shape[1], ends[:-1])]


def _hill_index(logs: Array, sums: Array, k: int, left_out: NDArray[np.intp]) -> float:
    """The index from logarithms in descending order, but for those at the places `left_out`.

    `sums[n]` is the sum of the first n logarithms.
    """
    # How many of those left out come before the one that is at place k of the others.
    before = int(np.searchsorted(left_out - np.arange(len(left_out)), k, side="right"))
    place = k + before
    if k < 1 or not np.isfinite(logs[place]):
        return math.nan
    mean = float((sums[place] - logs[left_out[:before]].sum()) / k - logs[place])
    return 1 / mean if mean > ROUNDING else math.nan


def carriers(P: Array, pairs: PairMask) -> Carriers:
    """Who carries the variance and the fourth moment of P (m, m) over `pairs`, symmetric."""
    entries = P[pairs]
    if not entries.size:
        return Carriers()
    deviations = np.where(pairs, P - entries.mean(), 0.0)
    scale = float(np.abs(deviations).max())
    if not scale > ROUNDING * float(np.abs(entries).max()):
        return Carriers()
    squares = (deviations / scale) ** 2
    above = np.triu(pairs, 1)
    of_pair = (squares + squares.T)[above]
    of_fact = squares.sum(axis=0) + squares.sum(axis=1)
    total = of_pair.sum()
    strongest, fact = int(of_pair.argmax()), int(of_fact.argmax())
    i, j = divmod(int(np.flatnonzero(above)[strongest]), len(P))
    top = len(of_pair) - -(-len(of_pair) // TOP_PAIRS)
    squares *= squares
    fourth = np.cumsum(np.sort((squares + squares.T)[above])[::-1])
    return Carriers(
        variance_top_pairs=float(np.partition(of_pair, top)[top:].sum() / total),
        variance_top_pair=float(of_pair[strongest] / total),
        top_pair_i=float(i),
        top_pair_j=float(j),
        variance_top_fact=float(of_fact[fact] / total),
        top_fact=float(fact),
        fourth_moment_pairs=float(np.searchsorted(fourth, fourth[-1] / 2) + 1),
    )


def share_within(tail: NDArray[np.bool_], of: PairMask) -> float:
    """The share of the entries of `tail` (m, m) that are in `of`; NaN where there is none."""
    size = np.count_nonzero(tail)
    return np.count_nonzero(tail & of) / size if size else math.nan
