"""The whitening of one layer: the Cholesky factor of its C, and whitened keys.

With C = L L^T every quantity of the paper is a product of whitened keys L^-1 k: any W with
W^T W = C^-1 gives the same p (equation 17, Appendix B). C is first scaled to unit diagonal. That
changes no p, makes the factor as accurate as its scaling allows, and gives the condition number
that float32 storage of C is to be judged by. Everything is done in place on one (d_m, d_m) array.
The factor takes C's lower triangle. C's upper one stays, for the result to be checked against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsymm, dtrmm
from scipy.linalg.lapack import dpocon, dpotrf, dtrtrs

from kscli.errors import NumericsError

ROWS_AT_ONCE = 512
FEWEST_TOKENS_PER_DIMENSION = 10
# The rms of the error that rounding to float32 makes, as a share of a number: over numbers whose
# logarithms are uniform, 2^-23 / sqrt(12) times sqrt(3 / (8 ln 2)).
ROUNDING = 2.53e-8


@dataclass(frozen=True)
class Whitening:
    """L^-1 of one layer's C.

    `factor` (d_m, d_m) float64 is the lower Cholesky factor of C scaled to unit diagonal; above
    its diagonal lies that scaled C itself. `scale` (d_m,) is the scaling, 1/sqrt(C_ii), and 0
    where C_ii is 0: a coordinate that was 0 on every token and is left out. `condition` estimates
    the 1-norm condition number of the scaled C.
    """

    factor: NDArray[np.float64]
    scale: NDArray[np.float64]
    condition: float

    @property
    def dead(self) -> NDArray[np.int64]:
        """The coordinates that were 0 on every token."""
        return np.flatnonzero(self.scale == 0)

    def whiten(self, keys: NDArray[np.float64]) -> NDArray[np.float64]:
        """L^-1 k, of which equation 17 makes p, for (m, d_m) keys, as (d_m, m) columns.

        Dead coordinates take no part.
        """
        columns = np.asfortranarray((keys * self.scale).T)
        whitened, _ = dtrtrs(self.factor.T, columns, lower=0, trans=1, overwrite_b=1)
        return whitened  # type: ignore[no-any-return]

    def solve(self, whitened: NDArray[np.float64]) -> NDArray[np.float64]:
        """C^-1 k, as (m, d_m) rows, of keys that `whiten` gave as (d_m, m) columns."""
        return np.asarray((self._back(whitened) * self.scale[:, None]).T)

    def unsolve(self, directions: NDArray[np.float64]) -> NDArray[np.float64]:
        """L^T d for (m, d_m) directions that `solve` gave, as (d_m, m) columns.

        Its square is d^T C d; d is 0 at dead coordinates.
        """
        scaled = np.asfortranarray(directions.T / np.where(self.scale > 0, self.scale, 1)[:, None])
        return dtrmm(1.0, self.factor.T, scaled, lower=0)  # type: ignore[no-any-return]

    def identity_residual(self, vectors: int = 8, seed: int = 0) -> float:
        """The largest |L^-1 C L^-T x - x| / |x| over random x: what L lacks of whitening C.

        `C` is what was factorised, any ridge included; the x are Gaussian, live coordinates only.
        """
        x = np.random.default_rng(seed).standard_normal((len(self.scale), vectors))
        x[self.dead] = 0
        x = np.asfortranarray(x)
        product, _ = dtrtrs(
            self.factor.T, self._times_scaled(self._back(x)), lower=0, trans=1, overwrite_b=1
        )
        return float((_lengths(product - x) / _lengths(x)).max())

    def solve_residual(self, keys: NDArray[np.float64], whitened: NDArray[np.float64]) -> float:
        """The largest |C (C^-1 k) - k| / |k| over (m, d_m) keys, `whitened` by `whiten`."""
        residual = self._times_scaled(self._back(whitened)).T
        residual -= keys * self.scale
        residual /= np.where(self.scale > 0, self.scale, 1)
        return float((_lengths(residual.T) / _lengths(keys.T)).max())

    def storage_variance(self, whitened: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much C's storage in float32 moves k_i^T C^-1 k_j: the variance, (m, m).

        Every entry of C was rounded by an error e_ab of standard deviation `ROUNDING` |C_ab|, one
        independent of the other. To first order k_i^T C^-1 k_j moves by x_i^T e x_j, x = C^-1 k,
        of which the variance is the sum of x_ia^2 (`ROUNDING` C_ab)^2 x_jb^2. `whitened` (d_m, m)
        are the keys, as `whiten` gives them.
        """
        squares = self._back(whitened) ** 2
        variance: NDArray[np.float64] = ROUNDING**2 * (squares.T @ self._times_squared(squares))
        return variance

    def _times_squared(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scaled C, its entries squared, times (d_m, n) columns."""
        product = columns.copy()  # The diagonal is 1.
        for start in range(0, len(self.factor), ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, len(self.factor))
            above = np.triu(self.factor[start:end, start:], 1) ** 2
            product[start:end] += above @ columns[start:]
            product[start:] += above.T @ columns[start:end]
        return product

    def _back(self, whitened: NDArray[np.float64]) -> NDArray[np.float64]:
        """L^-T y for (d_m, n) columns, L the factor of the scaled C."""
        columns, _ = dtrtrs(self.factor.T, whitened, lower=0, trans=0)
        return columns  # type: ignore[no-any-return]

    def _times_scaled(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scaled C times (d_m, n) columns."""
        product = dsymm(1.0, self.factor.T, columns, lower=1)
        # On the diagonal the factor lies where the scaled C had 1.
        product += (1 - np.diagonal(self.factor))[:, None] * columns
        return product  # type: ignore[no-any-return]


def whitening(C: NDArray[np.float64], count: int, ridge: float = 0.0) -> Whitening:
    """Factorise C + ridge (tr C / d_m) I, a mean over `count` tokens. `C` is overwritten.

    Raises NumericsError when C is not finite, was measured on fewer tokens than it has live
    dimensions (and ridge is 0), or is not positive definite.
    """
    diagonal = np.diagonal(C).copy()
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise NumericsError("C has a diagonal that is negative, NaN or infinite.")
    ridge_value = ridge * float(diagonal.mean())
    live = diagonal + ridge_value > 0
    dimensions = int(live.sum())
    if ridge == 0 and count < dimensions:
        raise NumericsError(
            f"C was measured on {count:,} tokens and has {dimensions:,} dimensions, so it has no "
            "inverse; measure it on more text, or add --ridge 1e-3."
        )
    C.flat[:: len(C) + 1] += ridge_value
    scale = np.zeros(len(C))
    scale[live] = 1 / np.sqrt(diagonal[live] + ridge_value)
    norm = _scale_to_unit_diagonal(C, scale)
    if not np.isfinite(norm):
        raise NumericsError("C holds NaN or infinite entries.")
    # C is symmetric, so its transpose, a column-major view, is factorised without a copy.
    factor, info = dpotrf(C.T, lower=0, overwrite_a=1, clean=0)
    if info != 0:
        raise NumericsError(
            f"C is not positive definite (at dimension {info:,} of {dimensions:,}, over "
            f"{count:,} tokens); measure it on more or more varied text, or add --ridge 1e-3."
        )
    reciprocal, _ = dpocon(factor, norm, uplo="U")
    condition = 1 / reciprocal if reciprocal > 0 else float("inf")
    return Whitening(factor.T, scale, condition)


def _scale_to_unit_diagonal(C: NDArray[np.float64], scale: NDArray[np.float64]) -> float:
    """Scale C's rows and columns in place, its diagonal to exactly 1; returns the 1-norm.

    A coordinate of scale 0 becomes an uncoupled 1 on the diagonal and takes no part.
    """
    sums = np.zeros(len(C))
    for start in range(0, len(C), ROWS_AT_ONCE):
        rows = C[start : start + ROWS_AT_ONCE]
        rows *= scale
        rows *= scale[start : start + ROWS_AT_ONCE, None]
        rows.flat[start :: len(C) + 1] = 1.0
        sums += np.abs(rows).sum(axis=0)
    return float(sums.max())


def _lengths(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(columns, axis=0))
