"""The convolutional VQ-VAE of DiVeQ, table 3, with its sizes as parameters."""

from torch import Tensor, nn

from vqkernels.checks import check_count
from vqkernels.models.autoencoder import ImageAutoencoder
from vqkernels.nn import Quantizer


class VQVAE(ImageAutoencoder):
    """A convolutional autoencoder with a quantizer between its halves.

    Encoder: `downsamplings` strided 4x4 convolutions, each followed by ReLU, `residual_blocks` blocks
    x + conv1x1(relu(conv3x3(relu(x)))), and a 1x1 convolution to `latent_dim`; the decoder mirrors it
    (DiVeQ, table 3: width 256, latent_dim 512, 4 down-samplings and 6 blocks for 256x256 images).
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        in_channels: int = 3,
        width: int = 64,
        latent_dim: int = 32,
        downsamplings: int = 2,
        residual_blocks: int = 2,
    ) -> None:
        """Build the encoder and the decoder around a quantizer.

        Args:
            quantizer: maps (B, latent_dim, h, w) latents to `Quantized`, that is `channel_dim=1`.
            in_channels: channels of the images.
            width: channels of every hidden layer.
            latent_dim: channels of the latents, the D of the quantizer.
            downsamplings: how often height and width are halved.
            residual_blocks: residual blocks in each half.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a size is below 1, or a count of blocks or down-samplings below 0.
        """
        for name, value, minimum in (
            ("in_channels", in_channels, 1),
            ("width", width, 1),
            ("latent_dim", latent_dim, 1),
            ("downsamplings", downsamplings, 0),
            ("residual_blocks", residual_blocks, 0),
        ):
            check_count("VQVAE", name, value, minimum=minimum)
        encoder = nn.Sequential(
            *_strided(in_channels, width, downsamplings),
            *(_Residual(width) for _ in range(residual_blocks)),
            nn.Conv2d(width, latent_dim, 1),
        )
        decoder = nn.Sequential(
            nn.Conv2d(latent_dim, width, 1),
            *(_Residual(width) for _ in range(residual_blocks)),
            *_transposed(width, in_channels, downsamplings),
        )
        super().__init__(encoder, quantizer, decoder, in_channels=in_channels, factor=2**downsamplings)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _strided(in_channels: int, width: int, count: int) -> list[nn.Module]:
    if count == 0:
        return [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
    layers: list[nn.Module] = []
    for step in range(count):
        layers += [nn.Conv2d(in_channels if step == 0 else width, width, 4, stride=2, padding=1), nn.ReLU()]
    return layers


def _transposed(width: int, out_channels: int, count: int) -> list[nn.Module]:
    if count == 0:
        return [nn.Conv2d(width, out_channels, 3, padding=1)]
    layers: list[nn.Module] = []
    for step in range(count):
        last = step == count - 1
        layers.append(nn.ConvTranspose2d(width, out_channels if last else width, 4, stride=2, padding=1))
        if not last:
            layers.append(nn.ReLU())
    return layers
