"""Space-filling DiVeQ: rows choose points of the curve through the codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.checks import check_below, check_choice, check_count, check_noise_std, refuse
from vqkernels.nn.estimators.base import Choice, Context, Estimate, Estimator, flat, gather, masked
from vqkernels.nn.estimators.diveq import move
from vqkernels.nn.methods import Method, register
from vqkernels.ops import nearest_segment
from vqkernels.ops._layout import collapse_groups
from vqkernels.ops.directional import NOISE_STD
from vqkernels.ops.diveq import dithered_segment
from vqkernels.ops.nearest_code import nearest_code_op
from vqkernels.ops.philox import dither


class SpaceFilling(Estimator):
    """Evaluation of the space-filling members, in three modes that differ in rate."""

    min_codes = 2
    # the dither, also where there is no noise
    noisy = True
    chooses_codes = False
    has_loss = False

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

    def choose(self, x: Tensor, codes: Tensor, context: Context) -> Choice:
        """The nearest dithered point p_s = (1 - l_s) c_s + l_s c_{s+1} of each row (eq. 11)."""
        if codes.dim() == 2:
            segments, position = dithered_segment(x, codes, context.seed, None)
        else:
            segments, position = _dithered_segments(x, codes, context.seed)
        return Choice(masked(segments, context.mask), position)

    @property
    def plain(self) -> bool:  # type: ignore[override]
        """Whether an evaluation is the nearest code."""
        return self.evaluation == "codeword"

    def encode(self, x: Tensor, codes: Tensor) -> Tensor:
        if self.evaluation == "codeword":
            return super().encode(x, codes)
        segments, position, _ = nearest_segment(x, codes)
        if self.evaluation == "curve":
            return segments[..., None]
        levels = 2**self.bits
        level = (position * levels).floor().clamp(0, levels - 1).long()
        return torch.stack((segments, level), dim=-1)

    def evaluate(self, x: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        if self.evaluation != "curve":
            return super().evaluate(x, codes, table)
        segments, position, _ = nearest_segment(x, codes)
        return interpolate(table, segments, position), segments[..., None]

    def decode(self, indices: Tensor, codes: Tensor) -> Tensor:
        if self.evaluation == "codeword":
            return super().decode(indices, codes)
        if self.evaluation == "curve":
            requirement = "be 'codeword' or 'segment' to decode"
            fix = "Set estimator.evaluation and quantize again: a point of the curve is not a code"
            refuse(ValueError, type(self).__name__, "evaluation", requirement, "'curve'", fix)
        segments, level = indices.unbind(-1)
        check_below("decode", "indices[..., 1]", level, 2**self.bits)
        return interpolate(codes, segments, (level + 0.5) / 2**self.bits)

    def num_indices(self, num_codes: int, training: bool) -> int:
        return num_codes if self.evaluation == "codeword" and not training else num_codes - 1

    def bits_per_latent(self, num_codes: int) -> float:
        if self.evaluation == "codeword":
            return math.log2(num_codes)
        return math.inf if self.evaluation == "curve" else math.log2(num_codes - 1) + self.bits


class SFDiVeQ(SpaceFilling):
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

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        return move(x, codes, choice, context, "noisy", self.noise_std)

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}, evaluation={self.evaluation!r}"


class SFDiVeQDetach(SpaceFilling):
    """SF-DiVeQ without noise: z = (1 - l_s) c_s + l_s c_{s+1} (DiVeQ eq. 16), evaluated like `SFDiVeQ`.

    Args:
        evaluation: "codeword", "curve" or "segment"; also an attribute.
        bits: of the position, in mode "segment".
    """

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        return move(x, codes, choice, context, "detach")

    def extra_repr(self) -> str:
        return f"evaluation={self.evaluation!r}"


def _dithered_segments(x: Tensor, codes: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Segments (..., G) and positions of x (..., G, D) in codes (G, K, D), whose dither is that of G K codes."""
    groups, num_codes, _ = codes.shape
    # no segment leads from the last code of a group to the first of the next
    weights = F.pad(dither(seed, groups * num_codes), (0, 1)).view(groups, num_codes)
    points = collapse_groups(x.detach().movedim(-2, 0))
    found, _ = nearest_code_op(points, codes.detach(), weights[:, :-1].contiguous(), True, [])
    segments = found.view(groups, *x.shape[:-2]).movedim(0, -1).contiguous()
    return segments, weights.flatten()[flat(codes, segments)[1]]


def interpolate(codes: Tensor, segments: Tensor, position: Tensor) -> Tensor:
    """Points of the curve, in the dtype of codes (K, D): segments (...) and positions (...) -> (..., D)."""
    wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
    at = position[..., None].to(wide.dtype)
    first = gather(wide, segments)
    second = gather(wide, torch.where(segments >= 0, segments + 1, segments))
    # at the ends the point is the code itself
    return torch.where(at == 1, second, first + at * (second - first)).to(codes.dtype)


register(
    "sf_diveq",
    Method(
        "full codebook use without replacement; warm up first",
        source="DiVeQ eq. 11 and 12",
        estimator=lambda spec: SFDiVeQ(noise_std=spec.noise_std),
        noisy=True,
        warm_up=True,
        segments=True,
    ),
)
register(
    "sf_diveq_detach",
    Method(
        "SF-DiVeQ without noise, nothing to tune",
        source="DiVeQ eq. 16",
        estimator=lambda spec: SFDiVeQDetach(),
        warm_up=True,
        segments=True,
    ),
)
