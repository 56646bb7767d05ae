"""Alternated optimization: the codes first, then the model (Huh et al. 2023, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.checks import check_count, check_flag, refuse
from vqkernels.nn import Quantized
from vqkernels.train.learners.procedure import (
    Autoencoder,
    Named,
    Procedure,
    Step,
    TaskLoss,
    averaged,
    gradients_of,
    mean_over_ranks,
)


@dataclass(frozen=True)
class AlternatedStep(Step):
    """What a step of `Alternated` found.

    Attributes:
        codebook_losses: (inner,) what the codes descend, before each of their steps, mean over ranks; (0,) in a warm-up.
    """

    codebook_losses: Tensor


class Alternated(Procedure):
    """Several steps of the codes at fixed latents, then one step of the model with the new codes.

        codes: L_commit(h(sg[F(x)]), sg[F(x)]), a new assignment each time             (Huh eq. 17)
        model: L_task(G(h(F(x)))) plus the quantizer's loss without its codebook part   (Huh eq. 18)

    The encoder runs once for both, since the first does not change it. The loss of the codes is the quantizer's own at
    fixed latents, or, where that does not reach them, the mean square of z - sg[x]. Huh's alpha and beta are
    `STE(codebook_weight=alpha * beta, commitment_weight=alpha * (1 - beta))`; beta = 1 is eq. 18 to the letter, table
    10 uses 0.9 to 0.98. Where an estimator passes the task's gradient on to the codes (the synchronized update,
    DiVeQ), they take one more step on that gradient together with the model.

    Args:
        model, task_loss, codebook_optimizer, model_optimizer: as of `Procedure`.
        inner: steps of the codes, 1 to 8 in table 10.
        split: whether each of them sees its own part of the batch, so that all see as many latents as one step would.

    Raises:
        TypeError, ValueError: an argument is not one of the above, or does not fit the model.
    """

    def __init__(
        self,
        model: Autoencoder,
        task_loss: TaskLoss,
        *,
        codebook_optimizer: torch.optim.Optimizer,
        model_optimizer: torch.optim.Optimizer,
        inner: int = 1,
        split: bool = False,
    ):
        super().__init__(
            model, task_loss, codebook_optimizer=codebook_optimizer, model_optimizer=model_optimizer
        )
        self.inner = check_count("Alternated", "inner", inner, minimum=1)
        self.split = check_flag("Alternated", "split", split)

    def step(self, batch: Tensor, target: Tensor | None = None) -> AlternatedStep:
        self._check_training()
        chain = self._chain
        latents = chain.encoder(batch)
        started = chain.quantizer.initialized
        found = self._codebook_steps(latents.detach()) if started else latents.new_zeros(0)
        fixed = latents.detach().requires_grad_()
        quantized = chain.quantizer(fixed)
        losses = self._judged(quantized, chain.decoder(quantized.z), batch if target is None else target)
        total, task = self._checked(losses, {"codebook losses": found})
        gradients = self._gradients(latents, fixed, quantized, losses.task)
        if started and not self._psi.keys().isdisjoint(gradients):
            self._descend_codes(gradients)
        self._descend_model(gradients)
        return AlternatedStep(total, task, quantized.indices, found)

    def _codebook_steps(self, latents: Tensor) -> Tensor:
        if self.split and len(latents) < self.inner:
            fix = "Pass a larger batch or a smaller inner"
            requirement = f"have a row for each of {self.inner} parts"
            refuse(ValueError, "Alternated", "batch", requirement, len(latents), fix)
        quantizer, found = self.model.quantizer, []
        for part in latents.tensor_split(self.inner) if self.split else [latents] * self.inner:
            with quantizer.unobserved():
                quantized = quantizer(part)
            loss = codebook_loss(quantized, part)
            self._descend_codes(gradients_of(loss, self._psi))
            found.append(loss.detach())
        return mean_over_ranks([torch.stack(found)])[0]

    def _gradients(self, latents: Tensor, fixed: Tensor, quantized: Quantized, task: Tensor) -> Named:
        """Of the task and the quantizer's loss, codes left out of the latter; each part is passed through once."""
        encoder = {n: p for n, p in self._phi.items() if n.startswith("encoder.")}
        behind = {n: p for n, p in (self._phi | self._theta).items() if n not in encoder}
        wanted = {"": fixed} | behind | self._psi
        gradients = dict(zip(wanted, _grad(task, list(wanted.values()), retain_graph=True), strict=True))
        if quantized.loss.requires_grad:
            wanted = {"": fixed} | behind
            for name, more in zip(wanted, _grad(quantized.loss, list(wanted.values())), strict=True):
                there = gradients[name]
                gradients[name] = more if there is None else there if more is None else there + more
        at_latents = gradients.pop("")
        if encoder and at_latents is not None:
            found = _grad(latents, list(encoder.values()), at_latents)
            gradients |= dict(zip(encoder, found, strict=True))
        return averaged(gradients)


def codebook_loss(quantized: Quantized, latents: Tensor) -> Tensor:
    """What codes descend at fixed latents (Huh eq. 17): the quantizer's loss, or else the mean square of z - sg[x].

    Args:
        quantized: of a training forward of `latents`.
        latents: without gradient.

    Returns:
        0-d, with a gradient to the codes.
    """
    return quantized.loss if quantized.loss.requires_grad else F.mse_loss(quantized.z, latents)


def _grad(
    outputs: Tensor, inputs: list[Tensor], cotangent: Tensor | None = None, *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, cotangent, retain_graph=retain_graph, allow_unused=True)
