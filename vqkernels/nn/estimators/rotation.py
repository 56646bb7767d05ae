"""The rotation trick."""

from __future__ import annotations

from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, register


class Rotation(STE):
    """Turn and scale the gradient as the latent is turned and scaled to its code (Fifty et al. 2025).

        z     = sg[rho R] x,   rho = |c_i|/|x|,   R = I - 2 r r^T + 2 (c_i/|c_i|)(x/|x|)^T        (DiVeQ eq. 4)
        dL/dx = rho R^T dL/dz

    with r along x/|x| + c_i/|c_i|, and the losses of `STE`. Where x and c_i are antiparallel R = I - 2 x x^T/|x|^2; a
    row x = 0 falls back to `STE`, and a code 0 gives z = 0 and no gradient.

    Args:
        codebook_weight, commitment_weight, sync: as of `STE`.
    """

    rotation = True


register(
    "rotation",
    Method(
        "STE whose gradient keeps its angle to the code",
        source="DiVeQ eq. 4; Fifty et al. 2025",
        estimator=lambda spec: Rotation(),
        replace=True,
    ),
)
