"""What a person sees on stderr: progress bars on a terminal, notes, warnings, errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from kscli.cli.stderr import for_rich
from kscli.escaping import escaped
from kscli.reporter import Reporter, Task

if TYPE_CHECKING:
    from rich.progress import Progress


def stderr_console() -> Console:
    """A console on stderr that wraps nothing when stderr is not a terminal."""
    return Console(file=for_rich(), highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty())


class ConsoleReporter(Reporter):
    """Reports on stderr; `quiet` leaves warnings only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = stderr_console()
        self.quiet = quiet

    @contextmanager
    def task(
        self, label: str, total: float | None = None, unit: str = "", done: float = 0.0
    ) -> Iterator[Task]:
        """A progress bar while the block runs, on a terminal only."""
        if self.quiet or not self.console.is_terminal:
            yield Task()
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _BarTask(progress, escaped(label), total, unit, done)

    def note(self, text: str) -> None:
        """Print a line unless quiet."""
        if not self.quiet:
            self.console.print(escaped(text), markup=False)

    def warn(self, text: str) -> None:
        """Print a line that begins with `warning:`."""
        self.console.print(_headed("warning:", "yellow", text))


class _BarTask(Task):
    def __init__(
        self, progress: Progress, label: str, total: float | None, unit: str, done: float
    ) -> None:
        self._progress = progress
        self._unit = unit
        self._done = done
        self._total = total
        self._id = progress.add_task(label, total=total, completed=int(done), done="", status="")

    def advance(self, amount: float = 1.0, status: str = "") -> None:
        self.reach(self._done + amount, self._total, status)

    def reach(self, done: float, total: float | None, status: str = "") -> None:
        self._done, self._total = done, total
        of = f"/{total:,.0f}" if total is not None else ""
        self._progress.update(
            self._id,
            completed=done,
            total=total,
            done=f"{done:,.0f}{of} {self._unit}",
            status=escaped(status),
        )


def print_error(text: str) -> None:
    """Print an error as one paragraph on stderr."""
    stderr_console().print(_headed("error:", "red", text))


def _headed(head: str, style: str, text: str) -> Text:
    return Text.assemble((head, style), " ", escaped(text))
