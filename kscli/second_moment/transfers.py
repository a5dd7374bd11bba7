"""Sums on the host of what a device computes, while the device goes on.

Products on another device than their sums are copied through pinned buffers on a stream of its
own, and a thread adds them in float64 as soon as the copy is done; the device computes meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

# Layers under way at most: one is copied while another is added.
UNDER_WAY = 2


class HostSums:
    """Adds float32 tensors to float64 sums, in the order in which they come."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: deque[Future[None]] = deque()

    def add(self, totals: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        """totals += products, one by one, all or (for want of memory) none.

        On one device at once; from CUDA to the host before `wait` returns.
        """
        if products[0].device.type == "cuda" and totals[0].device.type == "cpu":
            self._add_later(totals, products)
            return
        here = [product.to(totals[0].device) for product in products]
        for total, product in zip(totals, here, strict=True):
            total.add_(product)

    def wait(self) -> None:
        """Return when everything was added; raises what went wrong in the thread."""
        while self._under_way:
            self._under_way.popleft().result()

    def _add_later(self, totals: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        while len(self._under_way) >= UNDER_WAY:
            self._under_way.popleft().result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "host sums")
        buffers = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in products]
        device = products[0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for buffer, product in zip(buffers, products, strict=True):
                buffer.copy_(product, non_blocking=True)
                # Its memory must not go to another tensor before the copy has read it.
                product.record_stream(stream)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        self._under_way.append(self._thread.submit(_add_when_copied, totals, buffers, copied))


def _add_when_copied(
    totals: Sequence[Tensor], buffers: Sequence[Tensor], copied: torch.cuda.Event
) -> None:
    copied.synchronize()
    for total, buffer in zip(totals, buffers, strict=True):
        total.add_(buffer)
