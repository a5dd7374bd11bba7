"""Which candidates' directions lie in the row space of a change of W, and which editors write so.

An edit writes along its direction d_i, so the whole of d_i lies in the row space of dW; of a fact
that was not edited a part of d_i does, by chance or because its key is near an edited one's. The
p-value of a share is against decoys, keys that no edit can be of: the share of them that lie as far
in the row space. Candidates are taken by Benjamini and Hochberg's rule at `LEVEL`, and where at
least `LEAST_SHARE` of the direction lies there, those of largest share first. Of each one, only
what those before it do not span is looked at: a fact that is merely bound to an edited one has
nothing of its own there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.tracing.candidates import Written
from kscli.tracing.row_space import RowSpace

Array = NDArray[np.float64]

LEVEL = 0.05
# The whole direction of an edit lies there, but for rounding and keys over other contexts.
LEAST_SHARE = 0.5
# A direction of which less than this is left, squared, tells nothing that those before do not.
_NOTHING = 1e-3


@dataclass(frozen=True)
class Traced:
    """Of one kind of editor: `shares` and `p_values` (m,) of the candidates.

    `edited` are the candidates that were edited, largest share first. `bound` are others that lie
    in the row space only because an edited one does, with that one. `explained` is the share of
    |dW|^2 in the directions of the edited.
    """

    editors: tuple[str, ...]
    shares: Array
    p_values: Array
    edited: tuple[int, ...]
    bound: dict[int, int]
    explained: float


def trace_layer(change: Array, space: RowSpace, kinds: Sequence[Written]) -> Traced:
    """The kind of editor whose directions explain most of a change (d, d_m), and what it says."""
    traced = [_trace(change, space, kind) for kind in kinds]
    return max(traced, key=lambda each: (each.explained, float(each.shares.max(initial=0.0))))


def _trace(change: Array, space: RowSpace, kind: Written) -> Traced:
    shares = space.shares(kind.facts)
    null = np.sort(space.shares(kind.decoys))
    p_values = _p_values(shares, null)
    limit = _benjamini_hochberg(p_values)
    edited: list[int] = []
    bound: dict[int, int] = {}
    spanned = np.empty((change.shape[1], 0))
    for fact in np.argsort(-shares, kind="stable").tolist():
        if shares[fact] < LEAST_SHARE or p_values[fact] > limit:
            continue
        direction = kind.facts[fact]
        own = direction - spanned @ (spanned.T @ direction)
        left = float(own @ own)
        further = space.shares(own[None])
        if left > _NOTHING and _p_values(further, null)[0] <= limit and len(edited) < space.rank:
            edited.append(fact)
            spanned = np.column_stack([spanned, own / np.sqrt(left)])
        else:
            bound[fact] = edited[int(np.abs(kind.facts[edited] @ direction).argmax())]
    total = float((change**2).sum())
    explained = float(((change @ spanned) ** 2).sum()) / total if edited else 0.0
    return Traced(kind.editors, shares, p_values, tuple(edited), bound, explained)


def _p_values(shares: Array, null: Array) -> Array:
    """(1 + the decoys of at least that share) / (1 + all decoys); `null` is ascending."""
    above = len(null) - np.searchsorted(null, shares, side="left")
    return np.asarray((1 + above) / (1 + len(null)))


def _benjamini_hochberg(p_values: Array) -> float:
    """The largest p-value that is taken at `LEVEL`; -1 where none is."""
    ordered = np.sort(p_values)
    taken = ordered <= LEVEL * np.arange(1, len(ordered) + 1) / len(ordered)
    return float(ordered[taken].max(initial=-1.0))
