"""Small artifacts written through the library, for tests that need files and no model."""

from __future__ import annotations

from collections.abc import Sequence
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
from kscli.facts import Fact
from kscli.superposition import write_pmatrix

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
