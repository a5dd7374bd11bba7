"""Token batches: documents tokenised, bucketed by length and padded on the right.

One document is one sequence: the tokenizer's own special tokens, truncated to a
maximum length. Within a window of the stream, documents are sorted by length, so that
a batch holds sequences of nearly one length; which documents meet in a batch is a pure
function of the stream, the budget and the window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

MOST_PADDING = 0.03
WINDOW_BATCHES = 16
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

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    def rows(self, keys: Tensor) -> Tensor:
        """The (tokens, d_m) keys of the tokens that are not padding, of (batch, length, d_m)."""
        flat = keys.reshape(-1, keys.shape[-1])
        if self.tokens == flat.shape[0]:
            return flat
        lengths = torch.tensor([len(s.token_ids) for s in self.sequences])
        real = torch.arange(keys.shape[1])[None, :] < lengths[:, None]
        return flat[real.reshape(-1).nonzero()[:, 0].to(flat.device)]


def encode(tokenizer: Any, documents: Iterable[str], max_length: int) -> Iterator[TokenSequence]:
    """Tokenise documents, a chunk at a time, each truncated to `max_length` tokens.

    A document without tokens comes as an empty sequence.
    """
    index = 0
    stream = iter(documents)
    while chunk := list(islice(stream, ENCODE_CHUNK)):
        heads = [_head(tokenizer, document, max_length) for document in chunk]
        encoded = tokenizer(heads, truncation=True, max_length=max_length)
        for token_ids in encoded["input_ids"]:
            yield TokenSequence(index, tuple(token_ids))
            index += 1


def _head(tokenizer: Any, document: str, max_length: int) -> str:
    """As much of a very long document as holds its first `max_length` tokens, and some more."""
    size = LONG_TOKEN * max_length
    while size < len(document) // 2:
        head = document[:size]
        if len(tokenizer(head, add_special_tokens=False)["input_ids"]) > max_length + MARGIN:
            return head
        size *= 2
    return document


def limit_tokens(sequences: Iterable[TokenSequence], tokens: int) -> Iterator[TokenSequence]:
    """Stop after exactly `tokens` tokens; the last sequence is cut to fit."""
    left = tokens
    for sequence in sequences:
        yield TokenSequence(sequence.index, sequence.token_ids[:left])
        left -= len(sequence.token_ids)
        if left <= 0:
            return


def make_batches(sequences: Iterable[TokenSequence], budget: int) -> Iterator[TokenBatch]:
    """Batches of at most `budget` tokens, padding included, and `MOST_PADDING` of padding.

    A sequence longer than the budget is a batch of its own. Empty sequences are left out.
    """
    window: list[TokenSequence] = []
    held = 0
    for sequence in sequences:
        if sequence.token_ids:
            window.append(sequence)
            held += len(sequence.token_ids)
        if held >= WINDOW_BATCHES * budget:
            yield from _cut(window, budget)
            window, held = [], 0
    yield from _cut(window, budget)


def _cut(window: list[TokenSequence], budget: int) -> Iterator[TokenBatch]:
    """Cut a window, longest sequences first, into batches."""
    batch: list[TokenSequence] = []
    tokens = 0
    for sequence in sorted(window, key=lambda s: (-len(s.token_ids), s.index)):
        longest = len(batch[0].token_ids) if batch else len(sequence.token_ids)
        padded = longest * (len(batch) + 1)
        real = tokens + len(sequence.token_ids)
        if batch and (padded > budget or padded - real > MOST_PADDING * padded):
            yield _pad(batch)
            batch, real = [], len(sequence.token_ids)
        batch.append(sequence)
        tokens = real
    if batch:
        yield _pad(batch)


def _pad(sequences: list[TokenSequence]) -> TokenBatch:
    longest = max(len(sequence.token_ids) for sequence in sequences)
    input_ids = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
    return TokenBatch(input_ids, tuple(sequences))
