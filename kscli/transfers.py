"""Sums on the host of what a device computes, while the device goes on.

A product on another device than its sum is copied through a pinned buffer on a stream of its
own, and a thread adds it in float64 as soon as the copy is done; the device computes meanwhile.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# Copies under way at most: one is being filled while the other is added.
BUFFERS = 2


class HostSums:
    """Adds float32 tensors to float64 sums, in the order in which they come."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: deque[Future[None]] = deque()

    def add(self, total: Tensor, product: Tensor) -> None:
        """total += product. On one device at once; from CUDA to the host before `wait` returns."""
        if total.device == product.device:
            total.add_(product)
        elif product.device.type == "cuda":
            self._add_later(total, product)
        else:
            total.add_(product.to(total.device))

    def wait(self) -> None:
        """Return when everything was added; raises what went wrong in the thread."""
        while self._under_way:
            self._under_way.popleft().result()

    def _add_later(self, total: Tensor, product: Tensor) -> None:
        while len(self._under_way) >= BUFFERS:
            self._under_way.popleft().result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "host sums")
        device = product.device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        buffer = torch.empty(product.shape, dtype=product.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            buffer.copy_(product, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        # Its memory must not be given to another tensor before the copy has read it.
        product.record_stream(stream)
        self._under_way.append(self._thread.submit(_add_when_copied, total, buffer, copied))


def _add_when_copied(total: Tensor, buffer: Tensor, copied: torch.cuda.Event) -> None:
    copied.synchronize()
    total.add_(buffer)
