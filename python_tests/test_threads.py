"""Threads below and above the native ops: results do not depend on them, and calls do not wait for each other."""

import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_native import ISAS, isa, threads

import vqkernels as vq
from vqkernels import native
from vqkernels.ops import OPS
from vqkernels.ops.nearest_code import nearest_code_op
from vqkernels.ops.philox import philox_op
from vqkernels.testing import strided

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")

ROOT = Path(__file__).parents[1]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# more codes than one task of a pass over the codebook takes
ROWS, CODES, FEATURES = 2400, 1100, 24


def bits(t):
    """A tensor as integers, so that nan equals nan and 0 does not equal -0."""
    return t.detach() if t.dtype == torch.int64 else t.detach().contiguous().view(INTEGERS[t.element_size()])


def inputs(dtype, layout, seed=0, rows=ROWS, codes=CODES, features=FEATURES):
    """Latents and codes with ties, duplicates and rows that are not finite; what the ops need beside them."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(codes, features, generator=generator)
    table[codes // 2 :] = table[: codes - codes // 2].clone()
    x = table[torch.randint(codes, (rows,), generator=generator)]
    x = x + 0.4 * torch.randn(rows, features, generator=generator)
    x[::9] = table[(torch.arange(rows) % codes)[::9]]
    x[3, 1], x[rows - 1, 0] = torch.nan, torch.inf
    # one code takes half of the rows, so that its sum crosses the borders of tasks; some rows have none
    indices = torch.randint(-1, codes - 1, (rows,), generator=generator)
    indices = torch.where(torch.rand(rows, generator=generator) < 0.5, 7, indices)
    position = torch.rand(rows, generator=generator)
    grad = torch.randn(rows, features, generator=generator)
    x, grad = (strided(v.to(dtype), layout) for v in (x, grad))
    lead = x.shape[:-1]
    return x, table.to(dtype), indices.view(lead), position.view(lead), grad, torch.rand(codes - 1)


def native_ops():
    """Every op with a compiled body on the CPU: what runs it on `inputs`, and gives a tuple of tensors."""

    def search(exact):
        return lambda x, codes, *_: vq.nearest_code(x, codes, exact=exact, backend="native")

    def prepared(x, codes, *_):
        handle = vq.prepare(codes, x_dtype=x.dtype, backend="native")
        return *vq.nearest_code(x, handle), *vq.nearest_code(x[..., :5, :], handle)

    def curve(x, codes, _indices, _position, _grad, dither):
        flat = x if x.dim() == 3 else x[None]
        return nearest_code_op(flat, codes, dither, True, [], backend="native")

    def move(direction, segment):
        def run(x, codes, indices, position, grad, _):
            x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
            at = position if segment else None
            chosen = {"direction": direction, "position": at, "seed": 11, "row_offset": 3}
            z = vq.directional(x, codes, indices, **chosen, backend="native")
            return z, *torch.autograd.grad(z, (x, codes), grad)

        return run

    def cross(rotation, sync):
        def run(x, codes, indices, _position, grad, _dither):
            x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
            chosen = {"rotation": rotation, "sync": sync}
            z, loss = vq.straight_through(x, codes, indices, **chosen, backend="native")
            return z, loss, *torch.autograd.grad((z, loss), (x, codes), (grad, torch.ones_like(loss)))

        return run

    yield "nearest_code", "exact", search(True)
    yield "nearest_code", "fast", search(False)
    yield "nearest_code", "prepared", prepared
    yield "nearest_code", "dither", curve
    for direction in ("noisy", "detach", "random"):
        for segment in (False, True):
            yield "directional_backward", f"{direction} {1 + segment}", move(direction, segment)
    yield "straight_through_backward", "identity", cross(False, 0.0)
    yield "straight_through_backward", "rotation", cross(True, 0.5)
    yield (
        "code_sums",
        "",
        lambda x, codes, indices, *_: vq.code_sums(x, indices, len(codes), backend="native"),
    )
    yield "philox", "", lambda *_: philox_op(torch.tensor(-5), 700, 33, 1, 2**33, backend="native")
    yield "nearest_segment", "", lambda x, codes, *_: vq.nearest_segment(x, codes, backend="native")


CPU = torch.device("cpu")
RUN = {
    f"{op} {kind}".strip(): run
    for op, kind, run in native_ops()
    if native.MISSING is None and OPS[op].explain_for(CPU, ())["native"] is None
}


def test_no_op_is_left_out():
    bodies = re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc/bindings.cpp").read_text())
    program = (ROOT / "python_tests/without_torch/main.cpp").read_text()
    assert len(bodies) >= 6
    for op in bodies:
        assert re.search(rf"\b{op}\(", program), f"ThreadSanitizer does not see {op}"
        # these are run with the op that they serve
        if op not in ("prepare_codes", "directional", "straight_through"):
            assert any(name.split()[0] == op for name in RUN), op


@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", RUN)
def test_results_do_not_depend_on_threads(op, dtype, layout):
    given = inputs(dtype, layout)
    for name in ISAS:
        with isa(name):
            with threads(1):
                alone = RUN[op](*given)
            for count in (2, 3):
                with threads(count):
                    found = RUN[op](*given)
                for a, b in zip(alone, found, strict=True):
                    assert a.stride() == b.stride()
                    assert torch.equal(bits(a), bits(b)), (name, count)


def test_callers_side_by_side():
    """Four Python threads, each with inputs and an order of its own, find what each finds alone."""
    layouts = ("contiguous", "channels", "sliced", "contiguous")
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
    given = [
        inputs(dtype, layout, seed=n, rows=500 + 45 * n, codes=150 + 70 * n, features=9 + 8 * n)
        for n, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=True))
    ]
    alone = [{name: run(*each) for name, run in RUN.items()} for each in given]
    before = native.facts()["isa"]
    start, wrong = threading.Barrier(4), []

    def caller(number):
        start.wait()
        for turn in range(8):
            names, first = list(RUN), number * turn % len(RUN)
            # each at another op at a time, and now and then at the same
            for name in names[first:] + names[:first]:
                found = RUN[name](*given[number])
                if not all(
                    torch.equal(bits(a), bits(b)) for a, b in zip(alone[number][name], found, strict=True)
                ):
                    wrong.append((number, turn, name))

    # the barrier holds each until all four have a thread of their own
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))
    assert not wrong
    assert native.facts()["isa"] == before


@pytest.fixture
def ticks():
    """A count that another Python thread raises, while it gets the lock of the interpreter of its own accord."""
    count, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            count[0] += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    # from here on nobody loses the lock to a clock: the count moves only where this thread lets go of it
    sys.setswitchinterval(1e3)
    yield count
    stop.set()
    sys.setswitchinterval(interval)
    thread.join()


def long_calls():
    """Raw ops, nothing of Python around them, each some hundredths of a second long."""
    op = torch.ops.vqkernels
    x, codes = torch.randn(1, 20_000, 64), torch.randn(500, 64)
    indices, seed = torch.randint(0, 500, (1, 20_000)), torch.tensor(1)
    choice = (indices, None, seed, 0, 0.1, 0)
    yield "nearest_code", lambda: op.nearest_code(x, codes, None, True, [])
    yield "directional", lambda: op.directional(x, codes, *choice)
    yield "directional_backward", lambda: op.directional_backward(x, x, codes, *choice)
    pull = torch.tensor(0.5)
    yield "straight_through", lambda: op.straight_through(x, codes, indices)
    yield (
        "straight_through_backward",
        lambda: op.straight_through_backward(x, pull, x, codes, indices, True, 0.25, 1.0, 1.0, True, True),
    )
    yield "code_sums", lambda: op.code_sums(x, indices, 500)
    yield "philox", lambda: op.philox(seed, 20_000, 16, 0, 0)
    yield "nearest_segment", lambda: op.nearest_segment(x, codes)
    yield "prepare_codes", lambda: op.prepare_codes(torch.randn(20_000, 64), torch.float32)


LONG_CALLS = tuple(name for name, _ in long_calls())


@pytest.mark.parametrize("op", LONG_CALLS)
def test_the_lock_of_the_interpreter_is_released(op, ticks):
    call = dict(long_calls())[op]
    values = list(range(2_000_000))
    # what holds the lock holds the count, or this test would show nothing
    before = ticks[0]
    values.reverse()
    sorted(values)
    assert ticks[0] == before
    end = time.perf_counter() + 60
    while True:
        before = ticks[0]
        call()
        after = ticks[0]
        # a busy machine may leave the other thread no time during one call, but not during all of them
        if after > before or time.perf_counter() > end:
            break
    assert after > before
