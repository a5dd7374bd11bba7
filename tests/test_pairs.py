"""Top pairs against a sort of all pairs, written out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from kscli.errors import UsageError
from kscli.facts import Fact
from kscli.pairs import Pair, pair_rows, top_pairs
from kscli.statistics import MatrixName


@dataclass
class Stored:
    """A pmatrix file in memory: `P` at layer 7, other values elsewhere."""

    P: NDArray[np.float64]
    facts: tuple[Fact, ...]
    token_id: NDArray[np.int64]
    model: str = "gpt2"
    layers: tuple[int, ...] = (0, 7)

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        return self.P if (name, layer) == ("P", 7) else np.full_like(self.P, 99.0)


def naive(P: NDArray[np.float64], k: int, absolute: bool) -> list[Pair]:
    m = len(P)
    pairs = [Pair(i, j, float(P[i, j])) for i in range(m) for j in range(m) if i != j]
    pairs.sort(key=lambda pair: (-(abs(pair.p) if absolute else pair.p), pair.i, pair.j))
    return pairs[:k]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20, 90, 1000])
def test_top_pairs_are_the_first_of_all_pairs_sorted(k: int, absolute: bool) -> None:
    P = np.random.default_rng(k).standard_normal((10, 10))
    assert top_pairs(P, k, absolute) == naive(P, k, absolute)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", range(1, 32))
def test_ties_come_in_the_order_of_the_pair_wherever_the_cut_falls(k: int, absolute: bool) -> None:
    P = np.random.default_rng(1).integers(-2, 3, (6, 6)) / 2
    assert top_pairs(P, k, absolute) == naive(P, k, absolute)


def test_the_diagonal_is_no_pair() -> None:
    P = np.full((4, 4), -0.5) + 1.5 * np.eye(4)
    assert all(pair.i != pair.j and pair.p == -0.5 for pair in top_pairs(P, 100))
    assert len(top_pairs(P, 100)) == 12


def test_p_keeps_its_sign_where_magnitude_ranks() -> None:
    P = np.array([[1.0, 0.3], [-0.9, 1.0]])
    assert top_pairs(P, 1, absolute=True) == [Pair(1, 0, -0.9)]
    assert top_pairs(P, 1) == [Pair(0, 1, 0.3)]


def test_one_fact_has_no_pairs() -> None:
    assert top_pairs(np.ones((1, 1)), 20) == []


@pytest.mark.parametrize("k", [0, -3])
def test_fewer_than_one_pair_is_wrong_usage(k: int) -> None:
    with pytest.raises(UsageError, match=f"{k} pairs"):
        top_pairs(np.eye(3), k)


def test_rows_hold_both_facts_and_say_whether_they_share_the_token() -> None:
    facts = (
        Fact("The mother tongue of {} is", "Patrick Rambaud", "French"),
        Fact("{} is made by", "Windows 7", "Microsoft"),
        Fact("{} speaks", "Pierre Trabaud", "French"),
    )
    P = np.array([[1.0, 0.1, 0.97], [0.2, 1.0, 0.0], [-0.1, 0.05, 1.0]])
    stored = Stored(P, facts, np.array([11, 22, 11]))
    rows = pair_rows(stored, 7, 2)
    assert rows == [
        {
            "model": "gpt2",
            "rank": 1,
            "layer": 7,
            "p": 0.97,
            "i": 0,
            "j": 2,
            "subject_i": "Patrick Rambaud",
            "prompt_i": "The mother tongue of {} is",
            "target_i": "French",
            "subject_j": "Pierre Trabaud",
            "prompt_j": "{} speaks",
            "target_j": "French",
            "same_last_token": True,
        },
        {
            "model": "gpt2",
            "rank": 2,
            "layer": 7,
            "p": 0.2,
            "i": 1,
            "j": 0,
            "subject_i": "Windows 7",
            "prompt_i": "{} is made by",
            "target_i": "Microsoft",
            "subject_j": "Patrick Rambaud",
            "prompt_j": "The mother tongue of {} is",
            "target_j": "French",
            "same_last_token": False,
        },
    ]
    plain = {int, float, str, bool}
    assert all(type(value) in plain for row in rows for value in row.values())


def test_rows_of_one_fact_are_none() -> None:
    fact = Fact("{} is", "Rome", "old")
    assert pair_rows(Stored(np.ones((1, 1)), (fact,), np.array([3])), 7, 20) == []
