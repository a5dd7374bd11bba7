"""Compare what two commits of kscli give: every command's output, artifact and figure's data.

Usage: python tests/benchmarks/same_results.py OLD NEW [--model MODEL] [--keep FOLDER]

OLD and NEW are two checkouts, such as those of `git worktree add ../old COMMIT`. Every command of
`COMMANDS` is run in both, on MODEL (default: tiny), with one thread. A line is printed for each:
`same`, or what differs. The data of a figure are those of its lines, images, areas, markers and
bars. Exit code 1 says that something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# What depends on the clock or on the machine's load, and no result.
UNSTABLE = {"seconds", "tokens_per_second", "command", "created", "kscli_version", "fingerprint"}
HELD_OUT = "\n\n".join(f"The {n}th house of the street has {n + 2} doors." for n in range(40))
FORMATS = ("table", "json", "csv", "tsv", "markdown", "latex")

# Runs a command of the tree on PYTHONPATH; each figure saved is also written as numbers.
DRAW = """
import json, sys
from matplotlib.figure import Figure
save, dumped = Figure.savefig, []

def numbers(values):
    import numpy as np
    return np.asarray(np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)).round(12).tolist()

def data(axes):
    return {
        "lines": [numbers(line.get_xydata()) for line in axes.lines],
        "images": [numbers(image.get_array()) for image in axes.images],
        "bars": [numbers(patch.get_path().vertices) for patch in axes.patches],
        "areas": [[numbers(path.vertices) for path in c.get_paths()] + [numbers(c.get_offsets())]
                  for c in axes.collections],
    }

def dump(figure, name, *arguments, **options):
    dumped.append([held for held in map(data, figure.axes) if any(held.values())])
    return save(figure, name, *arguments, **options)

Figure.savefig = dump
from kscli.cli.app import app
try:
    app(sys.argv[1:], prog_name="kscli")
finally:
    print(json.dumps(dumped))
