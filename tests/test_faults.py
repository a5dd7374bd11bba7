"""Damaged and hostile files: the short form of `tests/faults/run.py`, and that it finds faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent / "faults" / "run.py"


def test_the_short_form_finds_no_fault() -> None:
    done = subprocess.run([sys.executable, RUN, "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| bit flips, checkpoint | 3 | 3 | 0 | 0 | 0 | 0 |" in done.stdout
