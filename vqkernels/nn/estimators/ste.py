"""The straight-through estimator, with the synchronized update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqkernels.checks import check_number, refuse
from vqkernels.nn.estimators.base import Choice, Context, Estimate, Estimator, flat
from vqkernels.nn.methods import Method, register
from vqkernels.ops import straight_through

if TYPE_CHECKING:
    from vqkernels.nn.codebooks.learned import Codebook


class STE(Estimator):
    """Straight-through estimator with codebook and commitment losses, and the synchronized update.

        z    = x + sg[c_i - x] + sync (c_i - sg[c_i])                                              (Huh eq. 21)
        loss = codebook |sg[x] - c_i|^2 + commitment |x - sg[c_i]|^2, means over rows and features   (DiVeQ eq. 2)

    With sync > 0 the gradient of the task reaches the codes as well.

    Args:
        codebook_weight: weight of the codebook loss; it is absent where the codes are not learned.
        commitment_weight: weight of the commitment loss.
        sync: nu >= 0, the share of the task's gradient that goes to the code; 2 or less in the paper.

    Raises:
        TypeError, ValueError: a weight is negative or not finite.
    """

    # whether dL/dx is turned and scaled as x is to its code
    rotation = False

    def __init__(self, *, codebook_weight: float = 1.0, commitment_weight: float = 0.25, sync: float = 0.0):
        super().__init__()
        name = type(self).__name__
        self.codebook_weight = check_number(name, "codebook_weight", codebook_weight)
        self.commitment_weight = check_number(name, "commitment_weight", commitment_weight)
        self.sync = check_number(name, "sync", sync)

    @property
    def reaches_codes(self) -> bool:  # type: ignore[override]
        """Whether the gradient of z reaches the codes."""
        return self.sync > 0

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        # a latent of G groups has G rows
        groups = x.shape[-2] if codes.dim() == 3 else 1
        codes, indices = flat(codes, choice.indices)
        learned = codes.requires_grad if torch.is_grad_enabled() else context.learned
        z, loss = straight_through(
            x,
            codes,
            indices,
            rotation=self.rotation,
            commitment=self.commitment_weight,
            codebook_weight=self.codebook_weight if learned else 0.0,
            sync=self.sync,
            mean_rows=None if context.mean_rows is None else groups * context.mean_rows,
        )
        return Estimate(z, choice.indices, loss)

    def check(self, codebook: Codebook) -> None:
        """Refuse a codebook that this estimator cannot train.

        Raises:
            ValueError: too few codes, or sync > 0 with codes that take no gradient.
        """
        super().check(codebook)
        if self.sync > 0 and not codebook.learned:
            requirement = f"learn by gradient for sync = {self.sync}"
            fix = "Pass sync=0, or a Codebook"
            got = type(codebook).__name__
            refuse(ValueError, "VectorQuantizer", "codebook", requirement, got, fix)

    def extra_repr(self) -> str:
        weights = f"codebook_weight={self.codebook_weight}, commitment_weight={self.commitment_weight}"
        return f"{weights}, sync={self.sync}" if self.sync else weights


register(
    "ste",
    Method(
        "the classical baseline; add replacement, or its codebook collapses",
        source="DiVeQ eq. 2; van den Oord et al. 2017",
        estimator=lambda spec: STE(),
    ),
)
register(
    "sync",
    Method(
        "STE whose codes see the task's gradient too; cheaper than alternated steps",
        source="Huh et al. 2023, eq. 21",
        estimator=lambda spec: STE(sync=1.0),
    ),
)
