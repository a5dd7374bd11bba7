"""How far P of one pmatrix.h5 is from P of another of the same facts, layer by layer.

    python tests/benchmarks/apart.py pmatrix.h5 other.h5

Off the diagonal: the root mean square of the difference, and the largest one. For two dtypes, for
example, whose keys differ too; `kscli stats --against` is for two C with the same keys.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kscli.artifacts import PMatrixFile


def main(path: str, other: str) -> None:
    with PMatrixFile(Path(path)) as a, PMatrixFile(Path(other)) as b:
        if a.facts != b.facts or a.layers != b.layers:
            raise SystemExit("the files differ in their facts or in their layers")
        off = ~np.eye(len(a.facts), dtype=bool)
        squares = []
        print("layer     rms  largest")
        for layer in a.layers:
            apart = (a.matrix("P", layer) - b.matrix("P", layer))[off]
            squares.append(np.mean(np.square(apart)))
            print(f"{layer:5}  {np.sqrt(squares[-1]):.4f}    {np.abs(apart).max():.3f}")
        print(f"  all  {np.sqrt(np.mean(squares)):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
