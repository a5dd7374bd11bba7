"""What happens to the change of W: the choice `afterwards` of an editor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh

Array = NDArray[np.float64]

_NO_DIVISION_BY_0 = 1e-8


def largest_entries(change: Array, W: Array, share: float) -> Array:
    """RECT (Gu et al. 2024): only the `share` of entries is kept that changes W most, relatively.

    `change` and W, the weights before it, are (d, d_m). Kept are the entries whose
    |change / (W + 1e-8)| is at least the int((1 - share) n)-th smallest of the n.
    """
    relative = np.abs(change / (W + _NO_DIVISION_BY_0))
    rank = int((1 - share) * relative.size)
    if rank < 1:
        return change
    threshold = np.partition(relative.ravel(), rank - 1)[rank - 1]
    return np.where(relative >= threshold, change, 0.0)


def limited_deltas(deltas: Array, directions: Array, W: Array) -> Array:
    """PRUNE (Ma et al. 2024): the deltas (n, d) with which the spectrum of the change is limited.

    The change of W is deltas^T directions, of (n, d) and (n, d_m). Its singular values s above
    sigma, the largest of the original W (d, d_m), become sigma + ln(s / sigma). The left singular
    vectors span the deltas, so that this is a linear map of each delta_i. The directions stay, and
    so does p of the edits.
    """
    sigma = float(np.sqrt(eigvalsh(W @ W.T, subset_by_index=[len(W) - 1] * 2)[0]))
    basis, triangle = np.linalg.qr(deltas.T)
    left, s, _ = np.linalg.svd(triangle @ directions, full_matrices=False)
    left = basis @ left
    above = s > sigma
    factor = np.ones_like(s)
    factor[above] = (sigma + np.log(s[above] / sigma)) / s[above]
    return np.asarray(deltas + ((deltas @ left) * (factor - 1)) @ left.T)
