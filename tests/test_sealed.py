"""Sealed files: every change is noticed, other programs read them, and hostile ones are refused."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import Contents, changed, write_toy
from cli_kit import kscli, one_sentence
from edit_kit import Run

from kscli.analysis.statistics import caution
from kscli.analysis.stats_file import StatisticsFile, statistics_of
from kscli.artifacts import (
    CovarianceFile,
    Existing,
    KeysFile,
    PMatrixFile,
    SealedFile,
    open_for_writing,
    sealed,
)
from kscli.artifacts.sealed import BLOCK, Seal, digest_of_rest
from kscli.editing.edits_file import EditsFile
from kscli.errors import ArtifactError


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = write_toy(tmp_path_factory.mktemp("sound"))
    Run(n=3, m=6).write(place / "edits.h5")
    with PMatrixFile(place / "pmatrix.h5") as pm:
        statistics_of(pm, pm.layers, place / "stats.h5", existing=Existing.REFUSE)
    return {kind: place / f"{kind}.h5" for kind in ("cov", "keys", "pmatrix", "stats", "edits")}


def copy_of(path: Path, folder: Path) -> Path:
    to = folder / path.name
    to.write_bytes(path.read_bytes())
    return to


def test_every_byte_counts(toy: dict[str, Path], tmp_path: Path) -> None:
    """A file of which any one byte is another is refused, and one without its end."""
    whole = toy["pmatrix"].read_bytes()
    path = tmp_path / "pmatrix.h5"
    for place in [*range(0, len(whole), 397), *range(len(whole) - 64, len(whole))]:
        data = bytearray(whole)
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"pmatrix\.h5 "):
            SealedFile(path)
    for end in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:end])
        with pytest.raises(ArtifactError, match=r"pmatrix\.h5 "):
            SealedFile(path)


def test_a_large_file_is_checked_as_it_is_read(
    toy: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "WHOLE", 0)
    path = copy_of(toy["pmatrix"], tmp_path)
    with SealedFile(path) as file:
        place = file.arrays["P"].offset + file.arrays["P"].part_bytes
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with PMatrixFile(path) as pm:
        assert pm.matrix("P", 0).shape == (6, 6)
        with pytest.raises(ArtifactError, match="its dataset P, layer 1 was changed"):
            pm.matrix("P", 1)


def test_blocks_are_put_together(tmp_path: Path) -> None:
    """Arrays of several blocks and parts, read from any entry on and in another type."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, BLOCK // 4 + 1000)).astype(np.float32)
    texts = np.array([["é", ""], ["Größe", "x" * 50]], dtype=object)
    with open_for_writing(tmp_path / "a.h5") as writer:
        for index, part in enumerate(values):
            writer.put("a", index, part, len(values))
        writer.write("whole", values)
        writer.write("texts", texts)
        writer.write("none", np.zeros((0, 3)))
        writer.attributes["of"] = "a"
    with SealedFile(tmp_path / "a.h5") as file:
        assert len(file.arrays["a"].blocks) == 6
        for name in ("a", "whole"):
            assert np.array_equal(file.read(name), values)
            for start, size in ((0, 5), (BLOCK // 4 - 2, 7), (values.shape[1] - 3, 9)):
                out = np.empty(size)
                file.read_into(name, start, out)
                assert np.array_equal(out, values.reshape(-1)[start : start + size])
        assert file.read("texts").tolist() == texts.tolist()
        assert file.read("none").shape == (0, 3)
        assert file.attributes == {"of": "a"}


def test_h5py_reads_what_the_seal_says(toy: dict[str, Path]) -> None:
    for path in toy.values():
        with h5py.File(path) as held, SealedFile(path) as file:
            for name in file.arrays:
                text = h5py.check_string_dtype(held[name].dtype)
                values = held[name].asstr()[()] if text else held[name][()]
                np.testing.assert_array_equal(file.read(name), values, name)
                for dimension in held[name].dims:
                    assert len(dimension) == 1 or name == "layer", name
            assert dict(held.attrs) == file.attributes
            assert held["seal"].asstr()[()].endswith("\n")


def test_an_older_and_a_locked_file_are_called_so(toy: dict[str, Path], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "old.h5", "w") as old:
        old.attrs["kind"] = "cov"
    with pytest.raises(ArtifactError, match="is of format 1, which this kscli does not read"):
        CovarianceFile(tmp_path / "old.h5")
    path = copy_of(toy["cov"], tmp_path)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="is open for writing in another program"):
            CovarianceFile(path)
    CovarianceFile(path)
    os.mkfifo(tmp_path / "fifo.h5")
    with pytest.raises(ArtifactError, match="is a FIFO"):
        CovarianceFile(tmp_path / "fifo.h5")


LEADS_ELSEWHERE: dict[str, Callable[[h5py.File], object]] = {
    "an external link": lambda f: f.__setitem__("P", h5py.ExternalLink("other.h5", "/P")),
    "a soft link": lambda f: f.__setitem__("P", h5py.SoftLink("/Q")),
    "a hard link": lambda f: f.__setitem__("P", f["Q"]),
    "external storage": lambda f: f.create_dataset(
        "P", (3, 6, 6), "f8", external=[("secret", 0, h5py.h5f.UNLIMITED)]
    ),
    "references": lambda f: f.__setitem__("P", np.full((3, 6, 6), f.ref, h5py.ref_dtype)),
    "a shape that no file holds": lambda f: f.create_dataset("P", (1, 50_000, 50_000), "f8"),
}


@pytest.mark.parametrize("how", LEADS_ELSEWHERE.values(), ids=LEADS_ELSEWHERE.keys())
def test_nothing_is_followed(
    how: Callable[[h5py.File], object], toy: dict[str, Path], tmp_path: Path
) -> None:
    path = copy_of(toy["pmatrix"], tmp_path)
    with h5py.File(path, "r+") as file:
        del file["P"]
        how(file)
    result = kscli("topk", "--pmatrix", path)
    assert result.exit_code == 1
    assert "was changed after it was written" in one_sentence(result.stderr)


def filled(name: str, value: Any, at: Any = 0) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[name].reshape(-1)[at] = value

    return change


def said(name: str, value: Any) -> Callable[[Contents], None]:
    return lambda contents: contents.attrs.__setitem__(name, value)


# Under a seal that is right: the kind, what is wrong in it, and what the error says.
NO_SENSE: dict[str, tuple[str, Callable[[Contents], None], str]] = {
    "P is NaN": ("pmatrix", filled("P", np.nan, 8), r"P, layer 0, is nan at \(1, 2\)"),
    "P is infinite": ("pmatrix", filled("P", -np.inf, 8), "P, layer 0, is -inf"),
    "P's diagonal": ("pmatrix", filled("P", 0.9), "where 1 is needed"),
    "p of no keys": ("pmatrix", filled("P", 9.0, 1), r"P, layer 0, is 9 at \(0, 1\), which"),
    "p of one side": ("pmatrix", filled("P", 0.01, 1), "which is no inner product"),
    "leverage of no keys": ("pmatrix", filled("leverage", 1e9), "which is no inner product"),
    "leverage": ("pmatrix", filled("leverage", 0.0), "more than 0 is needed"),
    "layers twice": ("pmatrix", filled("layer", 0, slice(None)), "layer is 0"),
    "layers descend": ("pmatrix", filled("layer", [2, 1, 0], slice(None)), "layer is 1"),
    "a negative layer": ("pmatrix", filled("layer", -1), "layer is -1"),
    "no such layer": ("pmatrix", filled("layer", 7, 2), "where the model has 3 layers"),
    "C not symmetric": ("cov", filled("second_moment", 9.0, 1), "other side of the diagonal"),
    "C negative": ("cov", filled("second_moment", -1.0), "0 or more is needed"),
    "C infinite": ("cov", filled("second_moment", np.inf), "a finite number is needed"),
    "no tokens": ("cov", filled("count", 0), "count is 0"),
    "a key": ("keys", filled("keys", np.nan), "a finite number is needed"),
    "a token": ("keys", filled("token_id", -5), "token_id is -5"),
    "a fact": ("edits", filled("edited", 6), "edited is 6 at .*0 to less than 6 is needed"),
    "a step": ("edits", filled("step", 99), "0 to 3 is needed"),
    "a batch": ("edits", said("batch", 0), "its attribute batch is 0"),
    "d_m": ("cov", said("d_m", 0), "its attribute d_m is 0"),
    "ridge": ("pmatrix", said("ridge", float("nan")), "its attribute ridge is nan"),
    "an endless number": ("pmatrix", said("ridge", 10**400), "its attribute ridge is 1000"),
    "a fact of a statistic": ("stats", filled("top_pair_i", 6.0), "0 to less than 6 is needed"),
    "a share": ("stats", filled("tail_0_25", 1.5), "tail_0_25 is 1.5 at .*0 to 1 is needed"),
    "a deviation": ("stats", filled("std", -1.0), "std is -1.0 at"),
    "endless pairs": ("stats", filled("fourth_moment_pairs", np.inf), "fourth_moment_pairs is inf"),
    "hook up": ("cov", said("hook", "../../{}"), "its attribute hook"),
    "hook a format": ("cov", said("hook", "h.{}.{0.__class__}"), "its attribute hook"),
    "two layers": ("cov", said("hook", "h.{}.{}"), "its attribute hook"),
    "model a path": ("cov", said("model", "../../x"), "its attribute model"),
    "null": ("cov", said("model_id", "a\0b"), "its attribute model_id"),
}


def read_matrices(path: Path) -> None:
    with PMatrixFile(path) as pm:
        _ = pm.matrix("P", 0), pm.matrix("whitened_cosine", 0), pm.leverage(0)


def read_edits(path: Path) -> None:
    with EditsFile(path) as run:
        _ = run.objects(), run.values("step")


READ: dict[str, Callable[[Path], object]] = {
    "cov": lambda path: (CovarianceFile(path).count, CovarianceFile(path).second_moment(0)),
    "keys": lambda path: (KeysFile(path).token_id, KeysFile(path).keys_of(0)),
    "pmatrix": read_matrices,
    "stats": lambda path: StatisticsFile(path).statistics(),
    "edits": read_edits,
}


def test_statistics_of_other_facts_are_not_taken(toy: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(toy["stats"], tmp_path)
    with changed(path) as contents:
        contents.attrs["m"] = 10**9
    with (
        PMatrixFile(toy["pmatrix"]) as pm,
        pytest.raises(ArtifactError, match=r"is of 1,000,000,000 facts, where .* has 6"),
    ):
        statistics_of(pm, pm.layers, path, existing=Existing.REFUSE)


def test_a_strongest_pair_that_is_not_defined_is_not_told(toy: dict[str, Path]) -> None:
    with PMatrixFile(toy["pmatrix"]) as pm, StatisticsFile(toy["stats"]) as file:
        found = file.statistics()
        values = found.values | {
            "kurtosis": np.full(3, 9.0),
            "fourth_moment_pairs": np.ones(3),
            "top_pair_i": np.array([np.nan, 1, np.nan]),
            "top_pair_j": np.array([2.0, 2, 2]),
        }
        said = caution(replace(found, values=values, m=10), pm.facts)
    assert said is not None
    assert "at layer 1, " in said


@pytest.mark.parametrize(("kind", "change", "wanted"), NO_SENSE.values(), ids=NO_SENSE.keys())
def test_what_makes_no_sense_is_refused(
    kind: str, change: Callable[[Contents], None], wanted: str, toy: dict[str, Path], tmp_path: Path
) -> None:
    path = copy_of(toy[kind], tmp_path)
    with changed(path) as contents:
        change(contents)
    with pytest.raises(ArtifactError, match=wanted) as raised:
        READ[kind](path)
    assert str(raised.value).startswith(str(path))


Edit = Callable[[dict[str, Any]], object]
OF_P = "P"
SEALS: dict[str, Edit] = {
    "more than the file holds": lambda held: held[OF_P].update(shape=[1, 50_000, 50_000]),
    "beyond its end": lambda held: held[OF_P].update(offset=10**12),
    "a negative place": lambda held: held[OF_P].update(offset=-1),
    "another type": lambda held: held[OF_P].update(type="|O"),
    "a type of structures": lambda held: held[OF_P].update(type="i4,i4"),
    "text of 2 GB": lambda held: held[OF_P].update(type="|S2147483648"),
    "no digests": lambda held: held[OF_P].update(blocks=[]),
    "no array": lambda held: held.update(P=3),
    "10^9 parts": lambda held: held[OF_P].update(parts=10**9),
    "a true length": lambda held: held[OF_P].update(shape=[True, 6, 6]),
}


def reseal(path: Path, edit: Edit | str) -> None:
    """Put a seal of another text behind a file."""
    with SealedFile(path) as file:
        whole = json.loads(Seal(file.attributes, file.arrays, "").text().partition(b"\nkscli")[0])
    if callable(edit):
        edit(whole["arrays"])
    data = json.dumps(whole).encode() if callable(edit) else edit.encode()
    own = sealed.hashlib.sha256(data).hexdigest()
    line = f"\nkscli seal {sealed.FORMAT_VERSION} {len(data):012d} {own}\n"
    path.write_bytes(path.read_bytes() + data + line.encode())


@pytest.mark.parametrize(
    "edit", [*SEALS.values(), "[" * 100_000, "{}", "null", '"x"'], ids=lambda x: ""
)
def test_what_a_seal_declares_is_compared_with_the_file(
    edit: Edit | str, toy: dict[str, Path], tmp_path: Path
) -> None:
    path = copy_of(toy["pmatrix"], tmp_path)
    reseal(path, edit)
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=r"pmatrix\.h5 is damaged or was not made by kscli: "):
        PMatrixFile(path)
    assert time.monotonic() - began < 2


def test_the_rest_is_all_that_is_in_no_array() -> None:
    from kscli.artifacts.sealed import Held

    data = bytes(range(100))
    arrays = [Held("|b1", (10,), 20, 1, ()), Held("<f8", (2,), 25, 1, ())]
    found = digest_of_rest(arrays, (90, 5), 100, lambda start, size: data[start : start + size])
    rest = data[:20] + data[41:90] + data[95:]
    assert found == sealed.hashlib.sha256(rest).hexdigest()


def test_a_name_from_a_file_leads_nowhere_else(toy: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(toy["cov"], tmp_path)
    for hook in ("../../../PWN{}", "/PWN.{}", "a/../../PWN.{}"):
        with changed(path) as contents:
            contents.attrs["hook"] = hook
        done = kscli("export-cov", "--cov", path, "--for", "rome", "-o", tmp_path / "o")
        assert done.exit_code == 1
        assert "its attribute hook is" in one_sentence(done.stderr)
        path.write_bytes(toy["cov"].read_bytes())
    assert not list(tmp_path.rglob("*PWN*"))


def test_a_layer_that_was_not_written_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not all of a was written"),
        open_for_writing(tmp_path / "a.h5") as writer,
    ):
        writer.put("a", 0, np.zeros(3), 2)
