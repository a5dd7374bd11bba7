"""stats.h5: the statistics of P, one 1-D dataset a field, over `layer`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kscli.analysis.resampling import Resampling
from kscli.analysis.statistics import Statistics, compute_statistics, field_names
from kscli.artifacts import Artifact, PMatrixFile, Recipe, difference, write_artifact
from kscli.layers import format_layers
from kscli.reporter import SILENT, Reporter


class StatisticsFile(Artifact):
    """stats.h5, opened for reading."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "stats")

    def statistics(self) -> Statistics:
        """What the file holds, its fields in the order they were computed in."""
        with self._reading():
            names = list(self.recipe["statistics"])
            m = int(self.attributes["m"])
        values = {name: self._values(name) for name in names}
        return Statistics(self.model, self.layers, m, values)


def statistics_recipe(
    pm: PMatrixFile, layers: tuple[int, ...], resampling: Resampling | None = None
) -> Recipe:
    """Everything that decides what stats.h5 holds."""
    resampling = resampling or Resampling()
    return {
        "pmatrix": pm.fingerprint,
        "layers": format_layers(layers),
        "statistics": field_names(),
        "repeats": resampling.repeats,
        "seed": resampling.seed,
    }


def write_statistics(
    pm: PMatrixFile,
    layers: tuple[int, ...],
    path: Path,
    *,
    resampling: Resampling | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> None:
    """Compute every statistic of `layers` of `pm` and write stats.h5."""
    resampling = resampling or Resampling()
    statistics = compute_statistics(pm, layers, resampling, reporter)
    provenance = pm.provenance(
        details={
            name: pm.attributes[name]
            for name in ("corpus", "corpus_identity", "facts_name", "facts_identity", "token")
        }
        | {"m": statistics.m},
        inputs={"pmatrix": pm.fingerprint},
        recipe=statistics_recipe(pm, layers, resampling),
        seed=resampling.seed,
    )
    with write_artifact(path, "stats", provenance, force=force) as writer:
        writer.layers(statistics.layers)
        for name, values in statistics.values.items():
            writer.over_layers(name, (), np.float64)
            for index, value in enumerate(values):
                writer.put(name, index, value)


def statistics_of(
    pm: PMatrixFile,
    layers: tuple[int, ...],
    path: Path | None = None,
    resampling: Resampling | None = None,
    reporter: Reporter = SILENT,
) -> Statistics:
    """The statistics of `layers` of `pm`: those stored at `path` where they are today's, else new.

    Writes nothing.
    """
    recipe = statistics_recipe(pm, layers, resampling)
    if path is not None and difference(path, "stats", recipe) is None:
        with StatisticsFile(path) as file:
            return file.statistics()
    return compute_statistics(pm, layers, resampling, reporter)
