"""How a long computation tells its caller what it is doing, and what is not told.

The library calls a `Reporter`; by default nothing is shown. The command line
hands in one that draws progress bars on a terminal (`kscli.cli.console`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class Task:
    """One measured piece of work; `advance` says how much more is done."""

    def advance(self, amount: float = 1.0, status: str = "") -> None:
        """Add `amount` to what is done; `status` replaces the text beside the bar."""

    def reach(self, done: float, total: float | None, status: str = "") -> None:
        """Say how much is done, of how much as far as is known by now (None: unknown)."""


class Reporter:
    """Receives progress, notes and warnings; this base class ignores them."""

    @contextmanager
    def task(
        self, label: str, total: float | None = None, unit: str = "", done: float = 0.0
    ) -> Iterator[Task]:
        """Open a task of `total` units (None: unknown), `done` of them before, and close it."""
        yield Task()

    def note(self, text: str) -> None:
        """Say something that the user may want to know."""

    def warn(self, text: str) -> None:
        """Say something that the user must know for the result to be read rightly."""


SILENT = Reporter()


@contextmanager
def silenced(library: str) -> Iterator[None]:
    """Keep a library's logs, and all warnings, off the terminal; what matters is raised."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
