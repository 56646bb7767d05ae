"""Learners: what a run does with a batch. The loop around them knows no loss and no optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn import Codebook
from vqkernels.train.alternated import Alternated
from vqkernels.train.bilevel import MetaQuantization, MetaStep
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.objective import Objective
from vqkernels.train.procedure import Autoencoder, split_parameters


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
    """Base of the learners: holds the optimizers and steps on a batch.

    Args:
        config: of the run.
        accelerator: of the process.
        model: on the CPU, fresh.
        objective: of the reconstruction.

    Attributes:
        model: the module itself, on the device.
        optimizers: of all its parameters and of what else learns.
    """

    model: Autoencoder
    optimizers: Sequence[torch.optim.Optimizer]

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Autoencoder, objective: Objective
    ):
        self.config, self.accelerator = config, accelerator
        self.objective = objective.to(accelerator.device)
        self.model = model

    def step(self, batch: Tensor, number: int) -> StepResult:
        """Train on one batch.

        Args:
            batch: (B, C, H, W) images in [-1, 1], this rank's part.
            number: 0-based step of the run.
        """
        raise NotImplementedError

    def begin(self, number: int) -> None:
        """Set the learning rates of a step.

        Args:
            number: 0-based step of the run.
        """
        lr = self.config.lr_at(number)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]

    def finish(self) -> None:
        """Take away what training has wrapped around the model."""

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model that a checkpoint must hold."""
        scaler = self.accelerator.scaler
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": {} if scaler is None else scaler.state_dict(),
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


class JointLearner(Learner):
    """One gradient for all parameters, under whatever Accelerate wraps around the model."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Autoencoder, objective: Objective
    ):
        super().__init__(config, accelerator, model, objective)
        optimizer = make_optimizer(config, [code_group(config, model), *rest_groups(config, model)])
        model.quantizer.follow(optimizer)
        self._prepared, self._optimizer = accelerator.prepare(model, optimizer)
        self.optimizers = [self._optimizer]

    def step(self, batch: Tensor, number: int) -> StepResult:
        parts = batch.chunk(self.config.accumulate)
        self._optimizer.zero_grad()
        losses, errors, indices = [], [], []
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self._prepared):
                outputs, codes, loss = self._prepared(part)
                loss = self.objective(outputs, part) + loss
                self.accelerator.backward(loss / len(parts))
            losses.append(loss.detach())
            errors.append(self.objective.found)
            indices.append(codes)
        self._optimizer.step()
        found = {name: torch.stack([one[name] for one in errors]).mean() for name in errors[0]}
        return StepResult(torch.stack(losses).mean(), found.pop("mse"), torch.cat(indices), found)

    def finish(self) -> None:
        # what measures the model from here on sees it as a checkpoint gives it back, in float32
        self.accelerator.unwrap_model(self._prepared, keep_fp32_wrapper=False)


class ProcedureLearner(Learner):
    """Alternated optimization or Meta-Quantization; gradients are averaged over the ranks by the procedure."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: Autoencoder, objective: Objective
    ):
        super().__init__(config, accelerator, model.to(accelerator.device), objective)
        if not split_parameters(model)[0]:
            requirement = f"be joint for {config.quantizer}, which has no codes that learn by gradient"
            refuse(RunError, "train", "procedure", requirement, config.procedure, "Leave --procedure out")
        self.optimizers = [
            make_optimizer(config, [code_group(config, model)]),
            make_optimizer(config, rest_groups(config, model)),
        ]
        parts = dict(zip(("codebook_optimizer", "model_optimizer"), self.optimizers, strict=True))
        try:
            if config.procedure == "alternated":
                self._procedure = Alternated(
                    model, self.objective, inner=config.inner, split=config.split, **parts
                )
            else:
                form = config.hypergradient
                self._procedure = MetaQuantization(
                    model, self.objective, xi=config.xi, hypergradient=form, **parts
                )
        except ValueError as error:
            raise RunError(str(error)) from error

    def step(self, batch: Tensor, number: int) -> StepResult:
        with self.accelerator.autocast():
            found = self._procedure.step(batch)
        extras = dict(self.objective.found)
        if isinstance(found, MetaStep):
            extras |= {"direct_norm": found.direct_norm, "indirect_norm": found.indirect_norm}
            extras |= {"cosine": found.cosine}
        return StepResult(found.loss, extras.pop("mse"), found.indices, extras)


def code_group(config: TrainConfig, model: Autoencoder) -> dict[str, Any]:
    """The parameters that codes are made of as a group of an optimizer; never decayed (Huh A.1, MQ 5)."""
    parts = [part for part in model.quantizer.modules() if isinstance(part, Codebook)]
    codes = list(dict.fromkeys(p for part in parts for p in part.parameters() if p.requires_grad))
    return {"params": codes, "rate": config.codes_rate, "weight_decay": 0.0}


def rest_groups(config: TrainConfig, model: Autoencoder) -> list[dict[str, Any]]:
    """All other parameters as a group of an optimizer."""
    codes = set(code_group(config, model)["params"])
    rest = [p for p in model.parameters() if p.requires_grad and p not in codes]
    return [{"params": rest, "rate": 1.0, "weight_decay": config.weight_decay}]


def make_optimizer(config: TrainConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer of a run over groups of parameters, each with a "rate" in units of the run's lr.

    Args:
        config: of the run.
        groups: of `torch.optim`; those without parameters are left out.
    """
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    there = [group for group in groups if group["params"]]
    return kind(there, lr=config.lr, betas=config.betas)


def make_learner(
    config: TrainConfig, accelerator: Accelerator, model: nn.Module, objective: Objective
) -> Learner:
    """Return the learner that a configuration asks for."""
    kind = JointLearner if config.procedure == "joint" else ProcedureLearner
    return kind(config, accelerator, model, objective)
