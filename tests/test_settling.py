"""The live estimate of how settled C is: against the definition, the theory, and disjoint halves.

For Gaussian keys everything is known exactly. In coordinates where C is the identity, p between
two new keys is a regression coefficient, so over N tokens its error has the variance
(|k_j| / |k_i|)^2 (1 - cos^2) / (N - d), and that over M < N of the same tokens differs from it by
the difference of the two variances (Gauss and Markov).
"""

from __future__ import annotations

from collections.abc import Callable

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kscli.second_moment.settling import FIRST, KEYS, Settled, Settling

D = 64
START = FIRST * 2 * KEYS

Array = NDArray[np.float64]
Sums = Callable[[int], torch.Tensor]


class Stream:
    """Keys of some layers, (layer, tokens, d), handed to a Settling in batches."""

    def __init__(self, keys: Array) -> None:
        self.keys = keys.astype(np.float32)

    def sums(self, tokens: int) -> Sums:
        exact = self.keys[:, :tokens].astype(np.float64)
        return lambda layer: torch.from_numpy(exact[layer].T @ exact[layer])

    def feed(self, settling: Settling, start: int, stop: int) -> None:
        rows = settling.wants(start, stop)
        for layer in settling.layers:
            settling.offer(layer, start, self.keys[layer, start:stop][rows])

    def run(self, settling: Settling, start: int = 0, batch: int = 100) -> list[Settled]:
        """Every batch from `start` on, evaluating whenever it is due."""
        end = self.keys.shape[1]
        while start < end:
            stop = min(start + batch, settling.next_at, end)
            self.feed(settling, start, stop)
            if stop >= settling.next_at:
                settling.evaluate(stop, self.sums(stop))
            start = stop
        return settling.history


def new(layers: int = 1, d: int = D) -> Settling:
    return Settling(tuple(range(layers)), d)


