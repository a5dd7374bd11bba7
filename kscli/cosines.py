"""The cosines of keys, from the matrices that pmatrix.h5 holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BEYOND = 1e-5


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
