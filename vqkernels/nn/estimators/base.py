"""What all estimators have in common: how a row chooses its code, how a gradient crosses, what evaluation returns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.ops import nearest_code

if TYPE_CHECKING:
    from vqkernels.nn.codebooks.learned import Codebook


class Context(NamedTuple):
    """What a training forward knows besides latents and codes.

    Attributes:
        seed: 0-d int64, of all noise of this forward.
        row_offset: number of the first row, over all processes.
        mask: (...) bool, False where a row takes no part; None for all.
        mean_rows: 0-d, rows that count on each process in the mean; None for those found here.
        learned: whether the codes are learned by gradient, for forwards without one, where codes do not tell.
    """

    seed: Tensor
    row_offset: int = 0
    mask: Tensor | None = None
    mean_rows: Tensor | None = None
    learned: bool = True


class Choice(NamedTuple):
    """What each row of x (..., D) chose.

    Attributes:
        indices: (...) int64 code, or segment with `position`; -1 for a masked row.
        position: (...) where on the segment, in [0, 1], or None.
    """

    indices: Tensor
    position: Tensor | None = None


class Estimate(NamedTuple):
    """What an estimator makes of x (..., D): z (..., D), training indices (...), and a 0-d loss."""

    z: Tensor
    indices: Tensor
    loss: Tensor


class Estimator(nn.Module):
    """Base of all estimators: each row chooses its nearest code and evaluates to that code.

    A subclass writes `cross`, and `choose` where a row does not simply take the nearest code. One whose evaluation is
    not a codeword also writes `encode`, `decode` and `bits_per_latent`.

    Every method takes x (..., D) with codes (K, D), or in groups x (..., G, D) with codes (G, K, D): all groups in one
    call. `cross` is also called with a code for every row, (rows, D), and indices 0, 1, 2, ...: the sum of the stages
    of a residual quantizer, or codes that came from other processes.
    """

    # fewest codes it can work with, whether it draws noise, and the Q of an evaluation
    min_codes = 1
    noisy = False
    codes_per_latent = 1
    # whether `commit` will do nothing any more
    idle = True
    # whether training indices are codes, and whether it takes groups
    chooses_codes = True
    grouped = True
    # whether `cross` takes targets that are no codes, such as sums of codes; whether it has a loss, and whether the
    # gradient of z reaches the codes
    joint = True
    has_loss = True
    reaches_codes = True
    # whether an evaluation is the nearest code
    plain = True

    def choose(self, x: Tensor, codes: Tensor, context: Context) -> Choice:
        """The code of each row in training, without gradient; by default the nearest."""
        return Choice(masked(nearest(x, codes), context.mask))

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        """From x to its chosen codes, with the estimator's gradient to both."""
        raise TypeError(f"{type(self).__name__}: cross must be defined by the subclass; got none. Define it.")

    def forward(self, x: Tensor, codes: Tensor, context: Context) -> Estimate:
        """Quantize in training: choose, then cross."""
        return self.cross(x, codes, self.choose(x, codes, context), context)

    def encode(self, x: Tensor, codes: Tensor) -> Tensor:
        """Indices (..., Q) of an evaluation: no noise."""
        return nearest(x, codes)[..., None]

    def evaluate(self, x: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize without noise: (z, indices (..., Q)), z made of the `table` that stands for the codes outside."""
        indices = self.encode(x, codes)
        return self.decode(indices, table), indices

    def decode(self, indices: Tensor, codes: Tensor) -> Tensor:
        """The z (..., D) that indices (..., Q) stand for."""
        return gather(codes, indices.squeeze(-1))

    def num_indices(self, num_codes: int, training: bool) -> int:
        """How many values `indices[..., 0]` can take, in training or in the current evaluation mode."""
        return num_codes

    def bits_per_latent(self, num_codes: int) -> float:
        """Bits per latent of an evaluation with K codes."""
        return math.log2(num_codes)

    def commit(self, step: int) -> None:
        """Follow a schedule after optimizer step number `step` (from 1)."""

    def check(self, codebook: Codebook) -> None:
        """Refuse a codebook that this estimator cannot train.

        Raises:
            ValueError: it has too few codes, or must know the code of each row where rows choose segments.
        """
        op, name = "VectorQuantizer", type(self).__name__
        if codebook.num_codes < self.min_codes:
            requirement = f"have at least {self.min_codes} codes for {name}"
            refuse(ValueError, op, "codebook", requirement, codebook.num_codes, "Pass more num_codes")
        if codebook.counts_codes and not self.chooses_codes:
            requirement = f"not count rows per code for {name}, whose rows choose segments"
            fix = "Pass a Codebook that learns by gradient"
            refuse(ValueError, op, "codebook", requirement, type(codebook).__name__, fix)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Nearest code of each row: x (..., D), codes (K, D) -> (...); or x (..., G, D), codes (G, K, D) -> (..., G)."""
    if codes.dim() == 2:
        return nearest_code(x, codes).indices
    return nearest_code(x.movedim(-2, 0), codes).indices.movedim(0, -1).contiguous()


def flat(codes: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """One codebook for all groups: codes (G, K, D), indices (..., G) -> (G * K, D) and indices into it; else as is."""
    if codes.dim() == 2:
        return codes, indices
    groups, num_codes, dim = codes.shape
    first = torch.arange(groups, device=indices.device) * num_codes
    return codes.reshape(groups * num_codes, dim), torch.where(indices < 0, indices, indices + first)


def masked(indices: Tensor, mask: Tensor | None) -> Tensor:
    """Indices (...) or (..., G) with -1 where the mask (...) is False."""
    if mask is None:
        return indices
    return torch.where(mask if mask.dim() == indices.dim() else mask[..., None], indices, -1)


def gather(codes: Tensor, indices: Tensor) -> Tensor:
    """Rows of codes (K, D) for indices (...), 0 where an index is negative (a masked row); differentiable."""
    rows = F.embedding(indices.clamp_min(0), codes)
    return torch.where(indices[..., None] >= 0, rows, 0)


def finite_rows(x: Tensor) -> Tensor:
    """Which rows hold no NaN and no Inf: (..., D) -> (..., 1) bool."""
    # a maximum is NaN or Inf where any of its terms is; this is the fastest of the ways to ask
    return x.detach().abs().amax(-1, keepdim=True) < torch.inf


def mark(value: Tensor, finite: Tensor) -> Tensor:
    """`value` in finite rows, else NaN, in the value as in its gradient."""
    return value * torch.where(finite, 1.0, torch.nan).to(value.dtype)


def no_loss(x: Tensor) -> Tensor:
    """The loss of an estimator that has none: a 0-d zero, float32 or wider."""
    return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
