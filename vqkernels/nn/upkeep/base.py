"""What all upkeep has in common: it watches training forwards, changes codes in `commit`, and remembers what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqkernels.checks import check_kind, refuse
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context


@dataclass(frozen=True, eq=False)
class UpkeepReport:
    """What an upkeep has done so far, over all ranks. Tensors are 0-d int64 on the device; none waits for it.

    Attributes:
        name: its place in the quantizer and its class, such as "upkeep.0 KMeansInit".
        times: how often it replaced a code or more.
        last_step: number of the optimizer step after which it last did; 0 for never, or before the first step.
        last_replaced: codes replaced that time.
        replaced: codes replaced in total.
    """

    name: str
    times: Tensor
    last_step: Tensor
    last_replaced: Tensor
    replaced: Tensor

    def to_dict(self) -> dict[str, str | int]:
        """The same as Python values; waits for the device."""
        numbers = torch.stack([self.times, self.last_step, self.last_replaced, self.replaced]).tolist()
        return {
            "name": self.name,
            **dict(zip(("times", "last_step", "last_replaced", "replaced"), numbers, strict=True)),
        }


class Upkeep(nn.Module):
    """Base of all upkeep."""

    # False while training forwards must not quantize yet
    ready = True
    # False until `start` has given the codes their first values
    started = True
    # True once a quantizer owns it
    bound = False
    # whether it overwrites codes
    assigns = True
    # while not ready or not started: what is in the way of an evaluation, and what to do about it
    waiting = "a warm-up under way"
    remedy = "Train through the warm-up first, or load a state_dict"

    history: Tensor

    def __init__(self) -> None:
        super().__init__()
        # the four numbers of a report
        self.register_buffer("history", torch.zeros(4, dtype=torch.int64))

    @property
    def idle(self) -> bool:
        """Whether `observe` and `commit` will do nothing any more."""
        return False

    def check(self, codebook: Codebook) -> None:
        """Refuse a codebook that this upkeep cannot serve.

        Raises:
            ValueError: its codes are made of something else and cannot be overwritten.
        """
        if self.assigns and not codebook.assignable:
            requirement = f"have codes that can be overwritten for {type(self).__name__}"
            fix = "Leave the upkeep out: a generator moves all codes together"
            refuse(ValueError, "VectorQuantizer", "codebook", requirement, type(codebook).__name__, fix)

    def check_counted(self, num_codes: int, num_indices: int) -> None:
        """Refuse an estimator whose training indices are no codes, for upkeep that counts their use.

        Raises:
            ValueError: they are segments between codes.
        """
        if num_indices != num_codes:
            requirement = "have one training index per code, so that use can be counted"
            fix = "Leave the replacement out: the space-filling estimators keep their codes in use by themselves"
            got = f"{num_indices} indices for {num_codes} codes"
            refuse(ValueError, type(self).__name__, "estimator", requirement, got, fix)

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        """Told once, by the quantizer: K, D and how many values a training index takes."""

    def start(self, codebook: Codebook, x: Tensor, context: Context) -> Tensor | None:
        """Give the codes their first values from the first training batch x (..., D), before it is quantized.

        Returns:
            The (K,) mask of codes that were given one.
        """

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        """Take note of a training batch: x (..., D), indices (...), None before the codes are ready."""

    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        """Change codes after optimizer step number `step` (from 1); returns the (K,) mask of rows replaced."""

    @torch.no_grad()
    def record(self, replaced: Tensor, step: int) -> None:
        """Remember, for the report, a (K,) mask of codes replaced after step number `step`."""
        times, last_step, last_replaced, total = self.history.unbind()
        count = replaced.sum()
        acted = count > 0
        last_step = torch.where(acted, step, last_step)
        self.history.copy_(
            torch.stack([times + acted, last_step, torch.where(acted, count, last_replaced), total + count])
        )

    def report(self, name: str = "") -> UpkeepReport:
        """What it has done so far."""
        return UpkeepReport(f"{name} {type(self).__name__}".strip(), *self.history.clone().unbind())

    def get_extra_state(self) -> Tensor:
        """Whether it is ready and started, as a tensor."""
        return torch.tensor([self.ready, self.started])

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a loaded state."""
        self.ready, self.started = bool(state[0]), bool(state[1])


def check_upkeep(op: str, upkeep: object) -> None:
    """A sequence of upkeep.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(upkeep, (Sequence, nn.ModuleList)) or isinstance(upkeep, str):
        fix = "Pass a list, such as [KMeansInit()]"
        refuse(TypeError, op, "upkeep", "be a sequence", type(upkeep).__name__, fix)
    for part in upkeep:
        check_kind(op, "upkeep", part, Upkeep, "Pass such as [KMeansInit()]")
