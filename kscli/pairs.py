"""The pairs of facts that are bound most tightly: the largest off-diagonal entries of P."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kscli.errors import UsageError
from kscli.statistics import Matrices

if TYPE_CHECKING:
    from kscli.facts import Fact


class Pair(NamedTuple):
    """An ordered pair: what editing fact `i` does to fact `j`, p = P[i, j]."""

    i: int
    j: int
    p: float


class FactMatrices(Matrices, Protocol):
    """P with the facts it was measured on: a pmatrix file that is open, or a stand-in."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The m facts, in the order of P's rows."""

    @property
    def token_id(self) -> NDArray[np.int64]:
        """(m,) the token at which each fact's key was taken."""


def top_pairs(P: NDArray[np.float64], k: int, absolute: bool = False) -> list[Pair]:
    """The `k` ordered pairs i != j of largest P (m, m), or largest |P|, in descending order.

    Equal values come in the order of (i, j). Fewer than `k` pairs give all m(m-1) of them.
    Raises UsageError where `k` is below 1.
    """
    if k < 1:
        raise UsageError(f"{k} pairs were asked for; ask for at least 1.")
    rows, columns = np.nonzero(~np.eye(P.shape[0], dtype=bool))
    p = P[rows, columns]
    # A stable sort of entries that lie in the order of (i, j) leaves ties in that order.
    order = np.argsort(-np.abs(p) if absolute else -p, kind="stable")[:k]
    return [Pair(int(rows[at]), int(columns[at]), float(p[at])) for at in order]


def pair_rows(pm: FactMatrices, layer: int, k: int, absolute: bool = False) -> list[dict[str, Any]]:
    """`top_pairs` of one layer as flat records with both facts, rank 1 first.

    `prompt_i` and `prompt_j` are the facts' templates, with `{}` where the subject goes.
    `same_last_token` says that both keys were taken at the same token.
    """
    return [
        {
            "model": pm.model,
            "layer": layer,
            "rank": rank,
            "p": pair.p,
            "i": pair.i,
            "j": pair.j,
            **_fact_fields(pm.facts[pair.i], "i"),
            **_fact_fields(pm.facts[pair.j], "j"),
            "same_last_token": bool(pm.token_id[pair.i] == pm.token_id[pair.j]),
        }
        for rank, pair in enumerate(top_pairs(pm.matrix("P", layer), k, absolute), start=1)
    ]


def _fact_fields(fact: Fact, which: str) -> dict[str, str]:
    return {
        f"subject_{which}": fact.subject,
        f"prompt_{which}": fact.prompt,
        f"target_{which}": fact.target,
    }
