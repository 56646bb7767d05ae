"""Replacement of unused codes, inside of a training forward, by the buffers of diveq."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from vqkernels.compat.diveq._base import DiveqFace
from vqkernels.compat.diveq._options import check_flags, check_replacement
from vqkernels.nn._random import all_sum
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.nn.upkeep.importance import ImportanceReplacement
from vqkernels.nn.upkeep.schedules import Every

_LOGGER = logging.getLogger(__name__)

DIFFERENCES = (
    "The peer counts iterations that use a code; ours counts its rows, of all ranks (paper, B.1).",
    "The peer replaces codes used in few iterations; ours, those far below the mean use.",
    "The peer moves replaced codes by perturb_eps, lost in float32; ours by 1e-3 of their size or more.",
    "The peer replaces codes on each rank by itself; ours does alike on all.",
    "The peer prints what verbose asks for; ours logs it to vqkernels.compat.diveq at level INFO.",
)


class Replacing(DiveqFace):
    """A face that counts the use of its codes and replaces those without."""

    codebook_usage: Tensor
    replacement_iters: int
    discard_threshold: float
    perturb_eps: float
    verbose: bool

    def _keep_replacement(
        self, iters: int, threshold: float, eps: float, *, verbose: bool, checked: bool = True
    ) -> None:
        op = type(self).__name__
        if checked:
            check_replacement(op, iters, threshold, eps)
        check_flags(op, verbose=verbose)
        self.replacement_iters, self.discard_threshold, self.perturb_eps = iters, threshold, eps
        self.verbose = verbose

    def _register(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("codebook_usage", torch.zeros(shape[:-1], dtype=torch.int32))

    @torch.no_grad()
    def _note(self, counts: Tensor, iteration: int) -> None:
        """Add the rows of each code, the shape of `codebook_usage`; replace codes where a period ends."""
        if recomputing():
            return
        # the sum of a long period stays at what the dtype of diveq holds
        total = all_sum(counts.clone()).add_(self.codebook_usage)
        self.codebook_usage.copy_(total.clamp_max_(2**31 - 1))
        if iteration % self.replacement_iters == 0:
            self._replace(iteration)

    def _replace(self, iteration: int) -> None:
        several = self.codebook.dim() == 3
        codes = self.codebook.detach() if several else self.codebook.detach()[None]
        usage = self.codebook_usage if several else self.codebook_usage[None]
        schedule = Every(self.replacement_iters)
        for q, (table, used) in enumerate(zip(codes, usage, strict=True)):
            upkeep = _Apart(schedule, self.discard_threshold, self.perturb_eps, used)
            dead = upkeep.commit(_Table(table), iteration)
            # to count them waits for the device
            if self.verbose and dead is not None and _LOGGER.isEnabledFor(logging.INFO):
                where = f" of codebook {q + 1}" if several else ""
                _LOGGER.info("iteration %d: replaced %d codes%s", iteration, int(dead.sum()), where)


class _Table(Codebook):
    """Codes that stand elsewhere."""

    def __init__(self, codes: Tensor):
        nn.Module.__init__(self)
        self.weight = codes


class _Apart(ImportanceReplacement):
    """Replacement by given counts, which moves a code by at least `eps`."""

    def __init__(self, schedule: Every, threshold: float, eps: float, counts: Tensor):
        super().__init__(schedule, threshold=threshold)
        self.eps, self.counts = eps, counts

    def spread(self, copied: Tensor) -> Tensor:
        return super().spread(copied).clamp_min(self.eps)
