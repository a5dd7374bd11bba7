"""Parts of a corpus merged: the mean over all tokens, and what is no partition refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import PROVENANCE, changed, write_cov
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray
from typer.testing import Result

from kscli.artifacts import CovarianceAbout, CovarianceFile, difference, write_artifact
from kscli.errors import ArtifactError, UsageError
from kscli.second_moment import merging
from kscli.second_moment.merging import find_parts, merge_covariances
from kscli.second_moment.options import Shard

LAYERS = (0, 2)
D = PROVENANCE["d_m"]
RECIPE: dict[str, Any] = {
    "weights": "sha256:w",
    "tokenizer": "sha256:t",
    "corpus": "sha256:c",
    "samples": 1000,
    "tokens": None,
    "max_length": None,
    "layers": "0,2",
    "dtype": "float32",
}
DETAILS: dict[str, Any] = {
    "corpus": "toy text",
    "corpus_identity": "sha256:c",
    "documents": 10,
    "whole_corpus": True,
    "max_length": 512,
    "batch_tokens": 4096,
    "batches_halved": False,
    "padding": 0.0,
}


def keys_of(shard: Shard, d_m: int = D) -> NDArray[np.float64]:
    """Different in number and in scale, so that a mean of means would be another matrix."""
    rng = np.random.default_rng(shard.index)
    keys = rng.standard_normal((len(LAYERS), 50 + 30 * shard.index, d_m))
    return keys * (1 + shard.index)


def write_part(
    path: Path,
    shard: Shard,
    *,
    layers: tuple[int, ...] = LAYERS,
    recipe: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
    d_m: int = D,
    **changes: Any,
) -> Path:
    about = CovarianceAbout(
        **(PROVENANCE | {"d_m": d_m} | DETAILS | (details or {}) | changes),
        recipe=RECIPE | {"shard": str(shard)} | (recipe or {}),
    )
    keys = keys_of(shard, d_m)
    with write_artifact(path, "cov", about, force=True) as writer:
        writer.layers(layers)
        writer.write("count", keys.shape[1])
        for index in range(len(layers)):
            writer.put("second_moment", index, keys[index].T @ keys[index] / keys.shape[1])
    return path


def write_parts(folder: Path, count: int, **changes: Any) -> list[Path]:
    shards = [Shard(index, count) for index in range(count)]
    return [write_part(folder / shard.file_name(), shard, **changes) for shard in shards]


def merge_cov(*arguments: str | Path) -> Result:
    return kscli("merge-cov", *arguments)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [merging.BLOCK_BYTES, 5 * 8 * D])
def test_the_mean_over_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, block_bytes: int
) -> None:
    monkeypatch.setattr(merging, "BLOCK_BYTES", block_bytes)
    parts = write_parts(tmp_path, count)
    result = merge_covariances(parts[::-1], tmp_path / "cov.h5")
    keys = np.concatenate([keys_of(Shard(i, count)) for i in range(count)], axis=1)
    assert (result.tokens, result.documents, result.layers) == (keys.shape[1], 10 * count, LAYERS)
    assert result.parts == tuple(parts)
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        assert cov.count == keys.shape[1]
        assert cov.layers == LAYERS
        for index, layer in enumerate(LAYERS):
            exact = np.einsum("na,nb->ab", keys[index], keys[index]) / keys.shape[1]
            C = cov.second_moment(layer)
            scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
            assert (np.abs(C - exact) <= 1e-7 * scale).all()
            assert (C == C.T).all()
    with h5py.File(tmp_path / "cov.h5") as file:
        assert file["second_moment"].dtype == np.float32


def test_the_whole_is_what_an_undivided_run_asks_for(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, 2)
    merge_covariances(parts, tmp_path / "cov.h5")
    assert difference(tmp_path / "cov.h5", "cov", RECIPE | {"shard": None}) is None
    assert difference(tmp_path / "cov.h5", "cov", RECIPE | {"samples": None}) is None
    assert difference(tmp_path / "cov.h5", "cov", RECIPE | {"samples": 19}) == "samples changed"
    assert difference(tmp_path / "cov.h5", "cov", RECIPE | {"shard": "0/2"}) == "shard changed"
    with CovarianceFile(tmp_path / "cov.h5") as cov, CovarianceFile(parts[1]) as part:
        assert cov.model == "toy"
        assert cov.about.inputs["shard 1/2"] == part.fingerprint
        held = {name: getattr(cov.about, name) for name in DETAILS}
    assert held == DETAILS | {"documents": 20}


def test_what_differs_only_in_how_it_was_made_is_merged(tmp_path: Path) -> None:
    one = write_part(tmp_path / "a.h5", Shard(0, 2), details={"padding": 0.5})
    other = write_part(
        tmp_path / "b.h5",
        Shard(1, 2),
        device="cuda",
        recipe={"layers": "0,2-2", "max_length": 512},
        details={"batch_tokens": 16384, "batches_halved": True, "whole_corpus": False},
    )
    merge_covariances([one, other], tmp_path / "cov.h5")
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        held = cov.about
    assert held.device == "cpu, cuda"
    assert held.batch_tokens == "4096, 16384"
    assert held.batches_halved is True
    assert held.whole_corpus is False
    assert held.padding == pytest.approx(1 - (50 + 80) / (100 + 80))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": "sha256:x"}, "weights (sha256:w and sha256:x)"),
        ({"tokenizer": "sha256:x"}, "tokenizer (sha256:t and sha256:x)"),
        ({"hook": "g.{}.down"}, "hook (h.{}.down and g.{}.down)"),
        ({"d_m": 13}, "d_m (12 and 13)"),
        ({"dtype": "bfloat16"}, "dtype (float32 and bfloat16)"),
        ({"special_tokens": "bos"}, "special_tokens (none and bos)"),
        ({"layers": (0, 1)}, "layers (0,2 and 0-1)"),
        ({"recipe": {"samples": 10}}, "samples (1000 and 10)"),
        ({"recipe": {"tokens": 10}}, "tokens (none and 10)"),
        ({"recipe": {"until_settled": 0.01}}, "until_settled (none and 0.01)"),
        ({"recipe": {"corpus": "sha256:d"}}, "corpus (sha256:c and sha256:d)"),
        ({"details": {"max_length": 256}}, "max_length (512 and 256)"),
        ({"details": {"corpus_identity": "x"}}, "corpus_identity (sha256:c and x)"),
    ],
)
def test_parts_that_differ_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    one = write_part(tmp_path / "a.h5", Shard(0, 2))
    other = write_part(tmp_path / "b.h5", Shard(1, 2), **changes)
    with pytest.raises(ArtifactError) as caught:
        merge_covariances([one, other], tmp_path / "cov.h5")
    assert f"{one} and {other} differ in {told}; make both" in str(caught.value)
    assert not (tmp_path / "cov.h5").exists()


def test_what_is_no_partition_is_refused(tmp_path: Path) -> None:
    a, b, c = (write_part(tmp_path / f"{i}.h5", Shard(i, 3)) for i in range(3))
    again = write_part(tmp_path / "again.h5", Shard(1, 3))
    four = write_part(tmp_path / "four.h5", Shard(3, 4))
    whole = write_cov(tmp_path / "whole.h5")
    imported = write_part(tmp_path / "imported.h5", Shard(0, 3), weights="unknown")
    odd = write_part(tmp_path / "odd.h5", Shard(5, 3))
    refusals = {
        (a, b, again, c): f"{b} and {again} are both shard 1/3",
        (a, b, b, c): f"{b} and {b} are both shard 1/3",
        (a, four): f"{a} is shard 0/3 and {four} is shard 3/4",
        (a, c): r"shard 1/3 is missing; run `kscli cache-cov -m toy --shard 1/3`.",
        (b,): "shards 0/3, 2/3 are missing",
        (a, whole): f"{whole} is no shard",
        (a, imported): f"{imported} was imported",
        (a, odd): f"{odd} is damaged",
        (a, tmp_path / "absent.h5"): "absent.h5 does not exist",
    }
    for parts, told in refusals.items():
        with pytest.raises(ArtifactError) as caught:
            merge_covariances(parts, tmp_path / "cov.h5")
        assert told in str(caught.value)
        assert not (tmp_path / "cov.h5").exists()


def test_the_command_for_a_missing_part_is_the_others(tmp_path: Path) -> None:
    part = write_part(tmp_path / "0.h5", Shard(0, 2))
    with changed(part) as file:
        file.attrs["command"] = "kscli cache-cov -m gpt2-xl --shard 0/2 --samples 50"
    with pytest.raises(ArtifactError, match=r"run `kscli cache-cov -m gpt2-xl --shard 1/2 --samp"):
        merge_covariances([part], tmp_path / "cov.h5")


@pytest.mark.parametrize(
    ("place", "value", "needed"),
    [
        ((1, 3, 4), np.nan, "a finite number"),
        ((1, 3, 3), -0.5, "0 or more"),
        ((1, 3, 4), 0.75, "the entry on the other side of the diagonal"),
    ],
)
def test_a_part_that_is_no_second_moment_is_refused(
    place: tuple[int, ...], value: float, needed: str, tmp_path: Path
) -> None:
    parts = write_parts(tmp_path, 2)
    with changed(parts[1]) as file:
        file["second_moment"][place] = value
    where = r"shard-1-of-2\.h5 .* second_moment, layer 2, is .* at \(3, "
    with pytest.raises(ArtifactError, match=f"{where}.*{needed} is needed"):
        merge_covariances(parts, tmp_path / "cov.h5")
    assert not (tmp_path / "cov.h5").exists()


def test_what_exists_stays_without_force(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, 2)
    path = tmp_path / "cov.h5"
    path.write_text("kept")
    with pytest.raises(ArtifactError, match=r"exists; add --force"):
        merge_covariances(parts, path)
    assert path.read_text() == "kept"
    merge_covariances(parts, path, force=True)
    with pytest.raises(UsageError, match="is not overwritten"):
        merge_covariances(parts, parts[0], force=True)
    assert difference(parts[0], "cov", RECIPE | {"shard": "0/2"}) is None


def test_one_layer_at_most_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d_m = 1400
    layer = 4 * d_m * d_m
    monkeypatch.setattr(merging, "BLOCK_BYTES", layer // 20)
    parts = write_parts(tmp_path, 3, d_m=d_m)
    tracemalloc.start()
    merge_covariances(parts, tmp_path / "cov.h5")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * layer


def test_parts_are_found_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no shards"):
        find_parts(tmp_path / "absent")
    parts = write_parts(tmp_path, 11)
    (tmp_path / "cov.shard-a-of-11.h5").touch()
    assert find_parts(tmp_path) == parts
    (tmp_path / "cov.shard-0-of-2.h5").touch()
    with pytest.raises(ArtifactError, match="partitions into 2 and 11; name the files of one"):
        find_parts(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "toy", 2)
    found = merge_cov("-m", "toy", "--dir", tmp_path)
    assert (found.exit_code, found.stdout) == (0, "")
    said = " ".join(found.stderr.split())
    assert "layers 0,2 over 130 tokens of 20 documents, from 2 parts, which can be removed" in said
    named = merge_cov(*parts, "--dir", tmp_path / "other", "--quiet")
    assert (named.exit_code, named.stderr) == (0, "")
    with (
        CovarianceFile(tmp_path / "toy" / "cov.h5") as a,
        CovarianceFile(tmp_path / "other" / "toy" / "cov.h5") as b,
    ):
        assert a.fingerprint == b.fingerprint
    assert merge_cov(*parts, "-o", tmp_path / "o.h5", "-q").exit_code == 0
    assert (tmp_path / "o.h5").exists()
    again = merge_cov("-m", "toy", "--dir", tmp_path)
    assert again.exit_code == 1
    assert "add --force" in one_sentence(again.stderr)
    assert merge_cov("-m", "toy", "--dir", tmp_path, "--force", "-q").exit_code == 0
