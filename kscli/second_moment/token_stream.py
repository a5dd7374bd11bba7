"""The corpus as windows of token sequences, from any place on.

Documents are numbered as they come in the one ordered stream, whatever files they lie in. A
window holds what is batched together: the windows grow with what was read (`first` tokens,
then as many again, then twice as many, up to `most`), so that the stream's first N tokens are
whole windows at doublings of N, and each window is a fair piece of the text. Where one window
ends is a pure function of the documents before it, and a `Cursor` says all that is needed to
go on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeVar

from kscli.batching import TokenSequence, encode
from kscli.corpus import Corpus
from kscli.errors import CorpusError
from kscli.models.config import LONGEST_DOCUMENT
from kscli.second_moment.options import CovarianceOptions

# How many documents an expectation is taken from.
LOOKED_AT = 256
COUNTING_SECONDS = 2.0
POLL_SECONDS = 0.1

Item = TypeVar("Item")


@dataclass(frozen=True)
class Expected:
    """What a reading comes to: `tokens` in all (None: it cannot be told), `length` a document.

    `at_most`: the corpus may well have fewer documents than were asked for.
    """

    tokens: float | None
    length: float
    at_most: bool


@dataclass(frozen=True)
class Cursor:
    """A place between two documents of the stream, at a window's end.

    `documents` of the stream lie before it, with the chained hash `digest`; of the tokens that the
    options allow, `limited` are used up. This shard has `own` of these documents: `empty` of them
    had no token, and the others had `tokens` in all.
    """

    documents: int = 0
    limited: int = 0
    own: int = 0
    empty: int = 0
    tokens: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Window:
    """The sequences between two places of the stream."""

    start: Cursor
    end: Cursor
    sequences: tuple[TokenSequence, ...]


class TokenStream:
    """The windows of a corpus after `start`, by what `options` read; iterate over it once.

    The first window holds `first` tokens at least, and none exceeds `most` by more than a document.
    Raises CorpusError where the documents before `start` are not those it was made from.
    `exhausted` says, at the end, whether the corpus has no more documents; `read` is how far the
    stream was read, and `finished` that nothing is left of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        corpus: Corpus,
        options: CovarianceOptions,
        first: int,
        most: int,
        start: Cursor | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._options = options
        self._max_length = options.max_length or LONGEST_DOCUMENT
        self._first = first
        self._most = most
        self.start = start or Cursor()
        self.read = self.start
        self.exhausted = False
        self.finished = False
        # The chained hash after each document that was read and is in no window yet.
        self._digests: dict[int, str] = {}

    def __iter__(self) -> Iterator[Window]:
        start = self.start
        window: list[TokenSequence] = []
        for sequence in self._sequences():
            mine = self._options.shard.holds(sequence.index)
            if mine:
                window.append(sequence)
            self.read = _after(self.read, sequence, mine)
            if self.read.tokens - start.tokens >= self._size_after(start):
                yield self._window(start, window)
                start, window = self.read, []
        self.finished = True
        if window:
            yield self._window(start, window)

    def _size_after(self, start: Cursor) -> int:
        return min(max(self._first, start.tokens), self._most)

    def _window(self, start: Cursor, sequences: list[TokenSequence]) -> Window:
        end = self.read.documents
        self.read = replace(self.read, digest=self._digests[end])
        self._digests = {at: digest for at, digest in self._digests.items() if at > end}
        return Window(start, self.read, tuple(sequences))

    def _sequences(self) -> Iterator[TokenSequence]:
        """This shard's sequences; with a limit on tokens, which all shards use up, everyone's."""
        options = self._options
        if options.tokens is None:
            texts = ((i, text) for i, text in self._documents() if options.shard.holds(i))
            yield from encode(self._tokenizer, texts, self._max_length)
            return
        left = options.tokens - self.start.limited
        if left <= 0:
            return
        for sequence in encode(self._tokenizer, self._documents(), self._max_length):
            yield TokenSequence(sequence.index, sequence.token_ids[:left])
            left -= len(sequence.token_ids)
            if left <= 0:
                return

    def _documents(self) -> Iterator[tuple[int, str]]:
        """The documents after `start`, numbered; those before it are read and compared."""
        number, digest = 0, ""
        for text in islice(self._texts(), self._options.samples):
            number += 1
            digest = hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
            if number == self.start.documents and digest != self.start.digest:
                raise self.changed(self.start)
            if number > self.start.documents:
                self._digests[number] = digest
                yield number - 1, text
        if number < self.start.documents:
            raise self.changed(self.start)

    def _texts(self) -> Iterator[str]:
        yield from self._corpus.documents()
        self.exhausted = True

    def changed(self, end: Cursor) -> CorpusError:
        """The error for a corpus whose documents up to `end` are not what they were."""
        return CorpusError(
            f"the first {end.documents:,} documents of {self._corpus.name} are not those that the "
            "checkpoint has counted; give the same text again, or remove the checkpoint's folder."
        )


