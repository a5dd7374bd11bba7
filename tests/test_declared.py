"""Sizes that a file declares and cannot have: refused before memory is taken."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from kscli.errors import KscliError, ModelError
from kscli.models.declared import require_possible
from kscli.models.locating import ModelOptions, locate_model
from kscli.second_moment.interchange import find_statistics, read_second_moment
from kscli.tiny import MODEL_DIR

NAME = "transformer.h.0.mlp.c_proj_float32_mom2_100000.npz"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(name: str, held: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(held)


def weights(header: bytes) -> Callable[[Path], object]:
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "10^9 layers": config(n_layer=10**9),
    "10^9 layers by another name": config(num_hidden_layers=10**9),
    "layers in the text's configuration": config(text_config={"num_layers": 10**9}),
    "infinitely many": text("config.json", '{"n_layer": Infinity}'),
    "a width": config(n_embd=10**9),
    "words": config(vocab_size=10**10),
    "brackets": text("config.json", "[" * 100_000),
    "a header of brackets": weights(b"[" * 100_000),
    "a header of objects": weights(b'{"a":' * 100_000),
    "a negative place": weights(b'{"a":{"data_offsets":[-99,8]}}'),
    "a word for a place": weights(b'{"a":{"data_offsets":["x",8]}}'),
    "a place beyond the end": weights(b'{"a":{"data_offsets":[0,99999999999]}}'),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_model_that_cannot_be_is_refused_at_once(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    change(folder)
    began = time.monotonic()
    with pytest.raises(ModelError, match=str(folder)):
        require_possible(locate_model(ModelOptions(str(folder))).folder, str(folder))
    assert time.monotonic() - began < 5


def test_a_model_that_can_be_is_not_refused() -> None:
    require_possible(MODEL_DIR, "tiny")


def test_a_shard_lies_beside_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is damaged"):
        locate_model(ModelOptions(str(folder)))


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as held:
        for name, data in members.items():
            held.writestr(f"{name.replace('_', '.')}.npy", data)
    return path


def array(values: Any, shape: tuple[int, ...] | None = None) -> bytes:
    """A member; with `shape`, one whose header declares another."""
    values = np.asarray(values)
    out = io.BytesIO()
    header = npy.header_data_from_array_1_0(values)
    npy.write_array_header_1_0(out, header | ({"shape": shape} if shape else {}))
    return out.getvalue() + values.tobytes()


C = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    "members",
    [
        {"mom2_mom2": array(C, (10**6, 10**6)), "mom2_count": array(np.int64(9))},
        {"mom2_mom2": array(C), "mom2_count": array(np.int64(9), (10**12,))},
        {"mom2_mom2": array(C), "mom2_count": array(np.zeros(1000, np.int64))},
        {"mom2_mom2": b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535, "mom2_count": array(1)},
        {"mom2_mom2": array(C), "mom2_count": array(9), "kscli_note": array("x", (10**12,))},
    ],
    ids=["matrix", "count", "counts", "brackets", "note"],
)
def test_an_archive_that_declares_too_much_is_refused(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    path = archive(tmp_path / NAME, **members)
    with pytest.raises(KscliError, match="mom2"):
        find_statistics(path, "tiny")


def test_a_matrix_of_nothing_but_zeros_is_no_archive_of_29_kb(tmp_path: Path) -> None:
    zeros = np.zeros((2000, 2000), np.float32)
    members = {"mom2_mom2": array(zeros), "mom2_count": array(np.int64(9))}
    path = archive(tmp_path / NAME, zipfile.ZIP_DEFLATED, **members)
    assert path.stat().st_size < 29_000
    with pytest.raises(KscliError, match="is damaged"):
        find_statistics(path, "tiny")
    path = archive(tmp_path / NAME, **members)
    assert read_second_moment(find_statistics(path, "tiny")[0]).shape == (2000, 2000)


@pytest.mark.parametrize("part", ["{}", "{0.__class__}", "{", "a b", "%s"])
def test_a_name_gives_a_modules_path_or_nothing(part: str, tmp_path: Path) -> None:
    members = {"mom2_mom2": array(C), "mom2_count": array(np.int64(9))}
    path = archive(tmp_path / f"h.0.{part}.c_float32_mom2_9.npz", **members)
    with pytest.raises(KscliError, match="its name"):
        find_statistics(path, "tiny")
