"""Stages that are killed, or whose disk is full; what they made before must still be there."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox import Artifacts, Done, Tally, contents, kscli

# A stage: its command, and what it writes, in a folder with the sound files in `art`.
STAGES: dict[str, tuple[str, str]] = {
    "cache-cov": ("cache-cov --tokens 3000 --layers 0,3 -q -o out.h5", "out.h5"),
    "extract": ("extract --count 14 --layers 0,3 -q -o out.h5", "out.h5"),
    "pmatrix": ("pmatrix -q -o out.h5", "out.h5"),
    "stats": ("stats -q --repeats 100 -o out.h5", "out.h5"),
    "edit": ("edit --edits 2 --steps 2 -q -o out.h5", "out.h5"),
    "facts check": ("facts check --count 14 -q -o out.jsonl", "out.jsonl"),
    "facts select": ("facts select tiny --count all -q -o out.jsonl", "out.jsonl"),
    "export-cov": ("export-cov --for rome -q --force -o out", "out"),
    "import-cov": ("import-cov npz -m tiny -q -o out.h5", "out.h5"),
    "report": ("report -q --force -o out.html", "out.html"),
    "plot": ("plot heatmap --force -o out.png", "out.png"),
}


@dataclass(frozen=True)
class Undisturbed:
    """What a stage makes, how long it takes, and how large its largest file is."""

    made: bytes
    seconds: float
    size: int


def kills(artifacts: Artifacts, count: int, folder: Path) -> Iterator[Tally]:
    """Every stage killed `count` times at a moment drawn at random."""
    rng = random.Random(0)

    def disturb(stage: str, whole: Undisturbed) -> tuple[str, Done]:
        after = rng.uniform(0, whole.seconds)
        done = _run(stage, folder, after=after)
        # To be killed by this signal is what was wanted.
        code = 1 if done.code == -signal.SIGKILL else done.code
        return f"after {after:.2f} s", replace(done, code=code)

    return (_disturbed(artifacts, "kills", stage, disturb, count, folder) for stage in STAGES)


def disks(artifacts: Artifacts, count: int, folder: Path) -> Iterator[Tally]:
    """Every stage `count` times on a disk that has room for a part of its largest file only."""
    rng = random.Random(0)

    def disturb(stage: str, whole: Undisturbed) -> tuple[str, Done]:
        room = rng.randrange(whole.size)
        return f"{room} bytes", _run(stage, folder, most_bytes=room)

    return (_disturbed(artifacts, "full disks", stage, disturb, count, folder) for stage in STAGES)


def _disturbed(
    artifacts: Artifacts,
    name: str,
    stage: str,
    disturb: Callable[[str, Undisturbed], tuple[str, Done]],
    count: int,
    folder: Path,
) -> Tally:
    """Disturb a stage, and run it again where it did not come to its end.

    It is survived if no file that was there is another, and the second run makes what an
    undisturbed one makes: what the first one left is not in its way.
    """
    tally = Tally(f"{name}, {stage}")
    whole = _undisturbed(artifacts, stage, folder)
    for _ in range(count):
        _begin(artifacts, folder)
        what, first = disturb(stage, whole)
        last = _run(stage, folder) if first.code else first
        outcome = first.fault or last.fault or _lost(artifacts, folder)
        if outcome is None:
            outcome = "survived" if _made(folder, stage) == whole.made else "wrong"
        tally.add(outcome, f"{what}: {first.err.strip()[-200:]}; then {last.err.strip()[-200:]}")
    return tally


def _run(
    stage: str, folder: Path, *, after: float | None = None, most_bytes: int | None = None
) -> Done:
    line = STAGES[stage][0].split()
    return kscli(folder, *line, after=after, most_bytes=most_bytes)


def _begin(artifacts: Artifacts, folder: Path) -> None:
    """A folder with copies of the sound files, and none of a stage."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(artifacts.folder / "art", folder / "art")
    shutil.copytree(artifacts.folder / "npz", folder / "npz")


def _undisturbed(artifacts: Artifacts, stage: str, folder: Path) -> Undisturbed:
    if not (artifacts.folder / "npz").exists():
        done = kscli(artifacts.folder, *["export-cov", "--for", "rome", "-q", "-o", "npz"])
        assert done.code == 0, done
    _begin(artifacts, folder)
    began = time.monotonic()
    done = _run(stage, folder)
    seconds = time.monotonic() - began
    assert done.code == 0, (stage, done)
    path = folder / STAGES[stage][1]
    files = [path] if path.is_file() else path.rglob("*.npz")
    return Undisturbed(_made(folder, stage), seconds, max(each.stat().st_size for each in files))


def _made(folder: Path, stage: str) -> bytes:
    path = folder / STAGES[stage][1]
    if path.is_dir():
        return b"".join(each.read_bytes() for each in sorted(path.rglob("*.npz")))
    # A page says when it was made, and a figure by what.
    return b"whole" if path.suffix in (".html", ".png") and path.exists() else contents(path)


def _lost(artifacts: Artifacts, folder: Path) -> str | None:
    """`lost` where a file that was there before is no longer what it was."""
    for path in sorted((artifacts.folder / "art").rglob("*.*")):
        now = folder / path.relative_to(artifacts.folder)
        if path.is_file() and (not now.exists() or now.read_bytes() != path.read_bytes()):
            return "lost"
    return None
