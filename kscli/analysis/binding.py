"""Which facts are bound together, and how much an edit of one moves the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]

MOST_TURNED = 1000  # facts, whose leaves are turned: the time grows with their cube


def rms_to_others(P: Real) -> Real:
    """The root mean square of p from each fact, edited, to the others, (m,), of P (m, m)."""
    squares = np.square(P)
    return np.asarray(np.sqrt((squares.sum(axis=1) - np.diag(squares)) / max(len(P) - 1, 1)))


def cluster_order(size: Real) -> NDArray[np.intp]:
    """An order of the m facts of |P| in which those that are bound are neighbours.

    Average linkage; up to `MOST_TURNED` facts have their leaves turned so that neighbours are near
    (Bar-Joseph et al., 2001). The distance of a pair is 1 less the larger of its two |p|, 0 at
    least.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    m = len(size)
    if m < 3:
        return np.arange(m)
    distance = np.clip(1 - np.maximum(size, size.T), 0, None)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, "average")
    if m <= MOST_TURNED:
        tree = optimal_leaf_ordering(tree, condensed)
    return np.asarray(leaves_list(tree), dtype=np.intp)
