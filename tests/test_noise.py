"""One P against another from disjoint text: the measures, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from artifact_kit import changed, write_cov, write_keys
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray

from kscli.analysis.noise import layer_noise, pairs_above, require_disjoint
from kscli.artifacts import CovarianceFile, Existing, KeysFile, PMatrixFile
from kscli.errors import ArtifactError
from kscli.pmatrix import write_pmatrix

Array = NDArray[np.float64]
LAYERS = (0, 1, 2)


def noisy(m: int, size: float, seed: int) -> tuple[Array, Array, Array]:
    """A true P, and two with independent Gaussian noise of standard deviation `size`."""
    rng = np.random.default_rng(seed)
    truth = 0.05 * rng.standard_t(3, (m, m))
    measured = [truth + size * rng.standard_normal((m, m)) for _ in range(2)]
    for P in (truth, *measured):
        np.fill_diagonal(P, 1)
    return truth, measured[0], measured[1]


def test_the_measures_are_their_definitions() -> None:
    m, k = 12, 10
    _, P, other = noisy(m, 0.02, 0)
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    a, b = (np.array([M[pair] for pair in pairs]) for M in (P, other))
    found = layer_noise(P, other, k)
    assert found.rms_difference == pytest.approx(math.sqrt(np.mean((a - b) ** 2)))
    assert found.worst_difference == np.abs(a - b).max()
    assert (found.worst_i, found.worst_j) == pairs[int(np.abs(a - b).argmax())]
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found.noise_share == pytest.approx((a - b).var() / (a.var() + b.var()))
    top = [set(sorted(pairs, key=lambda pair: -M[pair])[:k]) for M in (P, other)]
    assert found.top_overlap == len(top[0] & top[1]) / k
    assert found.k == k
    rms = 3 * found.rms_difference
    above = [
        (i, j)
        for i, j in pairs
        if min(abs(P[i, j]), abs(other[i, j])) > rms and P[i, j] * other[i, j] > 0
    ]
    assert found.above_noise == len(above) / len(pairs)
    listed = pairs_above(P, other)
    assert {(pair.i, pair.j) for pair in listed} == set(above)
    assert [pair.p for pair in listed] == sorted((P[p] for p in above), key=abs, reverse=True)


def test_the_noise_that_was_put_in_is_found() -> None:
    truth, P, other = noisy(150, 0.03, 1)
    found = layer_noise(P, other, 20)
    assert found.rms_difference / math.sqrt(2) == pytest.approx(0.03, rel=0.02)
    variance = truth[~np.eye(150, dtype=bool)].var()
    assert found.noise_share == pytest.approx(0.03**2 / (variance + 0.03**2), rel=0.05)


def test_of_noise_alone_nothing_stands_above_it() -> None:
    rng = np.random.default_rng(2)
    P, other = rng.standard_normal((2, 200, 200))
    assert pairs_above(P, other) == []
    assert layer_noise(P, other, 20).noise_share == pytest.approx(1, abs=0.02)


def test_equal_matrices_differ_in_nothing() -> None:
    _, P, _ = noisy(20, 0.1, 3)
    found = layer_noise(P, P, 20)
    assert found.rms_difference == found.worst_difference == found.noise_share == 0
    assert found.correlation == pytest.approx(1)
    assert found.top_overlap == found.above_noise == 1


def test_a_shift_of_all_entries_is_no_part_of_the_variance() -> None:
    P = np.array([[1, 0.10], [0.11, 1]])
    found = layer_noise(P, P + 0.3, 20)
    assert found.rms_difference == pytest.approx(0.3)
    assert found.noise_share == pytest.approx(0, abs=1e-12)


def test_one_fact_has_no_noise_and_two_equal_entries_no_correlation() -> None:
    found = layer_noise(np.ones((1, 1)), np.ones((1, 1)), 20)
    assert math.isnan(found.rms_difference)
    assert found.worst_i is None
    assert pairs_above(np.eye(2), np.eye(2)) == []
    assert math.isnan(layer_noise(np.ones((2, 2)), np.ones((2, 2)), 20).correlation)


def pmatrix(
    folder: Path, name: str, *, seed: int = 0, keys_seed: int = 1, shard: str = "", **changes: float
) -> Path:
    """A pmatrix file of the toy model from C of the corpus `seed`."""
    cov, keys, path = (folder / f"{name}.{kind}.h5" for kind in ("cov", "keys", "pmatrix"))
    write_cov(cov, seed)
    write_keys(keys, np.random.default_rng(keys_seed).standard_normal((3, 6, 12)))
    with CovarianceFile(cov) as C, KeysFile(keys) as K:
        layers = changes.pop("layers", LAYERS)
        write_pmatrix(C, K, path, layers=layers, existing=Existing.FORCE, **changes)
    with changed(path) as file:
        file.attrs["shard"] = shard
    return path


def test_one_corpus_and_another_are_compared(tmp_path: Path) -> None:
    a, b = pmatrix(tmp_path, "a"), pmatrix(tmp_path, "b", seed=1)
    result = kscli("stats", "--pmatrix", a, "--against", b, "-k", "4", "-f", "json")
    assert result.exit_code == 0, result.stderr
    assert "no document in common was not checked" in " ".join(result.stderr.split())
    rows = json.loads(result.stdout)
    with PMatrixFile(a) as pm, PMatrixFile(b) as other:
        assert [row["layer"] for row in rows] == [0, 1, 2]
        for row in rows:
            noise = layer_noise(pm.matrix("P", row["layer"]), other.matrix("P", row["layer"]), 4)
            assert row == {"model": "toy", "layer": row["layer"], "m": 6} | vars(noise)
    table = kscli("stats", "--pmatrix", a, "--against", b).stdout
    assert f"{rows[0]['rms_difference']:.4f}" in table
    assert not list(tmp_path.glob("**/stats.h5"))


def test_the_pairs_above_the_noise_are_listed_with_their_facts(tmp_path: Path) -> None:
    a, b = pmatrix(tmp_path, "a"), pmatrix(tmp_path, "b", seed=1)
    arguments = ("stats", "--pmatrix", a, "--against", b, "--above")
    rows = json.loads(kscli(*arguments, "-f", "json").stdout)
    with PMatrixFile(a) as pm, PMatrixFile(b) as other:
        expected = [
            (layer, rank, pair.i, pair.j, pair.p, other.matrix("P", layer)[pair.i, pair.j])
            for layer in LAYERS
            for rank, pair in enumerate(
                pairs_above(pm.matrix("P", layer), other.matrix("P", layer)), start=1
            )
        ]
    assert expected
    fields = ("layer", "rank", "i", "j", "p", "p_other")
    assert [tuple(row[name] for name in fields) for row in rows] == expected
    assert rows[0]["subject_i"] == f"Größe {rows[0]['i']}"
    assert rows[0]["same_last_token"] is ({rows[0]["i"], rows[0]["j"]} == {0, 1})
    table = kscli(*arguments).stdout
    assert f"[Größe {rows[0]['j']}]" in table


def test_shards_of_one_corpus_are_disjoint(tmp_path: Path) -> None:
    for shards in (("0/2", "1/2"), ("2/3", "0/3")):
        a, b = (pmatrix(tmp_path, s[0], seed=int(s[0]), shard=s) for s in shards)
        for path in (a, b):
            with changed(path) as file:
                file.attrs["corpus_identity"] = "one corpus"
        with PMatrixFile(a) as pm, PMatrixFile(b) as other:
            assert require_disjoint(pm, other, LAYERS) == []


@pytest.mark.parametrize("shards", [("", ""), ("0/2", ""), ("0/2", "0/2"), ("0/2", "1/3")])
def test_text_that_overlaps_is_refused(tmp_path: Path, shards: tuple[str, str]) -> None:
    a, b = (pmatrix(tmp_path, name, shard=s) for name, s in zip("ab", shards, strict=True))
    result = kscli("stats", "--pmatrix", a, "--against", b)
    assert result.exit_code == 1
    assert "same corpus (toy text), so their text overlaps" in one_sentence(result.stderr)


def test_a_file_against_itself_is_refused_even_where_its_corpus_is_unknown(tmp_path: Path) -> None:
    path = pmatrix(tmp_path, "a")
    with changed(path) as file:
        file.attrs["corpus_identity"] = "unknown"
    with (
        PMatrixFile(path) as pm,
        PMatrixFile(path) as other,
        pytest.raises(ArtifactError, match="overlaps"),
    ):
        require_disjoint(pm, other, LAYERS)


def test_one_text_under_two_names_is_refused(tmp_path: Path) -> None:
    a, b = pmatrix(tmp_path, "a"), pmatrix(tmp_path, "b")
    with changed(b) as file:
        file.attrs["corpus_identity"] = "a copy"
        file.attrs["inputs"] = json.dumps(json.loads(file.attrs["inputs"]) | {"cov": "other"})
    result = kscli("stats", "--pmatrix", a, "--against", b)
    assert result.exit_code == 1
    assert "one and the same C" in one_sentence(result.stderr)


def test_an_imported_corpus_is_compared_with_a_warning(tmp_path: Path) -> None:
    a, b = pmatrix(tmp_path, "a"), pmatrix(tmp_path, "b", seed=1)
    with changed(b) as file:
        file.attrs["corpus_identity"] = "unknown"
    with PMatrixFile(a) as pm, PMatrixFile(b) as other:
        (warning,) = require_disjoint(pm, other, LAYERS)
    assert "could not be checked" in warning


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys_seed": 2}, "different keys"),
        ({"layers": (0, 1)}, "has no layer 2"),
        ({"ridge": 0.1}, "different ridges (0.0 and 0.1)"),
    ],
)
def test_what_differs_in_more_than_the_corpus_is_refused(
    tmp_path: Path, changes: dict[str, float], said: str
) -> None:
    a, b = pmatrix(tmp_path, "a"), pmatrix(tmp_path, "b", seed=1, **changes)
    result = kscli("stats", "--pmatrix", a, "--against", b)
    assert result.exit_code == 1
    assert said in one_sentence(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--above"], "--above needs --against"),
        (["--against", "b", "--scaling"], "name one"),
        (["--against", "b", "--output", "x.h5"], "--output"),
        (["--against", "b", "--pmatrix", "c"], "one model"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    arguments: list[str], said: str
) -> None:
    result = kscli("stats", "--pmatrix", "a", *arguments)
    assert result.exit_code == 2
    assert said in one_sentence(result.stderr)


def test_against_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    result = kscli("stats", "--pmatrix", pmatrix(tmp_path, "a"), "--against", tmp_path / "no.h5")
    assert result.exit_code == 1
    assert "no.h5 does not exist" in one_sentence(result.stderr)
