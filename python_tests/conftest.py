"""Which backends a run tests, and what every test starts from."""

import os
import time

import pytest
import torch

from vqkernels.ops import OPS
from vqkernels.testing import DEVICE

# without it, torch warns on a gpu that matrix products add up in no fixed order
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# triton runs on a gpu, or on the cpu in an interpreter that has a process of its own
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = (
    ("triton",) if INTERPRETED else ("native", "reference", *(("triton",) if DEVICE.type == "cuda" else ()))
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left to `make check-all`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a process whose device is lost, so that the tests after it run in another one."""
    result = yield
    if DEVICE.type == "cuda" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(f"the device is lost: {error}")
            # what was reported is on its way to the process that collects it
            time.sleep(1)
            os._exit(3)
    return result


@pytest.fixture(autouse=True)
def _start():
    """A seed, and torch.empty filled with nan so that an unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def need(backend):
    """Skip, with the backend's own reason, what it says it cannot run here."""

    def check(op: str, *dtypes: torch.dtype) -> None:
        reason = OPS[op].explain_for(DEVICE, dtypes)[backend]
        if reason is not None:
            pytest.skip(f"{op} on {backend}: {reason}")

    return check
