"""Temperatures that follow a schedule, as objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vqkernels.checks import check_count, refuse

# of a training whose length is not known
STEPS = 10_000

# below it a temperature, or what is divided by it, leaves the range of float32
_LEAST = 1e-30


class TemperatureSchedule(Protocol):
    """A temperature over the steps of a training."""

    def at(self, step: int) -> float:
        """The temperature after optimizer step number `step`; 0 is before the first."""
        ...

    def settled(self, step: int) -> bool:
        """Whether it changes no more after this step."""
        ...

    def lowest(self) -> float:
        """The least temperature of all."""
        ...


@dataclass(frozen=True)
class ConstantTemperature:
    """The same temperature always.

    Attributes:
        value: in units of x squared, not negative.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        _check("ConstantTemperature", "value", self.value)

    def at(self, step: int) -> float:
        """The value."""
        return self.value

    def settled(self, step: int) -> bool:
        """True."""
        return True

    def lowest(self) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True)
class _Anneal:
    """From one temperature to another.

    Attributes:
        steps: of the optimizer until `stop` is reached; it stays from then on.
        start: at first, in units of x squared, > 0.
        stop: at last, not negative and at most `start`.
    """

    steps: int
    start: float = 1.0
    stop: float = 0.1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, "steps", self.steps, minimum=1)
        _check(name, "start", self.start, zero=False)
        _check(name, "stop", self.stop)
        if self.stop > self.start:
            refuse(ValueError, name, "stop", f"be at most start, {self.start}", self.stop, "Exchange the two")

    def _part(self, step: int) -> float:
        return min(step / self.steps, 1.0)

    def settled(self, step: int) -> bool:
        """Whether `steps` have passed."""
        return step >= self.steps

    def lowest(self) -> float:
        """`stop`."""
        return self.stop


@dataclass(frozen=True)
class ExponentialTemperature(_Anneal):
    """max(start eta^step, stop), eta = (stop / start)^(1 / steps)        (DiVeQ eq. 13, by steps and not by epochs)

    Equally max(stop, start exp(-rate step)), rate = ln(start / stop) / steps.

    Attributes:
        steps: of the optimizer until `stop` is reached; the whole training in the paper.
        start: at first, in units of x squared, > 0; 1 in the paper.
        stop: at last, > 0; 0.1 in the paper.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("ExponentialTemperature", "stop", self.stop, zero=False)

    def at(self, step: int) -> float:
        """The temperature after this step."""
        return self.stop if self.settled(step) else self.start * (self.stop / self.start) ** self._part(step)


@dataclass(frozen=True)
class LinearTemperature(_Anneal):
    """start + (stop - start) step / steps, then `stop`, which may be 0.

    Attributes:
        steps: of the optimizer until `stop` is reached.
        start: at first, in units of x squared, > 0.
        stop: at last, not negative and at most `start`.
    """

    def at(self, step: int) -> float:
        """The temperature after this step."""
        part = self._part(step)
        return (1 - part) * self.start + part * self.stop


@dataclass(frozen=True)
class CosineTemperature(_Anneal):
    """stop + (start - stop) (1 + cos(pi step / steps)) / 2, then `stop`, which may be 0.

    Attributes:
        steps: of the optimizer until `stop` is reached.
        start: at first, in units of x squared, > 0.
        stop: at last, not negative and at most `start`.
    """

    def at(self, step: int) -> float:
        """The temperature after this step."""
        if self.settled(step):
            return self.stop
        return self.stop + (self.start - self.stop) * (1 + math.cos(math.pi * self._part(step))) / 2


class Temperature(nn.Module):
    """The current temperature: a 0-d buffer that a host-side `commit` fills, so that no forward waits or recompiles.

    Args:
        owner: whose temperature it is, for messages.
        schedule: a schedule, or a number for a constant.
        zero: whether it may become 0.

    Raises:
        TypeError: `schedule` is neither.
        ValueError: it becomes 0 where it must not.
    """

    value: Tensor

    def __init__(self, owner: str, schedule: TemperatureSchedule | float, *, zero: bool):
        super().__init__()
        if isinstance(schedule, (int, float)) and not isinstance(schedule, bool):
            schedule = ConstantTemperature(schedule)
        methods = (getattr(schedule, name, None) for name in ("at", "settled", "lowest"))
        if isinstance(schedule, (bool, type)) or not all(map(callable, methods)):
            fix = "Pass such as ExponentialTemperature(steps)"
            refuse(TypeError, owner, "temperature", "be a schedule or a number", repr(schedule), fix)
        if not zero and schedule.lowest() < _LEAST:
            fix = "Let it stop above that"
            refuse(
                ValueError, owner, "temperature", f"stay above 0, at {_LEAST} or more", schedule.lowest(), fix
            )
        self.schedule = schedule
        self.register_buffer("value", torch.tensor(schedule.at(0), dtype=torch.float32))

    def _apply(self, fn: Callable, recurse: bool = True) -> Temperature:
        value = self.value
        super()._apply(fn, recurse)
        # a temperature moves with the module but is never narrowed to half precision
        if not (value.is_meta or self.value.is_meta):
            self.value = value.to(self.value.device)
        return self

    def forward(self) -> Tensor:
        """A 0-d copy, which later commits do not change."""
        return self.value.clone()

    def commit(self, step: int) -> None:
        """Become what the schedule says after optimizer step number `step`."""
        self.value.fill_(self.schedule.at(step))

    def extra_repr(self) -> str:
        return repr(self.schedule)


def _check(op: str, name: str, value: object, *, zero: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(TypeError, op, name, "be a number", type(value).__name__, "Pass a Python float")
    if not 0 <= value <= 3e38 or (value == 0 and not zero):
        requirement = "be finite and not negative" if zero else "be finite and above 0"
        refuse(ValueError, op, name, requirement, value, "Pass one in units of x squared")
