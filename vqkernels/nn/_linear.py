"""A linear layer that rows which are not finite pass without harm to its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.nn.estimators.base import finite_rows


class _FiniteLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        finite = finite_rows(x)
        # 0 * nan would reach every weight
        used = torch.where(finite, grad, 0).reshape(-1, grad.shape[-1])
        rows = torch.where(finite, x, 0).reshape(-1, x.shape[-1])
        return (grad @ weight).to(x.dtype), used.t() @ rows.to(weight.dtype), used.sum(0)


def finite_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer on x (..., in): a row that is not finite gives one that is not, and no gradient to the weights."""
    return _FiniteLinear.apply(x.to(layer.weight.dtype), layer.weight, layer.bias)
