"""Ranks in processes of their own: their sums, and how one that is lost is told to the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_kit import ROOT

from kscli.errors import UsageError
from kscli.second_moment.ranks import join_ranks

SILENCE = 2.0
WORKER = """
import os, sys, time
import numpy as np
import torch
from kscli.second_moment import ranks as kscli_ranks
from kscli.errors import KscliError
from kscli.second_moment.ranks import Patience, join_ranks

kscli_ranks._CHUNK = 1000
what, silence = sys.argv[1], float(sys.argv[2])

def values(rank):
    return np.random.default_rng(rank).standard_normal(4500)

def work(ranks):
    rank, size = ranks.shard.index, ranks.shard.count
    print(f"joined {os.getpid()}", flush=True)
    if what == "sum" and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise KscliError("the first attempt fails.")
    if what == "suspend":
        for _ in range(20):
            time.sleep(0.05)
            ranks.check()
    if what in ("sum", "suspend"):
        mine = torch.from_numpy(values(rank))
        time.sleep(rank * 0.2)
        ranks.check()
        ranks.reduce(mine)
        counts = ranks.sum_counts([rank + 1, 10**15])
        assert counts == [size * (size + 1) // 2, size * 10**15]
        if ranks.leader:
            exact = sum(values(other) for other in range(size))
            assert np.abs(mine.numpy() - exact).max() < 1e-14
        ranks.wait()
        print(f"summed as {ranks.shard}, local {ranks.local}", flush=True)
        return
    if what == "meet" and rank == 0:
        ranks.wait()
    for step in range(600):
        time.sleep(0.05)
        ranks.check()
        if rank == 1 and step == 4 and what == "raise":
            raise KscliError("a key of layer 3 is NaN.")
        if rank == 1 and step == 4 and what == "interrupt":
            raise KeyboardInterrupt
    print("never told", flush=True)

try:
    with join_ranks(Patience(silence, 30)) as ranks:
        work(ranks)
except KscliError as error:
    print(f"error: {error}", flush=True)
    sys.exit(1)
"""


class Started:
    """Ranks that were started by plain variables of the environment."""

    def __init__(self, folder: Path, count: int, what: str) -> None:
        (folder / "worker.py").write_text(WORKER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, folder / "worker.py", what, str(SILENCE)],
                env=environment(**variables, RANK=rank, LOCAL_RANK=rank),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
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
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return os.environ | own | {name: str(value) for name, value in variables.items()}


def test_sums_of_four_under_a_torchrun_that_starts_them_again(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--max-restarts=1", "--nproc-per-node=4", tmp_path / "worker.py", "sum", "10"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "error: the first attempt fails." in done.stdout
    for rank in range(4):
        assert f"summed as {rank}/4, local {rank}" in done.stdout


@pytest.mark.parametrize(
    ("what", "own", "told"),
    [
        ("raise", "error: a key of layer 3 is NaN.", "rank 1 stopped: a key of layer 3 is NaN."),
        ("interrupt", "KeyboardInterrupt", "rank 1 was interrupted."),
    ],
)
def test_a_rank_that_fails_ends_the_other(tmp_path: Path, what: str, own: str, told: str) -> None:
    with Started(tmp_path, 2, what) as started:
        started.wait_joined()
        assert started.end(0) == (1, f"error: {told}")
        assert started.end(1)[1].endswith(own)


def test_a_rank_that_is_killed_while_others_work_and_wait(tmp_path: Path) -> None:
    with Started(tmp_path, 3, "meet") as started:
        started.wait_joined()
        started.ranks[1].kill()
        killed = time.monotonic()
        for rank in (0, 2):
            code, said = started.end(rank)
            assert code == 1
            assert said.startswith("error: rank 1 has not been heard from for 2 s")
        assert time.monotonic() - killed < 10 * SILENCE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_0_takes_the_store_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """A process that is stopped answers as little as a machine that has lost its network."""
    with Started(tmp_path, 2, "work") as started:
        started.wait_joined()
        started.ranks[0].send_signal(number)
        code, said = started.end(1)
        assert code == 1
        assert said.startswith("error: contact with rank 0 at 127.0.0.1:")


def test_sums_of_two_that_were_suspended_together(tmp_path: Path) -> None:
    with Started(tmp_path, 2, "suspend") as started:
        started.wait_joined()
        for number, pause in ((signal.SIGSTOP, 2 * SILENCE), (signal.SIGCONT, 0.0)):
            for rank in started.ranks:
                rank.send_signal(number)
            time.sleep(pause)
        assert started.end(0) == (0, "summed as 0/2, local 0")
        assert started.end(1) == (0, "summed as 1/2, local 1")


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
        ({"RANK": ""}, "WORLD_SIZE is 4, but RANK cannot be read from the environment"),
        ({"MASTER_ADDR": "", "LOCAL_RANK": ""}, "LOCAL_RANK, MASTER_ADDR cannot be read"),
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
