"""What a person sees on stderr: progress bars on a terminal, notes, warnings, errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from kscli.cli.stderr import for_rich
from kscli.escaping import escaped
from kscli.reporter import Reporter, Task

if TYPE_CHECKING:
    from rich.progress import Progress


BAR_SHARE = 6
"""A bar takes one of so many parts of the terminal."""
LINE_SECONDS = 60.0
"""Where there is no terminal, as in a job's log, a long task says so often how far it is."""


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
        """A progress bar while the block runs, on a terminal or in a notebook; elsewhere lines."""
        if self.quiet:
            yield Task()
            return
        if not (self.console.is_terminal or _in_notebook(self.console)):
            yield _LineTask(self, label, total, unit, done)
            return
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=self.console.width // BAR_SHARE),
            TextColumn("{task.fields[done]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[status]}", markup=False, table_column=rest),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as progress:
            yield _BarTask(progress, escaped(label), total, unit, done)

    def note(self, text: str) -> None:
        """Print a line unless quiet."""
        if not self.quiet:
            self.console.print(escaped(text), markup=False)

    def warn(self, text: str) -> None:
        """Print a line that begins with `warning:`."""
        self.console.print(_headed("warning:", "yellow", text))


def _in_notebook(console: Console) -> bool:
    """Whether a console is a notebook's, and Rich has the widgets that a bar in it takes."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class _TimedTask(Task):
    """Knows how much is done, and since when; `_show` is told of each step."""

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self._unit = unit
        self._before = self._done = done
        self._total = total
        self._began = time.monotonic()

    def advance(self, amount: float = 1.0, status: str = "") -> None:
        self.reach(self._done + amount, self._total, status)

    def reach(self, done: float, total: float | None, status: str = "") -> None:
        self._done, self._total = done, total
        self._show(status)

    def _show(self, status: str) -> None:
        raise NotImplementedError

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        newly = self._done - self._before
        return progress_text(self._done, self._total, self._unit, newly, seconds)


class _BarTask(_TimedTask):
    def __init__(
        self, progress: Progress, label: str, total: float | None, unit: str, done: float
    ) -> None:
        super().__init__(total, unit, done)
        self._progress = progress
        self._id = progress.add_task(label, total=total, completed=int(done), done="", status="")

    def _show(self, status: str) -> None:
        self._progress.update(
            self._id,
            completed=self._done,
            total=self._total,
            done=self._text(),
            status=escaped(status),
        )


class _LineTask(_TimedTask):
    """A note every `LINE_SECONDS`: a log shows that a long task goes on, a short one nothing."""

    def __init__(
        self, reporter: Reporter, label: str, total: float | None, unit: str, done: float
    ) -> None:
        super().__init__(total, unit, done)
        self._reporter, self._label = reporter, label
        self._said = self._began

    def _show(self, status: str) -> None:
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            self._reporter.note(f"{self._label}: {', '.join(filter(None, (self._text(), status)))}")


def progress_text(done: float, total: float | None, unit: str, newly: float, seconds: float) -> str:
    """How much is done, the rate, and the time left, of which `newly` was done in `seconds`.

    The rate is that of the whole time, and so is the time left that follows from it.
    """
    of = f"/{total:,.0f}" if total is not None else ""
    parts = [f"{done:,.0f}{of} {unit}".rstrip()]
    if newly > 0 and seconds > 0:
        rate = newly / seconds
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if total is not None:
            parts.append(f"{clock(max(total - done, 0) / rate)} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """A time as `0:42` or `3:05:00`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def print_error(text: str) -> None:
    """Print an error as one paragraph on stderr."""
    stderr_console().print(_headed("error:", "red", text))


def _headed(head: str, style: str, text: str) -> Text:
    return Text.assemble((head, style), " ", escaped(text))
