"""The straight-through family at the ends of float32, on special rows, and on rows that take no part."""

import pytest
import torch
from test_straight_through import ROTATION, WEIGHT, WEIGHTS, case, check, differentiate, rotation_of

from vqkernels import straight_through
from vqkernels.ops.straight_through import straight_through_op
from vqkernels.testing import DEVICE


@ROTATION
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 6e4, 1e15])
def test_magnitudes(scale, rotation, backend, need):
    """Neither lengths nor ratios of rows leave the range where the result does not."""
    need("straight_through", torch.float32)
    x, codes, indices = case((40, 9, 20), torch.float32)
    check(x * scale, codes * scale, indices, rotation, WEIGHTS["only_sync"], backend)
    check(x * scale, codes * scale, indices, rotation, WEIGHTS["synchronized"], backend)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("small", [1e-25, 1.0])
def test_rotation_of_any_length(scale, small, backend, need):
    """The squares of such rows, codes and gradients are beyond float32; the losses are, so they weigh nothing."""
    need("straight_through", torch.float32)
    x, codes, indices = case((40, 9, 20), torch.float32)
    grad = small * torch.randn(40, 20, device=DEVICE)
    x, codes = (x * scale).requires_grad_(), codes * scale
    z, _ = straight_through(x, codes, indices, rotation=True, commitment=0.0, backend=backend)
    z.backward(grad)
    expected = (rotation_of(x.detach().double(), codes[indices].double()).mT @ grad.double()[..., None])[
        ..., 0
    ]
    rho = (codes[indices].norm(dim=1) / x.detach().norm(dim=1)).nan_to_num(1.0)
    size = (
        4
        * grad.double().norm(dim=1, keepdim=True)
        * (codes[indices].double().norm(dim=1) / x.detach().double().norm(dim=1))[:, None]
    )
    assert rho.isfinite().all()
    assert ((x.grad.double() - expected).abs() <= 40 * torch.finfo(torch.float32).eps * 2 * size).all()


@WEIGHT
def test_special_rows(weights, backend, need):
    """x = 0 passes the gradient, c = 0 stops it, x = -3 c is mirrored and x = c passes it."""
    need("straight_through", torch.float32)
    c = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.0, 0.0], [3.0, 0.1, 0.7]], device=DEVICE)
    x = torch.stack([0 * c[0], c[0], -3 * c[0], -c[2], c[2], 0 * c[0], 5 * c[2]])
    indices = torch.tensor([0, 1, 0, 2, 2, 1, 2], device=DEVICE)
    grad = torch.randn(7, 3, device=DEVICE)
    check(x, c, indices, True, weights, backend, grad)
    leaf = x.clone().requires_grad_()
    z, _ = straight_through(leaf, c, indices, rotation=True, commitment=0.0, backend=backend)
    z.backward(grad)
    assert torch.equal(z, c[indices])
    assert torch.equal(leaf.grad[0], grad[0]) and torch.equal(leaf.grad[5], grad[5])
    assert not leaf.grad[1].any()
    unit = c[0] / 3
    mirrored = (grad[2] - 2 * unit * (unit @ grad[2])) / 3
    torch.testing.assert_close(leaf.grad[2], mirrored, rtol=0, atol=16 * 2.0**-23 * float(grad[2].norm()))
    # rho R = 1 to the rounding of some products of three features
    torch.testing.assert_close(leaf.grad[4], grad[4], rtol=0, atol=32 * 2.0**-23 * float(grad[4].norm()))
    torch.testing.assert_close(leaf.grad[6], grad[6] / 5, rtol=0, atol=32 * 2.0**-23 * float(grad[6].norm()))


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
def test_nearly_antiparallel(angle, backend, need):
    """A plane of rotation that few digits define keeps those digits."""
    need("straight_through", torch.float32)
    c = torch.randn(20, 8, device=DEVICE)
    x = -2 * c + angle * torch.randn(20, 8, device=DEVICE)
    check(x, c, torch.arange(20, device=DEVICE), True, WEIGHTS["ste"], backend)


