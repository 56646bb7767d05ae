"""code_sums against a loop in float64."""

import importlib

import pytest
import torch
from conftest import DTYPES

from vqkernels import code_sums
from vqkernels.testing import DEVICE, LAYOUTS, strided


def check(x, indices, k, backend, flat=None):
    counts, sums = code_sums(x, indices, k, backend=backend)
    flat, index = (x if flat is None else flat).reshape(-1, x.shape[-1]).double(), indices.flatten()
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    assert counts.dtype == torch.int64 and sums.dtype == arithmetic
    finite = flat.isfinite().all(1)
    for j in range(k):
        rows = flat[(index == j) & finite]
        assert counts[j] == len(rows)
        # n additions of at most sum |x| in the arithmetic's precision
        bound = (len(rows) + 1) * torch.finfo(arithmetic).eps * rows.abs().sum(0)
        assert ((sums[j].double() - rows.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 3, 5), (500, 40, 33), (40, 300, 7)], ids=str)
def test_against_a_loop(shape, dtype, backend, need):
    need("code_sums", dtype)
    n, k, d = shape
    check(torch.randn(n, d, device=DEVICE).to(dtype), torch.randint(0, k, (n,), device=DEVICE), k, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, need):
    need("code_sums", torch.float32)
    x = torch.randn(60, 9, device=DEVICE)
    view = strided(x, layout)
    check(view, torch.randint(0, 7, view.shape[:-1], device=DEVICE), 7, backend, flat=x)


def test_atomics(backend, need):
    """Without torch's deterministic mode a backend may add in any order."""
    need("code_sums", torch.float32)
    torch.use_deterministic_algorithms(False)
    check(torch.randn(300, 9, device=DEVICE), torch.randint(0, 7, (300,), device=DEVICE), 7, backend)


def test_collapsed(backend, need):
    """All rows in one code: the sum keeps its digits."""
    need("code_sums", torch.float32)
    check(torch.rand(30000, 3, device=DEVICE) + 100, torch.full((30000,), 2, device=DEVICE), 4, backend)


@pytest.mark.parametrize("k", [4, 40000])
def test_hot_and_cold_codes(k, backend, need):
    """One code owns most of many rows, most codes own none."""
    need("code_sums", torch.float32)
    indices = torch.randint(0, k, (2500,), device=DEVICE)
    indices[100:2400] = 3
    x = torch.randn(2500, 3, device=DEVICE)
    counts, sums = code_sums(x, indices, k, backend=backend)
    assert torch.equal(counts, torch.bincount(indices, minlength=k))
    expected = torch.zeros(k, 3, dtype=torch.float64, device=DEVICE).index_add_(0, indices, x.double())
    size = torch.zeros_like(expected).index_add_(0, indices, x.double().abs())
    assert ((sums - expected).abs() <= (counts + 1)[:, None] * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels"])
def test_sums_in_a_fixed_order(layout, backend, need, monkeypatch):
    """Beyond the size for atomics the sums are made as in torch's deterministic mode, to the bit."""
    need("code_sums", torch.float32)
    flat = torch.randn(300, 10, device=DEVICE)
    x = strided(flat, layout)
    indices = torch.randint(0, 9, x.shape[:-1], device=DEVICE)
    expected = code_sums(x, indices, 9, backend=backend)
    torch.use_deterministic_algorithms(False)
    if backend == "triton":
        module = importlib.import_module("vqkernels.kernels.code_sums")
        monkeypatch.setattr(module, "MOST_ATOMICS", 2999)
        assert all(
            torch.equal(a, b)
            for a, b in zip(code_sums(x, indices, 9, backend=backend), expected, strict=True)
        )
    check(x, indices, 9, backend, flat=flat)


def test_what_counts_for_nothing(backend, need):
    """Rows that are not finite, and indices out of range."""
    need("code_sums", torch.float32)
    x, indices = torch.randn(50, 4, device=DEVICE), torch.randint(0, 5, (50,), device=DEVICE)
    x[3, 1], x[8, 0], x[9, 3] = torch.nan, torch.inf, -torch.inf
    indices[20], indices[21] = -1, 5
    check(x, indices, 5, backend)


def test_empty_batch(backend, need):
    need("code_sums", torch.float32)
    counts, sums = code_sums(
        torch.zeros(0, 4, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), 3, backend=backend
    )
    assert counts.tolist() == [0, 0, 0] and not sums.any()
