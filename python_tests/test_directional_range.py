"""The directional family at the ends of float32, on wide rows, and sums over many rows of few codes and few of many."""

import importlib

import pytest
import torch
from conftest import INTERPRETED
from test_directional import MEMBER, case, check, differentiate

from vqkernels.ops.directional import NOISE_STD
from vqkernels.testing import DEVICE


@MEMBER
def test_tiny_differences(direction, segments, backend, need):
    """x as near as 1e-30 to its code: squares of it underflow in float32."""
    need("directional", torch.float32)
    _, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    codes = codes * 1e-30
    x = codes[indices] + 1e-31 * torch.randn(40, 10, device=DEVICE)
    check(x, codes, indices, position, direction, backend, noise_std=1e-30)


@MEMBER
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale, direction, segments, backend, need):
    """Squares of such differences, and of what the noise is then next to, leave the range of float32."""
    need("directional", torch.float32)
    x, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    for noise_std in (NOISE_STD, scale):
        check(x * scale, codes * scale, indices, position, direction, backend, noise_std=noise_std)


def far_apart(scale, segments):
    """Finite rows and codes whose differences, and sums of squares, float32 does not hold; the last rows are usual."""
    x, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    signs = torch.randint(0, 2, (9, 10), device=DEVICE) * 2.0 - 1
    codes = torch.where(torch.arange(9, device=DEVICE)[:, None] < 5, scale * signs, codes)
    x[:20] = -scale * signs[indices[:20]] * torch.rand(20, 10, device=DEVICE)
    # the last rows share no code with the first
    indices = torch.where(torch.arange(40, device=DEVICE) < 20, indices % 4, 5 + indices % 3)
    return x, codes, indices, position


@MEMBER
@pytest.mark.parametrize("scale", [1e38, 3e38])
def test_differences_beyond_float32(scale, direction, segments, backend, need):
    """c - x overflows where c and x are finite: the row is right, and no other row or code sees it."""
    if backend != "native":
        pytest.skip("only float64 holds such differences, and the other kernels use float32")
    need("directional", torch.float32)
    x, codes, indices, position = far_apart(scale, segments)
    if segments:
        # both points of a row on one side of it
        codes[1:5] = codes[0]
    check(x, codes, indices, position, direction, backend)
    grad = torch.randn(40, 10, device=DEVICE)
    usual = slice(20, None)
    _, grad_x, grad_codes = differentiate(x, codes, indices, position, direction, backend, grad)
    at = None if position is None else position[usual]
    _, own_x, own_codes = differentiate(
        x[usual], codes, indices[usual], at, direction, backend, grad[usual], row_offset=20
    )
    assert grad_codes.isfinite().all()
    assert torch.equal(grad_x[usual], own_x) and torch.equal(grad_codes[5:], own_codes[5:])


def test_a_neighbour_of_a_row_beyond_float32(backend, need):
    """One code, two rows: the sum of its gradient is that of both."""
    if backend != "native":
        pytest.skip("only float64 holds such differences, and the other kernels use float32")
    need("directional", torch.float32)
    x = torch.tensor([[2e38, 1.0], [1.0, 1.0]])
    codes, indices = torch.tensor([[-2e38, 0.0]]), torch.tensor([0, 0])
    args = (x, codes, indices, None, "noisy", "native", torch.ones(2, 2))
    _, _, found = differentiate(*args, noise_std=0.0)
    _, _, expected = differentiate(*args[:5], "reference", args[6], noise_std=0.0)
    # two terms of size 1 and some roundings of each; the second feature is below the smallest normal number
    torch.testing.assert_close(found, expected, rtol=8 * 2.0**-23, atol=2.0**-148)


