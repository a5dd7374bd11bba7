"""One model's matrices, and all that the page says of them in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.angles import angle_curve, mode
from kscli.analysis.convergence import Convergence, convergence_at
from kscli.analysis.edit_runs import is_sequence
from kscli.analysis.relations import Permutations, RelationStatistics, relation_statistics
from kscli.analysis.resampling import Resampling
from kscli.analysis.spectrum import overlap_row, spectra_of
from kscli.analysis.statistics import Statistics
from kscli.analysis.stats_file import statistics_of
from kscli.artifacts import CovarianceFile, PMatrixFile
from kscli.editing.edit_arrays import read_arrays
from kscli.editing.edits_file import EditsFile
from kscli.editing.predicted_damage import layer_rows, sequence_risk
from kscli.editing.predictors import Prediction, predict_behaviour
from kscli.editing.verification import Verification, verify
from kscli.editing.where import points_of
from kscli.errors import ArtifactError, FactsError, NumericsError
from kscli.figures import Source
from kscli.figures.edit_runs import run_names
from kscli.layers import spread
from kscli.places import file_name
from kscli.report.words import counted, layers_text
from kscli.reporter import SILENT, Reporter

_SHOWN = 4
# Layers times the cube of their width: a singular value decomposition of each, in about 2 minutes.
_SPECTRUM_WORK = 4e11


@dataclass(frozen=True)
class Corpus:
    """What C is a mean over, as far as the cov.h5 beside the pmatrix file tells.

    An imported cov.h5 does not know of documents: they are None. `least_routed` are the tokens that
    the least-used expert of all layers saw; None of a dense model.
    """

    tokens: int
    documents: int | None
    max_length: int | None
    least_routed: int | None = None


@dataclass(frozen=True)
class ExaminedRun:
    """A run of edits, tested; `name` tells it from the model's other runs.

    `where` is the row of what p foretold of its layer (`kscli.editing.where`).
    """

    name: str
    file: EditsFile
    verification: Verification
    predictions: tuple[Prediction, ...]
    where: dict[str, Any]

    @property
    def predicts(self) -> bool:
        """Whether shifts were predicted, which those of memit are not."""
        return self.verification.linear_error is not None

    @property
    def is_single(self) -> bool:
        """Whether every edit was made in the clean model."""
        return not is_sequence(self.file)

    def probability_at_end(self) -> NDArray[np.float64]:
        """Of every edit's new target, after the last edit, (edits,); NaN for single edits."""
        made = np.delete(np.arange(self._planned), self.file.values("kept_out/number"))
        if self.is_single:
            return np.full(len(made), np.nan)
        return np.asarray(np.exp(self.file.values("logprob_new")[-1, made]))

    @property
    def _planned(self) -> int:
        return int(self.file.values("logprob_new").shape[1])


@dataclass(frozen=True)
class Examined:
    """One model, measured. `key` begins the ids of its part of the page, `seed` is of the draws.

    `modes[l]` are the most frequent angles at the l-th layer, in degrees, in the whitening and
    in the activation space, NaN where there is none. `convergences` are of `ends`. `relations` is
    None where the facts do not allow them, and `no_relations` says why. `corpus` is None where
    the cov.h5 that P was made with is not beside it. `risk_rows` are `layer_rows` of edits of all
    facts (`kscli.editing.predicted_damage`), with what the order norm `saved`. `overlaps` has a row
    a layer (`overlap_row` of `kscli.analysis.spectrum`), `spectra` one for each layer whose C was
    looked at (`spectra_of`), and `no_spectra` says why others are missing.
    """

    key: str
    file: PMatrixFile
    seed: int
    statistics: Statistics
    modes: tuple[tuple[float, float], ...]
    convergences: tuple[Convergence, ...]
    relations: RelationStatistics | None
    no_relations: str
    corpus: Corpus | None
    risk_rows: tuple[dict[str, Any], ...] = ()
    runs: tuple[ExaminedRun, ...] = ()
    overlaps: tuple[dict[str, Any], ...] = ()
    spectra: tuple[dict[str, Any], ...] = ()
    no_spectra: str = ""

    @property
    def model(self) -> str:
        """The model's name for people."""
        return self.file.model

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are."""
        return self.statistics.layers

    @property
    def m(self) -> int:
        """The number of facts."""
        return self.statistics.m

    @property
    def ends(self) -> tuple[int, ...]:
        """The first and the last layer."""
        return spread(self.layers, 2)

    @property
    def shown(self) -> tuple[int, ...]:
        """A few layers over the depth."""
        return spread(self.layers, _SHOWN)

    @property
    def token(self) -> str:
        """Which token the facts' keys were read at, in words."""
        token = self.file.about.token
        return {
            "subject-last": "the subject's last token",
            "subject-first": "the subject's first token",
            "last": "the prompt's last token",
        }.get(token, token)

    def source(self, layers: tuple[int, ...]) -> Source:
        """What figures of some layers are drawn from."""
        return Source(self.file, layers, self.file.about.n_layers)

    def values(self, name: str) -> NDArray[np.float64]:
        """A statistic over `layers`."""
        return self.statistics.values[name]

    def at(self, name: str, layer: int) -> float:
        """A statistic at one layer."""
        return float(self.values(name)[self.layers.index(layer)])

    def where(self, mask: NDArray[np.bool_]) -> list[int]:
        """The layers at which a mask over `layers` holds."""
        return [layer for layer, holds in zip(self.layers, mask, strict=True) if holds]


