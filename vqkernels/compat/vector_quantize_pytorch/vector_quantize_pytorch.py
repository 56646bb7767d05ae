"""Names that the peer keeps in a module of this name."""

from vqkernels.compat.vector_quantize_pytorch.losses import orthogonal as orthogonal_loss_fn
from vqkernels.compat.vector_quantize_pytorch.vector_quantize import LossBreakdown, VectorQuantize

__all__ = ["LossBreakdown", "VectorQuantize", "orthogonal_loss_fn"]
