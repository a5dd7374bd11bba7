"""Properties of P, its statistics and its largest pairs, for many C, keys and facts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kscli.analysis.pairs import top_pairs
from kscli.analysis.statistics import WHOLE_NUMBERS, layer_statistics
from kscli.pmatrix import KeyOfFactError, superposition

Real = NDArray[np.float64]

# No deadline: the machine that runs the tests has other work too.
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)
widths = st.integers(2, 24)
counts = st.integers(1, 300)
conditions = st.floats(0, 12).map(lambda power: 10.0**power)


def second_moment(seed: int, d_m: int, condition: float) -> Real:
    """A symmetric positive definite C of a condition, in a random basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d_m, d_m)))[0]
    C = (basis * np.geomspace(1, 1 / condition, d_m)) @ basis.T
    return (C + C.T) / 2


def keys_of(seed: int, m: int, d_m: int) -> Real:
    return np.random.default_rng(seed + 1).standard_normal((m, d_m))


def p_of(C: Real, keys: Real) -> Real:
    return superposition(C.copy(), 10**6, keys).P


def tolerance(C: Real, P: Real) -> float:
    """How far rounding in float64 may move an entry of P: by its condition."""
    return float(100 * np.finfo(float).eps * np.linalg.cond(C) * np.abs(P).max()) + 1e-12


def definition(C: Real, keys: Real) -> Real:
    """Equation 16, entry by entry, by the inverse."""
    inverse = np.linalg.inv(C)
    return np.array([[(i @ inverse @ j) / (i @ inverse @ i) for j in keys] for i in keys])


@few
@given(seeds, widths, st.integers(1, 12), st.floats(0, 6).map(lambda power: 10.0**power))
def test_p_is_its_definition(seed: int, d_m: int, m: int, condition: float) -> None:
    C, keys = second_moment(seed, d_m, condition), keys_of(seed, m, d_m)
    P = p_of(C, keys)
    assert np.abs(P - definition(C, keys)).max() <= tolerance(C, P)


@few
@given(seeds, widths, counts, conditions)
def test_p_of_any_condition(seed: int, d_m: int, m: int, condition: float) -> None:
    """Finite, its diagonal 1, cosines within [-1, 1], and P = whitened cosine x ratio of norms."""
    C, keys = second_moment(seed, d_m, condition), keys_of(seed, m, d_m)
    found = superposition(C.copy(), 10**6, keys)
    assert np.isfinite(found.P).all()
    np.testing.assert_allclose(np.diagonal(found.P), 1, rtol=1e-12)
    for cosine in (found.whitened_cosine, found.cosine):
        assert (np.abs(cosine) <= 1).all()
        np.testing.assert_array_equal(np.diagonal(cosine), 1)
        np.testing.assert_allclose(cosine, cosine.T, atol=1e-9)
    assert (found.leverage > 0).all()
    norms = np.sqrt(found.leverage)
    ratio = norms[None, :] / norms[:, None]
    np.testing.assert_allclose(
        found.P, found.whitened_cosine * ratio, atol=1e-9 * np.abs(found.P).max()
    )


@few
@given(seeds, widths, counts, conditions, st.integers(-60, 60))
def test_p_does_not_change_with_the_scale_of_c(
    seed: int, d_m: int, m: int, condition: float, power: int
) -> None:
    C, keys = second_moment(seed, d_m, condition), keys_of(seed, m, d_m)
    P = p_of(C, keys)
    # A power of two moves no digit of the entries.
    np.testing.assert_allclose(p_of(C * 2.0**power, keys), P, rtol=1e-6, atol=tolerance(C, P))


@few
@given(seeds, widths, counts, st.floats(0, 4).map(lambda power: 10.0**power))
def test_p_does_not_change_with_the_basis(seed: int, d_m: int, m: int, condition: float) -> None:
    C, keys = second_moment(seed, d_m, condition), keys_of(seed, m, d_m)
    rng = np.random.default_rng(seed + 2)
    A = np.linalg.qr(rng.standard_normal((d_m, d_m)))[0] * np.exp(rng.uniform(-2, 2, d_m))
    moved = A @ C @ A.T
    P = p_of(C, keys)
    other = p_of((moved + moved.T) / 2, keys @ A.T)
    assert np.abs(other - P).max() <= tolerance(C, P) + tolerance(moved, P)


@few
@given(seeds, widths, counts, conditions)
def test_a_permutation_of_the_facts_permutes_p(
    seed: int, d_m: int, m: int, condition: float
) -> None:
    C, keys = second_moment(seed, d_m, condition), keys_of(seed, m, d_m)
    order = np.random.default_rng(seed + 3).permutation(m)
    P = p_of(C, keys)
    permuted = p_of(C, keys[order])
    np.testing.assert_allclose(permuted, P[np.ix_(order, order)], atol=tolerance(C, P))


