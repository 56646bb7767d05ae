"""nearest_code: the indices of every backend equal a float64 search to the letter."""

import itertools

import pytest
import torch
from conftest import DTYPES, INTERPRETED

from vqkernels import BackendError, nearest_code, prepare, use_backend
from vqkernels.ops.nearest_code import dithered, nearest_code_op
from vqkernels.testing import DEVICE, LAYOUTS, brute_force, clusters, strided

SHAPES = [(1, 1, 1), (3, 1, 5), (17, 3, 2), (127, 129, 17), (129, 17, 33), (64, 257, 64), (40, 1000, 130)]


def check(x, codebook, backend, *, dither=None, flat=None):
    """Run, compare with brute force, return the result."""
    points = codebook if dither is None else dithered(codebook, dither)
    flat = x.reshape(-1, x.shape[-1]) if flat is None else flat
    expected, least = brute_force(flat, points)
    if dither is None:
        indices, sq_dist = nearest_code(x, codebook, backend=backend)
    else:
        indices, sq_dist = nearest_code_op(x[None], codebook, dither, True, [], backend=backend)
    wrong = (indices.flatten() != expected).nonzero().flatten()
    assert len(wrong) == 0, (wrong[:5], indices.flatten()[wrong[:5]], expected[wrong[:5]])
    torch.testing.assert_close(sq_dist.flatten(), least.to(sq_dist.dtype), rtol=0, atol=0, equal_nan=True)
    return indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_brute_force(shape, dtype, backend, need):
    need("nearest_code", dtype)
    x, codes = clusters(*shape)
    indices = check(x.to(dtype), codes.to(dtype), backend)
    if shape[0] >= shape[1] > 1 and dtype != torch.bfloat16:
        assert len(indices.unique()) > shape[1] // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(120, 37, 19)
    view = strided(x, layout)
    indices = check(view, codes, backend, flat=x)
    assert indices.shape == view.shape[:-1]
    check(x, codes.t().contiguous().t(), backend)


@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=lambda p: f"{p[0]}-{p[1]}")
def test_mixed_dtypes(pair, backend, need):
    need("nearest_code", *pair)
    x, codes = clusters(65, 37, 24)
    check(x.to(pair[0]), codes.to(pair[1]), backend)


