"""Faces of vector-quantize-pytorch 1.32.0: change the import line, keep the rest."""

from vqkernels.compat.vector_quantize_pytorch.fsq import FSQ as FSQ
from vqkernels.compat.vector_quantize_pytorch.grouped import GroupedResidualVQ as GroupedResidualVQ
from vqkernels.compat.vector_quantize_pytorch.lfq import LFQ as LFQ
from vqkernels.compat.vector_quantize_pytorch.residual import ResidualVQ as ResidualVQ
from vqkernels.compat.vector_quantize_pytorch.simvq import SimVQ as SimVQ
from vqkernels.compat.vector_quantize_pytorch.vector_quantize import LossBreakdown as LossBreakdown
from vqkernels.compat.vector_quantize_pytorch.vector_quantize import VectorQuantize as VectorQuantize
