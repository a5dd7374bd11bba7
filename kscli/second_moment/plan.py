"""The memory plan of cache-cov: what goes where, in how many passes, how long it will take.

Of the sums of one layer, E = `lower_entries(d_m)` entries are held, of a layer of experts so many
of each. They are laid out so that the
corpus is read as seldom as possible, and with that as close to the device as possible:

- `device`: in float64 on the device, 8 E bytes a layer;
- `split`: in float32 on the device, 4 E, flushed now and then to float64 on the host, 8 E;
- `host`: in float64 on the host, 8 E, where every batch's products go.

Where they fit nowhere at once, the layers are cut into groups, one pass each; a pass stops at
its last layer, so that the first groups cost less than the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from kscli.errors import ModelError
from kscli.layers import format_layers
from kscli.models.shape import ModelShape
from kscli.resources import MemorySplit, Resources, format_size
from kscli.second_moment.moments import Product, lower_entries

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_BATCH = 4096
DEVICE_BATCH = (2048, 32768)
# Values a token that live at once in a forward pass: of the MLP's width, and of the model's.
LIVE_WIDE, LIVE_NARROW = 4, 8
ACTIVATION_BYTES = 2**31
# What Python and its libraries take besides: 450 to 490 MiB were measured on a CPU. Of a device,
# its libraries' workspaces and what lies unused between tensors, at least this share.
OVERHEAD = 2**29
SPARE_SHARE = 1 / 32
# What a decoder reaches of a bare matrix product's rate (SmolLM2-135M on a CPU: 0.6 to 0.7).
EFFICIENCY = 0.6


Placement = Literal["device", "split", "host"]


@dataclass(frozen=True)
class RunPlan:
    """How the sums are computed; but for rounding, what they are does not depend on it.

    `groups` of layers are summed one pass each; `placement` says where the sums lie; a batch
    holds `batch_tokens` tokens at most, padding included. `product` says how keys are multiplied on
    a CPU.
    """

    groups: tuple[tuple[int, ...], ...]
    placement: Placement
    batch_tokens: int
    product: Product = field(default="float32", kw_only=True)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers, ascending."""
        return tuple(layer for group in self.groups for layer in group)

    @property
    def passes(self) -> int:
        """How often the corpus is read."""
        return len(self.groups)


