"""Peak memory of contenders on a CPU, measured in processes of their own, which allocate and time nothing else.

Every block of 64 KiB or more goes back to the system when it is freed there, so that what one contender leaves behind
hides nothing of the next one's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vqkernels.profiling.layers import layers
from vqkernels.profiling.peers import Contender, bind
from vqkernels.profiling.searches import searches
from vqkernels.profiling.timing import Failure, attempt, tensors

# of the call before, which loads libraries and starts threads
WARMED = 256
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# what the process runs: this very package, wherever it came from
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vqkernels.profiling.memory import main; main()"
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def supported() -> bool:
    """Whether this system tells a process its peak, and lets it start again."""
    try:
        # what `peak_bytes` does; some containers forbid it
        _RESET.write_text("5")
        return "VmHWM" in _STATUS.read_text()
    except OSError:
        return False


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak resident memory of one call above what was there before and what it returns."""
    # 5: the peak is what is resident now
    _RESET.write_text("5")
    before = _status("VmHWM")
    kept = run()
    peak = _status("VmHWM") - before
    return max(0, peak - sum(t.untyped_storage().nbytes() for t in tensors(kept)))


def _status(name: str) -> int:
    return next(
        1024 * int(text.split()[1]) for text in _STATUS.read_text().splitlines() if text.startswith(name)
    )


def extra_bytes(
    case: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    names: Sequence[str],
    isas: Sequence[str] = (),
    *,
    backends: Sequence[str] | None = None,
    seconds: float = 600.0,
) -> dict[str, int | Failure]:
    """Peak memory of each contender above inputs and outputs, or why there is none.

    Args:
        case: "search" or "layer". shape: N, K, D. dtype: of x and codes.
        names: contenders of that case.
        isas, backends: as `searches` takes them.
        seconds: for all of them together; those that are not done then have none.
    """
    found: dict[str, int | Failure] = {}
    asked = {"case": case, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "isas": list(isas)}
    asked["backends"] = None if backends is None else list(backends)
    left = list(names)
    while left:
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), json.dumps(asked | {"names": left})]
        try:
            # what a peer says on its way is not ours to show
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=os.environ | _RETURNED,
                timeout=seconds,
                check=False,
            )
            lines, why = ran.stdout, f"its process ended with {ran.returncode}"
        except subprocess.TimeoutExpired as late:
            lines = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            why = f"not done after {seconds:.0f} s"
        for text in lines.splitlines():
            if text.startswith('{"name"'):
                told = json.loads(text)
                found[told["name"]] = Failure(told["failed"]) if "failed" in told else told["bytes"]
        left = [name for name in left if name not in found]
        if left:
            # the first without an answer is the one the process was lost with
            found[left.pop(0)] = Failure(why)
    return found


def main() -> None:
    """Measure the contenders that the last argument names, in that order; a line of JSON on stdout for each."""
    asked = json.loads(sys.argv[2])
    n, k, d = asked["shape"]
    dtype = getattr(torch, asked["dtype"])
    device = torch.device("cpu")
    listed = searches if asked["case"] == "search" else layers
    table: list[Contender] = listed(device, dtype, asked["isas"], backends=asked["backends"])
    torch.manual_seed(0)
    x, grad, codes = (torch.randn(rows, d).to(dtype) for rows in (n, n, k))
    for name in asked["names"]:

        def measure(name: str = name) -> int:
            contender = next(each for each in table if each.name == name)
            run = bind(contender, codes, [x], grad)
            run(x[:WARMED])
            return peak_bytes(lambda: run(x))

        value = attempt(measure)
        told = {"failed": value.reason} if isinstance(value, Failure) else {"bytes": value}
        sys.stdout.write(json.dumps({"name": name} | told) + "\n")
        sys.stdout.flush()
