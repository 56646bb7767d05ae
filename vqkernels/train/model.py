"""From a configuration to its model."""

from collections.abc import Callable

import torch

from vqkernels.checks import refuse
from vqkernels.models import VQGAN, VQVAE, ImageAutoencoder, TakidaVAE
from vqkernels.nn import (
    STE,
    Every,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    LeastRecentlyUsed,
    Quantizer,
    RepeatedKMeans,
    TwoPhase,
    Upkeep,
    build,
)
from vqkernels.train.config import RunError, TrainConfig


def build_model(config: TrainConfig) -> ImageAutoencoder:
    """Build the model of a run, channels last in memory, with fresh weights from torch's default generator.

    Args:
        config: of the run.

    Returns:
        The autoencoder, on the CPU.

    Raises:
        RunError: the parts do not fit together.
    """
    try:
        model = BACKBONES[config.backbone](config, build_quantizer(config))
    except (TypeError, ValueError) as error:
        raise RunError(str(error)) from error
    # convolutions and quantizer both read latents row by row in this layout
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def build_quantizer(config: TrainConfig) -> Quantizer:
    """Build the quantizer of a run, for NCHW latents.

    Args:
        config: of the run.

    Raises:
        TypeError, ValueError: the method has no use for an option.
    """
    quantizer = build(
        config.quantizer,
        dim=config.latent_dim,
        num_codes=config.num_codes,
        channel_dim=1,
        noise_std=config.noise_std if config.method.noisy else None,
        upkeep=_upkeep(config),
        steps=config.steps,
    )
    for field in ("codebook_weight", "commitment_weight"):
        weight = getattr(config, field)
        parts = [part for part in quantizer.modules() if isinstance(part, STE)]
        if weight is not None and not parts:
            requirement = f"be left out for {config.quantizer}, which has no such loss"
            refuse(ValueError, "train", field, requirement, weight, f"Leave --{field.replace('_', '-')} out")
        for part in parts if weight is not None else []:
            setattr(part, field, weight)
    return quantizer


def _upkeep(config: TrainConfig) -> list[Upkeep]:
    upkeep: list[Upkeep] = []
    if config.warms_up:
        upkeep.append(LatentMeans(config.warmup_steps))
    if config.start == "kmeans":
        upkeep.append(KMeansInit())
    if config.replaces:
        upkeep.append(ImportanceReplacement(TwoPhase.scaled(config.steps)))
    if config.upkeep == "lru":
        upkeep.append(LeastRecentlyUsed())
    if config.upkeep == "repeated":
        upkeep.append(RepeatedKMeans(Every(config.refit_every)))
    return upkeep


def _convolutional(
    kind: type[VQVAE] | type[TakidaVAE],
) -> Callable[[TrainConfig, Quantizer], ImageAutoencoder]:
    return lambda config, quantizer: kind(
        quantizer,
        width=config.width,
        latent_dim=config.latent_dim,
        downsamplings=config.downsamplings,
        residual_blocks=config.residual_blocks,
    )


def _vqgan(config: TrainConfig, quantizer: Quantizer) -> VQGAN:
    return VQGAN(
        quantizer,
        width=config.width,
        multipliers=config.multipliers or (1,) * (config.downsamplings + 1),
        residual_blocks=config.residual_blocks,
        latent_dim=config.latent_dim,
        attention=(-1,) if config.attention else (),
    )


BACKBONES: dict[str, Callable[[TrainConfig, Quantizer], ImageAutoencoder]] = {
    "diveq": _convolutional(VQVAE),
    "takida": _convolutional(TakidaVAE),
    "vqgan": _vqgan,
}
