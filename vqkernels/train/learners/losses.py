"""The losses of VQGAN: reconstruction, perception, the two sides of the game, and the weight between them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_choice, check_number, refuse
from vqkernels.models import LPIPS
from vqkernels.train.config import RunError

DiscriminatorLoss = Callable[[Tensor, Tensor], Tensor]

# bounds of the adaptive weight in the released code of VQGAN
_MAX_WEIGHT = 1e4
_SMALL = 1e-4


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 (Lim and Ye 2017).

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions.

    Returns:
        0-d.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's cross entropy: -(mean ln s(real) + mean ln(1 - s(fake))) / 2 (Goodfellow et al. 2014).

    Args:
        real: logits of images, any shape.
        fake: logits of reconstructions.

    Returns:
        0-d.
    """
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises of the game: -mean fake (Lim and Ye 2017).

    Args:
        fake: logits of reconstructions, any shape.

    Returns:
        0-d.
    """
    return -fake.mean()


# by their names in the released code of VQGAN
DISCRIMINATOR_LOSSES: dict[str, DiscriminatorLoss] = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def adaptive_weight(task_gradient: Tensor, game_gradient: Tensor) -> Tensor:
    """The weight that makes both losses pull alike: |grad task| / (|grad game| + 1e-4), at most 1e4.

    Esser et al. 2021, eq. 7, with the two constants of the released code; the paper has 1e-6 and no bound.

    Args:
        task_gradient: of the reconstruction's loss in the weight of the decoder's last layer.
        game_gradient: of `generator_loss` in the same.

    Returns:
        0-d, without gradient.
    """
    ratio = task_gradient.norm() / (game_gradient.norm() + _SMALL)
    return ratio.clamp(0, _MAX_WEIGHT).detach()


class Judged(NamedTuple):
    """What `ImageLoss` returns, 0-d each; `perceptual` is None without LPIPS."""

    total: Tensor
    mse: Tensor
    perceptual: Tensor | None


class ImageLoss(nn.Module):
    """The distance of reconstructions: mean |x - y|^p + w mean LPIPS(x, y), p = 1 for "l1" and 2 for "mse"."""

    def __init__(
        self, reconstruction: str = "mse", *, perceptual: LPIPS | None = None, perceptual_weight: float = 1.0
    ) -> None:
        """Say what counts.

        Args:
            reconstruction: "mse" or "l1".
            perceptual: LPIPS with its weights, or None for pixels alone.
            perceptual_weight: w, >= 0.

        Raises:
            TypeError, ValueError: if an argument is not one of these.
        """
        super().__init__()
        check_choice("ImageLoss", "reconstruction", reconstruction, ("mse", "l1"))
        self.weight = check_number("ImageLoss", "perceptual_weight", perceptual_weight)
        if perceptual is not None and not isinstance(perceptual, LPIPS):
            fix = "Pass LPIPS.from_files(path)"
            refuse(TypeError, "ImageLoss", "perceptual", "be an LPIPS", type(perceptual).__name__, fix)
        self.reconstruction, self.perceptual = reconstruction, perceptual

    def forward(self, reconstruction: Tensor, images: Tensor) -> Judged:
        """Compare.

        Args:
            reconstruction: (B, C, H, W) in [-1, 1].
            images: the same shape.

        Returns:
            The loss and its parts.
        """
        mse = F.mse_loss(reconstruction, images)
        pixels = mse if self.reconstruction == "mse" else F.l1_loss(reconstruction, images)
        if self.perceptual is None or self.weight == 0:
            return Judged(pixels, mse.detach(), None)
        distance = self.perceptual(reconstruction, images).mean()
        return Judged(pixels + self.weight * distance, mse.detach(), distance.detach())


def load_lpips(files: str) -> LPIPS:
    """Read LPIPS from the files that an option names.

    Args:
        files: torchvision's VGG-16 and the linear layers, in one file or, comma between, in two.

    Raises:
        RunError: one is missing, or holds other weights.
    """
    vgg, _, linear = files.partition(",")
    try:
        return LPIPS.from_files(vgg, linear or None)
    except (FileNotFoundError, ValueError) as error:
        raise RunError(str(error)) from error


def pull(outputs: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """The gradient in a weight of what has the gradient `slope` in the outputs.

    Args:
        outputs: made with the weight.
        weight: any tensor they depend on.
        slope: the shape of the outputs.

    Returns:
        The shape of the weight.
    """
    return torch.autograd.grad(outputs, weight, slope, retain_graph=True)[0]
