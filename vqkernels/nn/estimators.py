"""Estimators: how a gradient crosses the quantization, and what evaluation returns instead."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_choice, check_count, check_noise_std, check_number, refuse
from vqkernels.ops import directional, diveq, nearest_code, nearest_segment, sf_diveq
from vqkernels.ops.directional import NOISE_STD
from vqkernels.ops.diveq import dithered_segment


class Estimate(NamedTuple):
    """What an estimator makes of x (..., D): z (..., D), training indices (...), and a 0-d loss."""

    z: Tensor
    indices: Tensor
    loss: Tensor


def gather(codes: Tensor, indices: Tensor) -> Tensor:
    """Rows of codes (K, D) for indices (...), 0 where an index is negative (a masked row); differentiable."""
    rows = F.embedding(indices.clamp_min(0), codes)
    return torch.where(indices[..., None] >= 0, rows, 0)


class Estimator(nn.Module):
    """Base of all estimators: assigns each row to its nearest code and evaluates to that code.

    A subclass writes `forward`. One whose evaluation is not a codeword also writes `evaluate`, `decode`,
    `bits_per_latent`.
    """

    # fewest codes it can work with, whether it draws noise, and the Q of an evaluation
    min_codes = 1
    noisy = False
    codes_per_latent = 1

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        """Quantize in training: x (..., D), codes (K, D), a 0-d int64 seed and the number of the first row."""
        raise TypeError(
            f"{type(self).__name__}: forward must be defined by the subclass; got none. Define it."
        )

    def evaluate(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize without noise: (z, indices (..., Q)), z in the dtype of the codes."""
        indices = nearest_code(x, codes).indices[..., None]
        return self.decode(indices, codes), indices

    def decode(self, indices: Tensor, codes: Tensor) -> Tensor:
        """The z (..., D) that indices (..., Q) stand for."""
        return gather(codes, indices.squeeze(-1))

    def num_indices(self, num_codes: int, training: bool) -> int:
        """How many values `indices[..., 0]` can take, in training or in the current evaluation mode."""
        return num_codes

    def bits_per_latent(self, num_codes: int) -> float:
        """Bits per latent of an evaluation with K codes."""
        return math.log2(num_codes)


def finite_rows(x: Tensor) -> Tensor:
    """Which rows hold no NaN and no Inf: (..., D) -> (..., 1) bool."""
    return x.isfinite().all(-1, keepdim=True)


def mark(value: Tensor, finite: Tensor) -> Tensor:
    """`value` in finite rows, else NaN, in the value as in its gradient."""
    return value * torch.where(finite, 1.0, torch.nan).to(value.dtype)


class STE(Estimator):
    """Straight-through estimator with codebook and commitment losses.

        z    = x + sg[c_i - x]
        loss = codebook |sg[x] - c_i|^2 + commitment |x - sg[c_i]|^2, means over rows and features   (DiVeQ eq. 2)

    Args:
        codebook_weight: weight of the codebook loss; it is absent where the codes are not learned.
        commitment_weight: weight of the commitment loss.
    """

    def __init__(self, *, codebook_weight: float = 1.0, commitment_weight: float = 0.25):
        super().__init__()
        self.codebook_weight = check_number("STE", "codebook_weight", codebook_weight)
        self.commitment_weight = check_number("STE", "commitment_weight", commitment_weight)

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        indices = nearest_code(x, codes).indices
        # in float32 or better, so that the codebook's gradient is summed there
        code = gather(codes.to(torch.promote_types(codes.dtype, torch.float32)), indices)
        finite = finite_rows(x)
        loss = self.commitment_weight * _mean_square(x, code.detach(), finite)
        if codes.requires_grad:
            loss = loss + self.codebook_weight * _mean_square(x.detach(), code, finite)
        # the value is the code itself, not the code up to a rounding; x comes first, its strides are kept
        return Estimate(mark(x - x.detach(), finite) + code.detach().to(x.dtype), indices, loss)

    def extra_repr(self) -> str:
        return f"codebook_weight={self.codebook_weight}, commitment_weight={self.commitment_weight}"


class DiVeQ(Estimator):
    """Directional reparameterization: z = x + |c_i - x| sg[(v + e)/|v + e|], e = c_i - x (DiVeQ eq. 8).

    Args:
        noise_std: standard deviation of v, in units of x. The paper's variances are 1e-3 (VQ-VAE), 1e-2 (VQGAN).
    """

    noisy = True

    def __init__(self, *, noise_std: float = NOISE_STD):
        super().__init__()
        self.noise_std = check_noise_std(type(self).__name__, noise_std)

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        z, indices = diveq(x, codes, noise_std=self.noise_std, seed=seed, row_offset=row_offset)
        return Estimate(z, indices, _no_loss(x))

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}"


class _FixedDirection(Estimator):
    """Members of the family whose direction has no scale of noise."""

    direction: str

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        indices = nearest_code(x, codes).indices
        z = directional(x, codes, indices, direction=self.direction, seed=seed, row_offset=row_offset)
        return Estimate(z, indices, _no_loss(x))


class DiVeQDetach(_FixedDirection):
    """DiVeQ without noise: z = x + |c_i - x| sg[e/|e|], which is c_i (DiVeQ eq. 16)."""

    direction = "detach"


