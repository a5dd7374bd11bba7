"""Records in files: the formats and compressions that facts and corpora are read from.

A format is one function and one line of `FORMATS`; a compression is one function and one line of
`COMPRESSIONS`. Help texts and error messages name what these tables hold. Files are read as
streams, but for `.txt` and for the JSON of a `.json` that is not one object a line.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import html
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from kscli.content import FileContent
from kscli.errors import KscliError, first_line

Located = tuple[str, object]
"""Where a record stands, for messages, and the record as it was parsed."""

READ_BYTES = 16 << 10  # of a compressed file: repetitive text grows a thousandfold
LONGEST_LINE = 64 << 20  # bytes of a first line that is looked at to find a file's format

WIKI = "WikiExtractor"  # a format that no extension tells
BATCH_ROWS = 256  # of a table, that stand in memory as records
_ARROW_FILE, _ARROW_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
_DOC = re.compile(r"\s*<doc( [^>]*)>\s*")
_ATTRIBUTE = re.compile(r' (\w+)="([^"]*)"')


@dataclass(frozen=True)
class RecordFile:
    """A file of a known format. `error` is what is raised, naming the file and the place.

    With `field`, records may lack their other fields (tables are read by that column alone). With
    `content`, the `error` is raised where the file is not what it was when that was read. `kind` is
    the key of `FORMATS` where the name does not tell it.
    """

    path: Path
    error: type[KscliError]
    field: str | None = None
    content: FileContent | None = None
    kind: str = ""

    def records(self) -> Iterator[Located]:
        """Stream the records in the file's order."""
        return FORMATS[self.kind or format_of(self.path)].read(self)

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The file's bytes, decompressed."""
        compression = COMPRESSIONS.get(self.path.suffix.lower())
        try:
            with self._raw() as raw, _unpacked(raw, compression) if compression else raw as data:
                yield data
        except _DamagedError as error:
            raise self.damaged(error) from error
        except OSError as error:
            raise unreadable(self.path, error, self.error) from error

    def _raw(self) -> IO[bytes]:
        return self.content.open(self.error) if self.content else self.path.open("rb")

    def text(self) -> str:
        """The whole file, which is UTF-8 text."""
        with self.opened() as stream:
            return decode(stream.read().removeprefix(codecs.BOM_UTF8), str(self.path), self.error)

    def lines(self) -> Iterator[str]:
        """The file's lines, as they are asked for."""
        with self.opened() as stream:
            yield from lines(stream, str(self.path), self.error)

    def damaged(self, reason: Exception) -> KscliError:
        """The error for a file that is not whole."""
        return self.error(
            f"{self.path} is damaged or cut off ({first_line(reason)}); make or download it again."
        )


def unreadable(path: Path, reason: OSError, error: type[KscliError]) -> KscliError:
    """The `error` for a file or folder that the system refuses to read."""
    return error(f"{path} cannot be read ({reason.strerror or reason}).")


def decode(data: bytes, name: str, error: type[KscliError], line: int = 1) -> str:
    """UTF-8 text that begins at `line` of `name`; raises `error` naming the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as bad:
        line += data.count(b"\n", 0, bad.start)
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if marked else "LATIN1"
        raise error(
            f"{name}, line {line}: not UTF-8 text (byte 0x{data[bad.start]:02x} at offset "
            f"{bad.start}); if it is {encoding}, convert it with `iconv -f {encoding} -t UTF-8 OLD "
            "> NEW`."
        ) from bad


def lines(stream: Iterable[bytes], name: str, error: type[KscliError]) -> Iterator[str]:
    """Decode line by line, so that nothing is read ahead; raises `error` naming the line."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield decode(line, name, error, number)


