"""--value FILE: the values that another run found, written along other directions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_kit import kscli, one_sentence

from kscli.editing.edits_file import EditsFile

FACTS = ("--fact", 3, "--fact", 40, "--fact", 17)


def run(folder: Path, path: Path, *options: object) -> None:
    made = kscli(
        *("edit", "--dir", folder.parent, "-o", path, "-q", "--generations", 0, "--contexts", 0),
        *options,
    )
    assert made.exit_code == 0, made.stderr


@pytest.fixture(scope="module")
def found(measured_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Joint edits of three facts at layer 1, their values found in the clean model."""
    path = tmp_path_factory.mktemp("runs") / "joint.h5"
    run(measured_tiny, path, "--method", "joint", "--layer", 1, "--batch", 3, *FACTS)
    return path


def test_the_same_values_along_other_directions(
    found: Path, measured_tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "protected.h5"
    options = ("--method", "joint", "--layer", 1, "--batch", 3, *FACTS)
    run(
        measured_tiny,
        path,
        "--value",
        found,
        "--protect",
        "all",
        "--protect-at",
        "subject",
        *options,
    )
    with EditsFile(found) as first, EditsFile(path) as second:
        np.testing.assert_array_equal(first.values("delta"), second.values("delta"))
        assert np.abs(first.values("direction") - second.values("direction")).max() > 1e-3
        assert second.about.value == "another run's"
        assert second.about.recipe["values"] == first.fingerprint


def test_the_same_run_again_is_the_same(found: Path, measured_tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.h5"
    run(
        measured_tiny,
        path,
        "--value",
        found,
        "--method",
        "joint",
        "--layer",
        1,
        "--batch",
        3,
        *FACTS,
    )
    with EditsFile(found) as first, EditsFile(path) as second:
        for name in ("direction", "measured", "logprob_new", "answer_changed", "text_change"):
            np.testing.assert_array_equal(first.values(name), second.values(name))


def test_a_value_that_was_not_found_is_no_edit(
    found: Path, measured_tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "more.h5"
    more = ("--method", "closed-form", "--layer", 1, "--fact", 5, *FACTS)
    run(measured_tiny, path, "--value", found, *more)
    with EditsFile(path) as file:
        assert 5 not in file.values("edited")
        assert file.values("kept_out/fact").tolist() == [5]
        assert f"{found} holds no value for it" in file.values("kept_out/reason")[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--method", "joint", "--layer", 0), "its values are of layer 1, and layer 0 is edited"),
        (("--method", "memit", "--layers", "1"), "memit does not write the shift that its search"),
        (("--method", "r-rome", "--layer", 1), "values pass between closed-form, rome,"),
        (("--layer", 1, "--steps", 5), "--steps has no effect with --value"),
    ],
)
def test_values_that_do_not_fit_are_refused(
    options: tuple[object, ...], why: str, found: Path, measured_tiny: Path, tmp_path: Path
) -> None:
    asked = ("--value", found, "--fact", 3, "-o", tmp_path / "x.h5", *options)
    made = kscli("edit", "--dir", measured_tiny.parent, *asked)
    assert made.exit_code in (1, 2)
    assert why in one_sentence(made.stderr)
    assert not (tmp_path / "x.h5").exists()


def test_no_such_file(measured_tiny: Path) -> None:
    made = kscli("edit", "--dir", measured_tiny.parent, "--value", "optimized")
    assert made.exit_code == 2
    assert "--value optimized is neither optimised nor random" in one_sentence(made.stderr)


def test_json_says_what_an_edit_alone_does_to_all_text(found: Path, measured_tiny: Path) -> None:
    rows = json.loads(kscli("verify", found, "--dir", measured_tiny.parent, "-f", "json").stdout)
    with EditsFile(found) as file:
        assert rows[0]["text_change"] == file.values("text_change")[-1]
        assert [row["own_text_change"] for row in file.objects()] == file.values(
            "own_text_change"
        ).tolist()
