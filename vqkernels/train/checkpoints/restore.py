"""From a checkpoint back to its model and images."""

import dataclasses
from pathlib import Path

import torch

from vqkernels.checks import refuse
from vqkernels.models import ImageAutoencoder
from vqkernels.train.checkpoints.checkpoint import load_checkpoint
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import ImageSet, load_images
from vqkernels.train.learners.averaging import WeightAverage
from vqkernels.train.model import build_model


def load_run(path: Path, data: str | None = None) -> tuple[ImageAutoencoder, ImageSet, TrainConfig]:
    """Load a trained model and the images to measure it on.

    Args:
        path: of a checkpoint, or the folder of a run, which gives its newest.
        data: `photos` or a folder; None for the data of the run.

    Returns:
        What `load_model` returns, and the images between the two.

    Raises:
        RunError: if the checkpoint or the images cannot be used, or the run still warmed up.
    """
    model, config = load_model(path)
    return model, load_images(config if data is None else dataclasses.replace(config, data=data)), config


def load_model(path: Path) -> tuple[ImageAutoencoder, TrainConfig]:
    """Load a trained model alone, wherever its images are.

    Args:
        path: of a checkpoint, or the folder of a run, which gives its newest.

    Returns:
        The model with its averaged weights where it has some, on a CUDA device where there is one, and the
        configuration of the run.

    Raises:
        RunError: if the checkpoint cannot be used, or the run still warmed up.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    model = build_model(config)
    checkpoint.restore_model(model, path)
    if not model.quantizer.initialized:
        got = f"step {checkpoint.step} of a warm-up of {config.warmup_steps} in {path}"
        refuse(RunError, "evaluate", "checkpoint", "be past its warm-up", got, "Resume the training")
    if config.weights_ema:
        average = WeightAverage(model, config.weights_ema)
        average.load_state_dict(checkpoint.learner["average"])
        average.replace()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), config