@dataclass(frozen=True)
class MemoryPlan(RunPlan):
    """A plan with what it takes, in bytes. `spread`: the model is laid over all devices.

    `model`, `device_sums`, `host_sums` and `work` (activations, products, one layer in the making,
    and what libraries take) are what memory is for; `output` and `checkpoints` are on the disk.
    Of a model that is spread, `host_model` has no room on the devices; `max_memory` is the
    request's.
    """

    device: str
    spread: bool
    model: int
    device_sums: int
    host_sums: int
    work: int
    output: int
    checkpoints: int
    host_model: int = 0
    max_memory: int | None = None

    @property
    def split(self) -> MemorySplit | None:
        """How the model is laid over devices, if it is."""
        return MemorySplit(self.work, self.max_memory) if self.spread else None

    def sentences(self) -> list[str]:
        """The plan for people."""
        where = []
        if self.device_sums:
            kind = "float64" if self.placement == "device" else "float32"
            where.append(f"{format_size(self.device_sums)} on {self.device} ({kind})")
        if self.host_sums:
            where.append(f"{format_size(self.host_sums)} on the host (float64)")
        passes = (
            f"one pass over {len(self.layers)} layers"
            if self.passes == 1
            else f"{self.passes} passes, over layers "
            + ", ".join(format_layers(group) for group in self.groups)
        )
        spread = ", laid over all devices" if self.spread else ""
        if self.host_model:
            spread = f", of which {format_size(self.host_model)} lie on the host"
        return [
            f"{passes}: the model {format_size(self.model)}{spread}, the sums "
            f"{' and '.join(where)}, batches of {self.batch_tokens:,} tokens; on disk "
            f"{format_size(self.output)}, and meanwhile up to {format_size(self.checkpoints)} of "
            "checkpoints."
        ]

    @property
    def disk(self) -> int:
        """Bytes on the disk at most: the file, and the checkpoints until it is there."""
        return self.output + self.checkpoints

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs: sizes in bytes."""
        groups = [list(group) for group in self.groups]
        return {**asdict(self), "groups": groups, "passes": self.passes}


@dataclass(frozen=True)
class RunTime:
    """How many tokens there are and how long they take (None: it cannot be told), at what rate.

    `at_most`: there may be fewer.
    """

    tokens: float | None
    seconds: float | None
    tokens_per_second: float
    at_most: bool


def batch_tokens_for(shape: ModelShape, dtype: str, kind: str) -> int:
    """How many tokens a batch holds: a pure function of model, dtype and kind of device.

    On a CPU more would not be faster. On a device it is the power of two whose activations are
    about 2 GiB, between 2,048 and 32,768.
    """
    if kind != "cuda":
        return CPU_BATCH
    fitting = ACTIVATION_BYTES / _bytes_a_token(shape, dtype)
    least, most = DEVICE_BATCH
    return int(min(max(2 ** math.floor(math.log2(fitting)), least), most))


def plan_memory(
    shape: ModelShape,
    layers: Sequence[int],
    dtype: str,
    resources: Resources,
    *,
    batch_tokens: int | None = None,
    max_memory: int | None = None,
) -> MemoryPlan:
    """Lay out the sums of `layers` in what is free, in the fewest passes.

    `batch_tokens` of None is chosen here; `max_memory` bounds what is used of each device, on a
    CPU of this process. Raises ModelError when not even one layer fits.
    """
    batch_tokens = batch_tokens or batch_tokens_for(shape, dtype, resources.kind)
    entries = sum(map(lower_entries, shape.widths))
    model = shape.parameters * ITEM_BYTES[dtype]
    # The products of one C, and a layer's on their way to the file or to the settling estimate.
    products = 4 * lower_entries(max(shape.widths))
    layer = (16 if shape.experts is None else 8) * _squares(shape.widths)
    work = batch_tokens * _bytes_a_token(shape, dtype) + products
    on_device = resources.device_memory is not None
    free = resources.host_memory if resources.device_memory is None else resources.device_memory
    free = min(free, max_memory or free)
    spread, host_model = False, 0
    if on_device:
        work += max(OVERHEAD, int(SPARE_SHARE * free))
        spread = model + work > free
        host_model = _beside_devices(shape, dtype, resources, work, max_memory) if spread else 0
        left = 0 if spread else free - model - work
        host = resources.host_memory - layer - OVERHEAD - host_model
        room = {
            "device": left // (8 * entries),
            "split": min(left // (4 * entries), host // (8 * entries)),
            "host": host // (8 * entries),
        }
        if host < 0:
            room = {}
    else:
        work += layer + OVERHEAD
        room = {"host": (free - model - work) // (8 * entries)}
    placement, groups = _fewest_passes(layers, room)
    if not groups:
        host_needs = layer + OVERHEAD if on_device else 0
        raise _too_large(max_memory, resources, model + work + 8 * entries + host_needs, free)
    most = max(map(len, groups))
    packed = sum(4 * width * (width + 1) for width in shape.widths)
    return MemoryPlan(
        device=resources.device if on_device else "cpu",
        groups=groups,
        placement=placement,
        batch_tokens=batch_tokens,
        spread=spread,
        model=model,
        device_sums={"device": 8, "split": 4, "host": 0}[placement] * entries * most,
        host_sums=(0 if placement == "device" else 8) * entries * most,
        work=work,
        output=4 * _squares(shape.widths) * len(layers),
        checkpoints=packed * (2 * most + len(layers) - most),
        host_model=host_model,
        max_memory=max_memory,
    )


def seconds_a_token(plan: MemoryPlan, shape: ModelShape, length: float, rate: float) -> float:
    """How long a token takes in documents of `length` tokens, an estimate.

    Of every pass: 2 operations a parameter of the layers up to its last (of experts, of those that
    a token has) and 2 x length x hidden a layer for attention (causal, so half of 4), at EFFICIENCY
    of the `rate` of a bare matrix product; and d_m^2 for each summed layer's half product of each
    key, at that rate.
    """
    of_layer = 2 * shape.active_parameters / shape.n_layers + 2 * length * shape.hidden_size
    seconds = 0.0
    for group in plan.groups:
        seconds += of_layer * (group[-1] + 1) / (EFFICIENCY * rate)
        seconds += len(group) * _squares(shape.widths_a_token) / rate
    return seconds


def _bytes_a_token(shape: ModelShape, dtype: str) -> int:
    wide = sum(shape.widths_a_token)
    return (LIVE_WIDE * wide + LIVE_NARROW * shape.hidden_size) * ITEM_BYTES[dtype]


def _squares(widths: Sequence[int]) -> int:
    return sum(width**2 for width in widths)


def _fewest_passes(
    layers: Sequence[int], room: dict[str, int]
) -> tuple[Placement, tuple[tuple[int, ...], ...]]:
    """The first placement with the fewest passes, and its groups; none where no layer fits."""
    passes = {
        placement: math.ceil(len(layers) / fitting)
        for placement, fitting in room.items()
        if fitting > 0
    }
    if not passes:
        return "host", ()
    placement = min(passes, key=lambda name: passes[name])
    count = passes[placement]
    bounds = [len(layers) * at // count for at in range(count + 1)]
    groups = tuple(tuple(layers[start:end]) for start, end in pairwise(bounds))
    return placement, groups  # type: ignore[return-value]


def _beside_devices(
    shape: ModelShape, dtype: str, resources: Resources, work: int, max_memory: int | None
) -> int:
    """Bytes of weights for which all devices together have no room, beside `work` on each.

    One device lends its room to each part that the host holds, in turn, the largest of which is a
    layer, or the embeddings and the head.
    """
    count = resources.device_count
    room = min(resources.all_devices, count * (max_memory or resources.all_devices))
    outside = shape.parameters - shape.layer_parameters
    largest = max(shape.layer_parameters // shape.n_layers, outside) * ITEM_BYTES[dtype]
    room -= count * work + largest
    if room < 0:
        raise _too_large(max_memory, resources, work + largest, resources.all_devices // count)
    return max(0, shape.parameters * ITEM_BYTES[dtype] - room)


def _too_large(max_memory: int | None, resources: Resources, needed: int, free: int) -> ModelError:
    bound = "--max-memory allows" if max_memory else "are free"
    there = "" if resources.device_memory is None else f" on {resources.device}"
    host = f" and {format_size(resources.host_memory)} are free on the host" if there else ""
    return ModelError(
        f"the model and one layer's sums need about {format_size(needed)}, and {format_size(free)} "
        f"{bound}{there}{host}; use a smaller --dtype or --batch-tokens, another --device, or a "
        "larger machine."
    )
