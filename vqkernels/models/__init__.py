"""Models around a quantizer: each receives the quantizer it is built with."""

from vqkernels.models.vqvae import VQVAE as VQVAE
from vqkernels.models.vqvae import Reconstructed as Reconstructed

__all__ = ["VQVAE", "Reconstructed"]
