"""nearest_segment against its contract, one row and one segment at a time."""

import sys

import pytest
import torch
from conftest import DTYPES, INTERPRETED

from vqkernels import nearest_code, nearest_segment
from vqkernels.testing import DEVICE, LAYOUTS, brute_force_segment, clusters, strided


def check(x, codes, backend, flat=None):
    segments, position, sq_dist = nearest_segment(x, codes, backend=backend)
    expected = brute_force_segment(x if flat is None else flat, codes)
    assert torch.equal(segments.flatten(), expected[0])
    for found, exact in zip((position, sq_dist), expected[1:], strict=True):
        assert found.dtype == torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
        torch.testing.assert_close(found.flatten(), exact.to(found.dtype), rtol=0, atol=0, equal_nan=True)
    return segments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (40, 9, 3), (20, 60, 17), (15, 66, 65), (30, 130, 2)], ids=str)
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


@pytest.mark.parametrize(
    "pair",
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_mixed_dtypes(pair, backend, need):
    need("nearest_segment", *pair)
    x, codes = clusters(30, 70, 10)
    check(x.to(pair[0]), codes.to(pair[1]), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_vertices(offset, dtype, backend, need):
    """Rows beyond a code, whose nearest point it is, at every place along the curve."""
    need("nearest_segment", dtype)
    # a star: each arm goes out and back, so every tip is a vertex that two segments share exactly
    arms = torch.nn.functional.normalize(torch.randn(70, 12, device=DEVICE), dim=1) * 8
    codes = torch.stack((arms, torch.zeros_like(arms)), 1).flatten(0, 1) + offset
    x = arms * 1.25 + offset
    segments = check(x.to(dtype), codes.to(dtype), backend)
    # the arm that ends in the tip, not the one that starts there
    expected = torch.arange(-1, 139, 2, device=DEVICE).clamp_min(0)
    assert offset or torch.equal(segments, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18])
def test_scales(scale, backend, need):
    """Products, lengths and their inverses leave the range of float32."""
    need("nearest_segment", torch.float32)
    x, codes = clusters(20, 70, 6)
    check(x * scale, codes * scale, backend)
    check(x, codes * scale, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_runs_of_one_code(dtype, backend, need):
    """Segments of no length, in runs that cross groups and tiles, and nearly so."""
    need("nearest_segment", dtype)
    codes = torch.randn(10, 5, device=DEVICE).to(dtype).repeat_interleave(14, 0)
    x = torch.cat((torch.randn(20, 5, device=DEVICE).to(dtype), codes[::7]))
    check(x, codes, backend)
    near = codes + torch.finfo(dtype).eps * torch.randn(140, 5, device=DEVICE).to(dtype)
    check(x, near, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_against_the_reference(dtype, backend, need):
    """More rows and segments than a loop in Python has time for."""
    need("nearest_segment", dtype)
    x, codes = clusters(700, 900, 20)
    found = nearest_segment(x.to(dtype), codes.to(dtype), backend=backend)
    expected = nearest_segment(x.to(dtype), codes.to(dtype), backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="looks into the kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_few_rows_are_searched_in_float64(dtype, monkeypatch):
    """A third of the rows are nearest to a code, which two segments share: the bound must not leave them open."""
    from vqkernels.kernels import nearest_segment as module

    counts = []

    class Merge:
        constants = module._MERGE.constants

        def launch(self, grid, *args, merge=module._MERGE):
            counts.append(int(args[1]))
            merge.launch(grid, *args)

    monkeypatch.setattr(module, "_MERGE", Merge())
    x, codes = clusters(2000, 300, 16)
    x = x + 0.5 * torch.randn_like(x)
    found = nearest_segment(x.to(dtype), codes.to(dtype), backend="triton")
    assert ((found.position == 0) | (found.position == 1)).sum() > 500
    assert counts[0] <= 20


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
