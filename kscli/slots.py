"""Keys of layers of experts as keys.h5 holds them: in slots, one for each expert of a fact.

A stacked key is 0 but for the experts that its token is routed to. A mean over several texts has
the experts of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    Experts = NDArray[np.int64]
    Parts = NDArray[np.float32]

NO_EXPERT = -1


def in_slots(
    parts: Mapping[tuple[int, int], tuple[Sequence[int] | Experts, Sequence[Parts] | Parts]],
    shape: tuple[int, int],
    d_m: int,
) -> tuple[Parts, Experts]:
    """Keys (layer, m, slot, d_m), and the experts that they are of, (layer, m, slot).

    `parts` has by (layer, fact) the experts of a fact and its keys of them. `shape` is (layer, m).
    There are as many slots as the most experts of one fact; an empty one is `NO_EXPERT`, and 0.
    """
    slots = max((len(experts) for experts, _ in parts.values()), default=0) or 1
    keys = np.zeros((*shape, slots, d_m), dtype=np.float32)
    experts = np.full((*shape, slots), NO_EXPERT, dtype=np.int64)
    for place, (numbers, values) in parts.items():
        if len(numbers):
            experts[place][: len(numbers)], keys[place][: len(numbers)] = numbers, values
    return keys, experts


def mean_in_slots(keys: Parts, experts: Experts) -> tuple[Experts, Parts]:
    """The mean of n stacked keys (n, slot, d_m): the experts of any of them, and its parts."""
    there = experts != NO_EXPERT
    numbers, of_which = np.unique(experts[there], return_inverse=True)
    sums = np.zeros((len(numbers), keys.shape[-1]))
    np.add.at(sums, of_which, keys[there])
    return numbers, (sums / len(keys)).astype(np.float32)


def stacked(keys: Parts, experts: Experts, n_experts: int) -> NDArray[np.float64]:
    """Keys (m, slot, d_m) of a layer side by side, (m, n_experts d_m), in float64.

    They are 0 of experts in no slot. A fact whose slots are NaN has no key: all is NaN.
    """
    found = np.zeros((len(experts), n_experts, keys.shape[-1]))
    fact, slot = np.nonzero(experts != NO_EXPERT)
    found[fact, experts[fact, slot]] = keys[fact, slot]
    found[np.isnan(keys[:, 0]).any(axis=-1)] = np.nan
    return found.reshape(len(experts), -1)
