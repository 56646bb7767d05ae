"""One pass of residuals through the stages of a `ResidualVQ`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.compat.vector_quantize_pytorch.vector_quantize import VectorQuantize


class Found(NamedTuple):
    """The sum of codes (B, N, D'), indices (B, N, Q), losses, and what the used stages quantized, if kept."""

    z: Tensor
    indices: Tensor
    losses: Tensor
    residuals: tuple[Tensor, ...] = ()
    searched: bool = False


@dataclass(frozen=True)
class Stages:
    """The stages of one forward and what they are all told.

    Attributes:
        layers: stages, used and not.
        last: number of the last one used.
        mask: bool (B, N) or None.
        temperature: of stochastic sampling, or None.
        freeze: True, or None for what the layer was constructed with.
        share: of the gradient that passes from a residual to the stage before.
    """

    layers: Sequence[VectorQuantize]
    last: int
    mask: Tensor | None
    temperature: float | None
    freeze: bool | None
    share: float

    def passed(self, quantized: Tensor) -> Tensor:
        """The codes as the next residual sees them."""
        if self.share <= 0:
            return quantized.detach()
        if self.share == 1:
            return quantized
        return self.share * quantized + (1 - self.share) * quantized.detach()

    def greedy(self, y: Tensor, *, keep: bool) -> Found:
        """Each stage takes what is nearest to its residual.

        Args:
            y: (B, N, D').
            keep: whether the residuals are needed afterwards.
        """
        residual, z = y, torch.zeros_like(y)
        indices, losses, residuals = [], [], []
        for layer in self.layers[: self.last + 1]:
            if keep:
                residuals.append(residual)
            quantized, index, loss = layer(
                residual, mask=self.mask, sample_codebook_temp=self.temperature, freeze_codebook=self.freeze
            )
            residual = residual - self.passed(quantized)
            z = z + quantized
            indices.append(index)
            losses.append(loss)
        return Found(
            z,
            self.padded(torch.stack(indices, dim=-1), -1),
            self.padded(torch.stack(losses), 0),
            tuple(residuals),
        )

    def cross_entropy(self, y: Tensor, targets: Tensor) -> Found:
        """The sum over stages of the cross entropy of the targets (B, N, Q), in place of losses."""
        residual, z, residuals = y, torch.zeros_like(y), []
        total = y.new_zeros((), dtype=torch.float32)
        for layer, target in zip(self.layers, targets.unbind(-1), strict=True):
            residuals.append(residual)
            quantized, loss = layer(
                residual,
                mask=self.mask,
                indices=target,
                sample_codebook_temp=self.temperature,
                freeze_codebook=self.freeze,
            )
            residual = residual - self.passed(quantized)
            z = z + quantized
            total = total + loss
        return Found(z, targets, total, tuple(residuals))

    def padded(self, found: Tensor, value: int) -> Tensor:
        """Something per used stage, in the last dimension, with `value` for the others."""
        return nn.functional.pad(found, (0, len(self.layers) - 1 - self.last), value=value)
