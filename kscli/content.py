"""Files whose content is known by its hash, and is compared with it whenever it is read.

What a run says of a file is the hash of what was there when the run began. A file that grows, or
is written anew, gives other text later: `FileContent.open` refuses it at the first block that is
not what it was.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kscli.errors import KscliError

BLOCK = 1 << 18
_DIGEST = 16  # bytes a block


@dataclass(frozen=True)
class FileContent:
    """A file of `size` bytes, their SHA-256 (hex), and a hash of each `BLOCK` of them."""

    path: Path
    size: int
    sha256: str
    blocks: bytes = field(repr=False)

    def open(self, error: type[KscliError]) -> IO[bytes]:
        """The file for reading; a read raises `error` where it is not what it was."""
        return io.BufferedReader(_Compared(self, error), BLOCK)


def read_content(path: Path) -> FileContent:
    """Read a file once, from its beginning to its end; raises OSError where that fails."""
    whole, blocks, size = hashlib.sha256(), bytearray(), 0
    with path.open("rb", buffering=0) as file:
        while block := _block(file.fileno(), size):
            whole.update(block)
            blocks += _digest(block)
            size += len(block)
    return FileContent(path, size, whole.hexdigest(), bytes(blocks))


class _Compared(io.RawIOBase):
    """A file as a raw stream, block by block as it was."""

    def __init__(self, content: FileContent, error: type[KscliError]) -> None:
        self._content = content
        self._error = error
        self._file = content.path.open("rb", buffering=0)
        self._at = 0
        self._number, self._block = -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._content.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._at, BLOCK)
        if number != self._number:
            self._number, self._block = number, self._compared(number)
        part = self._block[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _compared(self, number: int) -> bytes:
        block = _block(self._file.fileno(), number * BLOCK)
        held = self._content.blocks[number * _DIGEST : (number + 1) * _DIGEST]
        if (_digest(block) if block else b"") != held:
            raise self._error(
                f"{self._content.path} changed while it was read; run the command again when "
                "nothing writes to it any more."
            )
        return block

    def close(self) -> None:
        self._file.close()
        super().close()


def _block(file: int, start: int) -> bytes:
    """A block of an open file; shorter at its end only."""
    block = b""
    while len(block) < BLOCK and (more := os.pread(file, BLOCK - len(block), start + len(block))):
        block += more
    return block


def _digest(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=_DIGEST).digest()
