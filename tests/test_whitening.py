"""Whitening and P against explicit inverses, on matrices whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kscli.errors import NumericsError
from kscli.pmatrix import KeyOfFactError, superposition
from kscli.whitening import whitening

RNG = np.random.default_rng(0)
D = 40


def second_moment(n: int = 4000, scale: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    keys = RNG.standard_normal((n, D)) @ RNG.standard_normal((D, D))
    if scale is not None:
        keys = keys * scale
    return keys.T @ keys / n


def naive_p(C: NDArray[np.float64], keys: NDArray[np.float64]) -> NDArray[np.float64]:
    G = keys @ np.linalg.inv(C) @ keys.T
    return G / np.diagonal(G)[:, None]


def test_every_matrix_is_its_definition() -> None:
    C = second_moment()
    keys = RNG.standard_normal((9, D))
    G = keys @ np.linalg.inv(C) @ keys.T
    norms = np.sqrt(np.diagonal(G))
    Q = keys @ keys.T
    lengths = np.linalg.norm(keys, axis=1)

    result = superposition(C.copy(), 4000, keys)

    np.testing.assert_allclose(result.P, naive_p(C, keys), atol=1e-10)
    np.testing.assert_allclose(result.whitened_cosine, G / np.outer(norms, norms), atol=1e-10)
    np.testing.assert_allclose(result.cosine, Q / np.outer(lengths, lengths), atol=1e-12)
    np.testing.assert_allclose(result.Q, Q, atol=1e-12)
    np.testing.assert_allclose(result.leverage, np.diagonal(G), rtol=1e-9)
    assert (np.diagonal(result.P) == 1).all()
    assert result.dead_coordinates == 0


def test_p_does_not_depend_on_the_scale_of_coordinates() -> None:
    """P is invariant to k -> S k; a condition number of 1e16 from S alone costs nothing."""
    scale = np.logspace(-4, 4, D)
    C = second_moment()
    keys = RNG.standard_normal((6, D))
    plain = superposition(C.copy(), 4000, keys)
    scaled = superposition(C * np.outer(scale, scale), 4000, keys * scale)
    np.testing.assert_allclose(scaled.P, plain.P, atol=1e-9)
    assert scaled.condition == pytest.approx(plain.condition, rel=1e-6)


def test_the_condition_is_that_of_c_scaled_to_unit_diagonal() -> None:
    C = second_moment(scale=np.logspace(0, 3, D))
    s = 1 / np.sqrt(np.diagonal(C))
    exact = np.linalg.cond(C * np.outer(s, s), 1)
    estimate = whitening(C.copy(), 4000).condition
    assert exact / 3 < estimate < exact * 1.001


def test_whitening_a_block_larger_than_one_stripe() -> None:
    """C is scaled in stripes of rows; more than one of them, and a ragged last one."""
    d = 1100
    keys = RNG.standard_normal((3 * d, d))
    C = keys.T @ keys / len(keys)
    facts = RNG.standard_normal((5, d))
    result = superposition(C.copy(), len(keys), facts)
    np.testing.assert_allclose(result.P, naive_p(C, facts), atol=1e-9)


def test_dead_coordinates_are_left_out_and_counted() -> None:
    C = second_moment()
    live = np.setdiff1d(np.arange(D), [0, 7, D - 1])
    dead = np.ones((D, D), dtype=bool)
    dead[np.ix_(live, live)] = False
    C[dead] = 0
    keys = RNG.standard_normal((5, D))
    keys[:, [0, 7, D - 1]] = 0
    result = superposition(C.copy(), 4000, keys)
    np.testing.assert_allclose(result.P, naive_p(C[np.ix_(live, live)], keys[:, live]), atol=1e-10)
    assert result.dead_coordinates == 3


def test_a_key_outside_the_live_coordinates_is_named() -> None:
    C = second_moment()
    C[3, :] = C[:, 3] = 0
    keys = RNG.standard_normal((5, D))
    keys[[0, 1, 3, 4], 3] = 0
    with pytest.raises(KeyOfFactError, match="key of fact 2 is not 0 in one of 1 coordinates"):
        superposition(C.copy(), 4000, keys)
    ridged = superposition(C.copy(), 4000, keys, ridge=1e-2)
    exact = naive_p(C + 1e-2 * np.trace(C) / D * np.eye(D), keys)
    np.testing.assert_allclose(ridged.P, exact, atol=1e-8)


def test_the_ridge_is_relative_to_the_mean_diagonal() -> None:
    C = second_moment()
    keys = RNG.standard_normal((5, D))
    result = superposition(C.copy(), 4000, keys, ridge=0.3)
    exact = naive_p(C + 0.3 * np.trace(C) / D * np.eye(D), keys)
    np.testing.assert_allclose(result.P, exact, atol=1e-10)


def test_fewer_tokens_than_dimensions_are_refused_and_a_ridge_helps() -> None:
    few = RNG.standard_normal((D - 1, D))
    C = few.T @ few / len(few)
    keys = RNG.standard_normal((4, D))
    with pytest.raises(NumericsError, match=r"39 tokens and has 40 dimensions.*--ridge"):
        superposition(C.copy(), D - 1, keys)
    result = superposition(C.copy(), D - 1, keys, ridge=1e-2)
    np.testing.assert_allclose(
        result.P, naive_p(C + 1e-2 * np.trace(C) / D * np.eye(D), keys), atol=1e-8
    )


def test_a_singular_c_is_refused_though_its_tokens_were_many() -> None:
    few = RNG.standard_normal((10, D))
    C = few.T @ few
    with pytest.raises(NumericsError, match=r"not positive definite.*--ridge"):
        whitening(C, 10_000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(2, 2), (2, 5)])
def test_a_c_that_is_not_finite_is_refused(value: float, place: tuple[int, int]) -> None:
    C = second_moment()
    C[place] = C[place[::-1]] = value
    with pytest.raises(NumericsError, match="NaN"):
        whitening(C, 4000)


@pytest.mark.parametrize(("value", "what"), [(0.0, "is 0"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_a_key_without_p_is_named(value: float, what: str) -> None:
    keys = RNG.standard_normal((4, D))
    keys[2] = value
    with pytest.raises(KeyOfFactError, match=f"fact 2 .*{what}"):
        superposition(second_moment(), 4000, keys)


def test_a_repeated_fact_has_p_one_twice() -> None:
    keys = RNG.standard_normal((3, D))
    keys[2] = keys[0]
    P = superposition(second_moment(), 4000, keys).P
    assert P[0, 2] == pytest.approx(1, abs=1e-12)
    assert P[2, 0] == pytest.approx(1, abs=1e-12)


def test_one_fact_alone() -> None:
    result = superposition(second_moment(), 4000, RNG.standard_normal((1, D)))
    assert result.P.tolist() == [[1.0]]
