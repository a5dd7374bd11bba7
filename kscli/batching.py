"""Token batches: sequences of nearly one length, padded on the right.

No mask is needed: in a causal decoder no token sees what follows it, so every sequence gets what
it would get alone. Which sequences meet in a batch is a pure function of their lengths. A document
is one sequence: the tokenizer's own special tokens, truncated to a maximum length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

MOST_PADDING = 0.03
# What one batch may hold of padding: as much as keeps all batches together under MOST_PADDING.
BATCH_PADDING = (1.0, 0.5, 0.2, 0.1, 0.05, MOST_PADDING)
BATCH_TOKENS = 4096
BATCH_ROWS = 64
FEW_TOKENS = 256
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
        return _batch(self.sequences[:middle]), _batch(self.sequences[middle:])

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
    kept = [sequence for sequence in sequences if sequence.token_ids]
    lengths = [len(sequence.token_ids) for sequence in kept]
    for most in BATCH_PADDING:
        groups = list(_groups(lengths, budget, boundary, most_padding=most))
        padded = sum(lengths[group[0]] * len(group) for group in groups)
        if padded - sum(lengths) <= MOST_PADDING * padded:
            break
    return [_batch([kept[index] for index in group]) for group in groups]


def padded_batches(
    sequences: Sequence[Sequence[int]], boundary: int | None = None, few_tokens: int = FEW_TOKENS
) -> Iterator[tuple[list[int], Tensor]]:
    """The indexes of some sequences, longest first, and their token ids as `pad_right` gives them.

    They are of one length; but a pass over few tokens takes as long as reading the weights does,
    so shorter ones of the same side of `boundary` join a batch that has not `few_tokens` yet.
    """
    lengths = [len(sequence) for sequence in sequences]
    limits = {"most_rows": BATCH_ROWS, "few_tokens": few_tokens}
    for group in _groups(lengths, BATCH_TOKENS, boundary, **limits):
        yield group, pad_right([sequences[index] for index in group])


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token ids (sequences, longest), padded with token 0."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])


def beyond(boundary: int | None, length: int) -> bool:
    """On which side of a model's `boundary` a sequence lies; a batch has those of one side."""
    return boundary is not None and length > boundary


def _groups(
    lengths: Sequence[int],
    budget: int,
    boundary: int | None,
    *,
    most_padding: float = 0.0,
    most_rows: int | None = None,
    few_tokens: int = 0,
) -> Iterator[list[int]]:
    """Indexes of sequences, longest first, cut where the next one does not belong to a batch.

    With it the batch would have more than `budget` tokens, padding included, or more than
    `most_rows` sequences; or it is of the other side of `boundary`; or more than `most_padding` of
    the batch would be padding, and the batch has `few_tokens` without it.
    """
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        longest = lengths[group[0]] if group else length
        padded = longest * (len(group) + 1)
        full = padded > budget or len(group) == most_rows
        sparse = padded - tokens - length > most_padding * padded
        sparse = sparse and padded - longest >= few_tokens
        if group and (full or sparse or beyond(boundary, longest) != beyond(boundary, length)):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield group


def _batch(sequences: Sequence[TokenSequence]) -> TokenBatch:
    return TokenBatch(pad_right([each.token_ids for each in sequences]), tuple(sequences))
