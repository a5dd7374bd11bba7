"""The editors' .npz statistics: what their loaders take, what is read, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import (
    LAYERS,
    PROVENANCE,
    about_cov,
    changed,
    second_moments,
    write_cov,
    write_keys,
    write_toy,
)
from cli_kit import ROOT, kscli, one_sentence
from numpy.typing import NDArray

from kscli import files as kscli_files
from kscli.artifacts import (
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    require_same_identity,
    write_artifact,
)
from kscli.errors import ArtifactError, KscliError, NumericsError, UsageError
from kscli.second_moment.interchange import (
    Editor,
    ExportOptions,
    describe_statistics,
    export_covariance,
    import_covariance,
    model_folder,
)

COUNT = 2000
D = 12
# What the editors' own hyper-parameter files say.
HPARAMS: dict[str, Any] = {
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}


def editors_path(editor: str, stats_dir: Path, name_or_path: str, layer_name: str) -> Path:
    """Where the editor's layer_stats looks, its batch_tokens left at their default (None).

    The default is three times the model's positions, which adds no `_t` to the name.
    """
    if editor in ("rome", "memit"):
        model = name_or_path.replace("/", "_")
    else:
        model = name_or_path.rsplit("/")[-1]
    name = f"{layer_name}_{HPARAMS['mom2_dtype']}_mom2_{HPARAMS['mom2_n_samples']}.npz"
    return stats_dir / model / f"{HPARAMS['mom2_dataset']}_stats" / name


def editors_moment(path: Path) -> NDArray[np.float32] | None:
    """What the editors' cached statistic gives as its moment; None: they compute it anew.

    Every argument of the run (of which there is one, sample_size) must equal the array of that
    name; then the arrays under `mom2.` are the state: count, an int, and mom2, the sum.
    """
    with np.load(path) as held:
        arrays = dict(held.items())
    for name, value in {"sample_size": HPARAMS["mom2_n_samples"]}.items():
        if name not in arrays or arrays[name] != value:
            return None
    state = {
        name.removeprefix("mom2."): array
        for name, array in arrays.items()
        if name.startswith("mom2.")
    }
    moment: NDArray[np.float32] = state["mom2"] / int(state["count"])
    return moment


def write_npz(
    path: Path, matrix: NDArray[Any], count: object = COUNT, leave: str = "", **more: Any
) -> Path:
    """A file as the editors write it, without the array `leave`."""
    arrays: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": matrix,
        "sample_size": 100000,
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if name != leave})
    return path


def leaf(folder: Path, layer: int, module: str = "h.{}.down") -> Path:
    return folder / f"{module.format(layer)}_float32_mom2_100000.npz"


def sums(seed: int = 0) -> NDArray[np.float32]:
    """The sums of the toy's layers, (3, 12, 12)."""
    return second_moments(seed, COUNT) * np.float32(COUNT)


# Export


@pytest.mark.parametrize("editor", ["rome", "memit", "easyedit", "alphaedit"])
@pytest.mark.parametrize(
    ("model_id", "given"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6B"),
    ],
)
def test_each_editor_finds_and_takes_what_is_written(
    editor: Editor, model_id: str, given: str, tmp_path: Path
) -> None:
    cov = write_cov(tmp_path / "cov.h5", model_id=model_id, hook="transformer.h.{}.mlp.fc_out")
    paths = export_covariance(cov, tmp_path / "stats", ExportOptions(editor))
    C = second_moments()
    for layer in LAYERS:
        name = f"transformer.h.{layer}.mlp.fc_out"
        path = editors_path(editor, tmp_path / "stats", given, name)
        assert path == paths[layer]
        moment = editors_moment(path)
        assert moment is not None
        assert moment.dtype == np.float32
        np.testing.assert_allclose(moment, C[layer], rtol=2.0**-22)
    assert sorted(paths) == sorted((tmp_path / "stats").rglob("*.npz"))


