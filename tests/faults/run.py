"""What kscli does with damaged and hostile files, full disks and kills.

    python tests/faults/run.py            # the long form: hours
    python tests/faults/run.py --short    # what CI runs, in under a minute: no kills, no full disks
    python tests/faults/run.py flips structure --count 400

It prints a table: how many faults were tried and survived; how many gave a wrong result, lost a
file, ended in a traceback, or ended the process by a signal or a hang. Survived means: refused in
a sentence, or nothing came out otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import damage
import fuzzing
import interruptions
from sandbox import Artifacts, Tally, make_artifacts, table

Suite = Callable[[Artifacts, int, Path], Iterable[Tally]]

# A suite, and how many faults it tries in the long form and in the short one.
SUITES: dict[str, tuple[Suite, int, int]] = {
    "flips": (damage.flips, 400, 3),
    "structure": (damage.structure, 600, 6),
    "truncations": (damage.truncations, 100, 2),
    "text": (fuzzing.text, 100_000, 25),
    "config": (fuzzing.config, 100_000, 25),
    "binary": (fuzzing.binary, 10_000, 8),
    "kills": (interruptions.kills, 50, 0),
    "disks": (interruptions.disks, 10, 0),
}


def run(names: list[str], count: int | None = None, *, short: bool = False) -> list[Tally]:
    """The tallies of the suites of these names."""
    found = []
    with tempfile.TemporaryDirectory(prefix="kscli-faults-") as folder:
        artifacts = make_artifacts(Path(folder) / "sound")
        for name in names:
            suite, long, few = SUITES[name]
            tries = count or (few if short else long)
            for tally in suite(artifacts, tries, Path(folder) / "try") if tries else ():
                print(table([tally]).splitlines()[2], file=sys.stderr, flush=True)
                found.append(tally)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], metavar="|".join(SUITES))
    parser.add_argument("--count", type=int, help="how many faults a suite tries of a kind")
    parser.add_argument("--short", action="store_true", help="the short form, as CI runs it")
    given = parser.parse_args()
    tallies = run(given.suites or list(SUITES), given.count, short=given.short)
    print(table(tallies))
    sys.exit(any(tally.bad for tally in tallies))
