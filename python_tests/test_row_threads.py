"""Row ops of the compiled backend: the same bits for any number of threads, on every instruction set and layout."""

from contextlib import contextmanager

import pytest
import torch

from vqkernels import native, philox
from vqkernels.ops.directional import directional_backward_op, directional_op
from vqkernels.testing import strided

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")

ISAS = native.facts().get("isas_supported", [])
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels"])
op = torch.ops.vqkernels
# N, K, D: many rows of few codes (a table), few rows of many (a sort), features that fill no vector
SHAPES = [(4100, 40, 48), (2500, 3000, 32), (3000, 70, 5), (1100, 9, 19), (700, 33000, 16)]
# enough entries that they are sorted and counted in parallel
SHAPES += [(40000, 5000, 5), (40000, 60, 16)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@contextmanager
def running(isa, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    native.set_isa(isa)
    try:
        yield
    finally:
        native.set_isa("auto")
        torch.set_num_threads(before)


def inputs(shape, layout, hot, dtype=torch.float32):
    n, k, d = shape
    x, grad, codes = torch.randn(n, d), torch.randn(n, d), torch.randn(k, d)
    indices = torch.full((n,), 2) if hot else torch.randint(-1, k, (n,))
    x[5, 0] = torch.nan
    view, upstream = (strided(t.to(dtype), layout) for t in (x, grad))
    view, upstream = (t if t.dim() == 3 else t[None] for t in (view, upstream))
    lead = view.shape[:2]
    return view, codes.to(dtype), indices.view(lead), torch.rand(lead), upstream


def everything(x, codes, indices, position, grad):
    """Outputs of every row op, NaN rows as a number that equals itself."""
    seed, results = torch.tensor(7), []
    for at in (None, position):
        for direction in range(3):
            results.append(op.directional(x, codes, indices, at, seed, direction, 0.03, 5))
            results += op.directional_backward(grad, x, codes, indices, at, seed, direction, 0.03, 5)
    results.append(op.straight_through(x, codes, indices)[0])
    pull = torch.tensor(0.25)
    for rotation in (False, True):
        for sync in (0.0, 0.5):
            weights = (rotation, 0.5, 1.0, sync)
            results += op.straight_through_backward(grad, pull, x, codes, indices, *weights, True, True)
    results += op.code_sums(x, indices, len(codes))
    return [result.nan_to_num(nan=-77.0) for result in results]


@SHAPE
@LAYOUT
@pytest.mark.parametrize("hot", [False, True])
def test_threads_and_instruction_sets_do_not_matter(shape, layout, hot):
    case = inputs(shape, layout, hot)
    with running(ISAS[0], 1):
        expected = everything(*case)
    for isa in ISAS:
        for threads in (1, 2, 3) if isa == ISAS[0] else (2,):
            with running(isa, threads):
                found = everything(*case)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (isa, threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_layouts_give_the_same_rows(isa, dtype):
    """Turning rows over, or reading them where they are, moves no bit of what belongs to one row."""
    case = inputs((1030, 40, 37), "contiguous", False, dtype)
    with running(isa, 2):
        expected = everything(*case)
        for layout in ("channels", "sliced", "transposed"):
            x, grad = (strided(t[0], layout) for t in (case[0], case[4]))
            x, grad = (t if t.dim() == 3 else t[None] for t in (x, grad))
            lead = x.shape[:2]
            found = everything(x, case[1], case[2].view(lead), case[3].view(lead), grad)
            for a, b in zip(found, expected, strict=True):
                if a.dim() == 3:
                    assert torch.equal(a.reshape(b.shape), b), layout
                elif a.dtype == torch.int64:
                    assert torch.equal(a, b), layout
                else:
                    # 1030 terms below 2^5 in float64, in another order, and one rounding to the dtype
                    torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1030 * 2.0**-48)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 8, 9, 33])
