"""Token batches: documents tokenised, bucketed by length and padded on the right.

One document is one sequence: the tokenizer's own special tokens, truncated to a
maximum length. A number of sequences at once is sorted by length, so that a batch holds
sequences of nearly one length; which of them meet in a batch is a pure function of the
sequences and the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from kscli.models.forward import beyond, pad_right

MOST_PADDING = 0.03
# What one batch may hold of padding: as much as keeps all batches together under MOST_PADDING.
BATCH_PADDING = (1.0, 0.5, 0.2, 0.1, 0.05, MOST_PADDING)
ENCODE_CHUNK = 64
# A document is tokenised only as far as it is used: first LONG_TOKEN characters a token, then
# more, until MARGIN tokens beyond the last one stand between it and the cut.
LONG_TOKEN = 32
MARGIN = 64


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of token ids and its number in the stream it comes from."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of one batch: `input_ids` (batch, length), padded on the right with token 0."""

    input_ids: Tensor
    sequences: tuple[TokenSequence, ...]

    @cached_property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def padded(self) -> int:
        """How many tokens the model is given, padding included."""
        return self.input_ids.numel()

    def halves(self) -> tuple[TokenBatch, TokenBatch]:
        """The batch as two of half as many sequences; of one sequence there are no halves."""
        middle = len(self.sequences) // 2
        return _pad(self.sequences[:middle]), _pad(self.sequences[middle:])

    @cached_property
    def real_rows(self) -> Tensor:
        """The indexes, among (batch x length) tokens, of those that are not padding."""
        return self._is_real().nonzero()[:, 0]

    def without_padding(self, keys: Tensor) -> Tensor:
        """(batch, length, d_m) keys as (batch x length, d_m), those of padding set to 0 in place.

        No token sees the padding that follows it, so the model's own results do not change.
        """
        flat = keys.reshape(-1, keys.shape[-1])
        if self.tokens < self.padded:
            flat[self._padding_on(flat.device)] = 0
        return flat

    def _padding_on(self, device: torch.device) -> Tensor:
        """The rows of padding, carried to a device once: every layer of it asks for them."""
        if device not in self._padding:
            self._padding[device] = (~self._is_real()).nonzero()[:, 0].to(device)
        return self._padding[device]

    @cached_property
    def _padding(self) -> dict[torch.device, Tensor]:
        return {}

    def _is_real(self) -> Tensor:
        lengths = torch.tensor([len(s.token_ids) for s in self.sequences])
        return (torch.arange(self.input_ids.shape[1])[None, :] < lengths[:, None]).reshape(-1)


def encode(
    tokenizer: Any, documents: Iterable[tuple[int, str]], max_length: int
) -> Iterator[TokenSequence]:
    """Tokenise numbered documents, a chunk at a time, each truncated to `max_length` tokens.

    A document without tokens comes as an empty sequence.
    """
    stream = iter(documents)
    while chunk := list(islice(stream, ENCODE_CHUNK)):
        heads = [_head(tokenizer, text, max_length) for _, text in chunk]
        encoded = tokenizer(heads, truncation=True, max_length=max_length)
        for (index, _), token_ids in zip(chunk, encoded["input_ids"], strict=True):
            yield TokenSequence(index, tuple(token_ids))


def _head(tokenizer: Any, document: str, max_length: int) -> str:
    """As much of a very long document as holds its first `max_length` tokens, and some more."""
    size = LONG_TOKEN * max_length
    while size < len(document) // 2:
        head = document[:size]
        if len(tokenizer(head, add_special_tokens=False)["input_ids"]) > max_length + MARGIN:
            return head
        size *= 2
    return document


def make_batches(
    sequences: Iterable[TokenSequence], budget: int, boundary: int | None = None
) -> list[TokenBatch]:
    """Batches of at most `budget` tokens, padding included, together `MOST_PADDING` of it at most.

    The longest come first, so that what does not fit in memory shows at once. A sequence longer
    than the budget is a batch of its own. Empty sequences are left out. No batch has sequences of
    both sides of `boundary` tokens (`LoadedModel.boundary`).
    """
    longest_first = sorted(
        (sequence for sequence in sequences if sequence.token_ids),
        key=lambda sequence: (-len(sequence.token_ids), sequence.index),
    )
    tokens = sum(len(sequence.token_ids) for sequence in longest_first)
    for most in BATCH_PADDING:
        sides = groupby(longest_first, lambda each: beyond(boundary, len(each.token_ids)))
        groups = [group for _, side in sides for group in _cut(side, budget, most)]
        padded = sum(len(group[0].token_ids) * len(group) for group in groups)
        if padded - tokens <= MOST_PADDING * padded:
            break
    return [_pad(group) for group in groups]


def _cut(
    sequences: Iterable[TokenSequence], budget: int, most: float
) -> Iterator[list[TokenSequence]]:
    """Cut sequences, longest first, where a batch is full or padding is more than `most` of it."""
    batch: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        longest = len(batch[0].token_ids) if batch else len(sequence.token_ids)
        padded = longest * (len(batch) + 1)
        real = tokens + len(sequence.token_ids)
        if batch and (padded > budget or padded - real > most * padded):
            yield batch
            batch, real = [], len(sequence.token_ids)
        batch.append(sequence)
        tokens = real
    if batch:
        yield batch


def _pad(sequences: Sequence[TokenSequence]) -> TokenBatch:
    return TokenBatch(pad_right([each.token_ids for each in sequences]), tuple(sequences))
