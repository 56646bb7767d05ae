"""Forward and backward of every short name beside DiVeQ, on a CPU, with the memory each takes.

    python bench/quantizers.py [--shape 65536 1024 64] [--names ste ema ...] [--out bench/results/quantizers.jsonl]

Training mode, float32, gradients of latents and codes, statistics included. Before it is timed, each is checked: z and
all gradients are finite, every row stands in a codebook's reach, and where rows take their nearest code the indices
equal a float64 search. What it costs is the ratio of medians of calls that alternate with DiVeQ's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import records
import torch
from torch import Tensor

from vqkernels.nn import METHODS, Codebook, Quantizer, VectorQuantizer, build
from vqkernels.profiling import memory
from vqkernels.profiling.timing import HostClock, interleaved
from vqkernels.testing import brute_force

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench/results/quantizers.jsonl"
BASE = "diveq"
# the targets: times DiVeQ's, and what may take longer because it needs all logits, in MB
MOST_TIMES, MOST_MB = 1.5, 500
STREAMED = ("gumbel", "stochastic")
# two searches, or one of two groups; and what trains the entropy of all codes, with two linear layers
COMPOSED, PENALIZED = ("residual", "product"), ("lfq", "bsq")
# what the target does not bind
FREE = (*STREAMED, *COMPOSED, *PENALIZED)
# rows that are searched again in float64
CHECKED = 2048
# an optimizer that never steps
NEVER = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)


def make(name: str, shape: Sequence[int]) -> Quantizer:
    """A quantizer in training mode whose codes lie among normal latents."""
    _, k, d = shape
    torch.manual_seed(0)
    quantizer = build(name, dim=d, num_codes=k)
    with torch.no_grad():
        for part in quantizer.modules():
            if isinstance(part, Codebook) and part.assignable:
                part.assign(torch.randn(part.num_codes, part.dim))
    # commits have steps of their own, in none of these times
    quantizer.follow(NEVER)
    return quantizer


def step(quantizer: Quantizer, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """A call that runs forward and backward and returns what a trainer would keep."""
    parameters = [p for p in quantizer.parameters() if p.requires_grad]

    def run() -> object:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        z, indices, loss = quantizer(x)
        torch.autograd.backward(
            (z, loss) if loss.requires_grad else (z,), (grad, None)[: 1 + loss.requires_grad]
        )
        return z, indices, x.grad

    return run


def check(name: str, quantizer: Quantizer, x: Tensor, grad: Tensor) -> None:
    """Raise where a step of a quantizer gives something else than it should."""
    z, indices, gradient = step(quantizer, x, grad)()  # type: ignore[misc]
    for words, tensor in (("z", z), ("dL/dx", gradient), *quantizer.named_parameters()):
        value = tensor.grad if isinstance(tensor, torch.nn.Parameter) else tensor
        assert value is not None, f"{name}: {words} must be there"
        assert value.isfinite().all(), f"{name}: {words} must be finite"
    assert gradient.any(), f"{name}: dL/dx must not vanish"
    assert ((indices >= 0) & (indices < quantizer.num_codes)).all(), f"{name}: indices must name codes"
    if isinstance(quantizer, VectorQuantizer):
        quantizer.eval()
        with torch.no_grad():
            rows = x[:CHECKED]
            found = quantizer.encode(rows)[:, 0]
            expected, _ = brute_force(quantizer.inside(rows), quantizer.codes())
        assert torch.equal(found, expected), f"{name}: indices must equal a float64 search"
        quantizer.train()


def measure(name: str, shape: Sequence[int], rounds: int) -> records.Record:
    """One line: medians beside DiVeQ's, and memory of a process of its own."""
    n, _, d = shape
    torch.manual_seed(1)
    x, grad = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
    quantizer, base = make(name, shape), make(BASE, shape)
    check(name, quantizer, x, grad)
    runs = {name: step(quantizer, x, grad), "base": step(base, x, grad)}
    slow = name in STREAMED
    times, failed = interleaved(HostClock(), runs, rounds=3 if slow else rounds)
    assert not failed, failed
    median, over = statistics.median(times[name]), statistics.median(times["base"])
    return {
        "case": "quantizer",
        "shape": list(shape),
        "dtype": "float32",
        "name": name,
        "ms_p50": round(median, 4),
        "ms_min": round(min(times[name]), 4),
        "ms_max": round(max(times[name]), 4),
        "rounds": len(times[name]),
        "over_diveq": round(median / over, 3),
        "extra_mb": _megabytes(name, shape),
        **records.facts(torch.device("cpu")),
    }


def _megabytes(name: str, shape: Sequence[int]) -> float | None:
    if not memory.supported():
        return None
    command = [sys.executable, __file__, "--memory", name, "--shape", *map(str, shape)]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned, check=True)
    return round(json.loads(ran.stdout) / 1e6, 1)


def tell_memory(name: str, shape: Sequence[int]) -> None:
    """Print the bytes that a step takes above its inputs and outputs, in a process that does nothing else."""
    n, _, d = shape
    x, grad = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
    quantizer = make(name, shape)
    step(quantizer, torch.randn(256, d, requires_grad=True), grad[:256])()
    print(memory.peak_bytes(step(quantizer, x, grad)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, and return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(65536, 1024, 64))
    parser.add_argument("--names", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        tell_memory(options.memory, options.shape)
        return 0
    found = []
    for name in options.names:
        found.append(measure(name, options.shape, options.rounds))
        print(
            f"{name:18s} {found[-1]['ms_p50']:9.2f} ms  {found[-1]['over_diveq']:6.2f}x DiVeQ"
            f"  {found[-1]['extra_mb']} MB",
            flush=True,
        )
    kept = records.read(options.out)[0] if options.out.exists() else []
    kept = [each for each in kept if each["name"] not in options.names]
    options.out.unlink(missing_ok=True)
    records.append(options.out, sorted([*kept, *found], key=lambda each: list(METHODS).index(each["name"])))
    late = [each["name"] for each in found if each["over_diveq"] > MOST_TIMES and each["name"] not in FREE]
    large = [each["name"] for each in found if (each["extra_mb"] or 0) > MOST_MB]
    for words, names in ((f"more than {MOST_TIMES}x DiVeQ", late), (f"more than {MOST_MB} MB", large)):
        if names:
            print(f"{words}: {', '.join(names)}")
    return 1 if late or large else 0


if __name__ == "__main__":
    sys.exit(main())
