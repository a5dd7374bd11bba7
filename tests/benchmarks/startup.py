"""Start-up: `kscli --help` against importing what it is built on, in turns.

    python tests/benchmarks/startup.py

Prints the medians of both, and their ratio pair by pair.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
HELP = [sys.executable, "-m", "kscli", "--help"]
BASE = [sys.executable, "-c", "import typer, rich, click"]


def seconds(command: list[str]) -> float:
    """Wall seconds of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    pairs = [(seconds(HELP), seconds(BASE)) for _ in range(ROUNDS)]
    ours, base = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"kscli --help {ours:.3f} s, the imports {base:.3f} s, ratio {ratio:.2f}")
    print(f"allowed: 1.5 x {base:.3f} + 0.15 = {1.5 * base + 0.15:.3f} s")


if __name__ == "__main__":
    main()
