"""Rows scaled to length 1, for cosine search, forward and backward: `unit_rows`, `unit_rows_backward`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vqkernels.checks import check_rows
from vqkernels.dispatch import Op
from vqkernels.ops._layout import collapse

# what F.normalize divides by at least
EPS = 1e-12
# elements at a time, which stay in the cache from the norm to the quotient; a device has no such reason
_CHUNK = 1 << 18


def _chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of (B, M, D) along the first two dimensions."""
    batches, rows, features = x.shape
    most = _CHUNK if x.device.type == "cpu" else max(1, x.numel())
    height = min(rows, max(1, most // features))
    width = max(1, most // max(1, height * features))
    for b in range(0, batches, width):
        for m in range(0, rows, max(1, height)):
            yield slice(b, b + width), slice(m, m + height)


@torch.no_grad()
def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    y, norm = torch.empty_like(x), x.new_empty(*x.shape[:2], 1)
    for at in _chunks(x):
        norm[at] = torch.linalg.vector_norm(x[at], dim=2, keepdim=True)
        torch.div(x[at], norm[at].clamp_min(EPS), out=y[at])
    return y, norm


@torch.no_grad()
def _reference_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    grad_x = torch.empty_like(x)
    for at in _chunks(x):
        grad_x[at] = _project(grad[at], x[at], norm[at])
    return grad_x


def _project(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """(g - y (y . g)) / |x| with y = x / |x|; a row as short as EPS has no direction, and no gradient."""
    length = norm.clamp_min(EPS)
    unit = x / length
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.where(norm <= EPS, 0, torch.addcmul(grad, unit, along, value=-1) / length)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:2], 1)


def _fake_backward(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    return torch.empty_like(x)


unit_rows_op = Op("unit_rows", "(Tensor x) -> (Tensor, Tensor)", reference=_reference, fake=_fake)
unit_rows_backward_op = Op(
    "unit_rows_backward",
    "(Tensor grad, Tensor x, Tensor norm) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return unit_rows_op(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            # somebody differentiates the gradient
            return _project(grad, x, torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        return unit_rows_backward_op(grad, x, norm)


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row to length 1, differentiably: y = x / max(|x|, 1e-12), as `torch.nn.functional.normalize` does.

        dL/dx = (g - y (y . g)) / |x|,   0 where |x| <= 1e-12

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.

    Returns:
        y: (..., D), float32, or float64 for float64. A row with a NaN or Inf gives a row of NaN or 0 and a NaN gradient.

    Raises:
        TypeError: the dtype is not floating-point.
        ValueError: x has no dimension or no feature.
    """
    check_rows("unit_rows", x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y, _ = _UnitRows.apply(collapse(wide))
    return y.view(x.shape)
