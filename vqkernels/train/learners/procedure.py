"""Training procedures: what a step of any of them is made of, and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn import Codebook, Estimator, Quantized, Quantizer
from vqkernels.nn._random import all_sum, distributed
from vqkernels.train.checkpoints.badstep import NotFiniteError

TaskLoss = Callable[[Tensor, Tensor], Tensor]
Named = dict[str, Tensor]


class Autoencoder(Protocol):
    """A model with a quantizer between its halves, such as `vqkernels.models.VQVAE`."""

    @property
    def encoder(self) -> nn.Module:
        """Makes latents of a batch."""
        ...

    @property
    def quantizer(self) -> Quantizer:
        """Quantizes them."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """Makes outputs of quantized latents."""
        ...


@dataclass(frozen=True)
class Step:
    """What one step of a procedure found; device tensors without gradient.

    Attributes:
        loss: 0-d, the task's loss plus the quantizer's, of the forward that trained the model; mean over ranks.
        task: 0-d, the task's part of it; mean over ranks.
        indices: int64 (..., Q), the codes of that forward on this rank.
    """

    loss: Tensor
    task: Tensor
    indices: Tensor


class Losses(NamedTuple):
    """Of one forward: what the quantizer returned, the task's loss, and that plus the quantizer's, both 0-d."""

    quantized: Quantized
    task: Tensor
    total: Tensor


def split_parameters(model: Autoencoder) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of a model, for the two optimizers of a procedure.

    Args:
        model: with an encoder, a quantizer and a decoder.

    Returns:
        Those that codes are made of (psi of MQ), and all others (phi and theta).

    Raises:
        TypeError: the model lacks one of the three.
    """
    check_model("split_parameters", model)
    codebooks = [part for part in model.quantizer.modules() if isinstance(part, Codebook)]
    # one codebook may serve several stages
    codes = list(dict.fromkeys(p for part in codebooks for p in part.parameters() if p.requires_grad))
    everything = [*model.encoder.parameters(), *model.quantizer.parameters(), *model.decoder.parameters()]
    taken = set(codes)
    return codes, list(dict.fromkeys(p for p in everything if p.requires_grad and p not in taken))


def check_model(op: str, model: object) -> None:
    """A model with an encoder, a quantizer and a decoder."""
    for part, kind in (("encoder", nn.Module), ("quantizer", Quantizer), ("decoder", nn.Module)):
        found = getattr(model, part, None)
        if not isinstance(found, kind):
            got = "none" if found is None else type(found).__name__
            fix = "Pass one such as vqkernels.models.VQVAE"
            refuse(TypeError, op, "model", f"have a {kind.__name__} as its {part}", got, fix)