@few
@given(seeds, widths, st.integers(2, 300), st.data())
def test_equal_keys_have_equal_rows_and_columns(
    seed: int, d_m: int, m: int, data: st.DataObject
) -> None:
    C, keys = second_moment(seed, d_m, 10.0), keys_of(seed, m, d_m)
    i, j = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, m - 1))
    keys[j] = keys[i]
    P = p_of(C, keys)
    np.testing.assert_allclose(P[j], P[i], atol=1e-10)
    np.testing.assert_allclose(P[:, j], P[:, i], atol=1e-10)
    assert math.isclose(P[i, j], 1, rel_tol=1e-10)


@few
@given(seeds, widths, counts, st.data())
def test_a_key_of_zeros_is_refused_by_its_fact(
    seed: int, d_m: int, m: int, data: st.DataObject
) -> None:
    C, keys = second_moment(seed, d_m, 10.0), keys_of(seed, m, d_m)
    bad = data.draw(st.integers(0, m - 1))
    keys[bad] = data.draw(st.sampled_from([0.0, np.nan, np.inf]))
    with pytest.raises(KeyOfFactError) as refused:
        p_of(C, keys)
    assert refused.value.index == bad


# Statistics and pairs: entries of few values, so that many are equal


def matrices(most: int = 40) -> st.SearchStrategy[Real]:
    """P of m facts, its diagonal 1, off it numbers that are often equal."""

    def build(drawn: tuple[int, int, int]) -> Real:
        seed, m, values = drawn
        P = np.random.default_rng(seed).integers(-values, values + 1, (m, m)) / (values or 1) / 2
        np.fill_diagonal(P, 1.0)
        return P

    return st.tuples(seeds, st.integers(1, most), st.sampled_from([0, 1, 2, 5, 10**6])).map(build)


def off_diagonal(P: Real) -> Real:
    return np.array([P[i, j] for i in range(len(P)) for j in range(len(P)) if i != j])


@few
@given(matrices())
def test_statistics_are_their_definitions(P: Real) -> None:
    found = layer_statistics(P)
    entries = off_diagonal(P)
    if not entries.size:
        assert all(math.isnan(value) for value in found.values())
        return
    expected: dict[str, Any] = {
        "mean": math.fsum(entries) / len(entries),
        "std": np.std(entries),
        "min": entries.min(),
        "max": entries.max(),
        "largest": np.abs(entries).max(),
        "tail_0_10": sum(abs(p) > 0.10 for p in entries) / len(entries),
        "tail_0_25": sum(abs(p) > 0.25 for p in entries) / len(entries),
        "tail_0_50": sum(abs(p) > 0.50 for p in entries) / len(entries),
    }
    if len(set(entries)) > 1:
        expected |= {
            "skewness": scipy.stats.skew(entries),
            "kurtosis": scipy.stats.kurtosis(entries),
        }
    else:
        assert math.isnan(found["skewness"])
        assert math.isnan(found["kurtosis"])
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-9, abs_tol=1e-9), name


@few
@given(matrices(), seeds)
def test_statistics_do_not_change_with_the_order_of_the_facts(P: Real, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(P))
    before, after = layer_statistics(P), layer_statistics(P[np.ix_(order, order)])
    for name, value in before.items():
        if name not in WHOLE_NUMBERS:
            np.testing.assert_allclose(after[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


@few
@given(matrices(300), st.integers(1, 400), st.booleans())
def test_top_pairs_are_the_first_of_all_sorted(P: Real, k: int, absolute: bool) -> None:
    """Whole ties and ties at the end of the list are in the order of (i, j)."""
    m = len(P)
    size = np.abs(P) if absolute else P
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    wanted = sorted(pairs, key=lambda pair: (-size[pair], pair))[:k]
    found = top_pairs(P, k, absolute)
    assert [(pair.i, pair.j) for pair in found] == wanted
    assert [pair.p for pair in found] == [P[pair] for pair in wanted]


@few
@given(matrices(), st.integers(1, 50), seeds)
def test_top_pairs_are_among_those_considered(P: Real, k: int, seed: int) -> None:
    among = np.random.default_rng(seed).random(P.shape) < 0.5
    found = top_pairs(P, k, among=among)
    assert all(among[pair.i, pair.j] and pair.i != pair.j for pair in found)
    assert len(found) == min(k, int(among.sum() - np.diagonal(among).sum()))
