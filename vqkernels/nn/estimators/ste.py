"""The straight-through estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_number
from vqkernels.nn.estimators.base import Choice, Context, Estimate, Estimator, finite_rows, flat, gather, mark
from vqkernels.nn.methods import Method, register


class STE(Estimator):
    """Straight-through estimator with codebook and commitment losses.

        z    = x + sg[c_i - x]
        loss = codebook |sg[x] - c_i|^2 + commitment |x - sg[c_i]|^2, means over rows and features   (DiVeQ eq. 2)

    Args:
        codebook_weight: weight of the codebook loss; it is absent where the codes are not learned.
        commitment_weight: weight of the commitment loss.
    """

    def __init__(self, *, codebook_weight: float = 1.0, commitment_weight: float = 0.25):
        super().__init__()
        self.codebook_weight = check_number("STE", "codebook_weight", codebook_weight)
        self.commitment_weight = check_number("STE", "commitment_weight", commitment_weight)

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        codes, indices = flat(codes, choice.indices)
        # in float32 or better, so that the codebook's gradient is summed there
        code = gather(codes.to(torch.promote_types(codes.dtype, torch.float32)), indices)
        finite, counted = finite_rows(x), (indices >= 0)[..., None]
        loss = self.commitment_weight * _mean_square(x, code.detach(), finite & counted)
        if codes.requires_grad:
            loss = loss + self.codebook_weight * _mean_square(x.detach(), code, finite & counted)
        # the value is the code itself, not the code up to a rounding; x comes first, its strides are kept
        z = mark(torch.where(counted, x - x.detach(), 0), finite) + code.detach().to(x.dtype)
        return Estimate(z, choice.indices, loss)

    def extra_repr(self) -> str:
        return f"codebook_weight={self.codebook_weight}, commitment_weight={self.commitment_weight}"


def _mean_square(a: Tensor, b: Tensor, finite: Tensor) -> Tensor:
    """Mean over finite rows and features, in float32 or better."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    square = torch.where(finite, a.to(wide) - b.to(wide), 0).square()
    return square.sum() / (finite.sum().clamp_min(1) * a.shape[-1])


register(
    "ste",
    Method(
        "the classical baseline; add replacement, or its codebook collapses",
        source="DiVeQ eq. 2; van den Oord et al. 2017",
        estimator=lambda spec: STE(),
    ),
)
