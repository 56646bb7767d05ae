"""Models around a quantizer: each receives the quantizer it is built with; and the networks that judge images."""

from vqkernels.models.autoencoder import ImageAutoencoder as ImageAutoencoder
from vqkernels.models.autoencoder import Reconstructed as Reconstructed
from vqkernels.models.lpips import LPIPS as LPIPS
from vqkernels.models.patchgan import PatchDiscriminator as PatchDiscriminator
from vqkernels.models.takida import TakidaVAE as TakidaVAE
from vqkernels.models.vqgan import VQGAN as VQGAN
from vqkernels.models.vqvae import VQVAE as VQVAE

__all__ = [
    "LPIPS",
    "VQGAN",
    "VQVAE",
    "ImageAutoencoder",
    "PatchDiscriminator",
    "Reconstructed",
    "TakidaVAE",
]
