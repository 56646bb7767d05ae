"""Inputs of the microbenchmarks: `pytest bench/micro` times each compiled op alone, `--quick` only tries them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from every_op import Inputs

from vqkernels.ops import OPS

# projected codes, VQ-VAE, VQGAN; each with fewer rows than there, for one call is a few milliseconds
SHAPES = [(16384, 512, 8), (8192, 1024, 64), (2048, 4096, 256)]
QUICK = [(70, 40, 8)]
CPU = torch.device("cpu")


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="one small shape: whether everything runs and is right"
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = QUICK if metafunc.config.getoption("--quick") else SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda shape: "-".join(map(str, shape)), scope="module")


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def inputs(shape, dtype):
    return Inputs(shape, dtype, "contiguous", CPU)


@pytest.fixture
def need(dtype):
    """Skip where an op has no compiled body for a dtype, with the reason."""

    def check(op: str) -> None:
        reason = OPS[op].explain_for(CPU, (dtype, dtype)).get("native", "it has no such body")
        if reason is not None:
            pytest.skip(f"{op}: {reason}")

    return check
