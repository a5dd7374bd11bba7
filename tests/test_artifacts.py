from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import FACTS, LAYERS, PROVENANCE, second_moments, write_cov, write_keys, write_toy

from kscli import artifacts, files
from kscli.artifacts import (
    Artifact,
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    Provenance,
    difference,
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
        for name in ("P", "whitened_cosine", "cosine", "Q", "leverage"):
            assert file[name].dims[0][0] == file["layer"]
            assert file[name].dims[0].label == "layer"
        assert file["P"].shape == (3, 6, 6)
        assert file["P"].dtype == np.float64
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
            np.testing.assert_allclose(
                pm.matrix("P", layer), G / np.diagonal(G)[:, None], atol=1e-9
            )
            np.testing.assert_allclose(pm.leverage(layer), np.diagonal(G), rtol=1e-9)
        assert pm.facts == FACTS


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    with pytest.raises(ZeroDivisionError), write_artifact(path, "cov", Provenance(**PROVENANCE)):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_when_its_replacement_fails(tmp_path: Path) -> None:
    path = write_cov(tmp_path / "cov.h5")
    before = path.read_bytes()
    with (
        pytest.raises(ZeroDivisionError),
        write_artifact(path, "cov", Provenance(**PROVENANCE), force=True),
    ):
        _ = 1 / 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_is_not_replaced_without_force(tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    path.write_text("mine")
    with (
        pytest.raises(ArtifactError, match=r"cov\.h5 exists; add --force"),
        write_artifact(path, "cov", Provenance(**PROVENANCE)),
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

    monkeypatch.setattr(artifacts.ArtifactWriter, "put", fail)
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
    with h5py.File(write_cov(path), "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ArtifactError, match=r"format 99; this kscli reads up to 1\. Upgrade"):
        Artifact(path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="not an HDF5 file"):
        Artifact(path)
    with pytest.raises(ArtifactError, match=r"absent\.h5 does not exist"):
        Artifact(tmp_path / "absent.h5")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds keys of facts.*where second moments"):
        CovarianceFile(write_keys(tmp_path / "keys.h5"))


@pytest.mark.parametrize("name", ["weights", "tokenizer", "hook", "d_m"])
def test_files_of_different_models_are_refused_naming_the_attribute(
    name: str, tmp_path: Path
) -> None:
    write_cov(tmp_path / "cov.h5")
    write_keys(
        tmp_path / "keys.h5",
        **{name: 7 if name == "d_m" else "other"},
        keys=np.zeros((3, 6, 12), np.float32),
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
