from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kscli.pmatrix import superposition
from kscli.second_moment import moments
from kscli.second_moment.moments import (
    ROWS,
    SYRK_ROWS,
    HostSums,
    SecondMoment,
    lower_entries,
    lower_products,
    massive_keys,
)

UNIT = 2**-24
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


def exact(keys: torch.Tensor) -> NDArray[np.float64]:
    wide = keys.double().numpy()
    return wide.T @ wide / len(wide)


def error(C: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """The largest entrywise error, in units of sqrt(C_ii C_jj)."""
    scale = np.sqrt(np.diagonal(expected))
    return float((np.abs(C - expected) / np.outer(scale, scale)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partial", [False, True])
def test_the_sum_over_batches_is_the_mean_outer_product(dtype: torch.dtype, partial: bool) -> None:
    torch.manual_seed(0)
    keys = torch.randn(500, 37).to(dtype)
    moment = SecondMoment(37, partial=partial)
    for start, end in ((0, 1), (1, 130), (130, 500)):
        assert moment.add(keys[start:end]).item()
    C = moment.matrix()
    assert C.dtype == np.float32
    assert moment.count == 500
    np.testing.assert_array_equal(C, C.T)
    # The most products that are summed in float32, and one rounding of the result.
    assert error(C, exact(keys)) < ((500 if partial else 370) + 1) * UNIT


@pytest.mark.parametrize("d_m", [ROWS, 2 * ROWS + 37, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_rows_of_blocks_and_a_ragged_last_one(d_m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    keys = torch.randn(700, d_m).to(dtype)
    moment = SecondMoment(d_m)
    moment.add(keys[:300])
    moment.add(keys[300:])
    C = moment.matrix()
    np.testing.assert_array_equal(C, C.T)
    assert error(C, exact(keys)) < 401 * UNIT
    np.testing.assert_allclose(moment.sums() / 700, C, rtol=1e-6)
    np.testing.assert_array_equal(moment.sums(), moment.sums().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_keys_on_and_below_the_diagonal(dtype: torch.dtype) -> None:
    """Each kind of product: BLAS, oneDNN through bfloat16, and blocks as on a device."""
    torch.manual_seed(4)
    d_m = 1100
    keys = torch.randn(90, d_m).to(dtype)
    wide = keys.double()
    expected = wide.T @ wide
    ways = [lower_products(keys), moments._on_device(keys), moments._by_syrk(keys.float())]
    for rows in ways:
        assert [row.start for row in rows] == [0, *(row.end for row in rows[:-1])]
        assert rows[-1].end == d_m
        for row in rows:
            assert row.product.dtype == torch.float32
            lower = torch.tril(torch.ones_like(row.product), row.start)
            difference = (row.product - expected[row.start : row.end, : row.end]) * lower
            assert difference.abs().max() < 91 * UNIT * expected.diagonal().max()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_blas_in_several_rows_of_blocks() -> None:
    torch.manual_seed(5)
    keys = torch.randn(3, SYRK_ROWS + 10)
    first, second = lower_products(keys)
    assert (second.start, second.end) == (SYRK_ROWS, SYRK_ROWS + 10)
    expected = keys.T @ keys
    torch.testing.assert_close(second.product[:, :SYRK_ROWS], expected[SYRK_ROWS:, :SYRK_ROWS])
    torch.testing.assert_close(
        second.product[:, SYRK_ROWS:].tril(), expected[SYRK_ROWS:, SYRK_ROWS:].tril()
    )
    torch.testing.assert_close(first.product.tril(), expected[:SYRK_ROWS, :SYRK_ROWS].tril())


@pytest.mark.parametrize("rotated", [False, True])
def test_a_million_tokens_of_condition_1e8(rotated: bool) -> None:
    """The error does not grow with the corpus, and does not feel the scale of the keys."""
    generator = torch.Generator().manual_seed(6)
    d_m, batch, batches = 48, 4096, 245
    scale = torch.logspace(0, -4, d_m, dtype=torch.float64)
    mix = torch.diag(scale)
    if rotated:
        rotation, _ = torch.linalg.qr(
            torch.randn(d_m, d_m, generator=generator, dtype=torch.float64)
        )
        mix = mix @ rotation
    moment = SecondMoment(d_m)
    sums = torch.zeros(d_m, d_m, dtype=torch.float64)
    for _ in range(batches):
        z = torch.randn(batch, d_m, generator=generator, dtype=torch.float64)
        keys = (z @ mix).float()
        moment.add(keys)
        sums += keys.double().T @ keys.double()
    count = batch * batches
    assert moment.count == count > 1_000_000
    expected = (sums / count).numpy()
    assert np.linalg.cond(expected) > 5e7
    C = moment.matrix()
    assert error(C, expected) < 1e-6
    if not rotated:
        some = (torch.randn(24, d_m, generator=generator, dtype=torch.float64) @ mix).numpy()
        P = superposition(C.astype(np.float64), count, some).P
        G = some @ np.linalg.solve(expected, some.T)
        np.testing.assert_allclose(P, G / np.diagonal(G)[:, None], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_told(value: float) -> None:
    keys = torch.ones(5, 4)
    moment = SecondMoment(4)
    assert moment.add(keys).item()
    keys[3, 2] = value
    assert not moment.add(keys).item()


def test_keys_that_are_a_view_of_a_larger_tensor_with_padding() -> None:
    torch.manual_seed(2)
    whole = torch.randn(30, 12)
    part = whole[::2, 3:9]
    part[4:7] = 0
    moment = SecondMoment(6)
    moment.add(part, tokens=12)
    wide = part.double().numpy()
    assert moment.count == 12
    np.testing.assert_allclose(moment.matrix(), wide.T @ wide / 12, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_m", [3, ROWS, ROWS + 44])
def test_packed_sums_are_the_lower_triangle_and_go_on_bit_for_bit(d_m: int) -> None:
    torch.manual_seed(8)
    keys = torch.randn(60, d_m)
    whole, first = SecondMoment(d_m), SecondMoment(d_m)
    whole.add(keys[:25])
    whole.add(keys[25:])
    first.add(keys[:25])
    packed = first.packed()
    np.testing.assert_array_equal(packed, first.sums()[np.tril_indices(d_m)])
    second = SecondMoment(d_m)
    second.add(torch.ones(4, d_m))
    second.restore(packed, 25)
    second.add(keys[25:])
    assert second.count == 60
    np.testing.assert_array_equal(second.matrix(), whole.matrix())


def test_what_is_held_is_half_and_a_block() -> None:
    held = sum(total.numel() for total in SecondMoment(4 * ROWS)._sums)
    assert held == lower_entries(4 * ROWS) == (4 * 5 // 2) * ROWS**2


def test_sums_on_the_host_come_in_order_and_errors_are_raised() -> None:
    total = torch.zeros(3, dtype=torch.float64)
    sums = HostSums()
    sums.add([total], [torch.ones(3)])
    sums.wait()
    assert total.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError):
        sums.add([total], [torch.ones(4)])


def with_massive(dtype: torch.dtype, tokens: int = 600, d_m: int = 64) -> torch.Tensor:
    """Keys, every hundredth of which is 600 times as long as the others, in one direction."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, d_m, generator=generator)
    direction = torch.randn(d_m, generator=generator)
    keys[::100] += 600 * direction
    return keys.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("kept", [1, 64])
@pytest.mark.parametrize("device", DEVICES)
def test_massive_keys_do_not_spoil_the_others_sums(
    dtype: torch.dtype, partial: bool, kept: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "MASSIVE_KEPT", kept)
    keys = with_massive(dtype)
    before = keys.clone()
    moment = SecondMoment(64, partial=partial)
    for batch in keys.split(200):
        assert moment.add(batch.to(device)).item()
    assert torch.equal(keys, before)
    assert moment.count == 600
    S = moment.sums() / 600
    others = keys[torch.arange(600) % 100 != 0].double().numpy()
    A = others.T @ others / 600
    wrong = np.abs(S - exact(keys)) / np.sqrt(np.outer(np.diagonal(A), np.diagonal(A)))
    # The bound of the module, of which M's own rounding in float64 is no part.
    assert wrong.max() < (600 if partial else 200) * UNIT
    # In one float32 sum the same tokens cost digits.
    spoilt = keys.float().T @ keys.float() / 600
    scale = np.sqrt(np.outer(np.diagonal(A), np.diagonal(A)))
    assert (np.abs(spoilt.numpy() - exact(keys)) / scale).max() > 100 * wrong.max()


def test_which_keys_are_massive() -> None:
    keys = with_massive(torch.float32)
    assert massive_keys(keys).tolist() == list(range(0, 600, 100))
    assert massive_keys(torch.randn(500, 64)).tolist() == []
    padded = torch.cat([keys, torch.zeros(60, 64)])
    assert massive_keys(padded).tolist() == list(range(0, 600, 100))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_massive_key_that_is_not_finite_is_noticed(value: float) -> None:
    keys = with_massive(torch.float32)
    keys[100, 3] = value
    assert not SecondMoment(64).add(keys).item()


def test_massive_float16_keys_are_finite_though_their_sum_is_not() -> None:
    keys = torch.ones(20, 64, dtype=torch.float16)
    keys[::10] = 3000
    assert keys[::10].sum().isinf()
    moment = SecondMoment(64)
    assert moment.add(keys).item()
    np.testing.assert_array_equal(moment.sums(), np.full((64, 64), 18 + 2 * 3000.0**2))


def test_a_restored_moment_goes_on_with_massive_keys() -> None:
    keys = with_massive(torch.float32)
    whole, first, second = (SecondMoment(64) for _ in range(3))
    whole.add(keys[:300])
    whole.add(keys[300:])
    first.add(keys[:300])
    second.restore(first.packed(), first.count)
    second.add(keys[300:])
    np.testing.assert_allclose(second.sums(), whole.sums(), rtol=1e-14)


def test_the_fastest_product_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moments.fastest_product(4096, torch.float32)[0] == "float32"
    assert moments.fastest_product(512, torch.bfloat16)[0] == "float32"
    clock = iter(range(100))
    monkeypatch.setattr(moments.time, "perf_counter", lambda: next(clock))
    slower = {"name": ""}

    def slow(keys: torch.Tensor, product: str) -> list[moments.BlockRow]:
        for _ in range(2 if product == slower["name"] else 0):
            next(clock)
        return []

    monkeypatch.setattr(moments, "lower_products", slow)
    for slower["name"], fastest, expected in (
        ("float32", "bfloat16", 1 / 3),
        ("bfloat16", "float32", 3),
    ):
        found, ratio = moments.fastest_product(1536, torch.bfloat16)
        assert found == fastest
        assert ratio == pytest.approx(expected)


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_both_products_of_bfloat16_keys_are_exact_in_float32(product: moments.Product) -> None:
    keys = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    moment = SecondMoment(70, product=product)
    moment.add(keys)
    assert error(moment.matrix(), exact(keys)) < 301 * UNIT


@pytest.mark.parametrize("device", [*DEVICES, "mps", "meta"])
def test_the_lower_sums_are_those_of_the_matrix(device: str) -> None:
    keys = with_massive(torch.float32)
    moment = SecondMoment(64)
    moment.add(keys)
    lower = moment.lower_sums(device)
    assert lower.device.type == ("cuda" if device == "cuda" else "cpu")
    np.testing.assert_array_equal(lower.cpu().tril().numpy(), np.tril(moment.sums()))
