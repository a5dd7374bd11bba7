"""Artifacts written as their schema says.

Every file is written beside its place and renamed into it. Its `fingerprint` is a hash of what
it holds and of its `recipe`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kscli import __version__
from kscli.artifacts.schema import (
    FORMAT_VERSION,
    About,
    Dataset,
    Kind,
    Stamp,
    check_datasets,
    datasets_of,
    to_attributes,
)
from kscli.facts import Fact
from kscli.files import replace_file, require_room
from kscli.secrets import command_line


class LocatedFacts(Protocol):
    """Facts, (m,), and where their keys were read; a file of facts, or what becomes one."""

    @property
    def facts(self) -> Sequence[Fact]:
        """The facts."""

    @property
    def token_id(self) -> NDArray[np.int64]:
        """The ids of the tokens at which the keys were read."""

    @property
    def position(self) -> NDArray[np.int64]:
        """The indexes of these tokens in the prompts' tokens."""


class ArtifactWriter:
    """Fills one file with the datasets that its kind declares."""

    def __init__(
        self, file: h5py.File, declared: dict[str, Dataset], digest: hashlib._Hash
    ) -> None:
        self._file = file
        self._declared = declared
        self._digest = digest

    def layers(self, layers: Sequence[int]) -> None:
        """Write the `layer` dimension scale, which comes before any array over layers."""
        self.write("layer", layers)
        self._file["layer"].make_scale("layer")

    def facts(self, of: LocatedFacts) -> None:
        """Write facts, one dataset a field, and where their keys were read."""
        for name in self._declared:
            if name.startswith("facts/"):
                column = name.removeprefix("facts/")
                self.write(name, [getattr(fact, column) for fact in of.facts])
        self.write("token_id", of.token_id)
        self.write("position", of.position)

    def write(self, name: str, values: ArrayLike) -> None:
        """Write a whole dataset."""
        wanted = self._declared[name]
        if wanted.dtype == "text":
            array = np.asarray(values, dtype=object)
            held = json.dumps(array.tolist()).encode()
        else:
            array = np.asarray(values, dtype=wanted.dtype)
            held = array.tobytes()
        self._create(name, array.shape)[...] = array
        if wanted.result:
            self._digest.update(name.encode() + held)

    def put(self, name: str, index: int, values: ArrayLike) -> None:
        """Fill the `index`-th layer of an array over layers, which is made by the first of them."""
        wanted = self._declared[name]
        array = np.ascontiguousarray(values, dtype=wanted.dtype).reshape(np.shape(values))
        if name not in self._file:
            self._create(name, (len(self._file["layer"]), *array.shape))
        self._file[name][index] = array
        if wanted.result:
            self._digest.update(f"{name}{index}".encode())
            self._digest.update(array.data)

    def _create(self, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        wanted = self._declared[name]
        dtype: Any = h5py.string_dtype() if wanted.dtype == "text" else wanted.dtype
        dataset = self._file.create_dataset(name, shape, dtype)
        if wanted.axes[:1] == ("layer",) and name != "layer":
            dataset.dims[0].attach_scale(self._file["layer"])
            dataset.dims[0].label = "layer"
        return dataset


@contextmanager
def write_artifact(
    path: Path, kind: Kind, about: About, *, force: bool = False
) -> Iterator[ArtifactWriter]:
    """Open a writer for the artifact at `path`; nothing appears there unless all goes well.

    Raises ArtifactError when the file exists and `force` is not set, when its folder cannot
    be written, and when the disk is full; SchemaError when not all was written that its kind has.
    """
    with replace_file(path, force=force) as temporary:
        digest = hashlib.sha256(json.dumps([kind, about.recipe], sort_keys=True).encode())
        declared = datasets_of(kind, about.recipe)
        with open_for_writing(temporary) as file:
            yield ArtifactWriter(file, declared, digest)
            check_datasets(file, declared, about.d_m)
            stamp = Stamp(
                format_version=FORMAT_VERSION,
                kscli_version=__version__,
                kind=kind,
                fingerprint=digest.hexdigest()[:32],
                command=command_line(),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            for name, value in (to_attributes(stamp) | to_attributes(about)).items():
                file.attrs[name] = value


@contextmanager
def open_for_writing(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file at `path`, flushed at the end; OSError where the disk is full."""
    require_room(path)
    file = h5py.File(path, "w", locking="best-effort")
    try:
        yield file
        file.flush()
    except BaseException:
        with suppress(Exception):
            file.close()
        raise
    file.close()
