"""nearest_segment against its contract, one row and one segment at a time."""

import sys

import pytest
import torch
from conftest import DTYPES

from vqkernels import nearest_code, nearest_segment
from vqkernels.testing import DEVICE, LAYOUTS, brute_force_segment, strided


def check(x, codes, backend, flat=None):
    segments, position, sq_dist = nearest_segment(x, codes, backend=backend)
    expected = brute_force_segment(x if flat is None else flat, codes)
    assert torch.equal(segments.flatten(), expected[0])
    for found, exact in zip((position, sq_dist), expected[1:], strict=True):
        assert found.dtype == torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
        torch.testing.assert_close(found.flatten(), exact.to(found.dtype), rtol=0, atol=0, equal_nan=True)
    return segments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (40, 9, 3), (20, 60, 17)], ids=str)
def test_equals_brute_force(shape, dtype, backend, need):
    need("nearest_segment", dtype)
    n, k, d = shape
    x, codes = torch.randn(n, d, device=DEVICE).to(dtype), torch.randn(k, d, device=DEVICE).to(dtype)
    check(x, codes, backend)
    # a point of the curve is never farther than the nearest code
    nearest = nearest_code(x, codes).sq_dist
    assert (nearest_segment(x, codes, backend=backend).sq_dist <= nearest * (1 + 1e-6)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, need):
    need("nearest_segment", torch.float32)
    x = torch.randn(30, 5, device=DEVICE)
    check(strided(x, layout), torch.randn(9, 5, device=DEVICE), backend, flat=x)


def test_ties(backend, need):
    """A nearest point on a vertex belongs to two segments, and coinciding codes make segments of no length."""
    need("nearest_segment", torch.float32)
    zigzag = torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 1], [0, 0], [1, 0], [5, 5]], device=DEVICE)
    x = torch.tensor([[2.0, -1], [1, 0], [0.5, 0], [-1, -1], [1, 3], [7, 7]], device=DEVICE)
    assert check(x, zigzag, backend)[:4].tolist() == [0, 0, 0, 0]
    grid = torch.randint(-2, 3, (60, 2), device=DEVICE).float()
    check(grid / 2, torch.randint(-1, 2, (40, 2), device=DEVICE).float(), backend)
    assert check(grid, torch.ones(5, 2, device=DEVICE), backend).eq(0).all()


def test_chunks(backend, need, monkeypatch):
    """More rows and more segments than are looked at together."""
    need("nearest_segment", torch.float32)
    # the function of the same name hides the file from an attribute path
    monkeypatch.setattr(sys.modules["vqkernels.ops.nearest_segment"], "_CHUNK", 2048)
    x, codes = torch.randn(5, 2, device=DEVICE), torch.randn(2100, 2, device=DEVICE)
    codes[1500:] += 30
    x[3:] += 30
    assert check(x, codes, backend).max() >= 1500


def test_what_is_not_finite(backend, need):
    need("nearest_segment", torch.float32)
    x, codes = torch.randn(20, 4, device=DEVICE), torch.randn(12, 4, device=DEVICE)
    x[2, 1], x[9, 0] = torch.nan, torch.inf
    codes[0, 2], codes[5, 3] = torch.inf, torch.nan
    segments = check(x, codes, backend)
    assert not torch.isin(segments[[0, 1, 3, 4]], torch.tensor([0, 4, 5], device=DEVICE)).any()
    assert check(x, torch.full_like(codes, torch.nan), backend).eq(0).all()


def test_overflow(backend, need):
    """Distances beyond float64 are infinite, not missing."""
    need("nearest_segment", torch.float64)
    codes = torch.randn(5, 3, dtype=torch.float64, device=DEVICE)
    codes[0] = torch.nan
    x = torch.full((2, 3), 1e200, dtype=torch.float64, device=DEVICE)
    found = nearest_segment(x, codes, backend=backend)
    assert found.segments.eq(1).all() and found.sq_dist.isposinf().all()


def test_empty_batch(backend, need):
    need("nearest_segment", torch.float32)
    x, codes = torch.zeros(0, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE)
    assert all(out.shape == (0,) for out in nearest_segment(x, codes, backend=backend))
