"""Ranks in processes of their own: their sums, and how one that is lost is told to the others."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import fork_kit
import pytest
from cli_kit import ROOT
from fork_kit import ForkedProcess

from kscli.errors import UsageError
from kscli.second_moment.ranks import join_ranks

MEETING = 2.0
WORKER = """
import os, sys, time
from kscli.second_moment import ranks as kscli_ranks
from kscli.errors import KscliError

kscli_ranks._CHUNK = 1000
what, meeting = sys.argv[1], float(sys.argv[2])

def work(ranks):
    rank, size = ranks.shard.index, ranks.shard.count
    ranks.wait()
    print("joined", flush=True)
    if what == "sum" and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise KscliError("the first attempt fails.")
    if what == "sum":
        sum_up(ranks, rank, size)
        return
    if what in ("wait-0", "wait-1") and what != f"wait-{rank}":
        ranks.wait()
    for step in range(600):
        time.sleep(0.05)
        ranks.check()
        if rank == 1 and step == 4 and what == "raise":
            raise KscliError("a key of layer 3 is NaN.")
        if rank == 1 and step == 4 and what == "interrupt":
            raise KeyboardInterrupt
    print("never told", flush=True)

def sum_up(ranks, rank, size):
    import numpy as np
    import torch

    values = [np.random.default_rng(other).standard_normal(4500) for other in range(size)]
    mine = torch.from_numpy(values[rank].copy())
    time.sleep(rank * 0.2)
    ranks.check()
    ranks.reduce(mine)
    counts = ranks.sum_counts([rank + 1, 10**15])
    assert counts == [size * (size + 1) // 2, size * 10**15]
    if ranks.leader:
        assert np.abs(mine.numpy() - sum(values)).max() < 1e-14
    print(f"summed as {ranks.shard}, local {ranks.local}", flush=True)

try:
    with kscli_ranks.join_ranks(startup=float(sys.argv[3]), meeting=meeting) as ranks:
        work(ranks)
except KscliError as error:
    print(f"error: {error}", flush=True)
    sys.exit(1)
"""


class Started:
    """Ranks that were started by plain variables of the environment, as `srun` starts them."""

    def __init__(
        self,
        folder: Path,
        count: int,
        what: str,
        *,
        startup: float = 60,
        meeting: float = 60,
        absent: int = 0,
    ) -> None:
        (folder / "worker.py").write_text(WORKER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = [
            ForkedProcess(
                [str(folder / "worker.py"), what, str(meeting), str(startup)],
                env=environment(**variables, RANK=rank, LOCAL_RANK=rank),
            )
            for rank in range(count - absent)
        ]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def wait_joined(self) -> None:
        for rank in self.ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline().startswith("joined")

    def end(self, rank: int, seconds: float = 20) -> tuple[int, str]:
        process = self.ranks[rank]
        out, err = process.communicate(timeout=seconds)
        return process.returncode, (out + err).strip()


def environment(**variables: object) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT)}
    return os.environ | own | {name: str(value) for name, value in variables.items()}


def test_sums_of_four_under_a_torchrun_that_starts_them_again(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    worker = fork_kit.program(tmp_path, str(tmp_path / "worker.py"))
    options = ["--standalone", "--max-restarts=1", "--nproc-per-node=4", "--no-python"]
    torchrun = ["-m", "torch.distributed.run", *options, str(worker)]
    done = fork_kit.run([*torchrun, "sum", "10", "60"], env=environment())
    assert done.returncode == 0, done.stderr
    assert "error: the first attempt fails." in done.stdout
    for rank in range(4):
        assert f"summed as {rank}/4, local {rank}" in done.stdout


def ended(rank: int) -> str:
    return (
        f"error: rank {rank} ended before the work was done; what it printed says why. Start all "
        "ranks again: each goes on from its last checkpoint."
    )


@pytest.mark.parametrize(
    ("what", "own"),
    [("raise", "error: a key of layer 3 is NaN."), ("interrupt", "KeyboardInterrupt")],
)
def test_a_rank_that_fails_ends_the_other(tmp_path: Path, what: str, own: str) -> None:
    with Started(tmp_path, 2, what) as started:
        started.wait_joined()
        assert started.end(0) == (1, ended(1))
        assert started.end(1)[1].endswith(own)


@pytest.mark.parametrize(
    ("count", "killed", "what"),
    [(2, 0, "work"), (2, 1, "wait-1"), (4, 0, "wait-0"), (4, 1, "work")],
)
def test_a_rank_that_is_killed_ends_the_others(
    tmp_path: Path, count: int, killed: int, what: str
) -> None:
    """Whether these sum documents (`work`) or wait for it."""
    with Started(tmp_path, count, what) as started:
        started.wait_joined()
        started.ranks[killed].kill()
        began = time.monotonic()
        for rank in set(range(count)) - {killed}:
            assert started.end(rank) == (1, ended(killed))
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(("stopped", "limit"), [(0, 2 * MEETING), (1, MEETING)])
def test_a_rank_that_stands_still_ends_the_others(
    tmp_path: Path, stopped: int, limit: float
) -> None:
    """A process that is stopped answers as little as a machine that has lost its network."""
    with Started(tmp_path, 2, f"wait-{stopped}", meeting=MEETING) as started:
        started.wait_joined()
        started.ranks[stopped].send_signal(signal.SIGSTOP)
        code, said = started.end(1 - stopped)
        assert code == 1
        assert said.startswith(f"error: rank {stopped} did not answer within {limit:g} s: it ")
        assert "\n" not in said


@pytest.mark.parametrize(("number", "code"), [(None, 1), (signal.SIGINT, -signal.SIGINT)])
def test_a_rank_whose_fellows_never_start(
    tmp_path: Path, number: signal.Signals | None, code: int
) -> None:
    with Started(tmp_path, 2, "work", startup=3 if number is None else 60, absent=1) as started:
        if number:
            time.sleep(3)
            started.ranks[0].send_signal(number)
        found, said = started.end(0)
        assert found == code
        if number is None:
            assert said.startswith("error: the ranks did not all meet at 127.0.0.1:")
            assert "\n" not in said


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_has_no_ranks(monkeypatch: pytest.MonkeyPatch, size: str | None) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    with join_ranks() as ranks:
        assert ranks is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 4, but the environment has no RANK"),
        ({"MASTER_ADDR": "", "LOCAL_RANK": ""}, "has no LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": "4"}, "RANK is 4, where WORLD_SIZE 4 has ranks 0 to 3"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ],
)
def test_an_environment_that_is_not_sound(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], told: str
) -> None:
    sound = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (sound | {"MASTER_PORT": "29500"} | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told), join_ranks():
        pass
