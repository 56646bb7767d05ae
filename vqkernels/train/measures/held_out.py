"""Passes of a model over held-out images, whole or in crops, with what its quantizer saw and said."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn import Quantized, Quantizer, SFDiVeQ, SFDiVeQDetach, VectorQuantizer
from vqkernels.nn.quantizers.combined import Combined
from vqkernels.train.data.images import HeldOut, ImageSet

# images of one size share a forward pass up to this many pixels
BATCH_PIXELS = 1 << 20

# of the positions of held-out crops, the same for every run
CROP_SEED = 1


class Pass(NamedTuple):
    """One batch through a model.

    Attributes:
        reconstruction: (B, C, H, W), as the model gives it.
        latents: (B, D, h, w) in the layout of the quantizer, before quantization.
        quantized: (B, D, h, w), after it.
        indices: (B, h, w, Q) int64.
    """

    reconstruction: Tensor
    latents: Tensor
    quantized: Tensor
    indices: Tensor


def quantizer_of(model: nn.Module) -> Quantizer:
    """Return the quantizer of an autoencoder.

    Args:
        model: with a `quantizer`.

    Raises:
        TypeError: if it has none.
    """
    quantizer = getattr(model, "quantizer", None)
    if not isinstance(quantizer, Quantizer):
        fix = "Pass an autoencoder such as VQVAE"
        got = f"{type(model).__name__} with {type(quantizer).__name__}"
        refuse(TypeError, "evaluate", "model", "have a Quantizer as model.quantizer", got, fix)
    return quantizer


def modes_of(model: nn.Module) -> tuple[str, ...]:
    """Name the evaluation modes of a model's quantizer.

    Args:
        model: any autoencoder with a `quantizer`.

    Returns:
        Three names for SF-DiVeQ, else "codeword".
    """
    return ("codeword", "curve", "segment") if space_filling(model) is not None else ("codeword",)


def space_filling(model: nn.Module) -> SFDiVeQ | SFDiVeQDetach | None:
    """Return the estimator that has several evaluation modes, or None.

    Args:
        model: any autoencoder with a `quantizer`.
    """
    quantizer = quantizer_of(model)
    estimator = quantizer.estimator if isinstance(quantizer, VectorQuantizer) else None
    return estimator if isinstance(estimator, (SFDiVeQ, SFDiVeQDetach)) else None


def index_sizes(quantizer: Quantizer) -> tuple[int, ...]:
    """Return how many values each of the Q indices of a latent can take in the current mode.

    Args:
        quantizer: of any kind.
    """
    if isinstance(quantizer, Combined):
        return tuple(size for child in quantizer.ordered() for size in index_sizes(child))
    if isinstance(quantizer, VectorQuantizer) and quantizer.codes_per_latent == 2:
        estimator = quantizer.estimator
        if isinstance(estimator, (SFDiVeQ, SFDiVeQDetach)):
            return quantizer.num_indices, 2**estimator.bits
    return (quantizer.num_indices,) * quantizer.codes_per_latent


@contextmanager
def evaluating(model: nn.Module, mode: str) -> Iterator[None]:
    """Put a model into evaluation with one mode of its quantizer, and every module of it back afterwards.

    Args:
        model: any autoencoder with a `quantizer`.
        mode: one of `modes_of(model)`.

    Yields:
        Nothing.
    """
    estimator = space_filling(model)
    before = mode if estimator is None else estimator.evaluation
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if estimator is not None:
            estimator.evaluation = mode
        yield
    finally:
        if estimator is not None:
            estimator.evaluation = before
        for module, was in training:
            module.training = was


def run(model: nn.Module, images: Tensor) -> Pass:
    """Call a model and take note of what goes through its quantizer.

    Args:
        model: any autoencoder that returns the reconstruction first and calls its `quantizer` once.
        images: (B, C, H, W) in [-1, 1], on the device of the model.

    Returns:
        Reconstruction, latents, quantized latents and indices, with their gradients where there are any.
    """
    seen: list[tuple[Tensor, Quantized]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...], quantized: Quantized) -> None:
        seen.append((arguments[0], quantized))

    hook = quantizer_of(model).register_forward_hook(note)
    try:
        reconstruction = model(images)[0]
    finally:
        hook.remove()
    ((latents, quantized),) = seen
    return Pass(reconstruction, latents, quantized.z, quantized.indices)


def whole_batches(images: Iterable[HeldOut]) -> Iterator[Tensor]:
    """Stack images of one size that follow each other.

    Args:
        images: of any sizes.

    Yields:
        (B, C, H, W) float32 in [-1, 1], up to `BATCH_PIXELS` pixels together.
    """
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


def crop_batches(images: ImageSet, count: int, *, side: int, seed: int = CROP_SEED) -> Iterator[Tensor]:
    """Yield crops of the held-out images, uniform over images and positions, the same ones every time.

    Args:
        images: the held-out part is used.
        count: crops in all.
        side: height and width of a crop, in pixels.
        seed: of images and positions.

    Yields:
        (B, C, side, side) float32 in [-1, 1], up to `BATCH_PIXELS` pixels together.
    """
    rng = np.random.default_rng(seed)
    which = rng.integers(len(images.held_out), size=count)
    where = rng.random((count, 2))
    waiting: list[Tensor] = []
    # only the pictures that a crop comes from are decoded
    for number in np.unique(which).tolist():
        (held_out,) = images.only(number).validation()
        height, width = held_out.image.shape[1:]
        for u, v in where[which == number]:
            top, left = int(u * (height - side + 1)), int(v * (width - side + 1))
            waiting.append(held_out.image[:, top : top + side, left : left + side])
            if (len(waiting) + 1) * side**2 > BATCH_PIXELS:
                yield torch.stack(waiting)
                waiting = []
    if waiting:
        yield torch.stack(waiting)
