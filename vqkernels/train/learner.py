"""What the loop asks of a way of training: one step, and a state to go on from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from vqkernels.models import ImageAutoencoder
from vqkernels.train.config import TrainConfig


class StepResult(NamedTuple):
    """What one step found, without gradient.

    Attributes:
        loss: 0-d, what was minimised.
        mse: 0-d mean squared error of images in [-1, 1].
        indices: (..., Q) int64, negative where nothing was quantized.
        extras: 0-d each, logged as means over the steps that have them.
    """

    loss: Tensor
    mse: Tensor
    indices: Tensor
    extras: dict[str, Tensor]


class Learner:
    """Base of the ways of training: holds the optimizers, and takes steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: ImageAutoencoder) -> None:
        """Keep the three.

        Args:
            config: of the run.
            accelerator: of the run.
            model: to train, not prepared yet.
        """
        self.config, self.accelerator, self.model = config, accelerator, model

    def step(self, batch: Tensor, number: int) -> StepResult:
        """Take one optimizer step.

        Args:
            batch: (B, C, H, W) images of this process, in [-1, 1].
            number: 0-based step.

        Returns:
            What it found.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return everything besides the model that the next step depends on."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of a learner of the same configuration.
        """
        raise NotImplementedError
