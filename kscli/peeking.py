"""The first documents of a corpus with their token counts, before a long run reads all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kscli.batching import encode
from kscli.corpus import Corpus

BEGIN = 80  # characters of a document that are shown


@dataclass(frozen=True)
class Peeked:
    """A document, numbered from 1: how long it is, and the tokens that are taken of it.

    It is `cut` where it has more tokens than the limit. `begin` is its beginning on one line.
    """

    document: int
    characters: int
    tokens: int
    cut: bool
    begin: str


def peek(tokenizer: Any, corpus: Corpus, samples: int | None, max_length: int) -> Iterator[Peeked]:
    """The first documents (None: all), tokenised as `cache-cov` does it; raises CorpusError."""
    for number, text in enumerate(islice(corpus.documents(), samples), 1):
        (sequence,) = encode(tokenizer, [(number, text)], max_length + 1)
        found = len(sequence.token_ids)
        begin = " ".join(text[: 4 * BEGIN].split())[:BEGIN]
        yield Peeked(number, len(text), min(found, max_length), found > max_length, begin)
