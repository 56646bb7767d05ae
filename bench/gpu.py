"""Everything there is to do on a GPU machine, in one call: build, test, sanitize, measure.

    python3 bench/gpu.py [--seconds 520]        (`make gpu`)

Uses the machine's own Python, torch, triton and nvcc, and no network. Every step has a time limit and a log; one that
fails or runs out of time does not stop the others. Logs, measurements and the figure go to $OUT, else to
bench/results; the exit status is the number of steps that failed, and the table of measurements is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
# of a log that is shown where a step failed
SHOWN_LINES, SHOWN_WIDTH = 25, 180


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: for people.
        command: program and arguments; `{seconds}` in one becomes the time the step has, less `spare`.
        log: file of the output folder that its output is added to.
        limit: most seconds it may take.
        reserve: seconds that steps before it must leave for it.
        spare: seconds that a command told to finish by itself gets on top.
        optional: without time for it, it is left out and that is no failure.
        environment: added to that of this process.
    """

    name: str
    command: Sequence[str | Path]
    log: str
    limit: float
    reserve: float = 0.0
    spare: float = 0.0
    optional: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step ended: status 0, another exit status, or why there is none."""

    name: str
    seconds: float
    status: int | str

    @property
    def failed(self) -> bool:
        """Whether it counts."""
        return self.status != 0 and not str(self.status).startswith("left out")


def run_step(step: Step, seconds: float, out: Path) -> Outcome:
    """Run one command for at most so long, its output into its log; ends what is left of it afterwards."""
    began = time.monotonic()
    told_seconds = f"{max(1.0, seconds - step.spare):.0f}"
    command = [str(word).replace("{seconds}", told_seconds) for word in step.command]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
    # children that stand elsewhere find the package too
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with (out / step.log).open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # started behind a shell's back, it would be deaf to the request to end
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        except OSError as error:
            log.write(f"{error}\n")
            return Outcome(step.name, 0.0, f"could not start: {error.strerror}")
        try:
            status: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            end(process)
    return Outcome(step.name, time.monotonic() - began, status)


def end(process: subprocess.Popen) -> None:
    """End a process and all it started, which are a group of their own."""
    if process.poll() is None:
        # asked like this, pytest still tells what failed so far
        process.send_signal(signal.SIGINT)
        waited(process, 8)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        waited(process, 3)
    process.wait()


def waited(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ended within so long."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_steps(steps: Sequence[Step], seconds: float, out: Path) -> list[Outcome]:
    """Run all steps within so many seconds, and tell how each ended and, where it failed, the end of its log."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = []
    for number, step in enumerate(steps):
        later = sum(each.reserve for each in steps[number + 1 :])
        allowed = min(step.limit, deadline - time.monotonic() - later)
        if allowed < max(2.0, step.reserve if step.optional else 0.0):
            outcomes.append(Outcome(step.name, 0.0, "left out: no time" if step.optional else "no time left"))
            print(f"{step.name}: {outcomes[-1].status}", flush=True)
            continue
        before = size(out / step.log)
        outcome = run_step(step, allowed, out)
        outcomes.append(outcome)
        print(told(outcome), flush=True)
        if outcome.failed:
            print(f"--- the end of {step.log}")
            print(tail(out / step.log, before))
            print("---", flush=True)
    return outcomes


def told(outcome: Outcome) -> str:
    """One line on an outcome."""
    words = {0: "ok"}.get(
        outcome.status, f"FAILED: {outcome.status}" if outcome.failed else str(outcome.status)
    )
    return f"{outcome.name}: {words} ({outcome.seconds:.0f} s)"


def size(path: Path) -> int:
    """Bytes of a file that may not be there."""
    return path.stat().st_size if path.exists() else 0


def tail(path: Path, start: int) -> str:
    """The last lines of what a step added to its log."""
    with path.open("rb") as log:
        log.seek(max(start, size(path) - 20_000))
        lines = log.read().decode("utf-8", "replace").splitlines()
    return "\n".join(line[:SHOWN_WIDTH] for line in lines[-SHOWN_LINES:])


