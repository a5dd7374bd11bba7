"""The scores of a run of edits: means before and after, with intervals that resample edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling
from kscli.editing.edit_arrays import EditArrays
from kscli.editing.estimates import Estimate, over_units, plain
from kscli.scores import HARMONIC, SCORES, harmonic_mean

Real = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A score's mean over the edits: in the clean model, and after the last edit (single: each)."""

    name: str
    before: float | None
    after: Estimate

    def row(self) -> dict[str, float | None]:
        """As fields; undefined is None."""
        return {f"{self.name}_before": self.before, **self.after.row(self.name)}


def measure_scores(run: EditArrays, resampling: Resampling) -> tuple[Scored, ...]:
    """Every score of a run, and S, the harmonic mean of the means of ES, PS and NS.

    The 95 % intervals draw edits again.
    """
    of_edits = {name: (values[0], _after(run, values)) for name, values in run.scores.items()}
    found = [_scored(name, np.array(of_edits[name])[..., None], resampling) for name in SCORES]
    three = np.stack([of_edits[name] for name in HARMONIC], axis=-1)
    found.insert(len(HARMONIC), _scored("S", three, resampling))
    return tuple(found)


def score_course(run: EditArrays, name: str) -> Real:
    """The mean of a score over the edits made by then, at every pass of a sequence, (s,)."""
    values = run.scores[name]
    means = [_mean(values[0])]
    means += [_mean(row[:step]) for row, step in zip(values[1:], run.step[1:], strict=True)]
    return np.array(means)


def _after(run: EditArrays, values: Real) -> Real:
    """The score of every edit, (n,), after the last one, or after itself where it is single."""
    return values[-1] if not run.single else values[1:].diagonal()


def _scored(name: str, values: Real, resampling: Resampling) -> Scored:
    """A score from values (2, n, k), before and after: the harmonic mean of k means."""
    defined = ~np.isnan(values).any(axis=(0, 2))
    if not defined.any():
        return Scored(name, None, Estimate(None))
    before, after = values[:, defined]
    units = np.flatnonzero(defined)
    once = np.ones((1, len(units)))
    estimate = over_units(_harmonic_mean_of(after), units, resampling)
    return Scored(name, plain(float(_harmonic_mean_of(before)(once)[0])), estimate)


def _harmonic_mean_of(values: Real) -> Callable[[Real], Real]:
    """The harmonic mean of the weighted means of values (n, k), for weights (repeats, n)."""
    return lambda weights: harmonic_mean(weights @ values / weights.sum(axis=1, keepdims=True))


def _mean(values: Real) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
