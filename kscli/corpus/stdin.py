"""The corpus that comes by standard input."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kscli.corpus.documents import Record, documents, lines, parse_json
from kscli.errors import CorpusError

_NAME = "standard input"
_BEGINS_JSON = re.compile(r'\s*(\[\s*)?\{\s*(["}]|$)|\s*\[\s*$')


@dataclass
class StdinCorpus:
    """Standard input: JSON Lines, or plain text with one document a line.

    It is JSON Lines if its first line that is not blank begins a JSON object.
    In plain text each line that is not blank is a document, as shell tools
    have it. It can be read once, and what it holds cannot be known
    beforehand, so its identity equals no other.
    """

    text_field: str
    name: str = field(default=_NAME, init=False)
    identity: str = field(default_factory=lambda: f"stdin:{uuid.uuid4().hex}", init=False)
    _read: bool = field(default=False, init=False, repr=False)

    def documents(self) -> Iterator[str]:
        """Stream them; a second call raises CorpusError."""
        if self._read:
            raise CorpusError(
                "Standard input can be read only once; save it to a file and give that as --corpus."
            )
        self._read = True
        if sys.stdin is None:
            raise CorpusError("Standard input is closed; send text to it, or name another corpus.")
        return documents(_read_stdin(_own_stream()), self.text_field, _NAME)


def _own_stream() -> Iterable[bytes]:
    """Standard input behind a buffer of its own.

    Python locks sys.stdin's own buffer at exit, and aborts where a thread still reads from it.
    """
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except OSError:
        return sys.stdin.buffer


def _read_stdin(stream: Iterable[bytes]) -> Iterator[Record]:
    is_json = None
    for number, line in enumerate(lines(stream, _NAME), 1):
        if not line.strip():
            continue
        if is_json is None:
            is_json = _BEGINS_JSON.match(line) is not None
        value = parse_json(line.strip(), _NAME, number) if is_json else line.rstrip("\r\n")
        yield f"{_NAME}, line {number}", value
