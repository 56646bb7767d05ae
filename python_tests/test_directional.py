"""The directional family: values and gradients of every backend against float64 autograd of the published formulas."""

import pytest
import torch
from conftest import DTYPES

from vqkernels import directional, diveq, sf_diveq
from vqkernels.ops.directional import DIRECTIONS, NOISE_STD, directional_backward_op, directional_op
from vqkernels.testing import DEVICE, LAYOUTS, brute_force, clusters, family, family_bounds, strided

MEMBERS = [("noisy", False), ("detach", False), ("random", False), ("noisy", True), ("detach", True)]
MEMBER = pytest.mark.parametrize(
    ("direction", "segments"), MEMBERS, ids=["diveq", "diveq_detach", "nsvq", "sf_diveq", "sf_diveq_detach"]
)
SHAPES = [(1, 2, 1), (3, 5, 4), (17, 3, 7), (129, 40, 130)]
SEED = 1234567890123


def case(shape, dtype, segments, layout="contiguous", code_dtype=None):
    n, k, d = shape
    x, codes = clusters(n, k, d)
    x, codes = x.to(dtype), codes.to(code_dtype or dtype)
    indices = torch.arange(n, device=DEVICE) % (k - 1 if segments else k)
    position = torch.rand(n, device=DEVICE) if segments else None
    return strided(x, layout), codes, indices, position


def differentiate(x, codes, indices, position, direction, backend, grad, **options):
    x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
    z = directional(
        x,
        codes,
        indices.view(x.shape[:-1]),
        direction=direction,
        position=None if position is None else position.view(x.shape[:-1]),
        seed=SEED,
        backend=backend,
        **options,
    )
    z.backward(grad.view(z.shape))
    return z.detach(), x.grad, codes.grad


def check(x, codes, indices, position, direction, backend, noise_std=NOISE_STD, row_offset=0):
    """Values and both gradients within the derived bounds of float64 autograd."""
    n, d = indices.numel(), x.shape[-1]
    grad = torch.randn(n, d, device=DEVICE).to(x.dtype)
    z, grad_x, grad_codes = differentiate(
        x, codes, indices, position, direction, backend, grad, noise_std=noise_std, row_offset=row_offset
    )
    assert (
        z.shape == x.shape
        and z.dtype == x.dtype
        and grad_x.dtype == x.dtype
        and grad_codes.dtype == codes.dtype
    )
    flat = x.detach().reshape(n, d).double().requires_grad_()
    wide = codes.detach().double().requires_grad_()
    f = family(
        flat,
        wide,
        indices,
        direction=direction,
        noise_std=noise_std,
        seed=SEED,
        position=position,
        row_offset=row_offset,
    )
    f.z.backward(grad.double())
    arithmetic = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    z_bound, x_bound, p_bounds = family_bounds(
        f, flat.detach(), grad, direction=direction, noise_std=noise_std, dtype=arithmetic, stored=x.dtype
    )
    found, expected = z.reshape(n, d), f.z.detach()
    # what is too large for the dtype is infinite in it
    same = (found == expected.to(x.dtype)) & found.isinf()
    assert (same | ((found.double() - expected).abs() <= z_bound)).all()
    assert ((grad_x.reshape(n, d).double() - flat.grad).abs() <= x_bound).all()
    total, size = torch.zeros_like(wide), torch.zeros_like(wide)
    for m, bound in enumerate(p_bounds):
        total.index_add_(0, indices + m, bound.expand(n, d))
        size.index_add_(0, indices + m, (f.weights[m] * grad.double().norm(dim=1, keepdim=True)).expand(n, d))
    # sums of n terms in the arithmetic's precision, stored in the codebook's
    rows = torch.bincount(indices, minlength=len(codes)).max()
    total = total + size * (rows * torch.finfo(arithmetic).eps + torch.finfo(codes.dtype).eps)
    assert ((grad_codes.double() - wide.grad).abs() <= total).all()


@MEMBER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape, dtype, direction, segments, backend, need):
    need("directional", dtype)
    check(*case(shape, dtype, segments), direction, backend)


@MEMBER
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, direction, segments, backend, need):
    need("directional", torch.float32)
    check(*case((60, 9, 10), torch.float32, segments, layout), direction, backend)


