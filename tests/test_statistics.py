"""Statistics of P against SciPy and against sums written out."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from kscli.statistics import (
    STATISTICS,
    MatrixName,
    compute_statistics,
    layer_statistics,
    off_diagonal,
)

FIELDS = ["mean", "std", "skewness", "kurtosis", "min", "max"]
TAILS = {"tail_0_10": 0.1, "tail_0_25": 0.25, "tail_0_50": 0.5}


@dataclass
class Stored:
    """A pmatrix file in memory that notes what is read of it."""

    model: str
    matrices: dict[int, NDArray[np.float64]]
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
    P[0, 1] += 2e-15
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


def test_compute_statistics_reads_p_once_a_layer() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16, 0), 3: heavy_tailed(16, 1)})
    computed = compute_statistics(stored)
    assert stored.read == [("P", 0), ("P", 3)]
    assert (computed.model, computed.layers, computed.m) == ("gpt2", (0, 3), 16)
    for at, layer in enumerate(computed.layers):
        expected = layer_statistics(stored.matrices[layer])
        assert {name: values[at] for name, values in computed.values.items()} == expected


def test_compute_statistics_of_chosen_layers() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16, 0), 3: heavy_tailed(16, 1)})
    assert compute_statistics(stored, [3]).layers == (3,)
    assert stored.read == [("P", 3)]


def test_rows_are_flat_records_with_the_printed_fields() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(16), 5: np.full((16, 16), 0.2)})
    rows = compute_statistics(stored).rows()
    assert [list(row) for row in rows] == [["model", "layer", "m", *STATISTICS]] * 2
    assert [row["layer"] for row in rows] == [0, 5]
    assert rows[0]["kurtosis"] == layer_statistics(stored.matrices[0])["kurtosis"]
    assert all(type(rows[0][name]) is float for name in STATISTICS)
    assert math.isnan(rows[1]["kurtosis"])


def test_statistics_need_neither_torch_nor_matplotlib_nor_scipy() -> None:
    code = (
        "import sys, numpy as np, kscli.statistics as s; s.layer_statistics(np.eye(4));"
        "print(sorted({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
