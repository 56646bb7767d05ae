"""Directional reparameterization with one code per row: DiVeQ, DiVeQ-detach, NSVQ."""

from __future__ import annotations

from torch import Tensor

from vqkernels.checks import check_noise_std
from vqkernels.nn.estimators.base import Choice, Context, Estimate, Estimator, flat, no_loss
from vqkernels.nn.methods import Method, register
from vqkernels.ops import directional
from vqkernels.ops.directional import NOISE_STD


def move(
    x: Tensor,
    codes: Tensor,
    choice: Choice,
    context: Context,
    direction: str,
    noise_std: float = NOISE_STD,
) -> Estimate:
    """z = x + sum_m w_m |p_m - x| sg[u_m] towards the chosen points, without a loss (DiVeQ eq. 7, 8, 12, 16)."""
    # a latent of G groups has G rows
    groups = x.shape[-2] if codes.dim() == 3 else 1
    codes, indices = flat(codes, choice.indices)
    z = directional(
        x,
        codes,
        indices,
        direction=direction,
        position=choice.position,
        noise_std=noise_std,
        seed=context.seed,
        row_offset=context.row_offset * groups,
    )
    return Estimate(z, choice.indices, no_loss(x))


class DiVeQ(Estimator):
    """Directional reparameterization: z = x + |c_i - x| sg[(v + e)/|v + e|], e = c_i - x (DiVeQ eq. 8).

    Args:
        noise_std: standard deviation of v, in units of x. The paper's variances are 1e-3 (VQ-VAE), 1e-2 (VQGAN).
    """

    noisy = True
    has_loss = False

    def __init__(self, *, noise_std: float = NOISE_STD):
        super().__init__()
        self.noise_std = check_noise_std(type(self).__name__, noise_std)

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        return move(x, codes, choice, context, "noisy", self.noise_std)

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}"


class FixedDirection(Estimator):
    """Members of the family whose direction has no scale of noise."""

    direction: str
    has_loss = False

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        return move(x, codes, choice, context, self.direction)


class DiVeQDetach(FixedDirection):
    """DiVeQ without noise: z = x + |c_i - x| sg[e/|e|], which is c_i (DiVeQ eq. 16)."""

    direction = "detach"


class NSVQ(FixedDirection):
    """Noise substitution: z = x + |c_i - x| sg[v/|v|], v ~ N(0, I) (DiVeQ eq. 7; Vali and Backstrom 2022)."""

    direction = "random"
    noisy = True


register(
    "diveq",
    Method(
        "no auxiliary loss; precise codewords; add replacement",
        source="DiVeQ eq. 8",
        estimator=lambda spec: DiVeQ(noise_std=spec.noise_std),
        noisy=True,
        replace=True,
    ),
)
register(
    "diveq_detach",
    Method(
        "DiVeQ without noise, nothing to tune",
        source="DiVeQ eq. 16",
        estimator=lambda spec: DiVeQDetach(),
        replace=True,
    ),
)
register(
    "nsvq",
    Method(
        "noise of random direction; for comparison",
        source="DiVeQ eq. 7; Vali and Backstrom 2022",
        estimator=lambda spec: NSVQ(),
        replace=True,
    ),
)
