"""Contenders before they are timed: what a call will take, and whether it finds what was promised."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from vqkernels.profiling.machine import Record, Shape
from vqkernels.profiling.oracle import Oracle
from vqkernels.profiling.peers import Bound, Contender
from vqkernels.profiling.steps import Steps
from vqkernels.profiling.timing import Clock, Failure, attempt

Call = Callable[[Tensor], object]

# of the free memory, what a contender may want
_WANTED = 0.8
# the part of the rows that tells what a call of all will take
_TRIED = 32
# milliseconds of a call that may be tried again
_SHORT = 50.0


@dataclass
class Checked:
    """A contender that found what it promised.

    Attributes:
        contender: who.
        run: what is called with x.
        seconds: of the call that was checked.
        facts: what is recorded of it beside times.
    """

    contender: Contender
    run: Call
    seconds: float
    facts: Record = field(default_factory=dict)


def too_large(contender: Contender, shape: Shape, free: int | None) -> str | None:
    """Why a contender would not fit into the memory that is free, or None."""
    needs = contender.bytes_per_pair * shape[0] * shape[1]
    if free is None or needs <= _WANTED * free:
        return None
    return f"it would need {needs / 1e9:.0f} GB of {free / 1e9:.0f} GB"


def guessed_seconds(clock: Clock, run: Call, x: Tensor, *, least: int = 1, tries: int = 1) -> float:
    """What a call with all rows will take, from what some of them took; 0 where nobody can say.

    Args:
        clock: measures.
        run: what is called.
        x: (N, D), all rows.
        least: rows that are called at least.
        tries: calls that are timed, where they are short; the shortest counts.
    """
    some = x[: max(least, len(x) // _TRIED)]
    # the first call loads, compiles or starts threads; what it raises, the check will tell
    if isinstance(attempt(lambda: run(some)), Failure):
        return 0.0
    shortest = float("inf")
    for _ in range(tries):
        took = attempt(lambda: clock.time(lambda: run(some)))
        if isinstance(took, Failure):
            return 0.0
        shortest = min(shortest, took)
        if took > _SHORT:
            break
    return shortest * len(x) / len(some) / 1e3


def check(contender: Contender, run: Bound, x: Tensor, judge: Oracle | Steps) -> Checked:
    """Run once, compare with float64.

    Raises:
        ValueError: the result is not what was promised.
    """
    if isinstance(judge, Steps):
        judge.begin(run.layer)
    began = time.perf_counter()
    result: Any = run(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    checked = Checked(contender, run, time.perf_counter() - began)
    if isinstance(judge, Steps):
        judge.check(contender, run, result)
        return checked
    share, rows = judge.check_search(result, contender.exact)
    checked.facts |= {"agreement": share, "agreement_rows": rows}
    return checked


def turning(run: Call, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Calls of `run` with one input after the other: none finds what the one before it read."""
    turn = cycle(inputs)
    return lambda: run(next(turn))
