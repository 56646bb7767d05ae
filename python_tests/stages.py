"""Stages and parts with normal codes, for the tests of residual and product quantizers."""

import torch

from vqkernels.nn import Codebook, VectorQuantizer
from vqkernels.testing import DEVICE

D, K, Q = 6, 16, 3


def stage(estimator, *, scale=1.0, upkeep=(), codebook=Codebook, dim=D, num_codes=K):
    """A stage with normal codes, shorter in later stages."""
    made = VectorQuantizer(codebook(num_codes, dim), estimator, upkeep).to(DEVICE)
    made.codebook.assign(scale * torch.randn(num_codes, dim, device=DEVICE))
    return made


def stages(estimator, count=Q, **options):
    return [stage(estimator(), scale=0.6**q, **options) for q in range(count)]
