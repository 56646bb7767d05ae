"""Philox words and normals in Triton: the noise of the other kernels, made visible."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.kernels._common import INTERPRETED, Configuration, cdiv, on_device_of
from vqkernels.kernels._noise import normal_pair, philox_words


@triton.jit(do_not_specialize=["total", "blocks", "row_offset"])
def _philox(seed, words, normals, total, blocks, row_offset, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < total
    w0, w1, w2, w3 = philox_words(
        tl.load(seed), item // blocks + row_offset, (item % blocks).to(tl.int32), STREAM
    )
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    tl.store(words + item * 4, w0.to(tl.int64), mask=live)
    tl.store(words + item * 4 + 1, w1.to(tl.int64), mask=live)
    tl.store(words + item * 4 + 2, w2.to(tl.int64), mask=live)
    tl.store(words + item * 4 + 3, w3.to(tl.int64), mask=live)
    tl.store(normals + item * 4, n0, mask=live)
    tl.store(normals + item * 4 + 1, n1, mask=live)
    tl.store(normals + item * 4 + 2, n2, mask=live)
    tl.store(normals + item * 4 + 3, n3, mask=live)


_BLOCK = 8192 if INTERPRETED else 256


def _configuration(stream: int) -> Configuration:
    return Configuration(
        name=f"philox_stream{stream}",
        kernel=_philox,
        constants={"STREAM": stream, "BLOCK": _BLOCK},
        types={"seed": "*i64", "words": "*i64", "normals": "*fp32"},
    )


def configurations() -> list[Configuration]:
    """Every form in which the kernels of this file are launched."""
    return [_configuration(2)]


def launch(seed: Tensor, rows: int, blocks: int, stream: int, row_offset: int) -> tuple[Tensor, Tensor]:
    """Words (rows, blocks, 4) int64 and their normals float32."""
    words = torch.empty(rows, blocks, 4, dtype=torch.int64, device=seed.device)
    normals = torch.empty_like(words, dtype=torch.float32)
    if words.numel():
        total = rows * blocks
        with on_device_of(seed):
            _configuration(stream).launch(
                (cdiv(total, _BLOCK),), seed, words, normals, total, blocks, row_offset
            )
    return words, normals
