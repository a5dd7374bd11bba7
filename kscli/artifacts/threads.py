"""Work on large arrays in threads: reading, hashing and NumPy's loops release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Two a core: while one waits for the disk another one hashes.
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def in_threads(do: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What `do` gives for every item, in their order; the first error ends it."""
    if len(items) < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            return list(pool.map(do, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
