"""DiVeQ and SF-DiVeQ as differentiable functions: a search, then the directional reparameterization."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vqkernels.checks import check_count, check_noise_std, check_pair, check_seed
from vqkernels.ops._layout import collapse
from vqkernels.ops.directional import NOISE_STD, apply_directional
from vqkernels.ops.nearest_code import nearest_code_op
from vqkernels.ops.philox import dither


class DiVeQResult(NamedTuple):
    """What `diveq` returns."""

    z: Tensor
    indices: Tensor


class SFDiVeQResult(NamedTuple):
    """What `sf_diveq` returns."""

    z: Tensor
    segments: Tensor
    position: Tensor


def diveq(
    x: Tensor,
    codebook: Tensor,
    *,
    noise_std: float = NOISE_STD,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> DiVeQResult:
    """Quantize each row to its nearest code, differentiably in both arguments.

        z = x + |c_i - x| sg[(v + c_i - x) / |v + c_i - x|],   v ~ N(0, noise_std^2 I)        (DiVeQ eq. 8)

    For backward only `x`, `codebook`, the indices and the seed are kept; the noise is drawn again.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device, K >= 1.
        noise_std: a standard deviation in units of x, >= 0 (the paper's variance is 1e-3 for VQ-VAEs).
        seed: an int, a 0-d int64 tensor on x's device, or None to draw one from torch.
        row_offset: number of the first row: two halves of a batch with offsets 0 and N/2 equal the whole.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        z: (..., D), dtype of x.
        indices: (...) int64, by the contract of `nearest_code`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit, or K = 0.
        BackendError: `backend` cannot run these inputs.
    """
    check_pair("diveq", x, codebook)
    noise_std = check_noise_std("diveq", noise_std)
    check_count("diveq", "row_offset", row_offset)
    seed = check_seed("diveq", seed, x.device)
    indices, _ = nearest_code_op(collapse(x.detach()), codebook.detach(), None, True, [], backend=backend)
    indices = indices.view(x.shape[:-1])
    z = apply_directional(x, codebook, indices, None, seed, "noisy", noise_std, row_offset, backend)
    return DiVeQResult(z, indices)


def sf_diveq(
    x: Tensor,
    codebook: Tensor,
    *,
    noise_std: float = NOISE_STD,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> SFDiVeQResult:
    """Quantize each row to the nearest dithered point of the curve through the codes, differentiably.

        p_s = (1 - l_s) c_s + l_s c_{s+1},   l_s ~ U(0, 1) per segment, shared by all rows        (DiVeQ eq. 11)
        z   = x + (1 - l_s) |c_s - x| sg[u_1] + l_s |c_{s+1} - x| sg[u_2]                         (eq. 12)

    where s is the nearest of the K - 1 points and u_m the direction of v_m + c - x with independent v_1, v_2.
    For backward only `x`, `codebook`, the segments, their positions and the seed are kept.

    Args:
        x: (..., D) float16, bfloat16, float32 or float64, any strides.
        codebook: (K, D), any of these dtypes, same device, K >= 2.
        noise_std: a standard deviation in units of x, >= 0.
        seed: of the dither and the noise: an int, a 0-d int64 tensor on x's device, or None to draw one.
        row_offset: number of the first row: two halves of a batch with offsets 0 and N/2 equal the whole.
        backend: "native", "triton" or "reference"; by default the fastest that accepts the inputs.

    Returns:
        z: (..., D), dtype of x.
        segments: (...) int64 in [0, K - 1).
        position: (...) float32 l_s of each row's segment.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or values do not fit, or K < 2.
        BackendError: `backend` cannot run these inputs.
    """
    check_pair("sf_diveq", x, codebook, min_codes=2)
    noise_std = check_noise_std("sf_diveq", noise_std)
    check_count("sf_diveq", "row_offset", row_offset)
    seed = check_seed("sf_diveq", seed, x.device)
    segments, position = dithered_segment(x, codebook, seed, backend)
    z = apply_directional(x, codebook, segments, position, seed, "noisy", noise_std, row_offset, backend)
    return SFDiVeQResult(z, segments, position)


def dithered_segment(x: Tensor, codebook: Tensor, seed: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Segment and position of the nearest dithered point (eq. 11), for inputs that are already checked."""
    weights = dither(seed, codebook.shape[0], backend=backend)
    segments, _ = nearest_code_op(collapse(x.detach()), codebook.detach(), weights, True, [], backend=backend)
    segments = segments.view(x.shape[:-1])
    return segments, weights[segments]
