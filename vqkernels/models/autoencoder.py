"""What all autoencoders of images have in common: the face, and the images they refuse."""

from typing import NamedTuple

from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn import Quantizer


class Reconstructed(NamedTuple):
    """What an `ImageAutoencoder` returns.

    Attributes:
        reconstruction: (B, C, H, W) images, in the range of the input.
        indices: (B, H / f, W / f, Q) int64 codes with f = `factor`; -1 while the quantizer warms up.
        loss: 0-d loss of the quantizer itself, 0 for estimators that need none.
    """

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor


class ImageAutoencoder(nn.Module):
    """Base of the backbones: an encoder and a decoder of images with a quantizer between them.

    Attributes:
        encoder: (B, in_channels, H, W) -> (B, latent_dim, H / factor, W / factor).
        quantizer: maps those latents to `Quantized`, that is `channel_dim=1`.
        decoder: back again.
        in_channels: channels of the images.
        factor: pixels along one side of what a latent covers.
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module, *, in_channels: int, factor: int
    ) -> None:
        """Put the three parts in a row.

        Args:
            encoder, quantizer, decoder, in_channels, factor: as of the attributes.
        """
        super().__init__()
        self.in_channels, self.factor = in_channels, factor
        self.encoder = encoder
        self.quantizer: Quantizer = quantizer
        self.decoder = decoder

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, where VQGAN weighs its losses (Esser et al. 2021, eq. 7)."""
        convolutions = (nn.Conv2d, nn.ConvTranspose2d)
        return [part.weight for part in self.decoder.modules() if isinstance(part, convolutions)][-1]

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents before quantization.

        Args:
            images: (B, C, H, W), H and W multiples of `factor`.

        Returns:
            (B, latent_dim, H / factor, W / factor) in the dtype of the arithmetic.

        Raises:
            ValueError: if the images have another rank, channel count, or a size `factor` does not divide.
        """
        name = type(self).__name__
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            requirement = f"be (B, {self.in_channels}, H, W)"
            fix = "Pass a batch of channel-first images"
            refuse(ValueError, name, "images", requirement, f"shape {tuple(images.shape)}", fix)
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            requirement = f"have a height and width divisible by {self.factor}"
            got = f"{images.shape[2]}x{images.shape[3]}"
            refuse(ValueError, name, "images", requirement, got, "Crop them to a multiple")
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of quantized latents.

        Args:
            latents: (B, latent_dim, h, w).

        Returns:
            (B, C, h * factor, w * factor).
        """
        return self.decoder(latents)

    def forward(self, images: Tensor) -> Reconstructed:
        """Encode, quantize and decode.

        Args:
            images: (B, C, H, W), H and W multiples of `factor`.

        Returns:
            The reconstruction, the indices and the loss of the quantizer.

        Raises:
            ValueError: if the images do not fit the model.
        """
        quantized = self.quantizer(self.encode(images))
        return Reconstructed(self.decode(quantized.z), quantized.indices, quantized.loss)