def sanitizer() -> str:
    """Where compute-sanitizer is: on PATH, or in the toolkit of nvcc."""
    found = shutil.which("compute-sanitizer")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(Path(nvcc).resolve().parent / "compute-sanitizer")
    return found or next((str(place) for place in places if place.is_file()), "compute-sanitizer")


def pytest_options(processes: int) -> list[str]:
    """Plugins that are there and needed; others of the machine stay out, for warnings are errors."""
    options: list[str] = []
    if find_spec("xdist") is not None and processes > 1:
        options += ["-p", "xdist.plugin", "-n", str(processes), "--dist", "worksteal"]
    if find_spec("pytest_timeout") is not None:
        # a kernel that hangs must not take the other tests with it
        options += ["-p", "pytest_timeout", "--timeout", "100", "--timeout-method", "thread"]
    return options


def plan(out: Path, measurements: Path) -> list[Step]:
    """The steps, in order."""
    python = sys.executable
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    setup = [python, "setup.py", "build_ext", "--inplace"]
    tests = [
        python,
        "-m",
        "pytest",
        "python_tests",
        "-m",
        "not slow",
        "--tb",
        "short",
        *pytest_options(processes),
        # the build did it
        "--deselect",
        "python_tests/test_build.py::test_cuda_compiles_for_every_arch",
    ]
    small = [python, BENCH / "every_op.py", "--seconds", "{seconds}"]
    # what torch itself is told by the driver is not ours; a cache would hide accesses beyond a tensor
    checked = [sanitizer(), "--target-processes", "application-only", "--report-api-errors", "no"]
    checked += ["--error-exitcode", "9", "--print-limit", "20"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = [python, BENCH / "run.py", "--device", "cuda", "--budget", "{seconds}", "--out", measurements]
    others = [*run, "--no-compile", "--dtypes", "float32", "float16"]
    on_cuda = {
        "VQKERNELS_TEST_DEVICE": "cuda",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "2",
    }
    steps = [
        Step("build", setup, "gpu-build.log", 150, environment={"VQKERNELS_BUILD": "cuda"}),
        Step("info", [python, "-m", "vqkernels", "info"], "gpu-build.log", 30, 5),
    ]
    # a backend that loses the device must not take the other one with it
    backends = ("triton", "native")
    for backend in backends:
        command = [*small, "--backends", backend]
        steps.append(Step(f"small shapes, {backend}", command, "gpu-sanitize.log", 40, 12, 5))
    steps.append(Step("tests on cuda", tests, "gpu-tests.log", 150, 70, environment=on_cuda))
    # so much to spare, because a sanitizer slows the start down too
    for tool in ("memcheck", "racecheck"):
        for backend in backends:
            command = [*checked, "--tool", tool, *small, "--backends", backend]
            name = f"{tool}, {backend}"
            steps.append(Step(name, command, "gpu-sanitize.log", 45, 25, 18, environment=uncached))
    figure = [python, BENCH / "compare.py", measurements, "--figure", out / "gpu-roofline.png"]
    return [
        *steps,
        Step("benches", run, "gpu-bench.log", 240, 120, 20),
        Step("benches, other dtypes", others, "gpu-bench.log", 90, 25, 10, optional=True),
        Step("figure", figure, "gpu-bench.log", 25, 10),
    ]


def main() -> int:
    """Run everything and return the number of steps that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=520, help="for all steps together")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch must see a cuda device; got none. Run this on a GPU machine.", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    import records

    out = Path(os.environ.get("OUT") or BENCH / "results")
    measurements = out / "gpu.jsonl"
    before = len(records.read(measurements)[0]) if measurements.exists() else 0
    # a library of an earlier build must not pass for this one's
    for library in (ROOT / "vqkernels").glob("_C*.so"):
        library.unlink()
    outcomes = run_steps(plan(out, measurements), options.seconds, out)
    summary = {each.name: {"status": each.status, "seconds": round(each.seconds, 1)} for each in outcomes}
    (out / "gpu-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [each for each in outcomes if each.failed]
    found = records.read(measurements)[0][before:] if measurements.exists() else []
    print(f"\nlogs and measurements: {out}")
    for outcome in outcomes:
        print(f"  {told(outcome)}")
    print(f"{len(failed)} of {len(outcomes)} steps failed")
    print(records.table(found))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
