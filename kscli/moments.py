"""The second moment C = (1/N) sum k k^T, summed over batches of keys.

Only the lower triangle is computed. A batch's products are summed in float32 and the
batch is then added in float64, so the error does not grow with the corpus: for batches
of at most b tokens every entry is within b 2^-24 sqrt(C_ii C_jj) of the exact sum of
products of the keys (float32 rounding of b products and sums), plus one float32
rounding of the result.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from torch import Tensor


class SecondMoment:
    """Sums k k^T over the keys of one layer; `update` adds keys, `matrix` gives C.

    Holds one (d_m, d_m) float64 array on the host.
    """

    def __init__(self, d_m: int) -> None:
        self.count = 0
        self._sum = np.zeros((d_m, d_m))

    def update(self, keys: Tensor) -> bool:
        """Add (n, d_m) keys; whether they were finite. Keys that are not are not added."""
        lower = _lower_product(keys)
        if not np.isfinite(np.diagonal(lower)).all():
            return False
        self._sum += lower
        self.count += keys.shape[0]
        return True

    def matrix(self) -> NDArray[np.float32]:
        """C as a (d_m, d_m) float32 array, both triangles. `count` must not be 0."""
        lower = np.tril((self._sum / self.count).astype(np.float32))
        return lower + np.tril(lower, -1).T


def _lower_product(keys: Tensor) -> NDArray[np.float32]:
    """keys^T keys in float32 as a (d_m, d_m) array; only its lower triangle is defined."""
    if keys.device.type != "cpu":
        wide = keys.float()
        product: NDArray[np.float32] = torch.mm(wide.T, wide).cpu().numpy()
        return product
    array = keys.float().contiguous().numpy()
    # The transposes are views: BLAS wants column-major, and the upper triangle of the
    # column-major result is the lower one of the row-major view.
    return ssyrk(1.0, array.T, lower=0).T  # type: ignore[no-any-return]