def examine(
    file: PMatrixFile,
    key: str,
    seed: int = 0,
    reporter: Reporter = SILENT,
    runs: Sequence[EditsFile] = (),
) -> Examined:
    """Compute what the page says of one model; the statistics are read where they are today's."""
    resampling = Resampling(seed=seed)
    statistics = statistics_of(
        file,
        file.layers,
        file.path.with_name(file_name("stats", file.about.editor)),
        resampling,
        reporter,
    )
    modes = []
    with reporter.task("angles", len(file.layers), unit="layers") as task:
        for layer in file.layers:
            modes.append((_mode(file, "whitened_cosine", layer), _mode(file, "cosine", layer)))
            task.advance()
    convergences = [convergence_at(file, layer, (), resampling) for layer in spread(file.layers, 2)]
    relations, reason = _relations(file, seed, reporter)
    return Examined(
        key,
        file,
        seed,
        statistics,
        tuple(modes),
        tuple(convergences),
        relations,
        reason,
        _corpus(file),
        _risk(file),
        _runs(runs, resampling, reporter),
        tuple(overlap_row(file, layer) for layer in file.layers),
        *_spectra(file, reporter),
    )


def _mode(file: PMatrixFile, name: Any, layer: int) -> float:
    return mode(angle_curve(file.matrix(name, layer)))


def _relations(
    file: PMatrixFile, seed: int, reporter: Reporter
) -> tuple[RelationStatistics | None, str]:
    try:
        found = relation_statistics(file, file.layers, Permutations(seed=seed), reporter)
    except FactsError as error:
        return None, str(error)
    return found, ""


def _risk(file: PMatrixFile) -> tuple[dict[str, Any], ...]:
    """What edits of all facts, in their order, would do at every layer."""
    every = range(len(file.facts))
    return tuple(
        row | {"saved": sequence_risk(file, row["layer"], every).saved}
        for row in layer_rows(file, file.layers, every)
    )


def _spectra(file: PMatrixFile, reporter: Reporter) -> tuple[tuple[dict[str, Any], ...], str]:
    """The spectra of C of as many layers as take a few minutes, and why others are missing."""
    n_experts = file.about.n_experts or 0
    affordable = int(_SPECTRUM_WORK / (file.about.d_m**3 * max(n_experts, 1)))
    layers = file.layers if affordable >= len(file.layers) else spread(file.layers, affordable)
    rest = "`kscli stats --spectrum` has all of them."
    if not layers:
        return (), f"The spectrum of C would take long at this width; {rest}"
    try:
        rows = tuple(spectra_of(file, layers, reporter=reporter))
    except (ArtifactError, NumericsError) as error:
        return (), f"The spectrum of C is not shown: {error}"
    said = []
    if n_experts:
        said.append(
            f"Each of {n_experts} experts has a C of its own: shown is the median over a layer's "
            "experts, in brackets their range."
        )
    if layers != file.layers:
        at = counted(len(layers), "layer")
        said.append(f"To keep the page quick, C was looked at at {at}; {rest}")
    return rows, " ".join(said)


def _runs(
    runs: Sequence[EditsFile], resampling: Resampling, reporter: Reporter
) -> tuple[ExaminedRun, ...]:
    alone = [(run.about.method, layers_text(run.layers)) for run in runs]
    named = run_names(runs).own if len(runs) > 1 else alone
    found = []
    with reporter.task("edits", len(runs), unit="runs") as task:
        for name, run in zip(named, runs, strict=True):
            arrays = read_arrays(run)
            verified = verify(arrays, resampling)
            predictions = predict_behaviour(arrays, resampling)
            where = points_of(arrays).row(resampling)
            found.append(ExaminedRun(", ".join(name), run, verified, predictions, where))
            task.advance()
    return tuple(found)


def _corpus(file: PMatrixFile) -> Corpus | None:
    """What the cov.h5 beside the file says, if P was made with it."""
    try:
        with CovarianceFile(file.path.with_name("cov.h5")) as cov:
            if cov.fingerprint != file.about.inputs.get("cov"):
                return None
            least = None
            if cov.about.n_experts:
                least = min(int(cov.routed(layer).min()) for layer in cov.layers)
            return Corpus(cov.count, cov.about.documents, cov.about.max_length, least)
    except ArtifactError:
        return None
