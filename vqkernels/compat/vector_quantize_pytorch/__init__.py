"""Faces of vector-quantize-pytorch 1.32.0: change `vector_quantize_pytorch` to this module in the import line."""

from vqkernels.compat.vector_quantize_pytorch.fsq import FSQ
from vqkernels.compat.vector_quantize_pytorch.lfq import LFQ
from vqkernels.compat.vector_quantize_pytorch.simvq import SimVQ

__all__ = ["FSQ", "LFQ", "SimVQ"]
