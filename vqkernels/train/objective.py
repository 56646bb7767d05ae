"""What a reconstruction is judged by, before any discriminator."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.train.config import TrainConfig


class Objective(nn.Module):
    """Mean squared or mean absolute error of images in [-1, 1], plus a perceptual distance where one is given.

    Args:
        config: of the run; `reconstruction` and `perceptual_weight` matter here.
        perceptual: (outputs, targets) -> (B,) distances; None for none.

    Attributes:
        found: the last parts by name, 0-d and detached, for the log; "mse" always.
    """

    def __init__(self, config: TrainConfig, perceptual: nn.Module | None = None):
        super().__init__()
        self._l1 = config.reconstruction == "l1"
        self._weight = config.perceptual_weight
        self.perceptual = perceptual
        self.found: dict[str, Tensor] = {}

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the 0-d loss, a mean over the batch.

        Args:
            outputs: (B, C, H, W) reconstructions.
            targets: (B, C, H, W) originals.
        """
        mse = F.mse_loss(outputs, targets)
        loss = F.l1_loss(outputs, targets) if self._l1 else mse
        self.found = {"mse": mse.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(outputs, targets).mean()
            self.found["perceptual"] = distance.detach()
            loss = loss + self._weight * distance
        return loss
