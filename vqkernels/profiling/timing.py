"""Clocks: what a call takes on the host or on a GPU, interleaved between contenders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vqkernels import native

# rounds of a case whose number follows from the time it may take
FEWEST, MOST = 5, 60
# calls in one captured graph
CAPTURED = 10
# of the product and of the copy that tell what the device can do
_SIDE, _COPIED = 8192, 1 << 30
# the same on a host, and the seconds that each kind of dot product gets
_HOST_SIDE, _HOST_COPIED, _HOST_SECONDS = 2048, 1 << 28, 0.3
# seconds before a call is timed on the host: threads of other libraries spin for a while after their last task
_SETTLED = 0.005


@dataclass(frozen=True)
class Floors:
    """What the device can do at most, measured in the same process; None where nobody knows.

    Attributes:
        flops: operations per second of a large half-precision matrix product; on a CPU of the fastest dot product.
        bandwidth: bytes per second of a large copy, reads plus writes.
        launch_ms: a kernel of one element, between two events.
        replay_ms: the same kernel as one of many nodes of a replayed graph.
        kinds: on a CPU, operations per second of dot products by the kind of their factors.
    """

    flops: float | None = None
    bandwidth: float | None = None
    launch_ms: float | None = None
    replay_ms: float | None = None
    kinds: Mapping[str, float] = field(default_factory=dict)

    def best(self, other: Floors) -> Floors:
        """The higher rates of two measurements, and the later of what is not a rate."""
        kinds = {kind: max(rate, self.kinds.get(kind, 0.0)) for kind, rate in other.kinds.items()}
        return Floors(
            _higher(self.flops, other.flops),
            _higher(self.bandwidth, other.bandwidth),
            other.launch_ms,
            other.replay_ms,
            kinds,
        )


def _higher(*rates: float | None) -> float | None:
    return max((rate for rate in rates if rate is not None), default=None)


class HostClock:
    """Wall-clock time of calls that return when they are done."""

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        time.sleep(_SETTLED)
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Peak memory above inputs and outputs; on the host another process measures it."""
        return None

    def replayed(self, runs: Sequence[Callable[[], object]], rounds: int) -> float | None:
        """Milliseconds of a call in a captured graph; there are none on the host."""
        return None

    def floors(self, dtype: torch.dtype) -> Floors:
        """Rates of dot products in registers, or where nothing was compiled of matrix products, and of a copy.

        Rates in registers can only be too high, and shares of them too low: their operands are zeros, which cost
        less power and may leave a core a higher clock, and where one thread takes the tasks of two, each is timed as
        if the other core were busy beside it.
        """
        kinds = native.peaks(_HOST_SECONDS) or {
            str(kind).removeprefix("torch."): self._product(kind) for kind in (torch.float32, torch.bfloat16)
        }
        source = torch.ones(_HOST_COPIED, dtype=torch.uint8)
        target = torch.empty_like(source)
        copied = min(self.time(lambda: target.copy_(source)) for _ in range(8))
        return Floors(flops=max(kinds.values()), bandwidth=2e3 * _HOST_COPIED / copied, kinds=kinds)

    def _product(self, dtype: torch.dtype) -> float:
        a, b, out = (torch.randn(_HOST_SIDE, _HOST_SIDE).to(dtype) for _ in range(3))
        return 2e3 * _HOST_SIDE**3 / min(self.time(lambda: torch.mm(a, b, out=out)) for _ in range(8))

    def free_bytes(self) -> int | None:
        """What a contender may allocate; unknown where the system does not say."""
        facts = Path("/proc/meminfo")
        if not facts.exists():
            return None
        found = next(
            (text for text in facts.read_text().splitlines() if text.startswith("MemAvailable")), None
        )
        return None if found is None else 1024 * int(found.split()[1])


