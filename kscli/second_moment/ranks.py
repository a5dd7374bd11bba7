"""Ranks: the processes of one cache-cov that `torchrun`, or a launcher like it, has started.

Ranks work for hours without a word to each other, and add up their sums at the end. So that
none waits for one that is gone, a thread in each keeps a line in a common store (the launcher's,
or one that rank 0 keeps) and reads the others' lines: how often it has written its own (its
beat), at how many meeting points it has arrived, and whether it has left. A rank whose beat
stands still, or that left by an exception, is named to all the others.

Collectives go over gloo between CPU tensors, and only once every rank has arrived at them: their
short timeout then bounds the transfer and not the wait for a rank that is slower.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from kscli.errors import KscliError, UsageError
from kscli.second_moment.shards import Shard

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]

SILENCE = 30.0
STARTUP = 600.0
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# One transfer of a reduction; bounds gloo's scratch memory and how long a signal goes unheard.
_CHUNK = 2**21
_TRANSFER_TIMEOUT = timedelta(seconds=60)
_FASTEST = 0.01
_NO_FAILURE = "-"


class RankError(KscliError):
    """Another rank failed, was killed, or cannot be reached."""


@dataclass(frozen=True)
class Patience:
    """How long ranks wait for each other, in seconds.

    A rank that has not been heard from for `silence` is given up, and one that has not started
    after `startup`.
    """

    silence: float = SILENCE
    startup: float = STARTUP

    @property
    def tick(self) -> float:
        """How often a rank writes its beat."""
        return min(1.0, self.silence / 10)

    @property
    def farewell(self) -> float:
        """How long a rank that ends stays for the others to learn of it."""
        return 5 * self.tick


@contextmanager
def join_ranks(patience: Patience = Patience()) -> Iterator[Ranks | None]:
    """Meet the other ranks; None where the environment names no others (WORLD_SIZE unset or 1).

    Enter it once in a process, and before anything that takes long. An exception that leaves the
    block ends the other ranks with its text. Raises UsageError when a variable of the
    environment is missing or wrong, and RankError when not all ranks come.
    """
    place = _place(os.environ)
    if place is None:
        yield None
        return
    heartbeat = _Heartbeat(place, patience)
    try:
        heartbeat.meet()
        with _process_group(place, patience, heartbeat):
            yield Ranks(place, heartbeat)
    except RankError:
        heartbeat.leave()
        raise
    except BaseException as error:
        heartbeat.leave(_ended_by(place.rank, error))
        raise
    heartbeat.leave()


class Ranks:
    """This process among the others: which documents are its own, and how sums are added up."""

    def __init__(self, place: _Place, heartbeat: _Heartbeat) -> None:
        self.shard = Shard(place.rank, place.size)
        self.local = place.local
        self.leader = place.rank == 0
        self._heartbeat = heartbeat

    def check(self) -> None:
        """Raise RankError when another rank has failed or fallen silent. Takes no time."""
        self._heartbeat.check()

    def wait(self) -> None:
        """Return once every rank has come to this call; RankError when one cannot any more."""
        self._heartbeat.meet()

    def reduce(self, values: Tensor) -> None:
        """Add up 1-D CPU tensors of one length in place on rank 0; elsewhere they are spoilt.

        Every rank calls it. Raises RankError when a rank is lost before or meanwhile.
        """
        import torch.distributed as dist

        self.wait()
        with _transfer(self._heartbeat):
            for start in range(0, len(values), _CHUNK):
                dist.reduce(values[start : start + _CHUNK], dst=0)

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """The sums over all ranks, on every rank; as `reduce` otherwise."""
        import torch
        import torch.distributed as dist

        self.wait()
        values = torch.tensor(counts, dtype=torch.int64)
        with _transfer(self._heartbeat):
            dist.all_reduce(values)
        return [int(value) for value in values]


@dataclass(frozen=True)
class _Place:
    """This process's place, by the environment.

    `hosted` says that the launcher keeps the store; it is the same one, with what was written
    to it, at every `attempt` of a torchrun that starts its ranks again.
    """

    rank: int
    size: int
    local: int
    host: str
    port: int
    hosted: bool
    attempt: str

    def connect(self, name: str, patience: Patience, *, client: bool = False) -> Store:
        """This rank's way to the part of the store that is called `name`."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            self.host,
            self.port,
            is_master=self.rank == 0 and not self.hosted and not client,
            timeout=timedelta(seconds=patience.startup),
            wait_for_workers=False,
        )
        return PrefixStore(f"kscli/{self.attempt}/{name}", store)


