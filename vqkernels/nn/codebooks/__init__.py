"""Codebooks: where codes come from, and what they learn from being used.

Any codebook goes with any estimator, with two exceptions, which `VectorQuantizer` refuses when it is made:

- a codebook that counts the rows of each code (`EMACodebook`) with an estimator whose rows choose segments between
  codes (the SF-DiVeQ family): there is no code that a row belongs to;
- a codebook that no gradient moves (`EMACodebook`, or one frozen before) with an estimator that exists to bring the
  task's gradient to the codes (the synchronized update, `sync` > 0): nobody would take it.

Over codes that no gradient moves, a codebook loss is absent and the estimators that have none train the encoder alone.
"""

from vqkernels.nn.codebooks.affine import AffineCodebook as AffineCodebook
from vqkernels.nn.codebooks.affine import AffineEMACodebook as AffineEMACodebook
from vqkernels.nn.codebooks.ema import EMACodebook as EMACodebook
from vqkernels.nn.codebooks.hypernet import HyperNetCodebook as HyperNetCodebook
from vqkernels.nn.codebooks.learned import Codebook as Codebook
from vqkernels.nn.codebooks.simvq import ProjectedCodebook as ProjectedCodebook
from vqkernels.nn.codebooks.simvq import SimVQCodebook as SimVQCodebook
