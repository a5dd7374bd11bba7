from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kscli import resources
from kscli.errors import UsageError
from kscli.resources import (
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


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-3G", "12 parsecs", "GiB", "1e9", "3,5G"])
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


@pytest.mark.parametrize(("limit", "used", "free"), [(1000, 400, 600), (1000, 990, 100)])
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, used: int, free: int
) -> None:
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text(f"{used}\n")
    places = (("/nowhere", "/nowhere"), (str(tmp_path / "max"), str(tmp_path / "current")))
    monkeypatch.setattr(resources, "_CGROUPS", places)
    assert measure_resources("cpu").host_memory == free
    (tmp_path / "max").write_text("max\n")
    assert measure_resources("cpu").host_memory > 2**28


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
