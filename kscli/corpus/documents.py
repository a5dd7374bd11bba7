"""What every corpus shares: its interface, the request for one, and text out of records."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kscli.errors import CorpusError

Record = tuple[str, object]  # where it stands, for messages, and an object or a string


@dataclass(frozen=True)
class CorpusSpec:
    """What the user asked for.

    `name` is an alias (`wikipedia`, `wikipedia-20220301`, `tiny`),
    `hf:OWNER/NAME[:CONFIG[:SPLIT]]`, a file, a folder, or `-` for standard
    input. `text_field` is the field or column of the text, by default `text`.
    """

    name: str
    text_field: str | None = None

    @property
    def field(self) -> str:
        """The field that holds the text."""
        return self.text_field or "text"


class Corpus(Protocol):
    """A fixed sequence of documents."""

    @property
    def name(self) -> str:
        """What is shown."""

    @property
    def identity(self) -> str:
        """A string that is another one when the documents are others."""

    def documents(self) -> Iterator[str]:
        """Stream the documents in a fixed order; each call starts anew (standard input: once).

        Empty and blank documents are passed on as they are. Raises CorpusError
        where the text cannot be read, and at the end if all of it was blank.
        """


def field_part(text_field: str) -> str:
    """What an identity says of the field: nothing where it is the default."""
    return "" if text_field == "text" else f"#{text_field}"


def documents(records: Iterable[Record], text_field: str, name: str) -> Iterator[str]:
    """The texts of the records of the corpus `name`; see `Corpus.documents` for the errors."""
    blank = True
    for where, value in records:
        text = _text_of(value, text_field, where)
        blank = blank and (not text or text.isspace())
        yield text
    if blank:
        raise CorpusError(f"The corpus {name} is empty: it holds no document with any text.")


def _text_of(value: object, text_field: str, where: str) -> str:
    if isinstance(value, dict):
        if text_field not in value:
            raise no_such_field(text_field, value, where)
        # Tables of the Hub have nulls; a row without text is a document without tokens.
        value = "" if value[text_field] is None else value[text_field]
        what = f"the field '{text_field}'"
    else:
        what = "the document"
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise CorpusError(
            f"{where}: {what} is not a string but {kind}; "
            "name the field that holds the text with --text-field, or leave this document out."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and no tokenizer accepts one.
        raise CorpusError(
            f"{where}: {what} holds half of a surrogate pair (\\ud800 to \\udfff), "
            "which is no character; remove it."
        ) from error
    return value


def no_such_field(text_field: str, names: Iterable[object], where: str) -> CorpusError:
    """The error for a record that has only the fields `names`."""
    known = ", ".join(f"'{str(name)[:40]}'" for name in list(names)[:20]) or "none"
    return CorpusError(
        f"{where}: there is no field '{text_field}' (there are: {known}); "
        "name the one that holds the text with --text-field."
    )


def decode(data: bytes, where: str) -> str:
    """UTF-8 text; raises CorpusError naming the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it, for example with iconv."
        ) from error


def lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode line by line, so that a bad byte is named with its line and nothing is read ahead."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield decode(line, f"{name}, line {number}")


def parse_json(text: str, name: str, first_line: int = 1) -> object:
    """The value of JSON that begins at `first_line` of `name`; raises CorpusError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise CorpusError(
            f"{name}, line {line}: not valid JSON ({error.msg}); "
            "a .json file holds one list, JSON Lines one whole object a line."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{name}, line {first_line}: JSON that cannot be read ({error})."
        ) from error
