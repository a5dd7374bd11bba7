"""The second moment C = (1/N) sum k k^T of one layer, summed over batches of keys.

Only rows of blocks of the lower triangle are held. A batch's products are summed in float32
(`products`), and what was summed over at most b tokens in float32 is then added in float64, so
the error does not grow with the corpus: every entry of C is within
b 2^-24 sqrt(C_ii C_jj) of the exact mean of products of the keys (float32 rounding of b
products and sums, to first order; Higham, Accuracy and Stability, 3.1), plus one float32
rounding of the result. Where nothing is kept in float32 between batches, b is a batch's tokens;
otherwise the tokens from one `flush` to the next and a batch more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.second_moment.products import BlockRow, lower_products
from kscli.second_moment.transfers import HostSums

ROWS = 256


def lower_entries(d_m: int) -> int:
    """How many entries of a (d_m, d_m) lower triangle are held, blocks being whole."""
    return sum((end - start) * end for start, end in _spans(d_m))


class SecondMoment:
    """Sums k k^T over the keys of one layer; `add` takes keys, `matrix` gives C.

    The float64 sums lie on the device `home`: 8 bytes for each of `lower_entries`. With
    `partial`, batches are summed in float32 on the keys' own device, 4 bytes an entry, until
    `flush` adds them to the float64 sums. `host` carries what comes from another device.
    """

    def __init__(
        self,
        d_m: int,
        *,
        home: str = "cpu",
        partial: bool = False,
        host: HostSums | None = None,
    ) -> None:
        self.count = 0
        self.d_m = d_m
        self._keep_partial = partial
        self._partial: list[Tensor] = []
        self._host = host or HostSums()
        self._sums = [
            torch.zeros(end - start, end, dtype=torch.float64, device=home)
            for start, end in _spans(d_m)
        ]

    def add(self, keys: Tensor, tokens: int | None = None) -> Tensor:
        """Add (n, d_m) keys; returns whether all products are finite, a 0-d bool tensor.

        `tokens` is how many of the rows are keys, the others being 0 (None: all are). Where the
        products are not finite, the sums are spoilt. Nothing was added when this raises for want
        of memory.
        """
        products = lower_products(keys)
        if self._keep_partial and not self._partial:
            self._partial = [
                torch.zeros(total.shape, dtype=torch.float32, device=keys.device)
                for total in self._sums
            ]
        trace = torch.stack([torch.diagonal(row.product, row.start).sum() for row in products])
        self._host.add(self._partial if self._keep_partial else self._sums, self._cut(products))
        self.count += keys.shape[0] if tokens is None else tokens
        return trace.sum().isfinite()

    def flush(self) -> None:
        """Bring everything that was added into the float64 sums, and wait for it."""
        if self._partial:
            self._host.add(self._sums, self._partial)
        self._host.wait()
        # They came to be inside a forward pass, and no others may change such tensors.
        with torch.inference_mode():
            for partial in self._partial:
                partial.zero_()

    def matrix(self) -> NDArray[np.float32]:
        """C as a (d_m, d_m) float32 array, both triangles. `count` must not be 0."""
        self.flush()
        C = np.empty((self.d_m, self.d_m), dtype=np.float32)
        for (start, end), total in zip(_spans(self.d_m), self._sums, strict=True):
            rows = total.cpu().numpy()
            np.divide(rows, self.count, out=C[start:end, :end], casting="same_kind")
            C[:start, start:end] = C[start:end, :start].T
            corner = np.tril(C[start:end, start:end])
            C[start:end, start:end] = corner + np.tril(corner, -1).T
        return C

    def sums(self) -> NDArray[np.float64]:
        """The sum of k k^T, not divided, as a new (d_m, d_m) float64 array, both triangles."""
        self.flush()
        S = np.empty((self.d_m, self.d_m))
        for (start, end), total in zip(_spans(self.d_m), self._sums, strict=True):
            S[start:end, :end] = total.cpu().numpy()
            S[:start, start:end] = S[start:end, :start].T
            corner = np.tril(S[start:end, start:end])
            S[start:end, start:end] = corner + np.tril(corner, -1).T
        return S

    def packed(self) -> NDArray[np.float64]:
        """The sums' lower triangle, row by row: d_m (d_m + 1) / 2 float64 values."""
        self.flush()
        packed = np.empty(self.d_m * (self.d_m + 1) // 2)
        for place, lower, total in self._packing():
            packed[place] = total.cpu().numpy()[lower]
        return packed

    def restore(self, packed: NDArray[np.float64], count: int) -> None:
        """Take the sums over `count` tokens that `packed` gave, in place of what is held."""
        self._partial = []
        self.count = count
        for place, lower, total in self._packing():
            rows = np.zeros(total.shape)
            rows[lower] = packed[place]
            total.copy_(torch.from_numpy(rows))

    def _packing(self) -> Iterator[tuple[slice, NDArray[np.bool_], Tensor]]:
        """For each row of blocks: its place in `packed`, which entries lie there, and its sums."""
        for (start, end), total in zip(_spans(self.d_m), self._sums, strict=True):
            place = slice(start * (start + 1) // 2, end * (end + 1) // 2)
            yield place, np.tri(end - start, end, start, dtype=bool), total

    def _cut(self, products: list[BlockRow]) -> list[Tensor]:
        """The products as rows of blocks of the height that is held."""
        return [
            row.product[start - row.start : end - row.start, :end]
            for row in products
            for start, end in _spans(self.d_m)
            if row.start <= start < row.end
        ]


def _spans(d_m: int) -> Iterator[tuple[int, int]]:
    for start in range(0, d_m, ROWS):
        yield start, min(start + ROWS, d_m)
