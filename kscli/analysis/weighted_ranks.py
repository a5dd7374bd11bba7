"""Rank statistics of samples in which a pair may be there several times, as a bootstrap has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]
Mask = NDArray[np.bool_]


def spearman(x: Real, y: Real, weights: Real) -> Real:
    """Spearman's correlation of x and y (pairs,), each there `weights` (repeats, pairs) times.

    Whole weights give that of a sample in which pairs are repeated; NaN where either is constant.
    """
    a, b = (_centred_ranks(values, weights) for values in (x, y))
    weighted = weights * a
    scale = np.sqrt((weighted * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide((weighted * b).sum(axis=1), scale, out=undefined, where=scale > 0))


def roc_auc(x: Real, positive: Mask, weights: Real) -> Real:
    """The share of positive and negative pairs that x orders rightly, a tie counting half.

    Mann and Whitney's U by the number of such pairs, with `weights` as in `spearman`; NaN where
    either kind is missing.
    """
    of_positive = np.where(positive, weights, 0.0)
    n_positive, n = of_positive.sum(axis=1), weights.sum(axis=1)
    rank_sum = (of_positive * _centred_ranks(x, weights)).sum(axis=1)
    both = n_positive * (n - n_positive)
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(rank_sum, both, out=undefined, where=both > 0) + 0.5)


def _centred_ranks(values: Real, weights: Real) -> Real:
    """The ranks, less their mean, of values that are there `weights` (repeats, pairs) times.

    Equal values share the mean of their ranks.
    """
    order = np.argsort(values, kind="stable")
    new = np.append(True, np.diff(values[order]) != 0)
    of_value = np.add.reduceat(weights[:, order], np.flatnonzero(new), axis=1)
    ranks = np.cumsum(of_value, axis=1) - (of_value - 1) / 2
    ranks -= (of_value.sum(axis=1, keepdims=True) + 1) / 2
    back = np.empty(len(values), dtype=np.intp)
    back[order] = np.cumsum(new) - 1
    return np.asarray(ranks[:, back])
