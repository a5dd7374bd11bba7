"""What this machine has: memory, disk, and how fast it multiplies."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from kscli.errors import UsageError

_PREFIXES = "KMGT"
_UNITS = {
    "": 1,
    "B": 1,
    **{letter: 2 ** (10 * power) for power, letter in enumerate(_PREFIXES, 1)},
    **{f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate(_PREFIXES, 1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate(_PREFIXES, 1)},
}
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True)
class Resources:
    """What is free, in bytes: of the device's memory (None on a CPU) and of the host's.

    `all_devices` is what is free on all devices of its kind together.
    """

    device: str
    host_memory: int
    device_memory: int | None = None
    all_devices: int = 0

    @property
    def kind(self) -> str:
        """The kind of device: cpu, cuda or mps."""
        return self.device.partition(":")[0]


def measure_resources(device: str) -> Resources:
    """What is free on the device and on the host, now."""
    import torch

    host = _free_host_memory()
    if not device.startswith("cuda"):
        return Resources(device, host)
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    own = torch.cuda.mem_get_info(torch.device(device))[0]
    return Resources(device, host, own, sum(free))


def free_disk(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are fast on the device: Ampere on, AVX-512-BF16 or AMX."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device != "cpu":
        return False
    # torch's own questions to the processor; their names begin with _ in all of 2.9 to 2.13.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in questions)


def matmul_rate(device: str, dtype: str) -> float:
    """Floating-point operations a second in a matrix product, measured in about half a second."""
    import torch

    size = 1024 if device == "cpu" else 8192
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)

    def product() -> None:
        torch.mm(a, a)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    product()
    began, times = time.perf_counter(), []
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def parse_size(text: str) -> int:
    """Bytes of `24GiB` or `24G`, `24GB` (10^9 each) or a number; UsageError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UsageError(
            f"{text!r} is no size; write for example 24GiB, 500MB or a number of bytes."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: float) -> str:
    """A size for people, as in `1.5 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:.0f} bytes"


def _free_host_memory() -> int:
    """What this process may still take: of the machine, and of its container if it is in one."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in _CGROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        # What a container has used includes files that can be dropped; a tenth is spared for that.
        free = min(free, max(left, int(Path(limit).read_text()) // 10))
    return free
