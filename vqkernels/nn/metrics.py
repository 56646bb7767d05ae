"""What a codebook and a model are doing, as device tensors: nothing here waits for the device, and no gradient flows.

A row takes part when x is finite in it and not all of its indices are negative (masked). A z that is not finite where
x is makes a result that is not finite, so that it shows. Results are 0-d float32 unless said otherwise, sums are taken
in float64. Metrics that gather over updates and processes stand in `vqkernels.nn.meters`.

Not here: SSIM, which `vqkernels.train.measures.evaluate` takes from scikit-image; LPIPS, FID and rFID (FID of reconstructions
against their originals), which need trained weights: `torchmetrics.image` has LearnedPerceptualImagePatchSimilarity
and FrechetInceptionDistance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vqkernels.checks import check_count, check_floating, check_number, refuse
from vqkernels.ops import nearest_code

_Bits = TypeVar("_Bits", float, Tensor)


def code_counts(indices: Tensor, num_codes: int, *, per_stage: bool = False) -> Tensor:
    """Count the rows of each code; indices outside [0, K) count for nothing.

    Args:
        indices: (...) int64, or (..., Q) with `per_stage`.
        num_codes: K.
        per_stage: whether each of the Q codes of a latent has counts of its own.

    Returns:
        (K,) int64, or (Q, K) with `per_stage`.

    Raises:
        TypeError: the indices are not int64.
        ValueError: K is less than 1, or `per_stage` finds no last dimension.
    """
    if indices.dtype != torch.int64:
        refuse(TypeError, "code_counts", "indices", "be int64", indices.dtype, "Call indices.long()")
    check_count("code_counts", "num_codes", num_codes, minimum=1)
    if per_stage and indices.dim() < 1:
        fix = "Call indices.unsqueeze(-1)"
        refuse(ValueError, "code_counts", "indices", "be (..., Q) to count per stage", "a 0-d tensor", fix)
    stages = indices.shape[-1] if per_stage else 1
    by_stage = indices.reshape(indices.numel() // max(stages, 1), stages)  # (N, Q)
    inside = (by_stage >= 0) & (by_stage < num_codes)
    first = torch.arange(stages, device=indices.device) * num_codes
    # the last bin takes what counts for nothing
    bins = torch.where(inside, by_stage + first, stages * num_codes).reshape(-1)
    counts = torch.zeros(stages * num_codes + 1, dtype=torch.int64, device=indices.device)
    counts = counts.index_add_(0, bins, torch.ones_like(bins))[:-1]
    return counts.view(stages, num_codes) if per_stage else counts


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum_j p_j ln p_j), p = counts / sum (DiVeQ eq. 15): (..., K) -> (...), 1 to K; nan without counts."""
    return _nats(counts).exp().float()


def entropy_bits(counts: Tensor) -> Tensor:
    """H = -sum_j p_j log2 p_j (DiVeQ eq. 17): (..., K) -> (...), 0 to log2 K; nan without counts."""
    return (_nats(counts) / math.log(2)).float()


def usage(counts: Tensor) -> Tensor:
    """Share of the codes used at least once: (..., K) -> (...), 0 to 1."""
    return (counts > 0).double().mean(-1).float()


def dead_codes(counts: Tensor) -> Tensor:
    """How many codes were never used: (..., K) -> (...) int64."""
    return (counts == 0).sum(-1)


def bits_per_latent(counts: Tensor) -> Tensor:
    """Bits per latent when each stage is coded by its own distribution: sum_q H_q, (K,) or (Q, K) -> 0-d.

    A code of fixed length takes log2 K bits per stage: `quantizer.bits_per_latent`.
    """
    return entropy_bits(counts).sum()


def bits_per_pixel(bits: _Bits, *, latents: int, pixels: int) -> _Bits:
    """Rate per pixel from the bits per latent of an image of `latents` latents and `pixels` pixels.

    Args:
        bits: per latent, of fixed length (`quantizer.bits_per_latent`) or as measured (`bits_per_latent`).
        latents: height times width of the latents, at least 1.
        pixels: height times width of the image, at least 1.

    Returns:
        What `bits` is, a number or a tensor.

    Raises:
        ValueError: `latents` or `pixels` is less than 1.
    """
    check_count("bits_per_pixel", "latents", latents, minimum=1)
    check_count("bits_per_pixel", "pixels", pixels, minimum=1)
    return bits * (latents / pixels)


