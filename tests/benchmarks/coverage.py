"""How often the 95 % intervals of mean and kurtosis hold the population's value.

    python tests/benchmarks/coverage.py [SETS]

Fact sets of m = 128 are drawn from three populations of keys k, with C = I, so that
P_ij = k_i . k_j / |k_i|^2:

- independent: Gaussian keys;
- shared tokens: a key is its last token's direction and a Gaussian part, and tokens follow Zipf's
  law, so that a few of them are shared by many facts (kurtosis about 40);
- rare bound pairs: the same, with so many equally frequent tokens that a set of 128 facts holds
  1.5 pairs that share one, and 22 sets in 100 none (kurtosis about 12).

The population's value is that of pairs of independent facts, from the exact share of pairs that
share a token and a large simulation of P with and without. Beside the percentile interval, which
kscli uses, stand the basic one (of kurtosis also on a log scale) and the normal ones with the
bootstrap's and the jackknife's error. Then, over populations from rarer to more frequent pairs, the
percentile interval's coverage beside how many pairs hold half of the fourth moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import (
    bootstrap_moments,
    interval,
    off_diagonal_pairs,
    resample_counts,
)
from kscli.analysis.statistics import STATISTICS, off_diagonal
from kscli.analysis.tails import FEW_PAIRS, carriers

Array = NDArray[np.float64]
Ends = dict[tuple[str, str], tuple[float, float]]
M = 128
REPEATS = 1000
NORMAL = 1.959964


@dataclass(frozen=True)
class Population:
    """Facts whose key is sqrt(rho) of its token's axis and sqrt(1 - rho) of Gaussian noise."""

    name: str
    tokens: Array  # the probability of each, (tokens,)
    rho: float
    d: int

    def draw(self, m: int, rng: np.random.Generator) -> Array:
        """P of `m` facts."""
        return self._superposition(rng.choice(len(self.tokens), m, p=self.tokens), rng)

    def truth(self, size: int = 2000) -> dict[str, float]:
        """Mean and kurtosis of P_ij for two independent facts."""
        rng = np.random.default_rng(99)
        same = float(np.sum(self.tokens**2))
        shared = _raw(self._superposition(np.zeros(size, dtype=int), rng))
        others = _raw(self._superposition(np.arange(size), rng))
        s1, s2, s3, s4 = same * shared + (1 - same) * others
        fourth = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
        return {"mean": s1, "kurtosis": fourth / (s2 - s1**2) ** 2 - 3}

    def _superposition(self, token: NDArray[np.int64], rng: np.random.Generator) -> Array:
        noise = rng.standard_normal((len(token), self.d))
        G = (1 - self.rho) * (noise @ noise.T) / self.d
        G += self.rho * (token[:, None] == token)
        return np.asarray(G / np.diag(G)[:, None])


def _raw(P: Array) -> Array:
    entries = off_diagonal(P)
    squares = entries * entries
    powers = (entries, squares, squares * entries, squares * squares)
    return np.array([power.mean() for power in powers])


def rare(pairs: float) -> Population:
    """A population whose draws of M facts hold `pairs` bound pairs on average; kurtosis 12."""
    tokens = round(M * (M - 1) / 2 / pairs)
    rho, share = 0.5, 1 / tokens
    noise = np.sqrt(share * rho**4 / 12) - share * rho**2
    name = f"{pairs:g} bound pairs a set"
    return Population(name, np.full(tokens, share), rho, round((1 - rho) ** 2 / noise))


def zipf(tokens: int, exponent: float = 1.0) -> Array:
    """The probabilities of tokens by rank."""
    weights = 1 / np.arange(1, tokens + 1) ** exponent
    return np.asarray(weights / weights.sum())


INDEPENDENT = Population("independent keys", np.full(10_000, 1e-4), 0.0, 64)
SHARED = Population("Zipf-shared tokens", zipf(50_000), 0.5, 224)
RARE = rare(1.5)


def percentile(P: Array, seed: int) -> Ends:
    """The ends of the intervals that kscli prints, by statistic and kind."""
    boot = bootstrap_moments(P, resample_counts(M, REPEATS, seed))
    found = {name: interval(getattr(boot, name)) for name in ("mean", "kurtosis")}
    return {(name, "percentile"): (ends.low, ends.high) for name, ends in found.items()}


def every_kind(P: Array, seed: int) -> Ends:
    """The ends of every kind of interval, by statistic and kind."""
    ends = percentile(P, seed)
    boot = bootstrap_moments(P, resample_counts(M, REPEATS, seed))
    left_out = bootstrap_moments(P, np.ones((M, M), np.int64) - np.eye(M, dtype=np.int64))
    for name, kind in list(ends):
        low, high = ends[name, kind]
        estimate = STATISTICS[name](off_diagonal(P))
        ends[name, "basic"] = 2 * estimate - high, 2 * estimate - low
        if name == "kurtosis":
            squared = (estimate + 3) ** 2
            ends[name, "basic, log"] = squared / (high + 3) - 3, squared / (low + 3) - 3
        without = getattr(left_out, name)
        jackknife = np.sqrt((M - 1) / M * np.sum((without - without.mean()) ** 2))
        for error_kind, error in (("normal", getattr(boot, name).std()), ("jackknife", jackknife)):
            ends[name, error_kind] = estimate - NORMAL * error, estimate + NORMAL * error
    return ends


def coverage(
    population: Population, sets: int, of: Callable[[Array, int], Ends] = percentile
) -> dict[tuple[str, str], float]:
    """How often each interval holds the population's value, over `sets` draws of M facts."""
    truth = population.truth()
    rng = np.random.default_rng(1)
    hits: dict[tuple[str, str], int] = {}
    for seed in range(sets):
        for key, (low, high) in of(population.draw(M, rng), seed).items():
            hits[key] = hits.get(key, 0) + (low <= truth[key[0]] <= high)
    return {key: count / sets for key, count in hits.items()}


def main(sets: int) -> None:
    """Print everything."""
    print(f"{sets} sets of m = {M}, {REPEATS} repeats")
    for population in (INDEPENDENT, SHARED, RARE):
        truth = population.truth()
        print(f"{population.name}: mean {truth['mean']:.4f}, kurtosis {truth['kurtosis']:.2f}")
        for (name, kind), share in coverage(population, sets, every_kind).items():
            print(f"  {name:8} {kind:10} {share:.1%}")
    print("percentile interval of kurtosis, and pairs that hold half of the fourth moment")
    for pairs in (0.75, 1.5, 3, 6, 12, 24):
        population = rare(pairs)
        share = coverage(population, sets)["kurtosis", "percentile"]
        rng = np.random.default_rng(1)
        draws = [population.draw(M, rng) for _ in range(sets)]
        half = [carriers(P, off_diagonal_pairs(M)).fourth_moment_pairs for P in draws]
        few = np.mean(np.array(half) <= FEW_PAIRS)
        print(
            f"  {population.name:24} {share:.1%}; median {np.median(half):g} pairs, "
            f"{few:.0%} of sets have {FEW_PAIRS} or fewer"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
