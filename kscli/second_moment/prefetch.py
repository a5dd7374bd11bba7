"""Work that is done ahead, in a thread, so that what uses it never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _End:
    """What comes after the last item: nothing, or the error that the items ended with."""

    error: BaseException | None = None


def ahead(
    items: Iterable[Item], most: int, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[Item]:
    """Iterate over `items` in a thread, at most `most` of them ahead of what was taken.

    An error of `items` is raised here, in its place. `while_waiting` is called now and then
    while there is nothing to take, and may raise to stop waiting.
    """
    queue: Queue[Item | _End] = Queue(most)
    left = Event()

    def put(item: Item | _End) -> bool:
        while not left.is_set():
            try:
                queue.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End())
        except BaseException as error:
            put(_End(error))

    # A daemon, since it may be waiting for a pipe that nobody writes to any more.
    Thread(target=work, name="ahead", daemon=True).start()
    try:
        while True:
            try:
                item = queue.get(timeout=POLL_SECONDS)
            except Empty:
                while_waiting()
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        left.set()
