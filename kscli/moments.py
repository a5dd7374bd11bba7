"""The second moment C = (1/N) sum k k^T, summed over batches of keys.

Only the lower triangle is computed and held, as rows of blocks. A batch's products are
summed in float32 and the batch is then added in float64, so the error does not grow with the
corpus: for batches of at most b tokens every entry is within b 2^-24 sqrt(C_ii C_jj) of the
exact sum of products of the keys (float32 rounding of b products and sums), plus one float32
rounding of the result.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from torch import Tensor

BLOCK = 1024


class SecondMoment:
    """Sums k k^T over the keys of one layer; `update` adds keys, `matrix` gives C.

    Holds the lower triangle in float64 on the host: 4 d_m^2 bytes and a little.
    """

    def __init__(self, d_m: int) -> None:
        self.count = 0
        self.d_m = d_m
        self._spans = [(start, min(start + BLOCK, d_m)) for start in range(0, d_m, BLOCK)]
        self._sums = [np.zeros((end - start, end)) for start, end in self._spans]

    def update(self, keys: Tensor) -> bool:
        """Add (n, d_m) keys; whether they were finite. Keys that are not are not added."""
        rows = [_block_row(keys, start, end) for start, end in self._spans]
        for (start, _), row in zip(self._spans, rows, strict=True):
            if not np.isfinite(np.diagonal(row, start)).all():
                return False
        for total, row in zip(self._sums, rows, strict=True):
            total += row
        self.count += keys.shape[0]
        return True

    def matrix(self) -> NDArray[np.float32]:
        """C as a (d_m, d_m) float32 array, both triangles. `count` must not be 0."""
        C = np.empty((self.d_m, self.d_m), dtype=np.float32)
        for (start, end), total in zip(self._spans, self._sums, strict=True):
            np.divide(total, self.count, out=C[start:end, :end], casting="same_kind")
            C[:start, start:end] = C[start:end, :start].T
            corner = np.tril(C[start:end, start:end])
            C[start:end, start:end] = corner + np.tril(corner, -1).T
        return C


def _block_row(keys: Tensor, start: int, end: int) -> NDArray[np.float32]:
    """Rows `start` to `end` of the lower triangle of keys^T keys, (end - start, end), float32.

    What lies above the diagonal of the last block is not defined.
    """
    own = keys[:, start:end].float()
    if keys.device.type != "cpu":
        product: NDArray[np.float32] = torch.mm(own.T, keys[:, :end].float()).cpu().numpy()
        return product
    row = np.empty((end - start, end), dtype=np.float32)
    if start:
        torch.mm(own.T, keys[:, :start].float(), out=torch.from_numpy(row)[:, :start])
    # The transposes are views: BLAS is column-major, where this is the upper triangle.
    row[:, start:] = ssyrk(1.0, own.contiguous().numpy().T, lower=0).T
    return row
