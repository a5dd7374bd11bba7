"""The closed form of an edit: what is added to W so that keys get new values.

ROME writes one value (equations 3 and 4 of the paper; Meng et al. 2022a):

    W_n = W_{n-1} + delta (C^-1 k)^T / (k^T C^-1 k),    delta = v - W_{n-1} k

MEMIT (Meng et al. 2022b, equation 14) writes b values at once, the columns of R, and weighs what
the model knew by lambda:

    W_n = W_{n-1} + R K^T (lambda C + K K^T)^-1 = W_{n-1} + R (lambda I + G)^-1 (C^-1 K)^T

with G = K^T C^-1 K, by the identity K^T (lambda C + K K^T)^-1 = (lambda I + G)^-1 K^T C^-1. So ROME
is the form of MEMIT with b = 1 and lambda = 0, and one function serves both. For one key, MEMIT
moves a fact j by p(k, k_j) delta a / (lambda + a), a = k^T C^-1 k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from kscli.errors import NumericsError
from kscli.whitening import Whitening

_DEPENDENT = 1e-12


def edit_directions(
    white: Whitening, keys: NDArray[np.float64], weight: float = 0.0
) -> NDArray[np.float64]:
    """The rows D (b, d_m) with which residuals R (b, d) of `keys` (b, d_m) change W by R^T D.

    One key and no weight: equation 2, with the denominator of equation 4; Appendix A derives it.

    D = (weight I + K^T C^-1 K)^-1 (C^-1 K)^T; `weight` is MEMIT's lambda, 0 for ROME. Raises
    NumericsError where two keys of a batch are the same and `weight` is 0: no W maps one key to
    two values.
    """
    whitened = white.whiten(keys)
    gram = whitened.T @ whitened + weight * np.eye(len(keys))
    dependent = NumericsError(
        f"{len(keys)} keys are not independent, so they cannot be given values at once; edit them "
        "one after the other, or with a --weight above 0."
    )
    try:
        factor = cho_factor(gram)
    except np.linalg.LinAlgError:
        raise dependent from None
    # What a key has that those before it lack; rounding alone leaves about 1e-16.
    if (factor[0].diagonal() ** 2 < _DEPENDENT * gram.diagonal()).any():
        raise dependent
    return np.asarray(cho_solve(factor, white.solve(whitened)))
