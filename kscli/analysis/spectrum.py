"""The spectrum of C and the overlap of keys: superposition as others measure it, beside p.

With the singular values s of C (it is symmetric and not negative, so they are its eigenvalues):

- the participation ratio (sum s)^2 / sum s^2, a number of dimensions from 1 to d_m;
- the effective rank exp(H), H = -sum q ln q of q = s / sum s (Roy & Vetterli 2007);
- the share of directions that a cut of AlphaEdit calls null, and the share of the energy of the
  facts' keys, sum_j |Pi k_j|^2 / sum_j |k_j|^2, that is left there.

The overlap is the mean of cos(k_i, k_j)^2 over pairs i != j. In the whitening space it is 1/d_m for
keys that are not related; in the activation space about 1 / participation ratio.

Of a layer of experts C_e of each expert has a spectrum of its own; a row has their median.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.metrics import Cut, NullSpace
from kscli.editing.sources import require_made_from
from kscli.errors import NumericsError
from kscli.reporter import SILENT, Reporter

Array = NDArray[np.float64]

PUBLISHED = Cut()
RELATIVE = Cut(relative=True)


@dataclass(frozen=True)
class Spectrum:
    """One layer's singular values (d_m,), ascending, and its singular vectors, the columns."""

    values: Array
    vectors: Array

    @property
    def participation_ratio(self) -> float:
        """(sum s)^2 / sum s^2."""
        return float(self.values.sum() ** 2 / (self.values**2).sum())

    @property
    def effective_rank(self) -> float:
        """exp(H) of the singular values as a distribution."""
        shares = self.values[self.values > 0] / self.values.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def null_share(self, cut: Cut) -> float:
        """The share of directions whose singular value is below the cut."""
        return cut.null(self.values) / len(self.values)

    def energy_in_null(self, cut: Cut, keys: Array) -> float:
        """The share of the energy of `keys` (m, d_m) in the cut's null space; NaN of keys all 0."""
        energy = float((keys**2).sum())
        if energy == 0:
            return float("nan")
        space = NullSpace(self.vectors[:, : cut.null(self.values)])
        return float((space.whiten(keys) ** 2).sum()) / energy


def spectrum_of(C: Array) -> Spectrum:
    """The spectrum of C (d_m, d_m). Raises NumericsError where C is not finite, or is 0.

    A singular value that rounding made negative counts as 0.
    """
    if not np.isfinite(C).all():
        raise NumericsError("C holds NaN or infinite entries; measure it again.")
    values, vectors = np.linalg.eigh(C)
    if not values[-1] > 0:
        raise NumericsError("C is 0, so that it has no spectrum; measure it on some text.")
    return Spectrum(np.maximum(values, 0.0), vectors)


def mean_squared_overlap(cosines: Array) -> float:
    """The mean of cosines (m, m) squared, off the diagonal; NaN of fewer than two keys."""
    m = len(cosines)
    if m < 2:
        return float("nan")
    squares = cosines**2
    return float((squares.sum() - np.trace(squares)) / (m * (m - 1)))


def spectra_of(
    pmatrix: PMatrixFile,
    layers: Sequence[int],
    absolute: Cut = PUBLISHED,
    relative: Cut = RELATIVE,
    *,
    reporter: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """One row a layer, of the cov.h5 and keys.h5 that lie beside pmatrix.h5.

    Raises ArtifactError where the files are not of one measurement or lack a layer, and
    NumericsError, naming the layer, where a C has no spectrum.
    """
    with (
        CovarianceFile(pmatrix.path.with_name("cov.h5")) as cov,
        KeysFile(pmatrix.path.with_name("keys.h5")) as keys,
        reporter.task("spectrum", len(layers), unit="layers") as task,
    ):
        require_made_from(pmatrix, {"cov": cov, "keys": keys})
        cov.require_layers(layers)
        keys.require_layers(layers)
        rows = []
        describe = _of_experts if cov.about.n_experts else _of_layer
        for layer in layers:
            try:
                found = describe(cov, keys, layer, absolute, relative)
            except NumericsError as error:
                raise NumericsError(f"layer {layer} of {cov.path}: {error}") from None
            cuts = {"null_space": absolute.size, "relative_null_space": relative.size}
            rows.append({"model": pmatrix.model} | overlap_row(pmatrix, layer) | cuts | found)
            task.advance()
    return rows


def overlap_row(pmatrix: PMatrixFile, layer: int) -> dict[str, Any]:
    """The mean squared overlap of keys in both spaces at one layer, beside 1/d_m and 1/m."""
    cosines = pmatrix.matrix("cosine", layer)
    m, d_m = len(cosines), pmatrix.about.d_m
    return {
        "layer": layer,
        "m": m,
        "d_m": d_m,
        "overlap": mean_squared_overlap(cosines),
        "overlap_whitened": mean_squared_overlap(pmatrix.matrix("whitened_cosine", layer)),
        # Of experts it is the overlap of keys that have all their experts in common.
        "one_over_d_m": float("nan") if pmatrix.about.n_experts else 1 / d_m,
        "one_over_m": 1 / m,
    }


def _of_layer(
    cov: CovarianceFile, keys: KeysFile, layer: int, absolute: Cut, relative: Cut
) -> dict[str, float]:
    return _described(
        spectrum_of(cov.second_moment(layer)), keys.keys_of(layer), absolute, relative
    )


def _of_experts(
    cov: CovarianceFile, keys: KeysFile, layer: int, absolute: Cut, relative: Cut
) -> dict[str, float]:
    """The median over a layer's experts, shared ones left out, of what each has for itself.

    `NAME_low` and `NAME_high` are the least and the largest. An expert that no token reached has no
    spectrum; of the keys, each has those of the facts that are routed to it.
    """
    of_facts = keys.keys_by_expert(layer)
    nothing = 0, np.zeros((0, cov.about.d_m))
    rows = [
        _described(
            spectrum_of(cov.second_moment_of(layer, expert)),
            of_facts.get(expert, nothing)[1],
            absolute,
            relative,
        )
        for expert in np.flatnonzero(cov.routed(layer)).tolist()
    ]
    found: dict[str, float] = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = values[~np.isnan(values)]
        ends = (np.median(known), known.min(), known.max()) if len(known) else 3 * (np.nan,)
        ends_of = (name, f"{name}_low", f"{name}_high")
        found |= dict(zip(ends_of, map(float, ends), strict=True))
    return found


def _described(spectrum: Spectrum, keys: Array, absolute: Cut, relative: Cut) -> dict[str, float]:
    return {
        "participation_ratio": spectrum.participation_ratio,
        "effective_rank": spectrum.effective_rank,
        "null_share": spectrum.null_share(absolute),
        "keys_in_null": spectrum.energy_in_null(absolute, keys),
        "relative_null_share": spectrum.null_share(relative),
        "keys_in_relative_null": spectrum.energy_in_null(relative, keys),
    }
