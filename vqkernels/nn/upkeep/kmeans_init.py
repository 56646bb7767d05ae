"""Codes that start by k-means on the first training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_count
from vqkernels.nn._random import all_rows, draw_seed_aside, of_first_rank
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context
from vqkernels.nn.upkeep.base import Upkeep
from vqkernels.nn.upkeep.kmeans import kmeans


class KMeansInit(Upkeep):
    """Start the codes by k-means on the first training batch of all ranks, before it is quantized (Huh A.7).

    Rows that are masked or not finite have no part. Before the first batch an evaluation raises, and so do
    `torch.compile` and the capture of a CUDA graph: run one training forward, or `quantizer.initialize(x)`.

    Args:
        iterations: of Lloyd after k-means++; 0 starts the codes as latents.

    Raises:
        TypeError, ValueError: `iterations` is not an int of 0 or more.
    """

    waiting = "codes that wait for their first batch"
    remedy = "Call quantizer.initialize(x) or train on a batch first, or load a state_dict"

    def __init__(self, *, iterations: int = 10):
        super().__init__()
        self.iterations = check_count("KMeansInit", "iterations", iterations)
        self.started = False

    @property
    def idle(self) -> bool:
        return self.started

    @torch.no_grad()
    def start(self, codebook: Codebook, x: Tensor, context: Context) -> Tensor:
        if context.mask is not None:
            x = torch.where(context.mask[..., None], x, torch.nan)
        rows = all_rows(x.reshape(-1, x.shape[-1]))
        seed = draw_seed_aside(x.device)
        codes = kmeans(rows, codebook.num_codes, iterations=self.iterations, seed=seed)
        codebook.assign(of_first_rank(codes))
        self.started = True
        return torch.ones(len(codes), dtype=torch.bool, device=codes.device)

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, started={self.started}"
