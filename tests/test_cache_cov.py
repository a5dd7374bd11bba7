"""`kscli cache-cov` as a user runs it: killed, planned, shared out over processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import fork_kit
import h5py
import numpy as np
import psutil
import pytest
from cli_kit import ROOT, kscli, kscli_process, one_sentence
from fork_kit import ForkedProcess

COMMON = ("cache-cov", "--dtype", "float32", "--batch-tokens", "256", "--checkpoint-every", "0")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "cov.h5"
    done = kscli_process(*COMMON, "--corpus", corpus, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def start(*arguments: str | Path, **environment: str) -> ForkedProcess:
    return ForkedProcess(
        ["-m", *map(str, arguments)], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment
    )


def wait_for_checkpoint(folder: Path, process: ForkedProcess) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("state-*.h5")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def second_moments(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["second_moment"][()])


def assert_close(path: Path, other: Path) -> None:
    got, expected = second_moments(path), second_moments(other)
    error = np.linalg.norm(got - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2))
    assert error.max() < 1e-6
    with h5py.File(path) as file, h5py.File(other) as whole:
        assert file["count"][()] == whole["count"][()]
        assert file.attrs["documents"] == whole.attrs["documents"]
        assert file.attrs["whole_corpus"] == whole.attrs["whole_corpus"]
        assert json.loads(file.attrs["recipe"]).get("shard") is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_it_goes_on_and_ends_with_the_same_file(
    corpus: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "cov.h5"
    command = (*COMMON, "--corpus", corpus, "-o", path)
    folder = tmp_path / "cov.h5.checkpoint"
    process = start("kscli", *command)
    wait_for_checkpoint(folder, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert not path.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "the same command goes on from there" in stderr
        assert "Traceback" not in stderr
    again = kscli_process(*command)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    np.testing.assert_array_equal(second_moments(path), second_moments(undisturbed))
    assert not folder.exists()


def test_another_runs_checkpoint_is_refused_before_the_model_is_loaded(
    corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cov.h5"
    process = start("kscli", *COMMON, "--corpus", corpus, "-o", path)
    wait_for_checkpoint(tmp_path / "cov.h5.checkpoint", process)
    process.kill()
    process.communicate()
    other = (*COMMON, "--corpus", corpus, "-o", path, "--max-length", "9")
    refused = kscli(*other)
    assert refused.exit_code == 1
    assert "max_length differ" in one_sentence(refused.stderr)
    assert (tmp_path / "cov.h5.checkpoint").exists()
    assert kscli(*other, "--force").exit_code == 0
    assert not (tmp_path / "cov.h5.checkpoint").exists()


def test_standard_input_goes_on_when_the_same_text_comes_again(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cov.h5"
    command = (*COMMON, "--corpus", "-", "-o", path)
    process = start_with_input(corpus, *command)
    wait_for_checkpoint(tmp_path / "cov.h5.checkpoint", process)
    process.kill()
    process.communicate()
    lines = corpus.read_text().splitlines()
    changed = kscli_process(*command, text="\n".join(['{"text": "Other."}', *lines[1:]]))
    assert changed.returncode == 1
    assert "are not those that the checkpoint has counted" in one_sentence(changed.stderr)
    shorter = kscli_process(*command, text="\n".join(lines[:3]))
    assert shorter.returncode == 1
    assert "are not those that the checkpoint has counted" in one_sentence(shorter.stderr)
    again = kscli_process(*command, text="\n".join(lines))
    assert again.returncode == 0, again.stderr
    np.testing.assert_array_equal(second_moments(path), second_moments(undisturbed))


def start_with_input(corpus: Path, *arguments: str | Path) -> ForkedProcess:
    with corpus.open() as text:
        return ForkedProcess(["-m", "kscli", *map(str, arguments)], stdin=text)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_torchrun_give_what_one_process_does(
    corpus: Path, undisturbed: Path, tmp_path: Path, ranks: int
) -> None:
    path = tmp_path / "cov.h5"
    program = fork_kit.program(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--no-python"]
    done = fork_kit.run([*torchrun, *map(str, (program, *COMMON, "--corpus", corpus, "-o", path))])
    program.unlink()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"wrote {path}") == 1
    assert_close(path, undisturbed)
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_rank_ends_the_others_and_the_rerun_goes_on(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two ranks that no launcher watches over, as `srun` starts them."""
    path = tmp_path / "cov.h5"
    command = ("kscli", *COMMON, "--corpus", corpus, "-o", path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    variables |= {"WORLD_SIZE": "2"}

    def start_ranks() -> list[ForkedProcess]:
        return [
            start(*command, **variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
        ]

    ranks = start_ranks()
    wait_for_checkpoint(tmp_path / "cov.h5.checkpoint-1-of-2", ranks[1])
    ranks[1].kill()
    _, stderr = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1, stderr
    assert "error: rank 1 ended before the work was done" in one_sentence(stderr)
    assert list(tmp_path.glob("cov.h5.checkpoint-0-of-2/state-*.h5"))
    assert not path.exists()
    for rank in start_ranks():
        _, stderr = rank.communicate(timeout=120)
        assert rank.returncode == 0, stderr
    assert_close(path, undisturbed)
    assert list(tmp_path.iterdir()) == [path]


def test_torchrun_ends_the_other_when_a_rank_is_killed(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cov.h5"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    program = fork_kit.program(tmp_path)
    command = (*torchrun, program, *COMMON, "--corpus", corpus, "-o", path)
    launcher = start(*command)
    wait_for_checkpoint(tmp_path / "cov.h5.checkpoint-1-of-2", launcher)
    for worker in psutil.Process(launcher.pid).children():
        if worker.environ().get("RANK") == "1":
            worker.kill()
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    # The other sees the connection break, or torchrun's SIGTERM, whichever comes first.
    (said,) = re.findall(r"^error: (.*)", stderr, re.MULTILINE)
    assert said.startswith(("rank 1 ended before the work was done", "terminated; "))
    assert "kscli/" not in stderr
    again = start(*command)
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert "going on from" in stderr
    assert_close(path, undisturbed)


@pytest.mark.parametrize("bound", [(), ("--tokens", "3001"), ("--samples", "701")])
def test_shards_merged_give_what_one_process_does(
    corpus: Path, tmp_path: Path, bound: tuple[str, ...]
) -> None:
    common = (*COMMON, "--corpus", corpus, "--dir", tmp_path, *bound)
    for index in range(3):
        part = kscli(*common, "--shard", f"{index}/3")
        assert part.exit_code == 0, part.stderr
    whole = tmp_path / "whole.h5"
    assert kscli(*common, "-o", whole).exit_code == 0
    merged = kscli("merge-cov", "--dir", tmp_path)
    assert merged.exit_code == 0, merged.stderr
    assert_close(tmp_path / "tiny" / "cov.h5", whole)
    # What was merged is what the command without --shard would have made.
    again = kscli(*common)
    assert again.exit_code == 0
    assert "is up to date" in again.stderr


def test_a_shard_is_made_again_where_other_documents_are_asked_for(
    corpus: Path, tmp_path: Path
) -> None:
    common = (*COMMON, "--corpus", corpus, "--dir", tmp_path, "--shard", "0/2")
    assert kscli(*common).exit_code == 0
    assert "is up to date" in kscli(*common).stderr
    fewer = kscli(*common, "--samples", "1000")
    assert fewer.exit_code == 1
    assert "samples changed" in one_sentence(fewer.stderr)


def test_what_was_left_beside_a_finished_file_goes(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "cov.h5"
    command = (*COMMON, "--corpus", corpus, "-o", path)
    process = start("kscli", *command)
    folder = tmp_path / "cov.h5.checkpoint"
    wait_for_checkpoint(folder, process)
    process.kill()
    process.communicate()
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    assert kscli(*command).exit_code == 0
    kept.rename(folder)
    assert "is up to date" in kscli(*command).stderr
    assert not folder.exists()


def test_a_shard_without_a_document_says_so(corpus: Path, tmp_path: Path) -> None:
    result = kscli(
        *COMMON, "--corpus", corpus, "--dir", tmp_path, "--samples", "2", "--shard", "2/3"
    )
    assert result.exit_code == 1
    assert "has no token; use fewer" in one_sentence(result.stderr)


def test_run_is_one_process(tmp_path: Path) -> None:
    result = kscli_process("run", "--dir", tmp_path, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2
    assert "`run` is one process" in one_sentence(result.stderr)


def test_a_dry_run_prints_the_plan_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    common = ("cache-cov", "--corpus", corpus, "--dir", tmp_path, "--dry-run")
    table = kscli(*common)
    assert table.exit_code == 0, table.stderr
    for words in ("passes", "checkpoints, on disk", "at most about", "4,096 tokens"):
        assert words in table.stdout
    plan = json.loads(kscli(*common, "--tokens", "5000", "-f", "json").stdout)
    assert plan["groups"] == [[0, 1, 2, 3]]
    assert plan["tokens"] == 5000
    assert plan["output"] == 4 * 4 * 512**2
    assert plan["seconds"] > 0
    shard = json.loads(
        kscli(*common, "--tokens", "5000", "--shard", "1/2", "--layers", "2", "-f", "json").stdout
    )
    assert (shard["tokens"], shard["groups"]) == (2500, [[2]])
    assert list(tmp_path.iterdir()) == []


def test_little_memory_means_several_passes_and_the_same_result(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cov.h5"
    whole = json.loads(kscli("cache-cov", "--dry-run", "--dtype", "float32", "-f", "json").stdout)
    plan = json.loads(kscli(*COMMON, "--corpus", corpus, "--dry-run", "-f", "json").stdout)
    layer = plan["host_sums"] // 4
    bound = plan["model"] + plan["work"] + 2 * layer
    assert whole["passes"] == plan["passes"] == 1
    done = kscli(*COMMON, "--corpus", corpus, "--max-memory", str(bound), "-o", path)
    assert done.exit_code == 0, done.stderr
    assert "2 passes, over layers 0-1, 2-3" in done.stderr
    np.testing.assert_array_equal(second_moments(path), second_moments(undisturbed))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--shard", "2/2"), 2, "--shard 2/2"),
        (("--shard", "half"), 2, "write I/N"),
        (("--shard", "0/2", "--corpus", "-"), 2, "standard input goes to one process"),
        (("--shard", "0/2", "--until-settled", "0.1"), 2, "each process has a part"),
        (("--until-settled", "0"), 2, "--until-settled 0.0 must be more than 0"),
        (("--max-memory", "lots"), 2, "'lots' is no size"),
        (("--max-memory", "1MiB"), 1, "--max-memory allows"),
        (("--batch-tokens", "0"), 2, ""),
    ],
)
def test_wrong_requests(tmp_path: Path, options: tuple[str, ...], code: int, words: str) -> None:
    result = kscli("cache-cov", "-o", tmp_path / "cov.h5", *options)
    assert result.exit_code == code
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []
