"""What the space-filling faces have in common: a warm-up, and what an evaluation returns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqkernels.checks import check_choice
from vqkernels.compat.diveq._base import DiveqFace, readable
from vqkernels.compat.diveq._options import check_flags, check_warm_up
from vqkernels.compat.diveq._warm_up import BlockMeans
from vqkernels.nn._random import distributed
from vqkernels.nn.estimators.base import Choice
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.ops import nearest_code, nearest_segment

DIFFERENCES = (
    "The peer has inference search two segments beside the nearest code; ours, all: outputs are nearer.",
    "The peer has inference return NaN where codes coincide or K is 2; ours returns the nearest point.",
    "The peer returns points that no index decodes to; ours too, or codes: evaluation = 'codeword'.",
    "The peer keeps all latents of a warm-up for ever; ours keeps sums and frees them.",
    "The peer starts at NaN with fewer latents than codes; ours spreads codes along those seen.",
    "The peer starts codes on each rank by itself; ours from the latents of all ranks, alike on all.",
)


class SpaceFilling(DiveqFace):
    """A face that warms up and whose codes are the corners of a curve.

    Attributes:
        evaluation: "curve" (default) returns the nearest point of the curve, as the released `inference` means to: no
            code, at an unbounded rate. "codeword" returns the nearest code, as the paper's text has it. The indices are
            those of the nearest code in both.
    """

    min_codes = 2
    nearer = "Outputs are the nearest points of the whole curve, and not of two of its segments."
    skip_iters: int
    avg_iters: int
    latents_on_cpu: bool

    def _keep_warm_up(
        self,
        skip_iters: int,
        avg_iters: int,
        stages: int,
        *,
        on_cpu: bool,
        replacement_iters: int | None = None,
    ) -> None:
        op = type(self).__name__
        check_warm_up(op, skip_iters, avg_iters, replacement_iters)
        check_flags(op, latents_on_cpu=on_cpu)
        self.skip_iters, self.avg_iters, self.latents_on_cpu = skip_iters, avg_iters, on_cpu
        self._stages = stages
        self._means: list[BlockMeans] = []
        self.evaluation = "curve"

    @property
    def evaluation(self) -> str:
        """ "curve" or "codeword"."""
        return self._evaluation

    @evaluation.setter
    def evaluation(self, mode: str) -> None:
        self._evaluation = check_choice(type(self).__name__, "evaluation", mode, ("curve", "codeword"))

    @property
    def warming(self) -> bool:
        """Whether the codes have not started: the next training forward belongs to the warm-up."""
        return self.iteration + 1 < self.skip_iters

    def _collect(self, latents: Sequence[Tensor], iteration: int) -> None:
        """Take note of what each codebook quantizes in an iteration of the warm-up; start the codes at its end."""
        first = max(1, self.skip_iters - self.avg_iters)
        if recomputing() or not first <= iteration < self.skip_iters:
            return
        if not self._means or iteration == first:
            self._means = [
                BlockMeans(self.num_embeddings, self.skip_iters - first, on_cpu=self.latents_on_cpu)
                for _ in range(self._stages)
            ]
        for means, x in zip(self._means, latents, strict=True):
            means.add(x.detach(), iteration - first)
        if iteration == self.skip_iters - 1:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        tables = self.codebook.detach() if self.codebook.dim() == 3 else self.codebook.detach()[None]
        for table, means in zip(tables, self._means, strict=True):
            found = means.codes(table.device, table.shape[1])
            seen = 0 if found is None else found[1]
            if found is not None:
                table.copy_(found[0])
            if seen < self.num_embeddings and self.allow_warning:
                words = f"{type(self).__name__}: avg_iters={self.avg_iters} iterations brought {seen} finite latents"
                fix = "Pass more avg_iters or larger batches"
                warnings.warn(f"{words} for {self.num_embeddings} codes. {fix}.", UserWarning, stacklevel=5)
        self._means = []

    def carry(self, peer: nn.Module) -> None:
        """Take over the latents that a peer in its warm-up has collected."""
        held = getattr(peer, "latent_list", [])
        stages = held if self.codebook.dim() == 3 else [held]
        count = len(stages[0]) if stages else 0
        now = self.iteration
        if now + 1 >= self.skip_iters:
            return
        for m in range(count):
            self._collect([stage[m] for stage in stages], now - count + 1 + m)

    def _passed(self, z: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """What a warm-up without quantization returns: z itself, zeros for indices and perplexity."""
        if distributed():
            # data-parallel reducers wait for a gradient of every parameter
            z = z + (0 * self.codebook.sum()).to(z.dtype)
        indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        nothing = torch.zeros((), device=z.device)
        return z, indices, 0.0 if readable(nothing) else nothing

    def _nearest_point(self, x: Tensor, codes: Tensor) -> tuple[Choice, Tensor]:
        """What an evaluation returns: where it is, and the nearest code."""
        indices = nearest_code(x, codes).indices
        if self.evaluation == "codeword":
            return Choice(indices), indices
        segments, position, _ = nearest_segment(x, codes)
        return Choice(segments, position), indices
