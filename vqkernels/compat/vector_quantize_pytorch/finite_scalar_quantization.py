"""What the peer's module of this name offers."""

from vqkernels.compat.vector_quantize_pytorch.fsq import FSQ

__all__ = ["FSQ"]
