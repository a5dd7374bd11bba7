from __future__ import annotations

import numpy as np
import pytest
import torch

from kscli.moments import BLOCK, SecondMoment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_batches_is_the_mean_outer_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys = torch.randn(500, 37).to(dtype)
    moment = SecondMoment(37)
    for start, end in ((0, 1), (1, 130), (130, 500)):
        assert moment.update(keys[start:end])
    exact = keys.double().numpy()
    C = moment.matrix()
    assert C.dtype == np.float32
    assert moment.count == 500
    np.testing.assert_array_equal(C, C.T)
    expected = exact.T @ exact / 500
    scale = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    # Entrywise: 370 products summed in float32, and one rounding of the result.
    assert (np.abs(C - expected) / scale).max() < 371 * 2**-24


def test_the_error_does_not_grow_with_the_corpus() -> None:
    """A float32 running sum of 200 batches loses digits that the float64 one keeps."""
    torch.manual_seed(1)
    keys = torch.rand(64, 16) + 1
    moment = SecondMoment(16)
    running = torch.zeros(16, 16)
    for _ in range(2000):
        moment.update(keys)
        running += keys.T @ keys
    exact = (keys.double().T @ keys.double()).numpy() / 64
    error = np.abs(moment.matrix() - exact).max()
    assert error < 64 * 2**-24 * exact.max()
    assert error < np.abs(running.numpy() / 128_000 - exact).max() / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_not_added(value: float) -> None:
    keys = torch.ones(5, 4)
    moment = SecondMoment(4)
    assert moment.update(keys)
    bad = keys.clone()
    bad[3, 2] = value
    assert not moment.update(bad)
    assert moment.count == 5
    np.testing.assert_array_equal(moment.matrix(), np.ones((4, 4), dtype=np.float32))


def test_keys_that_are_a_view_of_a_larger_tensor() -> None:
    torch.manual_seed(2)
    whole = torch.randn(30, 12)
    part = whole[::2, 3:9]
    moment = SecondMoment(6)
    moment.update(part)
    expected = part.double().numpy()
    np.testing.assert_allclose(moment.matrix(), expected.T @ expected / 15, rtol=1e-5, atol=1e-6)


def test_several_rows_of_blocks_and_a_ragged_last_one() -> None:
    """d_m beyond one block, as real models have."""
    torch.manual_seed(3)
    keys = torch.randn(70, 2 * BLOCK + 37)
    moment = SecondMoment(keys.shape[1])
    moment.update(keys[:30])
    moment.update(keys[30:])
    exact = keys.double().numpy()
    expected = exact.T @ exact / 70
    C = moment.matrix()
    np.testing.assert_array_equal(C, C.T)
    scale = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    assert (np.abs(C - expected) / scale).max() < 41 * 2**-24