def _after(cursor: Cursor, sequence: TokenSequence, mine: bool) -> Cursor:
    taken = len(sequence.token_ids)
    return replace(
        cursor,
        documents=sequence.index + 1,
        limited=cursor.limited + taken,
        own=cursor.own + mine,
        empty=cursor.empty + (mine and not taken),
        tokens=cursor.tokens + taken * mine,
    )


def expected_tokens(tokenizer: Any, corpus: Corpus, options: CovarianceOptions) -> Expected:
    """What `options` read, by the corpus's first documents: exact where it has no more."""
    most = min(options.samples or LOOKED_AT, LOOKED_AT)
    texts = enumerate(islice(corpus.documents(), most + 1))
    sequences = encode(tokenizer, texts, options.max_length or LONGEST_DOCUMENT)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    ended = len(lengths) <= most
    lengths = lengths[:most]
    mean = sum(lengths) / max(len(lengths), 1)
    limits = [each for each in (options.samples, corpus.count) if each is not None]
    documents = len(lengths) if ended else min(limits, default=None)
    tokens = None if documents is None else mean * documents
    if options.tokens is not None:
        tokens = min(tokens or options.tokens, options.tokens)
    at_most = not ended and corpus.count is None
    return Expected(None if tokens is None else tokens / options.shard.count, mean, at_most)


def count_documents(corpus: Corpus, most: int | None) -> int | None:
    """How many documents a corpus has, up to `most`; None where to count them takes too long.

    Files are read for `COUNTING_SECONDS` at most, and nothing that can be read but once.
    """
    if corpus.count is not None or not corpus.files:
        return corpus.count
    if not all(path.is_file() for path in corpus.files):
        return None
    until, number = monotonic() + COUNTING_SECONDS, 0
    try:
        for _ in islice(corpus.records(), most):
            number += 1
            if monotonic() > until:
                return None
    except CorpusError:
        return None  # The run says so where it comes to it.
    return number


@dataclass(frozen=True)
class _End:
    """What comes after the last item: nothing, or the error that the items ended with."""

    error: BaseException | None = None


def ahead(
    items: Iterable[Item], most: int, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[Item]:
    """Iterate over `items` in a thread, at most `most` of them ahead of what was taken.

    An error of `items` is raised here, in its place. `while_waiting` is called now and then
    while there is nothing to take, and may raise to stop waiting.
    """
    queue: Queue[Item | _End] = Queue(most)
    left = Event()

    def put(item: Item | _End) -> bool:
        while not left.is_set():
            try:
                queue.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End())
        except BaseException as error:
            put(_End(error))

    # A daemon, since it may be waiting for a pipe that nobody writes to any more.
    Thread(target=work, name="ahead", daemon=True).start()
    try:
        while True:
            try:
                item = queue.get(timeout=POLL_SECONDS)
            except Empty:
                while_waiting()
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        left.set()
