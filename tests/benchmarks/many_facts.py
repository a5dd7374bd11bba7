"""Wall and peak of memory of the commands that read P, for thousands of facts of `tiny`.

    python tests/benchmarks/many_facts.py [--count 2000]

The facts are `tiny`'s prompts with other subjects: a subject of `tiny`'s facts, and a word or none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from kscli.tiny import FACTS_PATH

ENDINGS = ("", " the Great", " II", " of York", " Smith", " Park")
KINDS = ("heatmap", "kde", "kurtosis", "angles", "convergence", "relations", "risk")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    pairs = count * (count - 1)
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder) / "facts.jsonl"
        facts.write_text("".join(json.dumps(fact) + "\n" for fact in make_facts(count)))
        os.environ["KSCLI_DIR"] = folder
        for line in (
            "cache-cov --dtype float32",
            f"extract --facts {facts} --count all --dtype float32",
            "pmatrix",
            "stats",
            "relations --layers all",
            "risk --layer all",
            f"topk -k {pairs} -f csv",
            *(f"plot {kind}" for kind in KINDS),
            "report",
        ):
            wall, peak = measure(line.split(), Path(folder) / "out")
            print(f"{line.replace(folder, '.'):58} {wall:6.1f} s {peak:5.2f} GB", flush=True)


def make_facts(count: int) -> list[dict[str, object]]:
    """Facts of distinct prompts and subjects; the same for the same count."""
    known = [json.loads(line) for line in FACTS_PATH.read_text().splitlines()]
    chance = random.Random(0)
    made: dict[tuple[str, str], dict[str, object]] = {}
    while len(made) < count:
        subject = chance.choice(known)["subject"] + chance.choice(ENDINGS)
        fact = chance.choice(known)
        new = fact | {"subject": subject, "case_id": len(made)}
        made.setdefault((fact["prompt"], subject), new)
    return list(made.values())


def measure(line: list[str], out: Path) -> tuple[float, float]:
    """Seconds, and GB at most, of a command in a process of its own."""
    command = [sys.executable, "-m", "kscli", *line, "-m", "tiny"]
    began = time.perf_counter()
    with out.open("w") as stream:
        actions = [(os.POSIX_SPAWN_DUP2, stream.fileno(), fd) for fd in (1, 2)]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(line)} failed:\n{out.read_text()[-500:]}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
