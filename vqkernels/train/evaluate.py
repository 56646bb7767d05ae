"""What a model is worth on whole held-out images, in every evaluation mode of its quantizer."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.nn import SFDiVeQ, SFDiVeQDetach, VectorQuantizer
from vqkernels.nn.metrics import code_counts, perplexity, usage
from vqkernels.train.data import HeldOut, ImageSet

# images of one size share a forward pass up to this many pixels
BATCH_PIXELS = 1 << 20


@dataclass(frozen=True)
class Evaluation:
    """Measurements on held-out images.

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


def modes_of(model: VQVAE) -> tuple[str, ...]:
    """Name the evaluation modes of a model's quantizer.

    Args:
        model: any VQ-VAE.

    Returns:
        Three names for SF-DiVeQ, else "codeword".
    """
    return ("codeword", "curve", "segment") if _space_filling(model) is not None else ("codeword",)


@torch.no_grad()
def evaluate(
    model: VQVAE, images: ImageSet, *, mode: str = "codeword", ssim: bool = True, limit: int | None = None
) -> Evaluation:
    """Reconstruct whole held-out images and compare.

    Args:
        model: with an initialised quantizer; its training flag and evaluation mode are left as they were.
        images: to measure on.
        mode: one of `modes_of(model)`.
        ssim: whether to measure the structural similarity, which takes longer than the model.
        limit: measure on at most this many images.

    Returns:
        The measurements.

    Raises:
        RuntimeError: if the quantizer still warms up.
    """
    psnrs: list[float] = []
    ssims: list[float] = []
    device = next(model.parameters()).device
    with _evaluating(model, mode):
        quantizer = model.quantizer
        counts = torch.zeros(quantizer.num_indices, dtype=torch.int64, device=device)
        for batch in _batches(images.validation(limit)):
            originals = batch.to(device)
            reconstructions, indices, _ = model(originals)
            reconstructions = reconstructions.float().clamp(-1, 1)
            counts += code_counts(indices[..., 0], len(counts))
            errors = (reconstructions - originals).double().square().mean((1, 2, 3))
            psnrs += [10 * math.log10(4 / error) if error else math.inf for error in errors.tolist()]
            if ssim:
                ssims += [
                    _ssim(a, b) for a, b in zip(_numpy(originals), _numpy(reconstructions), strict=True)
                ]
        return Evaluation(
            mode=mode,
            images=len(psnrs),
            psnr=float(np.mean(psnrs)),
            ssim=float(np.mean(ssims)) if ssim else None,
            bits_per_latent=quantizer.bits_per_latent,
            bits_per_pixel=quantizer.bits_per_latent / model.factor**2,
            perplexity=float(perplexity(counts)),
            usage=float(usage(counts)),
            counted="codes" if len(counts) == quantizer.num_codes else "segments",
        )


@torch.no_grad()
def reconstruct(
    model: VQVAE, images: Iterable[HeldOut], *, mode: str = "codeword"
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
    with _evaluating(model, mode):
        return [to_pixels(model(held_out.image[None].to(device)).reconstruction[0]) for held_out in images]


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Return an image as 8-bit pixels.

    Args:
        image: (C, H, W) in [-1, 1]; values outside are clamped.

    Returns:
        (H, W, C) uint8.
    """
    levels = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


@contextmanager
def _evaluating(model: VQVAE, mode: str) -> Iterator[None]:
    """Put a model into evaluation with one mode of its quantizer, and back afterwards."""
    estimator, training = _space_filling(model), model.training
    before = mode if estimator is None else estimator.evaluation
    model.eval()
    try:
        if estimator is not None:
            estimator.evaluation = mode
        yield
    finally:
        if estimator is not None:
            estimator.evaluation = before
        model.train(training)


def _space_filling(model: VQVAE) -> SFDiVeQ | SFDiVeQDetach | None:
    quantizer = model.quantizer
    estimator = quantizer.estimator if isinstance(quantizer, VectorQuantizer) else None
    return estimator if isinstance(estimator, (SFDiVeQ, SFDiVeQDetach)) else None


def _batches(images: Iterable[HeldOut]) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    for held_out in images:
        image = held_out.image
        full = (len(waiting) + 1) * image[0].numel() > BATCH_PIXELS
        if waiting and (full or waiting[0].shape != image.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


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
