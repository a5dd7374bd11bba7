"""How fast C is read through its seal, against plain reads of the same file.

    python tests/benchmarks/reading.py [--d-m 8192] [--layers 12]

A cov.h5 is made, and its layers are read cold, in turn: one with plain reads; one by
`SealedFile.read_into`, which compares every byte with its digest; and one by
`CovarianceFile.second_moment`, which also makes float64 of it and compares every entry with what
C must be. Prints the median rate of each, its range, the processor seconds a GB, and the rate at
which one core hashes, which bounds the others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from whitening import write_random_c

from kscli.artifacts import CovarianceFile, SealedFile
from kscli.artifacts.sealed import BLOCK, digest


def plain_read(path: Path, offset: int, size: int) -> None:
    """Read a part of a file into one buffer, and drop what was read."""
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size > 0:
            size -= file.readinto(buffer[: min(size, BLOCK)])


def forget(path: Path) -> None:
    """Let the system drop the file's pages, so that the next read is the disk's."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(do: Callable[[], object]) -> tuple[float, float]:
    """The wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - wall, time.process_time() - processor


def hashing(gigabytes: float = 0.25) -> float:
    """How many GB one core hashes in a second."""
    block = os.urandom(BLOCK)
    blocks = int(gigabytes * 1e9 / BLOCK)
    wall, _ = seconds(lambda: [digest(block) for _ in range(blocks)])
    return blocks * BLOCK / 1e9 / wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-m", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cov.h5"
        write_random_c(path, given.d_m, given.layers)
        forget(path)
        measured = measure(path)
        with SealedFile(path) as sealed:
            gigabytes = sealed.arrays["second_moment"].part_bytes / 1e9
    for name, taken in measured.items():
        walls, processors = (sorted(each) for each in zip(*taken, strict=True))
        wall, processor = walls[len(walls) // 2], processors[len(processors) // 2]
        print(
            f"{name}: {gigabytes / wall:.2f} GB/s ({gigabytes / walls[-1]:.2f} to "
            f"{gigabytes / walls[0]:.2f}), {processor / gigabytes:.2f} processor s a GB"
        )
    print(f"one core hashes {hashing():.2f} GB/s; {os.cpu_count()} cores")


def measure(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The wall and processor seconds of every way to read a layer, each layer read once."""
    found: dict[str, list[tuple[float, float]]] = {}
    with CovarianceFile(path) as cov, SealedFile(path) as sealed:
        held = sealed.arrays["second_moment"]
        entries = held.part_bytes // held.dtype.itemsize
        out = np.zeros(entries, held.dtype)
        ways: dict[str, Callable[[int], object]] = {
            "plain reads": lambda layer: plain_read(
                path, held.offset + layer * held.part_bytes, held.part_bytes
            ),
            "through the seal": lambda layer: sealed.read_into(
                "second_moment", layer * entries, out
            ),
            "as float64, its values checked": cov.second_moment,
        }
        for layer in range(held.parts):
            name = list(ways)[layer % len(ways)]
            found.setdefault(name, []).append(seconds(partial(ways[name], layer)))
    return found


if __name__ == "__main__":
    main()
