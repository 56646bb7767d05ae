"""nearest_segment against its contract, one row and one segment at a time."""

import sys

import pytest
import torch
from conftest import DTYPES, INTERPRETED
from test_native import ISAS, isa, run_python, threads

from vqkernels import native, nearest_code, nearest_segment
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


compiled = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")


def native_segments(x, codes):
    return torch.ops.vqkernels.nearest_segment(x[None] if x.dim() == 2 else x, codes)


def check_native(x, codes, what):
    """The three outputs of the compiled body are the reference's, bit for bit but for the sign of 0."""
    expected = nearest_segment(x, codes, backend="reference")
    for name, got, exact in zip(expected._fields, native_segments(x, codes), expected, strict=True):
        assert got.dtype == exact.dtype, (what, name)
        torch.testing.assert_close(
            got[0],
            exact,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{what}, {name}: {text}",
        )


def hard_lines(n, k, d):
    """Names, rows and codes on which distances tie, cancel or vanish."""
    x, codes = torch.randn(n, d), torch.randn(k, d)
    few = codes[torch.randint(0, 9, (k,)) % k]
    yield "random", x, codes
    yield "lattice", torch.randint(-2, 3, (n, d)) / 2, torch.randint(-1, 2, (k, d)).float()
    yield "few codes", x, few
    yield "one code", x, codes[:1].expand(k, d)
    yield "runs", few[torch.randint(0, k, (n,))] + 0.3 * x, codes.repeat_interleave(3, 0)[:k]
    yield "twice", x, codes[: (k + 1) // 2].repeat(2, 1)[:k]
    # beyond the codes, so that nodes are nearest, and exactly on them
    yield "beyond the codes", 3 * codes, codes
    yield "the codes", codes, codes
    yield "nearly the codes", codes + 1e-4 * torch.randn(k, d), codes
    yield "midpoints", (few[1:] + few[:-1]) / 2, few
    yield "smooth", 0.1 * codes.cumsum(0) + 0.1 * torch.randn(k, d), 0.1 * codes.cumsum(0)
    yield "offset", 100 + 0.1 * x, 100 + 0.1 * codes
    yield "offset of x", 100 + 0.1 * x, codes
    yield "one code far away", x, torch.cat((codes[1:], 1e4 * codes[:1]))
    yield "small codes", x, codes / 1024
    for scale in (1e-30, 6e4, 1e30):
        yield f"{scale:g}", scale * x.clamp(-1, 1), scale * codes.clamp(-1, 1)
    bad, holes = x.clone(), codes.clone()
    bad[::7, -1], bad[n // 2, 0] = -torch.inf, torch.nan
    holes[1::5, 0] = torch.nan
    yield "rows that are not finite", bad, codes
    yield "holes", bad, holes


# the widths of the tiles are 6 and 12: both sides of their borders, and slots that name several tiles
@compiled
@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    "shape", [(37, 2, 1), (50, 12, 5), (70, 77, 9), (40, 300, 3), (60, 700, 20)], ids=str
)
def test_isas_equal_the_reference(shape, name):
    with isa(name):
        for what, x, codes in hard_lines(*shape):
            check_native(x, codes, what)


@compiled
@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("codes_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_isas_mixed_dtypes(name, dtype, codes_dtype):
    with isa(name):
        for what, x, codes in hard_lines(40, 90, 7):
            check_native(x.to(dtype), codes.to(codes_dtype), what)


@compiled
@pytest.mark.parametrize("name", ISAS)
def test_isas_every_small_line(name):
    with isa(name):
        for k in range(2, 40):
            x, codes = torch.randn(35, 3), torch.randn(k, 3)
            check_native(torch.cat((x, 2 * codes)), codes, k)


@compiled
@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-162, 1e-100, 1e-80, 1e80, 1e100, 1e154, 1e200])
def test_isas_float64_range(name, scale):
    """Squares underflow or overflow, or leave what a certificate in float32 can cover."""
    x, codes = 2 * torch.randn(40, 6).double(), torch.randn(70, 6).double()
    with isa(name):
        check_native(scale * x, scale * codes, "both")
        check_native(x, scale * codes, "codes")
        check_native(scale * x, codes, "rows")
        check_native(x, torch.cat((codes, codes[:1] * scale, codes)), "one code")


@compiled
@pytest.mark.parametrize("name", ISAS)
def test_isas_many_rows(name):
    """More rows than a block has, more codes than are packed at a time, and more features than are summed at a time."""
    with isa(name):
        x, codes = clusters(1500, 700, 70)
        check_native(x.cpu(), codes.cpu(), "clusters")


@compiled
@pytest.mark.parametrize("name", ISAS)
def test_isas_strides(name):
    x, codes = torch.randn(3, 45, 20), torch.randn(70, 20)
    with isa(name):
        expected = native_segments(x, codes)
        views = (x.transpose(1, 2).contiguous().transpose(1, 2), x.repeat_interleave(2, 2)[..., ::2])
        tables = (codes, codes.t().contiguous().t(), codes.repeat_interleave(2, 0)[::2])
        for view in views:
            for table in tables:
                assert all(
                    torch.equal(a, b) for a, b in zip(native_segments(view, table), expected, strict=True)
                )


@compiled
def test_threads_do_not_matter():
    x, codes = torch.randn(2, 1500, 24), torch.randn(400, 24)
    # some rows that contend everywhere and some that stay open
    x[:, ::9] = 0
    x[:, 5::90] = 1e30
    codes[200:] = codes[:1]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(native_segments(x, codes))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MEASURE = """
import torch, vqkernels as vq

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3

x, codes = torch.randn(1 << 15, 4), torch.randn(1 << 14, 4)
# what the first call loads is not the op's
vq.nearest_segment(x[:64], codes, backend="native")
before = peak()
vq.nearest_segment(x, codes, backend="native")
print(peak() - before)
"""


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory():
    """Megabytes beside inputs of less than one: rows by segments would be 2000 in float32."""
    done = run_python(MEASURE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32
