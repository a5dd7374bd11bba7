"""Statistics of P against SciPy and against sums written out."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from artifact_kit import changed, write_toy
from cli_kit import kscli
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling, resample_counts
from kscli.analysis.statistics import (
    STATISTICS,
    caution,
    compute_statistics,
    describe,
    field_names,
    layer_statistics,
    off_diagonal,
    say_caution,
)
from kscli.analysis.stats_file import StatisticsFile, statistics_of
from kscli.artifacts import Existing, MatrixName, PMatrixFile
from kscli.errors import ArtifactError
from kscli.facts import Fact
from kscli.reporter import Reporter

FIELDS = ["mean", "std", "skewness", "kurtosis", "min", "max", "largest"]
TAILS = {"tail_0_10": 0.1, "tail_0_25": 0.25, "tail_0_50": 0.5}


@dataclass
class Stored:
    """A pmatrix file in memory that notes what is read of it."""

    model: str
    matrices: dict[int, NDArray[np.float64]]
    token_id: NDArray[np.int64] = field(default_factory=lambda: np.arange(16))
    read: list[tuple[str, int]] = field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.matrices)

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        self.read.append((name, layer))
        return self.matrices[layer]


def heavy_tailed(m: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    P = 0.03 * rng.standard_t(2.5, (m, m)) + 0.02
    np.fill_diagonal(P, 1)
    return P


def naive(P: NDArray[np.float64]) -> dict[str, float]:
    """The definitions, entry by entry."""
    m = len(P)
    entries = [float(P[i, j]) for i in range(m) for j in range(m) if i != j]
    n = len(entries)
    mean = math.fsum(entries) / n
    moments = {k: math.fsum((p - mean) ** k for p in entries) / n for k in (2, 3, 4)}
    return {
        "mean": mean,
        "std": math.sqrt(moments[2]),
        "skewness": moments[3] / moments[2] ** 1.5,
        "kurtosis": moments[4] / moments[2] ** 2 - 3,
        "min": min(entries),
        "max": max(entries),
        "largest": max(map(abs, entries)),
        **{name: sum(abs(p) > at for p in entries) / n for name, at in TAILS.items()},
    }


@pytest.mark.parametrize("m", [2, 3, 17, 64])
def test_every_statistic_is_its_definition(m: int) -> None:
    P = heavy_tailed(m)
    computed, expected = layer_statistics(P), naive(P)
    for name in [*FIELDS, *TAILS]:
        assert computed[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name


@pytest.mark.parametrize("seed", range(4))
def test_moments_are_scipys_defaults(seed: int) -> None:
    P = heavy_tailed(128, seed)
    entries = P[~np.eye(128, dtype=bool)]
    computed = layer_statistics(P)
    assert computed["kurtosis"] == pytest.approx(scipy.stats.kurtosis(entries), abs=1e-9)
    assert computed["skewness"] == pytest.approx(scipy.stats.skew(entries), abs=1e-9)
    assert computed["std"] == pytest.approx(np.std(entries), rel=1e-14)


def test_off_diagonal_goes_row_by_row_and_is_a_copy() -> None:
    P = np.arange(9.0).reshape(3, 3)
    entries = off_diagonal(P)
    np.testing.assert_array_equal(entries, [1, 2, 3, 5, 6, 7])
    entries[:] = 0
    assert P[0, 1] == 1
    assert off_diagonal(P.astype(np.float32)).dtype == np.float64


def test_one_fact_has_no_pairs_and_so_no_statistics() -> None:
    computed = layer_statistics(np.ones((1, 1)))
    assert list(computed) == list(STATISTICS)
    assert all(math.isnan(value) for value in computed.values())


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3])
def test_entries_that_do_not_vary_have_no_shape(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        computed = layer_statistics(np.full((8, 8), value))
    assert computed["mean"] == pytest.approx(value)
    assert computed["std"] == pytest.approx(0, abs=1e-15)
    assert math.isnan(computed["skewness"])
    assert math.isnan(computed["kurtosis"])


def test_entries_that_vary_by_rounding_alone_have_no_shape() -> None:
    P = np.ones((8, 8))
    P[0, 1] = np.nextafter(np.float32(1), np.float32(2))  # as pmatrix.h5 holds P
    assert math.isnan(layer_statistics(P)["kurtosis"])


def test_two_entries_have_the_least_kurtosis_there_is() -> None:
    computed = layer_statistics(np.array([[1.0, 0.2], [0.4, 1.0]]))
    assert computed["kurtosis"] == pytest.approx(-2)
    assert computed["skewness"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_shape_depends_on_neither_scale_nor_shift(scale: float, shift: float) -> None:
    P = heavy_tailed(32)
    shape, moved = layer_statistics(P), layer_statistics((P + shift) * scale)
    for name in ("skewness", "kurtosis"):
        assert moved[name] == pytest.approx(shape[name], rel=1e-8)


def test_tail_shares_count_what_lies_strictly_beyond() -> None:
    P = np.eye(3)
    P[0, 1], P[1, 0], P[0, 2], P[2, 0] = 0.5, -0.25, 0.1, -1.4
    computed = layer_statistics(P)
    assert [computed[name] for name in TAILS] == pytest.approx([3 / 6, 2 / 6, 1 / 6])


@pytest.mark.parametrize("level", [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
def test_quantiles_are_of_the_entries(level: float) -> None:
    P = heavy_tailed(40)
    entries = np.sort(P[~np.eye(40, dtype=bool)])
    found = layer_statistics(P)[f"quantile_0_{round(100 * level):02}"]
    at = level * (len(entries) - 1)
    low = entries[int(at)]
    assert found == pytest.approx(low + (at - int(at)) * (entries[int(at) + 1] - low))


def test_a_description_has_every_statistic_with_and_without_pairs_of_one_token() -> None:
    m = 30
    P, token = heavy_tailed(m), np.arange(m) // 3
    described = describe(P, token, resample_counts(m, 200))
    apart = token[:, None] != token
    entries = P[apart]
    assert list(described) == field_names()
    for name, value in layer_statistics(P).items():
        assert described[name] == value
    assert described["kurtosis_distinct"] == pytest.approx(scipy.stats.kurtosis(entries), abs=1e-9)
    assert described["mean_distinct"] == pytest.approx(entries.mean())
    assert described["tail_0_10_distinct"] == np.mean(np.abs(entries) > 0.1)
    for name in list(described):
        if "same_token" not in name and "_distinct" not in name:
            base, end = re.fullmatch(r"(.*?)(_low|_high|_error)?", name).groups()
            assert f"{base}_distinct{end or ''}" in described


@pytest.mark.parametrize("suffix", ["", "_distinct"])
def test_intervals_are_of_facts_drawn_again(suffix: str) -> None:
    m = 30
    P, token, counts = heavy_tailed(m), np.arange(m) // 3, resample_counts(m, 200)
    described = describe(P, token, counts)
    pairs = token[:, None] != token if suffix else ~np.eye(m, dtype=bool)
    kurtosis, share = [], []
    for w in counts:
        facts = np.repeat(np.arange(m), w)
        entries = P[np.ix_(facts, facts)][pairs[np.ix_(facts, facts)]]
        kurtosis.append(scipy.stats.kurtosis(entries))
        share.append(np.mean(np.abs(entries) > 0.1))
    for name, values in (("kurtosis", kurtosis), ("tail_0_10", share)):
        ends = described[f"{name}{suffix}_low"], described[f"{name}{suffix}_high"]
        assert ends == pytest.approx(np.quantile(values, [0.025, 0.975]))
        assert ends[0] < described[name + suffix] < ends[1]


def test_the_share_of_pairs_of_one_token_in_all_pairs_and_in_the_tails() -> None:
    P = np.full((4, 4), 0.05) + 0.95 * np.eye(4)
    P[0, 1] = P[1, 0] = 0.6
    P[2, 3] = 0.3
    described = describe(P, np.array([5, 5, 6, 7]), resample_counts(4, 100))
    assert described["same_token"] == pytest.approx(2 / 12)
    assert described["same_token_tail_0_10"] == pytest.approx(2 / 3)
    assert described["same_token_tail_0_50"] == 1.0
    assert math.isnan(
        describe(P / 10, np.arange(4), resample_counts(4, 100))["same_token_tail_0_25"]
    )


def test_facts_that_all_share_a_token_leave_nothing_without_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = describe(heavy_tailed(20), np.zeros(20, int), resample_counts(20))
    distinct = [value for name, value in described.items() if "_distinct" in name]
    assert all(math.isnan(value) for value in distinct)
    assert described["same_token"] == 1.0
    assert described["kurtosis_low"] < described["kurtosis"] < described["kurtosis_high"]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_few_facts_are_described_without_a_warning(m: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = describe(heavy_tailed(m), np.arange(m), resample_counts(m))
    assert list(described) == field_names()
    assert math.isnan(described["mean"]) is (m == 1)
    assert math.isnan(described["kurtosis_low"]) is (m < 4)


def test_keys_that_do_not_vary_are_described_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = describe(np.ones((20, 20)), np.arange(20), resample_counts(20))
    assert described["mean"] == described["mean_low"] == described["mean_high"] == 1
    assert math.isnan(described["kurtosis"])
    assert math.isnan(described["kurtosis_low"])
    assert math.isnan(described["top_fact"])


def test_a_fact_repeated_word_for_word_is_a_pair_of_p_1() -> None:
    P = heavy_tailed(40)
    P[21], P[:, 21] = P[20], P[:, 20]
    P[20, 21] = P[21, 20] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        described = describe(P, np.arange(40), resample_counts(40))
    assert described["kurtosis"] == pytest.approx(naive(P)["kurtosis"])
    assert (described["top_pair_i"], described["top_pair_j"]) == (20, 21)
    assert described["fourth_moment_pairs"] == 1


def test_compute_statistics_reads_p_once_a_layer() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16, 0), 3: heavy_tailed(16, 1)})
    computed = compute_statistics(stored)
    assert stored.read == [("P", 0), ("P", 3)]
    assert (computed.model, computed.layers, computed.m) == ("gpt2", (0, 3), 16)
    for at, layer in enumerate(computed.layers):
        expected = describe(stored.matrices[layer], stored.token_id, resample_counts(16))
        found = {name: values[at] for name, values in computed.values.items()}
        np.testing.assert_equal(found, expected)


def test_compute_statistics_of_chosen_layers_and_draws() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16, 0), 3: heavy_tailed(16, 1)})
    default = compute_statistics(stored, [3])
    assert default.layers == (3,)
    assert stored.read == [("P", 3)]
    other = compute_statistics(stored, [3], Resampling(repeats=200, seed=5))
    assert other.values["kurtosis"] == default.values["kurtosis"]
    assert other.values["kurtosis_low"] != default.values["kurtosis_low"]


def test_rows_are_flat_records_with_the_printed_fields() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16), 5: np.full((16, 16), 0.2)})
    rows = compute_statistics(stored).rows()
    assert [list(row) for row in rows] == [["model", "layer", "m", *field_names()]] * 2
    assert [row["layer"] for row in rows] == [0, 5]
    assert rows[0]["kurtosis"] == layer_statistics(stored.matrices[0])["kurtosis"]
    assert all(type(rows[0][name]) is float for name in STATISTICS)
    assert type(rows[0]["top_fact"]) is type(rows[0]["top_pair_i_distinct"]) is int
    assert math.isnan(rows[1]["kurtosis"])
    assert math.isnan(rows[1]["top_fact"])


def test_layers_where_a_few_pairs_carry_the_fourth_moment_are_named() -> None:
    facts = [Fact("{} is", f"subject {i}", "there") for i in range(64)]
    broad = np.random.default_rng(0).standard_normal((64, 64))
    bound = 0.01 * broad
    bound[7, 9] = bound[9, 7] = 1.0
    stored = Stored("gpt2", {0: broad, 1: bound, 2: bound}, np.arange(64))
    said = caution(compute_statistics(stored), facts)
    assert said is not None
    assert "gpt2: at layers 1-2, few pairs of facts carry half of the fourth moment" in said
    assert "(1 at layer 1, the strongest 'subject 7' with 'subject 9')" in said
    assert caution(compute_statistics(stored, [0]), facts) is None
    alone = caution(compute_statistics(stored, [1]), facts)
    assert alone is not None
    assert "gpt2: at layer 1, 1 pair of facts carries half of the fourth moment (the stron" in alone
    few = Stored("gpt2", {0: bound[5:12, 5:12]}, np.arange(7))
    assert caution(compute_statistics(few), facts) is None
    facts[7], facts[9] = Fact("{} is in", "Rome", "Italy"), Fact("{} was in", "Rome", "Italy")
    said = caution(compute_statistics(stored), facts)
    assert said is not None
    assert "the strongest 'Rome is in' with 'Rome was in')" in said
    facts[9] = facts[7]
    said = caution(compute_statistics(stored), facts)
    assert said is not None
    assert "the strongest 'Rome is in', which is there twice)" in said
    for P in (np.ones((64, 64)), heavy_tailed(2)):
        light = Stored("gpt2", {0: P}, np.arange(len(P)))
        assert caution(compute_statistics(light), facts) is None


@pytest.mark.parametrize(
    ("model", "count", "warned"), [("tiny", 128, False), ("tiny", 64, True), ("gpt2", 128, True)]
)
def test_few_pairs_are_a_warning_where_more_facts_can_be_taken(
    model: str, count: int, warned: bool
) -> None:
    class Told(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.warnings: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    facts = [Fact("{} is", f"subject {i}", "there") for i in range(count)]
    bound = 0.01 * np.random.default_rng(0).standard_normal((count, count))
    bound[7, 9] = bound[9, 7] = 1.0
    told = Told()
    found = compute_statistics(Stored(model, {0: bound}, np.arange(count)))
    say_caution(found, facts, told)
    (said,) = told.warnings if warned else told.notes
    assert len(told.notes + told.warnings) == 1
    assert ("take more facts (--count)" in said) is warned


def test_the_stats_file_gives_back_what_was_computed(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    path, draws = place / "stats.h5", Resampling(200, 3)
    with PMatrixFile(place / "pmatrix.h5") as pm:
        computed = compute_statistics(pm, pm.layers, draws)
        statistics_of(pm, pm.layers, path, draws, existing=Existing.REFUSE)
        with StatisticsFile(path) as file:
            stored = file.statistics()
            assert file.about.seed == 3
        assert stored.rows()[0].keys() == computed.rows()[0].keys()
        np.testing.assert_equal(vars(stored), vars(computed))
        with changed(path) as file:
            file["mean"][0] = 42
        today = statistics_of(pm, pm.layers, path, draws)
        other = statistics_of(pm, pm.layers, path, Resampling(200, 4))
        assert today.values["mean"][0] == 42
        assert other.values["mean"][0] == computed.values["mean"][0]
        with changed(path) as file:
            del file["mean"]
        with pytest.raises(ArtifactError, match="it has no dataset mean; make it again"):
            StatisticsFile(path)
        np.testing.assert_equal(vars(statistics_of(pm, pm.layers, path, draws)), vars(computed))


def test_stats_prints_what_it_stored_without_computing_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path)
    read: list[int] = []
    matrix = PMatrixFile.matrix

    def counted(self: PMatrixFile, name: MatrixName, layer: int) -> NDArray[np.float64]:
        read.append(layer)
        return matrix(self, name, layer)

    monkeypatch.setattr(PMatrixFile, "matrix", counted)
    for expected in ([0, 1, 2], [0, 1, 2]):
        result = kscli("stats", "-m", "toy", "--dir", tmp_path, "-f", "json")
        assert read == expected
    rows = json.loads(result.stdout)
    assert len(rows) == 3
    assert type(rows[0]["top_fact"]) is int
    assert rows[0]["kurtosis_low"] <= rows[0]["kurtosis"]
    table = kscli("stats", "-m", "toy", "--dir", tmp_path).stdout
    assert f"{rows[0]['kurtosis']:z.1f} [{rows[0]['kurtosis_low']:z.1f}, " in table
    assert max(map(len, table.splitlines())) <= 100


def test_statistics_need_neither_torch_nor_matplotlib_nor_scipy() -> None:
    code = (
        "import sys, numpy as np, kscli.analysis.statistics as s; s.layer_statistics(np.eye(4));"
        "print(sorted({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
