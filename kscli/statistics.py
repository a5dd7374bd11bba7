"""Statistics of P: what the distribution of its off-diagonal entries looks like, layer by layer.

A new statistic is one function under `@statistic(name, label)`; the table, the stats file and
the printed fields follow from the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Entries = NDArray[np.float64]
MatrixName = Literal["P", "whitened_cosine", "cosine", "Q"]

# P comes out of a float64 Cholesky; entries that differ by less than this share of their
# size differ by rounding alone, and the shape of rounding errors is not a finding.
_ROUNDING = 1e-12


class Matrices(Protocol):
    """What the statistics and figures read: a pmatrix file that is open, or a stand-in."""

    @property
    def model(self) -> str:
        """The model's display name."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are there, ascending."""

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        """One layer's (m, m) matrix."""


@dataclass(frozen=True)
class StatisticKind:
    """A named statistic; `compute` takes the 1-D float64 array of off-diagonal entries.

    `compute` is never called without entries: every statistic of m < 2 facts is NaN.
    `heading` and `spec` are the column's head and number format where a table is printed.
    """

    name: str
    label: str
    compute: Callable[[Entries], float]
    heading: str
    spec: str

    def __call__(self, entries: Entries) -> float:
        """The statistic of `entries`; NaN where it is not defined."""
        return float(self.compute(entries)) if entries.size else float("nan")


STATISTICS: dict[str, StatisticKind] = {}


def statistic(
    name: str, label: str, *, heading: str = "", spec: str = ".4f"
) -> Callable[[Callable[[Entries], float]], Callable[[Entries], float]]:
    """Register a function of the off-diagonal entries under `name`, the field that is printed."""

    def register(compute: Callable[[Entries], float]) -> Callable[[Entries], float]:
        STATISTICS[name] = StatisticKind(name, label, compute, heading or name, spec)
        return compute

    return register


def off_diagonal(P: NDArray[np.float64]) -> Entries:
    """The m(m-1) entries of P (m, m) off its diagonal, row by row, as a new 1-D float64 array."""
    m = P.shape[0]
    return np.asarray(P, dtype=np.float64)[~np.eye(m, dtype=bool)]


def layer_statistics(P: NDArray[np.float64]) -> dict[str, float]:
    """Every registered statistic of one layer's P (m, m), by name; NaN where undefined."""
    entries = off_diagonal(P)
    return {name: kind(entries) for name, kind in STATISTICS.items()}


@dataclass(frozen=True)
class Statistics:
    """The statistics of one model: `values[name]` is 1-D over `layers`."""

    model: str
    layers: tuple[int, ...]
    m: int
    values: dict[str, NDArray[np.float64]]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a layer: model, layer, m and every statistic; undefined is NaN."""
        return [
            {
                "model": self.model,
                "layer": layer,
                "m": self.m,
                **{name: float(value[at]) for name, value in self.values.items()},
            }
            for at, layer in enumerate(self.layers)
        ]


def compute_statistics(pm: Matrices, layers: Sequence[int] | None = None) -> Statistics:
    """Every registered statistic of P at `layers` (default: all there are), one layer in memory."""
    chosen = tuple(pm.layers if layers is None else layers)
    m = 0
    per_layer: list[dict[str, float]] = []
    for layer in chosen:
        P = pm.matrix("P", layer)
        m = P.shape[0]
        per_layer.append(layer_statistics(P))
    values = {name: np.array([row[name] for row in per_layer]) for name in STATISTICS}
    return Statistics(pm.model, chosen, m, values)


def _standardised(entries: Entries) -> Entries:
    """Entries less their mean, over their standard deviation; all NaN where they do not vary."""
    deviations = entries - entries.mean()
    # Once more, for the rounding of the first mean: the corrected two-pass algorithm.
    deviations -= deviations.mean()
    scale = np.abs(deviations).max()
    if not scale > _ROUNDING * np.abs(entries).max():
        return np.full_like(entries, np.nan)
    deviations = deviations / scale
    return np.asarray(deviations / deviations.std())


@statistic("mean", "mean")
def _mean(entries: Entries) -> float:
    return float(entries.mean())


@statistic("std", "standard deviation (biased)")
def _std(entries: Entries) -> float:
    return float(entries.std())


@statistic("skewness", "skewness (biased)", spec=".2f")
def _skewness(entries: Entries) -> float:
    return float(np.mean(_standardised(entries) ** 3))


@statistic("kurtosis", "excess kurtosis (Fisher, biased): 0 for a Gaussian", spec=".2f")
def _kurtosis(entries: Entries) -> float:
    return float(np.mean(_standardised(entries) ** 4) - 3.0)


@statistic("min", "smallest entry", spec=".2f")
def _min(entries: Entries) -> float:
    return float(entries.min())


@statistic("max", "largest entry", spec=".2f")
def _max(entries: Entries) -> float:
    return float(entries.max())


@statistic("tail_0_10", "share of entries with |p| > 0.1", heading="|p|>0.1")
def _tail_0_10(entries: Entries) -> float:
    return _share_beyond(entries, 0.1)


@statistic("tail_0_25", "share of entries with |p| > 0.25", heading="|p|>0.25")
def _tail_0_25(entries: Entries) -> float:
    return _share_beyond(entries, 0.25)


@statistic("tail_0_50", "share of entries with |p| > 0.5", heading="|p|>0.5")
def _tail_0_50(entries: Entries) -> float:
    return _share_beyond(entries, 0.5)


def _share_beyond(entries: Entries, threshold: float) -> float:
    return float(np.mean(np.abs(entries) > threshold))