class NSVQ(_FixedDirection):
    """Noise substitution: z = x + |c_i - x| sg[v/|v|], v ~ N(0, I) (DiVeQ eq. 7; Vali and Backstrom 2022)."""

    direction = "random"
    noisy = True


class _SpaceFilling(Estimator):
    """Evaluation of the space-filling members, in three modes that differ in rate."""

    min_codes = 2
    # the dither, also where there is no noise
    noisy = True

    def __init__(self, *, evaluation: str = "codeword", bits: int = 4):
        super().__init__()
        self.evaluation = evaluation
        # a float32 position has 24 bits
        self.bits = check_count(type(self).__name__, "bits", bits, minimum=1, maximum=24)

    @property
    def evaluation(self) -> str:
        """ "codeword", "curve" or "segment"."""
        return self._evaluation

    @evaluation.setter
    def evaluation(self, mode: str) -> None:
        choices = ("codeword", "curve", "segment")
        self._evaluation = check_choice(type(self).__name__, "evaluation", mode, choices)

    @property
    def codes_per_latent(self) -> int:
        """2 in mode "segment", else 1."""
        return 2 if self.evaluation == "segment" else 1

    def evaluate(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        if self.evaluation == "codeword":
            return super().evaluate(x, codes)
        segments, position, _ = nearest_segment(x, codes)
        if self.evaluation == "curve":
            return _interpolate(codes, segments, position), segments[..., None]
        levels = 2**self.bits
        level = (position * levels).floor().clamp(0, levels - 1).long()
        indices = torch.stack((segments, level), dim=-1)
        return self.decode(indices, codes), indices

    def decode(self, indices: Tensor, codes: Tensor) -> Tensor:
        if self.evaluation == "codeword":
            return super().decode(indices, codes)
        if self.evaluation == "curve":
            requirement = "be 'codeword' or 'segment' to decode"
            fix = "Set estimator.evaluation and quantize again: a point of the curve is not a code"
            refuse(ValueError, type(self).__name__, "evaluation", requirement, "'curve'", fix)
        segments, level = indices.unbind(-1)
        return _interpolate(codes, segments, (level + 0.5) / 2**self.bits)

    def num_indices(self, num_codes: int, training: bool) -> int:
        return num_codes if self.evaluation == "codeword" and not training else num_codes - 1

    def bits_per_latent(self, num_codes: int) -> float:
        if self.evaluation == "codeword":
            return math.log2(num_codes)
        return math.inf if self.evaluation == "curve" else math.log2(num_codes - 1) + self.bits


class SFDiVeQ(_SpaceFilling):
    """Space-filling DiVeQ: quantizes to dithered points of the curve c_1 c_2 ... c_K (DiVeQ eq. 11 and 12).

    Training indices are segments, K - 1 of them. Evaluation has three modes, because the paper and its released
    code differ: "codeword" (the paper's text: nearest code, log2 K bits), "curve" (the nearest point of the whole
    curve: not a code, it cannot be decoded from indices), "segment" (Q = 2: the nearest segment and the position on
    it in 2^bits levels, log2(K - 1) + bits bits).

    Args:
        noise_std: standard deviation of v_1 and v_2, in units of x.
        evaluation: the mode; also an attribute, to be changed at any time.
        bits: of the position, in mode "segment".
    """

    def __init__(self, *, noise_std: float = NOISE_STD, evaluation: str = "codeword", bits: int = 4):
        super().__init__(evaluation=evaluation, bits=bits)
        self.noise_std = check_noise_std(type(self).__name__, noise_std)

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        z, segments, _ = sf_diveq(x, codes, noise_std=self.noise_std, seed=seed, row_offset=row_offset)
        return Estimate(z, segments, _no_loss(x))

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}, evaluation={self.evaluation!r}"


class SFDiVeQDetach(_SpaceFilling):
    """SF-DiVeQ without noise: z = (1 - l_s) c_s + l_s c_{s+1} (DiVeQ eq. 16), evaluated like `SFDiVeQ`.

    Args:
        evaluation: "codeword", "curve" or "segment"; also an attribute.
        bits: of the position, in mode "segment".
    """

    def forward(self, x: Tensor, codes: Tensor, seed: Tensor, row_offset: int) -> Estimate:
        segments, position = dithered_segment(x, codes, seed, None)
        z = directional(x, codes, segments, direction="detach", position=position, seed=seed)
        return Estimate(z, segments, _no_loss(x))

    def extra_repr(self) -> str:
        return f"evaluation={self.evaluation!r}"


def _interpolate(codes: Tensor, segments: Tensor, position: Tensor) -> Tensor:
    wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
    at = position[..., None].to(wide.dtype)
    first = gather(wide, segments)
    second = gather(wide, torch.where(segments >= 0, segments + 1, segments))
    # at the ends the point is the code itself
    return torch.where(at == 1, second, first + at * (second - first)).to(codes.dtype)


def _mean_square(a: Tensor, b: Tensor, finite: Tensor) -> Tensor:
    """Mean over finite rows and features, in float32 or better."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    square = torch.where(finite, a.to(wide) - b.to(wide), 0).square()
    return square.sum() / (finite.sum().clamp_min(1) * a.shape[-1])


def _no_loss(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