def test_noise_of_every_row_length(isa, blocks):
    """Blocks of several rows share vectors: each has its own row's words, beyond 2^32 rows as well."""
    for row_offset in (0, 2**32 - 7):
        with running(isa, 2):
            words, _ = op.philox(torch.tensor(-5), 21, blocks, 1, row_offset)
        expected = philox.words(torch.tensor(-5), torch.arange(21) + row_offset, blocks, 1)
        assert torch.equal(words, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-64, 1.0, 2.0**60, 2.0**100])
def test_lengths_at_the_ends_of_float32(isa, scale):
    """A power of two on x, codes and noise scales z alone, whether float32 or float64 adds up the lengths."""
    x, codes, indices, position, grad = inputs((70, 9, 40), "contiguous", False)
    seed = torch.tensor(3)
    with running(isa, 1):
        for at in (None, position):
            for direction, noise_std in ((0, 0.25), (1, 0.0)):
                z = op.directional(x, codes, indices, at, seed, direction, noise_std, 0)
                moved = op.directional(
                    x * scale, codes * scale, indices, at, seed, direction, noise_std * scale, 0
                )
                # two sums of 40 terms in another precision, and the roundings of z
                size = x.nan_to_num().norm(dim=-1, keepdim=True) + 20
                assert ((moved / scale - z).abs() <= 8 * 2.0**-23 * size)[~z.isnan()].all()
                for small in (2.0**-60, 1.0):
                    pulls = [
                        op.directional_backward(g, x * s, codes * s, indices, at, seed, direction, n * s, 0)
                        for g, s, n in ((grad, 1.0, noise_std), (grad * small, scale, noise_std))
                    ]
                    for first, second in zip(*pulls, strict=True):
                        bound = 70 * 48 * 2.0**-23 * grad.norm(dim=-1).max()
                        assert ((second / small - first).abs() <= bound)[~first.isnan()].all()


@LAYOUT
def test_rows_without_gradient(layout):
    """A gradient of zeros stays zeros: nothing is divided by its length."""
    x, codes, indices, position, grad = inputs((100, 9, 32), layout, False)
    for at in (None, position):
        pulled = op.directional_backward(grad * 0, x, codes, indices, at, torch.tensor(1), 0, 0.03, 0)
        assert not pulled[0].nan_to_num().any()
        assert not pulled[1].any()


@LAYOUT
@pytest.mark.parametrize("segments", [False, True])
def test_against_the_reference_over_many_tasks(layout, segments):
    """Rows of several tasks, batches that end within one, and every code at once."""
    x, codes, indices, position, grad = inputs((4095, 130, 32), layout, False)
    indices = indices.clamp(min=0, max=128)
    args = (x, codes, indices, position if segments else None, torch.tensor(9), 0, 0.03, 3)
    z, expected = (directional_op(*args, backend=name) for name in ("native", "reference"))
    torch.testing.assert_close(z, expected, rtol=0, atol=2.0**-17 * 0.03 * 32 + 2.0**-18, equal_nan=True)
    found, wanted = (directional_backward_op(grad, *args, backend=name) for name in ("native", "reference"))
    # a direction is off by at most twice the noise's error over its length, here above 1
    turn = 2 * (0.03 * 32**0.5 * 2.0**-18 + 4 * 2.0**-23) + 44 * 2.0**-23
    size = grad.norm(dim=-1).max()
    assert ((found[0] - wanted[0]).abs() <= 2 * turn * size + 2.0**-21)[~wanted[0].isnan()].all()
    rows = torch.bincount(indices.flatten(), minlength=130).max() * 2
    assert ((found[1] - wanted[1]).abs() <= rows * turn * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_across_of_very_many_codes(dtype):
    """They are turned once and sorted, as rows that lie together: the same order, so the same bits."""
    x, codes, indices, position, grad = inputs((300, 140_000, 5), "contiguous", False, dtype)
    across = [strided(t[0], "channels") for t in (x, grad)]
    lead = across[0].shape[:2]
    for threads in (1, 2):
        with running("auto", threads):
            expected = everything(x, codes, indices, position, grad)
            found = everything(across[0], codes, indices.view(lead), position.view(lead), across[1])
        assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(found, expected, strict=True))