def _place(environment: Mapping[str, str]) -> _Place | None:
    if environment.get("WORLD_SIZE", "1") == "1":
        return None
    absent = [name for name in VARIABLES if not environment.get(name)]
    if absent:
        raise UsageError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(absent)} "
            "cannot be read from the environment; start the ranks with torchrun."
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise UsageError(f"{name} is {environment[name]!r}, not a number.") from None
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise UsageError(f"RANK is {rank}, where WORLD_SIZE {size} has ranks 0 to {size - 1}.")
    return _Place(
        rank,
        size,
        numbers["LOCAL_RANK"],
        environment["MASTER_ADDR"],
        numbers["MASTER_PORT"],
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


@dataclass(frozen=True)
class _Line:
    """What a rank says of itself; a `beat` of 0 is a rank that has not started."""

    beat: int = 0
    arrivals: int = 0
    left: bool = False

    def __str__(self) -> str:
        return f"{self.beat} {self.arrivals} {self.left:d}"

    @staticmethod
    def parse(text: str) -> _Line:
        beat, arrivals, left = (int(number) for number in text.split())
        return _Line(beat, arrivals, bool(left))


class _Board:
    """The ranks' lines in the store, and the sentence of the first failure."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._own = f"rank/{rank}"
        self._keys = ["failure", *(f"rank/{other}" for other in range(size))]
        # Reading a key that is not there would wait for it; who comes first writes the first.
        for key in self._keys:
            store.compare_set(key, "", _NO_FAILURE if key == "failure" else str(_Line()))

    def exchange(self, line: _Line, failure: str | None) -> tuple[str | None, list[_Line]]:
        """Write what there is to say; the failure there is, if any, and every rank's line."""
        if failure is not None:
            self._store.compare_set("failure", _NO_FAILURE, failure)
        self._store.set(self._own, str(line))
        first, *others = (value.decode() for value in self._store.multi_get(self._keys))
        return None if first == _NO_FAILURE else first, [_Line.parse(text) for text in others]


class _Heartbeat:
    """Keeps the board, in a thread: the only one that talks to the store.

    A call to a store whose machine is lost can last many minutes; the main thread makes none.
    """

    def __init__(self, place: _Place, patience: Patience) -> None:
        self._place = place
        self._patience = patience
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._soon = threading.Event()
        # Everything below is shared by the two threads, and changed under this condition.
        self._changed = threading.Condition()
        self._arrivals = 0
        self._leaving = False
        self._own_failure: str | None = None
        self._problem: str | None = None
        self._lines = [_Line()] * place.size
        self._quiet = [0.0] * place.size
        self._rounds = 0
        self._round_at = time.monotonic()
        self._thread.start()

    def check(self) -> None:
        if self._problem is None and self._is_stuck():
            self._report(_lost(self._place, "it does not answer"))
        if self._problem is not None:
            raise RankError(self._problem)

    def meet(self) -> None:
        """Arrive at the next meeting point, and return when all the others have."""
        with self._changed:
            self._arrivals += 1
            goal = self._arrivals
            self._soon.set()
            while any(line.arrivals < goal for line in self._lines):
                self._changed.wait(self._patience.tick)
                self.check()
                for rank, line in enumerate(self._lines):
                    if line.left and line.arrivals < goal:
                        raise RankError(f"rank {rank} ended before the others.")

    def explain(self, error: Exception, what: str) -> RankError:
        """The error for a transfer that failed: the rank that turns out to be lost, if one is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._problem is not None, self._patience.silence + 3 * self._patience.tick
            )
        return RankError(self._problem or f"{what}: {_first_line(error)}")

    def leave(self, failure: str | None = None) -> None:
        """Say that this rank has left, by `failure` if it did not go well."""
        with self._changed:
            self._own_failure = failure
            self._leaving = True
            self._soon.set()
        self._thread.join(timeout=2 * self._patience.farewell)

    def _is_stuck(self) -> bool:
        """Whether the store has kept the thread for too long.

        A process that was stopped for a while finds the clock far ahead when it goes on: the
        thread is given a moment for the round that it did not get to.
        """
        limit = self._patience.silence if self._rounds else self._patience.startup
        if time.monotonic() - self._round_at < limit:
            return False
        seen = self._rounds
        with self._changed:
            moved = self._changed.wait_for(lambda: self._rounds > seen, self._patience.farewell)
        return not moved

    def _report(self, problem: str) -> None:
        with self._changed:
            self._problem = self._problem or problem
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            store = self._place.connect("board", self._patience)
            self._keep(_Board(store, self._place.rank, self._place.size))
        except Exception as error:
            self._report(_lost(self._place, _first_line(error)))

    def _keep(self, board: _Board) -> None:
        """A round after another: quick ones when there is something to say, then slower."""
        beat, pause, line = 0, 0.0, _Line()
        farewell = float("inf")
        while not (line.left and self._may_end(farewell)):
            if self._soon.wait(pause):
                self._soon.clear()
                pause = _FASTEST
            beat += 1
            with self._changed:
                line = _Line(beat, self._arrivals, self._leaving or self._problem is not None)
                failure = self._own_failure or self._silent_rank()
            self._read(*board.exchange(line, failure))
            if line.left:
                farewell = min(farewell, time.monotonic() + self._patience.farewell)
            pause = min(max(pause, _FASTEST) * 1.5, self._patience.tick)

    def _may_end(self, farewell: float) -> bool:
        """Whether no other needs this rank's thread: rank 0's has the store, if not hosted."""
        return (
            self._place.rank != 0
            or self._place.hosted
            or all(line.left for line in self._lines)
            or time.monotonic() > farewell
        )

    def _read(self, failure: str | None, lines: list[_Line]) -> None:
        with self._changed:
            now = time.monotonic()
            # Longer gaps are this process's own: it was stopped, or the store was slow.
            passed = min(now - self._round_at, 2 * self._patience.tick)
            for rank, (before, line) in enumerate(zip(self._lines, lines, strict=True)):
                self._quiet[rank] = self._quiet[rank] + passed if before == line else 0.0
            self._lines = lines
            self._rounds += 1
            self._round_at = now
            self._problem = self._problem or failure
            self._changed.notify_all()

    def _silent_rank(self) -> str | None:
        for rank, (line, quiet) in enumerate(zip(self._lines, self._quiet, strict=True)):
            if line.beat == 0 and quiet > self._patience.startup:
                return f"rank {rank} did not start within {self._patience.startup:g} s."
            if line.beat > 0 and not line.left and quiet > self._patience.silence:
                return (
                    f"rank {rank} has not been heard from for {self._patience.silence:g} s: it was "
                    "killed, or its machine is lost. Start all ranks again."
                )
        return None


@contextmanager
def _process_group(place: _Place, patience: Patience, heartbeat: _Heartbeat) -> Iterator[None]:
    import torch.distributed as dist

    with _transfer(
        heartbeat,
        "the ranks cannot connect to each other (where a machine has several networks, name "
        "one in GLOO_SOCKET_IFNAME)",
    ):
        dist.init_process_group(
            "gloo",
            store=place.connect("gloo", patience, client=True),
            rank=place.rank,
            world_size=place.size,
            timeout=_TRANSFER_TIMEOUT,
        )
    try:
        yield
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def _transfer(
    heartbeat: _Heartbeat, what: str = "the ranks could not add up their sums"
) -> Iterator[None]:
    """Turn what gloo raises into a RankError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise heartbeat.explain(error, what) from error


def _lost(place: _Place, reason: str) -> str:
    where = f"{place.host}:{place.port}"
    return f"contact with rank 0 at {where} was lost, or never made: {reason}"


def _ended_by(rank: int, error: BaseException) -> str:
    """The sentence by which the others learn that this rank failed."""
    if isinstance(error, KeyboardInterrupt):
        return f"rank {rank} was interrupted."
    if isinstance(error, MemoryError):
        return f"rank {rank} ran out of memory."
    if isinstance(error, KscliError):
        return f"rank {rank} stopped: {error}"
    return f"rank {rank} stopped: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
