"""Codes keep their precision while everything around them is in half of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """A region without autocast; nothing where there is none to leave, so that an exported program holds no region."""
    # a device without autocast, such as meta, refuses the question
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
