from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import (
    FACTS,
    LAYERS,
    Contents,
    about_cov,
    about_pmatrix,
    changed,
    located,
    second_moments,
    write_cov,
    write_keys,
    write_toy,
)
from cli_kit import kscli, one_sentence

from kscli import files
from kscli.artifacts import (
    Artifact,
    ArtifactWriter,
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    difference,
    is_imported,
    require_same_identity,
    write_artifact,
)
from kscli.errors import ArtifactError


def test_a_covariance_file_reads_back(tmp_path: Path) -> None:
    path = write_cov(tmp_path / "deep" / "er" / "cov.h5")
    with CovarianceFile(path) as cov:
        assert (cov.layers, cov.count, cov.model, cov.kind) == (LAYERS, 2000, "toy", "cov")
        for layer in LAYERS:
            C = cov.second_moment(layer)
            assert C.dtype == np.float64
            np.testing.assert_array_equal(C, second_moments()[layer])
        with pytest.raises(ArtifactError, match=r"cov\.h5 has no layer 9; it holds 0-2"):
            cov.second_moment(9)


def test_facts_read_back_with_their_letters(tmp_path: Path) -> None:
    with KeysFile(write_keys(tmp_path / "keys.h5")) as keys:
        assert keys.facts == FACTS
        assert keys.token_id.tolist() == [5, 5, 7, 8, 9, 10]