@pytest.mark.parametrize(
    "pair",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@MEMBER
def test_mixed_dtypes(pair, direction, segments, backend, need):
    need("directional", *pair)
    check(*case((33, 9, 10), pair[0], segments, code_dtype=pair[1]), direction, backend)


@pytest.mark.parametrize("noise_std", [0.0, 1e-3, 1.0, 50.0])
def test_noise_std(noise_std, backend, need):
    need("directional", torch.float32)
    for segments in (False, True):
        check(*case((33, 9, 10), torch.float32, segments), "noisy", backend, noise_std)


@MEMBER
def test_row_on_its_code(direction, segments, backend, need):
    """r = 0: the gradient passes unchanged and the code gets none."""
    need("directional", torch.float32)
    codes = torch.randn(6, 5, device=DEVICE)
    codes[3] = codes[2]
    indices = torch.tensor([2, 2], device=DEVICE)
    position = torch.tensor([0.0, 0.5], device=DEVICE) if segments else None
    grad = torch.randn(2, 5, device=DEVICE)
    z, grad_x, grad_codes = differentiate(codes[indices], codes, indices, position, direction, backend, grad)
    assert torch.equal(z, codes[indices]) and torch.equal(grad_x, grad) and not grad_codes.any()


@MEMBER
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_sum_rule(dtype, direction, segments, backend, need):
    """dL/dx + sum_m dL/dp_m = g, within 4 eps (|g| + sum |w (g.u)|)."""
    need("directional_backward", dtype)
    # every row has codes of its own, so a row of the codebook gradient is one dL/dp_m
    n, d = 31, 12
    x, codes = clusters(2 * n, 2 * n, d)
    x, codes, indices = x[::2].to(dtype), codes.to(dtype), torch.arange(0, 2 * n, 2, device=DEVICE)
    position = torch.rand(n, device=DEVICE) if segments else None
    grad = torch.randn(n, d, device=DEVICE).to(dtype)
    _, grad_x, grad_codes = differentiate(x, codes, indices, position, direction, backend, grad)
    total = grad_x.double() + grad_codes.double()[0::2] + grad_codes.double()[1::2]
    f = family(x, codes, indices, direction=direction, noise_std=NOISE_STD, seed=SEED, position=position)
    size = grad.double().norm(dim=1, keepdim=True)
    size = size + sum(
        w * (grad.double() * u).sum(1, keepdim=True).abs() for w, u in zip(f.weights, f.u, strict=True)
    )
    assert ((total - grad.double()).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_detach_returns_the_point(backend, need):
    need("directional", torch.float32)
    x, codes, indices, _ = case((40, 9, 10), torch.float32, True)
    assert torch.equal(directional(x, codes, indices, direction="detach", backend=backend), codes[indices])
    ends = torch.tensor([0.0, 1.0], device=DEVICE).repeat(20)
    z = directional(x, codes, indices, direction="detach", position=ends, backend=backend)
    assert torch.equal(z, codes[indices + ends.long()])


@MEMBER
def test_atomics(direction, segments, backend, need):
    """Without torch's deterministic mode a backend may add in any order."""
    need("directional", torch.float32)
    torch.use_deterministic_algorithms(False)
    check(*case((129, 9, 10), torch.float32, segments), direction, backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_that_are_not_finite(direction, backend, need):
    """NaN out, NaN back, nothing to the codebook, and no other row changes."""
    need("directional", torch.float32)
    x, codes, indices, _ = case((40, 9, 10), torch.float32, False)
    grad = torch.randn(40, 10, device=DEVICE)
    keep = torch.ones(40, dtype=torch.bool, device=DEVICE)
    keep[[4, 20, 39]] = False
    clean = x.clone()
    clean[~keep] = codes[indices][~keep]
    z0, gx0, gc0 = differentiate(clean, codes, indices, None, direction, backend, grad)
    x[4, 3], x[20, 0], x[39, 9] = torch.nan, torch.inf, -torch.inf
    z, gx, gc = differentiate(x, codes, indices, None, direction, backend, grad)
    assert z[~keep].isnan().all() and gx[~keep].isnan().all()
    assert torch.equal(z[keep], z0[keep]) and torch.equal(gx[keep], gx0[keep]) and torch.equal(gc, gc0)


@MEMBER
def test_masked_rows(direction, segments, backend, need):
    """An index out of range: output 0, gradient 0, nothing to the codebook."""
    need("directional", torch.float32)
    x, codes, indices, position = case((40, 9, 10), torch.float32, segments)
    indices[3], indices[7] = -1, 9
    x[3, 2] = torch.nan
    if segments:
        indices[11] = 8
    z, gx, gc = differentiate(
        x, codes, indices, position, direction, backend, torch.ones(40, 10, device=DEVICE)
    )
    dead = [3, 7, 11] if segments else [3, 7]
    assert not z[dead].any() and not gx[dead].any() and gc.isfinite().all()
    assert z[0].any()


def test_row_offset(backend, need):
    """Two halves of a batch equal the whole."""
    need("directional", torch.float32)
    x, codes, _, _ = case((40, 9, 10), torch.float32, False)
    for run in (diveq, sf_diveq):
        whole = run(x, codes, seed=3, backend=backend).z
        halves = [
            run(part, codes, seed=3, row_offset=start, backend=backend).z
            for start, part in ((0, x[:20]), (20, x[20:]))
        ]
        assert torch.equal(whole, torch.cat(halves))
        assert not torch.equal(halves[1], run(x[20:], codes, seed=3, backend=backend).z)


def test_far_rows(backend, need):
    need("directional", torch.float32)
    check(*case((33, 9, 10), torch.float32, False), "noisy", backend, row_offset=2**32 - 10)


def test_backward_twice(backend, need):
    need("directional", torch.float32)
    x, codes, indices, _ = case((40, 9, 10), torch.float32, False)
    x, codes = x.requires_grad_(), codes.requires_grad_()
    z = directional(x, codes, indices, seed=1, backend=backend)
    first = torch.autograd.grad(z.square().sum(), (x, codes), retain_graph=True)
    second = torch.autograd.grad(z.square().sum(), (x, codes))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused(backend, need):
    need("directional", torch.float32)
    x, codes, indices, _ = case((4, 3, 5), torch.float32, False)
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(
        directional(x, codes, indices, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@MEMBER
def test_reference_by_finite_differences(direction, segments):
    """The backward of the reference is the derivative of its forward, the unit directions held."""
    x, codes, indices, position = case((5, 6, 4), torch.float64, segments)
    f = family(x, codes, indices, direction=direction, noise_std=0.3, seed=SEED, position=position)

    def surrogate(x, codes):
        z = x
        for m, (u, w) in enumerate(zip(f.u, f.weights, strict=True)):
            z = z + w * (codes[indices + m] - x).norm(dim=1, keepdim=True) * u
        return z

    assert torch.autograd.gradcheck(surrogate, (x.clone().requires_grad_(), codes.clone().requires_grad_()))
    grad = torch.randn_like(x)
    seed = torch.tensor(SEED, device=DEVICE)
    args = (
        x[None],
        codes,
        indices[None],
        None if position is None else position[None],
        seed,
        DIRECTIONS.index(direction),
        0.3,
        0,
    )
    found = directional_backward_op(grad[None], *args, backend="reference")
    leaf_x, leaf_codes = x.clone().requires_grad_(), codes.clone().requires_grad_()
    expected = torch.autograd.grad(surrogate(leaf_x, leaf_codes), (leaf_x, leaf_codes), grad)
    torch.testing.assert_close(found[0][0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        directional_op(*args, backend="reference")[0], surrogate(x, codes), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diveq_and_sf_diveq(dtype, backend, need):
    """The functions are a float64 search followed by the family."""
    need("nearest_code", dtype)
    x, codes = clusters(120, 30, 17)
    x, codes = x.to(dtype).requires_grad_(), codes.to(dtype).requires_grad_()
    z, indices = diveq(x, codes, seed=SEED, backend=backend)
    assert torch.equal(indices, brute_force(x, codes)[0])
    assert torch.equal(z, directional(x, codes, indices, seed=SEED, backend=backend))
    # the step is as long as the distance: the forward is hard up to the angle of the noise
    step, error = (z - x).double().norm(dim=1), (codes[indices] - x).double().norm(dim=1)
    bound = torch.finfo(dtype).eps * 4 * (x.double().norm(dim=1) + error) + 1e-5 * error
    assert ((step - error).abs() <= bound).all()
    z, segments, position = sf_diveq(x, codes, seed=SEED, backend=backend)
    lam = position.double()[:, None]
    points = (1 - lam) * codes[segments].double() + lam * codes[segments + 1].double()
    assert segments.max() < 29 and position.min() >= 0 and position.max() < 1
    # no other dithered point of this pass is nearer
    by_segment = torch.full((29,), torch.nan, device=DEVICE)
    by_segment[segments] = position
    known = (~by_segment.isnan()).nonzero().flatten()
    lam = by_segment[known].double()[:, None]
    all_points = (1 - lam) * codes[known].double() + lam * codes[known + 1].double()
    best = brute_force(x.detach(), all_points.detach())[1]
    assert torch.equal(
        (x.double() - points).detach().square().sum(1) <= best * (1 + 1e-12),
        torch.ones_like(best, dtype=torch.bool),
    )
    z.sum().backward()
    assert x.grad.isfinite().all() and codes.grad.any()


def test_seeds(backend, need):
    need("directional", torch.float32)
    x, codes = clusters(20, 5, 6)
    assert torch.equal(
        diveq(x, codes, seed=4, backend=backend).z,
        diveq(x, codes, seed=torch.tensor(4, device=DEVICE), backend=backend).z,
    )
    assert not torch.equal(diveq(x, codes, backend=backend).z, diveq(x, codes, backend=backend).z)
    torch.manual_seed(3)
    first = diveq(x, codes, backend=backend).z
    torch.manual_seed(3)
    assert torch.equal(first, diveq(x, codes, backend=backend).z)


def test_empty_batch(backend, need):
    need("directional", torch.float32)
    x, codes = (
        torch.zeros(2, 0, 4, device=DEVICE, requires_grad=True),
        torch.randn(3, 4, device=DEVICE, requires_grad=True),
    )
    for run in (diveq, sf_diveq):
        z = run(x, codes, backend=backend).z
        z.sum().backward()
        assert z.shape == x.grad.shape == x.shape and not codes.grad.any()
