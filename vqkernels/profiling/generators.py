"""Generators of random numbers that are afterwards where they were before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put the default generators of Python, NumPy and torch, on the host and on `device`, back at the end."""
    numpy = sys.modules.get("numpy")
    before = random.getstate()
    numbers = None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(before)
            if numpy is not None:
                numpy.random.set_state(numbers)
