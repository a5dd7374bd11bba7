from __future__ import annotations

import random

import pytest
import torch

from kscli.batching import MOST_PADDING, TokenSequence, limit_tokens, make_batches


def sequences(lengths: list[int]) -> list[TokenSequence]:
    return [TokenSequence(i, tuple(range(1, n + 1))) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_batch_within_budget_and_padding(seed: int) -> None:
    generator = random.Random(seed)
    stream = sequences(
        [generator.choice([1, 7, 50, 64]) + generator.randrange(30) for _ in range(700)]
    )
    batches = list(make_batches(iter(stream), budget=256))
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
    first, second = (list(make_batches(iter(stream), budget=200)) for _ in range(2))
    assert [b.sequences for b in first] == [b.sequences for b in second]


def test_empty_sequences_are_left_out_and_a_long_one_stands_alone() -> None:
    batches = list(make_batches(iter(sequences([0, 500, 0, 3, 3])), budget=100))
    assert [[len(s.token_ids) for s in b.sequences] for b in batches] == [[500], [3, 3]]
    assert list(make_batches(iter(sequences([0, 0])), budget=100)) == []
    assert list(make_batches(iter([]), budget=100)) == []


def test_rows_are_the_tokens_that_are_not_padding() -> None:
    (batch,) = make_batches(iter(sequences([99, 100])), budget=1000)
    assert batch.input_ids.shape == (2, 100)
    hidden = torch.arange(200.0).reshape(2, 100, 1).repeat(1, 1, 4)
    assert batch.rows(hidden)[:, 0].tolist() == [float(i) for i in range(200) if i != 199]


@pytest.mark.parametrize("limit", [1, 9, 10, 11, 25, 1000])
def test_a_token_limit_is_met_exactly(limit: int) -> None:
    kept = list(limit_tokens(iter(sequences([10, 0, 10, 10])), limit))
    assert sum(len(sequence.token_ids) for sequence in kept) == min(limit, 30)
    assert all(s.token_ids == tuple(range(1, len(s.token_ids) + 1)) for s in kept)
