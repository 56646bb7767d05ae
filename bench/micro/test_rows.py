"""What is done with rows once their code is known: the directional family, sums per code, random words."""

from __future__ import annotations

import every_op
import pytest
import torch

import vqkernels as vq
from vqkernels.ops import OPS
from vqkernels.ops.directional import DIRECTIONS
from vqkernels.ops.philox import philox_op

SEED = torch.tensor(every_op.SEED)


@pytest.fixture(params=("code", "curve"))
def arguments(request, inputs):
    """Of `directional`: everything but the gradient."""
    n, k = len(inputs.x), len(inputs.codes)
    curve = request.param == "curve"
    position = torch.linspace(0, 1, n) if curve else None
    leading = inputs.on_x.shape[:-1]
    index = (torch.arange(n) % (k - 1 if curve else k)).view(leading)
    at = None if position is None else position.view(leading)
    noisy = DIRECTIONS.index("noisy")
    return (inputs.on_x, inputs.on_codes, index, at, SEED, noisy, every_op.NOISE, 0), curve


def test_directional(benchmark, inputs, arguments, need):
    need("directional")
    given, curve = arguments
    every_op.move(inputs, "native", "noisy", curve)
    benchmark(lambda: OPS["directional"](*given, backend="native"))


def test_directional_backward(benchmark, inputs, arguments, need):
    need("directional_backward")
    given, curve = arguments
    every_op.move(inputs, "native", "noisy", curve)
    grad = inputs.grad.view(inputs.on_x.shape)
    benchmark(lambda: OPS["directional_backward"](grad, *given, backend="native"))


def test_straight_through(benchmark, inputs, need):
    need("straight_through")
    every_op.cross(inputs, "native", False)
    index = (torch.arange(len(inputs.x)) % len(inputs.codes)).view(inputs.on_x.shape[:-1])
    benchmark(lambda: OPS["straight_through"](inputs.on_x, inputs.on_codes, index, backend="native"))


@pytest.mark.parametrize("rotation", [False, True], ids=["identity", "rotation"])
def test_straight_through_backward(benchmark, inputs, rotation, need):
    need("straight_through_backward")
    every_op.cross(inputs, "native", rotation)
    index = (torch.arange(len(inputs.x)) % len(inputs.codes)).view(inputs.on_x.shape[:-1])
    grad, pull = inputs.grad.view(inputs.on_x.shape), torch.tensor(0.5, dtype=torch.float64)
    given = (grad, pull, inputs.on_x, inputs.on_codes, index, rotation, 0.25, 1.0, 0.0, True, True)
    benchmark(lambda: OPS["straight_through_backward"](*given, backend="native"))


def test_code_sums(benchmark, inputs, need):
    need("code_sums")
    every_op.sums(inputs, "native")
    indices = (torch.arange(len(inputs.x)) % len(inputs.codes)).view(inputs.on_x.shape[:-1])
    benchmark(lambda: vq.code_sums(inputs.on_x, indices, len(inputs.codes), backend="native"))


def test_philox(benchmark, shape):
    reason = OPS["philox"].explain_for(SEED.device, ())["native"]
    if reason is not None:
        pytest.skip(f"philox: {reason}")
    every_op.words("native", SEED.device)
    n, _, d = shape
    benchmark(lambda: philox_op(SEED, n, -(-d // 4), 0, 0, backend="native"))
