"""What the Triton kernels share: their configuration and launch, and rows of any strides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# interpreted grids are slow python loops: there the tiles are large and the programs few
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel: what is fixed when it is compiled, and what its arguments may look like.

    Attributes:
        name: unique, for people.
        kernel: the jitted function.
        constants: its constexpr arguments.
        types: Triton types of the other arguments, for compilation ahead of time; those left out are i32.
        ones: arguments that are 1 in the compiled form checked ahead of time, such as the stride of features.
        multiples: arguments that are multiples of 16 in that form.
        warps, stages: what the compiler calls num_warps and num_stages.
        fused: False forbids fused multiply-adds, where the contract wants every operation rounded.
    """

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    ones: tuple[str, ...] = ()
    multiples: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2
    fused: bool = True

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Queue the kernel on the current stream."""
        self.kernel[grid](
            *args, **self.constants, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=self.fused
        )


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the device of `tensor`, whichever device is current."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    elif INTERPRETED:
        import numpy

        # a gpu is silent where infinities and nans arise
        with numpy.errstate(all="ignore"):
            yield
    else:
        yield


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the device of `tensor`; few when interpreted, where programs run one by one."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def cdiv(count: int, size: int) -> int:
    """How many of `size` cover `count`; triton's own takes longer than the launch of a kernel may."""
    return -(-count // size)


def architecture(tensor: Tensor) -> int:
    """Ten times the compute capability of the device of `tensor`; that of Hopper when interpreted."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def feature_block(features: int, largest: int) -> int:
    """Features held at once: a power of two, 16 or more, the whole row if `largest` allows."""
    return min(largest, max(16, 1 << (features - 1).bit_length()))


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offset, int64, of each row of a (B, M, D) tensor with M = `inner` and fewer than 2^31 rows."""
    # a division of 64 bits is a hundred instructions
    narrow = rows.to(tl.int32)
    outer = narrow // inner
    return outer.to(tl.int64) * stride_outer + (narrow - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def is_finite(value):
    """Neither NaN nor Inf."""
    return tl.abs(value) < float("inf")
