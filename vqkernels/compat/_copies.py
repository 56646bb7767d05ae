"""Copies of codes that a later write to the codes does not reach, also in a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor


# a compiler takes a plain copy for the codes themselves, and its backward then reads what was written since
@torch.library.custom_op("vqkernels_compat::copy_of", mutates_args=())
def _copy_of(codes: Tensor) -> Tensor:
    return codes.clone()


@_copy_of.register_fake
def _(codes: Tensor) -> Tensor:
    return torch.empty_like(codes)


def _passed(context: object, grad: Tensor) -> Tensor:
    return grad


# the codes themselves have no part in it: a graph that read them would refuse a backward after they have moved
_copy_of.register_autograd(_passed)


def as_kept(live: Tensor, kept: Tensor) -> Tensor:
    """Codes as they were, with the gradient of those that are."""
    return kept + (live - live.detach()) if live.requires_grad else kept


def kept(codes: Tensor) -> Tensor:
    """A differentiable copy."""
    if not torch.compiler.is_compiling():
        return codes.clone()
    return _copy_of(codes)
