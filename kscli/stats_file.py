"""stats.h5: the statistics of P, one 1-D dataset a statistic over `layer`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kscli.artifacts import PMatrixFile, Recipe, write_artifact
from kscli.layers import format_layers
from kscli.statistics import STATISTICS, compute_statistics


def statistics_recipe(pm: PMatrixFile, layers: tuple[int, ...]) -> Recipe:
    """Everything that decides what stats.h5 holds."""
    return {
        "pmatrix": pm.fingerprint,
        "layers": format_layers(layers),
        "statistics": list(STATISTICS),
    }


def write_statistics(
    pm: PMatrixFile, layers: tuple[int, ...], path: Path, *, force: bool = False
) -> None:
    """Compute every statistic of `layers` of `pm` and write stats.h5."""
    statistics = compute_statistics(pm, layers)
    provenance = pm.provenance(
        details={
            name: pm.attributes[name]
            for name in ("corpus", "corpus_identity", "facts_name", "facts_identity", "token")
        }
        | {"m": statistics.m},
        inputs={"pmatrix": pm.fingerprint},
        recipe=statistics_recipe(pm, layers),
    )
    with write_artifact(path, "stats", provenance, force=force) as writer:
        writer.layers(statistics.layers)
        for name, values in statistics.values.items():
            writer.over_layers(name, (), np.float64)
            for index, value in enumerate(values):
                writer.put(name, index, value)
