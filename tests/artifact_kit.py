"""Small artifacts written through the library, for tests that need files and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, KeysFile, Provenance, write_artifact
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


def second_moments(seed: int = 0, count: int = 2000) -> NDArray[np.float32]:
    keys = np.random.default_rng(seed).standard_normal((len(LAYERS), count, PROVENANCE["d_m"]))
    return (np.einsum("lna,lnb->lab", keys, keys) / count).astype(np.float32)


def write_cov(path: Path, seed: int = 0, count: int = 2000, **changes: Any) -> Path:
    provenance = Provenance(
        **(PROVENANCE | changes),
        details={"corpus": "toy text", "corpus_identity": f"c{seed}"},
        recipe={"corpus": f"c{seed}"},
    )
    C = second_moments(seed, count)
    with write_artifact(path, "cov", provenance, force=True) as writer:
        writer.layers(LAYERS)
        writer.array("count", np.int64(count))
        writer.over_layers("second_moment", C.shape[1:], np.float32)
        for index in range(len(LAYERS)):
            writer.put("second_moment", index, C[index])
    return path


def write_keys(
    path: Path,
    keys: NDArray[np.float32] | None = None,
    layers: tuple[int, ...] = LAYERS,
    **changes: Any,
) -> Path:
    details = {"facts_name": "toy", "facts_identity": "sha256:f", "token": "subject-last"}
    provenance = Provenance(**(PROVENANCE | changes), details=details, recipe={"facts": "toy"})
    if keys is None:
        shape = (len(layers), len(FACTS), PROVENANCE["d_m"])
        keys = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with write_artifact(path, "keys", provenance, force=True) as writer:
        writer.layers(layers)
        writer.facts(FACTS)
        writer.array("token_id", np.array([5, 5, 7, 8, 9, 10]))
        writer.array("position", np.arange(6))
        writer.over_layers("keys", keys.shape[1:], np.float32)
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
