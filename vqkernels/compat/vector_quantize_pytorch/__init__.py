"""Faces of vector-quantize-pytorch 1.32.0: change the import line, keep the rest."""

from vqkernels.compat.vector_quantize_pytorch.vector_quantize import LossBreakdown as LossBreakdown
from vqkernels.compat.vector_quantize_pytorch.vector_quantize import VectorQuantize as VectorQuantize
