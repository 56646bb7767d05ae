"""Whose time it is: events of torch's profiler, given to phases of a step, quantizers and ops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

PHASES = ("forward", "backward", "optimizer")
# ranges of the phases
PHASE_PREFIX = "vqkernels step: "
_ENGINE = "autograd::engine::evaluate_function: "
# what runs between ops
PYTHON = "python between ops"


class Spent(NamedTuple):
    """What an op of one quantizer took in one phase, of all steps; `path` is None outside of quantizers."""

    path: str | None
    phase: str
    op: str
    microseconds: float
    calls: int


class _Place(NamedTuple):
    path: str | None = None
    phase: str | None = None
    op: str | None = None


def spent(events: Iterable[Any], names: dict[str, str], *, on_device: bool) -> list[Spent]:
    """Self times of events, each given to the phase, the quantizer and the op that it belongs to.

    Inside a quantizer is what runs in its range, and of the backward the nodes that were made in its range, which
    torch tells by their sequence numbers; a forward that is computed anew in the backward counts there. An op of ours
    counts with all it calls, any other with what it does itself.

    Args:
        events: of torch.profiler.
        names: paths of quantizers by the names of their ranges.
        on_device: time of a GPU's kernels instead of the host's.
    """
    host = sorted(
        (event for event in events if event.device_type.name == "CPU"),
        key=lambda event: (event.time_range.start, -event.time_range.end),
    )
    inside = _paths(host, names)
    makers = _makers(host, inside)
    places: dict[int, _Place] = {}
    totals: dict[tuple[str | None, str, str], list[float]] = {}
    for event in host:
        above = places.get(id(event.cpu_parent), _Place()) if event.cpu_parent is not None else _Place()
        path, phase, op = above
        if event.name.startswith(PHASE_PREFIX):
            phase = event.name.removeprefix(PHASE_PREFIX)
        elif event.name in names:
            path = names[event.name]
        elif event.fwd_thread > 0:
            # a GPU's backward has threads of its own, in no range
            phase = phase or "backward"
            if event.name.startswith(_ENGINE):
                path = makers.get((event.fwd_thread, event.sequence_nr), path)
        elif op is None and event.name.startswith("vqkernels"):
            op = event.name
        places[id(event)] = _Place(path, phase, op)
        if phase is None:
            continue
        ranged = event.name in names or event.name.startswith((PHASE_PREFIX, _ENGINE, "Optimizer."))
        label = op or (PYTHON if ranged else event.name)
        total = totals.setdefault((path, phase, label), [0.0, 0])
        total[0] += event.self_device_time_total if on_device else event.self_cpu_time_total
        # what an op of ours calls is no call of it
        total[1] += event.name == label
    return [Spent(*key, took, int(calls)) for key, (took, calls) in totals.items()]


def _paths(host: list[Any], names: dict[str, str]) -> dict[int, str | None]:
    """The quantizer in whose range an event began."""
    found: dict[int, str | None] = {}
    for event in host:
        outer = found.get(id(event.cpu_parent)) if event.cpu_parent is not None else None
        found[id(event)] = names.get(event.name, outer)
    return found


def _makers(host: list[Any], inside: dict[int, str | None]) -> dict[tuple[int, int], str | None]:
    """The quantizer in whose range each node of the backward was made, by thread and sequence number."""
    found: dict[tuple[int, int], str | None] = {}
    for event in host:
        # the number counts up when a node is made, so the last that began with it made the node
        if event.fwd_thread <= 0 and event.sequence_nr >= 0:
            found[event.thread, event.sequence_nr] = inside[id(event)]
    return found