def parse_json(text: str, name: str, error: type[KscliError], first_line: int = 1) -> object:
    """The value of JSON that begins at `first_line` of `name`; raises `error` naming the line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as bad:
        line, reason = first_line, str(bad)
        if isinstance(bad, json.JSONDecodeError):
            line, reason = first_line + bad.lineno - 1, bad.msg
        raise error(
            f"{name}, line {line}: not valid JSON ({reason}); a .json file holds one list, a "
            ".jsonl file one object a line."
        ) from bad


def look_up(record: Mapping[str, object], field: str) -> object:
    """The value of a field, or of one inside others: `text.en` is the `en` of the object `text`.

    A field whose own name has dots comes first. Raises KeyError where there is none.
    """
    if field in record:
        return record[field]
    value: object = record
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise KeyError(field)
        value = value[name]
    return value


def field_names(record: Mapping[str, object], inside: str = "") -> Iterator[str]:
    """The names of all fields, as `look_up` takes them."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from field_names(value, f"{inside}{name}.")
        else:
            yield f"{inside}{name}"


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else quote(value)


def quote(value: object) -> str:
    """A value as messages show it."""
    return cut(repr(value))


def cut(text: str) -> str:
    """At most 100 characters of a text."""
    return text if len(text) <= 100 else f"{text[:97]}..."


# Formats


def _text(file: RecordFile) -> Iterator[Located]:
    # As Python's text files do: the same text is the same document on every system.
    yield str(file.path), file.text().replace("\r\n", "\n")


def _jsonl(file: RecordFile) -> Iterator[Located]:
    for number, line in enumerate(file.lines(), 1):
        if text := line.strip():
            where = f"{file.path}, line {number}"
            yield where, parse_json(text, str(file.path), file.error, number)


def _json(file: RecordFile) -> Iterator[Located]:
    """A list of records; or one object a line, as many tools write under this name; or one object.

    Only objects of one line each are streamed.
    """
    if not _begins_list(file):
        first = next((line for line in file.lines() if line.strip()), "")
        if not first or _parsed(first) is not None:
            yield from _jsonl(file)
        else:
            yield str(file.path), parse_json(file.text(), str(file.path), file.error)
        return
    records = parse_json(file.text(), str(file.path), file.error)
    assert isinstance(records, list)
    for number, record in enumerate(records, 1):
        yield f"{file.path}, record {number}", record


def _begins_list(file: RecordFile) -> bool:
    with file.opened() as stream:
        return stream.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _parsed(line: str | bytes) -> object | None:
    """The value of a line of JSON; None where it is not valid."""
    try:
        return cast(object, json.loads(line))
    except (ValueError, RecursionError):
        return None


def lone_object(path: Path, error: type[KscliError]) -> Mapping[str, object] | None:
    """The one record of a .json file, where it holds no more than that and the record is an object.

    Such a file often describes others: `dataset_infos.json`, `state.json`. Raises `error` where it
    cannot be read or is not JSON.
    """
    file = RecordFile(path, error)
    if format_of(path) != ".json" or _begins_list(file):
        return None
    records = [record for _, record in islice(_json(file), 2)]
    if len(records) == 1 and isinstance(records[0], Mapping):
        return records[0]
    return None


def _wiki(file: RecordFile) -> Iterator[Located]:
    """WikiExtractor's own form: `<doc id="1" url="..." title="...">`, lines of text, `</doc>`."""
    place, record, text = "", dict[str, str](), list[str]()
    for number, line in enumerate(file.lines(), 1):
        begun = _DOC.fullmatch(line)
        if place and line.rstrip() == "</doc>":
            yield place, {**record, "text": "".join(text).strip("\n")}
            place = ""
        elif place:
            text.append(line)
        elif begun:
            place, text = f"{file.path}, line {number}", []
            record = {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(begun[1])}
        elif line.strip():
            raise file.error(f"{file.path}, line {number}: text outside of <doc ...> and </doc>.")
    if place:
        raise file.error(f"{place}: this <doc ...> has no </doc>; make or download the file again.")


