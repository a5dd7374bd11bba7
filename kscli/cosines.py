"""The cosines of keys, from the matrices that pmatrix.h5 holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BEYOND = 1e-5
ROWS = 256  # that are looked at at once


def cosine(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products (m, m), as Q, divided by both norms; the diagonal is exactly 1.

    Raises ValueError for what are no inner products, so that a cosine would be beyond 1.
    """
    norms = np.sqrt(np.diagonal(products))
    cosines = products / norms[:, None]
    cosines /= norms
    np.fill_diagonal(cosines, 1.0)
    # Rounding takes the cosine of two equal keys beyond 1, by little.
    if not np.abs(cosines).max(initial=0.0) <= 1 + BEYOND:
        raise ValueError("the cosine of two keys is beyond 1")
    return np.clip(cosines, -1.0, 1.0, out=cosines)


def whitened_cosine(P: NDArray[np.float64], leverage: NDArray[np.float64]) -> NDArray[np.float64]:
    """k_i^T C^-1 k_j over both keys' norms, from P (m, m) and `leverage` (m,), k^T C^-1 k."""
    return cosine(P * leverage[:, None])


def no_cosine(P: NDArray[np.float64], leverage: NDArray[np.float64]) -> tuple[int, int] | None:
    """Where P (m, m) has an entry that no keys have; None where it has none.

    P[i, j] leverage[i] is an inner product: it is P[j, i] leverage[j], and its square is at most
    leverage[i] leverage[j], both but for rounding.
    """
    lengths = np.sqrt(leverage)
    with np.errstate(all="ignore"):
        for start in range(0, len(P), ROWS):
            rows = slice(start, start + ROWS)
            cosines = P[rows] * lengths[rows, None] / lengths
            others = P[:, rows].T * lengths / lengths[rows, None]
            sound = (np.abs(cosines) <= 1 + BEYOND) & (np.abs(cosines - others) <= BEYOND)
            if not sound.all():
                i, j = np.unravel_index(int(sound.argmin()), sound.shape)
                return start + int(i), int(j)
    return None
