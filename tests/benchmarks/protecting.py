"""The time and memory that protection of many tokens takes, and its price.

    python tests/benchmarks/protecting.py [TOKENS] [D_M]

Keys are random, C is that of other such keys. Prints the seconds of `protect` and of the prices of
100 edits, and the peak of memory.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from kscli.editing.protection import prices, protect
from kscli.whitening import whitening


def main(tokens: int = 10_000, d_m: int = 4096) -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((d_m + d_m // 8, d_m))
    metric = whitening(text.T @ text / len(text), len(text))
    keys = rng.standard_normal((tokens, d_m))
    edited = keys[:100] + rng.standard_normal((100, d_m))
    start = time.perf_counter()
    protected = protect(metric, keys, 0.1)
    made = time.perf_counter()
    found = prices(metric, protected, edited, edited)
    priced = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{tokens:,} tokens, d_m {d_m:,}: {made - start:.1f} s to protect, ", end="")
    print(f"{priced - made:.1f} s for 100 prices (median {np.median(found):.1f}), {peak:.1f} GiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
