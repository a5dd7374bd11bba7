"""Ranks: the processes of one cache-cov that `torchrun`, or a launcher like it, has started.

Each rank sums its own documents, for hours perhaps, and rank 0 adds up the sums of all over gloo.
torch's own means tell the others that a rank is lost:

- gloo connects every rank with every other. The connection breaks as soon as a process ends; a
  thread for each other rank waits for that, and the next `check` raises RankError.
- A machine that is cut off, or a process that stands still, breaks no connection. `wait` gives up
  after a time: `monitored_barrier` names the ranks that have not come.
- torchrun's agent, besides, ends all ranks by SIGTERM when one of them fails.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from kscli.errors import KscliError, UsageError
from kscli.second_moment.options import Shard

if TYPE_CHECKING:
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# One transfer of a reduction: bounds gloo's scratch memory.
_CHUNK = 2**21
# monitored_barrier and reductions number their messages from 0.
_FAREWELL_TAG = 2**30
_FOREVER = timedelta(days=1000)
_REMEDY = "Start all ranks again: each goes on from its last checkpoint."


class RankError(KscliError):
    """Another rank has ended, or cannot be reached."""


@contextmanager
def join_ranks(startup: float = 600.0, meeting: float = 6 * 3600.0) -> Iterator[Ranks | None]:
    """Meet the other ranks; None where the environment names no others (WORLD_SIZE unset or 1).

    Ranks wait for each other `startup` seconds until all have started, and `meeting` seconds until
    all have come to the same `wait`: so much later may the slowest finish its documents. Enter it
    once in a process, before torch is imported. However the block is left, the other ranks are
    told. Raises UsageError when a variable of the environment is missing or wrong, and RankError
    when not all ranks come.
    """
    place = _place(os.environ)
    if place is None:
        yield None
        return
    # RankError says in one sentence what torch would log.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        _in_a_thread(lambda: _connect(timedelta(seconds=startup), timedelta(seconds=2 * meeting)))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"the ranks did not all meet at {address} within {startup:g} s. Where a machine has "
            f"several networks, name one in GLOO_SOCKET_IFNAME. ({str(error).splitlines()[0]})"
        ) from error
    ranks = Ranks(*place, meeting)
    try:
        yield ranks
    finally:
        ranks.leave()


class Ranks:
    """This process among the others: which documents are its own, and how sums are added up."""

    def __init__(self, rank: int, size: int, local: int, meeting: float) -> None:
        self.shard = Shard(rank, size)
        self.local = local
        self.leader = rank == 0
        # Rank 0 gives up first: it alone knows which ranks have not come. Of the others, the
        # group's own timeout is the limit.
        self._limit = meeting if self.leader else 2 * meeting
        self._left: list[int] = []
        self._others = [other for other in range(size) if other != rank]
        self._watchers = [self._watch(rank) for rank in self._others]

    def check(self) -> None:
        """Raise RankError when another rank has left. Takes no time."""
        if self._left:
            raise RankError(
                f"rank {self._left[0]} ended before the work was done; what it printed says why. "
                f"{_REMEDY}"
            )

    def wait(self) -> None:
        """Return once every rank has come to this call; RankError when one cannot any more."""
        import torch.distributed as dist

        with self._explained():
            timeout = timedelta(seconds=self._limit)
            _in_a_thread(lambda: dist.monitored_barrier(timeout=timeout, wait_all_ranks=True))

    def reduce(self, values: Tensor) -> None:
        """Add up 1-D CPU tensors of one length in place on rank 0; elsewhere they are spoilt.

        Every rank calls it. Raises RankError when a rank is lost before or meanwhile.
        """
        import torch.distributed as dist

        self.wait()
        with self._explained():
            for start in range(0, len(values), _CHUNK):
                dist.reduce(values[start : start + _CHUNK], dst=0)

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """The sums over all ranks, on every rank; as `reduce` otherwise."""
        import torch
        import torch.distributed as dist

        self.wait()
        values = torch.tensor(counts, dtype=torch.int64)
        with self._explained():
            dist.all_reduce(values)
        return [int(value) for value in values]

    def leave(self) -> None:
        """Tell the others that this rank ends, and which rank ended first.

        It waits a moment for them to do the same: a thread that is still in torch when the
        interpreter ends could end the process with a signal.
        """
        import torch
        import torch.distributed as dist

        until = time.monotonic() + 5
        first = torch.tensor([*self._left, self.shard.index])[:1]
        for other in self._others:
            with suppress(RuntimeError):
                dist.send(first, dst=other, tag=_FAREWELL_TAG)
        for watcher in self._watchers:
            watcher.join(max(0, until - time.monotonic()))

    def _watch(self, other: int) -> threading.Thread:
        """Note, in a thread, that another rank has left: it says so, or its connection breaks."""
        import torch
        import torch.distributed as dist

        first = torch.tensor([other])
        farewell = dist.irecv(first, src=other, tag=_FAREWELL_TAG)

        def wait() -> None:
            try:
                farewell.wait(_FOREVER)  # type: ignore[union-attr]
            except RuntimeError as error:
                # A timeout in this process closes its connections, though nobody has left.
                if "timeout" in str(error):
                    return
            self._left.append(int(first))

        thread = threading.Thread(target=wait, name=f"rank {other}", daemon=True)
        thread.start()
        return thread

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what torch raises, when a rank is lost or the time is over, into a RankError."""
        try:
            yield
        except RuntimeError as error:
            # The thread that sees a connection break may be a moment later.
            for _ in range(100):
                self.check()
                time.sleep(0.01)
            absent = re.search(r"Ranks? ([\d, ]+) failed", str(error))
            raise RankError(
                f"rank {absent[1] if absent else 0} did not answer within {self._limit:g} s: it "
                f"stands still, or its machine is cut off. {_REMEDY}"
            ) from error


def _in_a_thread(call: Callable[[], object]) -> None:
    """Call what waits inside torch, where the main thread would not hear Ctrl-C."""
    failed: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _connect(startup: timedelta, timeout: timedelta) -> None:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=startup))
    # A torchrun that starts its ranks again gives them the same store, with its old addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"kscli/{attempt}", store)  # type: ignore[attr-defined]
    store.set(f"rank {rank}", "started")
    store.wait([f"rank {other}" for other in range(size)], startup)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """The rank, how many there are, and its number on this machine; None for one process."""
    size = environment.get("WORLD_SIZE", "1")
    if size == "1":
        return None
    absent = [name for name in VARIABLES if not environment.get(name)]
    if absent:
        raise UsageError(
            f"WORLD_SIZE is {size}, but the environment has no {', '.join(absent)}; start the "
            "ranks with torchrun."
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise UsageError(f"{name} is {environment[name]!r}, not a number.")
    rank, count, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= count:
        raise UsageError(f"RANK is {rank}, where WORLD_SIZE {size} has ranks 0 to {count - 1}.")
    return rank, count, local
