"""Running the command line as a user does, in a process of its own or in this one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import fork_kit
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parent.parent


def kscli(*arguments: str | Path) -> Result:
    """Run a command in this process; stdout and stderr apart."""
    from kscli.cli.app import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="kscli")


def kscli_process(
    *arguments: str | Path, cwd: Path | None = None, text: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, a fork of one with everything imported."""
    command = ["-m", "kscli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return fork_kit.run(command, env=env, cwd=cwd, text=text)


def one_sentence(stderr: str) -> str:
    """The error at the end of stderr, which must be a line or two and no traceback."""
    lines = stderr.strip().splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    error = lines[first:]
    assert 1 <= len(error) <= 2, stderr
    assert "Traceback" not in stderr
    return " ".join(error)
