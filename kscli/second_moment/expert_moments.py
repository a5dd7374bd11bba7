"""The second moments of a layer of experts: C_e = (1/N) sum (g_e k_e)(g_e k_e)^T of every expert e.

N counts all tokens, those that are not routed to e included, so that it is one number for the whole
layer: C of the stacked key, block by block. Shared experts are one more block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.errors import ModelError, is_out_of_memory
from kscli.models.down_projections import Projection
from kscli.models.experts import ExpertLayer, RoutedKeys
from kscli.second_moment.moments import SecondMoment


class ExpertMoments:
    """Sums over the keys of all experts of one layer; `SecondMoment` for each, by its `options`.

    `count` are all tokens, `routed` (E,) those routed to each expert.
    """

    def __init__(self, layer: ExpertLayer, **options: Any) -> None:
        self.count = 0
        self.routed = np.zeros(layer.n_experts, dtype=np.int64)
        self._blocks = [SecondMoment(layer.d_m, **options) for _ in range(layer.n_experts)]
        self._shared = SecondMoment(layer.d_shared, **options) if layer.d_shared else None

    def add(self, keys: RoutedKeys, tokens: int) -> Tensor:
        """Add the keys of so many tokens; returns whether all products are finite, 0-d bool.

        Raises ModelError when memory is used up after some experts' keys were added: they cannot be
        taken back.
        """
        finite = torch.ones((), dtype=torch.bool, device=keys.keys.device)
        gated, added = keys.gated, False
        try:
            if self._shared is not None and keys.shared is not None:
                finite &= self._shared.add(keys.shared)
                added = True
            for expert, rows in keys.by_expert():
                finite &= self._blocks[expert].add(gated[rows])
                self.routed[expert] += rows.stop - rows.start
                added = True
        except (RuntimeError, MemoryError) as error:
            if added and is_out_of_memory(error):
                raise ModelError(
                    "a batch's products do not fit in memory, with some experts' summed already; "
                    "use a smaller --batch-tokens."
                ) from error
            raise
        self.count += tokens
        return finite

    def lower_sums(self, expert: int, device: str) -> Tensor:
        """One expert's sums, as `SecondMoment` gives them."""
        return self._blocks[expert].lower_sums(device)

    def flush(self) -> None:
        """Bring everything that was added into the float64 sums."""
        for moment in self._moments:
            moment.flush()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What cov.h5 holds of the layer, by the names of its datasets."""
        found: dict[str, NDArray[Any]] = {
            "second_moment": np.stack([block.matrix(self.count) for block in self._blocks]),
            "routed": self.routed,
        }
        if self._shared:
            found["shared_second_moment"] = self._shared.matrix(self.count)
        return found

    def packed(self) -> NDArray[np.float64]:
        """All sums and `routed`, one after the other."""
        return np.concatenate([self.routed, *(moment.packed() for moment in self._moments)])

    def restore(self, packed: NDArray[np.float64], count: int) -> None:
        """Take the sums over `count` tokens that `packed` gave, in place of what is held."""
        self.count = count
        start = len(self.routed)
        self.routed[:] = packed[:start]
        for moment in self._moments:
            end = start + moment.d_m * (moment.d_m + 1) // 2
            moment.restore(packed[start:end], count)
            start = end

    @property
    def _moments(self) -> list[SecondMoment]:
        return [*self._blocks, *([self._shared] if self._shared else [])]


Moment = SecondMoment | ExpertMoments


def new_moment(projection: Projection, **options: Any) -> Moment:
    """Sums over the keys of a layer, whether it is dense or of experts."""
    if isinstance(projection, ExpertLayer):
        return ExpertMoments(projection, **options)
    return SecondMoment(projection.d_m, **options)
