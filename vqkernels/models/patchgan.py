"""The discriminator of VQGAN: PatchGAN (Isola et al. 2017), which judges patches instead of images."""

from itertools import pairwise

from torch import Tensor, nn

from vqkernels.checks import check_count, refuse


class PatchDiscriminator(nn.Module):
    """A convolutional network with one logit for each of its overlapping fields of view.

    `layers` strided 4x4 convolutions from `width` channels on, doubling up to 8 width, then a 4x4 convolution without
    stride and one to a single logit; leaky ReLU of slope 0.2 between them, and batch normalisation between all but the
    first and last. With 3 layers a logit sees 70x70 pixels. Weights start from N(0, 0.02^2), scales of the
    normalisation from N(1, 0.02^2). The normalisation always uses the statistics of its batch and keeps none, for a
    discriminator is used in training only.
    """

    def __init__(self, in_channels: int = 3, *, width: int = 64, layers: int = 3) -> None:
        """Build the network.

        Args:
            in_channels: channels of the images.
            width: channels of the first layer.
            layers: how often height and width are halved.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a size is below 1.
        """
        super().__init__()
        for name, value in (("in_channels", in_channels), ("width", width), ("layers", layers)):
            check_count("PatchDiscriminator", name, value, minimum=1)
        self.in_channels, self.layers = in_channels, layers
        channels = [width * min(2**layer, 8) for layer in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (have, want) in enumerate(pairwise(channels), start=1):
            stride = 2 if layer < layers else 1
            parts.append(nn.Conv2d(have, want, 4, stride=stride, padding=1, bias=False))
            parts += [nn.BatchNorm2d(want, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(channels[-1], 1, 4, padding=1))
        self.apply(_start)

    @property
    def min_side(self) -> int:
        """The height and width, in pixels, below which no logit is left."""
        return 3 * 2**self.layers

    def forward(self, images: Tensor) -> Tensor:
        """Judge images.

        Args:
            images: (B, in_channels, H, W), both sides `min_side` or more.

        Returns:
            (B, 1, H / 2^layers - 2, W / 2^layers - 2) logits, high for what looks real.

        Raises:
            ValueError: if the images have another shape or are too small.
        """
        if images.dim() != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < self.min_side:
            requirement = f"be (B, {self.in_channels}, H, W) of {self.min_side} pixels each way or more"
            fix = "Pass larger images, or build it with fewer layers"
            got = f"shape {tuple(images.shape)}"
            refuse(ValueError, "PatchDiscriminator", "images", requirement, got, fix)
        return self.main(images)


def _start(part: nn.Module) -> None:
    if isinstance(part, nn.Conv2d):
        nn.init.normal_(part.weight, 0.0, 0.02)
    elif isinstance(part, nn.BatchNorm2d):
        nn.init.normal_(part.weight, 1.0, 0.02)
        nn.init.zeros_(part.bias)
