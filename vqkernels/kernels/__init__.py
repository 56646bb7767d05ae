"""Triton kernels, one file per op; triton itself is imported when the first of them runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

# read once: torch.compile traces neither find_spec nor os.environ
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why Triton cannot run these inputs, or None."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if torch.float64 in dtypes:
        return "it needs float16, bfloat16 or float32"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and _INTERPRETED:
        # the interpreter multiplies the raw bits of bfloat16
        return "the interpreter needs float16 or float32" if torch.bfloat16 in dtypes else None
    return "it needs a cuda device (or TRITON_INTERPRET=1 on the cpu, for tests)"


def lazy(module: str, function: str = "launch") -> Callable:
    """A function of `vqkernels.kernels.<module>`, imported on its first call."""

    def run(*args):
        return getattr(importlib.import_module(f"vqkernels.kernels.{module}"), function)(*args)

    return run
