"""How settled p of experts is, against the definition in float64, expert by expert."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import naive
import numpy as np
import pytest
import torch
from cli_kit import kscli
from experts_kit import save_experts
from numpy.typing import NDArray

from kscli.models.experts import RoutedKeys
from kscli.second_moment.expert_moments import ExpertMoments
from kscli.second_moment.expert_settling import ExpertSettling
from kscli.second_moment.settling import FIRST, KEYS

Array = NDArray[np.float64]
D_M, EXPERTS, LAYER = 16, 4, 5
START = FIRST * 2 * KEYS
BATCH = 64


class Stream:
    """Tokens that go to one of some experts each, with `shares`; the keys of each expert differ."""

    def __init__(self, tokens: int, shares: list[float], seed: int = 0) -> None:
        drawn = np.random.default_rng(seed)
        self.expert = drawn.choice(EXPERTS, size=tokens, p=shares)
        mixing = drawn.standard_normal((EXPERTS, D_M, D_M)) * np.logspace(-1, 1, D_M)
        white = drawn.standard_normal((tokens, D_M))
        self.keys = np.einsum("tab,tb->ta", mixing[self.expert], white).astype(np.float32)
        self.gates = drawn.uniform(0.1, 1, tokens).astype(np.float32)

    def batch(self, start: int) -> RoutedKeys:
        expert = self.expert[start : start + BATCH]
        order = np.argsort(expert, kind="stable")
        parts = (order, expert[order], self.gates[start + order], self.keys[start + order])
        return RoutedKeys(EXPERTS, *map(torch.from_numpy, parts))

    def gated(self, expert: int, tokens: int) -> Array:
        """g k of the tokens that went to an expert, of the first so many."""
        there = np.flatnonzero(self.expert[:tokens] == expert)
        return (self.gates[there, None] * self.keys[there]).astype(np.float64)


def run(stream: Stream, stop_at: int | None = None) -> ExpertSettling:
    """Feed the stream, evaluating when that is due; at `stop_at` it is saved and restored."""
    shape: Any = SimpleNamespace(n_experts=EXPERTS, d_m=D_M, d_shared=0)
    moments = ExpertMoments(shape)
    settling = ExpertSettling((LAYER,), D_M, EXPERTS)
    for start in range(0, len(stream.keys), BATCH):
        keys = stream.batch(start)
        moments.add(keys, BATCH)
        settling.offer(LAYER, keys, moments.routed)
        tokens = start + BATCH
        if tokens >= settling.next_at:
            settling.evaluate(tokens, lambda _: moments, lambda _: "cpu")
        if tokens == stop_at:
            settling = ExpertSettling.restore(settling.state())
    return settling


def of_definition(stream: Stream, expert: int, before: int, now: int) -> float:
    """The rms change of p of an expert's sampled keys, their own products left out of C."""
    sampled = (np.arange(KEYS) * START + START // 2) // KEYS
    P, counts = [], []
    for tokens in (before, now):
        keys = stream.gated(expert, tokens)
        others = np.delete(keys, sampled, axis=0)
        P.append(naive.superposition(others.T @ others, keys[sampled]))
        counts.append(len(keys))
    change = (P[1] - P[0])[~np.eye(KEYS, dtype=bool)]
    return float(np.sqrt((change**2).mean() * counts[0] / (counts[1] - counts[0])))


def test_the_estimate_is_that_of_the_worst_expert() -> None:
    stream = Stream(32 * START, [0.4, 0.3, 0.2, 0.1])
    settling = run(stream)
    assert [settled.tokens for settled in settling.history] == [16 * START, 32 * START]
    errors = [of_definition(stream, expert, 16 * START, 32 * START) for expert in range(EXPERTS)]
    assert settling.history[-1].by_layer == pytest.approx((max(errors),), rel=1e-3)
    # The least-used one is the worst.
    assert max(errors) == errors[3]


@pytest.mark.parametrize("stop_at", [BATCH * 3, START * 8, START * 20])
def test_gone_on_with_it_gives_the_same(stop_at: int) -> None:
    stream = Stream(32 * START, [0.4, 0.3, 0.2, 0.1])
    assert run(stream, stop_at).history == run(stream).history


def test_an_expert_that_no_token_reached_does_not_count() -> None:
    settling = run(Stream(8 * START, [0.5, 0.3, 0.0, 0.2]))
    assert len(settling.history) >= 1
    assert np.isfinite(settling.history[-1].rms)


def test_while_an_expert_has_seen_little_nothing_is_told() -> None:
    stream = Stream(16 * START, [0.4, 0.4, 0.19, 0.01])
    assert 0 < (stream.expert == 3).sum() < START / 2
    assert run(stream).history == []


def test_a_run_ends_when_its_worst_expert_is_settled(tmp_path: Path) -> None:
    save_experts("deepseek-v3", tmp_path / "moe")

    def measured(*options: str) -> Any:
        done = kscli(
            *("cache-cov", "-m", tmp_path / "moe", "--corpus", "tiny", "--samples", "all"),
            *("--dir", tmp_path / "artifacts", "--force", "--dtype", "float32", *options),
        )
        assert done.exit_code == 0, done.stderr
        with h5py.File(tmp_path / "artifacts" / "moe" / "cov.h5") as file:
            return done.stderr, int(file["count"][()]), file.get("settling/rms", np.zeros(0))[()]

    said, tokens, rms = measured("--until-settled", "0.08")
    assert "(rms) in the worst experts" in said
    assert np.sqrt((rms[-1] ** 2).mean()) <= 0.08
    assert rms.shape[1] == 2
    said, whole, none = measured()
    assert tokens < whole
    assert "settled" not in said
    assert none.size == 0
