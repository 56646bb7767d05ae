"""Stochastic sampling of codes, annealed."""

from __future__ import annotations

from torch import Tensor

from vqkernels.nn.estimators.base import Choice, Context, masked
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.estimators.temperature import (
    STEPS,
    ExponentialTemperature,
    Temperature,
    TemperatureSchedule,
)
from vqkernels.nn.methods import Method, register
from vqkernels.ops import sample_code


def _falling(steps: int) -> ExponentialTemperature:
    return ExponentialTemperature(steps, 1.0, 0.01)


class Stochastic(STE):
    """Straight-through estimator whose codes are drawn, nearer ones more often; evaluation takes the nearest.

        P(i = j | x) = softmax_j(-|x - c_j|^2 / tau),   z = x + sg[c_i - x]        (Huh et al. eq. 12; SQ-VAE)

    with the losses of `STE`. tau is annealed so that the choice is deterministic in the end.

    Args:
        codebook_weight: weight of the codebook loss; it is absent where the codes are not learned.
        commitment_weight: weight of the commitment loss.
        sync: nu >= 0 of the synchronized update, as of `STE`.
        temperature: a schedule of tau, >= 0, in units of x squared, or a number; by default from 1 to 0.01 in 10 000
            optimizer steps. Pass one that fits the training: annealing too fast collapses the codebook.

    Raises:
        TypeError, ValueError: a weight or the temperature is not one of the above.
    """

    noisy = True
    grouped = False

    def __init__(
        self,
        *,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        sync: float = 0.0,
        temperature: TemperatureSchedule | float | None = None,
    ):
        super().__init__(codebook_weight=codebook_weight, commitment_weight=commitment_weight, sync=sync)
        schedule = _falling(STEPS) if temperature is None else temperature
        self.temperature = Temperature("Stochastic", schedule, zero=True)
        self.idle = self.temperature.schedule.settled(0)

    def choose(self, x: Tensor, codes: Tensor, context: Context) -> Choice:
        indices = sample_code(
            x, codes, temperature=self.temperature(), seed=context.seed, row_offset=context.row_offset
        )
        return Choice(masked(indices, context.mask))

    def commit(self, step: int) -> None:
        self.temperature.commit(step)
        self.idle = self.temperature.schedule.settled(step)


register(
    "stochastic",
    Method(
        "draws codes at a falling temperature; explores where plain STE collapses",
        source="Huh et al. eq. 12; Takida et al. 2022",
        estimator=lambda spec: Stochastic(temperature=_falling(spec.steps or STEPS)),
    ),
)
