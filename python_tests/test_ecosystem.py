"""What training code does to a module, for every short name: accumulate, checkpoint, autocast, copy, move, compile."""

import copy
import io

import pytest
import torch
from conftest import INTERPRETED
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import (
    METHODS,
    Codebook,
    ImportanceReplacement,
    LatentMeans,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE, brute_force

EVERY = pytest.mark.parametrize("name", list(METHODS))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")
D, K, N = 6, 16, 48


def bare(name, warm_up=0):
    """A quantizer with the upkeep that its method takes."""
    method = METHODS[name]
    upkeep = [LatentMeans(warm_up, latents_per_code=2)] if warm_up else []
    if method.upkeep and not method.segments:
        upkeep.append(ImportanceReplacement(TwoPhase(99, 2, stop_before=0), threshold=0.5))
    return build(name, dim=D, num_codes=K, upkeep=upkeep)


def make(name, warm_up=0):
    """The same with codes that normal latents reach."""
    torch.manual_seed(1)
    quantizer = bare(name, warm_up).to(DEVICE)
    for part in quantizer.modules():
        if isinstance(part, Codebook) and part.assignable:
            part.assign(torch.randn(part.num_codes, part.dim, device=DEVICE))
    return quantizer


def optimizer_of(*modules):
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.Adam([*parameters, nn.Parameter(torch.zeros((), device=DEVICE))], 1e-2)


def backward(z, loss):
    # not the sum of squares: that is a constant on the unit sphere
    (z * torch.linspace(1, 2, D, device=z.device)).float().sum().add(loss).backward()


def step(quantizer, optimizer, x, run=None):
    """One training step from a given seed; all that another way to run it must give as well."""
    optimizer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(4)
    z, indices, loss = (run or quantizer)(x)
    backward(z, loss)
    gradients = {key: parameter.grad.clone() for key, parameter in quantizer.named_parameters()}
    optimizer.step()
    return {"z": z.detach(), "indices": indices, "loss": loss.detach(), "x": x.grad, **gradients}


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def check_equal(found, expected, **close):
    """The same tensors, to the bit where no tolerance is given."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if close and value.is_floating_point():
            torch.testing.assert_close(
                found[key], value, msg=lambda words, key=key: f"{key}: {words}", **close
            )
        else:
            assert torch.equal(found[key], value), key


@EVERY
def test_gradient_accumulation(name):
    """Two half batches before a step are counted like one batch, in a warm-up too, and committed once."""
    batches = torch.randn(2, N, D, device=DEVICE)
    results = []
    for parts in (1, 2):
        quantizer = make(name, warm_up=1 if METHODS[name].upkeep else 0)
        optimizer = optimizer_of(quantizer)
        quantizer.follow(optimizer)
        for number, x in enumerate(batches):
            seen = []
            for rows in x.chunk(parts):
                z, indices, loss = quantizer(rows.clone().requires_grad_())
                backward(z, loss / parts)
                seen.append(indices)
            counted = state(quantizer)
            # codes shall move by statistics alone: the noise of a gradient depends on the number of forwards
            optimizer.zero_grad(set_to_none=False)
            # and so does what a replacement draws
            torch.manual_seed(number)
            optimizer.step()
            assert quantizer.get_extra_state().tolist() == [number + 1, 0]
        results.append((torch.cat(seen), counted, state(quantizer)))
    (indices, *whole), (chosen, *halves) = results
    for key, value in halves[0].items():
        if key.endswith("counts"):
            assert value.sum() == whole[0][key].sum() >= N, key
    if torch.equal(indices, chosen):
        # sums of N rows in another order
        bound = N * torch.finfo(torch.float32).eps
        for found, expected in zip(halves, whole, strict=True):
            check_equal(found, expected, rtol=bound, atol=bound)
    else:
        # two forwards draw two seeds
        assert quantizer.noisy


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name, reentrant):
    """A forward that is run again in the backward pass counts once and draws the same noise: equal to the bit."""
    warm_up = 1 if METHODS[name].warm_up else 0
    results = []
    for recompute in (False, True):
        quantizer = make(name, warm_up=warm_up)
        optimizer = optimizer_of(quantizer)
        quantizer.follow(optimizer)

        def run(x, recompute=recompute, quantizer=quantizer):
            return checkpoint(quantizer, x, use_reentrant=reentrant) if recompute else quantizer(x)

        generator = torch.Generator().manual_seed(2)
        seen = {}
        for number in range(3):
            x = torch.randn(N, D, generator=generator).to(DEVICE)
            seen |= {f"{number} {key}": v for key, v in step(quantizer, optimizer, x, run).items()}
        results.append(seen | state(quantizer))
    check_equal(results[1], results[0])


@EVERY
def test_autocast(name):
    """Latents of a half-precision encoder: z is half, and codes, statistics, gradients and the search are not."""
    quantizer, encoder = make(name), nn.Linear(4, D).to(DEVICE)
    optimizer = optimizer_of(quantizer, encoder)
    quantizer.follow(optimizer)
    dtypes = {key: value.dtype for key, value in quantizer.state_dict().items()}
    for _ in range(3):
        x = torch.randn(N, 4, device=DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            latents = encoder(x)
            z, _, loss = quantizer(latents)
        assert latents.dtype == torch.bfloat16 == z.dtype and loss.dtype == torch.float32
        backward(z, loss)
        for key, parameter in [*quantizer.named_parameters(), *encoder.named_parameters()]:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key
        optimizer.step()
    for key, value in quantizer.state_dict().items():
        assert value.dtype == dtypes[key] != torch.bfloat16 and value.isfinite().all(), key
    quantizer.eval()
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        z, indices, _ = quantizer(latents)
        if isinstance(quantizer, VectorQuantizer):
            codes = quantizer.codes()
            expected, _ = brute_force(quantizer.inside(latents), codes)
            assert codes.dtype == torch.float32 and torch.equal(indices[:, 0], expected)
    # codes are decoded alike in the region and outside
    assert z.dtype == torch.bfloat16 and torch.equal(quantizer.decode(indices).to(z.dtype), z)


def continued(quantizer):
    """What two more steps give, and the state they leave."""
    optimizer = torch.optim.SGD([*quantizer.parameters(), nn.Parameter(torch.zeros(()))], 1e-2)
    quantizer.follow(optimizer)
    generator, seen = torch.Generator().manual_seed(3), {}
    for number in range(3):
        x = torch.randn(N, D, generator=generator).to(DEVICE)
        seen |= {f"{number} {key}": value for key, value in step(quantizer, optimizer, x).items()}
    return seen | state(quantizer)


def begun(name):
    """A quantizer in the middle of a warm-up, where its method takes one, with a forward that waits for its commit."""
    warm_up = 2 if METHODS[name].upkeep else 0
    quantizer = make(name, warm_up=warm_up)
    continued_by = torch.optim.SGD([*quantizer.parameters(), nn.Parameter(torch.zeros(()))], 1e-2)
    quantizer.follow(continued_by)
    step(quantizer, continued_by, torch.randn(N, D, device=DEVICE))
    quantizer(torch.randn(N, D, device=DEVICE))
    assert quantizer.initialized == (not warm_up) and quantizer.uncommitted
    return quantizer


@EVERY
def test_copies_continue_alike(name):
    """In the middle of a warm-up: a deep copy, a pickle, and fresh modules with the same state, one from nowhere."""
    first = begun(name)
    stored, warm_up = io.BytesIO(), 2 if METHODS[name].upkeep else 0
    torch.save(first, stored)
    stored.seek(0)
    with torch.device("meta"):
        nowhere = bare(name, warm_up)
    copies = [copy.deepcopy(first), torch.load(stored, weights_only=False)]
    copies += [bare(name, warm_up).to(DEVICE), nowhere.to_empty(device=DEVICE)]
    for other in copies[2:]:
        other.load_state_dict(first.state_dict())
    expected = continued(first)
    for other in copies:
        check_equal(continued(other), expected)
    assert first.initialized and torch.equal(first.eval().export(), copies[-1].eval().export())


@EVERY
def test_moved_to_another_dtype_and_back(name):
    """Wider and back changes no bit; a module of half codes trains, with statistics that are not half."""
    first = begun(name)
    before = state(first)
    first.double()
    assert first.export().dtype == torch.float64
    check_equal(state(first.float()), before)
    half = make(name).to(torch.bfloat16)
    optimizer = optimizer_of(half)
    half.follow(optimizer)
    for _ in range(2):
        found = step(half, optimizer, torch.randn(N, D, device=DEVICE).bfloat16())
        assert found["z"].dtype == torch.bfloat16 and all(value.isfinite().all() for value in found.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    for key, value in half.state_dict().items():
        assert value.isfinite().all()
        if key.rpartition(".")[2] in ("mass", "sums", "mean_x", "var_x", "mean_c", "var_c"):
            assert value.dtype in (torch.float32, torch.float64), key


@EVERY
def test_a_step_looks_at_no_value(name):
    """Tensors of the meta device have none: whatever asks for one, as a host sync does, raises."""
    quantizer = make(name).to("meta")
    mask = torch.ones(4, 5, dtype=torch.bool, device="meta")
    for given in (None, mask):
        x = torch.randn(4, 5, D, device="meta", requires_grad=True)
        z, indices, loss = quantizer(x, given)
        backward(z, loss)
        quantizer.commit()
        assert z.shape == x.shape == x.grad.shape and indices.dtype == torch.int64
    assert quantizer.eval()(x, mask).indices.shape == (4, 5, quantizer.codes_per_latent)