@ROTATION
def test_rows_that_are_not_finite(rotation, backend, need):
    """NaN out, NaN back, nothing to the codebook or to the loss, and no other row changes."""
    need("straight_through", torch.float32)
    weights = WEIGHTS["synchronized"]
    for d in (10, 32):
        x, codes, indices = case((40, 9, d), torch.float32)
        grad = torch.randn(40, d, device=DEVICE)
        dead = torch.zeros(40, dtype=torch.bool, device=DEVICE)
        dead[[4, 20, 39]] = True
        kept = differentiate(x[~dead], codes, indices[~dead], rotation, weights, backend, grad[~dead], 50.0)
        x[4, 3], x[20, 0], x[39, 9] = torch.nan, torch.inf, -torch.inf
        z, loss, grad_x, grad_codes = differentiate(x, codes, indices, rotation, weights, backend, grad, 50.0)
        assert z[dead].isnan().all() and grad_x[dead].isnan().all()
        assert torch.equal(z[~dead], kept[0])
        # sums of 37 rows in another order
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(loss, kept[1], rtol=48 * eps, atol=0)
        torch.testing.assert_close(
            grad_x[~dead], kept[2], rtol=0, atol=4 * eps * float(grad_x[~dead].abs().max())
        )
        size = grad_codes.abs().max() + 5 * (1.5 * 4 + 4)
        assert ((grad_codes - kept[3]).abs() <= 16 * eps * size).all()
        sq_dist = straight_through_op(x[None], codes, indices[None], backend=backend)[1]
        assert torch.equal(sq_dist[0].isnan(), dead)


@ROTATION
def test_masked_rows(rotation, backend, need):
    """An index out of range: output 0, gradient 0, nothing to the codebook or the loss."""
    need("straight_through", torch.float32)
    weights = WEIGHTS["synchronized"]
    x, codes, indices = case((40, 9, 10), torch.float32)
    grad = torch.randn(40, 10, device=DEVICE)
    dead = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    dead[[3, 7, 8]] = True
    kept = differentiate(x[~dead], codes, indices[~dead], rotation, weights, backend, grad[~dead], 50.0)
    indices[3], indices[7], indices[8], x[3, 2] = -1, 9, 2**40, torch.nan
    z, loss, grad_x, grad_codes = differentiate(x, codes, indices, rotation, weights, backend, grad, 50.0)
    assert not z[dead].any() and not grad_x[dead].any() and torch.equal(z[~dead], kept[0])
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, kept[1], rtol=48 * eps, atol=0)
    torch.testing.assert_close(grad_x[~dead], kept[2], rtol=0, atol=4 * eps * float(grad_x.abs().max()))
    assert ((grad_codes - kept[3]).abs() <= 16 * eps * (grad_codes.abs().max() + 50)).all()
    sq_dist, totals = straight_through_op(x[None], codes, indices[None], backend=backend)[1:]
    assert not sq_dist[0][dead].any() and totals[1] == 37


@ROTATION
def test_empty_batch(rotation, backend, need):
    need("straight_through", torch.float32)
    x = torch.zeros(2, 0, 4, device=DEVICE, requires_grad=True)
    codes = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    indices = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    z, loss = straight_through(x, codes, indices, rotation=rotation, sync=1.0, backend=backend)
    (z.sum() + loss).backward()
    assert z.shape == x.grad.shape == x.shape and loss == 0 and not codes.grad.any()


@ROTATION
@pytest.mark.parametrize("k", [3, 40000])
def test_hot_and_cold_codes(k, rotation, backend, need):
    """One code owns most of many rows, most codes own none."""
    need("straight_through", torch.float32)
    for d in (3, 16):
        x, codes, indices = case((2500, k, d), torch.float32)
        indices[100:2400] = 1
        check(x, codes, indices, rotation, WEIGHTS["synchronized"], backend)
