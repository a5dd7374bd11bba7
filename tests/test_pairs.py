"""Top pairs against a sort of all pairs, written out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
from artifact_kit import LAYERS, changed, write_toy
from cli_kit import kscli
from numpy.typing import NDArray

from kscli.analysis.pairs import Pair, pair_rows, strongest_rows, top_pairs
from kscli.artifacts import MatrixName
from kscli.errors import UsageError
from kscli.facts import Fact


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
    assert list(rows) == [
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
    assert len(pair_rows(Stored(np.ones((1, 1)), (fact,), np.array([3])), 7, 20)) == 0


@dataclass
class Layered:
    """A pmatrix file in memory with random P at every layer, and few tokens."""

    m: int = 7
    layers: tuple[int, ...] = (0, 2, 5)
    model: str = "gpt2"
    matrices: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.m)
        self.matrices = {at: rng.integers(-9, 10, (self.m, self.m)) / 10 for at in self.layers}
        self.token_id = rng.integers(0, 3, self.m)
        self.facts = tuple(Fact("{} is", f"s{i}", f"t{i}") for i in range(self.m))

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        assert name == "P"
        return self.matrices[layer]


def naive_strongest(
    pm: Layered, k: int, absolute: bool, distinct: bool
) -> list[tuple[int, int, int, float]]:
    """Layer, i, j and p of every pair at its best layer, sorted; the first of equal layers."""
    found = []
    for i in range(pm.m):
        for j in range(pm.m):
            if i == j or (distinct and pm.token_id[i] == pm.token_id[j]):
                continue
            best = pm.layers[0]
            for layer in pm.layers:
                p, old = pm.matrices[layer][i, j], pm.matrices[best][i, j]
                if (abs(p) > abs(old)) if absolute else (p > old):
                    best = layer
            found.append((best, i, j, float(pm.matrices[best][i, j])))
    found.sort(key=lambda one: (-(abs(one[3]) if absolute else one[3]), one[1], one[2]))
    return found[:k]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 4, 500])
def test_the_strongest_over_layers_are_each_pair_once_at_its_best(
    k: int, absolute: bool, distinct: bool
) -> None:
    pm = Layered()
    rows = strongest_rows(pm, pm.layers, k, absolute, distinct)
    expected = naive_strongest(pm, k, absolute, distinct)
    assert [(row["layer"], row["i"], row["j"], row["p"]) for row in rows] == expected
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))


def test_matrices_that_were_read_are_left_as_they_are() -> None:
    pm = Layered()
    before = {layer: P.copy() for layer, P in pm.matrices.items()}
    strongest_rows(pm, pm.layers, 5)
    assert all((pm.matrices[layer] == before[layer]).all() for layer in pm.layers)


@pytest.mark.parametrize("absolute", [False, True])
def test_pairs_at_one_token_can_be_left_out(absolute: bool) -> None:
    pm = Layered(m=9)
    rows = pair_rows(pm, 2, 1000, absolute, distinct_token=True)
    every = naive(pm.matrices[2], 1000, absolute)
    kept = [pair for pair in every if pm.token_id[pair.i] != pm.token_id[pair.j]]
    assert [(row["i"], row["j"], row["p"]) for row in rows] == kept
    assert 0 < len(kept) < len(every)
    assert not any(row["same_last_token"] for row in rows)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Artifacts of the model `toy`, whose facts 0 and 1 end in one token."""
    write_toy(tmp_path)
    return tmp_path


def topk(toy: Path, *arguments: str) -> str:
    result = kscli("topk", "-m", "toy", "--dir", toy, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_topk_leaves_out_what_shares_a_token(toy: Path) -> None:
    every = json.loads(topk(toy, "-k", "99", "-f", "json"))
    distinct = json.loads(topk(toy, "-k", "99", "-f", "json", "--distinct-token"))
    assert [row["p"] for row in distinct] == [
        row["p"] for row in every if {row["i"], row["j"]} != {0, 1}
    ]
    assert [row["rank"] for row in distinct] == list(range(1, 29))


def test_topk_strongest_takes_all_layers_unless_told(toy: Path) -> None:
    rows = json.loads(topk(toy, "-k", "3", "-f", "json", "--strongest"))
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        P = file["P"][()]
    P[:, np.arange(6), np.arange(6)] = -np.inf
    best = P.max(axis=0)
    assert [row["p"] for row in rows] == np.sort(best.ravel())[::-1][:3].tolist()
    assert all(P[row["layer"], row["i"], row["j"]] == row["p"] for row in rows)
    two = json.loads(topk(toy, "-k", "30", "-f", "json", "--strongest", "--layer", "1,2"))
    assert {row["layer"] for row in two} <= {1, 2}
    one = json.loads(topk(toy, "-k", "4", "-f", "json", "--strongest", "--layer", "1"))
    assert one == json.loads(topk(toy, "-k", "4", "-f", "json", "--layer", "1"))
    title, *table = topk(toy, "-k", "1", "--strongest", "--layer", "1").splitlines()
    assert title.startswith("The largest p at its strongest layer: ")
    assert table[0].split()[0] == "layer"


def test_topk_without_options_is_layer_0(toy: Path) -> None:
    rows = json.loads(topk(toy, "-f", "json"))
    assert {row["layer"] for row in rows} == {LAYERS[0]}


def test_topk_in_latex_has_a_pair_in_two_lines_as_the_paper(toy: Path) -> None:
    lines = topk(toy, "-k", "2", "-f", "latex").splitlines()
    rows = json.loads(topk(toy, "-k", "2", "-f", "json"))
    assert lines[0] == r"\begin{tabular}{rll}"
    assert lines[2] == r"  p(i, j) & item i \& j & same token \\"
    for at, row in enumerate(rows):
        shares = "yes" if row["same_last_token"] else ""
        i, j = row["i"], row["j"]
        first = f"The [Größe {i}] of place {i} is [target {i}]."
        second = f"The [Größe {j}] of place {j} is [target {j}]."
        assert lines[4 + 2 * at] == rf"  {row['p']:.2f} & {first} & {shares} \\"
        assert lines[5 + 2 * at] == rf"   & {second} &  \\"
    several = topk(toy, "-k", "1", "-f", "latex", "--layer", "0,1").splitlines()
    assert several[2].startswith("  layer & p(i, j) & ")
    assert several[6].startswith("  1 & ")


def test_topk_says_when_every_pair_shares_a_token(toy: Path) -> None:
    with changed(toy / "toy" / "pmatrix.h5") as file:
        file["token_id"][...] = 3
    result = kscli("topk", "-m", "toy", "--dir", toy, "--distinct-token", "-f", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == []
    assert "leaves no pair" in " ".join(result.stderr.split())
    marked = json.loads(topk(toy, "-f", "json"))
    assert all(row["same_last_token"] for row in marked)
