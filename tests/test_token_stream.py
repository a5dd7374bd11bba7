from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kscli.errors import CorpusError
from kscli.second_moment.options import WHOLE, CovarianceOptions, Shard
from kscli.second_moment.token_stream import Cursor, TokenStream, Window

FIRST, MOST = 50, 300


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [len(word) for word in texts.split()]}
        most = options.get("max_length", 10**9)
        return {"input_ids": [[len(word) for word in text.split()][:most] for text in texts]}


@dataclass
class Texts:
    texts: list[str]
    name: str = "texts"
    identity: str = "texts"

    def documents(self) -> Iterator[str]:
        return iter(self.texts)


def corpus(seed: int = 0, count: int = 300) -> Texts:
    generator = random.Random(seed)
    return Texts(
        [
            " ".join("x" * generator.randrange(1, 9) for _ in range(generator.randrange(0, 25)))
            for _ in range(count)
        ]
    )


def stream(
    reading: CovarianceOptions, start: Cursor | None = None, texts: Texts | None = None
) -> TokenStream:
    return TokenStream(Words(), texts or corpus(), reading, FIRST, MOST, start)


def naive(
    reading: CovarianceOptions, texts: Texts | None = None
) -> list[tuple[int, tuple[int, ...]]]:
    """Which (document, token ids) a reading takes, by the definition."""
    taken = []
    left = reading.tokens
    for index, text in enumerate((texts or corpus()).texts[: reading.samples]):
        ids = tuple(len(word) for word in text.split())[: reading.max_length]
        if left is not None:
            if left <= 0:
                break
            ids = ids[:left]
            left -= len(ids)
        if index % reading.shard.count == reading.shard.index:
            taken.append((index, ids))
    return taken


def flat(windows: list[Window]) -> list[tuple[int, tuple[int, ...]]]:
    return [(s.index, s.token_ids) for window in windows for s in window.sequences]


READINGS = [
    CovarianceOptions(samples, tokens, max_length, shard=shard)
    for samples in (None, 1, 64, 117)
    for tokens in (None, 1, 700, 10**6)
    for max_length in (5, 1000)
    for shard in (WHOLE, Shard(0, 3), Shard(2, 3))
]


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_documents_are_those_of_the_definition(reading: CovarianceOptions) -> None:
    windows = list(stream(reading))
    assert flat(windows) == naive(reading)
    assert all(window.sequences for window in windows)
    at = Cursor()
    for window in windows:
        assert window.start == at
        at = window.end
    if windows:
        taken = naive(reading)
        assert at.own == len(taken)
        assert at.empty == sum(not ids for _, ids in taken)
        assert at.tokens == sum(len(ids) for _, ids in taken)


@pytest.mark.parametrize("reading", READINGS[::5], ids=str)
def test_from_any_window_on_the_stream_is_the_same(reading: CovarianceOptions) -> None:
    windows = list(stream(reading))
    for number, window in enumerate(windows):
        assert list(stream(reading, window.start)) == windows[number:]
    if windows:
        assert list(stream(reading, windows[-1].end)) == []


def test_shards_are_the_whole_whatever_bounds_it() -> None:
    for tokens in (None, 431):
        whole = naive(CovarianceOptions(200, tokens, 9))
        parts = [
            flat(list(stream(CovarianceOptions(200, tokens, 9, shard=Shard(i, 4)))))
            for i in range(4)
        ]
        assert sorted(item for part in parts for item in part) == whole


def test_windows_grow_with_what_was_read() -> None:
    windows = list(stream(CovarianceOptions(None, None, 1000)))
    held = [window.end.tokens - window.start.tokens for window in windows]
    for window, size in zip(windows[:-1], held[:-1], strict=True):
        wanted = min(max(FIRST, window.start.tokens), MOST)
        assert wanted <= size < wanted + 25


@pytest.mark.parametrize(("samples", "exhausted"), [(None, True), (299, False), (301, True)])
def test_whether_the_corpus_has_more_is_told(samples: int | None, exhausted: bool) -> None:
    read = stream(CovarianceOptions(samples, None, 9))
    assert not read.exhausted
    windows = list(read)
    assert (read.exhausted, read.finished) == (exhausted, True)
    again = stream(CovarianceOptions(samples, None, 9), windows[-1].end)
    assert list(again) == []
    assert again.exhausted == exhausted


def test_text_that_changed_before_the_place_is_refused() -> None:
    reading = CovarianceOptions(None, None, 1000)
    start = list(stream(reading))[2].start
    changed = corpus()
    changed.texts[start.documents - 1] += " more"
    with pytest.raises(CorpusError, match=f"first {start.documents} documents of texts"):
        list(stream(reading, start, changed))
    with pytest.raises(CorpusError, match="same text again"):
        list(stream(reading, start, Texts(corpus().texts[: start.documents - 1])))
    later = corpus()
    later.texts[start.documents] += " more"
    assert flat(list(stream(reading, start, later))) == naive(reading, later)[start.documents :]


def test_no_document_at_all() -> None:
    read = stream(CovarianceOptions(None, None, 9), texts=Texts([]))
    assert list(read) == []
    assert read.exhausted
    empty = list(stream(CovarianceOptions(None, None, 9), texts=Texts(["", " "])))
    assert [window.end for window in empty] == [replace(empty[0].end, own=2, empty=2, tokens=0)]
