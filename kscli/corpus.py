"""The documents that C is averaged over: local files, folders, standard input, the Hub.

`open_corpus` checks what the user named and says who it is (`identity`); the text itself is
streamed by `Corpus.documents`, so a corpus larger than memory takes no more memory here than its
largest document. Each kind of corpus is a function that gives a `Corpus`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from kscli.content import FileContent, read_content
from kscli.corpus_files import find_files
from kscli.errors import CorpusError
from kscli.hub.datasets import HubSource, open_dataset, parse_source
from kscli.records import (
    Located,
    RecordFile,
    field_names,
    lines,
    look_up,
    parse_json,
    unreadable,
)
from kscli.shuffling import shuffled

HUB_ALIASES = {
    "wikipedia": HubSource("wikimedia/wikipedia", "20231101.en"),
    # The repository holds this dump as 41 Parquet files, but also the old `wikipedia.py`, for
    # which `load_dataset(repository, config)` refuses it since datasets 4.0. So the files are
    # named themselves, at the last commit seen.
    "wikipedia-20220301": HubSource(
        "legacy-datasets/wikipedia",
        "20220301.en",
        files="data/20220301.en/train-*.parquet",
        revision="97a0b052c326b45fb68593a14972d9eed884cd17",
    ),
}
ALIASES = (*HUB_ALIASES, "tiny")
DEFAULT_SEED = 0
DRAWN = "#shuffle:"  # what stands in an identity before the seed of the order

_STDIN = "standard input"
_BEGINS_JSON = re.compile(r'\s*(\[\s*)?\{\s*(["}]|$)|\s*\[\s*$')


@dataclass(frozen=True)
class CorpusSpec:
    """What the user asked for.

    `name` is one of `ALIASES`, `hf:OWNER/NAME[:CONFIG[:SPLIT]]`, a file, a folder, or `-` for
    standard input. `text_field` is the field or column of the text, by default `text`. `shuffle`
    is the seed of the order in which documents are drawn, None for the order that they have; a data
    set of the Hub is drawn by default.
    """

    name: str
    text_field: str | None = None
    shuffle: int | Literal["default"] | None = "default"

    @property
    def field(self) -> str:
        """The field that holds the text."""
        return self.text_field or "text"

    @property
    def identity_part(self) -> str:
        """What an identity says of the field: nothing where it is the default."""
        return "" if self.field == "text" else f"#{self.field}"

    @property
    def is_on_the_hub(self) -> bool:
        """Whether a data set of the Hub is named."""
        return self.name in HUB_ALIASES or self.name.startswith("hf:")

    @property
    def seed(self) -> int | None:
        """The seed of the order; None: documents come as they stand."""
        if self.shuffle == "default":
            return DEFAULT_SEED if self.is_on_the_hub else None
        return self.shuffle


@dataclass(frozen=True)
class Corpus:
    """A fixed sequence of documents.

    `name` is what is shown; `identity` is another string when the documents are others; `records`
    opens the stream of records whose `field` is the text. With `shuffle`, a seed, the documents of
    the stream are drawn in a random order. `notes` say what is not read of what was named.
    `count` is the number of documents, where that is known.
    """

    name: str
    identity: str
    field: str
    records: Callable[[], Iterable[Located]]
    shuffle: int | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    count: int | None = None

    @property
    def seed(self) -> str:
        """The seed by which the documents are drawn; empty where they come as they stand."""
        return self.identity.partition(DRAWN)[2]

    def documents(self) -> Iterator[str]:
        """Stream the documents in a fixed order; each call starts anew (standard input: once).

        Empty and blank documents are passed on as they are. Raises CorpusError where the text
        cannot be read, and at the end if all of it was blank.
        """
        texts = self._texts(self.records())
        return texts if self.shuffle is None else shuffled(texts, self.shuffle)

    def _texts(self, records: Iterable[Located]) -> Iterator[str]:
        blank = True
        for where, record in records:
            text = _text_of(record, self.field, where)
            blank = blank and (not text or text.isspace())
            yield text
        if blank:
            raise CorpusError(f"The corpus {self.name} is empty: no document in it has any text.")


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Find the corpus that `spec` names; raises CorpusError if there is none of a known kind."""
    if spec.is_on_the_hub:
        source = HUB_ALIASES.get(spec.name) or parse_source(spec.name, CorpusError)
        return _open_hub(spec, replace(source, shuffle=spec.seed))
    if spec.name == "-":
        if spec.seed is not None:
            raise CorpusError(
                "standard input is read as it comes and cannot be shuffled; save it to a file and "
                "give that as --corpus, or leave --shuffle out."
            )
        identity = f"stdin:{uuid.uuid4().hex}"  # what it holds is not known before it is read
        return Corpus(_STDIN, identity, spec.field, _StandardInput())
    opened = _open_tiny(spec) if spec.name == "tiny" else _open_files(spec)
    if spec.seed is None:
        return opened
    return replace(opened, identity=f"{opened.identity}{DRAWN}{spec.seed}", shuffle=spec.seed)


def same_text(identity: str, other: str) -> bool:
    """Whether two identities are of the same documents, in whatever order."""
    return identity.partition(DRAWN)[0] == other.partition(DRAWN)[0]


