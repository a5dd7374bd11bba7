"""Editors: what each does follows from its four choices; a new one is a module and a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import kscli, one_sentence

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.editor_p import EditorPMatrixFile
from kscli.editing.editors import EDITORS, find_editor
from kscli.editing.edits_file import EditsFile

# ROME without C, as EasyEdit's settings have it: d = k / k^T k.
TOY = """
from dataclasses import replace
from kscli.editing.editors import Direction
from kscli.editing.editors.closed_form import EDITOR as CLOSED_FORM

EDITOR = replace(
    CLOSED_FORM, title="TOY: without C", direction=Direction("identity"), predicted=False
)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new editor: one module, and one line in the registry."""
    (tmp_path / "toy_editor.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EDITORS, "toy", "toy_editor")
    return "toy"


def objects(*arguments: str | Path) -> list[dict[str, Any]]:
    done = kscli(*arguments, "-f", "json", "-q")
    assert done.exit_code == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_new_editor_is_known_to_every_command(
    toy: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """`edit` writes along its direction; `verify`, `report` and `risk` name it and take it."""
    root, path = measured_tiny.parent, tmp_path / "toy.h5"
    how = ("--fact", 3, "--value", "random", "--target-new", "text:Rome", "-o", path)
    (row,) = objects("edit", "--dir", root, "--method", toy, "--layer", 1, *how)
    assert row["method"] == toy
    with EditsFile(path) as file, KeysFile(measured_tiny / "keys.h5") as keys:
        key = keys.keys_of(1)[3]
        direction = file.values("direction")[0, 0]
    assert np.allclose(direction, key / (key @ key), rtol=1e-12)
    (verified,) = objects("verify", path)
    assert verified["method"] == toy
    assert verified["linear_error"] < 1e-9
    risk = objects("risk", "--dir", root, "--method", toy, "--layer", 1, "--fact", 3, "-k", "all")
    with KeysFile(measured_tiny / "keys.h5") as keys:
        expected = keys.keys_of(1) @ direction
    assert np.allclose([each["p"] for each in risk], [expected[each["j"]] for each in risk])


@pytest.mark.parametrize("method", EDITORS)
def test_every_shift_of_one_layer_is_known_before_the_edit(
    method: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """By the edits' directions, whatever the editor; not where the change is altered afterwards."""
    path = tmp_path / "edits.h5"
    how = ["--layer", 1, "--edits", 6, "--value", "random", "--contexts", 0, "-o", path]
    if find_editor(method).direction.weight is not None:
        how += ["--weight", 1]  # the published: changes near float32 rounding
    objects("edit", "--dir", measured_tiny.parent, "--method", method, *map(str, how))
    with EditsFile(path) as file:
        linear, live = file.values("linear_error"), file.values("live_error")
    assert len(linear) == 6
    if method in ("rect", "prune"):
        assert np.isnan(linear).all()
    else:
        assert linear.max() < 1e-9
        assert live.max() < 1e-4


@pytest.mark.usefixtures("no_pictures")
def test_a_report_names_a_new_editor(toy: str, measured_tiny: Path, tmp_path: Path) -> None:
    """The page of a model whose runs are of an editor that the report's code never heard of."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for kind in ("cov", "keys", "pmatrix"):
        (folder / f"{kind}.h5").symlink_to(measured_tiny / f"{kind}.h5")
    how = ("--edits", 2, "--value", "random", "--dir", tmp_path)
    assert kscli("edit", "--method", toy, *how, "-q").exit_code == 0
    page = kscli("report", "--dir", tmp_path, "-q")
    assert page.exit_code == 0, page.stderr
    text = Path(page.stdout.strip()).read_text()
    assert "toy" in text


@pytest.mark.parametrize("method", EDITORS)
def test_p_of_an_editor_is_how_far_its_edit_of_one_fact_moves_the_others(
    method: str, measured_tiny: Path
) -> None:
    """d_i^T k_j = k_i^T M k_j / (lambda + k_i^T M k_i), by a metric M written out in float64."""
    direction = find_editor(method).direction
    with (
        CovarianceFile(measured_tiny / "cov.h5") as cov,
        KeysFile(measured_tiny / "keys.h5") as keys,
        PMatrixFile(measured_tiny / "pmatrix.h5") as pm,
        EditorPMatrixFile(measured_tiny / "pmatrix.h5", method, cov, keys) as file,
    ):
        K, P, leverage, C = keys.keys_of(0), pm.matrix("P", 0), pm.leverage(0), cov.second_moment(0)
        found = file.matrix("P", 0)
    values, vectors = np.linalg.eigh(C)
    null = vectors[:, values < 0.02]
    M = {
        "second-moment": np.linalg.pinv(C, hermitian=True, rcond=1e-14),
        "identity": np.eye(len(C)),
        "null-space": null @ null.T,
    }[direction.metric]
    weight = direction.weight or 0.0
    G = K @ M @ K.T
    naive = G / (weight + np.diagonal(G))[:, None]
    assert np.allclose(found, naive, atol=1e-4 * np.abs(naive).max())
    if direction.metric == "second-moment":
        expected = P * (leverage / (weight + leverage))[:, None]
        assert np.allclose(found, expected, rtol=3e-7, atol=1e-9)  # the file holds P in float32


@pytest.mark.parametrize("command", ["edit", "risk"])
def test_an_unknown_editor_is_named_with_those_there_are(command: str, measured_tiny: Path) -> None:
    found = kscli(command, "--dir", measured_tiny.parent, "--method", "romee")
    assert found.exit_code == 2
    sentence = one_sentence(found.stderr)
    assert "romee" in sentence
    assert all(name in sentence for name in EDITORS)


def test_no_code_but_the_registry_tells_editors_apart() -> None:
    """`method ==`, or an editor's name as a value, stands in no other module."""
    package = Path(__file__).parent.parent / "kscli"
    own = package / "editing" / "editors"
    # The layouts of other people's files bear the names of their editors.
    files = {package / "second_moment" / "interchange.py", package / "cli" / "export_cov.py"}
    for path in package.rglob("*.py"):
        if own not in path.parents and path not in files:
            text = path.read_text()
            assert "method ==" not in text, path
            assert not [name for name in EDITORS if f'"{name}"' in text], path
