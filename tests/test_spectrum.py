"""`stats --spectrum` against the definitions, written naively in float64."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_kit import FACTS, LAYERS, changed, second_moments, write_keys, write_toy
from cli_kit import ROOT, kscli, one_sentence
from numpy.typing import NDArray

from kscli.analysis.spectrum import mean_squared_overlap, spectrum_of
from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.metrics import Cut
from kscli.errors import NumericsError
from kscli.figures import KINDS, Source
from kscli.pmatrix import write_pmatrix

Array = NDArray[np.float64]


def rows_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = kscli("stats", "--dir", folder, "-m", "toy", "--spectrum", "-f", "json", *arguments)
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def naive_overlap(keys: Array, inverse: Array) -> float:
    """The mean over pairs i != j of (k_i^T M k_j)^2 / (k_i^T M k_i k_j^T M k_j)."""
    found = [
        (a @ inverse @ b) ** 2 / ((a @ inverse @ a) * (b @ inverse @ b))
        for i, a in enumerate(keys)
        for j, b in enumerate(keys)
        if i != j
    ]
    return sum(found) / len(found)


def naive(C: Array, keys: Array, absolute: float, relative: float) -> dict[str, float]:
    """The fields of one layer by the definitions, with traces and an SVD."""
    U, S, _ = np.linalg.svd(C)
    q = S / np.trace(C)
    energy = sum(float(k @ k) for k in keys)
    found = {
        "participation_ratio": np.trace(C) ** 2 / np.trace(C @ C),
        "effective_rank": math.exp(-sum(x * math.log(x) for x in q)),
        "overlap": naive_overlap(keys, np.eye(len(C))),
        "overlap_whitened": naive_overlap(keys, np.linalg.inv(C)),
        "one_over_d_m": 1 / len(C),
        "one_over_m": 1 / len(keys),
    }
    for name, limit in (("", absolute), ("relative_", relative * np.trace(C) / len(C))):
        Pi = sum(
            (np.outer(u, u) for u, s in zip(U.T, S, strict=True) if s < limit), np.zeros(C.shape)
        )
        found[f"{name}null_share"] = float(np.trace(Pi)) / len(C)
        found[f"keys_in_{name}null"] = sum(float(k @ Pi @ k) for k in keys) / energy
    return found


def test_every_number_is_its_definition(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    with KeysFile(place / "keys.h5") as file:
        keys = [file.keys_of(layer) for layer in LAYERS]
    rows = rows_of(tmp_path, "--null-space", "0.97", "--relative-null-space", "1.03")
    assert [row["layer"] for row in rows] == list(LAYERS)
    for row, C, of_layer in zip(rows, second_moments().astype(np.float64), keys, strict=True):
        wanted = naive(C, of_layer, 0.97, 1.03)
        assert 0 < wanted["null_share"] < wanted["relative_null_share"] < 1
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert (row["null_space"], row["relative_null_space"]) == (0.97, 1.03)


def test_known_spectra() -> None:
    flat = spectrum_of(np.diag([2.0, 2.0, 2.0, 0.0]))
    assert flat.participation_ratio == pytest.approx(3)
    assert flat.effective_rank == pytest.approx(3)
    # Directions with no text at all are null by every cut, and keys there are wholly in it.
    assert flat.null_share(Cut(0.02)) == 0.25
    key = np.array([[0.0, 0.0, 3.0, 4.0]])
    assert flat.energy_in_null(Cut(0.02), key) == pytest.approx(16 / 25)


def test_unrelated_keys_overlap_by_one_over_the_participation_ratio() -> None:
    C = np.diag(np.arange(1.0, 201.0) ** 2)
    keys = np.random.default_rng(0).standard_normal((400, 200)) * np.sqrt(np.diagonal(C))
    norms = np.linalg.norm(keys, axis=1)
    raw = mean_squared_overlap(keys @ keys.T / np.outer(norms, norms))
    assert raw == pytest.approx(1 / spectrum_of(C).participation_ratio, rel=0.03)
    white = keys / np.sqrt(np.diagonal(C))
    norms = np.linalg.norm(white, axis=1)
    overlap = mean_squared_overlap(white @ white.T / np.outer(norms, norms))
    assert overlap == pytest.approx(1 / 200, rel=0.03)


@pytest.mark.parametrize(("cut", "share"), [("0", 0.0), ("1e9", 1.0)])
def test_a_cut_may_leave_nothing_or_everything(tmp_path: Path, cut: str, share: float) -> None:
    write_toy(tmp_path)
    for row in rows_of(tmp_path, "--null-space", cut, "--relative-null-space", cut):
        for name in ("null_share", "keys_in_null", "relative_null_share", "keys_in_relative_null"):
            assert row[name] == pytest.approx(share, abs=1e-12)


def test_what_is_undefined_is_null(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    (place / "pmatrix.h5").unlink()
    write_keys(place / "keys.h5", keys=np.ones((3, 1, 12), np.float32), facts=FACTS[:1])
    with CovarianceFile(place / "cov.h5") as cov, KeysFile(place / "keys.h5") as keys:
        write_pmatrix(cov, keys, place / "pmatrix.h5", layers=LAYERS)
    rows = rows_of(tmp_path)
    assert [(row["m"], row["overlap"], row["overlap_whitened"]) for row in rows] == [
        (1, None, None)
    ] * 3


def test_csv_and_table_hold_the_same_layers(tmp_path: Path) -> None:
    write_toy(tmp_path)
    how = ("stats", "--dir", tmp_path, "-m", "toy", "--spectrum", "--layers", "0,2")
    lines = kscli(*how, "-f", "csv").stdout.splitlines()
    assert "participation_ratio" in lines[0]
    assert len(lines) == 3
    table = kscli(*how).stdout
    assert "participation ratio" in table
    assert "below 0.02" in table


@pytest.mark.parametrize("C", [np.zeros((3, 3)), np.full((3, 3), np.nan)])
def test_what_has_no_spectrum_is_refused(C: Array) -> None:
    with pytest.raises(NumericsError, match="C "):
        spectrum_of(C)


def test_a_c_of_zeros_is_refused_naming_the_layer(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    with changed(place / "cov.h5") as file:
        file["second_moment"][1] = 0
    refused = kscli("stats", "--dir", tmp_path, "-m", "toy", "--spectrum")
    assert refused.exit_code == 1
    one_sentence(refused.stderr)


def test_files_of_another_measurement_are_refused(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    how = ("stats", "--dir", tmp_path, "-m", "toy", "--spectrum")
    write_keys(place / "keys.h5", layers=(0, 1))
    refused = kscli(*how)
    assert refused.exit_code == 1
    assert "was not made from" in one_sentence(refused.stderr)
    for name in ("keys", "cov", "pmatrix"):
        (place / f"{name}.h5").unlink(missing_ok=True)
        refused = kscli(*how)
        assert refused.exit_code == 1
        assert f"{name}.h5 does not exist" in one_sentence(refused.stderr).replace("\n", " ")
        write_toy(tmp_path)


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    write_toy(tmp_path)
    for arguments, said in [
        (("--null-space", "1"), "no effect without --spectrum"),
        (("--spectrum", "--scaling"), "name one"),
        (("--spectrum", "-o", tmp_path / "s.h5"), "cannot be stored"),
        (("--spectrum", "--null-space", "inf"), "must be a finite number"),
    ]:
        refused = kscli("stats", "--dir", tmp_path, "-m", "toy", *arguments)
        assert refused.exit_code == 2
        assert said in one_sentence(refused.stderr)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    write_toy(tmp_path)
    code = (
        "import sys; from kscli.cli.app import app\n"
        f"try: app(['stats', '--dir', {str(tmp_path)!r}, '-m', 'toy', '--spectrum'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_figure_shows_the_rows(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    rows = rows_of(tmp_path)
    with PMatrixFile(place / "pmatrix.h5") as file:
        fig = KINDS["spectrum"].draw([Source(file, LAYERS)])
        both = KINDS["spectrum"].draw([Source(file, LAYERS), Source(file, (1,))])
    dimensions, overlaps, shares = fig.axes
    for ax, fields in (
        (dimensions, ("effective_rank", "participation_ratio", "d_m")),
        (overlaps, ("overlap", "overlap_whitened", "one_over_m", "one_over_d_m")),
        (
            shares,
            ("null_share", "keys_in_null", "relative_null_share", "keys_in_relative_null"),
        ),
    ):
        for line, name in zip(ax.lines, fields, strict=True):
            values = np.asarray(line.get_ydata())
            expected = [row[name] for row in rows]
            if name in ("d_m", "one_over_m", "one_over_d_m"):
                assert (values == expected[0]).all()  # a reference, right across
            else:
                np.testing.assert_array_equal(line.get_xdata(), LAYERS)
                np.testing.assert_allclose(values, expected)
    assert len(both.axes) == 6


def test_the_figure_needs_the_files_beside(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    (place / "cov.h5").unlink()
    refused = kscli("plot", "spectrum", "--dir", tmp_path, "-m", "toy")
    assert refused.exit_code == 1
    assert "cov.h5 does not exist" in one_sentence(refused.stderr).replace("\n", " ")
    assert not (place / "figures").exists()
