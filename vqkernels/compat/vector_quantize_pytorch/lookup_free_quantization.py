"""What the peer's module of this name offers."""

from vqkernels.compat.vector_quantize_pytorch.lfq import LFQ

__all__ = ["LFQ"]
