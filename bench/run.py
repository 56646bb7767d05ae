"""Time our ops beside their peers, in one process, interleaved, and only after their results were checked.

    python bench/run.py [--device cpu|cuda] [--dtypes bfloat16 ...] [--shapes N,K,D ...] [--isas avx2 ...] [--out FILE.jsonl]

Prints a line per measurement and appends it to a file as JSON. Every speed is a ratio to a peer measured in the same
run. A contender that fails or is wrong is reported and not timed; where it is ours, the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial

import counting
import options as command_line
import records
import summary
import torch
from options import Shape, parse
from torch import Tensor

from vqkernels import native
from vqkernels.profiling import memory
from vqkernels.profiling.checked import Call, Checked, check, guessed_seconds, too_large, turning
from vqkernels.profiling.layers import layers
from vqkernels.profiling.oracle import Oracle
from vqkernels.profiling.peers import OURS, Contender, bind, missing, versions
from vqkernels.profiling.searches import searches
from vqkernels.profiling.steps import Steps
from vqkernels.profiling.timing import (
    CAPTURED,
    Clock,
    Failure,
    Floors,
    attempt,
    clock_of,
    interleaved,
    spread_out,
)

# sets of inputs that calls go through in turn
SETS = 4
# medians below this are also measured as replays of a graph, milliseconds
SHORT = 1.0
# seconds of a single call of a peer that leave no time to measure it, where they are much of the case's; on a CPU,
# where there is no such share, seconds from which on one round must do
SLOW = 2.0
# from so many on, the call that was checked is the measurement; of those that a run is judged by
LONG, LONGEST = 10.0, 40.0
# rounds of a long call that a run is judged by, and rounds on a CPU
TWICE, FEWEST, MOST = 2, 3, 25
# processes that want to run, per thread of ours, from which on a word is due
BUSY = 0.5


class Bench:
    """One run: its device, its clock, what it wrote and what went wrong."""

    def __init__(self, options: argparse.Namespace, clock: Clock | None = None):
        self.options = options
        self.device = torch.device(options.device)
        self.clock = clock_of(self.device) if clock is None else clock
        self.facts = records.facts(self.device) | {"peers": versions()}
        self.began = time.perf_counter()
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self.floors = Floors()
        self.isa_floors: dict[str, Floors] = {}
        self.measured: list[records.Record] = []
        # of every record that follows
        self.tags: records.Record = {}
        self.number = 0
        for name in self.options.avoid:
            self.failures.append(f"FAILED {name}: the device was lost, and it was left out from then on")

    def left(self) -> float:
        """Seconds of the budget that are left; without one there is no end."""
        return self.options.budget - (time.perf_counter() - self.began)

    def go(self) -> int:
        """Measure every case and return the exit status."""
        options = self.options
        for name in missing(self.device):
            print(f"{name} is not installed: skipped")
        for isa in options.unsupported:
            print(f"{isa} is no instruction set that was built and that this CPU has: skipped")
        self.tell_load()
        # one that goes on after another keeps what that one wrote
        if options.fresh and not options.avoid:
            options.out.unlink(missing_ok=True)
        planned = command_line.cases(options)
        cases = [(case, dtype, shape) for dtype in options.dtypes for case, shape in planned]
        counts = self.device.type == "cuda" and "agreement" in options.cases
        kept = counting.SECONDS * len(options.dtypes) if counts else 0.0
        for number, (case, dtype, shape) in enumerate(cases):
            self.number = number
            if number < options.first:
                continue
            if number == options.first or self.device.type == "cpu":
                self.measure_floors(dtype)
            if self.left() <= kept:
                self.skip(f"{case} {dtype} {shape}", "no time left")
                continue
            self.case(case, dtype, shape, (self.left() - kept) / (len(cases) - number))
        if counts:
            for dtype in options.dtypes:
                counting.count(self, dtype)
        summaries = summary.summaries(self.measured, self.facts)
        records.append(options.out, summaries)
        for each in summaries:
            print(summary.line(each))
        for words in self.failures:
            print(words)
        print(f"{len(self.skipped)} skipped, {len(self.failures)} failed; wrote to {options.out}")
        return 1 if any(words.startswith(f"FAILED {OURS}") for words in self.failures) else 0

    def tell_load(self) -> None:
        """A warning where others compute on the same cores."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.facts["load"] = round(load, 2)
        if self.device.type == "cpu" and load > BUSY * torch.get_num_threads():
            print(
                f"other processes are busy here (load {load:.1f}): times will be too long, and ratios may be off"
            )

    def measure_floors(self, dtype: torch.dtype) -> None:
        """What the device can do at most, and what the instruction sets can that ours are forced to.

        On a CPU it is measured anew for every case, and the best counts: others may use it at the same time.
        """
        first = self.floors.flops is None
        self.floors = self.floors.best(self.clock.floors(dtype))
        before = native.facts().get("isa")
        for isa in self.options.isas:
            native.set_isa(isa)
            self.isa_floors[isa] = self.isa_floors.get(isa, Floors()).best(self.clock.floors(dtype))
            native.set_isa(str(before))
        if first and self.floors.flops is not None:
            print(records.floors_line(self.floors, self.facts))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"skipped {name}: {reason}")
        print(f"  {self.skipped[-1]}", flush=True)

    def fail(self, contender: Contender, where: str, reason: str) -> None:
        told = f"{contender.name} at {where}: {reason}"
        if contender.ours:
            self.failures.append(f"FAILED {told}")
            print(f"  {self.failures[-1]}", flush=True)
        else:
            self.skip(contender.name, f"{where}: {reason}")
        if self.device.type == "cuda" and isinstance(attempt(torch.cuda.synchronize), Failure):
            self.restart(contender)

    def restart(self, contender: Contender) -> None:
        """Go on in a new process, for a device that is lost is lost for this one; without whom it was lost with."""
        name = " ".join(contender.name.split()[:2]) if contender.ours else contender.name
        print(f"  the device is lost: going on in a new process without {name}", flush=True)
        words = [
            "--avoid",
            *self.options.avoid,
            name,
            "--first",
            str(self.number),
            "--budget",
            f"{self.left():.0f}",
        ]
        os.execv(sys.executable, [sys.executable, *sys.argv, *words])

    def case(self, case: str, dtype: torch.dtype, shape: Shape, share: float) -> None:
        """Check every contender, time the good ones, write what was measured; `share` is in seconds."""
        n, k, d = shape
        began = time.perf_counter()
        where = f"{case} N={n} K={k} D={d} {str(dtype).removeprefix('torch.')}"
        print(where, flush=True)
        torch.manual_seed(0)
        sets = SETS if self.device.type == "cuda" else 1
        inputs = [torch.randn(n, d, device=self.device).to(dtype) for _ in range(sets)]
        codes = torch.randn(k, d, device=self.device).to(dtype)
        grad = torch.randn(n, d, device=self.device).to(dtype)
        oracle, steps = Oracle(inputs[0], codes), Steps(inputs[0], codes, grad)
        good: dict[str, Checked] = {}
        for contender in self.contenders(case, dtype):
            reason = self.why_not(contender, shape, share - (time.perf_counter() - began))
            if reason is not None:
                self.skip(contender.name, f"{where}: {reason}")
                continue
            run = attempt(partial(bind, contender, codes, inputs, grad))
            if not isinstance(run, Failure):
                reason = self.too_slow(contender, run, inputs[0])
                if reason is not None:
                    self.skip(contender.name, f"{where}: {reason}")
                    continue
                run = attempt(
                    partial(check, contender, run, inputs[0], oracle if case == "search" else steps)
                )
            if isinstance(run, Failure):
                self.fail(contender, where, run.reason)
            elif run.seconds > max(SLOW, share / 5) and not (contender.ours or contender.compiles):
                self.skip(
                    contender.name, f"{where}: one call took {run.seconds:.1f} s, the case has {share:.0f} s"
                )
            else:
                good[contender.name] = run
        self.time(case, dtype, shape, good, inputs, share - (time.perf_counter() - began))

    def contenders(self, case: str, dtype: torch.dtype) -> list[Contender]:
        """Whom the command line leaves of all that can be measured here."""
        options = self.options
        table = (searches if case == "search" else layers)(self.device, dtype, options.isas)
        found = [each for each in table if any(part in each.name for part in options.only)]
        found = [each for each in found if options.names is None or each.name in options.names]
        return [each for each in found if not each.name.startswith(tuple(options.avoid))]

    def why_not(self, contender: Contender, shape: Shape, left: float) -> str | None:
        """Why a contender is not even tried, or None."""
        reason = too_large(contender, shape, self.clock.free_bytes())
        if reason is not None:
            return reason
        if shape[0] * shape[1] > contender.most_pairs and self.options.names is None:
            return "its calls take too long at this size for a default run; --names asks for it"
        if contender.compiles and (self.options.no_compile or left < 8):
            return "no time to compile"
        return None if contender.ours or left > 0 else "no time left"

    def too_slow(self, contender: Contender, run: Call, x: Tensor) -> str | None:
        """On a CPU, why a peer is not asked for all rows, from what some of them took; or None."""
        if self.device.type == "cuda":
            return None
        # also for ours, whose first call it is
        seconds = guessed_seconds(self.clock, run, x)
        # ours must be measured, but for the reference
        if contender.ours and "reference" not in contender.name:
            return None
        if seconds <= self.options.cutoff:
            return None
        return f"a call would take about {seconds:.0f} s, more than {self.options.cutoff:.0f} s"

    def time(
        self,
        case: str,
        dtype: torch.dtype,
        shape: Shape,
        good: dict[str, Checked],
        inputs: Sequence[Tensor],
        seconds: float,
    ) -> None:
        """Time the contenders, and record what was seen of each."""
        where = f"{case} {shape} {dtype}"
        # inputs rotate: a call does not find what the call before it read
        runs = {name: turning(each.run, inputs) for name, each in good.items()}
        if self.device.type == "cuda":
            rounds = self.options.rounds
            rounds = max(3, rounds // 2) if rounds is not None and case == "layer" else rounds
            times, failed = interleaved(self.clock, runs, rounds=rounds, seconds=0.7 * max(seconds, 0))
        else:
            times, failed = spread_out(self.clock, runs, {name: self.rounds(good[name]) for name in good})
        for name, reason in failed.items():
            self.fail(good[name].contender, where, reason)
        for name, values in times.items():
            values += [] if values else [1e3 * good[name].seconds]
        medians = {name: statistics.median(values) for name, values in times.items()}
        bases = {name: median for name, median in medians.items() if is_base(good[name].contender, case)}
        self.measure_memory(case, dtype, shape, [good[name] for name in times], inputs)
        for name, values in times.items():
            facts = good[name].facts | self.beside(good[name], inputs, medians[name], where)
            found = records.measurement(
                case,
                shape,
                dtype,
                name,
                values,
                floors=self.floors,
                over=base_of(name, case, bases, medians),
                extra=facts | self.tags | self.facts,
            )
            self.measured.append(found)
            records.append(self.options.out, [found])
            print(records.line(found), flush=True)

    def rounds(self, checked: Checked) -> int:
        """Rounds of a contender on a CPU: what fits into its time, few or none more where a call is long."""
        # a ratio that a run is judged by is never that of a single call
        judged = checked.contender.ours or checked.contender.name in summary.SEARCHES + summary.LAYERS
        if checked.seconds > (LONGEST if judged else LONG) and self.options.rounds is None:
            return 0
        if checked.seconds > LONG and self.options.rounds is None:
            return TWICE
        if checked.seconds > SLOW and not judged:
            return 1 if self.options.rounds is None else min(self.options.rounds, 2)
        if self.options.rounds is not None:
            return self.options.rounds
        return int(min(MOST, max(FEWEST, self.options.each / checked.seconds)))

    def measure_memory(
        self, case: str, dtype: torch.dtype, shape: Shape, good: Sequence[Checked], inputs: Sequence[Tensor]
    ) -> None:
        """Peak memory of every contender, of one more call; where the clock cannot tell, by another process."""
        where = f"{case} {shape} {dtype}"
        if self.options.no_memory:
            return
        found = {each.contender.name: attempt(partial(self.peak, each, inputs[0])) for each in good}
        untold = [name for name, extra in found.items() if extra is None]
        if untold and self.device.type == "cpu" and memory.supported():
            found |= memory.extra_bytes(case, shape, dtype, untold, self.options.isas)
        for each in good:
            extra = found[each.contender.name]
            if isinstance(extra, Failure):
                self.fail(each.contender, where, f"memory: {extra.reason}")
            elif extra is not None:
                each.facts["extra_mb"] = round(extra / 1e6, 3)
                # N D itemsize bytes are one
                each.facts["extra_latents"] = round(extra / inputs[0].nbytes, 3)

    def peak(self, each: Checked, x: Tensor) -> int | None:
        return self.clock.extra_bytes(lambda: each.run(x))

    def beside(self, checked: Checked, inputs: Sequence[Tensor], median: float, where: str) -> records.Record:
        """What the device can do at most, and for short calls the time of graph replays."""
        found = records.floor_fields(self.floors)
        contender = checked.contender
        if contender.isa is not None:
            found["isa_floor_tflops"] = records.tera(self.isa_floors[contender.isa].flops)
        if contender.captured and median < SHORT:
            called = turning(checked.run, inputs)
            replayed = attempt(lambda: self.clock.replayed([called] * CAPTURED, 15))
            if isinstance(replayed, Failure):
                self.fail(contender, where, f"graph: {replayed.reason}")
            elif replayed is not None:
                found["graph_ms"] = round(replayed, 5)
        return found


def is_base(contender: Contender, case: str) -> bool:
    """Whether it is one of ours that others are compared with: whole, in the best instruction set, and exact."""
    whole = contender.ours and contender.isa is None and not contender.prepared
    return whole and (case == "layer" or contender.exact)


def base_of(name: str, case: str, bases: dict[str, float], medians: dict[str, float]) -> float:
    """The median that one is compared with: of ours that do what it does; without any, the least of all."""
    alike = [ms for ours, ms in bases.items() if case == "search" or summary.alike(ours, name)]
    return min(alike or bases.values() or medians.values())


def main() -> None:
    """Measure and exit with the status."""
    raise SystemExit(Bench(parse()).go())


if __name__ == "__main__":
    main()
