"""Sealed files written; see `kscli.artifacts.sealed` for what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kscli.artifacts.sealed import BLOCK, SEAL, Held, Seal, digest, digest_of_rest
from kscli.files import require_room


class SealedWriter:
    """Fills one sealed file: `attributes`, plain values, and arrays."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._datasets: dict[str, h5py.Dataset] = {}
        self._blocks: dict[str, list[list[str]]] = {}
        self.attributes: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        """Whether an array was begun."""
        return name in self._datasets

    @property
    def arrays(self) -> dict[str, Held]:
        """What the seal will say of every array, by name."""
        return {name: self._held(name) for name in self._datasets}

    def write(self, name: str, values: ArrayLike, parts: int = 1) -> None:
        """Write a whole array of so many parts, text as UTF-8."""
        array = np.asarray(values)
        if array.dtype.kind in "OU":
            array = encoded(array)
        self._create(name, array.shape, array.dtype, parts)
        if array.size:
            dataset = self._datasets[name]
            # HDF5 converts no ASCII, for which it takes an `S` array, to UTF-8.
            dataset[...] = array.astype(dataset.dtype) if array.dtype.kind == "S" else array
            self._blocks[name] = [digests(part) for part in array.reshape(parts, -1)]

    def put(self, name: str, index: int, values: NDArray[Any], parts: int) -> None:
        """Write the `index`-th of so many parts of an array, which the first of them makes."""
        if name not in self._datasets:
            self._create(name, (parts, *values.shape), values.dtype, parts)
        if values.size:
            self._datasets[name][index] = values
            self._blocks[name][index] = digests(values)

    def attach(self, name: str, axes: Sequence[str], scales: Sequence[str]) -> None:
        """Attach to every axis of an array the dimension scale that stands under its name.

        A scale that is not there yet is made as netCDF has a dimension without coordinates, so
        that xarray reads the file: it holds no values and takes no room.
        """
        dataset = self._datasets[name]
        for dimension, axis, scale, length in zip(
            dataset.dims, axes, scales, dataset.shape, strict=True
        ):
            if scale not in self._file:
                made = self._file.create_dataset(scale, (length,), "i1")
                made.make_scale(f"This is a netCDF dimension but not a netCDF variable{length:10d}")
            if scale != name:
                dimension.attach_scale(self._file[scale])
                dimension.label = axis

    def make_scale(self, name: str) -> None:
        """Make an array the dimension scale of its own axis."""
        self._datasets[name].make_scale(name)

    def seal(self) -> tuple[Seal, int]:
        """Write the attributes and the seal's place; the seal to be, and where it begins."""
        for name, held in self.arrays.items():
            if held.nbytes and not all(self._blocks[name]):
                raise ValueError(f"not all of {name} was written")
        for name, value in self.attributes.items():
            self._file.attrs[name] = value
        seal = Seal(self.attributes, self.arrays, "0" * 64)
        text = seal.text()
        place = self._file.create_dataset(SEAL, (), h5py.string_dtype("utf-8", len(text)))
        place[()] = np.array(text, dtype=place.dtype)
        return seal, place.id.get_offset()

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: int) -> None:
        kind = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
        self._blocks[name] = [[] for _ in range(parts)]
        self._datasets[name] = self._file.create_dataset(name, shape, kind)

    def _held(self, name: str) -> Held:
        dataset, blocks = self._datasets[name], self._blocks[name]
        dtype: np.dtype[Any] = dataset.dtype
        kind = f"|S{dtype.itemsize}" if dtype.kind == "S" else dtype.str
        together = tuple(each for part in blocks for each in part)
        return Held(kind, dataset.shape, dataset.id.get_offset() or 0, len(blocks), together)


@contextmanager
def open_for_writing(path: Path) -> Iterator[SealedWriter]:
    """A new sealed file at `path`, flushed at the end; OSError where the disk is full."""
    require_room(path)
    # Superblock 2 and object headers 2: HDF5 1.8 and later read them, and check their sums.
    file = h5py.File(path, "w", locking="best-effort", libver=("v108", "v108"))
    try:
        writer = SealedWriter(file)
        yield writer
        seal, offset = writer.seal()
        file.flush()
    except BaseException:
        with suppress(Exception):
            file.close()
        raise
    file.close()
    with path.open("r+b") as raw:

        def read(begin: int, length: int) -> bytes:
            raw.seek(begin)
            return raw.read(length)

        place = offset, len(seal.text())
        rest = digest_of_rest(seal.arrays.values(), place, path.stat().st_size, read)
        raw.seek(offset)
        raw.write(replace(seal, rest=rest).text())


def encoded(array: NDArray[Any]) -> NDArray[np.bytes_]:
    """Text as UTF-8 of one length; a text that ends with a null character would lose it."""
    texts = [str(value).encode() for value in array.reshape(-1)]
    width = max(1, *map(len, texts)) if texts else 1
    return np.array(texts, dtype=f"S{width}").reshape(array.shape)


def digests(array: NDArray[Any]) -> list[str]:
    """The digests of an array's blocks."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return [digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
