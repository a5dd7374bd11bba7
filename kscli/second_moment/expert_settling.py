"""How settled p is in layers of experts: each expert has its own estimate, and the worst counts.

An expert is watched like a dense layer (`settling`), by the tokens that are routed to it alone. So
the least-used experts decide, and while one that any token reached has no estimate, there is none.
Shared experts see every token, and are not watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kscli.models.experts import RoutedKeys
from kscli.second_moment.expert_moments import ExpertMoments
from kscli.second_moment.settling import Settled, Settling

# The part of a doubling of its own tokens at which an expert is looked at again: when all tokens
# have doubled, those of one expert seldom have exactly.
NEARLY = 0.75
_OF_EACH = ("keys", "tokens", "next_at", "p")


class ExpertSettling:
    """Follows p in `n_experts` experts of some layers, as `Settling` does in dense layers.

    In `history` every layer has the estimate of its worst expert.
    """

    def __init__(self, layers: tuple[int, ...], d_m: int, n_experts: int) -> None:
        self.layers = layers
        self.history: list[Settled] = []
        self.next_at = Settling((), d_m).next_at
        self._experts = [[Settling((expert,), d_m) for expert in range(n_experts)] for _ in layers]

    def offer(self, layer: int, keys: RoutedKeys, routed: NDArray[np.int64]) -> None:
        """Sample from the keys of a batch in a watched layer, which are in `routed` (E,) already.

        `routed` are the tokens that each expert has had so far.
        """
        experts = self._experts[self.layers.index(layer)]
        gated = keys.gated
        for expert, rows in keys.by_expert():
            stop = int(routed[expert])
            start = stop - (rows.stop - rows.start)
            wanted = experts[expert].wants(start, stop)
            if wanted:
                experts[expert].offer(expert, start, gated[rows][wanted].cpu().numpy())

    def evaluate(
        self, tokens: int, moments: Callable[[int], ExpertMoments], device_of: Callable[[int], str]
    ) -> Settled | None:
        """The error that is left at `tokens` tokens, or None while it cannot be told.

        `moments(layer)` are the sums over these tokens.
        """
        self.next_at = 2 * tokens
        by_layer = [
            _worst(experts, moments(layer), device_of(layer))
            for layer, experts in zip(self.layers, self._experts, strict=True)
        ]
        if not all(map(math.isfinite, by_layer)):
            return None
        self.history.append(Settled(tokens, tuple(by_layer)))
        return self.history[-1]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything that `restore` needs, as arrays."""
        each = [settling for experts in self._experts for settling in experts]
        states = [settling.state() for settling in each]
        last = [settling.history[-1].rms if settling.history else np.nan for settling in each]
        by_layer = [settled.by_layer for settled in self.history]
        return {
            "layers": np.array(self.layers, dtype=np.int64),
            "next": np.array(self.next_at),
            **{f"each_{name}": np.stack([state[name] for state in states]) for name in _OF_EACH},
            "each_last": np.array(last),
            "history_tokens": np.array([s.tokens for s in self.history], dtype=np.int64),
            "history": np.array(by_layer, dtype=np.float64).reshape(-1, len(self.layers)),
        }

    @classmethod
    def restore(cls, state: dict[str, NDArray[np.generic]]) -> ExpertSettling:
        """One that goes on exactly as the one that gave `state`."""
        layers: tuple[int, ...] = tuple(state["layers"].tolist())
        last = state["each_last"].reshape(len(layers), -1)
        settling = cls(layers, state["each_keys"].shape[-1], last.shape[1])
        settling.next_at = int(state["next"])
        rows = zip(state["history_tokens"].tolist(), state["history"].tolist(), strict=True)
        settling.history = [Settled(tokens, tuple(by_layer)) for tokens, by_layer in rows]
        for number, rms in np.ndenumerate(last):
            at = int(np.ravel_multi_index(number, last.shape))
            there = np.isfinite(rms)
            settling._experts[number[0]][number[1]] = Settling.restore(
                {name: state[f"each_{name}"][at] for name in _OF_EACH}
                | {
                    "layers": np.array(number[1:], dtype=np.int64),
                    "history_tokens": np.zeros(int(there), dtype=np.int64),
                    "history": np.full((int(there), 1), rms),
                }
            )
        return settling


def _worst(experts: list[Settling], moments: ExpertMoments, device: str) -> float:
    """The largest error that is left in one of a layer's experts; infinite while one has none."""
    worst = 0.0
    for settling, count in zip(experts, moments.routed.tolist(), strict=True):
        if count >= NEARLY * settling.next_at:
            settling.evaluate(count, lambda expert: moments.lower_sums(expert, device))
        if count:
            worst = max(worst, settling.history[-1].rms if settling.history else math.inf)
    return worst
