"""The row space of a change of W, above the noise of rounding.

A change by n edits, sum_i delta_i d_i^T, has rank n at most, and its rows span the directions d_i.
Rounding to the model's dtype adds noise to every entry. Its singular values form a bulk that ends
near a known multiple of their median (Gavish & Donoho 2014, equation 11, of matrices of unknown
noise), and what is above that is the change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Below this share of the largest singular value float32's own rounding lies.
_LEAST = 1e-6


@dataclass(frozen=True)
class RowSpace:
    """`basis` (d_m, r) has orthonormal columns; `rank` is r."""

    basis: Array

    @property
    def rank(self) -> int:
        """How many independent directions the change has."""
        return int(self.basis.shape[1])

    def shares(self, directions: Array) -> Array:
        """The share of each of (n, d_m) directions, squared, that lies in the row space; 0 of 0."""
        squares = (directions**2).sum(axis=1)
        inside = ((directions @ self.basis) ** 2).sum(axis=1)
        return np.asarray(np.divide(inside, squares, out=np.zeros_like(squares), where=squares > 0))


def row_space(change: Array) -> RowSpace:
    """The row space of a change (d, d_m), without what is noise.

    Columns that did not change, as those of experts to which nothing was written, hold no noise.
    """
    changed = np.flatnonzero(change.any(axis=0))
    _, sizes, of_changed = np.linalg.svd(change[:, changed], full_matrices=False)
    rows = np.zeros((len(sizes), change.shape[1]))
    rows[:, changed] = of_changed
    ratio = min(len(change), len(changed)) / max(len(change), len(changed))
    multiple = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    limit = max(multiple * float(np.median(sizes)), _LEAST * float(sizes[0]))
    return RowSpace(np.ascontiguousarray(rows[sizes > limit].T))
