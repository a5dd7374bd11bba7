"""The paper's claims about P layer by layer, with 95 % intervals from resampled facts.

    python tests/benchmarks/claims.py PMATRIX [REPEATS]

Prints Markdown: the mean and the kurtosis of P off the diagonal, and the most frequent angle
between two keys in the whitening and in the activation space. A repeat of the angles weights the
pair i < j with how often i and j were drawn, so that a fact never pairs with its own copy; the
mode of every repeat has a bandwidth of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.angles import angles, mode
from kscli.analysis.density import make_curve
from kscli.analysis.resampling import interval, resample_counts
from kscli.analysis.statistics import describe
from kscli.artifacts import MatrixName, PMatrixFile

BOUNDS = (0.0, 180.0)


def modes(cosine: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """The most frequent angle in degrees, and the ends of its interval."""
    values = angles(cosine)
    first, second = np.triu_indices(len(cosine), 1)
    repeats = [
        mode(make_curve(np.repeat(values, drawn[first] * drawn[second]), BOUNDS))
        for drawn in counts
    ]
    ends = interval(np.array(repeats))
    return mode(make_curve(values, BOUNDS)), ends.low, ends.high


def cell(values: tuple[float, float, float], spec: str) -> str:
    """An estimate and its interval."""
    at, low, high = (format(value, spec) for value in values)
    return f"{at} [{low}, {high}]"


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    print("| layer | mean | kurtosis | whitened angle, ° | raw angle, ° |")
    print("|---:|---:|---:|---:|---:|")
    with PMatrixFile(Path(sys.argv[1])) as file:
        m = len(file.facts)
        counts, few = resample_counts(m), resample_counts(m, repeats)
        for layer in file.layers:
            found = describe(file.matrix("P", layer), file.token_id, counts)
            cells = [
                cell((found[name], found[f"{name}_low"], found[f"{name}_high"]), spec)
                for name, spec in (("mean", ".3f"), ("kurtosis", ".1f"))
            ]
            spaces: tuple[MatrixName, ...] = ("whitened_cosine", "cosine")
            for space in spaces:
                cells.append(cell(modes(file.matrix(space, layer), few), ".1f"))
            print(f"| {layer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