def test_the_arrays_are_the_formats(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    path = export_covariance(cov, tmp_path, ExportOptions("rome", layers="1"))[0]
    with np.load(path, allow_pickle=False) as held:
        assert sorted(held.files) == ["mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"]
        assert held["mom2.constructor"].shape == ()
        assert held["mom2.constructor"].item() == "util.runningstats.SecondMoment()"
        assert (held["mom2.count"].item(), held["mom2.count"].dtype) == (COUNT, np.int64)
        assert (held["sample_size"].item(), held["sample_size"].dtype) == (100000, np.int64)
        assert held["mom2.mom2"].dtype == np.float32
        true = (second_moments()[1].astype(np.float64) * COUNT).astype(np.float32)
        np.testing.assert_array_equal(held["mom2.mom2"], true)


def test_the_folder_is_the_editors_name_of_the_model() -> None:
    assert model_folder("rome", "a/b") == "a_b"
    assert model_folder("memit", "./cache/b") == "._cache_b"
    assert model_folder("easyedit", "./hugging_cache/llama-3-8b") == "llama-3-8b"
    assert model_folder("alphaedit", "meta-llama/Meta-Llama-3-8B-Instruct").startswith("Meta-")
    for bad in ("", "b/", "..", "a/.."):
        with pytest.raises(UsageError, match="--as"):
            model_folder("easyedit", bad)


def test_export_takes_chosen_layers_a_name_and_a_note(tmp_path: Path) -> None:
    write_toy(tmp_path)
    stats = tmp_path / "stats"
    result = kscli(
        *("export-cov", "-m", "toy", "--dir", tmp_path, "--for", "easyedit", "-o", stats),
        *("--layers", "0,-1", "--as", "./hugging_cache/toy-1b", "--note", "first try"),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    folder = stats / "toy-1b" / "wikipedia_stats"
    assert f"wrote 2 files to {folder}" in result.stderr
    assert [path.name for path in sorted(stats.rglob("*.*"))] == [
        "h.0.down_float32_mom2_100000.npz",
        "h.2.down_float32_mom2_100000.npz",
    ]
    assert editors_moment(leaf(folder, 2)) is not None
    again = kscli("import-cov", stats, "-m", "other", "--dir", tmp_path)
    assert again.exit_code == 0, again.stderr
    with CovarianceFile(tmp_path / "other" / "cov.h5") as read:
        assert read.about.note == read.about.corpus == "first try"


def test_export_replaces_nothing_without_force(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    stats = tmp_path / "stats"
    command = ("export-cov", "--cov", cov, "--for", "rome", "-o", stats)
    assert kscli(*command, "--layers", "1").exit_code == 0
    path = leaf(stats / "someone_toy" / "wikipedia_stats", 1)
    before = path.read_bytes()
    write_cov(cov, seed=1)
    result = kscli(*command)
    assert result.exit_code == 1
    assert f"{path} exists; add --force" in one_sentence(result.stderr)
    assert list(stats.rglob("*.npz")) == [path]
    assert path.read_bytes() == before
    assert kscli(*command, "--force").exit_code == 0
    assert path.read_bytes() != before
    assert len(list(stats.rglob("*.npz"))) == 3


def test_mistakes_of_export_are_one_sentence(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    right = {"--cov": cov, "--for": "rome", "-o": tmp_path / "s"}
    for wrong, code, said in [
        ({"--layers": "9"}, 2, "no layer 9; it has 0-2"),
        ({"--as": "a/", "--for": "easyedit"}, 2, "--as"),
        ({"--cov": tmp_path / "absent.h5"}, 1, "does not exist"),
        ({"-o": "/proc/nope"}, 1, "was not written"),
    ]:
        result = kscli("export-cov", *chain(*(right | wrong).items()))
        assert result.exit_code == code, result.stderr
        assert said in one_sentence(result.stderr)
        assert not (tmp_path / "s").exists()
    assert kscli("export-cov", "--cov", cov, "--for", "pmet", "-o", tmp_path).exit_code == 2
    assert kscli("export-cov", "--cov", cov, "--for", "rome").exit_code == 2


def test_a_sum_beyond_float32_is_refused(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    with changed(cov) as file:
        file["second_moment"][1] = 1e36
    with pytest.raises(NumericsError, match=r"layer 1 of .*not finite in float32"):
        export_covariance(cov, tmp_path / "s", ExportOptions("rome", layers="1"))
    assert list((tmp_path / "s").rglob("*.*")) == []


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cov = write_cov(tmp_path / "cov.h5")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kscli_files.os, "fsync", fail)
    with pytest.raises(ArtifactError, match="the disk is full"):
        export_covariance(cov, tmp_path / "s", ExportOptions("rome"))
    assert list((tmp_path / "s").rglob("*.*")) == []


# Import


def test_import_is_the_sum_divided_by_the_count(tmp_path: Path) -> None:
    stats = tmp_path / "stats" / "toy" / "wikipedia_stats"
    for layer in LAYERS:
        write_npz(leaf(stats, layer), sums()[layer])
    result = kscli("import-cov", tmp_path / "stats", "--model", "toy", "--dir", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "layers 0-2 over 2,000 tokens" in result.stderr
    with CovarianceFile(tmp_path / "toy" / "cov.h5") as cov:
        assert (cov.layers, cov.count, cov.model) == (LAYERS, COUNT, "toy")
        for layer in LAYERS:
            true = (sums()[layer].astype(np.float64) / COUNT).astype(np.float32)
            np.testing.assert_array_equal(cov.second_moment(layer), true)
        attributes, about = cov.attributes, cov.about
    assert attributes["hook"] == "h.{}.down"
    assert (attributes["d_m"], attributes["n_layers"]) == (D, 3)
    for name in ("weights", "tokenizer", "revision", "dtype", "device", "special_tokens"):
        assert attributes[name] == "unknown"
    for name in ("corpus", "corpus_identity", "documents", "max_length"):
        assert attributes[name] == "unknown"
    assert about.imported
    assert {about.weights, about.corpus_identity, about.documents, about.max_length} == {None}
    with h5py.File(tmp_path / "toy" / "cov.h5") as file:
        assert file["second_moment"].dtype == np.float32
        assert file["second_moment"].dims[0][0] == file["layer"]


def test_the_users_note_is_recorded_for_what_files_do_not_tell(tmp_path: Path) -> None:
    write_npz(leaf(tmp_path, 4), sums()[0])
    result = kscli(
        *("import-cov", tmp_path, "-m", "toy", "-o", tmp_path / "c.h5"),
        *("--note", "20220301.en, 1024 tokens"),
    )
    assert result.exit_code == 0, result.stderr
    shown = json.loads(kscli("show", tmp_path / "c.h5", "-f", "json").stdout)[0]
    assert shown["note"] == shown["corpus"] == "20220301.en, 1024 tokens"
    assert shown["layers"] == "4"
    assert shown["n_layers"] == 5


def test_round_trip_is_exact_to_float32(tmp_path: Path) -> None:
    """Two float32 roundings, of C times the count and of the quotient."""
    cov = write_cov(tmp_path / "cov.h5")
    for editor in ("rome", "alphaedit"):
        stats = tmp_path / editor
        export_covariance(cov, stats, ExportOptions(editor))  # type: ignore[arg-type]
        import_covariance(stats, "someone/toy", tmp_path / f"{editor}.h5")
        with CovarianceFile(tmp_path / f"{editor}.h5") as read:
            assert read.count == COUNT
            assert read.about.model_id == "someone/toy"
            assert read.about.hook == PROVENANCE["hook"]
            for layer in LAYERS:
                C = second_moments()[layer].astype(np.float64)
                np.testing.assert_allclose(read.second_moment(layer), C, rtol=2.0**-23)


def test_an_imported_file_exports_again_to_the_same_bytes_of_matrix(tmp_path: Path) -> None:
    write_npz(leaf(tmp_path / "a", 3), sums()[2])
    import_covariance(tmp_path / "a", "someone/toy", tmp_path / "cov.h5")
    export_covariance(tmp_path / "cov.h5", tmp_path / "b", ExportOptions("memit"))
    (path,) = (tmp_path / "b").rglob("*.npz")
    with np.load(path) as held:
        np.testing.assert_allclose(held["mom2.mom2"], sums()[2], rtol=2.0**-23)


def test_pmatrix_works_on_an_imported_file_and_says_what_it_cannot_check(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    true = PMatrixFile(place / "pmatrix.h5").matrix("P", 1)
    assert (
        kscli(
            *("export-cov", "-m", "toy", "--dir", tmp_path, "--for", "rome", "-o", tmp_path / "s")
        ).exit_code
        == 0
    )
    (place / "cov.h5").unlink()
    assert kscli("import-cov", tmp_path / "s", "-m", "toy", "--dir", tmp_path).exit_code == 0
    result = kscli("pmatrix", "-m", "toy", "--dir", tmp_path, "--force")
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "agree in weights, tokenizer, dtype, special_tokens could not be checked" in warnings[0]
    with PMatrixFile(place / "pmatrix.h5") as pm:
        np.testing.assert_allclose(pm.matrix("P", 1), true, atol=1e-5)
        assert pm.about.weights == PROVENANCE["weights"]


@pytest.mark.parametrize(("name", "value"), [("d_m", D), ("hook", "h.{}.down")])
def test_width_and_hook_of_an_imported_file_must_still_match(
    name: str, value: object, tmp_path: Path
) -> None:
    write_npz(leaf(tmp_path, 0), sums()[0])
    import_covariance(tmp_path, "toy", tmp_path / "cov.h5")
    other = 7 if name == "d_m" else "h.{}.up"
    keys_of_other = np.zeros((3, 6, 7 if name == "d_m" else D), np.float32)
    write_keys(tmp_path / "keys.h5", keys_of_other, **{name: other})
    with (
        CovarianceFile(tmp_path / "cov.h5") as cov,
        KeysFile(tmp_path / "keys.h5") as keys,
        pytest.raises(ArtifactError, match=rf"differ in {name} \({value}".replace("{", r"\{")),
    ):
        require_same_identity(cov, keys)


def test_names_are_hints_and_contents_decide(tmp_path: Path) -> None:
    """Suffixes that lie or are literal, no suffix at all, and files of other things."""
    names = {
        "transformer.h.0.mlp.c_proj_float32_mom2_t{batch_tokens}_100000.npz": 0,
        "transformer.h.1.mlp.c_proj_float64_mean-mom2.npz": 1,
        "transformer.h.2.mlp.c_proj.npz": 2,
        "transformer.h.10.mlp.c_proj_mom2 (1).npz": 10,
    }
    for name, layer in names.items():
        write_npz(tmp_path / name, sums()[0] * (layer + 1))
    np.savez(tmp_path / "transformer.h.3.mlp.c_proj_float32_mean_100000.npz", count=3)
    (tmp_path / "._transformer.h.0.mlp.c_proj_float32_mom2_100000.npz").write_text("resource fork")
    (tmp_path / "readme.txt").write_text("x")
    files = import_covariance(tmp_path, "toy", tmp_path / "cov.h5")
    assert [file.path.name for file in files] == list(names)
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        assert cov.layers == (0, 1, 2, 10)
        assert cov.about.hook == "transformer.h.{}.mlp.c_proj"
        C = sums()[0].astype(np.float64) / COUNT
        np.testing.assert_allclose(cov.second_moment(10), 11 * C, rtol=1e-6)


def test_digits_in_a_modules_name_are_no_layer(tmp_path: Path) -> None:
    path = write_npz(leaf(tmp_path, 7, "gpt_neox.layers.{}.mlp.dense_4h_to_h"), sums()[0])
    described = describe_statistics(path)
    assert described is not None
    assert described.layer == 7
    assert described.hook == "gpt_neox.layers.{}.mlp.dense_4h_to_h"
    for name in ("mlp.c_proj_float32_mom2_1.npz", "h.1.experts.2.down_float32_mom2_1.npz"):
        with pytest.raises(ArtifactError, match=r"its layer's number.*rename it"):
            describe_statistics(write_npz(tmp_path / name, sums()[0]))


def test_any_depth_one_file_and_the_models_own_folder(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    mine = write_npz(leaf(stats / "someone_toy" / "wikipedia_stats", 1), sums()[1])
    write_npz(leaf(stats / "gpt2-xl" / "wikipedia_stats", 1), np.eye(5, dtype=np.float32))
    for source in (stats, stats / "someone_toy", mine.parent, mine):
        (file,) = import_covariance(source, "someone/toy", tmp_path / "c.h5", force=True)
        assert file.path == mine
    (stats / "someone_toy").rename(stats / "toy")
    (file,) = import_covariance(stats, "someone/toy", tmp_path / "c.h5", force=True)
    assert file.path.parent.parent.name == "toy"


@pytest.mark.parametrize("kind", ["compressed", "float64", "big-endian", "fortran", "npy 2.0"])
def test_every_way_of_storing_a_matrix_is_read(kind: str, tmp_path: Path) -> None:
    matrix: NDArray[Any] = sums()[0]
    path = leaf(tmp_path, 0)
    if kind == "float64":
        matrix = matrix.astype(np.float64)
    elif kind == "big-endian":
        matrix = matrix.astype(">f4")
    elif kind == "fortran":
        matrix = np.asfortranarray(matrix)
    write_npz(path, matrix)
    if kind == "compressed":
        with np.load(path) as held:
            np.savez_compressed(path, **dict(held.items()))
    elif kind == "npy 2.0":
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in (("mom2.count", np.int64(COUNT)), ("mom2.mom2", matrix)):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array), version=(2, 0))
    import_covariance(tmp_path, "toy", tmp_path / "cov.h5")
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        true = (sums()[0].astype(np.float64) / COUNT).astype(np.float32)
        np.testing.assert_array_equal(cov.second_moment(0), true)


def test_rounding_is_made_symmetric(tmp_path: Path) -> None:
    """Across blocks too: each entry is the mean of (i, j) and (j, i)."""
    d = 1300
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2 * d, d), dtype=np.float32)
    S = keys.T @ keys
    S *= 1 + rng.uniform(-1e-6, 1e-6, S.shape).astype(np.float32)
    assert (S != S.T).any()
    write_npz(leaf(tmp_path, 0), S, 2 * d)
    import_covariance(tmp_path, "toy", tmp_path / "cov.h5")
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        C = cov.second_moment(0)
    np.testing.assert_array_equal(C, C.T)
    true = (S.astype(np.float64) + S.T) / 2 / (2 * d)
    np.testing.assert_allclose(C, true, rtol=0, atol=2.0**-23 * np.abs(true).max())


def broken(how: str) -> tuple[NDArray[Any], object, str]:
    """A matrix, a count, and the array to leave out, wrong in one way."""
    matrix: NDArray[Any] = sums()[1].copy()
    count: object = COUNT
    leave = ""
    if how == "not square":
        matrix = matrix[:, :-1]
    elif how == "a vector":
        matrix = matrix[0]
    elif how == "empty":
        matrix = matrix[:0, :0]
    elif how == "not symmetric":
        matrix[3, 5] += 0.01 * matrix[3, 3]
    elif how == "NaN":
        matrix[2, 7] = matrix[7, 2] = np.nan
    elif how == "infinite":
        matrix[2, 2] = np.inf
    elif how == "too large":
        matrix = matrix.astype(np.float64) * 1e40
    elif how == "negative diagonal":
        matrix[4, 4] *= -1
    elif how == "integers":
        matrix = matrix.astype(np.int64)
    elif how == "float16":
        matrix = matrix.astype(np.float16)
    elif how == "pickled":
        matrix = matrix.astype(object)
    elif how.startswith("count"):
        count = {"0": 0, "-3": -3, "1.5": 1.5, "two": np.array([1, 2])}[how.split()[1]]
    else:
        leave = how
    return matrix, count, leave


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not square", r"of shape \(12, 11\), not a square"),
        ("a vector", r"of shape \(12,\), not a square"),
        ("empty", "not a square"),
        ("not symmetric", r"not symmetric: entries \((3|5), (3|5)\)"),
        ("NaN", "NaN or infinite"),
        ("infinite", "NaN or infinite"),
        ("too large", "NaN or infinite"),
        ("negative diagonal", r"entry \(4, 4\) .*negative"),
        ("integers", "int64, where float32"),
        ("float16", "float16, where float32"),
        ("pickled", "pickled objects"),
        ("count 0", "mom2.count is 0"),
        ("count -3", "mom2.count is -3"),
        ("count 1.5", "mom2.count is 1.5, where an integer"),
        ("count two", "mom2.count is of shape"),
        ("mom2.count", "no array mom2.count"),
        ("mom2.mom2", "no array mom2.mom2"),
    ],
)
def test_what_is_no_second_moment_is_refused(how: str, said: str, tmp_path: Path) -> None:
    """In the second of two files, and nothing is written or left behind."""
    stats = tmp_path / "stats"
    write_npz(leaf(stats, 0), sums()[0])
    matrix, count, leave = broken(how)
    path = write_npz(leaf(stats, 1), matrix, count, leave)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KscliError, match=said) as raised:
        import_covariance(stats, "toy", out / "cov.h5")
    assert str(path) in str(raised.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "tail", "byte", "header", "checksum"])
