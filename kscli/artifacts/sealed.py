"""Files that show every change: HDF5 for other programs, read by kscli through their seal.

A sealed file is an HDF5 file whose datasets are contiguous and whose last dataset, the text
`seal`, says in JSON what the file holds: its attributes, and of every array its type, its shape,
where it begins and the SHA-256 of its blocks of `BLOCK` bytes. One more SHA-256 is of all bytes
that belong to no array: HDF5's own structure. The seal ends with a line that gives its length and
its own SHA-256, and is found by that line.

kscli reads the seal and the arrays, with plain reads, and never the HDF5 structure: no link,
external storage, virtual dataset, reference or filter of a file is looked at, and no byte of one
reaches the HDF5 library. A digest is no signature: it shows damage, not who wrote a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts.threads import in_threads
from kscli.errors import ArtifactError, LockedError, UsageError
from kscli.files import require_ordinary

FORMAT_VERSION = 2
SEAL = "seal"
BLOCK = 1 << 20
# Files up to this size are checked whole when they are opened, larger ones as they are read.
WHOLE = 64 << 20
# How far from its end a file is searched for its seal: HDF5 may put some of its own behind it.
TAIL = 64 << 10
HDF5 = b"\x89HDF\r\n\x1a\n"

_LAST_LINE = re.compile(rb"\nkscli seal (\d{1,9}) (\d{12}) ([0-9a-f]{64})\n")
_TYPE = re.compile(r"<f[248]|<i[248]|\|b1|\|S[1-9]\d{0,9}")
_DIGEST = re.compile("[0-9a-f]{32}")


class SealError(ValueError):
    """What is wrong with a seal, as the end of a sentence that begins with the file."""


def digest(data: bytes | memoryview | bytearray) -> str:
    """128 bits of SHA-256 (hex) of a block."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class Held:
    """An array as the seal declares it: NumPy's name of its type, its shape, where it begins.

    It has `parts` parts of one size, 1 or as many as its first axis is long; `blocks` are the
    digests of the blocks of one part after the other.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    parts: int
    blocks: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its entries; UTF-8 text is `S` and a length."""
        return np.dtype(self.type)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        """How many bytes a part takes."""
        return self.nbytes // max(1, self.parts)

    @property
    def part_blocks(self) -> int:
        """How many blocks a part has."""
        return -(-self.part_bytes // BLOCK)

    def start_of(self, block: int) -> int:
        """The byte of the array at which a block begins."""
        part, number = divmod(block, self.part_blocks)
        return part * self.part_bytes + number * BLOCK

    def block_at(self, byte: int) -> int:
        """The block that holds a byte of the array."""
        part, rest = divmod(byte, self.part_bytes)
        return part * self.part_blocks + rest // BLOCK


@dataclass(frozen=True)
class Seal:
    """What a sealed file says of itself; `rest` is the SHA-256 of what belongs to no array."""

    attributes: Mapping[str, Any]
    arrays: Mapping[str, Held]
    rest: str

    def text(self) -> bytes:
        """The seal as it stands in the file."""
        held = {name: asdict(array) for name, array in self.arrays.items()}
        parts = {"attributes": dict(self.attributes), "arrays": held, "rest": self.rest}
        data = json.dumps(parts).encode()
        own = hashlib.sha256(data).hexdigest()
        return data + f"\nkscli seal {FORMAT_VERSION} {len(data):012d} {own}\n".encode()


class SealedFile:
    """A sealed file, opened for reading; a context manager.

    Every byte that is read is compared with its digest first. Raises ArtifactError, naming the
    file and what of it was changed, and when the file is missing, is of another format, or is
    open for writing in another program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open(path)
        try:
            self._size = os.fstat(self._fd).st_size
            self._seal, self._seal_at = self._found()
            if self._size <= WHOLE:
                for name in self.arrays:
                    self.check(name)
            if self._rest() != self._seal.rest:
                raise self._changed("the structure of the HDF5 file")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes, plain values by name."""
        return self._seal.attributes

    @property
    def arrays(self) -> Mapping[str, Held]:
        """What arrays there are, by name."""
        return self._seal.arrays

    def check(self, name: str) -> None:
        """Compare a whole array with its digests; raises ArtifactError where it was changed."""

        def compare(number: int) -> None:
            self._block(name, number)

        in_threads(compare, range(len(self.arrays[name].blocks)))

    def read(self, name: str) -> NDArray[Any]:
        """A whole array, text as Python strings."""
        held = self.arrays[name]
        if held.dtype.kind != "S":
            out = np.empty(held.shape, held.dtype)
            self.read_into(name, 0, out)
            return out
        data = np.empty(held.nbytes, np.uint8)
        self.read_into(name, 0, data)
        texts = [value.decode() for value in data.view(held.dtype).tolist()]
        return np.array(texts, dtype=object).reshape(held.shape)

    def read_into(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Read entries of an array, from `start` on in C order, into `out`, which is contiguous.

        They are converted to the type of `out`; text is read as bytes.
        """
        held = self.arrays[name]
        unit = np.dtype(np.uint8) if held.dtype.kind == "S" else held.dtype
        flat, item = out.reshape(-1), unit.itemsize
        first, last = start * item, (start + flat.size) * item

        def fetch(number: int) -> None:
            begin = held.start_of(number)
            data = np.frombuffer(self._block(name, number), unit)
            low, high = max(first, begin), min(last, begin + data.nbytes)
            flat[(low - first) // item : (high - first) // item] = data[
                (low - begin) // item : (high - begin) // item
            ]

        if flat.size:
            in_threads(fetch, range(held.block_at(first), held.block_at(last - 1) + 1))

    def _block(self, name: str, number: int) -> bytearray:
        """A block of an array, once its digest is the right one."""
        held = self.arrays[name]
        part, block = divmod(number, held.part_blocks)
        size = min(BLOCK, held.part_bytes - block * BLOCK)
        data = self._bytes(held.offset + held.start_of(number), size)
        if digest(data) != held.blocks[number]:
            layers = self.arrays.get("layer")
            where = f"its dataset {name}"
            if layers and name != "layer" and held.parts == math.prod(layers.shape) != 1:
                where += f", layer {self.read('layer')[part]}"
            raise self._changed(where)
        return data

    def _bytes(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise ArtifactError(f"{self.path} cannot be read: {error.strerror}.") from error
            if not count:
                raise self._changed("its length")
            done += count
        return data

    def _rest(self) -> str:
        """The SHA-256 of all bytes that belong to no array and not to the seal."""
        return digest_of_rest(self.arrays.values(), self._seal_at, self._size, self._bytes)

    def _found(self) -> tuple[Seal, tuple[int, int]]:
        """The seal, where it begins, and how long it is."""
        begin = max(0, self._size - TAIL)
        tail = self._bytes(begin, self._size - begin)
        lines = list(_LAST_LINE.finditer(tail))
        if not lines:
            raise ArtifactError(self._without_seal())
        line = lines[-1]
        if int(line[1]) != FORMAT_VERSION:
            raise ArtifactError(
                f"{self.path} has format {int(line[1])}; this kscli reads format "
                f"{FORMAT_VERSION}. Upgrade kscli."
            )
        length = int(line[2])
        start = begin + line.start() - length
        if start < 0:
            raise self._changed("its seal")
        data = self._bytes(start, length)
        if hashlib.sha256(data).hexdigest().encode() != line[3]:
            raise self._changed("its seal")
        try:
            seal = _parsed(data, self._size)
        except SealError as error:
            raise ArtifactError(
                f"{self.path} is damaged or was not made by kscli: {error}; make it again."
            ) from error
        return seal, (start, length + len(line[0]))

    def _without_seal(self) -> str:
        head = bytes(self._bytes(0, min(9, self._size)))
        if not head.startswith(HDF5):
            return f"{self.path} is not an HDF5 file, or is truncated."
        # Format 1 had HDF5's first superblock, format 2 has a later one.
        if head[8:] == b"\0":
            return (
                f"{self.path} is of format 1, which this kscli does not read, or is an HDF5 file "
                "but not one of kscli's; make it again."
            )
        return (
            f"{self.path} was changed or truncated after it was written, or is not one of "
            "kscli's; make it again."
        )

    def _changed(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is damaged: {what} was changed after it was written; make it again, or "
            "copy it anew."
        )


def digest_of_rest(
    arrays: Iterable[Held],
    seal_at: tuple[int, int],
    size: int,
    read: Callable[[int, int], bytes | bytearray],
) -> str:
    """The SHA-256 of all bytes of a file of `size` bytes but the arrays' and the seal's.

    The seal is given, and `read` asked, by where bytes begin and how many they are.
    """
    found = hashlib.sha256()
    at = 0
    taken = [*((held.offset, held.nbytes) for held in arrays), seal_at]
    for start, length in [*sorted(taken), (size, 0)]:
        for begin in range(at, start, BLOCK):
            found.update(read(begin, min(BLOCK, start - begin)))
        at = max(at, start + length)
    return found.hexdigest()


def _open(path: Path) -> int:
    """The file's descriptor; a shared lock is held on it where the file system has locks."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name an HDF5 file.")
    require_ordinary(path, ArtifactError)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LockedError(
            f"{path} is open for writing in another program, which locks it; close it there."
        ) from error
    except OSError:
        pass  # Some network file systems have no locks.
    return fd


def _parsed(data: bytes | bytearray, size: int) -> Seal:
    """The seal of a file of `size` bytes; raises SealError where it is not as it should be."""
    try:
        held = json.loads(data)
        attributes, arrays, rest = held["attributes"], held["arrays"], held["rest"]
        if not (isinstance(attributes, dict) and isinstance(rest, str)):
            raise TypeError
        return Seal(attributes, {name: _held(name, arrays[name], size) for name in arrays}, rest)
    except SealError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise SealError("its seal is not understood") from error


def _held(name: str, held: Any, size: int) -> Held:
    """An array of the seal, once it can be in a file of `size` bytes."""
    if not _TYPE.fullmatch(held["type"]):
        raise SealError(f"its dataset {name} is of the type {held['type'][:20]!r}")
    numbers = [held["offset"], held["parts"], *held["shape"]]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise SealError(f"its dataset {name} has no shape")
    array = Held(
        held["type"],
        tuple(held["shape"]),
        held["offset"],
        held["parts"],
        tuple(held["blocks"]),
    )
    if array.offset + array.nbytes > size:
        raise SealError(
            f"its dataset {name} is {array.shape} of {array.type}, more than the file holds"
        )
    whole = array.parts == 1 or array.shape[:1] == (array.parts,)
    if (
        not whole
        or len(array.blocks) != array.parts * array.part_blocks
        or not all(map(_DIGEST.fullmatch, array.blocks))
    ):
        raise SealError(f"its dataset {name} has not the digests that it needs")
    return array
