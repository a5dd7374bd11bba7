"""stats.h5: the statistics of P, one 1-D dataset a field, over `layer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kscli.analysis.resampling import Resampling
from kscli.analysis.statistics import Statistics, compute_statistics, field_names
from kscli.artifacts import (
    Artifact,
    Existing,
    PMatrixFile,
    StatisticsAbout,
    difference,
    must_make,
    write_artifact,
)
from kscli.errors import ArtifactError
from kscli.files import require_other
from kscli.layers import format_layers, select_layers
from kscli.models.families import whose_p
from kscli.reporter import SILENT, Reporter

if TYPE_CHECKING:
    import pandas


class StatisticsFile(Artifact):
    """stats.h5, opened for reading."""

    of_kind = "stats"
    about: StatisticsAbout

    def to_pandas(self, layers: str = "all") -> pandas.DataFrame:
        """A layer a row, with the columns of `kscli stats -f csv`."""
        from kscli.artifacts.frames import frame_of

        chosen = select_layers(layers, self.layers, str(self.path))
        return frame_of(row for row in self.statistics().rows() if row["layer"] in chosen)

    def statistics(self) -> Statistics:
        """What the file holds, its fields in the order they were computed in."""
        values = {name: self._values(name) for name in self.about.recipe["statistics"]}
        model = whose_p(self.model, self.about.editor)
        return Statistics(model, self.layers, self.about.m, values)


def statistics_of(
    pm: PMatrixFile,
    layers: tuple[int, ...],
    path: Path | None = None,
    resampling: Resampling | None = None,
    reporter: Reporter = SILENT,
    existing: Existing | None = None,
) -> Statistics:
    """The statistics of `layers` of `pm`: those stored at `path` where they are today's, else new.

    New ones are stored at `path` as `existing` says; None: nothing is written.
    """
    resampling = resampling or Resampling()
    if path:
        require_other(path, [pm.path])
    recipe = {
        "pmatrix": pm.fingerprint,
        "layers": format_layers(layers),
        "statistics": field_names(routed=bool(pm.about.n_experts)),
        "repeats": resampling.repeats,
        "seed": resampling.seed,
    }
    made = path and existing and must_make(path, "stats", recipe, existing, reporter)
    if path and not made and difference(path, "stats", recipe) is None:
        with StatisticsFile(path) as file:
            if file.about.m != len(pm.facts):
                raise ArtifactError(
                    f"{path} is of {file.about.m:,} facts, where {pm.path} has {len(pm.facts):,}; "
                    "make it again with --force."
                )
            return file.statistics()
    found = compute_statistics(pm, layers, resampling, reporter, pm.experts_of)
    if path and made:
        about = pm.about.derive(
            StatisticsAbout,
            m=found.m,
            inputs={"pmatrix": pm.fingerprint},
            recipe=recipe,
            seed=resampling.seed,
        )
        with write_artifact(path, "stats", about, force=True) as writer:
            writer.layers(found.layers)
            for name, values in found.values.items():
                writer.write(name, values)
    return found
