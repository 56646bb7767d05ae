"""Meta-Quantization: codes that descend the loss after the model's next step (Qin and Zhang 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from vqkernels.checks import check_choice, check_number, refuse
from vqkernels.nn import STE, VectorQuantizer
from vqkernels.ops import code_sums
from vqkernels.train.learners.procedure import (
    Autoencoder,
    Losses,
    Named,
    Procedure,
    Step,
    TaskLoss,
    averaged,
    gradients_of,
)

# length of a probe's displacement (MQ after Liu et al. 2019)
_DISPLACEMENT = 0.01


@dataclass(frozen=True)
class MetaStep(Step):
    """What a step of `MetaQuantization` found (MQ figure 4).

    Attributes:
        direct_norm: 0-d, length of the direct gradient of psi.
        indirect_norm: 0-d, length of the indirect one, xi included.
        cosine: 0-d, of the angle between them; 0 where one of them is 0.
    """

    direct_norm: Tensor
    indirect_norm: Tensor
    cosine: Tensor


class MetaQuantization(Procedure):
    """The codes descend the loss that the model would have after its next step (MQ algorithm 1).

        phi' = phi - xi grad_phi L,  theta' = theta - xi grad_theta L,  L = L_task + alpha L_commit + beta L_codebook
        psi descends  grad_psi L(phi', theta', psi)                                          (direct)
          - xi (grad_psi L(phi+, theta, psi) - grad_psi L(phi-, theta, psi)) / (2 eps)
          - xi (grad_psi L(phi, theta+, psi) - grad_psi L(phi, theta-, psi)) / (2 eps)       (indirect, eq. 16)
        phi+- = phi +- eps v_phi,  theta+- = theta +- eps v_theta,  v = gradients at (phi', theta'),  eps = 0.01 / |v|

    after which phi and theta take their own step, from where they were, with the new psi. The tentative step is taken
    on copies. psi are the parameters that codes are made of; alpha and beta are the weights of the estimator, such as
    `STE(codebook_weight=beta, commitment_weight=alpha)`. All forwards of a step draw the same noise. xi = 0 is
    alternated training; MQ's "w/o BLO" is `Joint`.

    With a plain `STE`, psi appears in the codebook loss alone, and the indirect gradient has a closed form:

        + xi 2 beta / (N D) J_H^T S,   S_j = sum over rows n of code j of (J_E v_phi)_n

    with J_H the Jacobian of the codes in psi and J_E that of the encoder in phi; nothing comes from theta. It costs
    one forward derivative of the encoder instead of four forwards and backwards. Rows keep the codes they have at phi;
    in the general form they choose anew.

    Args:
        model, task_loss, codebook_optimizer, model_optimizer: as of `Procedure`.
        xi: learning rate of the tentative step, >= 0; also an attribute.
        hypergradient: "closed", "general", or "auto" for closed where `why_not_closed()` is None.

    Raises:
        TypeError, ValueError: an argument is not one of the above, or "closed" is asked for where it does not hold.
    """

    def __init__(
        self,
        model: Autoencoder,
        task_loss: TaskLoss,
        *,
        codebook_optimizer: torch.optim.Optimizer,
        model_optimizer: torch.optim.Optimizer,
        xi: float,
        hypergradient: str = "auto",
    ):
        super().__init__(
            model, task_loss, codebook_optimizer=codebook_optimizer, model_optimizer=model_optimizer
        )
        self.xi = check_number("MetaQuantization", "xi", xi)
        choices = ("auto", "closed", "general")
        self.hypergradient = check_choice("MetaQuantization", "hypergradient", hypergradient, choices)
        self._is_closed()

    def why_not_closed(self) -> str | None:
        """Why the closed form would not be the indirect gradient of this model as it is now; None if it is."""
        quantizer = self.model.quantizer
        if type(quantizer) is not VectorQuantizer:
            return f"the quantizer is a {type(quantizer).__name__}"
        if type(quantizer.estimator) is not STE or quantizer.estimator.sync > 0:
            return f"{type(quantizer.estimator).__name__} may pass the task's gradient on to the codes"
        for part in self.model.encoder.modules():
            if part.training and isinstance(part, _RANDOM) and getattr(part, "p", 1) > 0:
                return f"the encoder draws noise in {type(part).__name__}"
            if part.training and isinstance(part, _STATISTICS) and part.track_running_stats:
                return f"the encoder updates statistics in {type(part).__name__}"
        return None

    def step(self, batch: Tensor, target: Tensor | None = None) -> MetaStep:
        self._check_training()
        if not self.model.quantizer.initialized:
            return self._warm_up(batch, target)
        direct, indirect = self.hypergradients(batch, target)
        a, b = _vector(direct, self._psi), _vector(indirect, self._psi)
        self._require_finite({"direct gradient's norm": a.norm(), "indirect gradient's norm": b.norm()})
        self._descend_codes({n: g + indirect[n] if n in indirect else g for n, g in direct.items()})
        found = self._train_model(batch, target)
        cosine = F.cosine_similarity(a, b, dim=0)
        return MetaStep(found.loss, found.task, found.indices, a.norm(), b.norm(), cosine)

    def _warm_up(self, batch: Tensor, target: Tensor | None) -> MetaStep:
        found = self._train_model(batch, target)
        nothing = torch.zeros_like(found.loss)
        return MetaStep(found.loss, found.task, found.indices, nothing, nothing, nothing)

    def _train_model(self, batch: Tensor, target: Tensor | None) -> Step:
        """phi and theta take their step; the one forward of a step that the quantizer takes note of."""
        losses = self._losses(batch, target)
        total, task = self._checked(losses)
        self._descend_model(gradients_of(losses.total, self._phi | self._theta))
        return Step(total, task, losses.quantized.indices)

    def hypergradients(self, batch: Tensor, target: Tensor | None = None) -> tuple[Named, Named]:
        """The direct and the indirect gradient of psi, whose sum psi descends; changes nothing.

        Args:
            batch, target: as of `step`.

        Returns:
            Each by the parameter's name, means over ranks; none of an indirect gradient where xi = 0.

        Raises:
            RunError: the loss before or after the tentative step is not finite.
        """
        closed, xi = self._is_closed(), self.xi
        here = {n: p.detach() for n, p in (self._phi | self._theta).items()}
        if xi == 0:
            losses = self._probe(here, batch, target)
            self._checked(losses)
            return gradients_of(self._losses_of_codes(losses), self._psi), {}
        losses = self._probe({}, batch, target)
        indices = losses.quantized.indices
        self._checked(losses)
        tentative = gradients_of(losses.total, self._phi | self._theta)
        del losses
        # in the closed form nothing is asked of theta's gradient
        moved = self._phi if closed else self._phi | self._theta
        there = {n: p - xi * tentative[n] if n in tentative else p for n, p in here.items()}
        leaves = {n: there[n].requires_grad_() for n in moved}
        losses = self._probe(there, batch, target)
        self._checked(losses)
        gradients = gradients_of(losses.total, self._psi | leaves)
        del losses, tentative, there
        direct = {n: gradients.pop(n) for n in self._psi if n in gradients}
        if closed:
            return direct, self._closed(batch, indices, gradients)
        parts = [{n: v for n, v in gradients.items() if n in group} for group in (self._phi, self._theta)]
        phi, theta = (self._difference(here, direction, batch, target) for direction in parts)
        # psi's gradient has the same entries wherever it is taken
        both = {n: phi[n] + theta[n] for n in phi} if phi and theta else phi | theta
        return direct, {n: -xi * g for n, g in both.items()}

    def _closed(self, batch: Tensor, indices: Tensor, direction: Named) -> Named:
        if not direction:
            return {}
        # the preconditions hold, the type with them
        quantizer = cast(VectorQuantizer, self.model.quantizer)
        phi = {n: self._phi[n].detach() for n in direction}
        latents = _Latents(quantizer, self.model.encoder)
        with torch.no_grad(), self._same_draws():
            moved = jvp(lambda p: functional_call(latents, p, (batch,)), (phi,), (direction,))[1]
            sums = code_sums(moved, indices[..., 0], quantizer.num_codes).sums
        codes = quantizer.codes()
        weight = cast(STE, quantizer.estimator).codebook_weight
        cotangent = (2 * self.xi * weight / moved.numel() * sums).to(codes.dtype)
        found = torch.autograd.grad(codes, list(self._psi.values()), cotangent, allow_unused=True)
        return averaged(dict(zip(self._psi, found, strict=True)))

    def _difference(self, here: Named, direction: Named, batch: Tensor, target: Tensor | None) -> Named:
        """The central difference of psi's gradient along a direction in phi or theta, at the unprimed point."""
        if not direction:
            return {}
        length = torch.stack([v.square().sum() for v in direction.values()]).sum().sqrt()
        # a direction of zeros stays one
        eps = _DISPLACEMENT / length.clamp_min(torch.finfo(length.dtype).tiny)
        sides = []
        for sign in (1, -1):
            there = here | {n: here[n] + sign * eps * v for n, v in direction.items()}
            # a difference of nearby gradients needs all their digits
            with torch.autocast(batch.device.type, enabled=False):
                losses = self._probe(there, batch, target)
                sides.append(gradients_of(self._losses_of_codes(losses), self._psi))
        up, down = sides
        return {n: (up[n] - down[n]) / (2 * eps) for n in up}

    def _probe(self, parameters: Named, batch: Tensor, target: Tensor | None) -> Losses:
        """The losses with other parameters; leaves no trace in statistics, buffers or random numbers."""
        chain = self._chain
        buffers = {n: b.clone() for n, b in chain.named_buffers() if not n.startswith("quantizer.")}
        with self._same_draws(), chain.quantizer.unobserved():
            quantized, outputs = functional_call(chain, parameters | buffers, (batch,))
            return self._judged(quantized, outputs, batch if target is None else target)

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """What is drawn inside is drawn again outside."""
        device = next(iter(self._parameters.values())).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            yield

    def _is_closed(self) -> bool:
        if self.hypergradient == "general":
            return False
        reason = self.why_not_closed()
        if reason is not None and self.hypergradient == "closed":
            fix = "Pass hypergradient='general'"
            requirement = "be a plain STE around an encoder without noise or statistics for the closed form"
            refuse(ValueError, "MetaQuantization", "model", requirement, f"a model where {reason}", fix)
        return reason is None


_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)
_STATISTICS = (nn.modules.batchnorm._NormBase,)


class _Latents(nn.Module):
    """From a batch to latents as they are compared with codes, (..., D)."""

    def __init__(self, quantizer: VectorQuantizer, encoder: nn.Module):
        super().__init__()
        self.quantizer, self.encoder = quantizer, encoder

    def forward(self, batch: Tensor) -> Tensor:
        # plain functions: those of the quantizer derive backwards alone
        quantizer = self.quantizer
        x = self.encoder(batch).movedim(quantizer.channel_dim, -1)
        x = x if quantizer.project_in is None else quantizer.project_in(x)
        return F.normalize(x, dim=-1) if quantizer.metric == "cosine" else x


def _vector(gradients: Named, parameters: Mapping[str, Tensor]) -> Tensor:
    """All gradients in a row, zeros where there is none."""
    return torch.cat([gradients.get(n, torch.zeros_like(p)).flatten() for n, p in parameters.items()])
