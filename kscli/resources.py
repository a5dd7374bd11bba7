"""What this machine has: memory, disk, and how fast it multiplies."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kscli.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")

_PREFIXES = "KMGT"
_UNITS = {
    "": 1,
    "B": 1,
    **{letter: 2 ** (10 * power) for power, letter in enumerate(_PREFIXES, 1)},
    **{f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate(_PREFIXES, 1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate(_PREFIXES, 1)},
}
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# Versions 2 and 1: the limit, what is used, and the prefix of the whole tree's statistics.
_CGROUP_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class Resources:
    """What is free, in bytes: of the device's memory (None on a CPU) and of the host's.

    `all_devices` is what is free on all `device_count` devices that a model may be laid over.
    """

    device: str
    host_memory: int
    device_memory: int | None = None
    all_devices: int = 0
    device_count: int = 1

    @property
    def kind(self) -> str:
        """The kind of device: cpu, cuda or mps."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class MemorySplit:
    """How a model is laid over devices: of each, `reserve` bytes are kept from its weights.

    No more than `bound` bytes of a device are used in all (None: what is free).
    """

    reserve: int
    bound: int | None = None

    def for_weights(self, free: Mapping[int, int], host: int) -> dict[int | str, int]:
        """Bytes for weights of each device, of which `free` are free, and of the host (`cpu`)."""
        sizes: dict[int | str, int] = {"cpu": host}
        for index, size in free.items():
            sizes[index] = max(0, min(size, self.bound or size) - self.reserve)
        return sizes


def measure_resources(device: str) -> Resources:
    """What is free on the device and on the host, now; of the host, this rank's share."""
    import torch

    host = free_host_memory() // _ranks_here()
    if not device.startswith("cuda"):
        return Resources(device, host)
    free = free_on_devices(device)
    own = torch.cuda.mem_get_info(torch.device(device))[0]
    return Resources(device, host, own, sum(free.values()), len(free))


def with_room_for(free: Resources, size: int) -> Resources:
    """What would be free if `size` bytes, of a model that is loaded, were not used."""
    if free.device_memory is None:
        return replace(free, host_memory=free.host_memory + size)
    return replace(
        free, device_memory=free.device_memory + size, all_devices=free.all_devices + size
    )


def free_on_devices(device: str) -> dict[int, int]:
    """Bytes that are free on each CUDA device over which a model on `device` may be laid.

    These are all, but for several ranks on this machine, of which each has its own alone; and
    none where `device` is not a CUDA device.
    """
    import torch

    if not device.startswith("cuda"):
        return {}
    own = torch.device(device).index
    if _ranks_here() > 1:
        indices = [torch.cuda.current_device() if own is None else own]
    else:
        indices = list(range(torch.cuda.device_count()))
    return {index: torch.cuda.mem_get_info(index)[0] for index in indices}


def free_disk(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def require_device_name(device: str) -> None:
    """Raise UsageError for what is the name of no device, here or elsewhere."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", device):
        raise UsageError(f"--device {device} is unknown; it is auto, cpu, cuda, cuda:N or mps.")


def resolve_device(device: str) -> str:
    """The device that `auto` means here; UsageError when the one named is not at hand."""
    require_device_name(device)
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is available; use --device cpu.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {device}: MPS is not available; use --device cpu.")
    if ":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, "
            "counted from 0."
        )
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype that `auto` means: bfloat16 where the hardware multiplies it fast, else float32."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown; it is one of {', '.join(DTYPES)}.")
    if dtype != "auto":
        return dtype
    return "bfloat16" if fast_bfloat16(device) else "float32"


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
        elif device == "mps":
            torch.mps.synchronize()

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
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size == 0:
        raise UsageError(
            f"{text!r} is no size; write for example 24GiB, 500MB or a number of bytes."
        )
    return size


def format_size(size: float) -> str:
    """A size for people, as in `1.5 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:.0f} bytes"


def _ranks_here() -> int:
    """How many ranks torchrun has started on this machine, which share its memory."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdigit() else 1


def free_host_memory() -> int:
    """What this process may still take: of the machine, and of every group that it is in."""
    import psutil

    left = [_left_in(folder) for folder in _cgroups()]
    return min(
        [int(psutil.virtual_memory().available), *(size for size in left if size is not None)]
    )


def _cgroups() -> Iterator[Path]:
    """The folders of the control groups that may limit this process's memory.

    Within a container its own group is the root; a batch system's job has a group of its own,
    some levels below it. What is not mounted here does not exist.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        if "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
        elif controllers == "":
            root = _CGROUP_ROOT
        else:
            continue
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _left_in(folder: Path) -> int | None:
    """What a control group's limit leaves; None where it has none.

    What it has used includes the files it has read, a model's weights say, which the kernel drops
    when the memory is wanted.
    """
    for limit, used, prefix in _CGROUP_FILES:
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        sizes = dict(line.split()[:2] for line in lines)
        files = (f"{prefix}inactive_file", f"{prefix}active_file")
        return max(0, left + sum(int(sizes.get(name, 0)) for name in files))
    return None
