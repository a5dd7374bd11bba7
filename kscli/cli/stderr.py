"""Standard error as kscli writes to it: what it does not take is dropped, and text is only text.

Whoever writes to `sys.stderr`, Typer and Python's own tracebacks too, writes through `Stderr`. It
escapes what acts on a terminal, hides secrets, and costs no result where stderr is full or closed.
"""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import IO, cast

from kscli.escaping import escaped
from kscli.secrets import without_secrets


class Stderr(io.TextIOWrapper):
    """A stderr on which nothing fails, and no text acts; on the buffer of the `old` one."""

    def __init__(self, old: io.TextIOWrapper) -> None:
        super().__init__(
            old.buffer, encoding=old.encoding, errors="backslashreplace", line_buffering=True
        )
        self._old = old  # which would close the buffer where nobody held it

    def write(self, text: str) -> int:
        """Write text, escaped but for the ends of its lines and tabs."""
        self.write_styled(escaped(text, keep="\n\t"))
        return len(text)

    def write_styled(self, text: str) -> None:
        """Write text whose escapes are our own."""
        with suppress(OSError):
            super().write(without_secrets(text))

    def flush(self) -> None:
        """Write what is buffered, as far as that goes."""
        with suppress(OSError):
            super().flush()


class _Styled:
    """The standard error for Rich, which writes styles and moves the cursor."""

    def __init__(self, stream: Stderr) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write_styled(text)
        return len(text)


def install() -> None:
    """Put a `Stderr` in the place of `sys.stderr`."""
    if isinstance(sys.stderr, io.TextIOWrapper) and not isinstance(sys.stderr, Stderr):
        sys.stderr = Stderr(sys.stderr)


def say_at_once(text: str) -> None:
    """Say something on a terminal before anything large is imported, which takes seconds."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def for_rich() -> IO[str]:
    """The stream for a Rich console, whose texts are escaped before they are handed to it."""
    if isinstance(sys.stderr, Stderr):
        return cast(IO[str], _Styled(sys.stderr))
    return sys.stderr
