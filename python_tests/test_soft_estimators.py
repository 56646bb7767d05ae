"""Gumbel and stochastic sampling as estimators: equations, heads, schedules, masks, memory."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED
from test_gumbel_code import noise, transcription
from torch import nn

from vqkernels.nn import (
    STE,
    Codebook,
    ConstantTemperature,
    Context,
    CosineTemperature,
    EMACodebook,
    ExponentialTemperature,
    Gumbel,
    LinearTemperature,
    Stochastic,
    VectorQuantizer,
    build,
)
from vqkernels.nn.estimators import gumbel
from vqkernels.ops import sample_code
from vqkernels.testing import DEVICE, brute_force, clusters

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the ops have no triton body")
SEED = 987654321987
N, K, D = 60, 9, 5


def case(n=N):
    x, codes = (t.double() for t in clusters(n, K, D, scale=0.4))
    return x.requires_grad_(), codes.requires_grad_()


def context(row_offset=0, mask=None, mean_rows=None):
    return Context(torch.tensor(SEED, device=DEVICE), row_offset, mask, mean_rows)


def leaves(module, x, codes):
    return [x, codes, *module.parameters()]


def backward(z, loss, at):
    return torch.autograd.grad(z.cos().sum() + loss, at)


def same(found, expected, n=N):
    # float64 throughout: sums of at most n K terms of size 1, with factors below 100
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).abs() <= 100 * n * K * 2.3e-16 * (1 + b.abs().max())).all()


def test_gumbel_equation():
    """DiVeQ eq. 5 and 6."""
    x, codes = case()
    estimator = Gumbel(kl_weight=0.3, temperature=0.6).double().to(DEVICE)
    z, indices, loss = estimator(x, codes, context())
    q, kl, noisy = transcription(x, codes, float(estimator.temperature.value), noise(N, K))
    assert torch.equal(indices, noisy.argmax(1)) and torch.equal(z, codes[indices])
    same(backward(z, loss, (x, codes)), backward(q, 0.3 * kl.mean(), (x, codes)))
    assert torch.equal(estimator.choose(x, codes, context()).indices, indices)
    crossed = estimator.cross(x, codes, estimator.choose(x, codes, context()), context())
    assert torch.equal(crossed.z, z) and torch.equal(crossed.loss, loss)


def test_stochastic_equation():
    """Huh eq. 12 and the losses of STE, at the code that was drawn."""
    x, codes = case()
    estimator = Stochastic(codebook_weight=0.7, commitment_weight=0.2, temperature=0.5).to(DEVICE)
    z, indices, loss = estimator(x, codes, context())
    assert torch.equal(indices, sample_code(x, codes, temperature=0.5, seed=SEED))
    assert not torch.equal(indices, brute_force(x, codes)[0])
    c = codes[indices]
    expected = 0.7 * (x.detach() - c).square().mean() + 0.2 * (x - c.detach()).square().mean()
    assert torch.equal(z, c)
    same(backward(z, loss, (x, codes)), backward(x + (c - x).detach(), expected, (x, codes)))


def heads():
    torch.manual_seed(3)
    yield nn.Linear(D, K)
    yield nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, K))


@pytest.mark.parametrize("head", list(heads()), ids=["linear", "mlp"])
def test_head(head, monkeypatch):
    """Logits of a module, streamed: the same equation, and gradients of its parameters."""
    x, codes = case()
    estimator = Gumbel(kl_weight=0.3, temperature=0.6, head=head).double().to(DEVICE)
    at = leaves(estimator, x, codes)
    whole = estimator(x, codes, context())
    logits = head(x)
    soft = torch.softmax((logits + noise(N, K)) / estimator.temperature.value, dim=1)
    hard = nn.functional.one_hot((logits + noise(N, K)).argmax(1), K).double()
    p = torch.softmax(logits, dim=1)
    kl = (p * (p * K).log()).sum(1)
    expected = backward((hard + soft - soft.detach()) @ codes, 0.3 * kl.mean(), at)
    assert torch.equal(whole.z, codes[hard.argmax(1)])
    same(backward(whole.z, whole.loss, at), expected)
    monkeypatch.setattr(gumbel, "rows_at_once", lambda num_codes, device: 7)
    parts = estimator(x.view(4, 15, D), codes, context())
    assert torch.equal(parts.z.view(N, D), whole.z) and torch.equal(parts.indices.flatten(), whole.indices)
    same(backward(parts.z, parts.loss, at), expected)
    z, indices = estimator.eval().evaluate(x, codes, codes)
    assert torch.equal(indices[:, 0], logits.argmax(1)) and torch.equal(z, codes[indices[:, 0]])
    assert not indices.requires_grad


def test_head_and_what_is_not_finite():
    x, codes = (t.detach() for t in case())
    estimator = Gumbel(head=nn.Linear(D, K)).double().to(DEVICE)
    clean = estimator(x, codes, context())
    dirty, bad = x.clone(), codes.clone()
    dirty[7, 2], bad[clean.indices[3], 1] = torch.nan, torch.nan
    leaf, table = dirty.requires_grad_(), codes.clone().requires_grad_()
    found = estimator(leaf, table, context())
    keep = torch.arange(N, device=DEVICE) != 7
    assert found.z[7].isnan().all() and torch.equal(found.z[keep], clean.z[keep]) and found.indices[7] == 0
    (found.z.sum() + found.loss).backward()
    assert leaf.grad[keep].isfinite().all() and leaf.grad[7].isnan().all()
    assert all(p.grad.isfinite().all() for p in (table, *estimator.parameters()))
    assert not (estimator(x, bad, context()).indices == clean.indices[3]).any()
    assert not (estimator.encode(x, bad) == clean.indices[3]).any() and estimator.encode(dirty, codes)[7] == 0


def test_head_of_another_width_is_refused():
    quantizer = VectorQuantizer(Codebook(K, D), Gumbel(head=nn.Linear(D, K + 1))).to(DEVICE)
    with pytest.raises(ValueError, match=r"Gumbel: head must return \(4, 9\); got \(4, 10\)"):
        quantizer(torch.randn(4, D, device=DEVICE))
    with pytest.raises(TypeError, match="Gumbel: head must be a module or None; got function"):
        Gumbel(head=lambda x: x)


ESTIMATORS = {
    "gumbel": lambda: Gumbel(kl_weight=0.3),
    "head": lambda: Gumbel(kl_weight=0.3, head=nn.Linear(D, K)),
    "stochastic": Stochastic,
}
EVERY = pytest.mark.parametrize("name", list(ESTIMATORS))


def make(name):
    torch.manual_seed(5)
    return VectorQuantizer(Codebook(K, D, init="normal"), ESTIMATORS[name]()).to(DEVICE)


@EVERY
def test_masked_rows(name):
    """They give 0 and -1, whatever they hold, and have no part in anything: as if they were not there."""
    x, mask = torch.randn(N, D, device=DEVICE).double(), torch.arange(N, device=DEVICE) < 40
    dirty = x.clone()
    dirty[40:50] = torch.nan
    results = []
    for rows, kept in ((dirty, mask), (x[:40], None)):
        rows = rows.clone().requires_grad_()
        quantizer = make(name).double()
        torch.manual_seed(9)
        z, indices, loss = quantizer(rows, kept)
        (z[:40].cos().sum() + z[40:].sum() + loss).backward()
        results.append((z, indices, loss, rows.grad, [p.grad for p in quantizer.parameters()]))
    first, second = results
    assert not first[0][40:].any() and (first[1][40:] == -1).all() and not first[3][40:].any()
    assert torch.equal(first[1][:40], second[1])
    same([first[0][:40], first[2], first[3][:40], *first[4]], [second[0], second[2], second[3], *second[4]])


@EVERY
def test_halves_equal_the_whole(name):
    estimator = make(name).estimator.double()
    x, codes = case()
    whole = estimator(x, codes, context())
    rows = torch.tensor(N / 2, device=DEVICE)
    halves = [estimator(x[at : at + N // 2], codes, context(at, None, rows)) for at in (0, N // 2)]
    assert torch.equal(whole.indices, torch.cat([half.indices for half in halves]))
    at = [x, codes] if name != "head" else leaves(estimator, x, codes)
    z, loss = torch.cat([half.z for half in halves]), (halves[0].loss + halves[1].loss) / 2
    same(backward(z, loss, at), backward(whole.z, whole.loss, at))


@EVERY
def test_evaluation_has_no_noise(name):
    quantizer = make(name).eval()
    x = torch.randn(N, D, device=DEVICE)
    first, second = quantizer(x), quantizer(x)
    assert torch.equal(first.z, second.z) and torch.equal(quantizer.decode(first.indices), first.z)
    logits = quantizer.estimator.head(x) if name == "head" else None
    expected = brute_force(x, quantizer.export())[0] if logits is None else logits.argmax(1)
    assert torch.equal(first.indices[:, 0], expected)
    assert not torch.equal(quantizer.train()(x).indices, quantizer(x).indices)


@EVERY
def test_compiled_steps_follow_the_schedule(name):
    """One graph, no recompilation as the temperature falls, and the same numbers as without it."""
    torch._dynamo.reset()
    quantizer = make(name)
    quantizer.estimator.temperature.schedule = LinearTemperature(4, 2.0, 0.5)
    quantizer.follow(optimizer := torch.optim.SGD(quantizer.parameters(), 0.01))
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    for step in range(6):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            torch.manual_seed(step)
            z, indices, loss = compiled(x)
            torch.manual_seed(step)
            again = quantizer(x)
        assert (
            torch.equal(z, again.z) and torch.equal(indices, again.indices) and torch.equal(loss, again.loss)
        )
        optimizer.zero_grad()
        (z.square().sum() + loss).backward()
        optimizer.step()
        expected = max(2.0 - 1.5 * (step + 1) / 4, 0.5)
        assert quantizer.estimator.temperature.value == expected and quantizer.idle == (step >= 3)


def test_a_commit_between_forward_and_backward():
    quantizer = make("gumbel")
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    z, expected = quantizer(x).z, None
    for _ in range(2):
        (found,) = torch.autograd.grad(z.square().sum(), x, retain_graph=True)
        assert expected is None or torch.equal(found, expected)
        expected = found
        quantizer.estimator.commit(5000)


@pytest.mark.parametrize("head", [None, torch.nn.Linear(D, K)], ids=["distances", "head"])
def test_coldest_of_all(head):
    """A gradient of almost one-hot weights is finite where logits over tau are not."""
    quantizer = VectorQuantizer(Codebook(K, D, init="normal"), Gumbel(temperature=1e-30, head=head)).to(
        DEVICE
    )
    x = (1e9 * torch.randn(N, D, device=DEVICE)).requires_grad_()
    z, _, _ = quantizer(x)
    z.sum().backward()
    assert z.isfinite().all() and x.grad.isfinite().all() and quantizer.codebook.weight.grad.isfinite().all()


def test_state_dict_keeps_the_temperature():
    first, second = make("stochastic"), make("stochastic")
    first.estimator.commit(5000)
    second.load_state_dict(first.state_dict())
    assert second.estimator.temperature.value == first.estimator.temperature.value < 0.11
    # half precision would round it, and a small one to 0
    assert second.half().estimator.temperature() == first.estimator.temperature()


@pytest.mark.parametrize("estimator", [Gumbel(), Stochastic()], ids=["gumbel", "stochastic"])
def test_with_a_codebook_that_learns_by_averages(estimator):
    quantizer = VectorQuantizer(EMACodebook(K, D, init="normal"), estimator).to(DEVICE)
    before = quantizer.export()
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    quantizer.commit()
    assert x.grad.any() and not torch.equal(quantizer.export(), before)


def test_short_names():
    assert isinstance(build("gumbel", dim=4, num_codes=8).estimator, Gumbel)
    assert isinstance(build("stochastic", dim=4, num_codes=8).estimator, STE)


def test_schedules():
    epochs, start, stop = 50, 1.0, 0.1
    eta = (stop / start) ** (1 / epochs)
    schedule = ExponentialTemperature(epochs)
    for t in (0, 1, 17, 49, 50, 99):
        # DiVeQ eq. 13
        assert math.isclose(schedule.at(t), max(start * eta**t, stop), rel_tol=1e-12)
        assert schedule.settled(t) == (t >= epochs)
    assert schedule.at(50) == schedule.at(60) == schedule.lowest() == 0.1
    assert [LinearTemperature(4, 1.0, 0.0).at(t) for t in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    cosine = [CosineTemperature(4, 2.0, 0.0).at(t) for t in range(6)]
    expected = [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0]
    assert all(math.isclose(a, b, abs_tol=1e-15) for a, b in zip(cosine, expected, strict=True))
    assert ConstantTemperature(0.3).at(7) == 0.3 and ConstantTemperature().settled(0)
    assert Gumbel(temperature=0.5).idle and not Gumbel().idle


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ExponentialTemperature(0), ValueError, "steps must be at least 1; got 0"),
        (lambda: ExponentialTemperature(9, stop=0.0), ValueError, "stop must be finite and above 0; got 0.0"),
        (lambda: LinearTemperature(9, 0.0, 0.0), ValueError, "start must be finite and above 0"),
        (lambda: CosineTemperature(9, 1.0, 2.0), ValueError, r"stop must be at most start, 1\.0; got 2\.0"),
        (lambda: LinearTemperature(9, math.inf), ValueError, "start must be finite"),
        (lambda: ConstantTemperature("1"), TypeError, "value must be a number; got str"),
        (
            lambda: Gumbel(temperature=LinearTemperature(9, 1.0, 0.0)),
            ValueError,
            "temperature must stay above 0",
        ),
        (
            lambda: Gumbel(temperature="cold"),
            TypeError,
            "temperature must be a schedule or a number; got 'cold'",
        ),
        (lambda: Gumbel(temperature=1e-60), ValueError, "temperature must stay above 0"),
        (lambda: LinearTemperature(9, 1e39), ValueError, "start must be finite"),
        (lambda: Gumbel(temperature=ExponentialTemperature), TypeError, "must be a schedule or a number"),
        (
            lambda: Gumbel(temperature=SimpleNamespace(at=float)),
            TypeError,
            "temperature must be a schedule or a number",
        ),
        (lambda: Gumbel(kl_weight=-1.0), ValueError, "kl_weight must be not negative"),
        (lambda: Stochastic(temperature=-1.0), ValueError, "value must be finite and not negative"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()


MEASURE = """
import sys, torch
from vqkernels.nn import Codebook, Gumbel, Stochastic, VectorQuantizer

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3