def test_plain_h5py_finds_layers_as_a_dimension_scale(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    with h5py.File(place / "pmatrix.h5") as file:
        for name in ("P", "Q", "leverage"):
            assert file[name].dims[0][0] == file["layer"]
            assert file[name].dims[0].label == "layer"
        assert file["P"].shape == (3, 6, 6)
        assert file["P"].dtype == np.float32
        for attribute in (
            "format_version",
            "kscli_version",
            "command",
            "created",
            "inputs",
            "seed",
        ):
            assert attribute in file.attrs
    with h5py.File(place / "cov.h5") as file:
        assert file["second_moment"].dtype == np.float32
        assert file["count"].dtype == np.int64


def test_pmatrix_is_the_definition_for_the_files(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    with PMatrixFile(place / "pmatrix.h5") as pm, KeysFile(place / "keys.h5") as keys:
        for layer in LAYERS:
            K = keys.keys_of(layer)
            G = K @ np.linalg.inv(second_moments()[layer].astype(np.float64)) @ K.T
            Q = K @ K.T
            for name, matrix in (
                ("P", G / np.diagonal(G)[:, None]),
                ("whitened_cosine", G / np.sqrt(np.outer(np.diagonal(G), np.diagonal(G)))),
                ("Q", Q),
                ("cosine", Q / np.sqrt(np.outer(np.diagonal(Q), np.diagonal(Q)))),
            ):
                # The file holds P and Q in float32.
                np.testing.assert_allclose(pm.matrix(name, layer), matrix, rtol=3e-7, atol=1e-9)
            np.testing.assert_allclose(pm.leverage(layer), np.diagonal(G), rtol=1e-9)
        assert pm.facts == FACTS


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    with pytest.raises(ZeroDivisionError), write_artifact(path, "cov", about_cov()):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_when_its_replacement_fails(tmp_path: Path) -> None:
    path = write_cov(tmp_path / "cov.h5")
    before = path.read_bytes()
    with (
        pytest.raises(ZeroDivisionError),
        write_artifact(path, "cov", about_cov(), force=True),
    ):
        _ = 1 / 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_is_not_replaced_without_force(tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    path.write_text("mine")
    with (
        pytest.raises(ArtifactError, match=r"cov\.h5 exists; add --force"),
        write_artifact(path, "cov", about_cov()),
    ):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")]
)
def test_a_failing_disk_is_one_sentence_and_keeps_the_old_file(
    code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cov(tmp_path / "cov.h5")
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(ArtifactError, match=reason):
        write_cov(path, seed=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_hdf5_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("Can't write data (file write failed: errno = 28, 'No space left on device')")

    monkeypatch.setattr(ArtifactWriter, "put", fail)
    with pytest.raises(ArtifactError, match="the disk is full"):
        write_cov(tmp_path / "cov.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="was not written"):
        write_cov(tmp_path / "file" / "toy" / "cov.h5")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.95])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = write_cov(tmp_path / "cov.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with (
        pytest.raises(ArtifactError, match=r"cov\.h5 .*(truncated|damaged)"),
        CovarianceFile(path) as cov,
    ):
        cov.second_moment(2)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(ArtifactError, match="not one of kscli's"):
        Artifact(path)
    data = write_cov(path).read_bytes()
    path.write_bytes(data.replace(b"\nkscli seal 2 ", b"\nkscli seal 99 "))
    with pytest.raises(ArtifactError, match=r"format 99; this kscli reads format 2\. Upgrade"):
        Artifact(path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="not an HDF5 file"):
        Artifact(path)
    with pytest.raises(ArtifactError, match=r"absent\.h5 does not exist"):
        Artifact(tmp_path / "absent.h5")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds keys of facts.*, not second moments"):
        CovarianceFile(write_keys(tmp_path / "keys.h5"))


@pytest.mark.parametrize("name", ["weights", "tokenizer", "hook", "d_m"])
def test_files_of_different_models_are_refused_naming_the_attribute(
    name: str, tmp_path: Path
) -> None:
    write_cov(tmp_path / "cov.h5")
    d_m = 7 if name == "d_m" else 12
    write_keys(
        tmp_path / "keys.h5",
        **{name: d_m if name == "d_m" else "other.{}.down"},
        keys=np.zeros((3, 6, d_m), np.float32),
    )
    with (
        CovarianceFile(tmp_path / "cov.h5") as cov,
        KeysFile(tmp_path / "keys.h5") as keys,
        pytest.raises(ArtifactError, match=f"differ in {name} "),
    ):
        require_same_identity(cov, keys)


def test_other_dtypes_and_special_tokens_are_a_warning(tmp_path: Path) -> None:
    write_cov(tmp_path / "cov.h5", dtype="bfloat16", special_tokens="<s>")
    write_keys(tmp_path / "keys.h5")
    with CovarianceFile(tmp_path / "cov.h5") as cov, KeysFile(tmp_path / "keys.h5") as keys:
        first, second = require_same_identity(cov, keys)
    assert "differ in dtype (bfloat16 and float32)" in first
    assert "differ in special_tokens (<s> and none)" in second


def test_a_fingerprint_follows_what_a_file_holds(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with Artifact(path) as artifact:
            return artifact.fingerprint

    first = fingerprint(write_cov(tmp_path / "a.h5"))
    assert fingerprint(write_cov(tmp_path / "b.h5")) == first
    assert fingerprint(write_cov(tmp_path / "c.h5", seed=1)) != first
    keys = np.zeros((3, 6, 12), np.float32)
    zeros = fingerprint(write_keys(tmp_path / "d.h5", keys))
    keys[2, 5, 11] = 1e-30
    assert fingerprint(write_keys(tmp_path / "e.h5", keys)) != zeros


def test_what_changed_since_a_file_was_made(tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    assert difference(path, "cov", {"corpus": "c0"}) == "it does not exist"
    write_cov(path)
    assert difference(path, "cov", {"corpus": "c0"}) is None
    assert difference(path, "cov", {"corpus": "c1"}) == "corpus changed"
    path.write_text("x")
    assert difference(path, "cov", {"corpus": "c0"}) == "it cannot be read"


# Files whose structure or content is wrong

Edit = Callable[[Contents], None]
DAMAGED = r"(is damaged or was not made by kscli.*; make it again|but not one of kscli's)\."


def attribute(name: str, value: object) -> Edit:
    """An edit that sets an attribute."""

    def edit(file: Contents) -> None:
        file.attrs[name] = value

    return edit


def no_attribute(name: str) -> Edit:
    """An edit that removes an attribute."""

    def edit(file: Contents) -> None:
        del file.attrs[name]

    return edit


def dataset(name: str, value: object) -> Edit:
    """An edit that replaces what is under a name: by a value, or nothing (None)."""

    def edit(file: Contents) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return edit


# What each field of the schema lacks or has wrong is in test_schema.
WRONG_STRUCTURE: dict[str, Edit] = {
    "no kind": no_attribute("kind"),
    "no corpus": no_attribute("corpus"),
    "no leverage": dataset("leverage", None),
    "format_version a word": attribute("format_version", "one"),
    "d_m a word": attribute("d_m", "twelve"),
    "model a number": attribute("model", 3),
    "recipe not JSON": attribute("recipe", "{"),
    "recipe a list": attribute("recipe", "[1]"),
    "recipe too deep": attribute("recipe", "[" * 50_000),
    "inputs not JSON": attribute("inputs", "cov"),
    "facts a dataset": dataset("facts", [1, 2]),
    "layer 2-D": dataset("layer", [[0, 1, 2]]),
    "layer without a layer": dataset("layer", np.zeros(0, np.int64)),
    "layer longer than P": dataset("layer", [0, 1, 2, 3]),
    "layer shorter than P": dataset("layer", [0, 1]),
    "layer words": dataset("layer", ["a", "b", "c"]),
    "P 2-D": dataset("P", np.eye(6)),
    "P not square": dataset("P", np.zeros((3, 6, 5))),
    "P of other facts": dataset("P", np.zeros((3, 5, 5))),
    "P a string": dataset("P", "P"),
    "leverage 1-D": dataset("leverage", np.zeros(3)),
    "token_id too short": dataset("token_id", [1]),
    "prompt numeric": dataset("facts/prompt", np.arange(6)),
    "prompt too short": dataset("facts/prompt", ["{} is"] * 5),
}
WRONG_CONTENT: dict[str, Edit] = {
    "prompt not UTF-8": dataset("facts/prompt", np.array([b"{} \xff"] * 6)),
    "prompt without a slot": dataset("facts/prompt", ["Paris is"] * 6),
    "subject blank": dataset("facts/subject", [" "] * 6),
}


def damage(path: Path, edit: Edit) -> Path:
    with changed(path) as file:
        edit(file)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a sound pmatrix.h5 holds."""
    return (write_toy(tmp_path_factory.mktemp("sound")) / "pmatrix.h5").read_bytes()


@pytest.mark.parametrize("edit", WRONG_STRUCTURE.values(), ids=WRONG_STRUCTURE.keys())
def test_a_file_of_wrong_structure_is_refused(edit: Edit, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pmatrix.h5"
    path.write_bytes(sound)
    damage(path, edit)
    for reader in (Artifact, PMatrixFile):
        with pytest.raises(ArtifactError, match=rf"pmatrix\.h5 .*{DAMAGED}"):
            reader(path)
    assert difference(path, "pmatrix", {}) == "it cannot be read"
    assert not is_imported(path)


@pytest.mark.parametrize("edit", WRONG_CONTENT.values(), ids=WRONG_CONTENT.keys())
def test_facts_that_are_none_are_refused(edit: Edit, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pmatrix.h5"
    path.write_bytes(sound)
    damage(path, edit)
    with (
        PMatrixFile(path) as pm,
        pytest.raises(ArtifactError, match=rf"pmatrix\.h5 {DAMAGED}"),
    ):
        _ = pm.facts


@pytest.mark.parametrize(
    ("edit", "commands"),
    [
        *((edit, ("topk", "stats", "show")) for edit in WRONG_STRUCTURE.values()),
        *((edit, ("topk",)) for edit in WRONG_CONTENT.values()),
    ],
    ids=[*WRONG_STRUCTURE, *WRONG_CONTENT],
)
def test_a_damaged_file_is_one_sentence_of_the_command_line(
    edit: Edit, commands: tuple[str, ...], sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "pmatrix.h5"
    path.write_bytes(sound)
    damage(path, edit)
    arguments = {
        "topk": ["--pmatrix", path],
        "stats": ["--pmatrix", path, "-o", tmp_path / "stats.h5"],
        "show": [path],
    }
    for command in commands:
        result = kscli(command, *arguments[command])
        assert result.exit_code == 1, (command, result.exception)
        assert "pmatrix.h5" in one_sentence(result.stderr)
        assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [path]


def test_covariances_and_keys_of_wrong_structure_are_refused(tmp_path: Path) -> None:
    cov = tmp_path / "cov.h5"
    for edit in (
        dataset("count", None),
        dataset("count", [2000]),
        dataset("second_moment", np.zeros((3, 12, 11))),
        dataset("second_moment", np.zeros((3, 7, 7))),
        attribute("d_m", 11),
        no_attribute("corpus"),
        no_attribute("weights"),
    ):
        damage(write_cov(cov, weights="unknown"), edit)
        with pytest.raises(ArtifactError, match=rf"cov\.h5 {DAMAGED}"):
            CovarianceFile(cov)
        assert difference(cov, "cov", {"corpus": "c0"}) == "it cannot be read"
        assert not is_imported(cov)
    keys = damage(write_keys(tmp_path / "keys.h5"), dataset("keys", np.zeros((3, 6, 11))))
    with pytest.raises(ArtifactError, match=rf"keys\.h5 {DAMAGED}"):
        KeysFile(keys)


def test_what_else_a_file_holds_is_let_be(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pmatrix.h5"
    path.write_bytes(sound)
    damage(path, attribute("mine", [1, 2]))
    damage(path, lambda file: file.__setitem__("also", "mine"))
    with PMatrixFile(path) as pm:
        assert pm.attributes["mine"] == [1, 2]
        assert pm.facts == FACTS
    assert kscli("show", path, "-f", "json").exit_code == 0
    assert kscli("stats", "--pmatrix", path, "-o", tmp_path / "stats.h5").exit_code == 0
    with Artifact(tmp_path / "stats.h5", "stats") as stats:
        assert stats.layers == LAYERS


def test_what_a_killed_process_left_is_removed_and_a_running_one_s_is_not(tmp_path: Path) -> None:
    host = files.socket.gethostname()
    dead = tmp_path / f".cov.{host}.999999999.part.h5"
    alive = tmp_path / f".cov.{host}.1.part.h5"
    elsewhere = tmp_path / ".cov.another-host.999999999.part.h5"
    for path in (dead, alive, elsewhere):
        path.write_text("")
    write_cov(tmp_path / "cov.h5")
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, tmp_path / "cov.h5"])


def test_a_failure_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "cov.h5"
    with pytest.raises(ZeroDivisionError), write_artifact(path, "cov", about_cov()):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "reason"), [(27, "limit on a file's size"), (122, "quota"), (5, "Input/output")]
)
def test_hdf5_s_own_words_are_put_plainly(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(
            f"Can't write data (file write failed: time = now, errno = {number}, buf = 0)"
        )

    monkeypatch.setattr(ArtifactWriter, "put", fail)
    with pytest.raises(ArtifactError, match=reason) as raised:
        write_cov(tmp_path / "cov.h5")
    assert "buf" not in str(raised.value)


def test_a_q_of_no_keys_is_refused(tmp_path: Path) -> None:
    """Two keys of length 1 have no inner product of 2."""
    path = tmp_path / "pmatrix.h5"
    with write_artifact(path, "pmatrix", about_pmatrix()) as writer:
        writer.layers([0])
        writer.facts(located(FACTS[:2]))
        writer.put("P", 0, np.eye(2))
        writer.put("Q", 0, [[1, 2], [2, 1]])
        writer.put("leverage", 0, [1, 1])
    with PMatrixFile(path) as pm:
        np.testing.assert_array_equal(pm.matrix("whitened_cosine", 0), np.eye(2))
        with pytest.raises(ArtifactError, match="was not made by kscli"):
            pm.matrix("cosine", 0)
