"""What the latents of a model look like among its codes: gradient gap, divergence, use of codes, t-SNE."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vqkernels.checks import check_count
from vqkernels.nn import Quantizer, Residual, VectorQuantizer, metrics
from vqkernels.nn.gradient_gap import loss_gradient_gap, unquantized
from vqkernels.train.data.images import ImageSet
from vqkernels.train.measures.held_out import (
    CROP_SEED,
    Pass,
    crop_batches,
    evaluating,
    index_sizes,
    quantizer_of,
    run,
)

# a gradient is that of one training batch of this many crops
GAP_CROPS = 64
# t-SNE of more points than these is neither quick nor clear
MOST_POINTS = 1500
MOST_CODES = 4096


@dataclass(frozen=True)
class LatentStudy:
    """Latents of held-out crops in mode "codeword".

    Attributes:
        latents: (n, D) float32 on the CPU, a sample, as they are compared with codes.
        codes: (K, D) float32 on the CPU, of the first stage; None where there is no table of codes in that space.
        counts: for each of the Q indices of a latent, (K_q,) int64 uses by all latents.
        gradient_gap: squared change of the gradient of the mean squared error that the quantizer makes, summed over
            the encoder's parameters (Huh eq. 14, A.3); None for a model without an `encoder`.
        divergence: mean squared distance of a latent from its nearest code (Huh eq. 13); None without codes.
        total: how many latents were counted.
    """

    latents: Tensor
    codes: Tensor | None
    counts: tuple[Tensor, ...]
    gradient_gap: float | None
    divergence: float | None
    total: int


@dataclass(frozen=True)
class Embedding:
    """Latents and codes in a plane.

    Attributes:
        latents: (n, 2).
        codes: (k, 2), None without codes.
        use: (k,) how many latents each of these codes has, None without codes.
        num_codes: K, of which these k are shown.
    """

    latents: NDArray[np.float32]
    codes: NDArray[np.float32] | None
    use: NDArray[np.int64] | None
    num_codes: int


def study_latents(
    model: nn.Module, images: ImageSet, *, crops: int = 512, points: int = MOST_POINTS, seed: int = CROP_SEED
) -> LatentStudy:
    """Collect what the latents of held-out crops say about a quantizer.

    Args:
        model: with an initialised `quantizer`; everything about it is left as it was.
        images: the held-out part is used, in crops of the training size.
        crops: how many.
        points: latents to keep, at most.
        seed: of the crops and of the sample.

    Returns:
        The study.
    """
    check_count("study_latents", "crops", crops, minimum=1)
    check_count("study_latents", "points", points, minimum=1)
    device = next(model.parameters()).device
    quantizer = quantizer_of(model)
    compared, codes = _comparison(quantizer)
    passes: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model, "codeword"), torch.no_grad():
        sizes = index_sizes(quantizer)
        counts = torch.zeros(len(sizes), max(sizes), dtype=torch.int64, device=device)
        for batch in crop_batches(images, crops, side=images.crop, seed=seed):
            passed = run(model, batch.to(device))
            rows = compared(_rows(passed, quantizer)).float()
            counts += metrics.code_counts(passed.indices, max(sizes), per_stage=True)
            if codes is not None:
                total += metrics.nearest_sum(rows, codes)[0]
            passes.append(rows.cpu())
        latents = torch.cat(passes)
    kept = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:points]
    return LatentStudy(
        latents=latents[kept],
        codes=None if codes is None else codes.cpu(),
        counts=tuple(stage[:size].cpu() for stage, size in zip(counts, sizes, strict=True)),
        gradient_gap=measure_gradient_gap(model, images, crops=min(crops, GAP_CROPS), seed=seed),
        divergence=None if codes is None else float(total / len(latents)),
        total=len(latents),
    )


def measure_gradient_gap(
    model: nn.Module, images: ImageSet, *, crops: int = GAP_CROPS, seed: int = CROP_SEED
) -> float | None:
    """Compare gradients of the mean squared error with the quantizer and without it, on held-out crops.

    The quantizer works as in training, but takes note of nothing, and noise is drawn from `seed`; the rest of the
    model works as in evaluation. Noise of torch's generators goes on afterwards as if nothing had been drawn.

    Args:
        model: with an `encoder` and an initialised `quantizer`.
        images: the held-out part is used.
        crops: how many, in one batch.
        seed: of crops and noise.

    Returns:
        The squared gap summed over the encoder's parameters; None for a model without an `encoder`, or with one whose
        parameters are all frozen.
    """
    encoder = getattr(model, "encoder", None)
    layers = [p for p in encoder.parameters() if p.requires_grad] if isinstance(encoder, nn.Module) else []
    if not layers:
        return None
    device = layers[0].device
    quantizer = quantizer_of(model)
    batch = torch.cat(list(crop_batches(images, crops, side=images.crop, seed=seed))).to(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model, "codeword"), quantizer.unobserved():
        torch.manual_seed(seed)
        quantizer.train()
        loss = F.mse_loss(run(model, batch).reconstruction, batch)
        with unquantized(quantizer):
            reference = F.mse_loss(run(model, batch).reconstruction, batch)
        return float(loss_gradient_gap(loss, reference, layers))


def embed(study: LatentStudy, *, seed: int = 0) -> Embedding:
    """Lay latents and codes out in a plane together, by t-SNE (van der Maaten and Hinton 2008; DiVeQ figure 4).

    Args:
        study: of a model.
        seed: of the layout.

    Returns:
        The positions; of more than `MOST_CODES` codes, evenly spaced ones.
    """
    points, codes, use, num_codes = study.latents.numpy(), None, None, 0
    if study.codes is not None:
        num_codes = len(study.codes)
        shown = np.unique(np.linspace(0, num_codes - 1, min(num_codes, MOST_CODES)).round().astype(np.int64))
        codes, use = study.codes.numpy()[shown], study.counts[0].numpy()[shown]
    together = points if codes is None else np.concatenate((points, codes))
    layout = _layout(together, seed)
    split = len(points)
    return Embedding(layout[:split], None if codes is None else layout[split:], use, num_codes)


def _layout(together: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    # a second or more to import, and needed for this picture alone
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # of points that all lie in one place there is nothing to lay out, and t-SNE would divide by their spread
    if (together == together[0]).all():
        return np.zeros((len(together), 2), dtype=np.float32)
    if together.shape[1] == 1:
        # its start takes two components
        together = np.pad(together, ((0, 0), (0, 1)))
    near = max(1.0, min(30.0, (len(together) - 1) / 3))
    # its threads wait in busy loops where others want the cores, and would sum in another order on another machine
    with threadpool_limits(1):
        method = TSNE(perplexity=near, init="pca", learning_rate="auto", random_state=seed)
        return method.fit_transform(together)


def _rows(passed: Pass, quantizer: Quantizer) -> Tensor:
    """Latents (N, D)."""
    return passed.latents.movedim(quantizer.channel_dim, -1).flatten(0, -2)


def _comparison(quantizer: Quantizer) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """How latents (N, D) are made to be compared with codes, and the codes (K, D'), where there is such a table."""
    first = quantizer.ordered()[0] if isinstance(quantizer, Residual) else quantizer
    if isinstance(first, VectorQuantizer):
        with torch.no_grad():
            return first.inside, first.codes().detach().float()
    return (lambda rows: rows), None