def _csv(file: RecordFile, delimiter: str = ",") -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
    # Spreadsheets of old Macs end lines with a carriage return alone.
    pieces = (piece for line in file.lines() for piece in io.StringIO(line, newline=""))
    header = next(pieces, "")
    if "," not in header and ";" in header:
        delimiter = ";"  # as spreadsheets write it where the comma is in numbers
    rows = csv.DictReader(chain([header], pieces), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{file.path}, line {rows.line_num}"
            if None in row:
                raise file.error(
                    f"{where}: more columns than the header's {len(row) - 1}; put text that holds "
                    f"the delimiter {delimiter!r} in double quotes."
                )
            yield where, row
    except csv.Error as bad:
        raise file.error(f"{file.path}, line {rows.line_num}: not valid CSV ({bad}).") from bad


def _tsv(file: RecordFile) -> Iterator[Located]:
    return _csv(file, "\t")


def _parquet(file: RecordFile) -> Iterator[Located]:
    import pyarrow.parquet

    with file.opened() as data, _tables(file) as rows, pyarrow.parquet.ParquetFile(data) as table:
        # Without the field every column is read, so that a message can name them.
        wanted = [file.field] if _has_field(table.schema_arrow, file.field) else None
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
            yield from rows.of(batch)


def _arrow(file: RecordFile) -> Iterator[Located]:
    """A stream of Arrow, as `datasets` keeps it, or a file of it (Feather)."""
    import pyarrow

    with file.opened() as data, _tables(file) as rows:
        is_file = data.read(len(_ARROW_FILE)) == _ARROW_FILE
        data.seek(-len(_ARROW_END), io.SEEK_END)
        if not is_file and data.read() != _ARROW_END:
            raise pyarrow.ArrowInvalid("the end is missing")
        data.seek(0)
        for batch in _arrow_batches(data, is_file=is_file):
            column = (file.field or "").partition(".")[0]
            chosen = batch.select([column]) if _has_field(batch.schema, file.field) else batch
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from rows.of(chosen.slice(start, BATCH_ROWS))


def _arrow_batches(data: IO[bytes], *, is_file: bool) -> Iterator[Any]:
    import pyarrow.ipc

    if not is_file:
        yield from pyarrow.ipc.open_stream(data)
        return
    reader = pyarrow.ipc.open_file(data)
    yield from map(reader.get_batch, range(reader.num_record_batches))


def _has_field(schema: Any, field: str | None) -> bool:
    """Whether a table has a column, or a field in columns that hold objects, as `look_up` does."""
    import pyarrow

    if field is None or field in schema.names:
        return field is not None
    column, *inside = field.split(".")
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    for name in inside:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


class _Rows:
    """The rows of a table's batches as records, numbered through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def of(self, batch: Any) -> Iterator[Located]:
        for record in batch.to_pylist():
            self.number += 1
            yield f"{self.path}, row {self.number}", record


@contextlib.contextmanager
def _tables(file: RecordFile) -> Iterator[_Rows]:
    """Turn what is wrong with a table into the file's error."""
    import pyarrow

    rows = _Rows(file.path)
    try:
        yield rows
    except UnicodeDecodeError as bad:
        raise file.error(f"{file.path}, after row {rows.number}: not UTF-8 text ({bad}).") from bad
    except (pyarrow.ArrowException, OSError) as bad:
        raise file.damaged(bad) from bad


@dataclass(frozen=True)
class Format:
    """How a format is read. Only records with `fields` can be facts; text is a document.

    A format that is not `compressible` is compressed inside. One that is not told `by_name` is
    found by `format_inside`.
    """

    read: Callable[[RecordFile], Iterator[Located]]
    fields: bool = True
    compressible: bool = True
    by_name: bool = True


FORMATS: dict[str, Format] = {
    ".txt": Format(_text, fields=False),
    ".jsonl": Format(_jsonl),
    ".json": Format(_json),
    ".csv": Format(_csv),
    ".tsv": Format(_tsv),
    ".parquet": Format(_parquet, compressible=False),
    ".arrow": Format(_arrow, compressible=False),
    WIKI: Format(_wiki, fields=False, by_name=False),
}


def format_of(path: Path) -> str:
    """The key of `FORMATS` for a file, by its name; empty where there is none."""
    compressed = path.suffix.lower() in COMPRESSIONS
    kind = Path(path.stem).suffix.lower() if compressed else path.suffix.lower()
    known = kind in FORMATS and (FORMATS[kind].compressible or not compressed)
    return kind if known else ""


def format_inside(path: Path, error: type[KscliError]) -> str:
    """The key of `FORMATS` for a file whose name does not tell it, by its first line.

    That is a JSON object or the begin of one of WikiExtractor's documents; empty where it is
    neither. Raises `error` where the file cannot be read.
    """
    try:
        with RecordFile(path, error).opened() as stream:
            line = _first_line(stream)
    except error as unread:
        if isinstance(unread.__cause__, _DamagedError):
            return ""
        raise
    if line.startswith(b"<doc "):
        return WIKI
    return ".jsonl" if isinstance(_parsed(line), dict) else ""


def _first_line(stream: IO[bytes]) -> bytes:
    """The first line of a file, to its end where it may be one of records."""
    begin = stream.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if begin[:1] in (b"{", b"<") and b"\n" not in begin:
        begin += stream.readline(LONGEST_LINE)
    return begin.partition(b"\n")[0]


def known_formats(*, fields: bool = False) -> str:
    """The extensions that can be read, for messages; `fields` leaves out text."""
    known = {
        kind: form for kind, form in FORMATS.items() if form.by_name and (form.fields or not fields)
    }
    compressible = ", ".join(kind for kind, form in known.items() if form.compressible)
    others = "".join(f", {kind}" for kind, form in known.items() if not form.compressible)
    return f"{compressible} (each also with {', '.join(COMPRESSIONS)}){others}"


# Compressions


class _DamagedError(Exception):
    """Compressed data that cannot be unpacked."""


class _Unpacked(io.RawIOBase):
    """A compressed file, open, as a raw stream of its contents, frame by frame.

    The libraries' own streams take some files that were cut off, or have something behind them,
    for whole ones.
    """

    def __init__(
        self, file: IO[bytes], new_frame: Callable[[], Any], error: type[Exception]
    ) -> None:
        self._file = file
        self._blocks = self._decompress(new_frame, error)
        self._block = memoryview(b"")

    def _decompress(self, new_frame: Callable[[], Any], error: type[Exception]) -> Iterator[bytes]:
        frame = None
        try:
            while data := self._file.read(READ_BYTES):
                # Frames may be filled up with zeros.
                while data := data if frame else data.lstrip(b"\0"):
                    frame = frame or new_frame()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except error as bad:
            raise _DamagedError(str(bad)) from bad
        if frame is not None:
            raise _DamagedError("the end is missing")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


Compression = Callable[[], tuple[Callable[[], Any], type[Exception]]]
"""Gives what makes the decompressor of one frame, and the error of damaged data."""


def _unpacked(file: IO[bytes], compression: Compression) -> IO[bytes]:
    return io.BufferedReader(_Unpacked(file, *compression()))


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error


def _zstandard() -> tuple[Callable[[], Any], type[Exception]]:
    import zstandard

    # 2 GiB is what `zstd --long=31` uses; the default refuses more than 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return decompressor.decompressobj, zstandard.ZstdError


def _xz() -> tuple[Callable[[], Any], type[Exception]]:
    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError


def _bzip2() -> tuple[Callable[[], Any], type[Exception]]:
    return bz2.BZ2Decompressor, OSError


COMPRESSIONS: dict[str, Compression] = {
    ".gz": _gzip,
    ".bz2": _bzip2,
    ".zst": _zstandard,
    ".xz": _xz,
}