"""


def commands(model: str, facts: str, corpus: str) -> list[tuple[str, list[str]]]:
    """Name and arguments of every run, in an order in which each finds the files it reads."""
    text = ["--corpus", corpus, "--tokens", "3000", "--max-length", "256"]
    fp32 = ["--dtype", "float32"]
    m = ["-m", model]
    parts = Path("artifacts") / Path(model).name
    stages = [
        ("models", ["models", "-f", "json"]),
        ("cache-cov", ["cache-cov", *m, *text, *fp32]),
        ("dry-run", ["cache-cov", *m, *text, *fp32, "--dry-run", "-f", "json"]),
        ("shard 0", ["cache-cov", *m, *text, *fp32, "--shard", "0/2"]),
        ("shard 1", ["cache-cov", *m, *text, *fp32, "--shard", "1/2"]),
        ("merge-cov", ["merge-cov", *m, "-o", "merged.h5"]),
        ("small memory", ["cache-cov", *m, *text, *fp32, "--batch-tokens", "300", "-o", "b.h5"]),
        ("settled", ["cache-cov", *m, *text, *fp32, "--until-settled", "0.5", "-o", "s.h5"]),
        ("extract", ["extract", *m, "--facts", facts, "--count", "48", *fp32]),
        (
            "subject-first",
            [
                "extract",
                *m,
                "--facts",
                facts,
                "--count",
                "9",
                *fp32,
                "--token",
                "subject-first",
                "-o",
                "first.h5",
            ],
        ),
        ("pmatrix", ["pmatrix", *m]),
        *(
            (
                f"half {i}",
                [
                    "pmatrix",
                    *m,
                    "--cov",
                    str(parts / f"cov.shard-{i}-of-2.h5"),
                    "-o",
                    f"half{i}.h5",
                ],
            )
            for i in (0, 1)
        ),
        ("ridge", ["pmatrix", *m, "--ridge", "0.01", "-o", "ridge.h5"]),
        (
            "facts check",
            ["facts", "check", *m, "--facts", facts, "--count", "48", *fp32, "-f", "json"],
        ),
        ("facts select", ["facts", "select", model, "--count", "5", "-f", "json"]),
        ("export", ["export-cov", *m, "--for", "rome", "-o", "npz"]),
        ("import", ["import-cov", "npz", *m, "-o", "imported.h5"]),
    ]
    reading: list[list[str]] = [
        ["stats", *m],
        ["stats", "--pmatrix", "half0.h5", "--against", "half1.h5"],
        ["topk", *m, "--layer", "0"],
        ["topk", *m, "--layer", "all", "-k", "4", "--abs"],
        ["topk", *m, "--strongest", "--distinct-token"],
        ["relations", *m, "--permutations", "50"],
        ["risk", *m, "--fact", "3"],
        ["risk", *m, "--edits", "6"],
        ["risk", *m, "--fact", "3", "--fact", "4", "--by-layer"],
    ]
    edit = ["edit", *m, *fp32, "--moved", "4", "-f", "json"]
    edits = [
        ("edit rome", [*edit, "--edits", "3", "--layer", "0", "--steps", "6"]),
        (
            "edit held-out",
            [
                *edit,
                "--fact",
                "3",
                "--layer",
                "1",
                "--held-out",
                "held-out.txt",
                "--held-out-tokens",
                "500",
            ],
        ),
        (
            "edit memit",
            [*edit, "--method", "memit", "--layers", "0,1", "--edits", "4", "--batch", "2"],
        ),
        (
            "edit single",
            [
                *edit,
                "--protocol",
                "single",
                "--edits",
                "3",
                "--layer",
                "0",
                "--value",
                "random",
                "-o",
                "single.h5",
            ],
        ),
    ]
    after: list[list[str]] = [["verify", *m], ["verify", *m, "--predictors"]]
    return (
        stages
        + [(f"{' '.join(a)} -f {f}", [*a, "-f", f]) for a in reading for f in FORMATS]
        + edits
        + [(f"{' '.join(a)} -f {f}", [*a, "-f", f]) for a in after for f in FORMATS]
        + [("report", ["report", *m])]
        + [("show", ["show", model, "-f", "json"])]
    )


def figures(tree: Path, model: str) -> list[tuple[str, list[str]]]:
    """A run of `plot` for every kind that the tree has."""
    code = "from kscli.figures import KINDS; print(*KINDS)"
    kinds = run(tree, tree, ["-c", code]).stdout.split()
    two = {"angles": [], "heatmap": ["--layer", "0,1"], "kde": ["--mark-same-token"]}
    return [(f"plot {k}", ["plot", k, "-m", model, *two.get(k, [])]) for k in kinds] + [
        ("plot heatmap --grid", ["plot", "heatmap", "-m", model, "--grid", "-o", "grid.pdf"])
    ]


def run(tree: Path, folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of `tree`, in `folder`."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def results(tree: Path, folder: Path, model: str, facts: str, corpus: str) -> dict[str, str]:
    """What every command prints, by name, after its exit code."""
    folder.mkdir(parents=True)
    (folder / "held-out.txt").write_text(HELD_OUT)
    printed = {}
    for name, arguments in commands(model, facts, corpus):
        done = run(tree, folder, ["-m", "kscli", *arguments])
        printed[name] = f"{done.returncode}\n{done.stdout}"
        (folder / "stderr.txt").open("a").write(f"== {name}\n{done.stderr}\n")
    for name, arguments in figures(tree, model):
        done = run(tree, folder, ["-c", DRAW, *arguments])
        printed[name] = f"{done.returncode}\n{done.stdout}"
    return printed


def stable(value: Any) -> Any:
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in UNSTABLE}
    return [stable(v) for v in value] if isinstance(value, list) else value


def normal(text: str) -> str:
    """Output in the form that is compared."""
    try:
        return json.dumps(stable(json.loads(text.split("\n", 1)[1])), indent=1)
    except ValueError:
        return text


def datasets(path: Path) -> dict[str, Any]:
    """Every dataset of an HDF5 file."""
    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def compare_datasets(old: Path, new: Path) -> list[str]:
    """What differs between the datasets of two files, a sentence each."""
    if not new.exists():
        return ["not made"]
    a, b = datasets(old), datasets(new)
    said = [f"{name} only in one" for name in sorted(set(a) ^ set(b))]
    for name in sorted(set(a) & set(b)):
        x, y = np.asarray(a[name]), np.asarray(b[name])
        if x.shape != y.shape or x.dtype != y.dtype:
            said.append(f"{name}: {x.dtype}{x.shape} and {y.dtype}{y.shape}")
        elif x.dtype.kind in "fiu" and not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            gap = np.nanmax(np.abs(x.astype(float) - y.astype(float)))
            said.append(f"{name}: differs by up to {gap:.3g}")
        elif x.dtype.kind not in "fiu" and not (x == y).all():
            said.append(f"{name}: differs")
    return said


def first_difference(old: str, new: str) -> str:
    """The first lines that differ."""
    a, b = old.splitlines(), new.splitlines()
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return (
        f"line {at}: {a[at][:150] if at < len(a) else '(end)'!r}\n"
        + " " * 12
        + (f"now {b[at][:150] if at < len(b) else '(end)'!r}")
    )


def main() -> int:
    """Run all in both trees and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--facts", default="tiny")
    parser.add_argument("--corpus", default="tiny")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    root = given.keep or Path(tempfile.mkdtemp())
    trees = {"old": given.old.resolve(), "new": given.new.resolve()}

    def work(side: str) -> dict[str, str]:
        return results(trees[side], root / side, given.model, given.facts, given.corpus)

    with ThreadPoolExecutor() as pool:
        old, new = pool.map(work, trees)
    differing = 0
    for name in sorted(set(old) | set(new), key=[*old, *new].index):
        a, b = normal(old.get(name, "")), normal(new.get(name, ""))
        same = a == b
        differing += not same
        print(f"{'same' if same else 'DIFFERS':10}  {name}", "" if same else first_difference(a, b))
    for path in sorted((root / "old").rglob("*.h5")):
        name = path.relative_to(root / "old")
        said = compare_datasets(path, root / "new" / name)
        differing += bool(said)
        print(
            f"{'DIFFERS' if said else 'same':10}  {name}",
            *said,
            sep="\n            " if said else " ",
        )
    failed = [n for n, text in old.items() if not text.startswith("0\n")]
    print(f"{differing} differ; {len(failed)} failed already in OLD: {failed}")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
