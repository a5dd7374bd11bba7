"""What the statistics, the pairs and the figures read: matrices over facts, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import MatrixName


class Matrices(Hashable, Protocol):
    """What the statistics and figures read: a pmatrix file that is open, or a stand-in."""

    @property
    def model(self) -> str:
        """The model's display name."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are there, ascending."""

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        """One layer's (m, m) matrix."""


class TokenMatrices(Matrices, Protocol):
    """Matrices with the token of every fact."""

    @property
    def token_id(self) -> NDArray[np.int64]:
        """(m,) the token at which each fact's key was taken."""


def different_last_token(token_id: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs of facts (m, m) have different last tokens, by the ids (m,) of these tokens.

    Two keys at one token are alike whatever the facts say: where attention and MLP run in
    parallel, layer 0's MLP sees that token's embedding alone and p is 1.
    """
    return np.asarray(token_id[:, None] != token_id)


def common_experts(experts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many experts both facts of a pair are routed to, (m, m), of `experts` (m, slot)."""
    routed = np.zeros((len(experts), int(experts.max(initial=0)) + 1), dtype=np.int64)
    fact, slot = np.nonzero(experts >= 0)
    routed[fact, experts[fact, slot]] = 1
    common: NDArray[np.int64] = routed @ routed.T
    return common
