"""What the compiled CPU search keeps of a codebook: equal to preparing anew, and refused where it does not fit."""

import pytest
import torch

from vqkernels import native, nearest_code, prepare
from vqkernels.testing import brute_force

ISAS = native.facts().get("isas_supported", [])
needs_native = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


@pytest.fixture(autouse=True)
def _best_isa():
    yield
    if ISAS:
        native.set_isa("auto")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_kept_parts_give_the_answer_of_a_fresh_search(dtype, offset):
    x, codes = torch.randn(70, 19) + offset, (torch.randn(200, 19) + offset).to(dtype)
    codes[17] = torch.inf
    for view in (codes, codes.t().contiguous().t()):
        handle = prepare(view, x_dtype=torch.float32, backend="native")
        assert handle.parts
        expected, least = brute_force(x, view)
        for exact in (True, False):
            fresh, kept = nearest_code(x, view, exact=exact), nearest_code(x, handle, exact=exact)
            assert torch.equal(fresh.indices, kept.indices)
            assert torch.equal(fresh.sq_dist, kept.sq_dist)
        kept = nearest_code(x, handle)
        assert torch.equal(kept.indices, expected)
        assert torch.equal(kept.sq_dist, least.to(kept.sq_dist.dtype))


@needs_native
@pytest.mark.parametrize("made_on", ISAS)
def test_parts_serve_whatever_instruction_set_comes_after(made_on):
    x, codes = torch.randn(50, 21), torch.randn(95, 21)
    expected, _ = brute_force(x, codes)
    native.set_isa(made_on)
    handle = prepare(codes, backend="native")
    for name in ISAS:
        native.set_isa(name)
        assert torch.equal(nearest_code(x, handle).indices, expected)


@needs_native
def test_a_codebook_without_a_finite_code_can_be_kept():
    x, codes = torch.randn(5, 3), torch.full((4, 3), torch.nan)
    indices, sq_dist = nearest_code(x, prepare(codes, backend="native"))
    assert torch.equal(indices, torch.zeros(5, dtype=torch.int64)) and sq_dist.isnan().all()


@needs_native
def test_parts_of_another_codebook_are_refused():
    x, codes = torch.randn(1, 9, 6), torch.randn(30, 6)
    parts = prepare(codes, backend="native").parts
    op = torch.ops.vqkernels.nearest_code
    wide = prepare(codes.double().t().contiguous().t(), backend="native").parts
    strided = [part.repeat_interleave(2)[::2] for part in parts]
    others = prepare(codes[:20], backend="native").parts
    for wrong in (parts[:-1], [*parts[:-1], torch.zeros(3)], others, wide, strided):
        with pytest.raises(RuntimeError, match=r"nearest_code: parts must be what prepare made"):
            op(x, codes, None, True, wrong)
    with pytest.raises(RuntimeError, match=r"nearest_code: parts must be empty with a dither"):
        op(x, codes, torch.rand(29), True, parts)


@needs_native
@pytest.mark.parametrize("name", ISAS)
def test_repeated_codes_cost_nothing_and_the_first_one_wins(name):
    x, few = torch.randn(300, 12), torch.randn(37, 12)
    few[5, 3], few[6] = 0.0, few[5]
    # equal by value, not by bits
    few[6, 3] = -0.0
    codes = few[torch.randint(0, 37, (1000,))]
    expected, least = brute_force(x, codes)
    native.set_isa(name)
    indices, sq_dist = nearest_code(x, codes, backend="native")
    assert torch.equal(indices, expected)
    assert torch.equal(sq_dist, least.float())
