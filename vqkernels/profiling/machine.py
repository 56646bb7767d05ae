"""Where and with what a process measures, and the least that a case needs of a machine."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vqkernels import native
from vqkernels.profiling.timing import Floors

# what json gives back
Record = dict[str, Any]
Shape = tuple[int, int, int]


def facts(device: torch.device) -> Record:
    """Where and with what a process measures."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "machine": platform.processor() or platform.machine(),
        "cpu": _cpu(),
        "isa": native.facts().get("isa"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _cpu() -> str | None:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), None)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def operations(shape: Shape) -> int:
    """Operations of the dot products of every row with every code, 2 N K D."""
    n, k, d = shape
    return 2 * n * k * d


def moved_bytes(case: str, shape: Shape, itemsize: int) -> int:
    """Bytes of a case where everything is read or written once.

    Args:
        case: "search", x, codes and indices; or "layer", forward and backward: x, z, and their gradients as well.
        shape: N, K, D.
        itemsize: bytes of a number of x and codes.
    """
    n, k, d = shape
    rows, tables = (1, 1) if case == "search" else (5, 2)
    return itemsize * (rows * n * d + tables * k * d) + 12 * n


def bounds_ms(case: str, shape: Shape, itemsize: int, floors: Floors) -> tuple[float | None, float | None]:
    """Least milliseconds by dot products and by memory; None where the rate is not known."""
    return (
        None if floors.flops is None else 1e3 * operations(shape) / floors.flops,
        None if floors.bandwidth is None else 1e3 * moved_bytes(case, shape, itemsize) / floors.bandwidth,
    )
