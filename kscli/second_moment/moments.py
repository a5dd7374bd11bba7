"""The second moment C = (1/N) sum k k^T of one layer, summed over batches of keys.

Only rows of blocks of the lower triangle are held. A batch's products are summed in float32, and
what was summed over at most b tokens in float32 is then added in float64, so the error does not
grow with the corpus. Where nothing is kept in float32 between batches, b is a batch's tokens;
otherwise the tokens from one `flush` to the next and a batch more.

Massive activations (Sun et al. 2024, arXiv 2402.17762) are tokens whose keys are far longer than
the others'. In a float32 sum their rounding would be as large as the other tokens' products. So the
keys that are over `MASSIVE` times as long as the batch's median are summed in float64, apart from
the others. With C = A + M, A of the other keys and M of these, every entry of C is within
b 2^-24 sqrt(A_ii A_jj) of the exact mean of products of the keys (float32 rounding of b products
and sums, to first order; Higham, Accuracy and Stability, 3.1), plus one float32 rounding of the
result. In A no key is longer than `MASSIVE` times a median.

A batch's products are n d_m^2 multiplications for n keys, of which half are enough, C being
symmetric. They come as rows of blocks, whose height is what was fastest on each kind of hardware:

- float32 on a CPU: BLAS `ssyrk`, the whole triangle at once up to 4,096 columns;
- bfloat16 on a CPU: the same in float32, or oneDNN, which takes float32 tensors through bfloat16.
  That is exact for keys that are bfloat16 already, and sums in float32
  (`mkldnn.matmul.fp32_precision` is global, and put back after each product). Which is faster
  differs from processor to processor, so `fastest_product` measures it;
- bfloat16 and float16 on CUDA: `torch.mm` with float32 output, for products of 16-bit values
  are exact in float32; float32 as it is, without TF32 unless the user has asked torch for it.

Products on another device than their sums are copied through pinned buffers on a stream of their
own, and a thread adds them in float64 when the copy is done; the device computes meanwhile.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from torch import Tensor

ROWS = 256
SYRK_ROWS = 4096
BFLOAT16_ROWS = 256
DEVICE_ROWS = 1024
# A key is massive if it is over so many times as long as the batch's median.
MASSIVE = 10.0
# So many massive keys of a layer are kept before they are added: one pass over its sums for all.
MASSIVE_KEPT = 64
TIMED_TOKENS, TIMED_WIDTH = 1024, 4096
NARROW, WORTH = 1024, 0.8
# Layers under way at most: one is copied while another is added.
UNDER_WAY = 2

Product = Literal["float32", "bfloat16"]
Float = TypeVar("Float", np.float32, np.float64)


def lower_entries(d_m: int) -> int:
    """How many entries of a (d_m, d_m) lower triangle are held, blocks being whole."""
    return sum((end - start) * end for start, end in _spans(d_m, ROWS))


class SecondMoment:
    """Sums k k^T over the keys of one layer; `add` takes keys, `matrix` gives C.

    The float64 sums lie on the device `home`: 8 bytes for each of `lower_entries`. With
    `partial`, batches are summed in float32 on the keys' own device, 4 bytes an entry, until
    `flush` adds them to the float64 sums. `host` carries what comes from another device. `product`
    says how keys are multiplied on a CPU.
    """

    def __init__(
        self,
        d_m: int,
        *,
        home: str = "cpu",
        partial: bool = False,
        host: HostSums | None = None,
        product: Product = "float32",
    ) -> None:
        self.count = 0
        self._product: Product = product
        self.d_m = d_m
        self._keep_partial = partial
        self._partial: list[Tensor] = []
        self._massive: list[Tensor] = []
        self._host = host or HostSums()
        self._sums = [
            torch.zeros(end - start, end, dtype=torch.float64, device=home)
            for start, end in _spans(d_m, ROWS)
        ]

    def add(self, keys: Tensor, tokens: int | None = None) -> Tensor:
        """Add (n, d_m) keys; returns whether all products are finite, a 0-d bool tensor.

        `tokens` is how many of the rows are keys, the others being 0 (None: all are). Where the
        products are not finite, the sums are spoilt. Nothing was added when this raises for want
        of memory.
        """
        apart = massive_keys(keys)
        massive = keys[apart]
        products = _products_without(keys, apart, massive, self._product)
        if self._keep_partial and not self._partial:
            self._partial = [
                torch.zeros(total.shape, dtype=torch.float32, device=keys.device)
                for total in self._sums
            ]
        trace = torch.stack([torch.diagonal(row.product, row.start).sum() for row in products])
        self._host.add(self._partial if self._keep_partial else self._sums, self._cut(products))
        self.count += keys.shape[0] if tokens is None else tokens
        if len(massive):
            self._massive.append(massive)
            if sum(map(len, self._massive)) >= MASSIVE_KEPT:
                self._add_massive()
        # Of each entry: a sum of float16 entries can overflow where none of them is infinite.
        return trace.sum().isfinite() & massive.isfinite().all()

    def flush(self) -> None:
        """Bring everything that was added into the float64 sums, and wait for it."""
        if self._partial:
            self._host.add(self._sums, self._partial)
        self._host.wait()
        self._add_massive()
        # They were created in inference mode, so only inference mode may change them.
        with torch.inference_mode():
            for partial in self._partial:
                partial.zero_()

    def _add_massive(self) -> None:
        """Add the products of the massive keys that were kept, in float64."""
        if not self._massive:
            return
        keys = torch.cat(self._massive).to(self._sums[0].device).double()
        self._massive.clear()
        self._host.wait()
        for (start, end), total in zip(_spans(self.d_m, ROWS), self._sums, strict=True):
            total.addmm_(keys[:, start:end].T, keys[:, :end])

    def matrix(self, tokens: int | None = None) -> NDArray[np.float32]:
        """C as a (d_m, d_m) float32 array, both triangles: a mean over `tokens`, else `count`."""
        return self._square(np.float32, tokens or self.count)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """What cov.h5 holds of the layer, by the name of its dataset."""
        return {"second_moment": self.matrix()}

    def sums(self) -> NDArray[np.float64]:
        """The sum of k k^T, not divided, as a new (d_m, d_m) float64 array, both triangles."""
        return self._square(np.float64, 1)

    def lower_sums(self, device: str) -> Tensor:
        """`sums` as a tensor on a CUDA device, if it has room, else on the host.

        What lies above the diagonal is not defined.
        """
        self.flush()
        shape = (self.d_m, self.d_m)
        try:
            # Other devices have no float64, or no memory of their own.
            on = device if device.startswith("cuda") else "cpu"
            S = torch.empty(shape, dtype=torch.float64, device=on)
        except torch.OutOfMemoryError:
            S = torch.empty(shape, dtype=torch.float64)
        for (start, end), total in zip(_spans(self.d_m, ROWS), self._sums, strict=True):
            S[start:end, :end] = total
        return S

    def _square(self, dtype: type[Float], divisor: int) -> NDArray[Float]:
        self.flush()
        S = np.empty((self.d_m, self.d_m), dtype)
        for (start, end), total in zip(_spans(self.d_m, ROWS), self._sums, strict=True):
            np.divide(total.cpu().numpy(), divisor, out=S[start:end, :end], casting="same_kind")
            S[:start, start:end] = S[start:end, :start].T
            corner = np.tril(S[start:end, start:end])
            S[start:end, start:end] = corner + np.tril(corner, -1).T
        return S

    def packed(self) -> NDArray[np.float64]:
        """The sums' lower triangle, row by row: d_m (d_m + 1) / 2 float64 values."""
        self.flush()
        packed = np.empty(self.d_m * (self.d_m + 1) // 2)
        for place, lower, total in self._packing():
            packed[place] = total.cpu().numpy()[lower]
        return packed

    def restore(self, packed: NDArray[np.float64], count: int) -> None:
        """Take the sums over `count` tokens that `packed` gave, in place of what is held."""
        self._partial, self._massive = [], []
        self.count = count
        for place, lower, total in self._packing():
            rows = np.zeros(total.shape)
            rows[lower] = packed[place]
            total.copy_(torch.from_numpy(rows))

    def _packing(self) -> Iterator[tuple[slice, NDArray[np.bool_], Tensor]]:
        """For each row of blocks: its place in `packed`, which entries lie there, and its sums."""
        for (start, end), total in zip(_spans(self.d_m, ROWS), self._sums, strict=True):
            place = slice(start * (start + 1) // 2, end * (end + 1) // 2)
            yield place, np.tri(end - start, end, start, dtype=bool), total

    def _cut(self, products: list[BlockRow]) -> list[Tensor]:
        """The products as rows of blocks of the height that is held."""
        return [
            row.product[start - row.start : end - row.start, :end]
            for row in products
            for start, end in _spans(self.d_m, ROWS)
            if row.start <= start < row.end
        ]


@dataclass(frozen=True)
class BlockRow:
    """Rows `start` to `end` of the lower triangle of k^T k: `product` (end - start, end) float32.

    What lies above the diagonal is not defined.
    """

    start: int
    end: int
    product: Tensor


def massive_keys(keys: Tensor) -> Tensor:
    """Which of (n, d_m) keys are over `MASSIVE` times as long as their median: (r,) indexes."""
    lengths = torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32)
    return torch.nonzero(lengths > MASSIVE * lengths.median())[:, 0]


def _products_without(
    keys: Tensor, apart: Tensor, massive: Tensor, product: Product
) -> list[BlockRow]:
    """The lower products of the keys but `massive`, those at the indexes `apart`, which stay."""
    if not len(apart):
        return lower_products(keys, product)
    # Keys of a forward pass were created in inference mode, so only inference mode may change them.
    with torch.inference_mode():
        # For the time of the product: a copy of all keys would cost more.
        keys[apart] = 0
        try:
            return lower_products(keys, product)
        finally:
            keys[apart] = massive


def fastest_product(d_m: int, dtype: torch.dtype) -> tuple[Product, float]:
    """How keys of a dtype are multiplied on this CPU, and bfloat16's time by float32's.

    bfloat16, for keys that are so already, where it takes under `WORTH` of float32's time, measured
    on keys of the shape, cut to `TIMED_TOKENS` and `TIMED_WIDTH`. The two round differently, so a
    close race must not decide, nor a narrow model, where there is little to win: C would differ
    from run to run.
    """
    if dtype != torch.bfloat16 or d_m < NARROW:
        return "float32", math.inf
    keys = torch.ones(TIMED_TOKENS, min(d_m, TIMED_WIDTH), dtype=dtype)
    products: tuple[Product, ...] = get_args(Product)
    took = dict.fromkeys(products, math.inf)
    for _ in range(5):
        for product in products:
            began = time.perf_counter()
            lower_products(keys, product)
            took[product] = min(took[product], time.perf_counter() - began)
    ratio = took["bfloat16"] / took["float32"]
    return "bfloat16" if ratio < WORTH else "float32", ratio


def lower_products(keys: Tensor, product: Product = "float32") -> list[BlockRow]:
    """The lower triangle of keys^T keys for (n, d_m) keys, on the device of the keys."""
    if keys.device.type != "cpu":
        return _on_device(keys)
    if product == "bfloat16":
        with _through_bfloat16():
            return _in_bfloat16(keys.float())
    return _by_syrk(keys.float())


def _on_device(keys: Tensor) -> list[BlockRow]:
    narrow = keys.dtype in (torch.bfloat16, torch.float16) and keys.device.type == "cuda"
    wide = keys if narrow else keys.float()
    rows = []
    for start, end in _spans(keys.shape[1], DEVICE_ROWS):
        own, before = wide[:, start:end].T, wide[:, :end]
        product = (
            torch.mm(own, before, out_dtype=torch.float32) if narrow else torch.mm(own, before)
        )
        rows.append(BlockRow(start, end, product))
    return rows


def _in_bfloat16(keys: Tensor) -> list[BlockRow]:
    return [
        BlockRow(start, end, torch.mm(keys[:, start:end].T, keys[:, :end]))
        for start, end in _spans(keys.shape[1], BFLOAT16_ROWS)
    ]


def _by_syrk(keys: Tensor) -> list[BlockRow]:
    rows = []
    for start, end in _spans(keys.shape[1], SYRK_ROWS):
        own = keys[:, start:end].contiguous()
        # The transposes are views: BLAS is column-major, where this is the upper triangle.
        square = torch.from_numpy(ssyrk(1.0, own.numpy().T, lower=0).T)
        if start == 0:
            rows.append(BlockRow(start, end, square))
            continue
        product = torch.empty(end - start, end)
        torch.mm(own.T, keys[:, :start], out=product[:, :start])
        product[:, start:] = square
        rows.append(BlockRow(start, end, product))
    return rows


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


@contextmanager
def _through_bfloat16() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