@pytest.mark.parametrize("k", [2, 33])
def test_dither(k, backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(200, k, 9)
    codes[k // 2] = codes[k // 2 - 1]
    check(x, codes, backend, dither=torch.rand(k - 1, device=DEVICE))


def test_exact_ties(backend, need):
    """Permuted codes are at the same real distance from a constant row; only the contract's order tells them apart."""
    need("nearest_code", torch.float32)
    base = torch.rand(13)
    codes = torch.stack([base[torch.randperm(13)] for _ in range(50)]).to(DEVICE)
    x = torch.rand(300, 1).expand(300, 13).to(DEVICE)
    check(x, codes, backend)
    # integers: every distance is exact, so ties are exact too
    check(
        torch.randint(-2, 3, (500, 4)).float().to(DEVICE),
        torch.randint(-2, 3, (90, 4)).float().to(DEVICE),
        backend,
    )


def test_duplicates(backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(200, 20, 16)
    indices = check(x, codes.repeat(7, 1), backend)
    assert indices.max() < 20
    assert check(x, torch.zeros(70, 16, device=DEVICE), backend).max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-5, 1e4])
def test_magnitudes(scale, dtype, backend, need):
    need("nearest_code", dtype)
    x, codes = clusters(150, 60, 20, scale=scale)
    check(x.to(dtype), codes.to(dtype), backend)


def test_largest_halves(backend, need):
    need("nearest_code", torch.float16)
    x = (torch.rand(150, 20, device=DEVICE) * 2 - 1) * 6e4
    check(x.half(), x[:60].half() * 0.9, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_offset(dtype, backend, need):
    """Mean 1e3 and spread 1e-2: the expanded form in the inputs' precision has no digit left."""
    need("nearest_code", dtype)
    x, codes = clusters(200, 64, 32, offset=1e3, scale=1e-2)
    check(x.to(dtype), codes.to(dtype), backend)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64_extremes(scale, backend, need):
    need("nearest_code", torch.float64)
    x, codes = clusters(60, 20, 8)
    check(x.double() * scale, codes.double() * scale, backend)


def test_codes_that_are_not_finite_never_win(backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(100, 30, 12)
    codes[3, 5], codes[7, 0], codes[29, 11] = torch.nan, torch.inf, -torch.inf
    indices = check(x, codes, backend)
    assert not torch.isin(indices, torch.tensor([3, 7, 29], device=DEVICE)).any()
    only = torch.full_like(codes, torch.nan)
    only[21] = 0
    assert (check(x, only, backend) == 21).all()
    assert check(x, torch.full_like(codes, torch.inf), backend).eq(0).all()


def test_rows_that_are_not_finite_touch_no_other(backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(100, 30, 12)
    clean = nearest_code(x, codes, backend=backend).indices
    x[5, 3], x[50, 0], x[99, 11] = torch.nan, torch.inf, -torch.inf
    indices = check(x, codes, backend)
    keep = torch.ones(100, dtype=torch.bool, device=DEVICE)
    keep[[5, 50, 99]] = False
    assert torch.equal(indices[keep], clean[keep])
    assert indices[~keep].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 5, 8)], ids=str)
def test_empty_batch(shape, backend, need):
    need("nearest_code", torch.float32)
    indices, sq_dist = nearest_code(
        torch.zeros(shape, device=DEVICE), torch.zeros(4, 8, device=DEVICE), backend=backend
    )
    assert indices.shape == sq_dist.shape == shape[:-1]
    assert indices.dtype == torch.int64


def test_batch_shapes(backend, need):
    need("nearest_code", torch.float32)
    codes = torch.randn(11, 6, device=DEVICE)
    x = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    expected, _ = brute_force(x.reshape(-1, 6), codes)
    for view in (
        x,
        x.permute(3, 1, 0, 2, 4),
        x[:, ::2, 1:, ::2],
        x[0, 0, 0, 0],
        x[:1, :, :1, :, :].expand(4, -1, 2, -1, -1),
    ):
        assert torch.equal(
            nearest_code(view, codes, backend=backend).indices,
            nearest_code(view.contiguous(), codes, backend="reference").indices,
        )
    assert torch.equal(nearest_code(x, codes, backend=backend).indices.flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fast_search_regret(dtype, backend, need):
    """exact=False may miss, by the bound of float32 arithmetic on |x|, |c| (KERNELS.md: at most 4E)."""
    need("nearest_code", dtype)
    x, codes = clusters(400, 300, 48)
    x, codes = x.to(dtype), codes.to(dtype)
    index = nearest_code(x, codes, exact=False, backend=backend).indices
    _, least = brute_force(x, codes)
    regret = (x.double() - codes[index].double()).square().sum(1) - least
    reach = x.double().norm(dim=1).max() + codes.double().norm(dim=1).max()
    # (D + 4) roundings of at most |x||c| + |c|^2 / 2 in each of two scores, twice for the squared distance
    assert (regret <= 4 * (48 + 4) * torch.finfo(torch.float32).eps * reach**2).all()
    assert (regret >= -1e-12 * reach**2).all()


@pytest.mark.parametrize("data", ["normal", "grid"])
def test_a_million_rows(data, backend, need):
    """10^6 rows (10^4 in the interpreter) against brute force; "grid" makes exact ties of many of them."""
    need("nearest_code", torch.float32)
    n = 10**4 if INTERPRETED else 10**6
    if data == "normal":
        x, codes = torch.randn(n, 16, device=DEVICE), torch.randn(128, 16, device=DEVICE)
    else:
        x = torch.randint(-3, 4, (n, 6), device=DEVICE) / 4
        codes = torch.randint(-3, 4, (96, 6), device=DEVICE) / 4
    check(x, codes, backend)


def test_gradients_stop_here(backend, need):
    need("nearest_code", torch.float32)
    x, codes = clusters(5, 3, 4)
    indices, sq_dist = nearest_code(x.requires_grad_(), codes.requires_grad_(), backend=backend)
    assert not sq_dist.requires_grad and not indices.requires_grad


@pytest.mark.parametrize("pair", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_a_prepared_codebook_is_searched_as_it_was(pair, backend, need):
    need("nearest_code", *pair)
    x, codes = clusters(130, 70, 24)
    x, codes = x.to(pair[0]), codes.to(pair[1])
    expected, least = brute_force(x, codes)
    handle = prepare(codes, x_dtype=x.dtype, backend=backend)
    # behind the back of autograd's version counter, which a cache would have trusted
    codes.data.zero_()
    for exact in (True, False):
        indices, sq_dist = nearest_code(x, handle, exact=exact)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(sq_dist.double(), least, rtol=2.0**-23, atol=0)
    assert nearest_code(x[:0], handle).indices.shape == (0,)
    assert torch.equal(nearest_code(x.view(10, 13, 24), handle).indices.flatten(), expected)
    assert handle.backend == backend and "parts" not in repr(handle)


def test_a_prepared_codebook_refuses_what_it_was_not_made_for():
    codes = torch.randn(5, 3)
    handle = prepare(codes, backend="reference")
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"x must be torch.float32, as prepared for; got torch.float16"):
        nearest_code(x.half(), handle)
    with pytest.raises(ValueError, match=r"backend must be 'reference', which prepared it; got 'native'"):
        nearest_code(x, handle, backend="native")
    with pytest.raises(ValueError, match=r"codebook must be \(K, 4\)"):
        nearest_code(torch.randn(2, 4), handle)
    with (
        pytest.raises(ValueError, match=r"backend must be 'reference', which prepared it; got 'native'"),
        use_backend("native"),
    ):
        nearest_code(x, handle)
    with pytest.raises(TypeError, match=r"prepare: x_dtype must be float16, .*; got torch.int64"):
        prepare(codes, x_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prepare: codebook must have at least 1 code; got 0"):
        prepare(codes[:0])
    with pytest.raises(BackendError, match=r"prepare|nearest_code"):
        prepare(codes, backend="triton", x_dtype=torch.float64)
