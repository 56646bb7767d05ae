"""From a configuration to its model."""

import torch

from vqkernels.models import VQVAE
from vqkernels.nn import ImportanceReplacement, LatentMeans, TwoPhase, Upkeep, build
from vqkernels.train.config import TrainConfig


def build_model(config: TrainConfig) -> VQVAE:
    """Build the model of a run, channels last in memory, with fresh weights from torch's default generator.

    Args:
        config: of the run.

    Returns:
        The VQ-VAE, on the CPU.
    """
    upkeep: list[Upkeep] = []
    if config.warms_up:
        upkeep.append(LatentMeans(config.warmup_steps))
    if config.replaces:
        upkeep.append(ImportanceReplacement(TwoPhase.scaled(config.steps)))
    quantizer = build(
        config.quantizer,
        dim=config.latent_dim,
        num_codes=config.num_codes,
        channel_dim=1,
        noise_std=config.noise_std if config.method.noisy else None,
        upkeep=upkeep,
    )
    model = VQVAE(
        quantizer,
        width=config.width,
        latent_dim=config.latent_dim,
        downsamplings=config.downsamplings,
        residual_blocks=config.residual_blocks,
    )
    # convolutions and quantizer both read latents row by row in this layout
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
