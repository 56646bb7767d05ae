"""Learners: what a run does with a batch. The loop around them knows no loss and no optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vqkernels.models import ImageAutoencoder
from vqkernels.train.config import TrainConfig
from vqkernels.train.learners.averaging import WeightAverage
from vqkernels.train.learners.losses import ImageLoss, load_lpips
from vqkernels.train.learners.procedure import split_parameters


class StepResult(NamedTuple):
    """What a step found, without gradients.

    Attributes:
        loss: 0-d, what the model minimised, on this rank.
        mse: 0-d, mean squared error of images in [-1, 1], on this rank.
        indices: int64 (..., Q), the codes of the step on this rank.
        extras: 0-d tensors for the log by name.
    """

    loss: Tensor
    mse: Tensor
    indices: Tensor
    extras: Mapping[str, Tensor]


class Learner:
    """Base of the learners: holds what learns beside the model, and steps on a batch.

    Attributes:
        model: the module itself, on the device.
        optimizers: of all its parameters, and of what else learns.
        image_loss: distance of reconstructions.
        average: of the weights, None without one.
    """

    optimizers: Sequence[torch.optim.Optimizer]

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: ImageAutoencoder):
        """Move the model to the device.

        Args:
            config: of the run.
            accelerator: of the process; one that accumulates no gradients by itself.
            model: to train, fresh.

        Raises:
            RunError: the weights of LPIPS cannot be read.
        """
        self.config, self.accelerator = config, accelerator
        self.model = model.to(accelerator.device)
        weight = config.perceptual_weight
        perceptual = load_lpips(config.perceptual) if config.perceptual and weight else None
        judge = ImageLoss(config.reconstruction, perceptual=perceptual, perceptual_weight=weight)
        self.image_loss = judge.to(accelerator.device)
        self.average = WeightAverage(model, config.weights_ema) if config.weights_ema else None

    def learn(self, batch: Tensor, number: int) -> StepResult:
        """Take one step of the run with the learning rates it has then.

        Args:
            batch: (B, C, H, W) images in [-1, 1], this rank's part.
            number: 0-based step of the run.
        """
        lr = self.config.lr_at(number)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
        found = self.step(batch, number)
        if self.average is not None:
            self.average.update()
        return found

    def step(self, batch: Tensor, number: int) -> StepResult:
        """Train on one batch.

        Args:
            batch, number: as of `learn`.
        """
        raise NotImplementedError

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights where there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def finish(self) -> None:
        """Take away what training has wrapped around the model, and leave it the averaged weights."""
        if self.average is not None:
            self.average.replace()

    def modules(self) -> dict[str, torch.nn.Module]:
        """What learns beside the model, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model that a checkpoint must hold."""
        scaler = self.accelerator.scaler
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": {} if scaler is None else scaler.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of a learner of the same run.
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])


def code_group(config: TrainConfig, model: ImageAutoencoder) -> dict[str, Any]:
    """The parameters that codes are made of as a group of an optimizer; never decayed (Huh A.1, MQ 5)."""
    codes, _ = split_parameters(model)
    return {"params": codes, "rate": config.codes_rate, "weight_decay": 0.0}


def rest_group(config: TrainConfig, model: ImageAutoencoder) -> dict[str, Any]:
    """All other parameters as a group of an optimizer."""
    _, rest = split_parameters(model)
    return {"params": rest, "rate": 1.0, "weight_decay": config.weight_decay}


def make_optimizer(config: TrainConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer of a run over groups of parameters, each with a "rate" in units of the run's lr.

    Args:
        config: of the run.
        groups: of `torch.optim`; those without parameters are left out, those without a decay take the run's.
    """
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    there = [group for group in groups if group["params"]]
    # AdamW has a decay of its own where it is told none
    return kind(there, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def mean_of(parts: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Means of 0-d tensors over the parts of a batch.

    Args:
        parts: the same names in each.
        shares: of the batch, one for each part.
    """
    return {n: torch.stack([p[n] * s for p, s in zip(parts, shares, strict=True)]).sum() for n in parts[0]}
