"""The metric in which an editor measures keys: C^-1, the identity, or a null space of C.

An editor writes along M k: M = C^-1 (the paper, ROME, MEMIT), M = I (EasyEdit's ROME), or M = Pi, a
projection on directions in which text has hardly any keys (AlphaEdit). Each M is Y Y^T of
some Y, so that k^T M k' is a product of whitened keys Y^T k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile
from kscli.editing.editors import MetricName
from kscli.errors import NumericsError
from kscli.records import quote
from kscli.whitening import Whitening, whitening

Array = NDArray[np.float64]


class NoInverseError(NumericsError):
    """C of a `block` of experts has no inverse, for a `reason`, and a key is not 0 in it.

    It is the `row`-th of the keys, counted from their end.
    """

    def __init__(self, block: str, reason: NumericsError, row: int) -> None:
        super().__init__(f"{block}: {reason}")
        self.block, self.reason, self.row = block, reason, row


@contextmanager
def naming_facts(texts: Sequence[str]) -> Iterator[None]:
    """Name the fact, of those whose keys are measured, in what `NoInverseError` says."""
    try:
        yield
    except NoInverseError as error:
        raise NumericsError(
            f"{error.block}, to which {quote(texts[error.row])} is routed, bare or in a context: "
            f"{error.reason}"
        ) from error


class Metric(Protocol):
    """M = Y Y^T on keys."""

    def whiten(self, keys: Array) -> Array:
        """Y^T k for (m, d_m) keys, as (r, m) columns."""
        ...

    def solve(self, whitened: Array) -> Array:
        """Y y for (r, m) columns, as (m, d_m) rows: M k of keys that `whiten` gave."""
        ...

    def unsolve(self, directions: Array) -> Array:
        """y with Y y = d for (m, d_m) directions that `solve` gave, as (r, m) columns.

        |y|^2 is d^T M^-1 d: with M = C^-1 what a change of W along d changes in all text.
        """
        ...


@dataclass(frozen=True)
class Identity:
    """M = I: keys as they are."""

    def whiten(self, keys: Array) -> Array:
        """The keys as (d_m, m) columns."""
        return keys.T

    def solve(self, whitened: Array) -> Array:
        """Columns as (m, d_m) rows."""
        return whitened.T

    def unsolve(self, directions: Array) -> Array:
        """The directions as (d_m, m) columns."""
        return directions.T


@dataclass(frozen=True)
class InverseByExpert:
    """M = C^-1 of a layer of experts, where keys are stacked and C is taken block by block.

    An expert's block is factorised when a key is first routed to it. Raises NoInverseError where
    that has no inverse.
    """

    cov: CovarianceFile
    layer: int
    ridge: float
    _factors: dict[int, Whitening] = field(default_factory=dict)

    def whiten(self, keys: Array) -> Array:
        """L^-1 k, as (width, m) columns."""
        return self._by_block(keys, lambda white, part: white.whiten(part).T).T

    def solve(self, whitened: Array) -> Array:
        """L^-T y, as (m, width) rows."""
        return self._by_block(whitened.T, lambda white, part: white.solve(part.T))

    def unsolve(self, directions: Array) -> Array:
        """L^T d, as (width, m) columns."""
        return self._by_block(directions, lambda white, part: white.unsolve(part).T).T

    def _by_block(self, rows: Array, of_part: Callable[[Whitening, Array], Array]) -> Array:
        """What `of_part` makes of each block's part of (m, width) rows; 0 stays 0."""
        found = np.zeros_like(rows)
        start = 0
        for number, width in enumerate(self.cov.widths):
            columns = slice(start, start + width)
            there = np.flatnonzero(rows[:, columns].any(axis=1))
            if len(there):
                white = self._factor(number, int(there[0]) - len(rows))
                found[there, columns] = of_part(white, rows[there, columns])
            start += width
        return found

    def _factor(self, number: int, row: int) -> Whitening:
        if number not in self._factors:
            try:
                found = whitening(*self.cov.block(self.layer, number), self.ridge)
            except NumericsError as error:
                name = f"{self.cov.block_name(number)} of layer {self.layer}"
                raise NoInverseError(name, error, row) from error
            self._factors[number] = found
        return self._factors[number]


@dataclass(frozen=True)
class NullSpace:
    """M = Pi = U U^T; `basis` U (d_m, r) has orthonormal columns."""

    basis: Array

    def whiten(self, keys: Array) -> Array:
        """U^T k, as (r, m) columns."""
        return self.basis.T @ keys.T

    def solve(self, whitened: Array) -> Array:
        """U y, as (m, d_m) rows."""
        return whitened.T @ self.basis.T

    def unsolve(self, directions: Array) -> Array:
        """U^T d, as (r, m) columns."""
        return self.basis.T @ directions.T


@dataclass(frozen=True)
class Cut:
    """Below which singular value a direction of C counts as null: `nullspace_threshold`.

    `relative`: `size` is a multiple of the mean singular value, tr C / d_m, so that it does not
    depend on the scale of C; published is an absolute one.
    """

    size: float = 0.02
    relative: bool = False

    def limit(self, values: Array) -> float:
        """The singular value, of `values` (d_m,), below which a direction is null."""
        return self.size * (float(values.mean()) if self.relative else 1.0)

    def null(self, values: Array) -> int:
        """How many of the singular values (d_m,) of C are below the cut."""
        return int((values < self.limit(values)).sum())


def null_space(C: Array, cut: Cut) -> NullSpace:
    """The span of the singular vectors of C (d_m, d_m) whose singular values are below the cut.

    Raises NumericsError where that is nothing or everything.
    """
    values, vectors = np.linalg.eigh(C)
    limit, kept = cut.limit(values), cut.null(values)
    option = "--relative-null-space" if cut.relative else "--null-space"
    found = f"C's singular values are {values[0]:.3g} to {values[-1]:.3g}"
    if kept == 0:
        raise NumericsError(
            f"no singular value of C is below {limit:.3g}, so its null space is empty and nothing "
            f"can be written in it; {found}: raise {option}."
        )
    if kept == len(values):
        raise NumericsError(
            f"all singular values of C are below {limit:.3g}, so its null space is everything and "
            f"protects nothing; {found}: lower {option}."
        )
    return NullSpace(np.ascontiguousarray(vectors[:, :kept]))


def metric_of(name: MetricName, cov: CovarianceFile, layer: int, ridge: float, cut: Cut) -> Metric:
    """The metric of that name at one layer; the null space is that of C without the `ridge`.

    Raises what `whitening` and `null_space` raise; the identity asks nothing of C.
    """
    if name == "identity":
        return Identity()
    if name == "second-moment" and cov.about.n_experts:
        return InverseByExpert(cov, layer, ridge)
    C = cov.second_moment(layer)
    if name == "null-space":
        return null_space(C, cut)
    return whitening(C, cov.count, ridge)
