"""Small artifacts written through the library, for tests that need files and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import (
    CovarianceAbout,
    CovarianceFile,
    KeysAbout,
    KeysFile,
    PMatrixAbout,
    write_artifact,
)
from kscli.artifacts.sealed import Held, Seal, SealedFile, digest_of_rest
from kscli.artifacts.sealing import digests, encoded
from kscli.facts import Fact
from kscli.pmatrix import write_pmatrix

PROVENANCE: dict[str, Any] = {
    "model": "toy",
    "model_id": "someone/toy",
    "revision": "main",
    "weights": "sha256:w",
    "tokenizer": "sha256:t",
    "hook": "h.{}.down",
    "d_m": 12,
    "n_layers": 3,
    "dtype": "float32",
    "device": "cpu",
    "special_tokens": "",
}
FACTS = tuple(
    Fact(f"The {{}} of place {i} is", f"Größe {i}", f"target {i}", f"P{i % 3}", 100 + i)
    for i in range(6)
)
LAYERS = (0, 1, 2)
OF_FACTS = {"facts_name": "toy", "facts_identity": "sha256:f", "token": "subject-last"}


def second_moments(seed: int = 0, count: int = 2000) -> NDArray[np.float32]:
    keys = np.random.default_rng(seed).standard_normal((len(LAYERS), count, PROVENANCE["d_m"]))
    return (np.einsum("lna,lnb->lab", keys, keys) / count).astype(np.float32)


def about_cov(**changes: Any) -> CovarianceAbout:
    """What a toy cov.h5 says of itself."""
    of_corpus = {"corpus": "toy text", "corpus_identity": "c0", "documents": 9, "max_length": 64}
    return CovarianceAbout(**(PROVENANCE | of_corpus | changes))


def about_keys(**changes: Any) -> KeysAbout:
    """What a toy keys.h5 says of itself."""
    return KeysAbout(**(PROVENANCE | OF_FACTS | changes))


def about_pmatrix(**changes: Any) -> PMatrixAbout:
    """What a toy pmatrix.h5 says of itself."""
    of_corpus = {"corpus": "toy text", "corpus_identity": "c0", "ridge": 0.0}
    return PMatrixAbout(**(PROVENANCE | OF_FACTS | of_corpus | changes))


@dataclass(frozen=True)
class Located:
    """Facts, and where their keys were read."""

    facts: Sequence[Fact]
    token_id: NDArray[np.int64]
    position: NDArray[np.int64]


def located(facts: Sequence[Fact], token_id: Sequence[int] | None = None) -> Located:
    """Facts with their keys at `token_id`; by default each at a token of its own."""
    ids = range(len(facts)) if token_id is None else token_id
    return Located(facts, np.array(ids, np.int64), np.arange(len(facts)))


def write_cov(path: Path, seed: int = 0, count: int = 2000, **changes: Any) -> Path:
    identity = f"c{seed}"
    about = about_cov(**{"corpus_identity": identity, "recipe": {"corpus": identity}} | changes)
    with write_artifact(path, "cov", about, force=True) as writer:
        writer.layers(LAYERS)
        writer.write("count", count)
        for index, C in enumerate(second_moments(seed, count)):
            writer.put("second_moment", index, C)
    return path


def write_keys(
    path: Path,
    keys: NDArray[np.float32] | None = None,
    layers: tuple[int, ...] = LAYERS,
    facts: Sequence[Fact] = FACTS,
    **changes: Any,
) -> Path:
    if keys is None:
        shape = (len(layers), len(facts), PROVENANCE["d_m"])
        keys = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    about = about_keys(**{"recipe": {"facts": "toy"}} | changes)
    with write_artifact(path, "keys", about, force=True) as writer:
        writer.layers(layers)
        writer.facts(located(facts, [5, 5, *range(7, 5 + len(facts))][: len(facts)]))
        for index in range(len(layers)):
            writer.put("keys", index, keys[index])
    return path


def write_toy(folder: Path) -> Path:
    """cov.h5, keys.h5 and pmatrix.h5 of a model `toy` under `folder`/toy; returns that folder."""
    place = folder / "toy"
    write_cov(place / "cov.h5")
    write_keys(place / "keys.h5")
    with CovarianceFile(place / "cov.h5") as cov, KeysFile(place / "keys.h5") as keys:
        write_pmatrix(cov, keys, place / "pmatrix.h5", layers=LAYERS)
    return place


class Contents:
    """What a sealed file holds, to be changed as with h5py: `attrs`, and arrays by name.

    An array that is put there may be of any type that `Held` can name; text is of `str`.
    """

    def __init__(self, path: Path) -> None:
        with SealedFile(path) as file:
            self.attrs = dict(file.attributes)
            self.arrays = {name: file.read(name) for name in file.arrays}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def __setitem__(self, name: str, values: Any) -> None:
        self.arrays[name] = np.asarray(values)

    def __delitem__(self, name: str) -> None:
        """Remove an array or a group of them."""
        own = [each for each in self.arrays if each == name or each.startswith(f"{name}/")]
        assert own, name
        for each in own:
            del self.arrays[each]


@contextmanager
def changed(path: Path) -> Iterator[Contents]:
    """An artifact to change; what it holds then is sealed anew, behind what the file held.

    So a file comes about that only someone makes who knows how kscli seals files.
    """
    contents = Contents(path)
    yield contents
    data, held = bytearray(path.read_bytes()), {}
    for name, array in contents.arrays.items():
        stored = encoded(array) if array.dtype.kind in "OU" else np.ascontiguousarray(array)
        held[name] = Held(stored.dtype.str, array.shape, len(data), 1, tuple(digests(stored)))
        data += stored.tobytes()
    place = len(data), len(Seal(contents.attrs, held, "0" * 64).text())

    def read(begin: int, length: int) -> bytes:
        return bytes(data[begin : begin + length])

    rest = digest_of_rest(held.values(), place, sum(place), read)
    path.write_bytes(data + Seal(contents.attrs, held, rest).text())
