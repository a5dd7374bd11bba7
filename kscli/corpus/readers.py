"""A reader a kind of file, and what the file was compressed with.

A reader turns a file into (place, value) pairs, and `_opened` handles compression: a new kind
of file is one reader and one line of `READERS`. `.txt` and `.json` files are read whole, the
others as they are asked for.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from kscli.corpus.documents import Record, decode, lines, no_such_field, parse_json
from kscli.errors import CorpusError

_ZSTD_READ_BYTES = 16 << 10  # repetitive text grows a thousandfold when it is unpacked


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; damage and refusals become CorpusError."""
    try:
        with _decompressed(path) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _decompressed(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


def _damaged(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path} is damaged or cut off ({error}); make or download it again.")


def unreadable(path: Path, error: OSError) -> CorpusError:
    """The error for a file or folder that the system refuses."""
    return CorpusError(f"{path} cannot be read ({error.strerror or error}).")


class _ZstdFile(io.RawIOBase):
    """A Zstandard file as a raw stream of its contents.

    Not `ZstdDecompressor.stream_reader`: that one ends a file that was cut off
    as if it were whole.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._blocks = self._decompress(path)
        self._block = memoryview(b"")

    def _decompress(self, path: Path) -> Iterator[bytes]:
        import zstandard

        # 2 GiB is what `zstd --long=31` uses; the default refuses more than 128 MiB.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame = None
        try:
            while data := self._file.read(_ZSTD_READ_BYTES):
                while data:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise _damaged(path, error) from error
        if frame is not None:
            raise EOFError("the last frame has no end")

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

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_text(path: Path, text_field: str) -> Iterator[Record]:
    with _opened(path) as stream:
        data = stream.read()
    text = decode(data.removeprefix(codecs.BOM_UTF8), str(path))
    # As Python's text files do: the same text is the same document on every system.
    yield str(path), text.replace("\r\n", "\n")


def _read_jsonl(path: Path, text_field: str) -> Iterator[Record]:
    with _opened(path) as stream:
        for number, line in enumerate(lines(stream, str(path)), 1):
            if text := line.strip():
                yield f"{path}, line {number}", parse_json(text, str(path), number)


def _read_json(path: Path, text_field: str) -> Iterator[Record]:
    with _opened(path) as stream:
        text = decode(stream.read().removeprefix(codecs.BOM_UTF8), str(path))
    items = parse_json(text, str(path))
    if not isinstance(items, list):
        raise CorpusError(
            f"{path} holds no list of documents; "
            "write a list of objects or strings, or one object a line in a .jsonl file."
        )
    for number, item in enumerate(items, 1):
        yield f"{path}, item {number}", item


def _read_csv(path: Path, text_field: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
    with _opened(path) as stream:
        rows = csv.DictReader(lines(stream, str(path)), strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row:
                    raise CorpusError(
                        f"{where}: more columns than the header has; "
                        "put fields that hold a comma in double quotes."
                    )
                yield where, row
        except csv.Error as error:
            raise CorpusError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from error


def _read_parquet(path: Path, text_field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise no_such_field(text_field, names, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {text_field: value}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, after row {number}: not UTF-8 text ({error}).") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
