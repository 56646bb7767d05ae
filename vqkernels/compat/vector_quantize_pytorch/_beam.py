"""Beam search through the stages of a `ResidualVQ`: the paths with the least sum of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.compat.vector_quantize_pytorch._stages import Found, Stages


def beam_search(stages: Stages, y: Tensor, beam: int, weights: Tensor) -> Found:
    """Keep the paths through the stages with the least weighted sum of losses.

    Args:
        stages: of this forward.
        y: (B, N, D').
        beam: paths kept per row.
        weights: (Q,), of each stage's loss in the score.
    """
    n = y.shape[1]
    residual = y[:, :, None]  # (B, N, j, D')
    z = torch.zeros_like(residual)
    scores = residual.new_zeros(residual.shape[:3])
    paths = torch.empty(*scores.shape, 0, dtype=torch.int64, device=y.device)
    losses = y.new_empty(paths.shape, dtype=torch.float32)
    seen: list[Tensor] = []
    for stage, layer in enumerate(stages.layers[: stages.last + 1]):
        j = residual.shape[2]
        found = layer(
            residual.flatten(1, 2),
            mask=None if stages.mask is None else stages.mask.repeat_interleave(j, dim=1),
            topk=beam,
            sample_codebook_temp=stages.temperature,
            freeze_codebook=stages.freeze,
        )
        # each path goes on to k codes
        quantized, index = (part.unflatten(1, (n, j)) for part in found[:2])  # (B, N, j, k, D'), (B, N, j, k)
        error = (residual[..., None, :] - quantized).square().mean(-1)
        # a loss without a commitment is one number: nothing to choose a path by
        loss = found[2].unflatten(1, (n, j)) if found[2].dim() else found[2].expand(index.shape)
        cost = loss if found[2].dim() else error
        scores = (scores[..., None] - (cost * weights[stage]).detach()).flatten(2)
        keep, k = (beam if stage < stages.last else 1), index.shape[-1]
        scores, picked = scores.topk(min(keep, j * k), dim=-1)  # (B, N, j')
        parents = picked // k
        seen = [_chosen(rows, parents) for rows in (*seen, residual)]
        residual = _chosen((residual[..., None, :] - stages.passed(quantized)).flatten(2, 3), picked)
        z = _chosen((z[..., None, :] + quantized).flatten(2, 3), picked)
        step = index.flatten(2).gather(2, picked)[..., None]
        paths = torch.cat((_chosen(paths, parents), step), dim=-1)
        cost_of_step = loss.flatten(2).gather(2, picked)[..., None]
        losses = torch.cat((_chosen(losses, parents), cost_of_step), dim=-1)
    losses = losses[:, :, 0]
    if stages.mask is None:
        mean = losses.mean((0, 1)) if losses.numel() else losses.sum((0, 1))
    else:
        counted = torch.where(stages.mask[..., None], losses, 0.0)
        mean = counted.sum((0, 1)) / stages.mask.sum().clamp_min(1)
    residuals = tuple(rows[:, :, 0] for rows in seen)
    return Found(
        z[:, :, 0], stages.padded(paths[:, :, 0], -1), stages.padded(mean, 0), residuals, searched=True
    )


def _chosen(of_paths: Tensor, picked: Tensor) -> Tensor:
    """Some of the paths of each row: (B, N, j, d), (B, N, j') -> (B, N, j', d)."""
    return of_paths.gather(2, picked[..., None].expand(*picked.shape, of_paths.shape[-1]))
