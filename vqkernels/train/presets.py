"""Recipes of the papers by name, each in the paper's size and in one for two CPU cores."""

from dataclasses import dataclass
from typing import Any, Literal

from vqkernels.train.config import TrainConfig

PresetName = Literal["small", "vqvae", "huh", "mq", "vqgan", "mqgan"]


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        summary: what it trains.
        source: the paper's section.
        fields: of `TrainConfig`, in both sizes.
        full: fields of the paper's size, which wants a GPU and a data set (`--data`).
        scaled: fields of the size for two cores and the photographs, minutes of training.
    """

    summary: str
    source: str
    fields: dict[str, Any]
    full: dict[str, Any]
    scaled: dict[str, Any]

    def config(self, *, full: bool = False, **fields: Any) -> TrainConfig:
        """Return its configuration.

        Args:
            full: the paper's size instead of the one for two cores.
            fields: of `TrainConfig`, over those of the recipe.
        """
        return TrainConfig(**{**self.fields, **(self.full if full else self.scaled), **fields})


# a VQGAN of Esser et al. for images of 256x256, and one that two cores train on photographs
_GAN_FULL = {
    "width": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "downsamplings": 4,
    "crop": 256,
    "steps": 200_000,
    "checkpoint_every": 1000,
    "evaluate_every": 1000,
}
_GAN_SCALED = {
    "width": 16,
    "multipliers": (1, 2, 2),
    "residual_blocks": 1,
    "discriminator_width": 16,
    "discriminator_layers": 2,
    "batch_size": 16,
    "lr": 5e-4,
    "steps": 2000,
    # beside L1 alone, without LPIPS, the papers' 0.8 outweighs it and the reconstruction is lost
    "adversarial": 0.1,
}

# of Huh table 8 and MQ 5.1, for images of 128x128
_FACES_FULL = {
    "num_codes": 1024,
    "width": 64,
    "latent_dim": 64,
    "downsamplings": 3,
    "crop": 128,
    "lr": 1e-4,
    "steps": 200_000,
    "checkpoint_every": 1000,
    "evaluate_every": 1000,
}

# MQ 4.1 and 5: an MLP from 32 to 256 to the features of a latent makes the codes
_META = {
    "quantizer": "mq",
    "procedure": "meta",
    "schedule": "cosine",
    "rise": 0.1,
}

PRESETS: dict[str, Preset] = {
    "small": Preset(
        "a small VQ-VAE with SF-DiVeQ, the defaults of every option",
        "DiVeQ A.1 at a sixteenth of its width",
        {},
        full={},
        scaled={},
    ),
    "vqvae": Preset(
        "the VQ-VAE of image compression",
        "DiVeQ A.1 and table 3",
        {"quantizer": "sf_diveq", "lr": 5.5e-4, "halve_at": (0.4, 0.7), "batch_size": 32},
        full={
            "num_codes": 2048,
            "latent_dim": 512,
            "width": 256,
            "downsamplings": 4,
            "residual_blocks": 6,
            "crop": 256,
            "steps": 50_000,
            "checkpoint_every": 1000,
            "evaluate_every": 1000,
        },
        scaled={"downsamplings": 3, "crop": 64, "steps": 2000, "width": 64, "latent_dim": 64},
    ),
    "huh": Preset(
        "affine codes and alternated steps on a residual network",
        "Huh et al. 2023, A.1, tables 8 and 10",
        {
            "backbone": "takida",
            "quantizer": "affine",
            "start": "kmeans",
            "upkeep": "lru",
            "procedure": "alternated",
            "inner": 2,
            # alpha 5 and beta 0.9
            "codebook_weight": 4.5,
            "commitment_weight": 0.5,
            "optimizer": "adamw",
            "betas": (0.9, 0.95),
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "rise": 0.1,
            "augment": False,
        },
        full=_FACES_FULL,
        scaled={"num_codes": 256, "lr": 1e-3, "steps": 1500},
    ),
    "mq": Preset(
        "Meta-Quantization: a hyper-net whose codes descend the loss after the model's next step",
        "MQ 4 and 5.1",
        {**_META, "betas": (0.9, 0.95), "augment": False},
        full={**_FACES_FULL, "backbone": "takida"},
        scaled={"num_codes": 256, "lr": 1e-3, "codes_rate": 10.0, "steps": 1200},
    ),
    "vqgan": Preset(
        "VQGAN: attention, a PatchGAN discriminator from half of the training on, LPIPS if given",
        "Esser et al. 2021; DiVeQ A.2",
        {
            "backbone": "vqgan",
            "quantizer": "sf_diveq",
            "noise_std": 0.1,
            "adversarial": 0.8,
            "discriminator_start": 0.5,
            "halve_at": (0.5, 0.75),
            "reconstruction": "l1",
            "attention": True,
            "weights_ema": 0.999,
            "betas": (0.5, 0.9),
        },
        full={**_GAN_FULL, "num_codes": 1024, "latent_dim": 256, "batch_size": 8, "lr": 2.5e-5},
        scaled={**_GAN_SCALED, "weights_ema": 0.99},
    ),
    "mqgan": Preset(
        "VQGAN with codes from MQ's hyper-net",
        "MQ 5.2",
        {
            "backbone": "vqgan",
            "quantizer": "mq",
            "adversarial": 0.8,
            "discriminator_start": 0.5,
            "attention": True,
            "schedule": "cosine",
            "rise": 0.1,
            "betas": (0.5, 0.9),
        },
        full={**_GAN_FULL, "num_codes": 16384, "latent_dim": 32, "batch_size": 32, "lr": 1e-4},
        scaled={**_GAN_SCALED, "codes_rate": 10.0},
    ),
}
