"""The compiled extension: loads it, or remembers in one sentence why it is not there."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

MISSING: str | None = None
_C: ModuleType | None = None


def _why_not_built() -> str:
    # left by setup.py, which knows
    reason = Path(__file__).with_name("native_missing.txt")
    if reason.exists():
        return f"the extension was not built: {reason.read_text().strip()}"
    why = "the extension was not built: nothing was compiled here"
    # python takes the sources in the working directory before what was installed from them
    hidden = [Path(folder) / "vqkernels" for folder in sys.path]
    for package in hidden:
        if any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return f"{why}, and hides {package}, where it is (run from another folder, or use the command vqkernels)"
    return f"{why} (pip install --no-build-isolation --editable .)"


try:
    _C = importlib.import_module("vqkernels._C")
except ModuleNotFoundError:
    MISSING = _why_not_built()
except ImportError as error:
    MISSING = f"the extension could not be loaded: {error}"

# read once: torch.compile cannot trace a call into pybind11
FACTS: dict = dict(_C.facts()) if _C is not None else {}
HAS_CUDA: bool = bool(FACTS.get("cuda_archs"))


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the compiled bodies cannot run on `device`, or None."""
    if MISSING is not None:
        return MISSING
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return None if HAS_CUDA else "the extension was built without CUDA"
    return f"the extension has no body for {device.type}"


def why_not_cpu_only(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the compiled bodies of an op that has none for CUDA cannot run on `device`, or None."""
    if MISSING is None and device.type == "cuda":
        return "the extension has no body of this op for cuda"
    return why_not(device, dtypes)


def prepare_codes(codebook: Tensor, x_dtype: torch.dtype) -> list[Tensor]:
    """What the compiled search of this device can do once for a codebook that stays: its argument `parts`."""
    return torch.ops.vqkernels.prepare_codes(codebook, x_dtype)


def facts() -> dict:
    """Version, compiler, ISAs built, ISA in use and CUDA archs of the extension; empty when it is missing."""
    return dict(_C.facts()) if _C is not None else {}


def set_isa(name: str) -> None:
    """Force the instruction set of the CPU bodies, process-wide.

    Args:
        name: one of `facts()["isas_built"]`, or `"auto"` for the best that this CPU has.

    Raises:
        RuntimeError: the extension is missing.
        ValueError: the name is unknown, was not built, or this CPU cannot run it.
    """
    if _C is None:
        raise RuntimeError(f"set_isa: the native backend must be there; got none: {MISSING}. Build it first.")
    _C.set_isa(name)


def peaks(seconds: float = 0.02) -> dict[str, float]:
    """Measure how many operations per second this CPU's dot products reach at most, on torch's threads.

    A multiply-add counts as two operations. The instruction set is the one in use (`set_isa`), except for
    "bfloat16", which is measured wherever AVX-512 runs on a CPU that has the instruction.

    Args:
        seconds: spent on each kind; the best moment counts.

    Returns:
        Operations per second by kind, "float32", "int16", "bfloat16"; empty when the extension is missing.
    """
    return {} if _C is None else dict(_C.peaks(seconds))
