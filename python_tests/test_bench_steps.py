"""No layer is timed before its step was checked: ours against float64, a peer's against its own codes."""

import sys
from pathlib import Path

import pytest
import torch

import vqkernels as vq

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import options  # noqa: E402
import run  # noqa: E402

from vqkernels.profiling import peers, steps  # noqa: E402

# more rows than are compared with float64, so that some have nothing but the sums
SHAPE = (300, 40, 8)
FUNCTIONS = ("diveq", "sf_diveq")


class Tampered(torch.autograd.Function):
    """Ours, with another output or other gradients."""

    @staticmethod
    def forward(ctx, x, codes, function, tamper):
        ctx.tamper, ctx.seed = tamper, steps.check_seed("test", None, x.device)
        ctx.function = function
        ctx.save_for_backward(x, codes)
        z = getattr(vq, function)(x, codes, seed=ctx.seed).z
        return tamper(z, z, z)[0]

    @staticmethod
    def backward(ctx, grad):
        x, codes = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            z = getattr(vq, ctx.function)(x, codes, seed=ctx.seed).z
            grads = torch.autograd.grad(z, (x, codes), grad)
        return *ctx.tamper(z, *grads)[1:], None, None


def middle_row(t, change):
    """Another middle row, which is compared with nothing by itself."""
    t = t.clone()
    t[len(t) // 2] = change(t[len(t) // 2])
    return t


TAMPERS = {
    "z = 0": (lambda z, gx, gc: (0 * z, gx, gc), "z: "),
    "z a little off": (lambda z, gx, gc: (z + 1e-3, gx, gc), "z: "),
    "gradient of x": (lambda z, gx, gc: (z, 0.999 * gx, gc), "gradient of x: "),
    "no gradient of x": (lambda z, gx, gc: (z, 0 * gx, gc), "gradient of x: "),
    "a lost row": (
        lambda z, gx, gc: (z, middle_row(gx, lambda row: 100 + row), gc),
        "sum of both gradients: ",
    ),
    "gradient of the codes": (lambda z, gx, gc: (z, gx, -gc), "sum of both gradients: "),
    "of another code": (lambda z, gx, gc: (z, gx, gc.roll(1, 0)), "gradient of the codes: "),
    "not finite": (lambda z, gx, gc: (z, gx, gc / 0), "not finite"),
}


def bench(tmp_path, monkeypatch, table, *words):
    monkeypatch.setattr(run, "layers", lambda device, dtype, isas: table)
    monkeypatch.setattr(steps, "ROWS", 64)
    given = ["--shapes", ",".join(map(str, SHAPE)), "--cases", "layer", "--rounds", "3", "--no-memory"]
    made = run.Bench(options.parse([*given, *words, "--out", str(tmp_path / "out.jsonl")]))
    monkeypatch.setattr(made, "measure_floors", lambda dtype: None)
    return made


def tampered(function, tamper):
    def make(codes, inputs):
        codes = codes.clone().requires_grad_()
        return peers.Layer(lambda x: Tampered.apply(x, codes, function, tamper), (codes,))

    return peers.Contender(f"vqkernels {function}", make, function=function)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ours_as_it_is_is_timed(tmp_path, monkeypatch, function):
    made = bench(tmp_path, monkeypatch, [tampered(function, lambda *step: step)])
    assert made.go() == 0 and [each["name"] for each in made.measured] == [f"vqkernels {function}"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", TAMPERS)
def test_ours_is_not_timed_where_a_value_is_wrong(tmp_path, monkeypatch, capsys, name, function):
    tamper, words = TAMPERS[name]
    made = bench(tmp_path, monkeypatch, [tampered(function, tamper)])
    assert made.go() == 1 and made.measured == []
    assert f"FAILED vqkernels {function}" in (told := capsys.readouterr().out) and words in told


def test_ours_must_say_what_it_is_and_give_both_gradients(tmp_path, monkeypatch, capsys):
    far = peers.Contender("vqkernels diveq", lambda codes, inputs: peers.Layer(lambda x: x + 3.0))
    assert bench(tmp_path, monkeypatch, [far]).go() == 1
    assert "must name the function it runs" in capsys.readouterr().out
    far = peers.Contender(far.name, far.make, function="diveq")
    assert bench(tmp_path, monkeypatch, [far]).go() == 1
    assert "1 gradients, where x and the codes get one each" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bounds_hold_in_other_dtypes(function, dtype):
    x, codes, grad = (torch.randn(rows, 24).to(dtype) for rows in (500, 30, 500))
    judge = steps.Steps(x, codes, grad)
    ours = tampered(function, lambda *step: step)
    call = peers.bind(ours, codes, [x], grad)
    judge.begin(call.layer)
    judge.check(ours, call, call(x))


@pytest.mark.parametrize(
    ("forward", "good"),
    [
        (lambda x, codes: codes[torch.cdist(x, codes).argmin(1)] + 0 * x, True),
        (lambda x, codes: codes[torch.cdist(x, codes).argmax(1)] + 0 * x, False),
        (lambda x, codes: 0 * x, False),
        (lambda x, codes: 1 * x, False),
    ],
)
@pytest.mark.parametrize("curve", [False, True])
def test_a_peer_moves_as_far_as_its_codes_say(tmp_path, monkeypatch, capsys, forward, good, curve):
    def make(codes, inputs):
        return peers.Layer(lambda x: forward(x, codes), (), lambda: codes, curve)

    made = bench(tmp_path, monkeypatch, [peers.Contender("peer", make)])
    # on a curve all that is known is that it moves, and no farther than to a code
    right = good or (curve and not torch.equal(forward(torch.ones(2, 8), torch.eye(8)), torch.ones(2, 8)))
    assert made.go() == 0 and bool(made.measured) == right
    assert ("do not move as far as its codes are" in capsys.readouterr().out) == (not right)
