"""A tiny autoencoder on disk for tests of priors."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vqkernels.train.config import TrainConfig
from vqkernels.train.data.images import ImageSet, _to_float
from vqkernels.train.loop import train


class _Sample(NamedTuple):
    name: str
    image: Any
    label: int | None


def walk_with_classes(images, part, crop, *, rank=0, world=1):
    """Yield pictures as `ImageSet.walk` does, of two classes in turn."""
    for number, picture in enumerate(images.training if part == "train" else images.held_out):
        pixels = picture.read()
        height, width = (size // images._factor * images._factor for size in pixels.shape[:2])
        if crop is not None:
            height = width = crop
        yield _Sample(picture.name, _to_float(pixels[:height, :width]).permute(2, 0, 1), number % 2)


def make_autoencoder(folder, seed=0):
    """Train for two steps; returns the checkpoint and leaves pictures in folder/images."""
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(11):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        if not (pictures / f"{number:02d}.png").exists():
            Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC).save(
                pictures / f"{number:02d}.png"
            )
    config = TrainConfig(
        quantizer="ste",
        upkeep="none",
        num_codes=8,
        latent_dim=4,
        width=8,
        residual_blocks=1,
        crop=16,
        batch_size=4,
        steps=2,
        seed=seed,
        data=str(pictures),
        out=str(folder / f"vq{seed}"),
    )
    train(config)
    return next((folder / f"vq{seed}").rglob("*.pt"))


__all__ = ["ImageSet", "make_autoencoder", "walk_with_classes"]
