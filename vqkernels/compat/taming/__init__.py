"""Faces of the quantizers of taming-transformers (Esser et al. 2021): only the import line changes."""

from vqkernels.compat.taming.gumbel import GumbelQuantize as GumbelQuantize
from vqkernels.compat.taming.nearest import VectorQuantizer as VectorQuantizer
from vqkernels.compat.taming.nearest import VectorQuantizer2 as VectorQuantizer2
