"""What a model is worth on held-out images, in every evaluation mode of its quantizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from vqkernels.checks import check_count, refuse
from vqkernels.nn import metrics
from vqkernels.train.config import RunError
from vqkernels.train.data.images import HeldOut, ImageSet
from vqkernels.train.measures.fidelity import FeatureMoments, FeatureNet, frechet_distance
from vqkernels.train.measures.held_out import (
    Pass,
    crop_batches,
    evaluating,
    index_sizes,
    quantizer_of,
    run,
    whole_batches,
)
from vqkernels.train.measures.held_out import modes_of as modes_of

# beyond it a run does not measure more whole images by itself: of a stream there may be a hundred thousand
MOST_IMAGES = 1000


@dataclass(frozen=True)
class Evaluation:
    """Measurements on held-out images; whole ones unless said otherwise.

    Attributes:
        mode: evaluation mode of the quantizer, "codeword" where there is only one.
        images: how many were measured.
        psnr: mean over images of the peak signal-to-noise ratio, in dB; reconstructions clamped to the range.
        ssim: mean over images of the structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5);
            None when it was not asked for.
        bits_per_latent: rate of the indices, inf where they do not determine the reconstruction.
        bits_per_pixel: the same rate for each pixel.
        perplexity: exp of the entropy of the first index, in nats.
        usage: share of the values of the first index that occur.
        counted: what the first index counts: "codes" (K of them) or "segments" (K - 1).
        dead_codes: values of the first index that do not occur.
        distortion: mean of |x - z|^2 over latents x and their quantized z, summed over features.
        distortion_per_bit: that for each bit of entropy of all indices of a latent (DiVeQ eq. 17), inf at no
            entropy; None where the indices do not determine the reconstruction.
        crops: crops of the training size that were measured too.
        crop_psnr: 10 log10(4 / m) in dB, m the mean squared error over all pixels of all crops; None without crops.
        lpips: mean over images of the perceptual distance; None without its network.
        rfid: Frechet distance of reconstructions from originals; None without its network.
        rfid_on: what it was taken over: "images", or "crops" where there were too few images.
    """

    mode: str
    images: int
    psnr: float
    ssim: float | None
    bits_per_latent: float
    bits_per_pixel: float
    perplexity: float
    usage: float
    counted: str
    dead_codes: int
    distortion: float
    distortion_per_bit: float | None
    crops: int = 0
    crop_psnr: float | None = None
    lpips: float | None = None
    rfid: float | None = None
    rfid_on: Literal["images", "crops"] | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    mode: str = "codeword",
    ssim: bool = True,
    limit: int | None = None,
    crops: int = 0,
    lpips: nn.Module | None = None,
    features: FeatureNet | None = None,
) -> Evaluation:
    """Reconstruct whole held-out images, and crops of them, and compare.

    Args:
        model: with an initialised `quantizer`, returning the reconstruction first; its training flags and evaluation
            mode are left as they were.
        images: to measure on.
        mode: one of `modes_of(model)`.
        ssim: whether to measure the structural similarity, which takes longer than the model.
        limit: measure on at most this many whole images, evenly spaced among all.
        crops: also measure on this many crops of the training size, the same ones for every model.
        lpips: maps two batches in [-1, 1] to (B,) distances; such as `LPIPS.from_files`.
        features: network of the Frechet distance.

    Returns:
        The measurements.

    Raises:
        RuntimeError: if the quantizer still warms up.
        RunError: if neither images nor crops are more than the features of a Frechet distance.
    """
    check_count("evaluate", "crops", crops)
    device = next(model.parameters()).device
    with evaluating(model, mode):
        whole, cropped = _Sums(model, features), _Sums(model, None)
        for batch in whole_batches((images if limit is None else images.spread(limit)).validation()):
            whole.add(batch.to(device), ssim=ssim, lpips=lpips)
        if features is not None and not whole.enough:
            cropped.features = features
        for batch in crop_batches(images, crops, side=images.crop):
            cropped.add(batch.to(device))
        codes = quantizer_of(model)
        counts = [stage[:size] for stage, size in zip(whole.counts, whole.sizes, strict=True)]
        is_code = math.isfinite(codes.bits_per_latent)
        distortion = whole.distortion / whole.latents
        rfid, rfid_on = _rfid(whole, cropped) if features is not None else (None, None)
        return Evaluation(
            mode=mode,
            images=len(whole.errors),
            psnr=float(np.mean([_psnr(error) for error in whole.errors])),
            ssim=float(np.mean(whole.ssims)) if ssim else None,
            bits_per_latent=codes.bits_per_latent,
            bits_per_pixel=metrics.bits_per_pixel(
                codes.bits_per_latent, latents=whole.positions, pixels=whole.pixels
            ),
            perplexity=float(metrics.perplexity(counts[0])),
            usage=float(metrics.usage(counts[0])),
            counted="codes" if whole.sizes[0] == codes.num_codes else "segments",
            dead_codes=int(metrics.dead_codes(counts[0])),
            distortion=float(distortion),
            distortion_per_bit=(
                float(metrics.distortion_per_bit(distortion, whole.counts)) if is_code else None
            ),
            crops=crops,
            crop_psnr=_psnr(float(np.mean(cropped.errors))) if crops else None,
            lpips=float(np.mean(whole.lpips)) if lpips is not None else None,
            rfid=rfid,
            rfid_on=rfid_on,
        )


@torch.no_grad()
def reconstruct(
    model: nn.Module, images: Iterable[HeldOut], *, mode: str = "codeword"
) -> list[NDArray[np.uint8]]:
    """Return reconstructions to look at.

    Args:
        model: with an initialised quantizer.
        images: to reconstruct.
        mode: one of `modes_of(model)`.

    Returns:
        One (H, W, 3) uint8 array per image.
    """
    device = next(model.parameters()).device
    with evaluating(model, mode):
        return [
            to_pixels(run(model, held_out.image[None].to(device)).reconstruction[0]) for held_out in images
        ]


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Return an image as 8-bit pixels.

    Args:
        image: (C, H, W) in [-1, 1]; values outside are clamped.

    Returns:
        (H, W, C) uint8.
    """
    levels = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class _Sums:
    """What adds up over the batches of one pass over the images."""

    def __init__(self, model: nn.Module, features: FeatureNet | None) -> None:
        self.model, self.features = model, features
        quantizer = quantizer_of(model)
        device = next(model.parameters()).device
        self.channel_dim, self.sizes = quantizer.channel_dim, index_sizes(quantizer)
        self.counts = torch.zeros(
            len(self.sizes), max(self.sizes), dtype=torch.int64, device=device
        )  # (Q, K)
        self.distortion = torch.zeros((), dtype=torch.float64, device=device)
        self.latents = torch.zeros((), dtype=torch.int64, device=device)
        self.positions = self.pixels = 0
        # mean squared error of each image
        self.errors: list[float] = []
        self.ssims: list[float] = []
        self.lpips: list[float] = []
        self.moments = FeatureMoments(), FeatureMoments()

    @property
    def enough(self) -> bool:
        """Whether there are images enough for a Frechet distance."""
        return self.moments[0].enough

    def add(self, originals: Tensor, *, ssim: bool = False, lpips: nn.Module | None = None) -> None:
        """Reconstruct one batch and count it."""
        passed = run(self.model, originals)
        reconstructions = passed.reconstruction.float().clamp(-1, 1)
        self._add_latents(passed)
        self.pixels += len(originals) * originals.shape[-2] * originals.shape[-1]
        self.errors += (reconstructions - originals).double().square().mean((1, 2, 3)).tolist()
        if ssim:
            pairs = zip(_numpy(originals), _numpy(reconstructions), strict=True)
            self.ssims += [_ssim(a, b) for a, b in pairs]
        if lpips is not None:
            self.lpips += lpips(originals, reconstructions).double().flatten().tolist()
        if self.features is not None:
            for moments, images in zip(self.moments, (originals, reconstructions), strict=True):
                moments.update(self.features(images))

    def _add_latents(self, passed: Pass) -> None:
        indices = passed.indices
        self.counts += metrics.code_counts(indices, self.counts.shape[1], per_stage=True)
        self.positions += indices[..., 0].numel()
        total, rows = metrics.sq_error_sum(
            passed.latents, passed.quantized, indices, channel_dim=self.channel_dim
        )
        self.distortion += total
        self.latents += rows


def _rfid(whole: _Sums, cropped: _Sums) -> tuple[float, Literal["images", "crops"]]:
    if whole.enough:
        return frechet_distance(*whole.moments), "images"
    if not cropped.enough:
        least = whole.moments[0].mean.numel() + 1
        requirement = f"be at least {least}, one more than the features of the network"
        got = f"{len(cropped.errors)}, and {len(whole.errors)} whole images"
        refuse(RunError, "evaluate", "crops", requirement, got, f"Pass --crops {least} or more")
    return frechet_distance(*cropped.moments), "crops"


def _psnr(error: float) -> float:
    return 10 * math.log10(4 / error) if error else math.inf


def _numpy(images: Tensor) -> NDArray[np.float32]:
    return images.cpu().numpy()


def _ssim(original: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> float:
    # stubs of the function list every optional result
    mean: Any = structural_similarity(
        original,
        reconstruction,
        channel_axis=0,
        data_range=2.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(mean)
