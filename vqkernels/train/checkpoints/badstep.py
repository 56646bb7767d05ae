"""What is kept of a step whose loss is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import vqkernels
from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.checkpoints.snapshot import to_bytes
from vqkernels.train.config import RunError, TrainConfig

FORMAT = "vqkernels bad step 1"


class NotFiniteError(RunError):
    """A loss or a weight is infinite or no number."""


@dataclass(frozen=True)
class BadStep:
    """One step, taken again from the last checkpoint on.

    Attributes:
        step: 0-based.
        loss: 0-d, what it was when the step was taken again, on the first process.
        batch: (B, C, H, W), of all processes together.
        before: "model" and "learner" as of a checkpoint, before the step.
        after: the same after it.
    """

    step: int
    loss: Tensor
    batch: Tensor
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def all_finite(state: Mapping[str, Tensor]) -> Tensor:
    """Whether a model's numbers are all finite, 0-d bool on its device.

    Args:
        state: of the model.
    """
    # counts are finite, and may lie on another device
    numbers = [value for value in state.values() if value.is_floating_point()]
    return torch.stack([value.isfinite().all() for value in numbers]).all()


def save_bad_step(config: TrainConfig, bad: BadStep) -> Path:
    """Write a step as one file that `torch.load(path, weights_only=True)` reads.

    Args:
        config: of the run.
        bad: the step.

    Returns:
        The file: a dict of "format", "version", "config" (JSON) and what `BadStep` holds.

    Raises:
        RunError: if the folder cannot be written or the disk is full.
    """
    path = Path(config.out) / f"nan-step-{bad.step}.pt"
    content = {"format": FORMAT, "version": vqkernels.__version__, "config": config.to_json()}
    content |= {"step": bad.step, "loss": bad.loss.cpu(), "batch": bad.batch.contiguous()}
    content |= {"before": dict(bad.before), "after": dict(bad.after)}
    replace_file(path, to_bytes(content))
    return path


def refuse_bad_step(bad: BadStep, where: str) -> NoReturn:
    """End a run whose loss is not finite.

    Args:
        bad: the step.
        where: what became of it, as half a sentence.

    Raises:
        NotFiniteError: always.
    """
    got = f"{float(bad.loss):g} at step {bad.step}"
    if bad.loss.isfinite() and not all_finite(bad.after["model"]):
        got = f"weights that are not, of a loss of {got}"
    elif bad.loss.isfinite():
        got = f"another before {got}, where it was taken again"
    fix = "Look at it with torch.load(path, weights_only=True), then start again with a lower --lr or --precision no"
    refuse(NotFiniteError, "train", "loss", "stay finite", f"{got}, {where}", fix)
