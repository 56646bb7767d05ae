"""torch sees every op as one opaque call: opcheck, and fullgraph compilation of functions and modules."""

import pytest
import torch
import torch._inductor.config
from conftest import INTERPRETED

import vqkernels as vq
from vqkernels.nn import (
    METHODS,
    HyperNetCodebook,
    ImportanceReplacement,
    LatentMeans,
    SFDiVeQ,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.ops import OPS
from vqkernels.testing import DEVICE, strided

FUNCTIONS = {
    "nearest_code": lambda x, c: vq.nearest_code(x, c).sq_dist,
    "nearest_segment": lambda x, c: vq.nearest_segment(x, c).position,
    "diveq": lambda x, c: vq.diveq(x, c, seed=3).z,
    "sf_diveq": lambda x, c: vq.sf_diveq(x, c, seed=3).z,
    "directional": lambda x, c: vq.directional(
        x, c, torch.zeros_like(x[..., 0], dtype=torch.int64), direction="detach"
    ),
    "gumbel_code": lambda x, c: vq.ops.gumbel_code(x, c, seed=3).z,
    "gumbel_code kl": lambda x, c: vq.ops.gumbel_code(x, c, seed=3).kl,
    "sample_code": lambda x, c: vq.ops.sample_code(x, c, seed=3),
    "straight_through": lambda x, c: (
        vq.straight_through(x, c, torch.zeros_like(x[..., 0], dtype=torch.int64), rotation=True, sync=0.5).z
    ),
    "code_sums": lambda x, c: vq.code_sums(x, torch.zeros_like(x[..., 0], dtype=torch.int64), 3).sums,
}


def samples(layout):
    """Arguments of each op."""
    x = strided(torch.randn(60, 7, device=DEVICE), layout)
    x = x if x.dim() == 3 else x[None]
    codes, seed = torch.randn(9, 7, device=DEVICE), torch.tensor(5, device=DEVICE)
    indices = torch.randint(0, 8, x.shape[:-1], device=DEVICE)
    position, tau = torch.rand(x.shape[:-1], device=DEVICE), torch.tensor(0.7, device=DEVICE)
    family = [
        (x, codes, indices, at, seed, direction, 0.1, 4) for at in (None, position) for direction in (0, 1)
    ]
    return {
        "nearest_code": [
            (x, codes, None, True, []),
            (x, codes, torch.rand(8, device=DEVICE), True, []),
            (x, codes, None, False, []),
        ],
        "nearest_segment": [(x, codes)],
        "directional": family,
        "directional_backward": [(torch.randn_like(x), *args) for args in family],
        "straight_through": [(x, codes, indices)],
        "straight_through_backward": [
            (torch.randn_like(x), torch.full((), 0.5, device=DEVICE), x, codes, indices, *options)
            for options in (
                (False, 0.25, 1.0, 0.0, True, True),
                (True, 0.25, 1.0, 0.5, True, False),
                (True, 0.25, 1.0, 0.5, False, True),
            )
        ],
        "code_sums": [(x, indices, 9)],
        "unit_rows": [(x,)],
        "unit_rows_backward": [(torch.randn_like(x), x, x.norm(dim=2, keepdim=True))],
        "philox": [(seed, 6, 3, 1, 2**33)],
        "gumbel_code": [(x, codes, seed, tau, 4)],
        "gumbel_code_backward": [
            (
                torch.randn_like(x),
                torch.randn(x.shape[:-1], device=DEVICE),
                x,
                codes,
                seed,
                tau,
                4,
                indices,
                position,
            )
        ],
        "sample_code": [(x, codes, seed, tau, 4), (x, codes, seed, 0 * tau, 4)],
    }


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels"])
@pytest.mark.parametrize("name", list(OPS))
def test_opcheck(name, layout, backend, need):
    need(name)
    for args in samples(layout)[name]:
        # autograd sits above the ops, so there is no registration to test
        torch.library.opcheck(
            OPS[name].backends[backend].run, args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions(name, layout, backend, need):
    need("directional" if "diveq" in name else name.split()[0])
    torch._dynamo.reset()
    x = strided(torch.randn(60, 7, device=DEVICE), layout).requires_grad_()
    codes = torch.randn(9, 7, device=DEVICE, requires_grad=True)
    run = FUNCTIONS[name]
    with vq.use_backend(backend):
        out = run(x, codes)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, codes)
        assert torch.equal(out, compiled)
        if out.requires_grad:
            g = torch.randn_like(out)
            for a, b in zip(*(torch.autograd.grad(o, (x, codes), g) for o in (out, compiled)), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")
@pytest.mark.parametrize("name", list(METHODS))
def test_modules(name):
    """A training step and an evaluation of every method, upkeep included, compile without a graph break."""
    torch._dynamo.reset()
    upkeep = [LatentMeans(1, latents_per_code=1)] if METHODS[name].warm_up else []
    if METHODS[name].upkeep and not METHODS[name].segments:
        upkeep.append(ImportanceReplacement(TwoPhase(9, 2, stop_before=0)))
    quantizer = build(name, dim=6, num_codes=8, channel_dim=1, upkeep=upkeep).to(DEVICE)
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))])
    quantizer.follow(optimizer)
    step = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for number in range(5):
        x = torch.randn(2, 6, 4, 4, device=DEVICE, requires_grad=True)
        # commits, replacement and schedules change no graph once codes have started
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            z, indices, loss = step(x)
        (z.square().sum() + loss).backward()
        optimizer.step()
        assert x.grad.isfinite().all() and x.grad.any() and z.stride() == x.stride()
    assert quantizer.initialized and indices.max() >= 0
    quantizer.eval()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled.z, quantizer(x).z) and torch.equal(compiled.indices, quantizer(x).indices)


@pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")
def test_inductor():
    """The default compiler gives the same step."""
    torch._dynamo.reset()
    x = torch.randn(2, 6, 4, 4, device=DEVICE, requires_grad=True)
    codes = torch.randn(9, 6, device=DEVICE, requires_grad=True)

    def run(x, codes):
        return vq.sf_diveq(x.movedim(1, -1), codes, seed=3).z.movedim(-1, 1).square().mean()

    expected = torch.autograd.grad(run(x, codes), (x, codes))
    found = torch.autograd.grad(torch.compile(run, fullgraph=True)(x, codes), (x, codes))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


REPRESENTATIVE = {
    "ste": lambda: build("ste", dim=6, num_codes=8, channel_dim=1),
    "ema": lambda: build("ema", dim=6, num_codes=8, channel_dim=1),
    "rotation": lambda: build("rotation", dim=6, num_codes=8, channel_dim=1),
    "diveq": lambda: build("diveq", dim=6, num_codes=8, channel_dim=1),
    "sf_diveq of a hyper-net": lambda: VectorQuantizer(HyperNetCodebook(8, 6), SFDiVeQ(), channel_dim=1),
    "product": lambda: build("product", dim=6, num_codes=8, channel_dim=1),
}


@pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")
@pytest.mark.parametrize("name", list(REPRESENTATIVE))
@torch._inductor.config.patch(fallback_random=True)
def test_inductor_modules(name):
    """A training step and an evaluation of the default compiler are those of eager mode."""
    torch._dynamo.reset()
    quantizer = REPRESENTATIVE[name]().to(DEVICE)
    optimizer = torch.optim.SGD([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))], 0.1)
    quantizer.follow(optimizer)
    x, weight = torch.randn(2, 6, 4, 4, device=DEVICE), torch.randn(2, 6, 4, 4, device=DEVICE)
    found = []
    for run in (quantizer, torch.compile(quantizer, fullgraph=True)):
        quantizer.zero_grad()
        leaf = x.clone().requires_grad_()
        # the seed of the noise, which the compiler would draw by another generator than torch's
        torch.manual_seed(5)
        z, indices, loss = run(leaf)
        ((z * weight).sum() + loss).backward()
        gradients = [parameter.grad.clone() for parameter in quantizer.parameters()]
        found.append((z.detach(), indices, loss.detach(), leaf.grad, *gradients))
        quantizer.eval()
        with torch.no_grad():
            found[-1] += run(x)[:2]
        quantizer.train()
    for expected, compiled in zip(*found, strict=True):
        if expected.dtype == torch.int64:
            assert torch.equal(expected, compiled)
        else:
            # products of 256 hidden features, or sums of 32 rows
            bound = 256 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(compiled, expected, rtol=bound, atol=bound)


@pytest.mark.skipif(INTERPRETED, reason="sizes are tested beside the compiled backends")
def test_dynamic_sizes():
    """One graph serves every batch size and layout of one rank."""
    torch._dynamo.reset()

    def run(x, codes):
        return vq.sf_diveq(x.movedim(1, -1), codes, seed=3).z

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((4, 5), (7, 9), (12, 3)):
        x = torch.randn(n, 8, m, device=DEVICE, requires_grad=True)
        codes = torch.randn(50, 8, device=DEVICE, requires_grad=True)
        assert torch.equal(compiled(x, codes), run(x, codes))


def test_functional_transforms():
    """torch.func.grad differentiates through an op like backward does."""
    x, codes = torch.randn(20, 8, device=DEVICE), torch.randn(50, 8, device=DEVICE)
    leaf = x.clone().requires_grad_()
    vq.diveq(leaf, codes, seed=1).z.square().sum().backward()
    assert torch.equal(torch.func.grad(lambda v: vq.diveq(v, codes, seed=1).z.square().sum())(x), leaf.grad)


def test_compiling_without_an_optimizer_is_refused():
    quantizer = build("ema", dim=4, num_codes=4)
    with pytest.raises(Exception, match=r"Call quantizer\.follow"):
        torch.compile(quantizer, fullgraph=True, backend="aot_eager")(torch.randn(3, 4))
