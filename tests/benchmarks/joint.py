"""One more joint edit after many: its time, and the memory that all of them take.

    python tests/benchmarks/joint.py [EDITS] [D_M]

Keys are random, and C has 0.5^|i - j| at (i, j). EDITS keys are protected at once, as so many edits
leave them; then single edits are made, each protected from then on. Prints the seconds of one, the
largest p of the last direction to the keys of ten earlier edits, and the peak of memory.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
from scipy.linalg import toeplitz

from kscli.editing.directions import edit_directions
from kscli.editing.protection import Sparing
from kscli.whitening import whitening

SINGLE = 10


def main(edits: int = 10_000, d_m: int = 16_384) -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    metric = Sparing(whitening(toeplitz(0.5 ** np.arange(d_m)), 10 * d_m))
    earlier = rng.standard_normal((edits, d_m))
    start = time.perf_counter()
    metric.add(earlier)
    added = time.perf_counter()
    for key in rng.standard_normal((SINGLE, 1, d_m)):
        direction = edit_directions(metric, key, at=key)
        metric.add(key)
    done = time.perf_counter()
    p = np.abs(direction @ earlier[:10].T).max()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"after {edits:,} edits, d_m {d_m:,} ({added - start:.0f} s): ", end="")
    print(f"{(done - added) / SINGLE:.2f} s an edit, p to earlier {p:.1e}, {peak:.1f} GiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
