from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kscli.second_moment.token_stream import ahead


def test_items_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    taken = ahead(items(), most=3)
    assert next(taken) == 0
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    # One taken, three in the queue and one that waits for room.
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]
    assert list(taken) == list(range(1, 20))


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("spoilt")

    taken = ahead(items(), most=3)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="spoilt"):
        next(taken)


def test_waiting_can_be_given_up_and_the_thread_ends() -> None:
    blocked = threading.Event()
    after: list[int] = []

    def items() -> Iterator[int]:
        blocked.wait(10)
        yield 1
        after.append(2)
        yield 2

    def give_up() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ahead(items(), most=1, while_waiting=give_up))
    blocked.set()
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(10)
            assert not thread.is_alive()
    assert after == []