def distortion(x: Tensor, z: Tensor, indices: Tensor | None = None, *, channel_dim: int = -1) -> Tensor:
    """(1/N) sum_n |x_n - z_n|^2, summed over the D features (DiVeQ eq. 17); nan where no row takes part.

    Args:
        x: latents, any shape with D features in `channel_dim`.
        z: of the shape of x.
        indices: int64, x's shape without `channel_dim`, then maybe Q; a row with only negative ones is left out.
        channel_dim: the dimension of x that holds the features.

    Returns:
        0-d, float32, or float64 when an input is; units of x squared.

    Raises:
        TypeError: x or z is not floating-point.
        ValueError: shapes do not match.
    """
    total, rows = sq_error_sum(x, z, indices, channel_dim=channel_dim)
    return (total / rows).to(_wide(x.dtype, z.dtype))


def distortion_per_bit(distortion: Tensor, counts: Tensor) -> Tensor:
    """D / H(C) (DiVeQ eq. 17), H in bits per latent; inf at H = 0, nan without counts.

    Args:
        distortion: 0-d, what `distortion` returns.
        counts: (K,), or (Q, K) for a latent of Q codes, whose entropies add up.

    Returns:
        0-d, units of x squared per bit.
    """
    bits = bits_per_latent(counts)
    return torch.where(bits == 0, torch.inf, distortion / bits).float()


def divergence(
    x: Tensor, codebook: Tensor, indices: Tensor | None = None, *, channel_dim: int = -1
) -> Tensor:
    """D(P, C) = (1/N) sum_n min_j |x_n - c_j|^2, how far latents are from their codes (Huh eq. 13), no N x K matrix.

    nan where no row takes part. D(C, Q) of Huh A.6, how far codes are from those in use, is
    `divergence(codebook, torch.where((counts > 0)[:, None], codebook, torch.nan))`: a code that is nan is none.

    Args:
        x: latents, any shape with D features in `channel_dim`.
        codebook: (K, D), as `quantizer.export()` returns it.
        indices: int64, x's shape without `channel_dim`, then maybe Q; a row with only negative ones is left out.
        channel_dim: the dimension of x that holds the features.

    Returns:
        0-d, float32, or float64 when an input is; units of x squared.

    Raises:
        TypeError: x or the codebook is not floating-point.
        ValueError: shapes or devices do not match.
    """
    total, rows = nearest_sum(x, codebook, indices, channel_dim=channel_dim)
    return (total / rows).to(_wide(x.dtype, codebook.dtype))


