"""k^T k of a batch of keys: the lower triangle in float32, by what multiplies fastest here.

The product of n keys is n d_m^2 multiplications of which half are enough, C being symmetric.
It comes as rows of blocks, whose height is what was fastest on each kind of hardware:

- float32 on a CPU: BLAS `ssyrk`, the whole triangle at once up to 4,096 columns;
- bfloat16 on a CPU that multiplies it: oneDNN takes float32 tensors through bfloat16, which is
  exact for keys that are bfloat16 already, and sums in float32 (`mkldnn.matmul.fp32_precision`
  is global, and put back after each product);
- bfloat16 and float16 on CUDA: `torch.mm` with float32 output, for products of 16-bit values
  are exact in float32; float32 as it is, without TF32 unless the user has asked torch for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from kscli.resources import fast_bfloat16

SYRK_ROWS = 4096
BFLOAT16_ROWS = 256
DEVICE_ROWS = 1024


@dataclass(frozen=True)
class BlockRow:
    """Rows `start` to `end` of the lower triangle of k^T k: `product` (end - start, end) float32.

    What lies above the diagonal is not defined.
    """

    start: int
    end: int
    product: Tensor


def lower_products(keys: Tensor) -> list[BlockRow]:
    """The lower triangle of keys^T keys for (n, d_m) keys, on the device of the keys."""
    if keys.device.type != "cpu":
        return _on_device(keys)
    if keys.dtype == torch.bfloat16 and fast_bfloat16("cpu"):
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
