from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kscli import resources
from kscli.errors import UsageError
from kscli.resources import (
    MemorySplit,
    fast_bfloat16,
    format_size,
    free_disk,
    matmul_rate,
    measure_resources,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("123456", 123456),
        ("7B", 7),
        ("2TB", 2 * 10**12),
        ("3K", 3072),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0GiB", "0.1", "0.5B", "-3G", "12 parsecs", "GiB", "1e9", "3,5G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_sizes_are_written() -> None:
    sizes = [0, 1023, 2048, 3 * 2**20, 3 * 2**29, 3 * 2**40]
    written = ["0 bytes", "1023 bytes", "2.0 KiB", "3.0 MiB", "1.5 GiB", "3,072.0 GiB"]
    assert [format_size(size) for size in sizes] == written


def test_what_is_free_on_a_cpu_is_no_more_than_the_machine_has() -> None:
    found = measure_resources("cpu")
    assert (found.kind, found.device_memory) == ("cpu", None)
    assert 2**28 < found.host_memory <= psutil.virtual_memory().total


def limit_memory(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_OWN_CGROUPS", tmp_path / "self")
    return tmp_path / "cgroup"


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_a_containers_limit_counts(groups: Path) -> None:
    (groups.parent / "self").write_text("0::/\n")
    limit_memory(groups, V2, "1000", 400, "anon 400")
    assert measure_resources("cpu").host_memory == 600
    # Files that were read, 500 of the 990, are dropped when memory is wanted.
    limit_memory(groups, V2, "1000", 990, "anon 490\ninactive_file 300\nactive_file 200")
    assert measure_resources("cpu").host_memory == 510
    limit_memory(groups, V2, "max", 990, "anon 990")
    assert measure_resources("cpu").host_memory > 2**28


def test_a_jobs_limit_some_levels_down_counts(groups: Path) -> None:
    """A batch system gives a job a group of its own; the least of all levels is what is left."""
    (groups.parent / "self").write_text("0::/slurm/job_7/step_0\n")
    limit_memory(groups / "slurm" / "job_7", V2, "5000", 1000, "anon 1000")
    limit_memory(groups / "slurm" / "job_7" / "step_0", V2, "max", 900, "anon 900")
    limit_memory(groups / "slurm" / "job_8", V2, "10", 1, "anon 1")
    assert measure_resources("cpu").host_memory == 4000
    limit_memory(groups / "slurm", V2, "3000", 2500, "anon 2500")
    assert measure_resources("cpu").host_memory == 500


def test_the_first_version_of_control_groups(groups: Path) -> None:
    (groups.parent / "self").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    limit_memory(groups / "memory", V1, str(2**63 - 4096), 5000, "total_inactive_file 0")
    stat = "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 50"
    limit_memory(groups / "memory" / "job", V1, "1000", 900, stat)
    assert measure_resources("cpu").host_memory == 350


def test_ranks_on_one_machine_share_its_memory(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (groups.parent / "self").write_text("0::/\n")
    limit_memory(groups, V2, "1000", 200, "anon 200")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert measure_resources("cpu").host_memory == 200


def test_a_model_is_laid_over_what_is_free_beside_a_reserve() -> None:
    free = {0: 1000, 1: 500, 2: 90}
    assert MemorySplit(100).for_weights(free, 70) == {0: 900, 1: 400, 2: 0, "cpu": 70}
    assert MemorySplit(100, 600).for_weights(free, 70) == {0: 500, 1: 400, 2: 0, "cpu": 70}


def test_free_disk_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0


def test_bfloat16_is_fast_where_the_processor_says_so() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    text = flags.read_text()
    if "flags" not in text:
        pytest.skip("the processor names no flags")
    assert fast_bfloat16("cpu") == ("avx512_bf16" in text or "amx_bf16" in text)
    assert not fast_bfloat16("mps")


def test_a_rate_is_measured() -> None:
    assert 1e8 < matmul_rate("cpu", "float32") < 1e15