def gradient_gap(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> Tensor:
    """sum_l |g_l - h_l|^2 over layers, of gradients with a quantizer and without it (Huh eq. 14, A.3).

    Args:
        gradients: one tensor per layer, of the task loss with the quantizer; None is a gradient of zeros.
        reference: as many, of the same loss without it.

    Returns:
        0-d on the device of the first gradient; see `vqkernels.nn.gradient_gap` for gradients of a model.

    Raises:
        ValueError: the lists differ in length, gradients of a layer differ in shape, or there is no gradient at all.
    """
    op = "gradient_gap"
    if len(gradients) != len(reference):
        requirement = f"hold {len(gradients)} layers as gradients does"
        refuse(ValueError, op, "reference", requirement, len(reference), "Pass one gradient per layer")
    found = [gradient for pair in zip(gradients, reference) for gradient in pair if gradient is not None]
    if not found:
        refuse(ValueError, op, "gradients", "hold at least one tensor", "none", "Pass layers with gradients")
    total = torch.zeros((), dtype=torch.float64, device=found[0].device)
    for ours, theirs in zip(gradients, reference):
        known = theirs if ours is None else ours
        if known is None:
            continue
        ours, theirs = (torch.zeros_like(known) if g is None else g for g in (ours, theirs))
        _check_shapes(op, "reference", theirs, ours, "Pass gradients of the same layers")
        gap = torch.linalg.vector_norm(_difference(ours, theirs), dtype=torch.float64).square()
        total = total + gap.to(total.device)
    return total.float()


def psnr(
    reconstruction: Tensor, image: Tensor, *, data_range: float, dim: int | Sequence[int] | None = None
) -> Tensor:
    """10 log10(data_range^2 / mean squared error), in dB; inf where both are equal.

    Args:
        reconstruction: any shape and dtype.
        image: of the same shape.
        data_range: greatest less least possible value: 2 for [-1, 1], 255 for bytes.
        dim: dimensions that a mean is taken over, (1, 2, 3) for one value per NCHW image; None for all.

    Returns:
        float32, 0-d, or the shape without `dim`.

    Raises:
        ValueError: shapes differ, or `data_range` is not positive.
    """
    peak = check_data_range("psnr", data_range)
    errors = pixel_error_sum(reconstruction, image, dim=dim)
    mse = errors * errors.numel() / image.numel()
    return (10 * torch.log10(peak**2 / mse)).float()


def pixel_error_sum(
    reconstruction: Tensor, image: Tensor, *, dim: int | Sequence[int] | None = None
) -> Tensor:
    """What adds up to `psnr` over batches: the sum of squared errors over `dim`, float64."""
    _check_shapes("psnr", "image", image, reconstruction, "Pass an image of the same shape")
    dims = dim if dim is None or isinstance(dim, int) else list(dim)
    return torch.linalg.vector_norm(
        _difference(reconstruction, image), dim=dims, dtype=torch.float64
    ).square()


def check_data_range(op: str, data_range: float) -> float:
    """A positive and finite number."""
    if check_number(op, "data_range", data_range) == 0:
        refuse(ValueError, op, "data_range", "be positive", data_range, "Pass 2.0 for images in [-1, 1]")
    return float(data_range)


def used_rows(x: Tensor, indices: Tensor | None = None, *, channel_dim: int = -1) -> Tensor:
    """Which rows take part: x finite, and not all indices negative.

    Args:
        x: any shape with features in `channel_dim`.
        indices: int64, x's shape without `channel_dim`, then maybe Q.
        channel_dim: the dimension of x that holds the features.

    Returns:
        bool, x's shape without `channel_dim`.

    Raises:
        TypeError: x is not floating-point.
        ValueError: the indices are not of that shape, or x has no such dimension.
    """
    check_floating("used_rows", "x", x)
    if not -x.dim() <= channel_dim < x.dim() or x.shape[channel_dim] < 1:
        fix = "Pass the channel_dim that holds the features"
        requirement = f"have features in dimension {channel_dim}"
        refuse(ValueError, "used_rows", "x", requirement, f"shape {tuple(x.shape)}", fix)
    # the greatest |x| reads x once, where isfinite writes as much as it reads
    finite = torch.linalg.vector_norm(x.detach(), torch.inf, dim=channel_dim).isfinite()
    if indices is None:
        return finite
    if indices.shape == finite.shape:
        return finite & (indices >= 0)
    if indices.shape[:-1] != finite.shape or indices.dim() != x.dim():
        fix = "Pass the indices that were found for x, and its channel_dim"
        requirement = f"be {tuple(finite.shape)}, then maybe Q, to match x"
        refuse(ValueError, "used_rows", "indices", requirement, tuple(indices.shape), fix)
    return finite & (indices >= 0).any(-1)


def used_indices(indices: Tensor, x: Tensor, *, channel_dim: int = -1) -> Tensor:
    """Indices with -1 in rows where x is not finite, whose index 0 stands for no code; arguments as in `used_rows`."""
    used = used_rows(x, indices, channel_dim=channel_dim)
    return torch.where(used if used.dim() == indices.dim() else used[..., None], indices, -1)


def sq_error_sum(
    x: Tensor, z: Tensor, indices: Tensor | None = None, *, channel_dim: int = -1
) -> tuple[Tensor, Tensor]:
    """What adds up to `distortion` over batches: the sum of |x_n - z_n|^2, 0-d float64, and N, 0-d int64."""
    check_floating("distortion", "z", z)
    _check_shapes("distortion", "z", z, x, "Pass the z that was made of x")
    used = used_rows(x, indices, channel_dim=channel_dim)
    error = torch.linalg.vector_norm(_difference(x, z), dim=channel_dim, dtype=torch.float64)
    return torch.where(used, error.square(), 0).sum(), used.sum()


def nearest_sum(
    x: Tensor, codebook: Tensor, indices: Tensor | None = None, *, channel_dim: int = -1
) -> tuple[Tensor, Tensor]:
    """What adds up to `divergence` over batches: the sum of min_j |x_n - c_j|^2, 0-d float64, and N, 0-d int64."""
    used = used_rows(x, indices, channel_dim=channel_dim)
    sq_dist = nearest_code(x.movedim(channel_dim, -1), codebook).sq_dist
    return torch.where(used, sq_dist.double(), 0).sum(), used.sum()


def _nats(counts: Tensor) -> Tensor:
    """Entropy in nats: (..., K) -> (...) float64."""
    counts = counts.double()
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1)


def _wide(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first, second), torch.float32)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b without gradient, float32 or wider: a difference of bytes or of halves rounds nowhere."""
    wide = _wide(a.dtype, b.dtype)
    return a.detach().to(wide) - b.detach().to(wide)


def _check_shapes(op: str, name: str, tensor: Tensor, like: Tensor, fix: str) -> None:
    if tensor.shape != like.shape:
        refuse(ValueError, op, name, f"be of shape {tuple(like.shape)}", tuple(tensor.shape), fix)