@MEMBER
@pytest.mark.parametrize("small", [2.0**-70, 2.0**90])
def test_small_and_large_gradients(small, direction, segments, backend, need):
    """Their products with a small w leave the range of float32."""
    need("directional", torch.float32)
    x, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    x, codes = x * 1e-25, codes * 1e-25
    grad = torch.randn(40, 10, device=DEVICE)
    options = {"noise_std": 1e-25}
    # a power of two changes nothing but the range
    _, grad_x, grad_codes = differentiate(x, codes, indices, position, direction, backend, grad, **options)
    _, tiny_x, tiny_codes = differentiate(
        x, codes, indices, position, direction, backend, grad * small, **options
    )
    # the scaled sums are the same to the last bit, the plain ones to their rounding
    torch.testing.assert_close(tiny_x / small, grad_x, rtol=0, atol=30 * 2.0**-23 * 10)
    torch.testing.assert_close(tiny_codes / small, grad_codes, rtol=0, atol=30 * 2.0**-23 * 40)


@pytest.mark.parametrize(("d", "direction", "segments"), [(1030, "noisy", False), (4100, "noisy", True)])
def test_wide_rows(d, direction, segments, backend, need):
    need("directional", torch.float32)
    check(*case((5, 4, d), torch.float32, segments), direction, backend)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("k", [3, 40000])
def test_hot_and_cold_codes(k, segments, backend, need):
    """One code owns most of many rows, most codes own none: sums that cross every border of a chunk."""
    need("directional", torch.float32)
    x, codes, indices, position = case((2500, k, 3), torch.float32, segments)
    indices[100:2400] = 1
    check(x, codes, indices, position, "noisy", backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("segments", [False, True])
def test_sums_in_a_fixed_order(segments, layout, backend, need, monkeypatch):
    """Beyond the size for atomics the sums are made as in torch's deterministic mode, to the bit."""
    need("directional", torch.float32)
    inputs = case((300, 9, 10), torch.float32, segments, layout)
    grad = torch.randn(300, 10, device=DEVICE)
    expected = differentiate(*inputs, "noisy", backend, grad)
    torch.use_deterministic_algorithms(False)
    if backend == "triton":
        module = importlib.import_module("vqkernels.kernels.directional_backward")
        monkeypatch.setattr(module, "MOST_ATOMICS", 2999)
        found = differentiate(*inputs, "noisy", backend, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    check(*inputs, "noisy", backend)


@pytest.mark.parametrize("segments", [False, True])
def test_gradients_that_are_not_finite(segments, backend, need):
    """They reach the row and its codes, where a loss scaler finds them, and no other."""
    need("directional", torch.float32)
    x, codes, _, position = case((8, 20, 5), torch.float32, segments)
    indices = torch.arange(0, 16, 2, device=DEVICE)
    grad = torch.randn(8, 5, device=DEVICE)
    _, clean_x, clean_codes = differentiate(x, codes, indices, position, "noisy", backend, grad)
    grad[3, 1], grad[5, 2] = torch.nan, torch.inf
    _, grad_x, grad_codes = differentiate(x, codes, indices, position, "noisy", backend, grad)
    keep = torch.tensor([0, 1, 2, 4, 6, 7], device=DEVICE)
    assert torch.equal(grad_x[keep], clean_x[keep]) and torch.equal(
        grad_codes[indices[keep]], clean_codes[indices[keep]]
    )
    for row in (3, 5):
        assert not grad_x[row].isfinite().all() and not grad_codes[indices[row]].isfinite().any()


@pytest.mark.skipif(not INTERPRETED, reason="looks into the kernels' own grid")
@pytest.mark.parametrize("segments", [False, True])
def test_more_outer_rows_than_a_grid_is_wide(segments, backend, monkeypatch):
    module = importlib.import_module("vqkernels.kernels._rows")
    monkeypatch.setattr(module, "_LARGEST_GRID", 3)
    x, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    wide = torch.full((8, 7, 10), torch.nan)
    wide[:, :5] = x.view(8, 5, 10)
    assert module.grid_of(8, 5, 4) == (2, 3, 3)
    check(wide[:, :5], codes, indices, position, "noisy", backend)
