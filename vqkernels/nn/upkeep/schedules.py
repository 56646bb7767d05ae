"""When something happens, as objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vqkernels.checks import check_count, refuse


@runtime_checkable
class Schedule(Protocol):
    """When something happens."""

    def due(self, step: int) -> bool:
        """Whether it happens after optimizer step number `step` (from 1)."""
        ...


def check_schedule(op: str, schedule: object) -> Schedule:
    """A schedule, by what it can do."""
    if isinstance(schedule, type) or not isinstance(schedule, Schedule):
        got = schedule.__name__ if isinstance(schedule, type) else repr(schedule)
        refuse(
            TypeError, op, "schedule", "have a method due(step)", got, "Pass Every(100) or TwoPhase(steps)"
        )
    return schedule


@dataclass(frozen=True)
class Every:
    """Once every `period` steps, from the end of the first period to `stop`.

    Attributes:
        period: in optimizer steps.
        start: step from which periods are counted; nothing happens up to it.
        stop: last step at which it may happen; None for no end.
    """

    period: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_count("Every", "period", self.period, minimum=1)
        check_count("Every", "start", self.start)
        if self.stop is not None:
            check_count("Every", "stop", self.stop, minimum=self.start + self.period)

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        since = step - self.start
        return since > 0 and since % self.period == 0 and (self.stop is None or step <= self.stop)


@dataclass(frozen=True)
class TwoPhase:
    """Often at first, seldom later, never near the end (DiVeQ appendix A.1; for VQGANs 50, 5000, 300, 3000).

    Attributes:
        total_steps: length of the training, in optimizer steps.
        first: period while step <= until.
        until: last step of the first phase.
        then: period after it.
        stop_before: nothing happens in this many last steps.

    Raises:
        TypeError, ValueError: a number is not an int of its range, or `stop_before` leaves no step.
    """

    total_steps: int
    first: int = 100
    until: int = 2000
    then: int = 500
    stop_before: int = 1000

    def __post_init__(self) -> None:
        for name in ("total_steps", "first", "then"):
            check_count("TwoPhase", name, getattr(self, name), minimum=1)
        for name in ("until", "stop_before"):
            check_count("TwoPhase", name, getattr(self, name))
        if self.stop_before >= self.total_steps:
            requirement = f"be more than stop_before, {self.stop_before}, or nothing ever happens"
            fix = f"Call TwoPhase.scaled({self.total_steps}) for a short training"
            refuse(ValueError, "TwoPhase", "total_steps", requirement, self.total_steps, fix)

    @classmethod
    def scaled(cls, total_steps: int) -> TwoPhase:
        """The same shape for a short run: half of it in the first phase, a sixth of it left alone at the end."""
        first = max(1, total_steps // 12)
        return cls(total_steps, first, total_steps // 2, 3 * first, total_steps // 6)

    def due(self, step: int) -> bool:
        """Whether replacement happens after this step."""
        period = self.first if step <= self.until else self.then
        return step <= self.total_steps - self.stop_before and step % period == 0
