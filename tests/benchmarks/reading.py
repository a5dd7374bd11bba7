"""How fast C is read through its seal, against plain reads of the same file.

    python tests/benchmarks/reading.py [--d-m 8192] [--layers 12]

A cov.h5 is made, and its layers are read cold: in turn one with plain reads and one by
`CovarianceFile.second_moment`, which compares every byte with its digest and every entry with
what C must be. Prints the rate of both, their ratio, and the processor seconds a GB.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from whitening import write_random_c

from kscli.artifacts import CovarianceFile, SealedFile

AT_ONCE = 1 << 20


def plain_read(path: Path, offset: int, size: int) -> None:
    """Read a part of a file into one buffer, and drop what was read."""
    buffer = memoryview(bytearray(AT_ONCE))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size > 0:
            size -= file.readinto(buffer[: min(size, AT_ONCE)])


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-m", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cov.h5"
        write_random_c(path, given.d_m, given.layers)
        with SealedFile(path) as sealed:
            held = sealed.arrays["second_moment"]
        forget(path)
        plain: list[tuple[float, float]] = []
        checked: list[tuple[float, float]] = []
        with CovarianceFile(path) as cov:
            for layer in range(0, given.layers - 1, 2):
                start = held.offset + layer * held.part_bytes
                plain.append(seconds(lambda start=start: plain_read(path, start, held.part_bytes)))
                checked.append(seconds(lambda layer=layer: cov.second_moment(layer + 1)))
    gigabytes = held.part_bytes / 1e9
    for name, measured in (("plain reads", plain), ("through the seal", checked)):
        walls, processors = (sorted(each) for each in zip(*measured, strict=True))
        wall, processor = walls[len(walls) // 2], processors[len(processors) // 2]
        print(
            f"{name}: {gigabytes / wall:.2f} GB/s ({gigabytes / walls[-1]:.2f} to "
            f"{gigabytes / walls[0]:.2f}), {processor / gigabytes:.2f} processor s a GB"
        )
    print(f"ratio of the walls: {sum(c for c, _ in checked) / sum(p for p, _ in plain):.2f}")


if __name__ == "__main__":
    main()