class DeviceClock:
    """CUDA events around calls; before each, a buffer four times the size of L2 is overwritten.

    The overwriting keeps the device busy while the host queues the call, so that what is measured is what the
    device does, and the gaps between launches only where the host cannot keep up.
    """

    def __init__(self, device: torch.device):
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 1 << 26)
        self._flushed = torch.empty(4 * l2, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call, L2 cold."""
        self._flushed.zero_()
        return self._between_events(run)

    def _between_events(self, run: Callable[[], object]) -> float:
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Peak memory of one call above what was there before and what it returns."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        kept = run()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        return max(0, peak - sum(t.untyped_storage().nbytes() for t in tensors(kept)))

    def replayed(self, runs: Sequence[Callable[[], object]], rounds: int) -> float | None:
        """Milliseconds per call of one captured graph of all calls, the median of its replays."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [run() for run in runs]
        graph.replay()
        times = [self.time(graph.replay) / len(runs) for _ in range(rounds)]
        del graph, kept
        return statistics.median(times)

    def floors(self, dtype: torch.dtype) -> Floors:
        """Rates of a matrix product and a copy, and what a launch costs, in about a tenth of a second."""
        half = torch.float16 if dtype == torch.float32 else dtype
        one = torch.zeros(1, device=self._device)
        return Floors(
            flops=2 * _SIDE**3 / self._product(half) * 1e3,
            bandwidth=2 * _COPIED / self._copy() * 1e3,
            launch_ms=self._median(one.zero_),
            replay_ms=self.replayed([one.zero_] * 100, 20),
        )

    def _product(self, dtype: torch.dtype) -> float:
        a, b, out = (torch.randn(_SIDE, _SIDE, device=self._device).to(dtype) for _ in range(3))
        return self._median(lambda: torch.mm(a, b, out=out))

    def _copy(self) -> float:
        source = torch.empty(_COPIED, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return self._median(lambda: target.copy_(source))

    def _median(self, run: Callable[[], object]) -> float:
        return statistics.median([self.time(run) for _ in range(23)][3:])

    def free_bytes(self) -> int | None:
        """What a contender may allocate."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]


Clock = HostClock | DeviceClock
T = TypeVar("T")


def clock_of(device: torch.device) -> Clock:
    """The clock for a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@dataclass
class Failure:
    """Why a contender has no result."""

    reason: str


def attempt(run: Callable[[], T]) -> T | Failure:
    """What a call returns, or, in one line, what it raised."""
    try:
        return run()
    # a contender is somebody else's code: whatever it raises is its result
    except Exception as error:  # noqa: BLE001
        words = str(error).strip().splitlines() or [""]
        return Failure(f"{type(error).__name__}: {words[0][:200]}")


def interleaved(
    clock: Clock,
    runs: dict[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    seconds: float = 0.0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each run, one of each per round, after one round of warm-up.

    Args:
        clock: measures.
        runs: by name of the contender.
        rounds: how many; None for as many as fit into `seconds`, within FEWEST and MOST.
        seconds: for all rounds together.

    Returns:
        Times by name, and the reason for each run that failed on the way.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    began = time.perf_counter()
    wanted = rounds
    done = 0
    while wanted is None or done <= wanted:
        for name, run in runs.items():
            if name in failed:
                continue
            _once(clock, name, run, times, failed)
        done += 1
        if wanted is None:
            # the first round is the warm-up and tells what the others will take
            took = time.perf_counter() - began
            wanted = int(min(MOST, max(FEWEST, seconds / max(took, 1e-6))))
    return {name: values[1:] for name, values in times.items() if name not in failed}, failed


def spread_out(
    clock: Clock, runs: dict[str, Callable[[], object]], counts: Mapping[str, int]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each run, so often as `counts` says, those of few calls evenly among those of many.

    There is no warm-up: what is timed was called before, to be checked.

    Args:
        clock: measures.
        runs: by name of the contender.
        counts: calls of each.

    Returns:
        Times by name, and the reason for each run that failed on the way.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    rounds = max(counts.values(), default=0)
    for number in range(rounds):
        for name, run in runs.items():
            due = (number + 1) * counts[name] // rounds > number * counts[name] // rounds
            if name in failed or not due:
                continue
            _once(clock, name, run, times, failed)
    return {name: values for name, values in times.items() if name not in failed}, failed


def _once(
    clock: Clock,
    name: str,
    run: Callable[[], object],
    times: dict[str, list[float]],
    failed: dict[str, str],
) -> None:
    found = attempt(lambda: clock.time(run))
    if isinstance(found, Failure):
        failed[name] = found.reason
    else:
        times[name].append(found)


def tensors(value: object) -> Iterable[Tensor]:
    """The tensors in a value, however it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)
