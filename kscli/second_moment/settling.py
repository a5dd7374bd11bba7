"""How settled C is while it is measured: by how much p changes as the tokens double.

C of N tokens is the mean of two halves, (A + B)/2, and C of the first half is A. They differ by
(A - B)/2, which has the variance of (A + B)/2 about the true C: the rms change of p from N/2 to
N tokens estimates the rms error of p that is left at N. (Two disjoint samples of N tokens differ
by sqrt(2) of that error.) In general, from M to N tokens, the change is multiplied by
sqrt(M / (N - M)), which is 1 at a doubling.

p is not linear in C, and with few tokens this shows. For Gaussian keys p is a regression
coefficient, its variance goes as 1/(N - d_m), and the estimate is 1/sqrt(1 - d_m/M) times the
error: 1.41 at N = 4 d_m, 1.12 at 10 d_m, 1.03 at 40 d_m. It errs on the side of more text. So it
does, by more, where the error falls faster than 1/sqrt(N), as in a first layer, whose keys are
almost functions of their tokens. It errs the other way, by less, where keys are most like those
of their own document, which C holds.

p is taken between keys sampled from the corpus itself. C holds their own k k^T, which it does not
hold of a fact's key, so these are left out of C first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEYS = 64
FEWEST_KEYS = KEYS // 2
MOST_LAYERS = 4  # that are watched, spread over the depth
# Tokens a dimension at the first evaluation: below 1 there is no p, just above it p is noise.
FIRST = 2
# A coordinate of which the sampled keys hold all but this share is 0 without them: what is left
# of a difference of sums that were rounded to float32 is no measurement.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Settled:
    """The rms error of p that is estimated to be left at `tokens` tokens, layer by layer."""

    tokens: int
    by_layer: tuple[float, ...]

    @property
    def rms(self) -> float:
        """Over all watched layers: the root of the mean square."""
        return float(np.sqrt(np.mean(np.square(self.by_layer))))


class Settling:
    """Follows p among `KEYS` sampled keys of `layers` over a stream of tokens.

    The tokens are counted from 0 in the order in which C takes them. `wants` says which tokens'
    keys are sampled, `offer` takes these; when `next_at` tokens have been summed, `evaluate`
    compares p with what it was at the evaluation before. `history` holds every estimate so far.
    """

    def __init__(self, layers: tuple[int, ...], d_m: int) -> None:
        self.layers = layers
        self.history: list[Settled] = []
        # Where d_m is small, the sampled keys must still be a small part of the tokens.
        self.next_at = FIRST * max(d_m, 2 * KEYS)
        self._sampled = (2 * np.arange(KEYS) + 1) * self.next_at // (2 * KEYS)
        self._keys = np.zeros((len(layers), KEYS, d_m), dtype=np.float32)
        self._tokens = 0
        self._p = np.full((len(layers), KEYS, KEYS), np.nan)

    def wants(self, start: int, stop: int) -> list[int]:
        """Which of tokens `start` to `stop` (not included) are sampled, counted from `start`."""
        return [int(token) - start for token in self._sampled[self._slots(start, stop)]]

    def offer(self, layer: int, start: int, keys: NDArray[np.float32]) -> None:
        """Take the (n, d_m) keys of a watched layer that `wants(start, stop)` named, all of them.

        What is offered again replaces what was there, so a batch can be repeated.
        """
        first = self._slots(start, start).start
        self._keys[self.layers.index(layer), first : first + len(keys)] = keys

    def evaluate(self, tokens: int, sums: Callable[[int], Tensor]) -> Settled | None:
        """The error that is left at `tokens` tokens, or None while it cannot be told.

        `sums(layer)` gives the sum of k k^T over these tokens, (d_m, d_m) float64 of which the
        lower triangle is read, in a new tensor that is overwritten; one is held at a time. There is
        no estimate at the first evaluation, nor where a layer's C has no inverse, now or at the
        evaluation before, nor where over half of the sampled keys lie outside what the other tokens
        span. Raises ValueError when `tokens` is not beyond the evaluation before.
        """
        if tokens <= self._tokens:
            raise ValueError(f"{tokens} tokens are not beyond the {self._tokens} evaluated before.")
        p = np.stack(
            [
                _p_of_new_keys(sums(layer), tokens, torch.from_numpy(keys).double())
                for layer, keys in zip(self.layers, self._keys, strict=True)
            ]
        )
        to_error = math.sqrt(self._tokens / (tokens - self._tokens))
        by_layer = tuple(to_error * _rms_change(*pair) for pair in zip(self._p, p, strict=True))
        self._tokens, self._p, self.next_at = tokens, p, 2 * tokens
        if not all(map(math.isfinite, by_layer)):
            return None
        self.history.append(Settled(tokens, by_layer))
        return self.history[-1]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything that `restore` needs, as arrays."""
        by_layer = [settled.by_layer for settled in self.history]
        return {
            "layers": np.array(self.layers, dtype=np.int64),
            "keys": self._keys.copy(),
            "tokens": np.array(self._tokens),
            "next_at": np.array(self.next_at),
            "p": self._p,
            "history_tokens": np.array([s.tokens for s in self.history], dtype=np.int64),
            "history": np.array(by_layer, dtype=np.float64).reshape(-1, len(self.layers)),
        }

    @classmethod
    def restore(cls, state: dict[str, NDArray[np.generic]]) -> Settling:
        """One that goes on exactly as the one that gave `state`."""
        settling = cls(tuple(state["layers"].tolist()), state["keys"].shape[2])
        settling._keys[:] = state["keys"]
        settling._p[:] = state["p"]
        settling._tokens = int(state["tokens"])
        settling.next_at = int(state["next_at"])
        settling.history = [
            Settled(tokens, tuple(by_layer))
            for tokens, by_layer in zip(
                state["history_tokens"].tolist(), state["history"].tolist(), strict=True
            )
        ]
        return settling

    def _slots(self, start: int, stop: int) -> slice:
        """Which of the sampled keys lie at tokens `start` to `stop`."""
        first, end = np.searchsorted(self._sampled, [start, stop])
        return slice(int(first), int(end))


