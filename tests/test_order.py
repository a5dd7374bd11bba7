"""The order of edits against all orders there are."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from kscli.editing.choice import draw_edits, edit_order, sequence_interference


def superposition(seed: int, m: int = 6, d: int = 9) -> tuple[NDArray[np.float64], ...]:
    """P and leverage of m keys of very different length, by their definitions."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, d))
    inverse = np.linalg.inv(A @ A.T + 0.1 * np.eye(d))
    keys = rng.standard_normal((m, d)) * rng.lognormal(0, 1, (m, 1))
    s = keys @ inverse @ keys.T
    return s / np.diag(s)[:, None], np.diag(s).copy()


def cost(P: NDArray[np.float64], order: tuple[int, ...]) -> float:
    total = 0.0
    for place, later in enumerate(order):
        for earlier in order[:place]:
            total += P[later, earlier] ** 2
    return total


@pytest.mark.parametrize("seed", range(5))
def test_norm_is_the_least_of_all_720_orders(seed: int) -> None:
    P, leverage = superposition(seed)
    costs = {order: cost(P, order) for order in permutations(range(6))}
    assert len(costs) == 720
    norm = tuple(edit_order("norm", leverage, range(6), 0))
    assert [leverage[fact] for fact in norm] == sorted(leverage)
    assert costs[norm] == pytest.approx(min(costs.values()), rel=1e-12)
    assert max(costs.values()) > 1.5 * costs[norm]
    for order, expected in costs.items():
        assert sequence_interference(P, order) == pytest.approx(expected, rel=1e-12)


def test_an_order_is_of_the_edits_that_were_named() -> None:
    leverage = np.array([5.0, 1.0, 3.0, 1.0, 3.0, 2.0])
    assert edit_order("given", leverage, (4, 0, 2), 0) == [4, 0, 2]
    # Equal ones stay in the given order.
    assert edit_order("norm", leverage, (4, 3, 0, 2, 1), 0) == [3, 1, 4, 2, 0]
    assert edit_order("norm", leverage, (), 0) == []


def test_a_random_order_is_the_seeds() -> None:
    leverage = np.ones(30)
    first = edit_order("random", leverage, range(30), 1)
    assert first == edit_order("random", leverage, range(30), 1)
    assert first != edit_order("random", leverage, range(30), 2)
    assert sorted(first) == list(range(30)) != first


def test_the_interference_of_one_edit_is_none() -> None:
    P, _ = superposition(0)
    assert sequence_interference(P, [3]) == 0
    # Only the edited facts count, each before the later ones.
    assert sequence_interference(P, [3, 1]) == P[1, 3] ** 2


def test_edits_are_drawn_with_a_seed() -> None:
    drawn = draw_edits(50, 10, 3)
    assert drawn == draw_edits(50, 10, 3) == sorted(set(drawn))
    assert drawn != draw_edits(50, 10, 4)
    assert len(drawn) == 10
    assert drawn[0] >= 0 > drawn[-1] - 50
    assert draw_edits(4, 4, 0) == [0, 1, 2, 3]
