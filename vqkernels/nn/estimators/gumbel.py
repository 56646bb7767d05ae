"""Straight-through Gumbel-softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels.checks import check_number, refuse
from vqkernels.nn._autocast import full_precision
from vqkernels.nn.estimators.base import (
    Choice,
    Context,
    Estimate,
    Estimator,
    finite_rows,
    gather,
    masked,
)
from vqkernels.nn.estimators.temperature import (
    STEPS,
    ExponentialTemperature,
    Temperature,
    TemperatureSchedule,
)
from vqkernels.nn.methods import Method, register
from vqkernels.ops import gumbel_code
from vqkernels.ops._logits import rows_at_once
from vqkernels.ops.gumbel_code import gumbel_noise


class Gumbel(Estimator):
    """Straight-through Gumbel-softmax: a code drawn by its logits, with the gradient of the softmax of them all.

        y = softmax((l + g) / tau),   z = sum_j y_j c_j, y one-hot in value and soft in gradient   (DiVeQ eq. 5)
        loss = kl_weight * mean KL(softmax(l) || uniform)                                          (eq. 6)

    with l_j = -|x - c_j|^2, or the logits of a `head`. Evaluation takes the largest logit, without noise: the nearest
    code, where there is no head. It needs all codes of every row, so it crosses to no codes that were chosen elsewhere.

    Logits are made some rows at a time, in the backward pass again, and N x K of them are never kept. A head runs on
    these rows alone, so it must treat each row by itself (no batch normalisation).

    Args:
        kl_weight: phi, weight of the KL term: 1 in the paper, 5e-4 in its released code, which is the default.
        temperature: a schedule of tau, > 0, or a number; by default from 1 to 0.1 in 10 000 optimizer steps. The
            paper's takes the whole training. Which code is drawn does not depend on it, only the gradient does.
        head: a module from latents (rows, D) to logits (rows, K), in place of distances.

    Raises:
        TypeError, ValueError: an argument is not one of the above.
    """

    noisy = True
    grouped = False
    # every code of a row has a part in its gradient, so a target chosen elsewhere is not enough
    joint = False

    def __init__(
        self,
        *,
        kl_weight: float = 5e-4,
        temperature: TemperatureSchedule | float | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.kl_weight = check_number("Gumbel", "kl_weight", kl_weight)
        if head is not None and not isinstance(head, nn.Module):
            fix = "Pass such as torch.nn.Linear(D, K)"
            refuse(TypeError, "Gumbel", "head", "be a module or None", type(head).__name__, fix)
        schedule = ExponentialTemperature(STEPS) if temperature is None else temperature
        self.temperature = Temperature("Gumbel", schedule, zero=False)
        self.head = head
        # whether an evaluation is the nearest code
        self.plain = head is None
        self.idle = self.temperature.schedule.settled(0)

    def choose(self, x: Tensor, codes: Tensor, context: Context) -> Choice:
        with torch.no_grad():
            return Choice(self(x, codes, context).indices)

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        return self(x, codes, context)._replace(indices=choice.indices)

    def forward(self, x: Tensor, codes: Tensor, context: Context) -> Estimate:
        if self.head is None:
            z, indices, kl = gumbel_code(
                x, codes, temperature=self.temperature(), seed=context.seed, row_offset=context.row_offset
            )
        else:
            z, indices, kl = _stream(self.head, x, codes, self.temperature(), context)
        counted = kl.isfinite()
        if context.mask is not None:
            counted = counted & context.mask
            z = torch.where(context.mask[..., None], z, 0)
        rows = counted.sum() if context.mean_rows is None else context.mean_rows
        total = torch.where(counted, kl, 0).sum()
        loss = self.kl_weight * total / torch.where(rows > 0, rows, 1)
        return Estimate(z, masked(indices, context.mask), loss)

    def encode(self, x: Tensor, codes: Tensor) -> Tensor:
        if self.head is None:
            return super().encode(x, codes)
        chunks = x.reshape(-1, x.shape[-1]).split(rows_at_once(len(codes), x.device))
        with torch.no_grad():
            best = torch.cat([head_logits(self.head, rows, codes).argmax(1) for rows in chunks])
        return torch.where(finite_rows(x), best.view(x.shape[:-1])[..., None], 0)

    def commit(self, step: int) -> None:
        self.temperature.commit(step)
        self.idle = self.temperature.schedule.settled(step)

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}"


def head_logits(head: nn.Module, x: Tensor, codes: Tensor) -> Tensor:
    """Logits of a head, float32 or better: x (n, D), codes (K, D) -> (n, K); a code that is not finite never wins."""
    parameter = next(head.parameters(), None)
    x = torch.where(finite_rows(x), x, 0)
    logits = head(x if parameter is None else x.to(parameter.dtype))
    expected = (len(x), len(codes))
    if logits.shape != expected:
        fix = "Let its last layer have one output per code"
        refuse(ValueError, "Gumbel", "head", f"return {expected}", tuple(logits.shape), fix)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(finite_rows(codes)[:, 0], logits, -torch.finfo(logits.dtype).max / 8)


def _stream(
    head: nn.Module, x: Tensor, codes: Tensor, tau: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """What `gumbel_code` returns, of a head's logits."""
    first, parts = context.row_offset, []
    for rows in x.reshape(-1, x.shape[-1]).split(rows_at_once(len(codes), x.device)):
        parts.append(checkpoint(_chunk, head, rows, codes, context.seed, tau, first, use_reentrant=False))
        first = first + len(rows)
    z, indices, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    shape, finite = x.shape[:-1], finite_rows(x)
    # a row that is not finite is nan, and so is its gradient, but no code and no parameter shall see that
    z = torch.where(finite, z.view(x.shape), 0) + x * torch.where(finite, 0.0, torch.nan).to(x.dtype)
    kl = torch.where(finite[..., 0], kl.view(shape), torch.nan)
    return z, torch.where(finite[..., 0], indices.view(shape), 0), kl


def _chunk(
    head: nn.Module, x: Tensor, codes: Tensor, seed: Tensor, tau: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head_logits(head, x, codes)
    with full_precision(x.device):
        noise = gumbel_noise(seed, len(x), len(codes), first, logits.dtype)
        log_q = torch.log_softmax(logits, dim=1)
        kl = math.log(len(codes)) + (log_q.exp() * log_q).sum(1)
        noisy = logits + noise
        best, indices = noisy.detach().max(1, keepdim=True)
        indices = indices[:, 0]
        # the largest is 0, so that a quotient which leaves the range has weight 0
        y = torch.softmax((noisy - best) / tau.to(logits.dtype), dim=1)
        table = torch.where(finite_rows(codes), codes, 0).detach().to(logits.dtype)
        # 0 in value, and its gradient is that of the soft sum
        soft = (y - y.detach()) @ table
        return gather(codes, indices).to(x.dtype) + soft.to(x.dtype), indices, kl


register(
    "gumbel",
    Method(
        "draws codes by all their logits, whose gradient is soft; needs a schedule that fits the training",
        source="DiVeQ eq. 5, 6 and 13; Jang et al. 2017",
        estimator=lambda spec: Gumbel(temperature=ExponentialTemperature(spec.steps or STEPS)),
    ),
)
