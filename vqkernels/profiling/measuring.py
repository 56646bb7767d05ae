"""Our ops beside their peers at a few shapes: checked, timed in turns, and set against what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from vqkernels.checks import check_choice, check_count, refuse
from vqkernels.dispatch import BACKENDS
from vqkernels.ops import OPS, nearest_code
from vqkernels.profiling import memory
from vqkernels.profiling.checked import Checked, check, guessed_seconds, too_large, turning
from vqkernels.profiling.layers import layers
from vqkernels.profiling.machine import Record, Shape, facts, moved_bytes, operations
from vqkernels.profiling.oracle import Oracle
from vqkernels.profiling.peers import OURS, Contender, bind, missing, versions
from vqkernels.profiling.searches import searches
from vqkernels.profiling.steps import Steps
from vqkernels.profiling.timing import Clock, Failure, Floors, attempt, clock_of, interleaved, spread_out

CASES = ("search", "layer")
# the op that decides whether a backend of ours can run a case
_OP = {"search": "nearest_code", "layer": "directional_backward"}
# of the time that a shape has: the longest call of a peer, and what timing may take
_LONGEST, _TIMED = 0.1, 0.4
# seconds for the calls of one contender, and how many there are on a host
_EACH, _FEWEST, _MOST = 1.0, 3, 25
# rows that tell what a call of all will take, at least
_LEAST = 512
# seconds of a call from which on there is no second one
_LONG = 1.0
# seconds that a compiler may take, and that the reference may take for all rows
_COMPILE, _WHOLE = 20.0, 3.0
# inputs that calls go through in turn on a GPU
_SETS = 4


@dataclass(frozen=True)
class Measurement:
    """One contender at one shape.

    Attributes:
        case: "search", or "layer" for forward and backward.
        shape: N, K, D. dtype: of x and codes.
        name: of the contender. ours: whether it is.
        ms, ms_min, ms_max: median, least and most of `rounds` calls that took turns with those of the others.
        flops: 2 N K D over the median, operations per second.
        bandwidth: bytes that must be moved at least over the median, per second.
        peak_share: of the highest rate of dot products measured here; None where nobody knows.
        intensity: operations per byte moved; of a contender that keeps a matrix of N K, with it written and read.
        extra_bytes: peak memory above inputs and outputs; None where it could not be measured.
        agreement: share of `agreement_rows` rows whose index is that of float64; None for a layer, whose values were
            held to float64 (ours) or to its codes (a peer's).
    """

    case: str
    shape: Shape
    dtype: str
    name: str
    ours: bool
    ms: float
    ms_min: float
    ms_max: float
    rounds: int
    flops: float
    bandwidth: float
    peak_share: float | None
    intensity: float
    extra_bytes: int | None = None
    agreement: float | None = None
    agreement_rows: int | None = None

    def to_dict(self) -> Record:
        """The attributes, as JSON has them."""
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Skip:
    """A contender that has no measurement.

    Attributes:
        case: "search", "layer", or "both". shape: N, K, D; None where it has no measurement at any.
        name: of the contender, or of what would have to be installed.
        reason: in one line.
        failed: it was called, and raised or gave a wrong result.
    """

    case: str
    shape: Shape | None
    name: str
    reason: str
    failed: bool = False


@dataclass
class Benchmark:
    """What was measured.

    Attributes:
        device: it ran on. dtype: of x and codes.
        floors: rates of dot products and copies that this device reached in the same process.
        facts: versions and names of the machine.
        measurements, skipped: in the order they were made.
    """

    device: torch.device
    dtype: torch.dtype
    floors: Floors = field(default_factory=Floors)
    facts: Record = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def to_dict(self) -> Record:
        """Everything, as JSON has it; rates in operations and bytes per second."""
        return {
            "facts": self.facts,
            "device": str(self.device),
            "dtype": _name(self.dtype),
            "peak_flops": self.floors.flops,
            "peak_flops_by_kind": dict(self.floors.kinds),
            "copy_bandwidth": self.floors.bandwidth,
            "measurements": [each.to_dict() for each in self.measurements],
            "skipped": [asdict(each) for each in self.skipped],
        }


def benchmark(
    cases: Sequence[tuple[str, Shape]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    backends: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    seconds: float = 45.0,
    clock: Clock | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> Benchmark:
    """Check contenders against float64, time them in turns, and measure what each takes of memory.

    Args:
        cases: "search" or "layer" with N, K, D.
        device, dtype: of x and codes.
        backends: of ours; one that cannot run here is among the skipped. The compiled ones, and on a CPU the reference
            of the search, when left out.
        peers: parts of names of peers, such as "faiss" or "cdist"; all that are installed when left out.
        seconds: about, for everything; a peer whose calls would take too much of it is skipped.
        clock: of the device when left out.
        tell: is called with a line of words before each case.

    Raises:
        ValueError: a case, backend or peer is unknown, a size is below 1, or a shape does not fit into memory.
    """
    for case, shape in cases:
        check_choice("benchmark", "case", case, CASES)
        for size, name in zip(shape, "NKD", strict=True):
            check_count("benchmark", name, size, minimum=1)
    for name in backends or ():
        check_choice("benchmark", "backend", name, BACKENDS)
    made = Benchmark(device, dtype, facts=facts(device) | {"peers": versions()})
    began = time.perf_counter()
    clock = clock_of(device) if clock is None else clock
    _check_room(cases, clock)
    wanted = _wanted(made, cases, backends, peers)
    for number, (case, shape) in enumerate(cases):
        tell(f"{case} N={shape[0]} K={shape[1]} D={shape[2]} {_name(dtype)} on {made.facts['device']}")
        made.floors = made.floors.best(clock.floors(dtype))
        share = _part(seconds, time.perf_counter() - began, number, len(cases))
        _Case(made, clock, case, shape, backends, time.perf_counter() + share).run(wanted[case])
    return made


def _part(seconds: float, spent: float, number: int, count: int) -> float:
    """Seconds for the next of `count` cases: an equal part of what is left, and half of its own whatever is left."""
    return max((seconds - spent) / (count - number), seconds / count / 2)


def _check_room(cases: Sequence[tuple[str, Shape]], clock: Clock) -> None:
    free = clock.free_bytes()
    for _, (n, k, d) in cases:
        # rows, their gradient, what comes out and the codes, as they are drawn
        needs = 4 * (3 * n * d + 2 * k * d)
        if free is not None and needs > free:
            got = f"{n}x{k}x{d}, which takes {needs / 1e9:.3g} GB of {free / 1e9:.3g} GB free"
            refuse(ValueError, "benchmark", "shapes", "fit into memory", got, "Pass fewer rows or codes")


def _wanted(
    made: Benchmark,
    cases: Sequence[tuple[str, Shape]],
    backends: Sequence[str] | None,
    peers: Sequence[str] | None,
) -> dict[str, list[Contender]]:
    """Contenders of each case; those that cannot be here are noted."""
    found: dict[str, list[Contender]] = {}
    absent = missing(made.device)
    known: list[str] = list(absent)
    for case in dict.fromkeys(case for case, _ in cases):
        if backends is not None:
            reasons = OPS[_OP[case]].explain_for(made.device, (made.dtype,))
            for name in backends:
                if reasons[name] is not None:
                    made.skipped.append(Skip(case, None, f"{OURS} {name}", str(reasons[name])))
            able = [name for name in backends if reasons[name] is None]
        else:
            able = None
        table = (searches if case == "search" else layers)(made.device, made.dtype, backends=able)
        known += [each.name for each in table if not each.ours]
        # what takes a compiler comes last, with the time that is left
        found[case] = sorted(
            (each for each in table if each.ours or _named(each.name, peers)), key=lambda each: each.compiles
        )
    for name in peers or ():
        if not any(_named(each, [name]) for each in known):
            names = "; ".join(dict.fromkeys(known)) or "none"
            fix = "Pass a part of such a name"
            refuse(ValueError, "benchmark", "peers", f"be among those known here ({names})", repr(name), fix)
    case = "both" if len(found) > 1 else next(iter(found), "")
    made.skipped += [Skip(case, None, name, "not installed") for name in absent if _named(name, peers)]
    return found


def _named(name: str, parts: Sequence[str] | None) -> bool:
    return parts is None or any(part.lower() in name.lower() for part in parts)


class _Case:
    """One case at one shape."""

    def __init__(
        self,
        made: Benchmark,
        clock: Clock,
        case: str,
        shape: Shape,
        backends: Sequence[str] | None,
        until: float,
    ):
        self.made, self.clock, self.case, self.shape, self.until = made, clock, case, shape, until
        self.backends = backends
        n, k, d = shape
        on = made.device
        generator = torch.Generator(on).manual_seed(0)
        draw = partial(torch.randn, device=on, generator=generator)
        self.inputs = [draw(n, d).to(made.dtype) for _ in range(_SETS if on.type == "cuda" else 1)]
        self.codes, self.grad = draw(k, d).to(made.dtype), draw(n, d).to(made.dtype)

    def left(self) -> float:
        return self.until - time.perf_counter()

    def run(self, contenders: Sequence[Contender]) -> None:
        share = self.left()
        x = self.inputs[0]
        judge = self.judge(x)
        good: dict[str, Checked] = {}
        for contender in contenders:
            found = self.tried(contender, x, judge, share)
            if isinstance(found, Checked):
                good[contender.name] = found
            elif isinstance(found, Failure):
                self.skip(contender.name, found.reason, failed=True)
            else:
                self.skip(contender.name, found)
        self.time(good)

    def judge(self, x: Tensor) -> Oracle | Steps:
        if self.case == "layer":
            return Steps(x, self.codes, self.grad)
        search = partial(nearest_code, codebook=self.codes, backend="reference")
        whole = not x.is_cuda and guessed_seconds(self.clock, search, x, least=_LEAST) <= _WHOLE
        return Oracle(x, self.codes, whole=whole)

    def skip(self, name: str, reason: str, *, failed: bool = False) -> None:
        self.made.skipped.append(Skip(self.case, self.shape, name, reason, failed))

    def tried(
        self, contender: Contender, x: Tensor, judge: Oracle | Steps, share: float
    ) -> Checked | Failure | str:
        """The contender after a call that was right, or its failure, or why it is left out."""
        reason = too_large(contender, self.shape, self.clock.free_bytes())
        if reason is not None:
            return reason
        if contender.compiles and self.left() < _COMPILE:
            return f"no {_COMPILE:.0f} s left for a compiler"
        run = attempt(partial(bind, contender, self.codes, self.inputs, self.grad))
        if isinstance(run, Failure):
            return run
        # ours are measured, but for a reference that nobody asked for
        asked = contender.ours and ("reference" not in contender.name or self.backends is not None)
        if not asked and self.left() <= 0:
            return "no time left (more with --seconds)"
        if not asked and not x.is_cuda:
            took = guessed_seconds(self.clock, run, x, least=_LEAST, tries=3)
            if took > _LONGEST * share:
                return f"a call would take about {took:.1f} s of the {share:.0f} s that this shape has (more with --seconds)"
        return attempt(partial(check, contender, run, x, judge))

    def time(self, good: dict[str, Checked]) -> None:
        runs = {name: turning(each.run, self.inputs) for name, each in good.items()}
        budget = _TIMED * max(0.0, self.left())
        if self.made.device.type == "cuda":
            times, failed = interleaved(self.clock, runs, seconds=min(budget, _EACH * len(runs)))
        else:
            each = min(_EACH, budget / max(1, len(good)))
            counts = {name: _rounds(found.seconds, each) for name, found in good.items()}
            times, failed = spread_out(self.clock, runs, counts)
        for name, reason in failed.items():
            self.skip(name, reason, failed=True)
        extra = self.extra_bytes([good[name] for name in times])
        for name, values in times.items():
            self.made.measurements.append(self.measurement(good[name], values, extra.get(name)))

    def extra_bytes(self, good: Sequence[Checked]) -> dict[str, int]:
        """Peak memory of each of which it is known."""
        names = [each.contender.name for each in good]
        found: dict[str, int | Failure | None]
        if self.made.device.type == "cuda":
            calls = {each.contender.name: partial(each.run, self.inputs[0]) for each in good}
            found = {name: attempt(partial(self.clock.extra_bytes, call)) for name, call in calls.items()}
        elif memory.supported() and names:
            left = max(10.0, self.left())
            found = dict(
                memory.extra_bytes(
                    self.case, self.shape, self.made.dtype, names, backends=self.able(), seconds=left
                )
            )
        else:
            found = {}
        return {name: value for name, value in found.items() if isinstance(value, int)}

    def able(self) -> list[str] | None:
        if self.backends is None:
            return None
        reasons = OPS[_OP[self.case]].explain_for(self.made.device, (self.made.dtype,))
        return [name for name in self.backends if reasons[name] is None]

    def measurement(self, found: Checked, times: Sequence[float], extra: int | None) -> Measurement:
        contender, median = found.contender, statistics.median(times)
        count = operations(self.shape)
        least = moved_bytes(self.case, self.shape, self.made.dtype.itemsize)
        matrix = contender.bytes_per_pair * self.shape[0] * self.shape[1]
        peak = self.made.floors.flops
        return Measurement(
            self.case,
            self.shape,
            _name(self.made.dtype),
            contender.name,
            contender.ours,
            median,
            min(times),
            max(times),
            len(times),
            flops=1e3 * count / median,
            bandwidth=1e3 * least / median,
            peak_share=None if peak is None else 1e3 * count / median / peak,
            intensity=count / (least + matrix),
            extra_bytes=extra,
            agreement=found.facts.get("agreement"),
            agreement_rows=found.facts.get("agreement_rows"),
        )


def _rounds(call: float, seconds: float) -> int:
    """Calls of one contender on a host, whose first took `call` seconds."""
    return 1 if call > _LONG else int(min(_MOST, max(_FEWEST, seconds / max(call, 1e-6))))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