def test_a_damaged_file_is_one_sentence(damage: str, compressed: bool, tmp_path: Path) -> None:
    path = write_npz(leaf(tmp_path, 0), sums()[0])
    if compressed:
        with np.load(path) as held:
            np.savez_compressed(path, **dict(held.items()))
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("mom2.mom2.npy")
        data = info.header_offset + 30 + len(info.filename)
    if damage == "empty":
        whole = bytearray()
    elif damage == "text":
        whole = bytearray(b"not found\n")
    elif damage == "half":
        whole = whole[: len(whole) // 2]
    elif damage == "tail":
        whole = whole[:-40]
    elif damage == "byte":
        whole[data + info.compress_size // 2 + 60] ^= 0x10
    elif damage == "checksum":
        entry = whole.rindex(b"mom2.mom2.npy") - 46
        assert whole[entry : entry + 4] == b"PK\x01\x02"
        whole[entry + 16] ^= 0x10
    else:
        whole[data + 22 : data + 27] = b"\xff" * 5
    path.write_bytes(whole)
    result = kscli("import-cov", tmp_path, "-m", "toy", "--dir", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{path} is not an .npz file, or is damaged" in one_sentence(result.stderr)
    assert not (tmp_path / "out" / "toy" / "cov.h5").exists()


def test_a_matrix_that_is_shorter_than_its_header_says(tmp_path: Path) -> None:
    path = leaf(tmp_path, 0)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("mom2.count.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(5))
        with archive.open("mom2.mom2.npy", "w") as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(b"\0" * 400)
    with pytest.raises(ArtifactError, match="damaged"):
        import_covariance(tmp_path, "toy", tmp_path / "cov.h5")


def test_files_that_do_not_belong_together_are_refused_naming_both(tmp_path: Path) -> None:
    small = sums()[0][:5, :5]
    cases: dict[str, tuple[Path, NDArray[Any], int, str]] = {
        "width": (leaf(Path(), 1), small, COUNT, "differ in width (12 and 5)"),
        "count": (leaf(Path(), 1), sums()[1], 7, "differ in mom2.count (2000 and 7)"),
        "module": (leaf(Path(), 1, "h.{}.up"), sums()[1], COUNT, "differ in module"),
        "layer": (leaf(Path("wikitext_stats"), 0), sums()[1], COUNT, "both of layer 0"),
    }
    for name, (relative, matrix, count, said) in cases.items():
        first = write_npz(leaf(tmp_path / name / "wikipedia_stats", 0), sums()[0])
        second = write_npz(tmp_path / name / relative, matrix, count)
        with pytest.raises(ArtifactError) as raised:
            import_covariance(tmp_path / name, "toy", tmp_path / "cov.h5")
        assert said in str(raised.value)
        assert str(first) in str(raised.value)
        assert str(second) in str(raised.value)
    assert not (tmp_path / "cov.h5").exists()


def test_an_alias_knows_its_width_and_its_layers(tmp_path: Path) -> None:
    eye = np.eye(512, dtype=np.float32)
    write_npz(leaf(tmp_path / "a", 3), eye)
    import_covariance(tmp_path / "a", "tiny", tmp_path / "cov.h5")
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        assert cov.about.n_layers == 4
        assert cov.about.model_id == "tiny"
    with pytest.raises(ArtifactError, match="512 wide, where gpt2-small has d_m 3072"):
        import_covariance(tmp_path / "a", "gpt2-small", tmp_path / "other.h5")
    write_npz(leaf(tmp_path / "b", 4), eye)
    with pytest.raises(ArtifactError, match="of layer 4, where tiny has layers 0 to 3"):
        import_covariance(tmp_path / "b", "tiny", tmp_path / "other.h5")


def test_mistakes_of_import_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "values.npz", v_star=np.ones(3))
    for source in ("empty", "values.npz"):
        result = kscli("import-cov", tmp_path / source, "-m", "toy", "--dir", tmp_path / "out")
        assert result.exit_code == 1
        assert "holds no second moments" in one_sentence(result.stderr)
    result = kscli("import-cov", tmp_path / "absent", "-m", "toy", "--dir", tmp_path / "out")
    assert (result.exit_code, "does not exist" in one_sentence(result.stderr)) == (1, True)
    assert not (tmp_path / "out").exists()
    assert kscli("import-cov", tmp_path).exit_code == 2  # the model must be named


def test_import_replaces_nothing_without_force(tmp_path: Path) -> None:
    write_npz(leaf(tmp_path / "s", 0), sums()[0])
    path = write_cov(tmp_path / "toy" / "cov.h5")
    before = path.read_bytes()
    command = ("import-cov", tmp_path / "s", "-m", "toy", "--dir", tmp_path)
    result = kscli(*command)
    assert result.exit_code == 1
    assert "exists; add --force" in one_sentence(result.stderr)
    assert path.read_bytes() == before
    assert kscli(*command, "--force").exit_code == 0
    assert path.read_bytes() != before


def test_a_layer_never_stands_twice_in_memory(tmp_path: Path) -> None:
    """Peak memory above the imports' own, of an export and of an import: under 1.5 layers."""
    # Not ru_maxrss, which a child process inherits from its parent.
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read the peak of memory from")
    d = 4608
    with write_artifact(tmp_path / "cov.h5", "cov", about_cov(d_m=d)) as writer:
        writer.layers([0, 1])
        writer.write("count", 10**6)
        for index in range(2):
            writer.put("second_moment", index, np.full((d, d), 0.5, np.float32))
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from kscli.second_moment.interchange import ExportOptions, export_covariance\n"
        "from kscli.second_moment.interchange import import_covariance\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "folder = Path(sys.argv[1])\n"
        "before = peak()\n"
        "export_covariance(folder / 'cov.h5', folder / 's', ExportOptions('rome'))\n"
        "exported = peak() - before\n"
        "import_covariance(folder / 's', 'toy', folder / 'imported.h5')\n"
        "print(exported, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    layer = 4 * d * d
    exported, imported = map(int, done.stdout.split())
    assert exported < 1.5 * layer
    assert imported < 1.5 * layer
    with h5py.File(tmp_path / "imported.h5") as file:
        assert file["second_moment"].shape == (2, d, d)
        assert file["second_moment"][1, -1, -1] == 0.5


def test_neither_command_imports_torch(tmp_path: Path) -> None:
    write_cov(tmp_path / "cov.h5")
    for command in (
        ["export-cov", "--cov", "cov.h5", "--for", "rome", "-o", "s"],
        ["import-cov", "s", "-m", "toy", "-o", "new.h5"],
    ):
        program = (
            "import sys\nfrom kscli.__main__ import main\ntry:\n    main()\nfinally:\n"
            "    print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"
