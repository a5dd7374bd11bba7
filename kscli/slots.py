"""Keys of layers of experts as keys.h5 holds them: in slots, one for each expert of a fact.

A stacked key is 0 but for the experts that its token is routed to. A mean over several texts has
the experts of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    Experts = NDArray[np.int64]
    Parts = NDArray[np.float32]

NO_EXPERT = -1
# The datasets of a fact's key, and of its means over contexts and paraphrases: of layers of experts
# the key is in three.
_WHAT = ("keys", "experts", "shared_keys")
KEY_NAMES: dict[str, dict[str, str]] = {
    "bare": dict(zip(_WHAT, _WHAT, strict=True)),
    "context": dict(
        zip(_WHAT, ("context_keys", "context_experts", "shared_context_keys"), strict=True)
    ),
    "paraphrase": dict(
        zip(_WHAT, ("paraphrase_keys", "paraphrase_experts", "shared_paraphrase_keys"), strict=True)
    ),
}


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


def side_by_side(
    keys: Parts, experts: Experts | None, shared: Parts | None, n_experts: int
) -> NDArray[np.float64]:
    """Keys (m, slot, d_m) of one layer as stacked ones, (m, width), in float64.

    They are 0 of experts in no slot; those of shared experts, (m, d_shared), are last. A fact whose
    slots are NaN has no key: all is NaN. Without `experts` keys (m, d_m) are what they are.
    """
    if experts is None:
        return keys.astype(np.float64)
    found = np.zeros((len(experts), n_experts, keys.shape[-1]))
    fact, slot = np.nonzero(experts != NO_EXPERT)
    found[fact, experts[fact, slot]] = keys[fact, slot]
    found[np.isnan(keys[:, 0]).any(axis=-1)] = np.nan
    flat = found.reshape(len(experts), -1)
    return flat if shared is None else np.concatenate([flat, shared], axis=1)


def stacked(
    part: Callable[[str], NDArray[Any] | None], which: str, n_experts: int
) -> NDArray[np.float64]:
    """The keys of one layer that are `which` of `KEY_NAMES`, (m, width), as `side_by_side` does.

    `part` gives what is called so at that layer, None where there is no such thing.
    """
    keys, experts, shared = map(part, KEY_NAMES[which].values())
    assert keys is not None
    return side_by_side(keys, experts, shared, n_experts)
