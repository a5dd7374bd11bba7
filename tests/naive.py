"""The definitions, computed the slow and obvious way in float64: the oracle of many tests.

Nothing here uses kscli: its own hooks by dotted name, one document at a time, an explicit
solve a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def keys_of_text(model: Any, token_ids: Sequence[int], hooks: Sequence[str]) -> dict[str, Array]:
    """The inputs of the modules named `hooks` for one sequence, (tokens, d_m) each."""
    found: dict[str, Array] = {}
    handles = []
    modules = dict(model.named_modules())
    for name in hooks:

        def hook(_: Any, inputs: Any, name: str = name) -> None:
            found[name] = inputs[0].detach().reshape(len(token_ids), -1).double().numpy()

        handles.append(modules[name].register_forward_pre_hook(hook))
    with torch.no_grad():
        model(torch.tensor([list(token_ids)]))
    for handle in handles:
        handle.remove()
    return found


def second_moments(
    model: Any, tokenizer: Any, documents: Sequence[str], max_length: int, hooks: Sequence[str]
) -> tuple[dict[str, Array], int]:
    """C = (1/N) sum k k^T of every hook, one document at a time, and N."""
    sums: dict[str, Array] = {}
    count = 0
    for document in documents:
        token_ids = tokenizer(document)["input_ids"][:max_length]
        if not token_ids:
            continue
        count += len(token_ids)
        for name, keys in keys_of_text(model, token_ids, hooks).items():
            sums[name] = sums.get(name, 0) + keys.T @ keys  # the sum of k k^T over its tokens
    return {name: total / count for name, total in sums.items()}, count


def superposition(C: Array, keys: Array) -> Array:
    """P[i, j] = k_i^T C^-1 k_j / k_i^T C^-1 k_i, pair by pair."""
    solved = np.linalg.solve(C, keys.T).T
    P = [[own @ other / (own @ k) for other in keys] for own, k in zip(solved, keys, strict=True)]
    return np.array(P)


def subject_last(tokenizer: Any, text: str, start: int, end: int) -> tuple[list[int], int]:
    """The tokens of `text`, and the last one that overlaps characters `start` to `end`."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    overlapping = [
        index
        for index, (a, b) in enumerate(encoded["offset_mapping"])
        if any(start <= character < end for character in range(a, b))
    ]
    return encoded["input_ids"], overlapping[-1]
