"""What carries the tails, against the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from kscli.analysis.resampling import off_diagonal_pairs
from kscli.analysis.tails import carriers, hill, share_within

Array = NDArray[np.float64]


def heavy_tailed(m: int, seed: int = 0) -> Array:
    P = 0.03 * np.random.default_rng(seed).standard_t(3, (m, m)) + 0.02
    np.fill_diagonal(P, 1)
    return P


def by_token(m: int) -> NDArray[np.bool_]:
    token = np.arange(m) // 3
    return np.asarray(token[:, None] != token)


def naive_hill(sizes: list[float]) -> float:
    """1 / mean log(x_(r) / x_(k+1)) of the largest 5 %."""
    ordered = sorted(sizes, reverse=True)
    k = len(ordered) // 20
    if k < 1:
        return math.nan
    return 1 / (sum(math.log(x / ordered[k]) for x in ordered[:k]) / k)


@pytest.mark.parametrize("m", [8, 21, 40])
@pytest.mark.parametrize("distinct", [False, True])
def test_hill_index_and_its_jackknife_are_their_definitions(m: int, distinct: bool) -> None:
    P = heavy_tailed(m)
    pairs = by_token(m) if distinct else off_diagonal_pairs(m)

    def sizes(without: int) -> list[float]:
        return [
            abs(float(P[i, j]))
            for i in range(m)
            for j in range(m)
            if pairs[i, j] and without not in (i, j)
        ]

    found = hill(P, pairs)
    left_out = np.array([naive_hill(sizes(fact)) for fact in range(m)])
    spread = np.sum((left_out - left_out.mean()) ** 2)
    assert found.index == pytest.approx(naive_hill(sizes(-1)), rel=1e-12)
    assert found.error == pytest.approx(math.sqrt((m - 1) / m * spread), rel=1e-9)


def test_hill_index_finds_the_index_of_a_power_law() -> None:
    rng = np.random.default_rng(0)
    P = rng.random((300, 300)) ** (-1 / 2.5) * rng.choice([-1, 1], (300, 300))
    found = hill(P, off_diagonal_pairs(300))
    assert found.index == pytest.approx(2.5, abs=0.1)
    assert 0.01 < found.error < 0.1


@pytest.mark.parametrize("P", [np.ones((1, 1)), np.eye(4), np.zeros((30, 30)), np.ones((30, 30))])
def test_no_tail_has_no_index(P: Array) -> None:
    found = hill(P, off_diagonal_pairs(len(P)))
    assert math.isnan(found.index)
    assert math.isnan(found.error)


@pytest.mark.parametrize("m", [3, 25])
def test_carriers_are_their_definitions(m: int) -> None:
    P, pairs = heavy_tailed(m, 1), off_diagonal_pairs(m)
    mean = P[pairs].mean()
    of_pair = {
        (i, j): (P[i, j] - mean) ** 2 + (P[j, i] - mean) ** 2
        for i in range(m)
        for j in range(i + 1, m)
    }
    fourth = sorted(
        ((P[i, j] - mean) ** 4 + (P[j, i] - mean) ** 4 for i, j in of_pair), reverse=True
    )
    total = sum(of_pair.values())
    of_fact = [sum(v for pair, v in of_pair.items() if fact in pair) for fact in range(m)]
    top = math.ceil(len(of_pair) / 100)
    half = next(n for n in range(1, len(fourth) + 1) if sum(fourth[:n]) >= sum(fourth) / 2)
    found = carriers(P, pairs)
    assert (found.top_pair_i, found.top_pair_j) == max(of_pair, key=lambda pair: of_pair[pair])
    assert found.top_fact == int(np.argmax(of_fact))
    assert found.variance_top_pair == pytest.approx(max(of_pair.values()) / total)
    assert found.variance_top_fact == pytest.approx(max(of_fact) / total)
    assert found.variance_top_pairs == pytest.approx(sum(sorted(of_pair.values())[-top:]) / total)
    assert found.fourth_moment_pairs == half


def test_one_bound_pair_carries_the_fourth_moment() -> None:
    P = 0.01 * np.random.default_rng(0).standard_normal((60, 60))
    P[7, 31] = P[31, 7] = 1.0
    found = carriers(P, off_diagonal_pairs(60))
    assert (found.top_pair_i, found.top_pair_j, found.fourth_moment_pairs) == (7, 31, 1)
    assert found.variance_top_pair > 0.8


@pytest.mark.parametrize("P", [np.ones((1, 1)), np.full((5, 5), 0.1)])
def test_nothing_carries_what_does_not_vary(P: Array) -> None:
    found = carriers(P, off_diagonal_pairs(len(P)))
    assert all(math.isnan(value) for value in vars(found).values())


def test_a_share_of_nothing_is_undefined() -> None:
    tail = np.array([[True, False], [True, False]])
    assert share_within(tail, np.array([[True, True], [False, False]])) == 0.5
    assert math.isnan(share_within(np.zeros((2, 2), dtype=bool), tail))
