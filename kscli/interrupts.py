"""Signals that wait until a piece of work is at a place where it can be left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

from kscli.errors import KscliError


class InterruptedRunError(KscliError):
    """A run that a signal stopped; its exit code is 128 + the signal's number."""

    def __init__(self, number: int, text: str) -> None:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        super().__init__(f"{word}; {text}")
        self.exit_code = 128 + number


class HeldSignals:
    """The signal that came while signals were held, if any."""

    def __init__(self) -> None:
        self.received: int | None = None


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Note SIGINT and SIGTERM, in the main thread, instead of acting on them.

    Only the first is held: a second one acts at once. Signals that are ignored stay so.
    """
    held = HeldSignals()
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if current_thread() is main_thread() and signal.getsignal(number) is not signal.SIG_IGN
    }

    def hold(number: int, frame: FrameType | None) -> None:
        held.received = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, hold)
    try:
        yield held
    finally:
        restore()
