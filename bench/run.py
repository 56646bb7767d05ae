"""Time our ops beside their peers, in one process, interleaved, and only after their result was checked.

    python bench/run.py [--shapes N,K,D ...] [--rounds 7] [--out bench/results/cpu.jsonl]

Prints a table and appends one JSON line per measurement. Every speed is a ratio to a peer measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels import native
from vqkernels.testing import brute_force

SHAPES = [(65536, 1024, 64), (16384, 8192, 256), (65536, 512, 8)]
# rows that are compared with float64 brute force before anything is timed
CHECKED = 1024


def cdist(x: Tensor, codes: Tensor) -> Tensor:
    """The usual two lines, with an N x K matrix."""
    return torch.cdist(x, codes).argmin(1)


def addmm(x: Tensor, codes: Tensor) -> Tensor:
    """The expanded form over chunks of rows, no N x K matrix."""
    half = codes.square().sum(1) / 2
    return torch.cat([torch.addmm(half, rows, codes.t(), alpha=-1).argmin(1) for rows in x.split(4096)])


def faiss(x: Tensor, codes: Tensor) -> Tensor:
    """faiss-cpu, IndexFlatL2, k = 1."""
    import faiss as library

    index = library.IndexFlatL2(codes.shape[1])
    index.add(codes.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def searches() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Every search that this machine can run, ours first."""
    found: dict[str, Callable] = {}
    if native.MISSING is None:
        found["vqkernels native"] = lambda x, c: vq.nearest_code(x, c, backend="native").indices
    found["vqkernels reference"] = lambda x, c: vq.nearest_code(x, c, backend="reference").indices
    found["torch.cdist + argmin"] = cdist
    found["chunked addmm + argmin"] = addmm
    if find_spec("faiss"):
        found["faiss-cpu IndexFlatL2"] = faiss
    return found


def layers(k: int, d: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Whole layers, forward and backward, on latents (N, D) that require a gradient."""
    codes = torch.randn(k, d).requires_grad_()
    found: dict[str, Callable] = {
        "vqkernels diveq": lambda x: vq.diveq(x, codes).z,
        "vqkernels sf_diveq": lambda x: vq.sf_diveq(x, codes).z,
    }
    if find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        layer = VectorQuantize(d, k)
        found["vector-quantize-pytorch (EMA)"] = lambda x: layer(x[None])[0]
    if find_spec("diveq"):
        import diveq

        other = diveq.DIVEQ(k, d, codebook_reset=False, allow_warning=False, verbose=False)
        found["diveq DIVEQ"] = lambda x: other(x)[0]
    return found


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run, one of each per round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def agreement(search: Callable[[Tensor, Tensor], Tensor], x: Tensor, codes: Tensor) -> float:
    """Share of the checked rows on which a search equals float64 brute force; ours must equal it on all."""
    rows = x[:CHECKED]
    return float((search(rows, codes) == brute_force(rows, codes)[0]).double().mean())


def measure(
    kind: str, shape: tuple[int, int, int], runs: dict[str, Callable], checks: dict[str, float], rounds: int
) -> list[dict]:
    """Time one case and describe each measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    records = []
    times = interleaved(runs, rounds)
    best_of_ours = min(
        statistics.median(values) for name, values in times.items() if name.startswith("vqkernels")
    )
    for name, values in times.items():
        median = statistics.median(values)
        record = {
            "case": kind,
            "shape": shape,
            "name": name,
            "ms_p50": round(median, 3),
            "ms_min": round(min(values), 3),
            "ms_max": round(max(values), 3),
            "over_ours": round(median / best_of_ours, 2),
            "agreement": checks.get(name),
            "machine": platform.processor() or platform.machine(),
            "isa": native.facts().get("isa"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit.stdout.strip() or None,
            "date": time.strftime("%Y-%m-%d"),
        }
        records.append(record)
        agree = "" if record["agreement"] is None else f"  float64 agreement {record['agreement']:.6f}"
        print(
            f"  {name:32s} {median:10.2f} ms  ({min(values):.2f} to {max(values):.2f})  {record['over_ours']:7.2f}x{agree}"
        )
    return records


def step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    """Forward and backward of a layer."""
    z = layer(x.detach().requires_grad_())
    z.backward(grad.view(z.shape))


def main() -> None:
    """Parse the command line, run every case, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=lambda text: tuple(map(int, text.split(","))), default=SHAPES
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.jsonl")
    options = parser.parse_args()
    records = []
    for n, k, d in options.shapes:
        torch.manual_seed(0)
        x, codes = torch.randn(n, d), torch.randn(k, d)
        print(f"search  N={n} K={k} D={d} float32")
        found = searches()
        checks = {name: agreement(search, x, codes) for name, search in found.items()}
        for name, share in checks.items():
            if name.startswith("vqkernels") and share < 1:
                raise SystemExit(
                    f"{name} does not equal float64 on {1 - share:.2%} of the rows: nothing is timed."
                )
        runs = {name: partial(search, x, codes) for name, search in found.items()}
        records += measure("search", (n, k, d), runs, checks, options.rounds)
        print(f"layer, forward + backward  N={n} K={k} D={d} float32")
        grad = torch.randn(n, d)
        runs = {name: partial(step, layer, x, grad) for name, layer in layers(k, d).items()}
        records += measure("layer", (n, k, d), runs, {}, max(3, options.rounds // 2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)
    print(f"wrote {len(records)} lines to {options.out}")


if __name__ == "__main__":
    main()