# more threads need more time where others want them too, and no less memory
torch.set_num_threads(1)
torch.manual_seed(0)
name, n, k, d = sys.argv[1], *map(int, sys.argv[2:])
estimators = {"gumbel": Gumbel, "stochastic": Stochastic, "head": lambda: Gumbel(head=torch.nn.Linear(d, k))}
quantizer = VectorQuantizer(Codebook(k, d, init="normal"), estimators[name]())

def step(x, grad):
    z, _, loss = quantizer(x)
    torch.autograd.backward((z, loss), (grad, None))

# what the first call loads is not the step's
step(torch.randn(16, d, requires_grad=True), torch.randn(16, d))
x, grad = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
outputs = 4 * (2 * x.numel() + n) / 1e6
before = status("VmRSS")
step(x, grad)
print(status("VmHWM") - before - outputs)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gumbel", (65536, 1024, 64)),
        ("stochastic", (65536, 1024, 64)),
        ("head", (65536, 1024, 64)),
        pytest.param("gumbel", (32768, 16384, 256), marks=pytest.mark.slow),
        pytest.param("stochastic", (32768, 16384, 256), marks=pytest.mark.slow),
        pytest.param("head", (32768, 16384, 256), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_of_a_step(name, shape):
    """Forward and backward within 500 MB above inputs and outputs, where N x K floats are 0.27 and 2.1 GB."""
    command = [sys.executable, "-c", MEASURE, name, *map(str, shape)]
    # what is freed goes back to the system, so that the peak is what is in use, and not what was left in pieces
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    limit = 500 if shape[1] > 1024 else 200
    assert float(ran.stdout) < limit, f"{ran.stdout} MB"
