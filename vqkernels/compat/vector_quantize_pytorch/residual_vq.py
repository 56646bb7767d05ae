"""What the peer's module of this name offers."""

from vqkernels.compat.vector_quantize_pytorch.grouped import GroupedResidualVQ
from vqkernels.compat.vector_quantize_pytorch.residual import ResidualVQ

__all__ = ["GroupedResidualVQ", "ResidualVQ"]