def _p_of_new_keys(sums: Tensor, tokens: int, keys: Tensor) -> NDArray[np.float64]:
    """P among (m, d_m) keys, their own k k^T left out of `sums`, which is overwritten.

    Of `sums` (d_m, d_m) the lower triangle is read. A key without p, because it is 0 or is not 0
    where all other tokens are, has NaN in its row and column; where C has no inverse, or most keys
    have no p, all is NaN.
    """
    P = np.full((len(keys), len(keys)), np.nan)
    keys = keys.to(sums.device)
    whole = sums.diagonal().clone()
    sums.addmm_(keys.T, keys, alpha=-1)
    dead = sums.diagonal() <= LEAST_SHARE * whole
    usable = (keys != 0).any(dim=1) & (keys[:, dead] == 0).all(dim=1)
    if usable.sum() < FEWEST_KEYS or tokens - len(keys) < (~dead).sum():
        return P
    scale = torch.where(dead, 0.0, sums.diagonal().rsqrt())
    sums.mul_(scale).mul_(scale[:, None])
    # A dead coordinate becomes an uncoupled 1 and takes no part, since the keys are 0 there.
    sums.diagonal().fill_(1.0)
    factor, info = _cholesky(sums)
    if info != 0:
        return P
    columns = (keys[usable] * scale).T.to(factor.device)
    whitened = torch.linalg.solve_triangular(factor, columns, upper=False)
    G = (whitened.T @ whitened).cpu().numpy()
    there = usable.cpu().numpy()
    P[np.ix_(there, there)] = G / np.diagonal(G)[:, None]
    return P


def _cholesky(C: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, on the host where C's device has no room for it, and LAPACK's info."""
    try:
        factor, info = torch.linalg.cholesky_ex(C)
    except torch.OutOfMemoryError:
        factor, info = torch.linalg.cholesky_ex(C.cpu())
    return factor, info


def _rms_change(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """The rms change off the diagonal, over the keys that have p in both; NaN for too few."""
    change = after - before
    known = np.isfinite(np.diagonal(change))
    if known.sum() < FEWEST_KEYS:
        return float("nan")
    off_diagonal = np.outer(known, known) & ~np.eye(len(change), dtype=bool)
    return float(np.sqrt(np.mean(np.square(change[off_diagonal]))))
