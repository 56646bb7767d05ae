"""Codebooks: where codes come from, and what they learn from being used."""

from vqkernels.nn.codebooks.ema import EMACodebook as EMACodebook
from vqkernels.nn.codebooks.learned import Codebook as Codebook