def sampled(tokens: int = START) -> NDArray[np.int64]:
    """Evenly spaced: the middles of `KEYS` equal stretches."""
    return (np.arange(KEYS) * tokens + tokens // 2) // KEYS


def mixing(rng: np.random.Generator, d: int = D) -> Array:
    """A map that makes white keys into correlated ones, of C's condition 1e4."""
    return np.linalg.qr(rng.standard_normal((d, d)))[0] * np.logspace(-1, 1, d)


def gaussian(tokens: int, seed: int, layers: int = 1, d: int = D) -> Array:
    rng = np.random.default_rng(seed)
    return np.stack([rng.standard_normal((tokens, d)) @ mixing(rng, d).T for _ in range(layers)])


def rms_off_diagonal(matrix: Array) -> float:
    return float(np.sqrt(np.mean(matrix[~np.eye(len(matrix), dtype=bool)] ** 2)))


def fast_p(C: Array, keys: Array) -> Array:
    G = keys @ np.linalg.solve(C, keys.T)
    return G / np.diagonal(G)[:, None]


def test_an_estimate_is_its_definition_layer_by_layer() -> None:
    """The rms change of the naive p of the sampled keys, their own products left out of C."""
    stream = Stream(gaussian(2 * START, seed=1, layers=3))
    (settled,) = stream.run(new(layers=3))

    for layer in range(3):
        keys = stream.keys[layer].astype(np.float64)
        P = []
        for tokens in (START, 2 * START):
            others = np.delete(keys[:tokens], sampled(), axis=0)
            C = others.T @ others / len(others)
            P.append(naive.superposition(C, keys[sampled()]))
        expected = rms_off_diagonal(P[1] - P[0])
        assert settled.by_layer[layer] == pytest.approx(expected, rel=1e-9)
    assert settled.tokens == 2 * START
    assert settled.rms == pytest.approx(np.sqrt(np.mean(np.square(settled.by_layer))), rel=1e-12)


def test_evaluations_are_due_at_doublings() -> None:
    stream = Stream(gaussian(9 * START, seed=2))
    settling = new()
    assert settling.next_at == START
    assert [s.tokens for s in stream.run(settling)] == [2 * START, 4 * START, 8 * START]
    assert settling.next_at == 16 * START
    assert new(d=1536).next_at == FIRST * 1536


def test_a_late_evaluation_moves_the_next_one() -> None:
    stream = Stream(gaussian(3 * START, seed=2))
    settling = new()
    stream.feed(settling, 0, START)
    assert settling.evaluate(START + 30, stream.sums(START + 30)) is None
    assert settling.next_at == 2 * (START + 30)


def test_what_is_sampled_depends_neither_on_batches_nor_on_repeats() -> None:
    stream = Stream(gaussian(2 * START, seed=3))
    settling = new()
    assert settling.wants(0, 10 * START) == sampled().tolist()
    assert settling.wants(START, 10 * START) == []
    histories = []
    for batch in (1, 7, 100, START):
        settling = new()
        settling.offer(0, 0, np.full((KEYS, D), 9, dtype=np.float32))
        histories.append(stream.run(settling, batch=batch))
    assert len(histories[0]) == 1
    assert all(history == histories[0] for history in histories)


@pytest.mark.parametrize("stop", [START // 2, START, START + 50, 2 * START, 3 * START])
def test_a_restored_one_goes_on_bit_for_bit(stop: int) -> None:
    stream = Stream(gaussian(4 * START, seed=4, layers=2))
    undisturbed = stream.run(new(layers=2))

    first = new(layers=2)
    Stream(stream.keys[:, :stop]).run(first)
    state = first.state()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    # What is done to the one must not reach the other.
    first.offer(1, 0, np.full((KEYS, D), 9, dtype=np.float32))
    first.evaluate(3 * START + 1, stream.sums(3 * START + 1))

    restored = Settling.restore(state)
    assert restored.layers == (0, 1)
    assert stream.run(restored, start=stop) == undisturbed
    assert len(undisturbed) == 2


def test_the_error_that_is_left_for_gaussian_keys() -> None:
    """The estimate against the true error and against two disjoint samples of N tokens.

    Six seeds of 64 keys give each mean square to a few per cent. At a doubling to N = 2 M the
    estimate is sqrt(M / (M - KEYS - d)) of the true error, by the theory above with the sampled
    keys left out: 1.41, 1.15, 1.07.
    """
    squares = {N: np.zeros(3) for N in (2 * START, 4 * START, 8 * START)}
    for seed in range(6):
        rng = np.random.default_rng(100 + seed)
        mix = mixing(rng)
        keys = rng.standard_normal((16 * START, D)) @ mix.T
        of_sample, others = keys[sampled()], np.delete(keys, sampled(), axis=0)
        exact = fast_p(mix @ mix.T, of_sample)
        for settled in Stream(keys[None, : 8 * START]).run(new()):
            N = settled.tokens
            one, two = others[: N - KEYS], others[N - KEYS : 2 * N - 2 * KEYS]
            P_one, P_two = (fast_p(half.T @ half, of_sample) for half in (one, two))
            root_mean_squares = (
                settled.rms,
                rms_off_diagonal(P_one - exact),
                rms_off_diagonal(P_one - P_two) / np.sqrt(2),
            )
            squares[N] += np.square(root_mean_squares)
    for N, (estimate, error, halves) in squares.items():
        expected = np.sqrt(N / 2 / (N / 2 - KEYS - D))
        assert np.sqrt(estimate / error) == pytest.approx(expected, rel=0.06)
        assert np.sqrt(estimate / halves) == pytest.approx(expected, rel=0.06)
    # Twice the tokens leave 1/sqrt(2) of the error (theory, near 32 d: 0.66).
    four, eight = (squares[n * START][0] for n in (4, 8))
    assert np.sqrt(eight / four) == pytest.approx(1 / np.sqrt(2), rel=0.1)


def test_an_evaluation_between_doublings_estimates_the_error_at_its_own_tokens() -> None:
    """At the corpus's end, say; theory as above, with M = 8 d and N = 12 d or 40 d."""
    for N in (3 * START, 10 * START):
        ratios = []
        for seed in range(4):
            rng = np.random.default_rng(200 + seed)
            mix = mixing(rng)
            keys = rng.standard_normal((N, D)) @ mix.T
            stream, settling = Stream(keys[None]), new()
            stream.feed(settling, 0, N)
            settling.evaluate(2 * START, stream.sums(2 * START))
            settled = settling.evaluate(N, stream.sums(N))
            assert settled is not None
            others = np.delete(keys, sampled(), axis=0)
            P = fast_p(others.T @ others, keys[sampled()])
            error = rms_off_diagonal(P - fast_p(mix @ mix.T, keys[sampled()]))
            ratios.append((settled.rms / error) ** 2)
        expected = np.sqrt(2 * START / (2 * START - KEYS - D))
        assert np.sqrt(np.mean(ratios)) == pytest.approx(expected, rel=0.1)


def documents(rng: np.random.Generator, mix: Array, count: int, length: int = 32) -> Array:
    """Documents of `length` tokens each, a third of whose keys' variance is their document's own.

    The length of a key has Student's t's tails (5 degrees of freedom), half of it a document's.
    """
    shape = (count, length)
    shared = rng.standard_normal((count, 1, D))
    own = rng.standard_normal((*shape, D))
    scale = (5 / rng.chisquare(5, (count, 1)) * 5 / rng.chisquare(5, shape)) ** 0.25
    white = (np.sqrt(1 / 3) * shared + np.sqrt(2 / 3) * own) * scale[..., None]
    return white.reshape(-1, D) @ mix.T


def test_the_error_that_is_left_for_documents_with_heavy_tails() -> None:
    """Within a factor of 1.5 of the true error of keys of documents that C never saw.

    The tokens of a document count for less than as many fresh ones, so the error is larger than
    a Gaussian's of N tokens; the estimate must see this. (C is a multiple of the mixing's own.)
    """
    N = 8 * START
    estimates, errors, halves = [], [], []
    for seed in range(5):
        rng = np.random.default_rng(300 + seed)
        mix = mixing(rng)
        keys = documents(rng, mix, 2 * N // 32)
        unseen = documents(rng, mix, KEYS)[::32]
        one, two = (fast_p(half.T @ half, unseen) for half in (keys[:N], keys[N:]))
        estimates.append(Stream(keys[None, :N]).run(new())[-1].rms)
        errors.append(rms_off_diagonal(one - fast_p(mix @ mix.T, unseen)))
        halves.append(rms_off_diagonal(one - two) / np.sqrt(2))
    mean_squares = [np.mean(np.square(values)) for values in (estimates, errors, halves)]
    estimate, error, half = np.sqrt(mean_squares)
    gaussian_error = 1 / np.sqrt(N - D)
    assert error > 1.3 * gaussian_error
    assert 1 / 1.5 < estimate / error < 1.5
    assert 1 / 1.5 < estimate / half < 1.5


def test_there_is_no_estimate_until_c_has_an_inverse_twice() -> None:
    """40 different keys over and over, then new ones: p exists from the third evaluation on."""
    keys = gaussian(8 * START, seed=5)
    few = 2 * START + START // 2
    keys[:, :few] = keys[:, np.arange(few) % 40]
    keys[:, : 2 * START, :3] = 0
    settling = new()
    assert [s.tokens for s in Stream(keys).run(settling)] == [8 * START]


def test_a_layer_without_an_inverse_leaves_no_estimate() -> None:
    keys = gaussian(2 * START, seed=6, layers=2)
    keys[1, :, 0] = keys[1, :, 1]
    assert Stream(keys).run(new(layers=2)) == []


def test_a_key_that_lies_outside_all_other_tokens_is_passed_over() -> None:
    """Coordinates 5 and 9 are not 0 in sampled keys only; one sampled key is 0 altogether.

    The sums are rounded to float32 as the engine's are, so what is left of those coordinates
    without the sampled keys is not exactly 0.
    """
    keys = gaussian(2 * START, seed=7)
    active = sampled()[[3, 8, 30]]
    for coordinate, places in ((5, active[:2]), (9, active[1:])):
        kept = keys[0, places, coordinate].copy()
        keys[0, :, coordinate] = 0
        keys[0, places, coordinate] = kept
    keys[0, sampled()[50]] = 0
    keys[0, :, 20] = 0
    stream, settling = Stream(keys), new()
    exact = stream.keys[0].astype(np.float64)
    stream.feed(settling, 0, 2 * START)
    for tokens in (START, 2 * START):
        rounded = (exact[:tokens].T @ exact[:tokens]).astype(np.float32)
        settled = settling.evaluate(tokens, lambda _, S=rounded: torch.from_numpy(S).double())
    assert settled is not None

    live = np.setdiff1d(np.arange(D), [5, 9, 20])
    usable = exact[np.setdiff1d(sampled(), [*active, sampled()[50]])][:, live]
    P = []
    for tokens in (START, 2 * START):
        others = np.delete(exact[:tokens], sampled(), axis=0)[:, live]
        P.append(naive.superposition(others.T @ others, usable))
    assert settled.rms == pytest.approx(rms_off_diagonal(P[1] - P[0]), rel=1e-4)


def test_where_most_sampled_keys_lie_outside_there_is_no_estimate() -> None:
    keys = gaussian(2 * START, seed=8)
    seen = keys[0, sampled()[: KEYS // 2 + 1], 5].copy()
    keys[0, :, 5] = 0
    keys[0, sampled()[: KEYS // 2 + 1], 5] = seen
    assert Stream(keys).run(new()) == []


def test_a_narrow_layer_and_one_of_several_stripes() -> None:
    """d_m of 1, and one beyond the rows that are worked on at once."""
    assert len(Stream(gaussian(2 * START, seed=9, d=1)).run(new(d=1))) == 1

    d = 600
    stream = Stream(gaussian(4 * d, seed=10, d=d))
    (settled,) = stream.run(new(d=d))
    places = sampled(2 * d)
    exact = stream.keys[0].astype(np.float64)
    P = []
    for tokens in (2 * d, 4 * d):
        others = np.delete(exact[:tokens], places, axis=0)
        P.append(fast_p(others.T @ others, exact[places]))
    assert settled.rms == pytest.approx(rms_off_diagonal(P[1] - P[0]), rel=1e-8)


def test_an_evaluation_twice_at_one_place_is_refused() -> None:
    stream, settling = Stream(gaussian(START, seed=11)), new()
    stream.run(settling)
    with pytest.raises(ValueError, match="not beyond"):
        settling.evaluate(START, stream.sums(START))