def _text_of(record: object, field: str, where: str) -> str:
    what, others = "the document", ""
    if isinstance(record, dict):
        what = f"the field '{field}'"
        try:
            value = look_up(record, field)
        except KeyError:
            raise CorpusError(
                f"{where}: there is no field '{field}' (there are: {_names(record)}); "
                "name the one that holds the text with --text-field."
            ) from None
        if isinstance(value, dict):
            others = f" (there are: {_names(value, f'{field}.')})"
        # Tables of the Hub have nulls; a row without text is a document without tokens.
        record = "" if value is None else value
    if not isinstance(record, str):
        kind = "null" if record is None else type(record).__name__
        raise CorpusError(
            f"{where}: {what} is not a string but {kind}{others}; "
            "name the field that holds the text with --text-field, or leave this document out."
        )
    try:
        record.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and no tokenizer accepts one.
        raise CorpusError(
            f"{where}: {what} holds half of a surrogate pair (\\ud800 to \\udfff), "
            "which is no character; remove it."
        ) from error
    return record


def _names(record: Mapping[str, object], inside: str = "") -> str:
    """The fields of a record, for messages."""
    return ", ".join(f"'{name[:40]}'" for name in islice(field_names(record, inside), 20)) or "none"


# Files and folders


def _open_files(spec: CorpusSpec) -> Corpus:
    found = find_files(spec.name, spec.field)
    if found is None:
        raise CorpusError(_not_found(spec.name))
    contents = {_content(path): kind for path, kind in found.kinds.items()}

    def records() -> Iterator[Located]:
        for content, kind in contents.items():
            yield from RecordFile(content.path, CorpusError, spec.field, content, kind).records()

    identity = f"files:sha256:{_hash(found.root, contents)}{spec.identity_part}"
    return Corpus(
        spec.name,
        identity,
        spec.field,
        records,
        files=tuple(found.kinds),
        notes=found.notes,
    )


def _not_found(name: str) -> str:
    hub = f"hf:{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "hf:OWNER/NAME"
    return (
        f"There is no corpus file or folder '{name}'; "
        f"give an existing one, {hub} for a data set on the Hub, or one of {', '.join(ALIASES)}."
    )


def _content(path: Path) -> FileContent:
    try:
        return read_content(path)
    except OSError as error:
        raise unreadable(path, error, CorpusError) from error


def _hash(root: Path, contents: Iterable[FileContent]) -> str:
    """SHA-256 (hex) over the files' relative paths, sizes and contents."""
    digest = hashlib.sha256()
    for content in contents:
        name = content.path.relative_to(root).as_posix()
        digest.update(json.dumps([name, content.size, content.sha256]).encode())
    return digest.hexdigest()


# The Hub, standard input, and the embedded corpus


def _open_hub(spec: CorpusSpec, source: HubSource) -> Corpus:
    dataset = open_dataset(source, CorpusError, "give a file or folder as --corpus")
    name = f"hf:{source.repository}:{source.config or 'default'}:{'+'.join(source.splits)}"
    commit = f"@{dataset.commit}" if dataset.commit else ""

    def records() -> Iterable[Located]:
        rows = dataset.records()
        return ((f"{spec.name}, document {number}", row) for _, number, row in rows)

    drawn = "" if source.shuffle is None else f"{DRAWN}{source.shuffle}"
    return Corpus(spec.name, f"{name}{spec.identity_part}{commit}{drawn}", spec.field, records)


def _open_tiny(spec: CorpusSpec) -> Corpus:
    from kscli.tiny import corpus

    return corpus_of(corpus.documents(), spec.field, "tiny")


def corpus_of(
    documents: Iterable[str | Mapping[str, object]], field: str = "text", name: str = "texts"
) -> Corpus:
    """The corpus of documents in memory, texts or records; the name begins its identity, too."""
    documents = tuple(documents)
    digest = hashlib.sha256(json.dumps(documents, default=repr).encode()).hexdigest()
    return Corpus(
        name,
        f"{name}:sha256:{digest}",
        field,
        lambda: ((f"{name}, document {at}", text) for at, text in enumerate(documents, 1)),
        count=len(documents),
    )


class _StandardInput:
    """Standard input, which can be read once: JSON Lines, or plain text with a document a line.

    It is JSON Lines if its first line that is not blank begins a JSON object. Of plain text, each
    line that is not blank is a document.
    """

    def __init__(self) -> None:
        self._read = False

    def __call__(self) -> Iterator[Located]:
        if self._read:
            raise CorpusError(
                "Standard input can be read only once; save it to a file and give that as --corpus."
            )
        self._read = True
        if sys.stdin is None:
            raise CorpusError("Standard input is closed; send text to it, or name another corpus.")
        return self._records(_own_stream())

    def _records(self, stream: Iterable[bytes]) -> Iterator[Located]:
        is_json = None
        for number, line in enumerate(lines(stream, _STDIN, CorpusError), 1):
            if not line.strip():
                continue
            if is_json is None:
                is_json = _BEGINS_JSON.match(line) is not None
            if is_json:
                record = parse_json(line.strip(), _STDIN, CorpusError, number)
            else:
                record = line.rstrip("\r\n")
            yield f"{_STDIN}, line {number}", record


def _own_stream() -> Iterable[bytes]:
    """Standard input behind a buffer of its own.

    Python locks sys.stdin's own buffer at exit, and aborts where a thread still reads from it.
    """
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except OSError:
        return sys.stdin.buffer
