from __future__ import annotations

import random

import pytest
import torch

from kscli.batching import MOST_PADDING, TokenSequence, make_batches


def sequences(lengths: list[int]) -> list[TokenSequence]:
    return [TokenSequence(i, tuple(range(1, n + 1))) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_batch_within_budget_and_padding(seed: int) -> None:
    generator = random.Random(seed)
    stream = sequences(
        [generator.choice([1, 7, 50, 64]) + generator.randrange(30) for _ in range(700)]
    )
    batches = make_batches(iter(stream), budget=256)
    seen = sorted(sequence.index for batch in batches for sequence in batch.sequences)
    assert seen == list(range(700))
    assert all(batch.input_ids.numel() <= 256 for batch in batches)
    padded = sum(batch.input_ids.numel() for batch in batches)
    real = sum(batch.tokens for batch in batches)
    assert real == sum(len(sequence.token_ids) for sequence in stream)
    assert padded - real <= MOST_PADDING * padded


def test_batches_are_a_pure_function_of_the_stream() -> None:
    generator = random.Random(9)
    stream = sequences([generator.randrange(0, 90) for _ in range(300)])
    first, second = ((make_batches(iter(stream), budget=200)) for _ in range(2))
    assert [b.sequences for b in first] == [b.sequences for b in second]


def test_empty_sequences_are_left_out_and_a_long_one_stands_alone() -> None:
    batches = make_batches(iter(sequences([0, 500, 0, 3, 3])), budget=100)
    assert [[len(s.token_ids) for s in b.sequences] for b in batches] == [[500], [3, 3]]
    assert (make_batches(iter(sequences([0, 0])), budget=100)) == []
    assert (make_batches(iter([]), budget=100)) == []


def test_padding_is_set_to_nothing_and_the_rest_is_told() -> None:
    (batch,) = make_batches(iter(sequences([99, 100])), budget=1000)
    assert batch.input_ids.shape == (2, 100)
    assert (batch.tokens, batch.padded) == (199, 200)
    hidden = torch.arange(1.0, 201.0).reshape(2, 100, 1).repeat(1, 1, 4)
    flat = batch.without_padding(hidden)
    assert flat[:, 0].tolist() == [0.0 if i == 199 else i + 1.0 for i in range(200)]
    assert batch.real_rows.tolist() == [i for i in range(200) if i != 199]


def test_halves_hold_what_the_batch_holds() -> None:
    (batch,) = make_batches(iter(sequences([99, 100, 98])), budget=1000)
    first, second = batch.halves()
    assert first.sequences + second.sequences == batch.sequences
    assert (first.padded, second.padded) == (100, 198)


def test_few_sequences_of_all_lengths_make_large_batches_where_padding_allows() -> None:
    """Lengths as an encyclopedia's: padding stays under the limit, and batches near the budget."""
    generator = random.Random(3)
    lengths = [min(2048, 8 + int(generator.lognormvariate(5.9, 1.1))) for _ in range(2000)]
    batches = make_batches(iter(sequences(lengths)), budget=16384)
    padded = sum(batch.padded for batch in batches)
    assert 1 - sum(lengths) / padded <= MOST_PADDING
    assert sum(lengths) / len(batches) > 0.8 * 16384
