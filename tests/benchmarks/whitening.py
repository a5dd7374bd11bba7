"""One layer of d_m 16,384 (GPT-J's): seconds and peak memory of reading C and computing P.

    python tests/benchmarks/whitening.py [--d-m 16384]

Prints the seconds, the process's peak memory, and for scale the rate of a plain float64
matrix product in the same process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from kscli.artifacts import CovarianceAbout, CovarianceFile, write_artifact
from kscli.pmatrix import superposition

FACTS = 128
BLOCK = 1024


def write_random_c(path: Path, d_m: int, layers: int = 1) -> None:
    """A cov.h5 of so many equal layers, each a symmetric matrix with a heavy diagonal."""
    about = CovarianceAbout(
        **dict.fromkeys(("model", "model_id", "weights", "tokenizer"), "bench"),
        **dict.fromkeys(("revision", "dtype", "device", "special_tokens", "corpus"), "bench"),
        hook="h.{}.mlp",
        d_m=d_m,
        n_layers=layers,
        corpus_identity=None,
        documents=None,
        max_length=None,
    )
    basis = np.random.default_rng(0).standard_normal((d_m, 64)).astype(np.float32)
    C = np.empty((d_m, d_m), np.float32)
    for start in range(0, d_m, BLOCK):
        rows = slice(start, start + BLOCK)
        C[rows, : start + BLOCK] = basis[rows] @ basis[: start + BLOCK].T
        C[: start + BLOCK, rows] = C[rows, : start + BLOCK].T
        C[rows, rows] = np.tril(C[rows, rows]) + np.tril(C[rows, rows], -1).T
    C.flat[:: d_m + 1] += 4
    with write_artifact(path, "cov", about, force=True) as writer:
        writer.layers(range(layers))
        writer.write("count", 20 * d_m)
        for index in range(layers):
            writer.put("second_moment", index, C)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-m", type=int, default=16384)
    d_m = parser.parse_args().d_m
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cov.h5"
        write_random_c(path, d_m)
        keys = np.random.default_rng(1).standard_normal((FACTS, d_m))
        start = time.perf_counter()
        with CovarianceFile(path) as cov:
            C = cov.second_moment(0)
            read = time.perf_counter() - start
            result = superposition(C, cov.count, keys)
        total = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        del C
    square = np.random.default_rng(2).standard_normal((2048, 2048))
    start = time.perf_counter()
    _ = square @ square
    rate = 2 * 2048**3 / (time.perf_counter() - start) / 1e9
    print(f"d_m {d_m}: {total:.1f} s (reading {read:.1f} s), peak {peak:.2f} GiB")
    print(f"condition {result.condition:.3g}; a float64 product here runs at {rate:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
