"""The learners without a discriminator, and the one that a configuration asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.models import ImageAutoencoder
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.base import Learner, StepResult, code_group, make_optimizer, mean_of, rest_group
from vqkernels.train.learners.bilevel import MetaQuantization, MetaStep
from vqkernels.train.learners.losses import Judged
from vqkernels.train.learners.procedure import split_parameters
from vqkernels.train.model import build_model
from vqkernels.train.processes import average_gradients, leave_out
from vqkernels.train.sharding import shard_model, shard_optimizer, unreduced


class JointLearner(Learner):
    """One gradient for all parameters, under whatever Accelerate wraps around the model.

    A batch is cut into `accumulate` parts whose gradients add up.

    Args:
        config, accelerator, model: as of `Learner`.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: ImageAutoencoder):
        super().__init__(config, accelerator, model)
        self._sharded = config.shard and accelerator.num_processes > 1
        if self._sharded:
            shard_model(model)
        optimizer = make_optimizer(config, [rest_group(config, model), code_group(config, model)])
        model.quantizer.follow(optimizer)
        if self._sharded:
            shard_optimizer(optimizer)
            self.prepared, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            leave_out(model, "quantizer")
            self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        self.optimizers = [self.optimizer]

    def step(self, batch: Tensor, number: int) -> StepResult:
        parts = batch.chunk(self.config.accumulate)
        shares = [len(part) / len(batch) for part in parts]
        self.optimizer.zero_grad()
        found, indices = [], []
        for part, share in zip(parts, shares, strict=True):
            with self.averaging_gradients(self.prepared, part is parts[-1]):
                values, codes = self.descend(part, share)
            found.append(values)
            indices.append(codes)
        average_gradients(self.model.quantizer)
        self.optimizer.step()
        means = mean_of(found, shares)
        return StepResult(means.pop("loss"), means.pop("mse"), torch.cat(indices), means)

    def descend(self, images: Tensor, share: float) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of a part of the batch.

        Args:
            images: (b, C, H, W), the part.
            share: of the batch.

        Returns:
            Its loss, mse and extras by name, and its codes.
        """
        with self.accelerator.autocast() if self._sharded else nullcontext():
            outputs = self.prepared(images)
        # as accelerate does to what it has wrapped itself
        reconstruction, indices, quantizer_loss = convert_to_fp32(outputs)
        with self.accelerator.autocast():
            judged = self.image_loss(reconstruction, images)
        loss = judged.total + quantizer_loss
        self.accelerator.backward(loss * share)
        return {"loss": loss.detach(), **parts_of(judged)}, indices

    def averaging_gradients(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Processes average gradients with the last part of a batch alone."""
        if last:
            return nullcontext()
        return unreduced(model) if self._sharded else self.accelerator.no_sync(model)

    def finish(self) -> None:
        if self._sharded:
            whole = build_model(self.config).to(self.accelerator.device)
            whole.load_state_dict(self.model.state_dict())
            self.model = whole
            return
        # what measures the model from here on sees it as a checkpoint gives it back, in float32
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        super().finish()


class ProcedureLearner(Learner):
    """Alternated optimization or Meta-Quantization, which average gradients over the ranks themselves.

    Args:
        config, accelerator, model: as of `Learner`.

    Raises:
        RunError: the quantizer has no codes that learn by gradient, or the closed form does not hold.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: ImageAutoencoder):
        super().__init__(config, accelerator, model)
        if not split_parameters(model)[0]:
            requirement = f"be joint for {config.quantizer}, which has no codes that learn by gradient"
            refuse(RunError, "train", "procedure", requirement, config.procedure, "Leave --procedure out")
        share = config.batch_size // accelerator.num_processes
        if config.split and config.inner > share:
            requirement = f"be at most {share}, the images of a step in a process, with split"
            refuse(RunError, "train", "inner", requirement, config.inner, "Pass a larger --batch-size")
        codes = make_optimizer(config, [code_group(config, model)])
        rest = make_optimizer(config, [rest_group(config, model)])
        self.optimizers = [codes, rest]
        self._extras: dict[str, Tensor] = {}
        try:
            if config.procedure == "alternated":
                self.procedure = Alternated(
                    model,
                    self._task,
                    codebook_optimizer=codes,
                    model_optimizer=rest,
                    inner=config.inner,
                    split=config.split,
                )
            else:
                self.procedure = MetaQuantization(
                    model,
                    self._task,
                    codebook_optimizer=codes,
                    model_optimizer=rest,
                    xi=config.xi,
                    hypergradient=config.hypergradient,
                )
        except ValueError as error:
            raise RunError(str(error)) from error

    def step(self, batch: Tensor, number: int) -> StepResult:
        with self.accelerator.autocast():
            found = self.procedure.step(batch)
        # of the step's last forward, which trains the model
        extras = dict(self._extras)
        if isinstance(found, MetaStep):
            extras |= {"direct_norm": found.direct_norm, "indirect_norm": found.indirect_norm}
            extras |= {"cosine": found.cosine}
        return StepResult(found.loss, extras.pop("mse"), found.indices, extras)

    def _task(self, outputs: Tensor, targets: Tensor) -> Tensor:
        judged = self.image_loss(outputs, targets)
        self._extras = parts_of(judged)
        return judged.total


def parts_of(judged: Judged) -> dict[str, Tensor]:
    """The mean squared error, and LPIPS where there is one, for the log.

    Args:
        judged: what `ImageLoss` returned.
    """
    return {"mse": judged.mse} | ({} if judged.perceptual is None else {"perceptual": judged.perceptual})


def make_learner(config: TrainConfig, accelerator: Accelerator, model: ImageAutoencoder) -> Learner:
    """Return the learner that a configuration asks for.

    Args:
        config, accelerator, model: as of `Learner`.

    Raises:
        RunError: the configuration does not fit the model.
    """
    # imported here, for it builds on this module
    from vqkernels.train.learners.adversarial import Adversarial

    kind = (
        ProcedureLearner
        if config.procedure != "joint"
        else Adversarial
        if config.adversarial
        else JointLearner
    )
    return kind(config, accelerator, model)
