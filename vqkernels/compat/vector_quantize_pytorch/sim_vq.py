"""What the peer's module of this name offers."""

from vqkernels.compat.vector_quantize_pytorch.simvq import SimVQ

__all__ = ["SimVQ"]
