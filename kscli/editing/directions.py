"""The directions d_i of an edit: W becomes W + sum_i delta_i d_i^T.

ROME writes one value (equations 3 and 4 of the paper; Meng et al. 2022a):

    W_n = W_{n-1} + delta (C^-1 k)^T / (k^T C^-1 k),    delta = v - W_{n-1} k

MEMIT (Meng et al. 2022b, equation 14) writes b values at once, the columns of R, and weighs what
the model knew by lambda:

    W_n = W_{n-1} + R K^T (lambda C + K K^T)^-1 = W_{n-1} + R (lambda I + G)^-1 (C^-1 K)^T

with G = K^T C^-1 K, by the identity K^T (lambda C + K K^T)^-1 = (lambda I + G)^-1 K^T C^-1. So ROME
is the form of MEMIT with b = 1 and lambda = 0, and one function serves both. For one key, MEMIT
moves a fact j by p(k, k_j) delta a / (lambda + a), a = k^T C^-1 k.

The other editors are this form too:

- the key in the direction is not the key that gets its value (ROME: the mean over contexts, and the
  bare prompt's): G = K^T C^-1 K', K' the keys that get their values;
- keys K_p of earlier edits stand in the inverse (MEMIT-seq): with A = (K_p K), the columns of
  (lambda C + A A^T)^-1 A that belong to K;
- C^-1 is another metric: the identity, or a projection Pi on a null space of C (AlphaEdit). There
  (Pi (K K^T + K_p K_p^T) + lambda I)^-1 Pi K = Pi A (A^T Pi A + lambda I)^-1, its columns of K;
- EMMET's (w C)^-1 K (K^T (w C)^-1 K + e I)^-1 has lambda = w e.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from kscli.editing.editors import FactKeys
from kscli.editing.metrics import Metric
from kscli.errors import NumericsError

Array = NDArray[np.float64]

_DEPENDENT = 1e-12


def edit_directions(
    metric: Metric,
    keys: Array,
    weight: float = 0.0,
    *,
    at: Array | None = None,
    earlier: Array | None = None,
) -> Array:
    """The rows D (b, d_m) with which residuals R (b, d) of `keys` (b, d_m) change W by R^T D.

    One key and no weight: equation 2, with the denominator of equation 4; Appendix A derives it.

    D = (weight I + K^T C^-1 K)^-1 (C^-1 K)^T in the metric C^-1; `weight` is MEMIT's lambda, 0 for
    ROME. `at` (b, d_m) are the keys that get their values, where these are others than `keys`; with
    no weight D at^T = I. `earlier` (n, d_m) are keys of earlier edits, which stand in the inverse.
    Raises NumericsError where two keys of a batch are the same and `weight` is 0: no W maps one
    key to two values.
    """
    if at is not None and not np.array_equal(at, keys):
        return _towards(metric, keys, at, weight)
    b = len(keys)
    if earlier is not None:
        keys = np.concatenate([earlier, keys])
    whitened = metric.whiten(keys)
    gram = whitened.T @ whitened + weight * np.eye(len(keys))
    try:
        factor = cho_factor(gram)
    except np.linalg.LinAlgError:
        raise _dependent(len(keys)) from None
    # What a key has that those before it lack; rounding alone leaves about 1e-16.
    if (factor[0].diagonal() ** 2 < _DEPENDENT * gram.diagonal()).any():
        raise _dependent(len(keys))
    # The rows of K: (lambda I + G)^-1 is symmetric.
    rows = cho_solve(factor, np.eye(len(keys))[:, len(keys) - b :])
    return metric.solve(whitened @ rows)


def directions_of_each(metric: Metric, facts: FactKeys, weight: float = 0.0) -> Array:
    """The directions d_i of edits of one fact alone, (m, d_m): p of the editor is d_i^T k_j.

    d_i is what `edit_directions` gives of fact i alone, M k_i / (weight + k_i^T M k'_i), k_i the
    key `along` which it is written and k'_i the one that it is written `at`. Raises NumericsError,
    naming the fact by its number, where nothing can be written along its key.
    """
    whitened = metric.whiten(facts.along)
    reached = whitened if facts.at is facts.along else metric.whiten(facts.at)
    gains = weight + (whitened * reached).sum(axis=0)
    lengths = np.linalg.norm(whitened, axis=0) * np.linalg.norm(reached, axis=0)
    nothing = np.flatnonzero(~(np.abs(gains) > _DEPENDENT * lengths))
    if len(nothing):
        raise NumericsError(
            f"the editor can write nothing for fact {nothing[0]}: its key, or the mean of its keys "
            "over the contexts, is 0 or orthogonal to the bare prompt's in this metric."
        )
    return metric.solve(whitened / gains)


def _towards(metric: Metric, keys: Array, at: Array, weight: float) -> Array:
    """The directions along C^-1 `keys` with which the keys `at` get their values."""
    whitened, reached = metric.whiten(keys), metric.whiten(at)
    gram = whitened.T @ reached + weight * np.eye(len(keys))
    lengths = np.linalg.norm(whitened, axis=0) * np.linalg.norm(reached, axis=0)
    if (np.linalg.svd(gram, compute_uv=False)[-1:] < _DEPENDENT * lengths.max()).any():
        raise NumericsError(
            "the mean of a fact's keys over the contexts is orthogonal to the bare prompt's key, "
            "so nothing can be written along it; use other --contexts."
        )
    return metric.solve(whitened @ np.linalg.inv(gram).T)


def _dependent(count: int) -> NumericsError:
    return NumericsError(
        f"{count} keys are not independent, so they cannot be given values at once; edit them "
        "one after the other, or with a --weight above 0."
    )
