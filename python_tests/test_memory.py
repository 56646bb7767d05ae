"""Nothing of size N x K, and nothing of size N x D besides inputs and outputs."""

import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED

import vqkernels as vq
from vqkernels.ops import OPS
from vqkernels.testing import DEVICE

MEASURE = """
import sys, torch, vqkernels as vq

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3

torch.manual_seed(0)
run = getattr(vq, sys.argv[1])
# what the first call loads and the allocator keeps is not the op's
warm = run(torch.randn(64, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True), backend=sys.argv[2])
warm.z.sum().backward()
x = torch.randn(32768, 256, requires_grad=True)
codes = torch.randn(16384, 256, requires_grad=True)
grad = torch.randn(32768, 256)
outputs = 4 * (2 * x.numel() + codes.numel()) / 1e6
before = peak()
z = run(x, codes, backend=sys.argv[2]).z
z.backward(grad)
print(peak() - before - outputs)
"""


@pytest.mark.skipif(DEVICE.type != "cuda", reason="it needs VQKERNELS_TEST_DEVICE=cuda and a GPU")
@pytest.mark.parametrize("function", ["diveq", "sf_diveq"])
@pytest.mark.parametrize("name", ["triton", "native"])
def test_peak_of_a_step_on_a_gpu(function, name):
    """Forward and backward at (65536, 8192, 256) bfloat16 within twice the latents above inputs and outputs."""
    reason = OPS["directional_backward"].explain_for(DEVICE, (torch.bfloat16,))[name]
    if reason is not None:
        pytest.skip(reason)
    # the nan that tests write into fresh memory would not count, the fixed order of sums would
    torch.use_deterministic_algorithms(False)
    x, grad = (torch.randn(65536, 256, device=DEVICE).bfloat16() for _ in range(2))
    codes = torch.randn(8192, 256, device=DEVICE).bfloat16().requires_grad_()

    def step():
        leaf = x.detach().requires_grad_()
        z, indices = getattr(vq, function)(leaf, codes, backend=name)[:2]
        return z.detach(), indices, *torch.autograd.grad(z, (leaf, codes), grad)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(each.nbytes for each in step())
    extra = torch.cuda.max_memory_allocated() - before - outputs
    assert extra < 2 * x.nbytes, f"{extra / x.nbytes:.2f} times the latents"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's memory says nothing about a gpu's")
@pytest.mark.parametrize("function", ["diveq", "sf_diveq"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_peak_of_a_step(function, backend):
    """Forward and backward at (32768, 16384, 256) float32 within 400 MB above inputs and outputs."""
    from vqkernels import native

    if backend == "native" and native.MISSING:
        pytest.skip(native.MISSING)
    command = [sys.executable, "-c", MEASURE, function, backend]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 400, f"{ran.stdout} MB"
