"""What a change of W does to all text: tr(dW C dW^T), a share of tr(W C W^T).

Over the tokens of the corpus, with C = E[k k^T], E|dW k|^2 = tr(dW C dW^T): the mean square of what
is added to a value. One plain edit by delta adds |delta|^2 / (k^T C^-1 k), any direction d adds
|delta|^2 d^T C d. E|W k|^2 = tr(W C W^T) is the mean square of the values themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COLUMNS_AT_ONCE = 2048


@dataclass(frozen=True)
class OfText:
    """One layer's C, as it is stored, in which changes of its W are weighed.

    `blocks` (n, n) are those on its diagonal, side by side; the rest of it is 0 (`blocks` of a
    dense layer is C alone).
    """

    blocks: Sequence[NDArray[np.float32]]

    def of_change(self, change: Array) -> float:
        """tr(dW C dW^T) of a `change` (d, width)."""
        ends = np.cumsum([len(C) for C in self.blocks])
        parts = np.split(change, ends[:-1], axis=1)
        total = sum(_of_block(C, of) for C, of in zip(self.blocks, parts, strict=True) if of.any())
        return max(total, 0.0)

    def of_edit(self, delta: Array, direction: Array) -> float:
        """The same of delta d^T, `delta` (d,) and `direction` (width,)."""
        return float(delta @ delta) * self.of_change(direction[None])


@dataclass(frozen=True)
class TextChange:
    """Changes of several layers' W as a share of the size of their values over all text.

    `sizes` are tr(W C W^T) of each layer.
    """

    layers: Sequence[OfText]
    sizes: Sequence[float]

    @classmethod
    def measure(
        cls, second_moments: Sequence[Sequence[NDArray[np.float32]]], weights: Sequence[Array]
    ) -> TextChange:
        """Of each layer's C, block by block, and W (d, width)."""
        layers = [OfText(blocks) for blocks in second_moments]
        sizes = [of.of_change(W) for of, W in zip(layers, weights, strict=True)]
        return cls(layers, sizes)

    def of_changes(self, changes: Sequence[Array]) -> float:
        """The share that changes (d, width), one a layer, make up together."""
        return self._share(
            of.of_change(each) for of, each in zip(self.layers, changes, strict=True)
        )

    def of_edit(self, deltas: Array, directions: Array) -> float:
        """That of one edit alone: `deltas` (layer, d), `directions` (layer, width)."""
        pairs = zip(self.layers, deltas, directions, strict=True)
        return self._share(of.of_edit(delta, direction) for of, delta, direction in pairs)

    def _share(self, squares: Iterable[float]) -> float:
        return sum(squares) / sum(self.sizes)


def _of_block(C: NDArray[np.float32], change: Array) -> float:
    """tr(dW C dW^T) of C (n, n) and a change (d, n)."""
    total = 0.0
    for start in range(0, len(C), COLUMNS_AT_ONCE):
        columns = slice(start, start + COLUMNS_AT_ONCE)
        moved = change @ C[:, columns].astype(np.float64)
        total += float((moved * change[:, columns]).sum())
    return total
