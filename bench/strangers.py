"""Models as other libraries' examples build them, around these libraries' own quantizers: what `convert` meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# pixels of a side that become one latent
FACTOR = 4


class Autoencoder(nn.Module):
    """Pixels to latents, through a quantizer, and back; a subclass knows how its library's quantizer is called."""

    def __init__(self, encoder: nn.Module, quantizer: nn.Module, decoder: nn.Module) -> None:
        """Keep the three parts; the quantizer is a child of its own, so that `convert` may swap it."""
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder sees, (B, D, H, W), and the quantizer's own loss, 0-d."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions, (B, 3, H, W), and the quantizer's own loss."""
        z, extra = self.quantize(self.encoder(images))
        return self.decoder(z), extra

    def loss(self, images: Tensor) -> Tensor:
        """Return what the example of the library trains with, 0-d."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """Return that of the example."""
        raise NotImplementedError


class Lucid(Autoencoder):
    """Two convolutions with pooling and L1, as vector-quantize-pytorch's example of an autoencoder."""

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Call it on feature maps."""
        z, _, commitment = self.quantizer(latents)
        return z, commitment.sum()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keep reconstructions in the range of pixels."""
        found, commitment = super().forward(images)
        return found.clamp(-1, 1), commitment

    def loss(self, images: Tensor) -> Tensor:
        """Return L1 and ten times the commitment."""
        found, commitment = self(images)
        return F.l1_loss(found, images) + 10 * commitment

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW; codes are moving averages, so it has none of them."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Diverse(Autoencoder):
    """Strided convolutions with residual blocks and squared error, as diveq's example of a VQ-VAE."""

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Call it on rows; the library has a method of its own for inference."""
        rows = latents.permute(0, 2, 3, 1)
        called = self.quantizer if self.training else self.quantizer.inference
        z = called(rows.reshape(-1, rows.shape[-1]))[0]
        return z.view(rows.shape).permute(0, 3, 1, 2), latents.new_zeros(())

    def loss(self, images: Tensor) -> Tensor:
        """Return the squared error: the codes need no loss of their own."""
        return F.mse_loss(self(images)[0], images)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam, codes included."""
        return torch.optim.Adam(self.parameters(), lr=5.5e-4)


class Block(nn.Module):
    """What a residual block adds to its input."""

    def __init__(self, width: int) -> None:
        """Build a convolution and a projection."""
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(width // 2, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.body(x)


def lucid(dim: int, quantizer: nn.Module) -> Autoencoder:
    """The first kind of model, for latents of `dim` features."""
    half = dim // 2
    encoder = nn.Sequential(
        nn.Conv2d(3, half, 3, padding=1),
        nn.MaxPool2d(2),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, padding=1),
        nn.MaxPool2d(2),
    )
    decoder = nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(dim, half, 3, padding=1),
        nn.GELU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(half, 3, 3, padding=1),
    )
    return Lucid(encoder, quantizer, decoder)


def diverse(dim: int, quantizer: nn.Module, width: int = 32) -> Autoencoder:
    """The second kind of model, for latents of `dim` features."""
    encoder = nn.Sequential(
        nn.Conv2d(3, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        Block(width),
        Block(width),
        nn.Conv2d(width, dim, 1),
    )
    decoder = nn.Sequential(
        nn.Conv2d(dim, width, 3, padding=1),
        Block(width),
        Block(width),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
    )
    return Diverse(encoder, quantizer, decoder)


def _vector_quantize(num_codes: int, dim: int) -> Autoencoder:
    from vector_quantize_pytorch import VectorQuantize

    return lucid(dim, VectorQuantize(dim=dim, codebook_size=num_codes, accept_image_fmap=True))


def _diveq(num_codes: int, dim: int) -> Autoencoder:
    from diveq import DIVEQ

    return diverse(dim, DIVEQ(num_codes, dim, allow_warning=False, verbose=False))


def _residual_diveq(num_codes: int, dim: int) -> Autoencoder:
    from diveq import ResidualDIVEQ

    return diverse(dim, ResidualDIVEQ(num_codes, dim, 4, allow_warning=False, verbose=False))


@dataclass(frozen=True)
class Case:
    """A model of a library, and how large it is.

    Attributes:
        name: short.
        library: the distribution.
        quantizer: name of its class.
        make: builds the model of a number of codes and of features.
        num_codes: of a codebook.
        dim: features of a latent.
        crop: side of a training crop, in pixels.
        batch: crops in a batch.
        bound: whether the quantizer must get 10 times cheaper, with 20 times less memory.
    """

    name: str
    library: str
    quantizer: str
    make: Callable[[int, int], Autoencoder]
    num_codes: int
    dim: int
    crop: int = 64
    batch: int = 16
    bound: bool = False

    @property
    def rows(self) -> int:
        """Latents of a batch."""
        return self.batch * (self.crop // FACTOR) ** 2

    def tiny(self) -> Case:
        """The same model in a size for tests."""
        return replace(self, num_codes=32, dim=8, crop=16, batch=4)


# sizes of the examples, and those of a tokenizer
CASES = (
    Case("vq", "vector-quantize-pytorch", "VectorQuantize", _vector_quantize, 256, 32),
    Case(
        "vq-large",
        "vector-quantize-pytorch",
        "VectorQuantize",
        _vector_quantize,
        16384,
        256,
        bound=True,
    ),
    Case("diveq", "diveq", "DIVEQ", _diveq, 1024, 512),
    Case("diveq-large", "diveq", "DIVEQ", _diveq, 16384, 256, batch=32, bound=True),
    Case("diveq-residual", "diveq", "ResidualDIVEQ", _residual_diveq, 1024, 128),
)
