"""Time our ops beside their peers, in one process, interleaved, and only after their results were checked.

    python bench/run.py [--device cpu|cuda] [--dtypes bfloat16 ...] [--shapes N,K,D ...] [--out FILE.jsonl]

Prints a line per measurement and appends it to a file as JSON. Every speed is a ratio to a peer measured in the same
run. A contender that fails or is wrong is reported and not timed; where it is ours, the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import records
import torch
from oracle import Oracle, differing
from peers import OURS, Contender, Layer, layers, missing, searches, step, versions
from timing import CAPTURED, Clock, Failure, Floors, attempt, clock_of, interleaved
from torch import Tensor

import vqkernels as vq

Shape = tuple[int, int, int]

ON_CPU = [(65536, 1024, 64), (16384, 8192, 256), (65536, 512, 8)]
# VQ-VAE, VQGAN twice, an ImageNet tokenizer, a million rows, a small batch, projected codes; the last for the curve
ON_CUDA = [
    (65536, 1024, 64),
    (65536, 8192, 256),
    (1048576, 1024, 512),
    (131072, 65536, 32),
    (32768, 16384, 256),
    (2048, 16384, 256),
    (65536, 512, 8),
]
SEARCHED_ONLY = [(16384, 1048576, 64)]
# a search that does not promise the float64 argmin must find it for most rows to be one
PLAUSIBLE = 0.5
# sets of inputs that calls go through in turn
SETS = 4
# medians below this are also measured as replays of a graph, milliseconds
SHORT = 1.0
# seconds of a single call of a peer that leave no time to measure it, where they are much of the case's
SLOW = 2.0
# rows of the count of disagreements, and the codes they meet
COUNTED, COUNTED_AT = 10_000_000, (1024, 64)
# what that may take of each dtype's time
COUNT_SECONDS = 12.0


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
        cases = [(case, dtype, shape) for dtype in options.dtypes for case, shape in self.shapes()]
        counting = self.device.type == "cuda" and "agreement" in options.cases
        kept = COUNT_SECONDS * len(options.dtypes) if counting else 0.0
        for number, (case, dtype, shape) in enumerate(cases):
            self.number = number
            self.floors = self.clock.floors(dtype) if number == options.first else self.floors
            if number == options.first and self.floors.flops is not None:
                self.tell_floors()
            if number < options.first:
                continue
            if self.left() <= kept:
                self.skip(f"{case} {dtype} {shape}", "no time left")
                continue
            self.case(case, dtype, shape, (self.left() - kept) / (len(cases) - number))
        if counting:
            for dtype in options.dtypes:
                self.count(dtype)
        for words in self.failures:
            print(words)
        print(f"{len(self.skipped)} skipped, {len(self.failures)} failed; wrote to {options.out}")
        return 1 if any(words.startswith(f"FAILED {OURS}") for words in self.failures) else 0

    def shapes(self) -> list[tuple[str, Shape]]:
        """Cases in the order they are measured."""
        given = self.options.shapes or (ON_CUDA if self.device.type == "cuda" else ON_CPU)
        found = [
            (case, shape) for shape in given for case in ("search", "layer") if case in self.options.cases
        ]
        if not self.options.shapes and self.device.type == "cuda" and "search" in self.options.cases:
            found += [("search", shape) for shape in SEARCHED_ONLY]
        return found

    def tell_floors(self) -> None:
        floors = self.floors
        print(
            f"{self.facts['device']}, torch {self.facts['torch']}, triton {self.facts['triton']}: "
            f"{floors.flops / 1e12:.0f} TFLOP/s, {floors.bandwidth / 1e12:.2f} TB/s, "
            f"a launch {1e3 * floors.launch_ms:.1f} us, in a graph {1e3 * floors.replay_ms:.1f} us"
        )

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
        oracle = Oracle(inputs[0], codes)
        good: dict[str, tuple[Contender, Search]] = {}
        extra: dict[str, records.Record] = {}
        for contender in self.contenders(case, dtype):
            reason = self.why_not(contender, shape, share - (time.perf_counter() - began))
            if reason is not None:
                self.skip(contender.name, f"{where}: {reason}")
                continue
            found = attempt(lambda contender=contender: self.bind(case, contender, codes, inputs, grad))
            took = 0.0
            if not isinstance(found, Failure):
                extra[contender.name] = {}
                checking = time.perf_counter()
                checked = attempt(partial(self.check, case, contender, found, inputs[0], oracle, extra))
                took = time.perf_counter() - checking
                found = checked if isinstance(checked, Failure) else found
            if isinstance(found, Failure):
                self.fail(contender, where, found.reason)
            elif took > max(SLOW, share / 5) and not (contender.ours or contender.compiles):
                self.skip(contender.name, f"{where}: one call took {took:.1f} s, the case has {share:.0f} s")
            else:
                good[contender.name] = (contender, found)
        self.time(case, dtype, shape, good, inputs, extra, share - (time.perf_counter() - began))

    def contenders(self, case: str, dtype: torch.dtype) -> list[Contender]:
        table = searches if case == "search" else layers
        found = [each for each in table(self.device, dtype) if self.options.only in each.name]
        return [each for each in found if not each.name.startswith(tuple(self.options.avoid))]

    def why_not(self, contender: Contender, shape: Shape, left: float) -> str | None:
        """Why a contender is not even tried, or None."""
        free = self.clock.free_bytes()
        needs = contender.bytes_per_pair * shape[0] * shape[1]
        if free is not None and needs > 0.8 * free:
            return f"it would need {needs / 1e9:.0f} GB of {free / 1e9:.0f} GB"
        if contender.compiles and (self.options.no_compile or left < 8):
            return "no time to compile"
        return None if contender.ours or left > 0 else "no time left"

    def bind(
        self, case: str, contender: Contender, codes: Tensor, inputs: Sequence[Tensor], grad: Tensor
    ) -> Search:
        """What is called with x."""
        made = contender.make(codes, inputs)
        return (lambda x: step(made, x, grad)) if isinstance(made, Layer) else made

    def check(
        self, case: str, contender: Contender, run: Search, x: Tensor, oracle: Oracle, extra: dict
    ) -> None:
        """Run once, compare with float64; raises where the result is not what was promised."""
        if case == "search":
            share = oracle.agreement(run(x))
            extra[contender.name]["agreement"] = share
            least = 1.0 if contender.exact else PLAUSIBLE
            if share < least:
                raise ValueError(f"equals float64 on {share:.4%} of the checked rows")
        else:
            z, *grads = run(x)
            if z.shape != x.shape or not all(t.isfinite().all() for t in (z, *grads)):
                raise ValueError("output or gradient of another shape, or not finite")
            # the points of a dithered curve are another matter, for the tests
            if contender.ours and not contender.name.endswith("sf_diveq"):
                oracle.check_step(z)

    def time(
        self,
        case: str,
        dtype: torch.dtype,
        shape: Shape,
        good: dict[str, tuple[Contender, Search]],
        inputs: Sequence[Tensor],
        extra: dict[str, records.Record],
        seconds: float,
    ) -> None:
        where = f"{case} {shape} {dtype}"
        # inputs rotate: a call does not find what the call before it read
        runs = {name: turning(run, inputs) for name, (_, run) in good.items()}
        rounds = self.options.rounds
        if rounds is not None and case == "layer":
            rounds = max(3, rounds // 2)
        times, failed = interleaved(self.clock, runs, rounds=rounds, seconds=0.7 * max(seconds, 0))
        for name, reason in failed.items():
            self.fail(good[name][0], where, reason)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours = [
            medians[name] for name in times if good[name][0].ours and (case == "layer" or good[name][0].exact)
        ]
        over = min(ours or medians.values(), default=1.0)
        for name, values in times.items():
            contender, run = good[name]
            extra[name] |= self.beside(contender, run, inputs, medians[name], where)
            found = records.measurement(
                case,
                shape,
                dtype,
                name,
                values,
                floors=self.floors,
                over=over,
                extra=extra[name] | self.facts,
            )
            records.append(self.options.out, [found])
            print(records.line(found), flush=True)

    def beside(
        self, contender: Contender, run: Search, inputs: Sequence[Tensor], median: float, where: str
    ) -> records.Record:
        """Peak memory, and for short calls the time of graph replays beside the launch floor."""
        found: records.Record = {
            "launch_floor_ms": self.floors.launch_ms,
            "replay_floor_ms": self.floors.replay_ms,
            "tensor_floor_tflops": None if self.floors.flops is None else round(self.floors.flops / 1e12, 1),
            "hbm_tbs": None if self.floors.bandwidth is None else round(self.floors.bandwidth / 1e12, 3),
        }
        extra = attempt(lambda: self.clock.extra_bytes(lambda: run(inputs[0])))
        if isinstance(extra, Failure):
            self.fail(contender, where, f"memory: {extra.reason}")
        elif extra is not None:
            found["extra_mb"] = round(extra / 1e6, 3)
            # N D itemsize bytes are one
            found["extra_latents"] = round(extra / inputs[0].nbytes, 3)
        if contender.captured and median < SHORT:
            called = turning(run, inputs)
            replayed = attempt(lambda: self.clock.replayed([called] * CAPTURED, 15))
            if isinstance(replayed, Failure):
                self.fail(contender, where, f"graph: {replayed.reason}")
            elif replayed is not None:
                found["graph_ms"] = round(replayed, 5)
        return found

    def count(self, dtype: torch.dtype) -> None:
        """Rows on which our exact searches differ from the float64 reference, of many."""
        k, d = COUNTED_AT
        codes = torch.randn(k, d, device=self.device).to(dtype)
        counted = [each for each in self.contenders("search", dtype) if each.ours and each.exact]
        wrong = dict.fromkeys((each.name for each in counted), 0)
        rows, where = 0, f"agreement {str(dtype).removeprefix('torch.')}"
        while rows < COUNTED and self.left() > 0 and wrong:
            x = torch.randn(1 << 20, d, device=self.device).to(dtype)
            expected = vq.nearest_code(x, codes, backend="reference").indices
            for contender in counted:
                if contender.name in wrong:
                    found = attempt(partial(differing, contender, x, codes, expected))
                    if isinstance(found, Failure):
                        del wrong[contender.name]
                        self.fail(contender, where, found.reason)
                    else:
                        wrong[contender.name] += found
            rows += len(x)
        for contender in counted:
            number = wrong.get(contender.name)
            if number is None:
                continue
            if not rows:
                self.skip(contender.name, f"{where}: no time left")
                continue
            print(f"{where}: {contender.name} differs from float64 on {number} of {rows} rows")
            record = {"case": "agreement", "shape": [rows, k, d], "dtype": str(dtype).removeprefix("torch.")}
            record |= {"name": contender.name, "rows_wrong": number, **self.facts}
            records.append(self.options.out, [record])
            if number:
                self.fail(contender, where, f"{number} of {rows} rows differ from float64")


Search = Callable[[Tensor], object]


def turning(run: Search, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Calls of `run` with one input after the other."""
    turn = cycle(inputs)
    return lambda: run(next(turn))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="bfloat16 on cuda, float32 on the cpu")
    parser.add_argument("--shapes", nargs="+", type=sizes)
    cases = ("search", "layer", "agreement")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--avoid", nargs="+", default=[], help="contenders whose name begins like this")
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--rounds", type=int, help="7 on the cpu; on cuda as many as the time allows")
    parser.add_argument("--budget", type=float, help="seconds; 240 on cuda, no limit on the cpu")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile would take long for"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.dtypes = [dtypes[name] for name in options.dtypes or [("bfloat16" if cuda else "float32")]]
    options.budget = options.budget or (240.0 if cuda else float("inf"))
    options.rounds = options.rounds or (None if cuda else 7)
    options.out = options.out or Path(__file__).parent / "results" / f"{options.device}.jsonl"
    return options


def main() -> None:
    """Measure and exit with the status."""
    raise SystemExit(Bench(parse()).go())


if __name__ == "__main__":
    main()
