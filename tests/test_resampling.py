"""Resampled facts: weighted moments against double loops, intervals, and their coverage."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from kscli.analysis.resampling import (
    PairSample,
    Resampling,
    bootstrap_moments,
    interval,
    off_diagonal_pairs,
    resample_counts,
)

NAMES = ("mean", "std", "skewness", "kurtosis")
Array = NDArray[np.float64]


def heavy_tailed(m: int, seed: int = 0) -> Array:
    P = 0.03 * np.random.default_rng(seed).standard_t(3, (m, m)) + 0.02
    np.fill_diagonal(P, 1)
    return P


def naive(P: Array, w: NDArray[np.int64], pairs: NDArray[np.bool_]) -> dict[str, float]:
    """The entries of the resampled matrix, each copy of a fact written out, and their moments.

    Two copies of one fact are no pair.
    """
    facts = [i for i, times in enumerate(w) for _ in range(times)]
    entries = [P[i, j] for i in facts for j in facts if i != j and pairs[i, j]]
    return {
        "mean": float(np.mean(entries)),
        "std": float(np.std(entries)),
        "skewness": float(scipy.stats.skew(entries)),
        "kurtosis": float(scipy.stats.kurtosis(entries)),
    }


@pytest.mark.parametrize("m", [8, 30])
def test_every_repeat_has_the_moments_of_the_matrix_written_out(m: int) -> None:
    P, counts = heavy_tailed(m), resample_counts(m, 20, seed=3)
    token = np.arange(m) // 2
    for pairs in (off_diagonal_pairs(m), token[:, None] != token):
        moments = bootstrap_moments(P, counts, pairs)
        for repeat, w in enumerate(counts):
            for name, value in naive(P, w, pairs).items():
                assert getattr(moments, name)[repeat] == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("m", [4, 128, 300])
def test_facts_drawn_once_each_give_scipys_moments_of_the_entries(m: int) -> None:
    P = heavy_tailed(m)
    entries = P[off_diagonal_pairs(m)]
    moments = bootstrap_moments(P, np.ones((1, m), dtype=np.int64))
    assert moments.kurtosis[0] == pytest.approx(scipy.stats.kurtosis(entries), abs=1e-9)
    assert moments.skewness[0] == pytest.approx(scipy.stats.skew(entries), abs=1e-9)
    assert moments.mean[0] == pytest.approx(entries.mean(), rel=1e-12)
    assert moments.std[0] == pytest.approx(entries.std(), rel=1e-12)


def test_moments_keep_their_digits_far_from_zero_and_at_any_scale() -> None:
    P, counts = heavy_tailed(20), resample_counts(20, 50)
    near = bootstrap_moments(P, counts)
    for scale in (1e-120, 1e120):
        far = bootstrap_moments((P + 1e3) * scale, counts)
        np.testing.assert_allclose(far.kurtosis, near.kurtosis, rtol=1e-7)
        np.testing.assert_allclose(far.mean / scale - 1e3, near.mean, rtol=0, atol=1e-11)


def test_the_diagonal_never_counts() -> None:
    P, counts = heavy_tailed(10), resample_counts(10, 30)
    other = P.copy()
    np.fill_diagonal(other, 1e6)
    everything = np.ones((10, 10), dtype=bool)
    for name in NAMES:
        np.testing.assert_array_equal(
            getattr(bootstrap_moments(P, counts), name),
            getattr(bootstrap_moments(other, counts, everything), name),
        )


def test_means_and_shares_are_weighted_by_both_facts() -> None:
    m = 12
    A, counts = heavy_tailed(m, 4), resample_counts(m, 10, seed=1)
    sample = PairSample(counts)
    large = np.abs(A) > 0.05
    for repeat, w in enumerate(counts):
        every = [(i, j) for i in range(m) for j in range(m) if i != j]
        weight = sum(w[i] * w[j] for i, j in every)
        mean = sum(w[i] * w[j] * A[i, j] for i, j in every) / weight
        share = sum(w[i] * w[j] for i, j in every if large[i, j]) / weight
        assert sample.mean(A)[repeat] == pytest.approx(mean, rel=1e-12)
        assert sample.share(large)[repeat] == pytest.approx(share, rel=1e-15)


def test_counts_are_draws_of_m_facts_that_a_seed_repeats() -> None:
    counts = resample_counts(50, 400, seed=7)
    assert counts.shape == (400, 50)
    assert (counts.sum(axis=1) == 50).all()
    assert counts.mean() == 1
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.05)
    np.testing.assert_array_equal(counts, resample_counts(50, 400, seed=7))
    np.testing.assert_array_equal(counts, Resampling(400, 7).counts(50))
    assert not np.array_equal(counts, resample_counts(50, 400, seed=8))


def test_an_interval_holds_the_middle_of_the_repeats() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert astuple(interval(values)) == pytest.approx((25, 975))
    assert astuple(interval(values, level=0.5)) == pytest.approx((250, 750))


def test_an_interval_is_undefined_where_over_a_twentieth_of_the_repeats_is() -> None:
    values = np.arange(1000.0)
    values[:50] = np.nan
    assert interval(values).low == pytest.approx(50 + 0.025 * 949)
    values[50] = np.nan
    assert math.isnan(interval(values).low)
    assert math.isnan(interval(values).high)
    assert math.isnan(interval(np.array([])).low)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_too_few_facts_have_no_interval_and_no_warning(m: int) -> None:
    P = heavy_tailed(m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = bootstrap_moments(P, resample_counts(m))
    for name in NAMES:
        assert getattr(moments, name).shape == (1000,)
        assert math.isnan(interval(getattr(moments, name)).low)


def test_entries_that_do_not_vary_have_a_mean_and_no_shape() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = bootstrap_moments(np.full((9, 9), 0.3), resample_counts(9, 100))
    np.testing.assert_allclose(moments.mean, 0.3)
    np.testing.assert_allclose(moments.std, 0, atol=1e-15)
    assert np.isnan(moments.kurtosis).all()
    assert np.isnan(moments.skewness).all()


def test_no_pair_has_no_moments() -> None:
    nothing = np.zeros((9, 9), dtype=bool)
    moments = bootstrap_moments(heavy_tailed(9), resample_counts(9, 100), nothing)
    assert all(np.isnan(getattr(moments, name)).all() for name in NAMES)


def test_intervals_of_mean_and_kurtosis_hold_the_populations_value() -> None:
    """A small version of the benchmark, which says what the numbers are with 500 sets."""
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    try:
        import coverage as benchmark
    finally:
        sys.path.pop(0)
    for population in (benchmark.INDEPENDENT, benchmark.SHARED):
        found = benchmark.coverage(population, sets=60)
        assert found["mean", "percentile"] >= 0.88, population.name
        assert found["kurtosis", "percentile"] >= 0.88, population.name
