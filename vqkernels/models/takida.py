"""The convolutional ResNet of SQ-VAE (Takida et al. 2022), which Huh et al. and MQ train with 64 channels."""

from torch import Tensor, nn

from vqkernels.checks import check_count, check_flag
from vqkernels.models.autoencoder import ImageAutoencoder
from vqkernels.nn import Quantizer


class TakidaVAE(ImageAutoencoder):
    """The autoencoder of SQ-VAE's image experiments.

    Encoder: strided 4x4 convolutions whose channels double up to `width`, then a 3x3 convolution, each with
    batch normalisation and ReLU, then `residual_blocks` blocks x + bn(conv1x1(relu(bn(conv3x3(relu(x)))))); the
    decoder mirrors it with transposed convolutions. Latents have `width` channels, as there; where `latent_dim` is
    another number, 1x1 convolutions translate. The last layer is a hyperbolic tangent, for images in [-1, 1] are to
    it what images in [0, 1] are to SQ-VAE's sigmoid.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        in_channels: int = 3,
        width: int = 64,
        latent_dim: int = 64,
        downsamplings: int = 2,
        residual_blocks: int = 2,
        batch_norm: bool = True,
    ) -> None:
        """Build the encoder and the decoder around a quantizer.

        Args:
            quantizer: maps (B, latent_dim, h, w) latents to `Quantized`, that is `channel_dim=1`.
            in_channels: channels of the images.
            width: channels of the layers at the latents' size.
            latent_dim: channels of the latents, the D of the quantizer.
            downsamplings: how often height and width are halved.
            residual_blocks: residual blocks in each half.
            batch_norm: whether convolutions are followed by batch normalisation.

        Raises:
            TypeError: if a size is not an int, or the flag no bool.
            ValueError: if a size is below 1, or a count of blocks below 0.
        """
        for name, value, minimum in (
            ("in_channels", in_channels, 1),
            ("width", width, 1),
            ("latent_dim", latent_dim, 1),
            ("downsamplings", downsamplings, 1),
            ("residual_blocks", residual_blocks, 0),
        ):
            check_count("TakidaVAE", name, value, minimum=minimum)
        check_flag("TakidaVAE", "batch_norm", batch_norm)
        channels = [max(1, width // 2**left) for left in reversed(range(downsamplings))]
        same = latent_dim == width
        down: list[nn.Module] = []
        for have, want in zip([in_channels, *channels], channels):
            down += _followed(nn.Conv2d(have, want, 4, stride=2, padding=1), batch_norm)
        encoder = nn.Sequential(
            *down,
            *_followed(nn.Conv2d(width, width, 3, padding=1), batch_norm),
            *(_Residual(width, batch_norm) for _ in range(residual_blocks)),
            *([] if same else [nn.Conv2d(width, latent_dim, 1)]),
        )
        up: list[nn.Module] = []
        for have, want in zip(channels[:0:-1], channels[-2::-1]):
            up += _followed(nn.ConvTranspose2d(have, want, 4, stride=2, padding=1), batch_norm)
        decoder = nn.Sequential(
            *([] if same else [nn.Conv2d(latent_dim, width, 1)]),
            *(_Residual(width, batch_norm) for _ in range(residual_blocks)),
            *_followed(nn.ConvTranspose2d(width, width, 3, padding=1), batch_norm),
            *up,
            nn.ConvTranspose2d(channels[0], in_channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        super().__init__(encoder, quantizer, decoder, in_channels=in_channels, factor=2**downsamplings)


class _Residual(nn.Module):
    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 1)
        self.branch = nn.Sequential(
            nn.ReLU(),
            *_followed(nn.Conv2d(width, width, 3, padding=1), batch_norm),
            last,
            *([nn.BatchNorm2d(width)] if batch_norm else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _followed(convolution: nn.Conv2d | nn.ConvTranspose2d, batch_norm: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(convolution.out_channels)] if batch_norm else []
    return [convolution, *norm, nn.ReLU()]
