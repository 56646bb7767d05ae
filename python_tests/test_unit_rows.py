"""Rows of length 1: what torch's own normalize gives, in value to the bit and in gradient against float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED

from vqkernels.ops import unit_rows
from vqkernels.testing import DEVICE, LAYOUTS, strided

pytestmark = pytest.mark.skipif(INTERPRETED, reason="there is no Triton body")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (129, 5), (9000, 64), (20, 40000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_against_normalize(shape, layout, dtype):
    x = strided(torch.randn(shape, device=DEVICE).to(dtype), layout)
    wide = torch.promote_types(dtype, torch.float32)
    x = x.requires_grad_()
    y = unit_rows(x)
    g = torch.randn_like(y)
    y.backward(g)
    eps, d = torch.finfo(wide).eps, shape[1]
    expected = x.detach().double()
    length = expected.norm(dim=-1, keepdim=True)
    expected = expected / length
    assert y.dtype == wide and y.shape == x.shape
    # what a dimension of one has for a stride is nobody's business
    assert 1 in shape or y.stride() == torch.empty_like(x).stride()
    # a sum of D squares, its root and a quotient
    assert ((y - expected).abs() <= (d + 4) * eps * expected.abs()).all()
    gradient = (g.double() - expected * (g.double() * expected).sum(-1, keepdim=True)) / length
    bound = (2 * d + 12) * eps * g.double().norm(dim=-1, keepdim=True) / length
    assert ((x.grad - gradient).abs() <= bound + torch.finfo(dtype).eps * gradient.abs()).all()


def test_short_rows():
    """A value is that of torch, 0 included; a row as short as 1e-12 has no direction, so no gradient explodes."""
    x = torch.tensor([[0.0, 0], [3e-14, 4e-14], [3e-30, 4e-30], [3e-12, 4e-12]], device=DEVICE).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = torch.randn_like(x)
    ours, torchs = unit_rows(a), F.normalize(b, dim=-1)
    ours.backward(g)
    torchs.backward(g)
    torch.testing.assert_close(ours, torchs, rtol=1e-15, atol=0)
    assert not a.grad[:3].any()
    torch.testing.assert_close(a.grad[3], b.grad[3], rtol=1e-12, atol=0)


def test_a_row_that_is_not_finite_stays_alone():
    x = torch.randn(6, 4, device=DEVICE)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    x.requires_grad_()
    y = unit_rows(x)
    keep = torch.tensor([True, False, True, False, True, True], device=DEVICE)
    y[keep].square().sum().backward()
    assert y[keep].isfinite().all() and not y[~keep].isfinite().all(1).any()
    assert x.grad[keep].isfinite().all()


def test_gradcheck():
    x = torch.randn(3, 5, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, x)
    assert torch.autograd.gradgradcheck(unit_rows, x)


def test_empty():
    x = torch.zeros(0, 3, device=DEVICE, requires_grad=True)
    unit_rows(x).sum().backward()
    assert x.grad.shape == (0, 3)
