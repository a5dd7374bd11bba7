"""Protection: directions that leave the values of protected keys where they were, and its price.

With protected keys as the columns of P, the direction along M' k instead of M k,

    M' = M - M P (P^T M P + rho I)^-1 P^T M,

moves none of them where rho is 0: d^T P = 0. Among all directions with d^T k = 1 that move none it
has the least d^T C d, the least change to all text, for M = C^-1. With rho above 0, a ridge,

    M' = (C + P P^T / rho)^-1,

so to protect is to count the protected keys as text of their own: C + mu C_protected. This is how
protection goes over into MEMIT, whose lambda C becomes lambda (C + mu C_protected), and into
AlphaEdit, whose projection Pi becomes Pi' = Pi - Pi P (P^T Pi P + rho I)^-1 P^T Pi.

The price of protection is what d^T C d becomes, as a multiple of the plain edit's. With rho = 0 it
is G_ee (G^-1)_ee over the Gram matrix G = K^T C^-1 K of the edited key and the protected ones: the
variance inflation factor of regression, at least 1. In another metric M it is d^T M^-1 d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, svd

from kscli.editing.editors import FactKeys
from kscli.editing.metrics import Metric
from kscli.errors import NumericsError

Array = NDArray[np.float64]

_DEPENDENT = 1e-12
_NO_ROOM = 1e-6


class NoRoomError(NumericsError):
    """Protected keys leave no direction to write in."""


@dataclass(frozen=True)
class Protected:
    """M' of a metric M: what is whitened is weakened along what the protected keys share.

    `basis` (r, n) has orthonormal columns, and `kept` (n,) is the part of a whitened key that is
    left along each: 0 where no ridge is.
    """

    metric: Metric
    basis: Array
    kept: Array

    def whiten(self, keys: Array) -> Array:
        """Y'^T k for (m, d_m) keys, as (r, m) columns, M' = Y' Y'^T."""
        return self._weakened(self.metric.whiten(keys))

    def solve(self, whitened: Array) -> Array:
        """Y' y for (r, m) columns, as (m, d_m) rows."""
        return self.metric.solve(self._weakened(whitened))

    def unsolve(self, directions: Array) -> Array:
        """Y^-1 d of the metric M, without protection."""
        return self.metric.unsolve(directions)

    def _weakened(self, whitened: Array) -> Array:
        lost = (1 - self.kept)[:, None] * (self.basis.T @ whitened)
        weakened: Array = whitened - self.basis @ lost
        return weakened


def protect(metric: Metric, keys: Array, ridge: float = 0.0) -> Protected:
    """The metric in which (n, d_m) `keys` are protected.

    `ridge` is rho as a multiple of the protected keys' median k^T M k. Raises NoRoomError where
    they leave no direction to write in.
    """
    whitened = metric.whiten(keys)
    lengths = np.linalg.norm(whitened, axis=0)
    rho = ridge * float(np.median(lengths**2))
    if rho == 0:
        # Only what the keys span counts. A key of a massive activation would hide the others.
        whitened = whitened / np.where(lengths > 0, lengths, 1.0)
    basis, sizes = _principal(whitened)
    spanned = sizes > _DEPENDENT * sizes.max(initial=0.0)
    if rho == 0 and spanned.sum() == len(whitened):
        raise NoRoomError(
            f"the {len(keys):,} protected keys span all {len(whitened):,} dimensions, so nothing "
            "can be written beside them; protect fewer facts, use --protect-at subject, or set "
            "--protect-ridge above 0."
        )
    basis, sizes = basis[:, spanned], sizes[spanned]
    return Protected(metric, basis, np.sqrt(rho / (sizes**2 + rho)))