class Procedure:
    """Base of the procedures: `step` is one step of the whole model, by two optimizers.

    Gradients are means over the ranks of a process group, so the model is the module itself, not a wrapper that
    reduces gradients. The quantizer commits once in a step: it need not follow an optimizer.

    Args:
        model: with an encoder, a quantizer and a decoder.
        task_loss: (outputs, targets) -> 0-d loss, a mean over the batch.
        codebook_optimizer: of the first list of `split_parameters(model)`.
        model_optimizer: of the second.

    Raises:
        TypeError: the model lacks one of the three.
        ValueError: the model has no codes that learn by gradient, or an optimizer holds other parameters.
    """

    def __init__(
        self,
        model: Autoencoder,
        task_loss: TaskLoss,
        *,
        codebook_optimizer: torch.optim.Optimizer,
        model_optimizer: torch.optim.Optimizer,
    ):
        op = type(self).__name__
        check_model(op, model)
        codes, rest = split_parameters(model)
        if not codes:
            fix = "Train it by the gradient of its one loss"
            requirement = "have a codebook with parameters that require a gradient"
            refuse(ValueError, op, "model", requirement, type(model.quantizer).__name__, fix)
        for name, optimizer, wanted, place in (
            ("codebook_optimizer", codebook_optimizer, codes, "first"),
            ("model_optimizer", model_optimizer, rest, "second"),
        ):
            held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            if held != set(wanted):
                requirement = f"hold the {len(wanted)} parameters of the {place} list of split_parameters"
                got = f"{len(held)}, of which {len(held & set(wanted))} are among them"
                fix = f"Pass an optimizer of the {place} list of split_parameters(model)"
                refuse(ValueError, op, name, requirement, got, fix)
        self.model, self.task_loss = model, task_loss
        self.codebook_optimizer, self.model_optimizer = codebook_optimizer, model_optimizer
        self._chain = _Chain(model)
        taken = set(codes)
        self._parameters = named = {n: p for n, p in self._chain.named_parameters() if p.requires_grad}
        # psi, theta and phi of MQ; what lies between encoder and codes belongs to the encoder
        self._psi = {n: p for n, p in named.items() if p in taken}
        self._theta = {n: p for n, p in named.items() if p not in taken and n.startswith("decoder.")}
        self._phi = {n: p for n, p in named.items() if p not in taken and n not in self._theta}

    def step(self, batch: Tensor, target: Tensor | None = None) -> Step:
        """Train on one batch.

        Args:
            batch: what the encoder takes.
            target: what the loss of the task compares with; the batch itself when omitted.

        Returns:
            The losses and codes of this step.

        Raises:
            NotFiniteError: a loss is not finite; encoder and decoder are as before the step.
            RuntimeError: the quantizer is in evaluation mode, where no gradient reaches the encoder.
        """
        raise NotImplementedError

    def _check_training(self) -> None:
        if not self.model.quantizer.training:
            requirement, got = "be in training mode to step", "a quantizer in evaluation mode"
            refuse(RuntimeError, type(self).__name__, "model", requirement, got, "Call model.train()")

    def _losses(self, batch: Tensor, target: Tensor | None) -> Losses:
        quantized, outputs = self._chain(batch)
        return self._judged(quantized, outputs, batch if target is None else target)

    def _judged(self, quantized: Quantized, outputs: Tensor, target: Tensor) -> Losses:
        task = self.task_loss(outputs, target)
        if task.dim() != 0:
            got, fix = f"shape {tuple(task.shape)}", "Average it over the batch"
            refuse(ValueError, type(self).__name__, "task_loss", "return a 0-d tensor", got, fix)
        return Losses(quantized, task, task + quantized.loss)

    def _losses_of_codes(self, losses: Losses) -> Tensor:
        """The part of the total that depends on the codes, which spares a way back through the decoder."""
        parts = [part for part in self.model.quantizer.modules() if isinstance(part, Estimator)]
        alone = bool(parts) and not any(part.reaches_codes for part in parts)
        return losses.quantized.loss if alone and losses.quantized.loss.requires_grad else losses.total

    def _checked(self, losses: Losses, others: Named | None = None) -> tuple[Tensor, Tensor]:
        """The total and the task's loss, means over ranks, after one wait for the device to see that they are finite."""
        total, task = mean_over_ranks([losses.total.detach(), losses.task.detach()])
        self._require_finite({"loss": total, "task": task} | (others or {}))
        return total, task

    def _require_finite(self, values: Named) -> None:
        # all ranks decide alike, for the values are means over them
        if not torch.stack([value.isfinite().all() for value in values.values()]).all():
            got = ", ".join(f"{name} {value.tolist()}" for name, value in values.items())
            fix = "Go on from the last checkpoint with lower learning rates"
            refuse(NotFiniteError, type(self).__name__, "loss", "stay finite", got, fix)

    def _descend(self, optimizer: torch.optim.Optimizer, gradients: Named) -> None:
        optimizer.zero_grad()
        for name, gradient in gradients.items():
            self._parameters[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        # autocast would go on with the parameters of before
        torch.clear_autocast_cache()

    def _descend_codes(self, gradients: Named) -> None:
        self._descend(self.codebook_optimizer, {n: g for n, g in gradients.items() if n in self._psi})

    def _descend_model(self, gradients: Named) -> None:
        """The model's step and the quantizer's commit."""
        # first, for a quantizer that follows the model's optimizer would reset no moments of codes
        if self.model.quantizer.uncommitted:
            self.model.quantizer.commit(self.codebook_optimizer)
        self._descend(self.model_optimizer, {n: g for n, g in gradients.items() if n not in self._psi})


class Joint(Procedure):
    """All parameters step on one gradient, of the task's loss plus the quantizer's (MQ eq. 6; table 6 "w/o BLO").

    Args:
        model, task_loss, codebook_optimizer, model_optimizer: as of `Procedure`.
    """

    def step(self, batch: Tensor, target: Tensor | None = None) -> Step:
        self._check_training()
        losses = self._losses(batch, target)
        total, task = self._checked(losses)
        gradients = gradients_of(losses.total, self._parameters)
        self._descend_codes(gradients)
        self._descend_model(gradients)
        return Step(total, task, losses.quantized.indices)


class _Chain(nn.Module):
    """The three parts in a row, whose parameters have one name each."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = model.encoder, model.quantizer, model.decoder

    def forward(self, batch: Tensor) -> tuple[Quantized, Tensor]:
        quantized = self.quantizer(self.encoder(batch))
        return quantized, self.decoder(quantized.z)


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> Named:
    """Gradients of a 0-d loss, means over ranks; without the parameters that it does not depend on."""
    # of a model that is frozen but for its codes there is nothing to ask
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if parameters else ()
    return averaged(dict(zip(parameters, found, strict=True)))


def averaged(gradients: Mapping[str, Tensor | None]) -> Named:
    """Those gradients that there are, each the mean over ranks."""
    there = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return dict(zip(there, mean_over_ranks(list(there.values())), strict=True))


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the ranks of a process group, in one reduction for all."""
    if not distributed() or not tensors:
        return list(tensors)
    flat = all_sum(torch.cat([t.flatten() for t in tensors])) / dist.get_world_size()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
