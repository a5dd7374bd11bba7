"""The pairs of facts that are bound most tightly: the largest off-diagonal entries of P."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import TokenMatrices, different_last_token
from kscli.errors import UsageError

if TYPE_CHECKING:
    from kscli.facts import Fact


class Pair(NamedTuple):
    """An ordered pair: what editing fact `i` does to fact `j`, p = P[i, j]."""

    i: int
    j: int
    p: float


class FactMatrices(TokenMatrices, Protocol):
    """P with the facts it was measured on: a pmatrix file that is open, or a stand-in."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The m facts, in the order of P's rows."""


def top_pairs(
    P: NDArray[np.float64],
    k: int,
    absolute: bool = False,
    among: NDArray[np.bool_] | None = None,
) -> list[Pair]:
    """The `k` ordered pairs i != j of largest P (m, m), or largest |P|, in descending order.

    `among` (m, m) says which entries are considered (default: all). Equal values come in the
    order of (i, j). Fewer than `k` pairs give all there are. Raises UsageError where `k` is
    below 1.
    """
    rows, columns = _top_entries(P, k, absolute, among)
    return [Pair(int(i), int(j), float(P[i, j])) for i, j in zip(rows, columns, strict=True)]


def _top_entries(
    P: NDArray[np.float64], k: int, absolute: bool, among: NDArray[np.bool_] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the entries of `top_pairs`; raises as that does."""
    if k < 1:
        raise UsageError(f"{k} pairs were asked for; ask for at least 1.")
    considered = ~np.eye(len(P), dtype=bool)
    if among is not None:
        considered &= among
    size = np.where(considered, np.abs(P) if absolute else P, -np.inf).ravel()
    k = min(k, int(np.count_nonzero(considered)))
    if k == 0:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    # Those as large as the k-th largest, in the order of (i, j), which a stable sort keeps.
    least = np.partition(size, len(size) - k)[len(size) - k]
    candidates = np.flatnonzero(size >= least)
    order = np.argsort(-size[candidates], kind="stable")[:k]
    rows, columns = np.divmod(candidates[order], len(P))
    return rows, columns


class PairRows(Sequence[dict[str, Any]]):
    """The records of pairs, each made when it is asked for: there may be more than memory holds."""

    def __init__(
        self,
        pm: FactMatrices,
        P: NDArray[np.float64],
        layer_of: NDArray[np.int64],
        entries: tuple[NDArray[np.intp], NDArray[np.intp]],
    ) -> None:
        self._pm = pm
        self._i, self._j = entries
        self._p, self._layer = P[entries], layer_of[entries]

    def __len__(self) -> int:
        return len(self._i)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        pair = Pair(int(self._i[place]), int(self._j[place]), float(self._p[place]))
        return pair_record(self._pm, int(self._layer[place]), place + 1, pair)


def pair_rows(
    pm: FactMatrices, layer: int, k: int, absolute: bool = False, distinct_token: bool = False
) -> PairRows:
    """`top_pairs` of one layer as flat records with both facts, rank 1 first.

    `prompt_i` and `prompt_j` are the facts' templates, with `{}` where the subject goes.
    `same_last_token` says that both keys were taken at the same token; with `distinct_token`
    such pairs are left out.
    """
    return strongest_rows(pm, (layer,), k, absolute, distinct_token)


def strongest_rows(
    pm: FactMatrices,
    layers: Sequence[int],
    k: int,
    absolute: bool = False,
    distinct_token: bool = False,
) -> PairRows:
    """The records of `pair_rows` over several layers, each pair once, where it is strongest.

    That is the layer of `layers` where its P, or |P|, is largest, the first of equals.
    """
    P, layer_of = _strongest(pm, layers, absolute)
    among = different_last_token(pm.token_id) if distinct_token else None
    return PairRows(pm, P, layer_of, _top_entries(P, k, absolute, among))


def pair_record(pm: FactMatrices, layer: int, rank: int, pair: Pair) -> dict[str, Any]:
    """A pair of one layer as a flat record with both facts."""
    return {
        "model": pm.model,
        "layer": layer,
        "rank": rank,
        "p": pair.p,
        "i": pair.i,
        "j": pair.j,
        **pair_facts(pm.facts, pair.i, pair.j),
        "same_last_token": bool(pm.token_id[pair.i] == pm.token_id[pair.j]),
    }


def _strongest(
    pm: FactMatrices, layers: Sequence[int], absolute: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Entry by entry the largest P, or the P of largest size, and the layer that it is from."""
    best = np.array(pm.matrix("P", layers[0]))
    layer_of = np.full(best.shape, layers[0], dtype=np.int64)
    for layer in layers[1:]:
        P = pm.matrix("P", layer)
        larger = np.abs(P) > np.abs(best) if absolute else best < P
        best[larger] = P[larger]
        layer_of[larger] = layer
    return best, layer_of


def pair_facts(facts: Sequence[Fact], i: int, j: int) -> dict[str, str]:
    """Subject, prompt (with `{}` where the subject goes) and target of facts `i` and `j`."""
    return {
        f"{name}_{which}": getattr(facts[at], name)
        for which, at in (("i", i), ("j", j))
        for name in ("subject", "prompt", "target")
    }