def _principal(columns: Array) -> tuple[Array, Array]:
    """The left singular vectors of (r, n) columns, and their singular values."""
    r, n = columns.shape
    if n > r:
        # The triangle has the same ones, and is square.
        (triangle,) = qr(columns.T, mode="r", check_finite=False)
        columns = triangle[:r].T
    basis, sizes, _ = svd(columns, full_matrices=False, check_finite=False)
    return basis, sizes


def prices(metric: Metric, protected: Metric, along: Array, at: Array) -> Array:
    """The price (b,) of each edit alone, written along and at (b, d_m) keys; see the module.

    Infinite where a key lies among the protected ones.
    """
    room = _room(metric, protected, at)
    found = np.full(len(along), np.inf)
    directions = protected.solve(protected.whiten(along[room]))
    found[room] = prices_of(metric, directions, FactKeys(along[room], at[room], at[room]))
    return found


def prices_of(metric: Metric, directions: Array, facts: FactKeys) -> Array:
    """The price (b,) of (b, d_m) directions, of whatever length, to each fact's own key.

    It is what d^T M^-1 d is to move the value at the own key by 1, and so counts what an editor
    with a weight lambda leaves unsaid.
    """
    plain = metric.solve(metric.whiten(facts.along))
    found: Array = _costs(metric, directions, facts.at) / _costs(metric, plain, facts.at)
    return found


def require_room(metric: Metric, protected: Metric, keys: Array) -> None:
    """Raise NumericsError where one of (b, d_m) keys lies among the protected ones."""
    if metric is not protected and not _room(metric, protected, keys).all():
        raise NumericsError(
            "its key is one that an earlier edit was written at, or that is protected, so that "
            "nothing can be written there alone; leave one of the two out."
        )


def _costs(metric: Metric, directions: Array, at: Array) -> Array:
    """d^T M^-1 d of directions that are scaled to d^T k = 1, k of `at`: (b,)."""
    found: Array = (metric.unsolve(directions) ** 2).sum(axis=0) / (directions * at).sum(
        axis=1
    ) ** 2
    return found


def _room(metric: Metric, protected: Metric, keys: Array) -> NDArray[np.bool_]:
    """Which of (b, d_m) keys protection leaves a part of."""
    left = np.linalg.norm(protected.whiten(keys), axis=0)
    found: NDArray[np.bool_] = left > _NO_ROOM * np.linalg.norm(metric.whiten(keys), axis=0)
    return found


class Sparing:
    """A metric in which keys that were written to are protected exactly, one after the other.

    An edit in it disturbs none before it. So after n edits every value is what was written, as if
    all had been written at once. To add a key costs r n, whatever was written: `_rows` (n, r) are
    an orthonormal basis of the keys so far, whitened, with room for more.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._n = 0

    def whiten(self, keys: Array) -> Array:
        """As `Metric`."""
        return self._without(self._metric.whiten(keys))

    def solve(self, whitened: Array) -> Array:
        """As `Metric`."""
        return self._metric.solve(self._without(whitened))

    def unsolve(self, directions: Array) -> Array:
        """As `Metric`."""
        return self._metric.unsolve(directions)

    def add(self, keys: Array) -> None:
        """Protect (b, d_m) keys from now on."""
        whitened = self._metric.whiten(keys)
        left = self._without(self._without(whitened))
        lengths = np.linalg.norm(whitened, axis=0)
        new = left[:, np.linalg.norm(left, axis=0) > _DEPENDENT * lengths]
        basis, _ = qr(new, mode="economic")
        end = self._n + basis.shape[1]
        if self._n == 0:
            self._rows: Array = np.empty((end, len(whitened)))
        elif end > len(self._rows):
            more = np.empty((max(len(self._rows), basis.shape[1]), len(whitened)))
            self._rows = np.concatenate([self._rows, more])
        self._rows[self._n : end] = basis.T
        self._n = end

    def _without(self, whitened: Array) -> Array:
        if self._n == 0:
            return whitened
        basis = self._rows[: self._n]
        found: Array = whitened - basis.T @ (basis @ whitened)
        return found
